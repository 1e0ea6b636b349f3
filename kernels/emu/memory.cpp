// Global and shared memory of the machine: bounds, alignment, what was written, and who touched it when.

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <unordered_map>

#include "emu/moment.h"

namespace micro_kernels::emu {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kCell = 2;  // bytes that share one history: the smallest element that kernels write
constexpr unsigned char kPoison = 0xff;

// Of one cell: its last write, and the reads since then. `many`: threads that no barrier parts have read it; `warps`:
// of more than one warp.
struct History {
  Moment write, read;
  bool many = false, warps = false;
};

void note_read(History& h, const Moment& now, bool& race) {
  race = race || !h.write.before(now);
  if (h.read.same_thread(now)) {
    h.many = h.many && h.read.block_epoch == now.block_epoch &&  // a barrier parts it from the others' reads
             (h.warps || h.read.warp_epoch == now.warp_epoch);
    h.read = now;
    return;
  }
  const bool apart = h.read.before(now);
  h.warps = !apart && (h.warps || h.read.thread / kLanes != now.thread / kLanes);
  h.many = !apart;
  h.read = now;
}

void note_write(History& h, const Moment& now, bool& race) {
  race = race || !h.write.before(now) || !h.read.before(now) ||
         (h.many && h.read.run == now.run && h.read.block_epoch == now.block_epoch &&
          (h.warps || h.read.warp_epoch == now.warp_epoch));
  h.write = now;
}

struct Page {
  bool written[kPage] = {};
  History cells[kPage / kCell];
};

struct Allocation {
  char* base;
  size_t bytes;
  bool reserved;
  std::vector<std::unique_ptr<Page>> pages;  // nullptr: never touched

  Page& page(size_t offset) {
    auto& slot = pages[offset / kPage];
    if (!slot) slot = std::make_unique<Page>();
    return *slot;
  }
};

std::map<const char*, Allocation>& allocations() {
  static std::map<const char*, Allocation> all;
  return all;
}

// Those that were touched last: a kernel goes back and forth between a few.
struct Recent {
  Allocation* kept[8] = {};
  unsigned next = 0;
};
Recent& recent() {
  static Recent only;
  return only;
}

// The allocation that holds all of [address, address + bytes), or nullptr.
Allocation* find(const void* address, size_t bytes) {
  const auto* first = static_cast<const char*>(address);
  const auto holds = [&](const Allocation& a) { return first >= a.base && first + bytes <= a.base + a.bytes; };
  for (Allocation* a : recent().kept)
    if (a && holds(*a)) return a;
  auto after = allocations().upper_bound(first);
  if (after == allocations().begin()) return nullptr;
  Allocation& a = std::prev(after)->second;
  if (!holds(a)) return nullptr;
  recent().kept[recent().next++ % 8] = &a;
  return &a;
}

// One block's shared memory.
struct Shared {
  alignas(128) unsigned char data[kMostSharedBytes];
  bool written[kMostSharedBytes];
  History cells[kMostSharedBytes / kCell];
  uint32_t copied_by[kMostSharedBytes / kCell];  // thread + 1 whose asynchronous copy is under way
  size_t bytes = 0;
};
Shared& shared() {
  static Shared only;
  return only;
}

struct Copy {
  size_t to;
  unsigned char data[16];
  int group;
};
struct Copies {
  std::vector<Copy> open;
  int groups = 0;  // committed
};
std::unordered_map<uint32_t, Copies>& copies() {
  static std::unordered_map<uint32_t, Copies> by_thread;
  return by_thread;
}

void check_alignment(const void* address, size_t bytes, Site site) {
  const size_t wanted = bytes & (~bytes + 1);  // the largest power of two in it
  if (reinterpret_cast<uintptr_t>(address) % wanted)
    fault(site, "a misaligned access of " + std::to_string(bytes) + " bytes");
}

Allocation& global_range(const void* address, size_t bytes, Site site) {
  Allocation* a = find(address, bytes);
  if (!a) {
    const Allocation* near = find(address, 1);
    fault(site, near ? "out of bounds: " + std::to_string(bytes) + " bytes at byte " +
                           std::to_string(static_cast<const char*>(address) - near->base) + " of an allocation of " +
                           std::to_string(near->bytes)
                     : "out of bounds: an address in no allocation");
  }
  check_alignment(address, bytes, site);
  return *a;
}

size_t shared_range(const void* address, size_t bytes, Site site) {
  Shared& s = shared();
  const auto* first = static_cast<const unsigned char*>(address);
  if (first < s.data || first + bytes > s.data + s.bytes)
    fault(site, "out of bounds: not in the block's " + std::to_string(s.bytes) + " bytes of shared memory");
  check_alignment(address, bytes, site);
  const auto offset = static_cast<size_t>(first - s.data);
  for (size_t c = offset / kCell; c * kCell < offset + bytes; ++c)
    if (s.copied_by[c])
      fault(site, "shared memory whose asynchronous copy by thread " + std::to_string(s.copied_by[c] - 1) +
                      " has not been waited for");
  return offset;
}

constexpr char kRace[] = "a race: another thread has touched the same memory, and no barrier stands between";

void write_shared(size_t offset, size_t bytes, Site site) {
  Shared& s = shared();
  const Moment moment = now();
  bool race = false;
  for (size_t c = offset / kCell; c * kCell < offset + bytes; ++c) note_write(s.cells[c], moment, race);
  if (race) fault(site, std::string(kRace) + ": shared memory, byte " + std::to_string(offset));
}

}  // namespace

// ---- the host's side -----------------------------------------------------------------------------------------------

namespace {
void* add_allocation(size_t bytes, bool reserved) {
  const size_t mapped = (std::max<size_t>(bytes, 1) + kPage - 1) / kPage * kPage;
  void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  if (!reserved) std::memset(memory, kPoison, bytes);
  auto* base = static_cast<char*>(memory);
  allocations().emplace(base, Allocation{base, bytes, reserved, std::vector<std::unique_ptr<Page>>(mapped / kPage)});
  return memory;
}
}  // namespace

void* allocate(size_t bytes) { return add_allocation(bytes, false); }
void* reserve(size_t bytes) { return add_allocation(bytes, true); }

void release(void* memory) {
  const auto it = allocations().find(static_cast<char*>(memory));
  if (it == allocations().end()) return;
  munmap(memory, (std::max<size_t>(it->second.bytes, 1) + kPage - 1) / kPage * kPage);
  allocations().erase(it);
  recent() = {};
}

void written_by_host(void* memory, size_t bytes) {
  Allocation* a = find(memory, bytes);
  if (!a) throw Fault("written_by_host: not in an allocation");
  const auto begin = static_cast<size_t>(static_cast<char*>(memory) - a->base);
  for (size_t i = begin; i < begin + bytes; ++i) a->page(i).written[i % kPage] = true;
}

size_t first_unwritten(const void* memory, size_t bytes) {
  Allocation* a = find(memory, bytes);
  if (!a) throw Fault("first_unwritten: not in an allocation");
  const auto begin = static_cast<size_t>(static_cast<const char*>(memory) - a->base);
  for (size_t i = 0; i < bytes; ++i)
    if (!a->page(begin + i).written[(begin + i) % kPage]) return i;
  return bytes;
}

// ---- all of it, for the comparison of runs -------------------------------------------------------------------------

class Snapshot {
 public:
  struct Saved {
    std::vector<char> bytes;
    std::vector<std::unique_ptr<bool[]>> written;  // by page; nullptr: nothing
  };
  std::map<const char*, Saved> all;
};

std::shared_ptr<Snapshot> take_snapshot() {
  auto snapshot = std::make_shared<Snapshot>();
  for (auto& [base, a] : allocations()) {
    if (a.reserved) continue;
    Snapshot::Saved saved;
    saved.bytes.assign(a.base, a.base + a.bytes);
    for (const auto& page : a.pages) {
      auto& copy = saved.written.emplace_back(page ? new bool[kPage] : nullptr);
      if (page) std::copy_n(page->written, kPage, copy.get());
    }
    snapshot->all.emplace(base, std::move(saved));
  }
  return snapshot;
}

void restore(const Snapshot& snapshot) {
  for (const auto& [base, saved] : snapshot.all) {
    Allocation& a = allocations().at(base);
    std::copy(saved.bytes.begin(), saved.bytes.end(), a.base);
    for (size_t i = 0; i < a.pages.size(); ++i) {
      if (!a.pages[i]) continue;
      if (saved.written[i])
        std::copy_n(saved.written[i].get(), kPage, a.pages[i]->written);
      else
        std::fill_n(a.pages[i]->written, kPage, false);
    }
  }
}

std::string difference(const Snapshot& snapshot) {
  for (const auto& [base, saved] : snapshot.all) {
    const Allocation& a = allocations().at(base);
    const auto at = std::mismatch(saved.bytes.begin(), saved.bytes.end(), a.base).first - saved.bytes.begin();
    if (at != static_cast<ptrdiff_t>(a.bytes))
      return "byte " + std::to_string(at) + " of an allocation of " + std::to_string(a.bytes);
  }
  return {};
}

// ---- the kernels' side ---------------------------------------------------------------------------------------------

namespace {

// Of an access to global memory: no access of at most 16 aligned bytes crosses a page.
void note_global(Allocation& a, size_t offset, size_t bytes, bool write, Site site) {
  Page& page = a.page(offset);
  bool* written = page.written + offset % kPage;
  const Moment moment = now();
  bool race = false;
  for (size_t c = offset % kPage / kCell; c * kCell < offset % kPage + bytes; ++c)
    write ? note_write(page.cells[c], moment, race) : note_read(page.cells[c], moment, race);
  const auto place = [&](size_t byte) {
    return ": byte " + std::to_string(byte) + " of an allocation of " + std::to_string(a.bytes);
  };
  if (write) std::fill_n(written, bytes, true);
  const auto hole = static_cast<size_t>(std::find(written, written + bytes, false) - written);
  if (hole < bytes) fault(site, "a read of memory never written" + place(offset + hole));
  if (race) fault(site, kRace + place(offset));
  if (counting()) count_access(false, write, a.base + offset, bytes, site);
}

}  // namespace

void check_read(const void* address, size_t bytes, Site site) {
  Allocation& a = global_range(address, bytes, site);
  note_global(a, static_cast<size_t>(static_cast<const char*>(address) - a.base), bytes, false, site);
}

void check_write(void* address, size_t bytes, Site site) {
  Allocation& a = global_range(address, bytes, site);
  note_global(a, static_cast<size_t>(static_cast<char*>(address) - a.base), bytes, true, site);
}

void begin_block(size_t bytes) {
  Shared& s = shared();
  s.bytes = bytes;
  std::memset(s.data, kPoison, bytes);
  std::fill_n(s.written, bytes, false);
  std::fill_n(s.cells, (bytes + kCell - 1) / kCell, History{});
  std::fill_n(s.copied_by, (bytes + kCell - 1) / kCell, 0u);
  copies().clear();
}

void* shared_bytes(size_t wanted, Site site) {
  if (wanted > shared().bytes)
    fault(site, "the kernel uses " + std::to_string(wanted) + " bytes of shared memory, its launch brought " +
                    std::to_string(shared().bytes));
  return shared().data;
}

void check_shared_read(const void* address, size_t bytes, Site site) {
  Shared& s = shared();
  const size_t offset = shared_range(address, bytes, site);
  const Moment moment = now();
  bool race = false;
  for (size_t i = offset; i < offset + bytes; ++i)
    if (!s.written[i]) fault(site, "a read of shared memory never written: byte " + std::to_string(i));
  for (size_t c = offset / kCell; c * kCell < offset + bytes; ++c) note_read(s.cells[c], moment, race);
  if (race) fault(site, std::string(kRace) + ": shared memory, byte " + std::to_string(offset));
  if (counting()) count_access(true, false, address, bytes, site);
}

void check_shared_write(void* address, size_t bytes, Site site) {
  const size_t offset = shared_range(address, bytes, site);
  write_shared(offset, bytes, site);
  std::fill_n(shared().written + offset, bytes, true);
  if (counting()) count_access(true, true, address, bytes, site);
}

// The copy may land at any time up to its wait: others must be done with the place now, and may not look before.
void copy_async(void* to, const void* from, bool wanted, Site site) {
  Copy copy{shared_range(to, 16, site), {}, copies()[now().thread].groups};
  write_shared(copy.to, 16, site);
  if (wanted) {
    check_read(from, 16, site);
    std::memcpy(copy.data, from, 16);
  }
  for (size_t c = copy.to / kCell; c < (copy.to + 16) / kCell; ++c) shared().copied_by[c] = now().thread + 1;
  if (counting()) count_access(true, true, to, 16, site);
  copies()[now().thread].open.push_back(copy);
}

void copy_commit() { ++copies()[now().thread].groups; }

void copy_wait(int open, Site site) {
  Copies& mine = copies()[now().thread];
  const auto landed = [&](const Copy& c) { return c.group < mine.groups - open; };
  for (const Copy& c : mine.open) {
    if (!landed(c)) continue;
    std::fill_n(shared().copied_by + c.to / kCell, 16 / kCell, 0u);
    write_shared(c.to, 16, site);
    std::memcpy(shared().data + c.to, c.data, 16);
    std::fill_n(shared().written + c.to, 16, true);
  }
  std::erase_if(mine.open, landed);
}

}  // namespace micro_kernels::emu
