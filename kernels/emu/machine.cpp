#include "emu/machine.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <boost/context/detail/fcontext.hpp>
#include <cstdlib>
#include <new>
#include <random>

#include "emu/moment.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace micro_kernels::emu {
namespace {

using boost::context::detail::fcontext_t;
using boost::context::detail::jump_fcontext;
using boost::context::detail::make_fcontext;
using boost::context::detail::transfer_t;

constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned kMostThreads = 1024;

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Fiber {
  fcontext_t context = nullptr;
  void* fake_stack = nullptr;  // of the address sanitizer
  State state = State::kReady;
  unsigned number = 0;
  // what it waits for
  Site site{};
  const char* operation = "";
};

// Lanes of a warp that come together: who is awaited, who is there, what they brought.
struct Meeting {
  unsigned mask, arrived;
  Site site;
  const char* operation;
  void* brought[kLanes];
};

struct Warp {
  uint32_t epoch = 0;             // barriers so far
  unsigned lanes = 0, left = 0;   // as many as there are; those that have left the kernel
  std::vector<Meeting> meetings;  // with masks that share no lane
};

struct Machine {
  const Launch* launch = nullptr;
  std::string kernel;
  std::vector<char*> stacks;
  std::vector<Fiber> fibers;
  std::vector<unsigned> ready;
  Fiber* running = nullptr;
  fcontext_t scheduler = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  void* scheduler_fake_stack = nullptr;
  std::string fault;
  uint32_t run = 0;
  Size block{};
  uint32_t block_number = 0;
  uint32_t block_epoch = 0;
  std::vector<Warp> warps;
  unsigned at_barrier = 0;
  Site barrier{};  // where those are
  std::mt19937_64 random;
  int seeds = 0;
};

Machine& machine() {
  static Machine only;
  return only;
}

// ---- switching between fibers, told to the address sanitizer -------------------------------------------------------

void leave_scheduler([[maybe_unused]] const char* stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine().scheduler_fake_stack, stack, kStackBytes);
#endif
}
void back_in_scheduler() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine().scheduler_fake_stack, nullptr, nullptr);
#endif
}
void leave_fiber([[maybe_unused]] bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  Machine& m = machine();
  __sanitizer_start_switch_fiber(for_good ? nullptr : &m.running->fake_stack, m.scheduler_stack,
                                 m.scheduler_stack_bytes);
#endif
}
void back_in_fiber([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  Machine& m = machine();
  __sanitizer_finish_switch_fiber(fake_stack, &m.scheduler_stack, &m.scheduler_stack_bytes);
#endif
}
void clear_stack([[maybe_unused]] char* stack) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, kStackBytes);
#endif
}

char* new_stack() {
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

// From a fiber to the scheduler; comes back when the fiber is chosen again.
void yield() {
  Fiber& self = *machine().running;
  leave_fiber(false);
  const transfer_t from = jump_fcontext(machine().scheduler, nullptr);
  machine().scheduler = from.fctx;
  back_in_fiber(self.fake_stack);
}

[[noreturn]] void leave_for_good() {
  leave_fiber(true);
  jump_fcontext(machine().scheduler, nullptr);
  std::abort();  // a finished fiber is never chosen again
}

void fiber_entry(transfer_t from) {
  back_in_fiber(nullptr);
  Machine& m = machine();
  m.scheduler = from.fctx;
  m.launch->body();
  m.running->state = State::kDone;
  m.warps[m.running->number / kLanes].left |= 1u << m.running->number % kLanes;
  leave_for_good();
}

void resume(Fiber& fiber) {
  Machine& m = machine();
  const Size b = m.launch->block;
  m.running = &fiber;
  m.launch->enter_thread({fiber.number % b.x, fiber.number / b.x % b.y, fiber.number / b.x / b.y});
  leave_scheduler(m.stacks[fiber.number]);
  const transfer_t from = jump_fcontext(fiber.context, nullptr);
  back_in_scheduler();
  fiber.context = from.fctx;
  m.running = nullptr;
}

// ---- one block -----------------------------------------------------------------------------------------------------

std::string where(const Site& site) { return std::string(site.file) + ":" + std::to_string(site.line); }

std::string tuple(Size s) {
  return "(" + std::to_string(s.x) + ", " + std::to_string(s.y) + ", " + std::to_string(s.z) + ")";
}

void start_fibers() {
  Machine& m = machine();
  const auto threads = static_cast<unsigned>(m.launch->block.count());
  while (m.stacks.size() < threads) m.stacks.push_back(new_stack());
  m.fibers.assign(threads, Fiber{});
  m.ready.clear();
  m.block_epoch = 0;
  m.at_barrier = 0;
  m.warps.resize((threads + kLanes - 1) / kLanes);
  for (unsigned w = 0; w < m.warps.size(); ++w) {
    m.warps[w].epoch = m.warps[w].left = 0;
    m.warps[w].lanes = std::min<unsigned>(kLanes, threads - w * kLanes);
    m.warps[w].meetings.clear();
  }
  for (unsigned i = 0; i < threads; ++i) {
    clear_stack(m.stacks[i]);
    m.fibers[i].number = i;
    m.fibers[i].context = make_fcontext(m.stacks[i] + kStackBytes, kStackBytes, fiber_entry);
    m.ready.push_back(i);
  }
}

// Nobody can go on, though not all are done.
std::string standstill() {
  const auto& fibers = machine().fibers;
  const auto count = [&](State state) {
    return std::count_if(fibers.begin(), fibers.end(), [=](const Fiber& f) { return f.state == state; });
  };
  const auto at_barrier = count(State::kAtBarrier), at_warp = count(State::kAtWarp), done = count(State::kDone);
  std::string text;
  for (const Fiber& f : fibers) {
    if (f.state == State::kDone) continue;
    text = "thread " + std::to_string(f.number) + " waits at a " + f.operation + " (" + where(f.site) + ")";
    break;
  }
  return text + " for threads that never come: " + std::to_string(at_barrier) + " are at a barrier of the block, " +
         std::to_string(at_warp) + " at an operation of their warp, " + std::to_string(done) + " have left the kernel";
}

void run_block() {
  Machine& m = machine();
  begin_block(m.launch->shared_bytes);
  m.launch->enter_block(m.block);
  start_fibers();
  while (!m.ready.empty()) {
    std::swap(m.ready[m.random() % m.ready.size()], m.ready.back());
    Fiber& next = m.fibers[m.ready.back()];
    m.ready.pop_back();
    resume(next);
    if (!m.fault.empty()) return;
  }
  if (std::any_of(m.fibers.begin(), m.fibers.end(), [](const Fiber& f) { return f.state != State::kDone; }))
    m.fault = standstill() + ", in block " + tuple(m.block);
  if (counting()) count_barrier();
}

void run_once(const Launch& launch, int seed) {
  Machine& m = machine();
  m.launch = &launch;
  m.fault.clear();
  ++m.run;
  m.random.seed(1000003 + seed);
  std::vector<uint32_t> blocks(launch.grid.count());
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<uint32_t>(i);
  std::shuffle(blocks.begin(), blocks.end(), m.random);
  for (uint32_t b : blocks) {
    m.block_number = b;
    m.block = {b % launch.grid.x, b / launch.grid.x % launch.grid.y, b / launch.grid.x / launch.grid.y};
    run_block();
    if (!m.fault.empty()) break;
  }
  m.launch = nullptr;
  m.running = nullptr;
  if (!m.fault.empty()) throw Fault(m.kernel + ": " + m.fault);
}

std::string name_of(const void* kernel) {
  Dl_info info{};
  if (!dladdr(kernel, &info) || !info.dli_sname) return "kernel";
  int status = 0;
  char* plain = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? plain : info.dli_sname;
  std::free(plain);
  return name.substr(0, name.find('('));
}

void check_launch(const Launch& launch) {
  if (launch.grid.count() == 0) throw Fault("a launch with a grid of size 0: " + tuple(launch.grid));
  if (launch.grid.y > 65535 || launch.grid.z > 65535)
    throw Fault("a grid has at most 65535 blocks along y and z, asked for " + tuple(launch.grid));
  if (launch.block.count() == 0 || launch.block.count() > kMostThreads)
    throw Fault("a block has 1 to 1024 threads, asked for " + tuple(launch.block));
  if (launch.shared_bytes > kMostSharedBytes)
    throw Fault("a block has at most " + std::to_string(kMostSharedBytes) + " bytes of shared memory, asked for " +
                std::to_string(launch.shared_bytes));
}

}  // namespace

void set_seeds(int count) { machine().seeds = count; }

void run(const Launch& launch) {
  Machine& m = machine();
  check_launch(launch);
  if (m.seeds == 0) {
    const char* wanted = std::getenv("MICRO_EMU_SEEDS");
    m.seeds = wanted ? std::max(1, std::atoi(wanted)) : 3;
  }
  m.kernel = name_of(launch.kernel);
  const auto before = m.seeds > 1 ? take_snapshot() : nullptr;
  std::shared_ptr<Snapshot> after;
  for (int seed = 0; seed < m.seeds; ++seed) {
    if (seed > 0) restore(*before);
    count(seed == 0, m.kernel, launch);
    run_once(launch, seed);
    if (seed == 0 && m.seeds > 1) after = take_snapshot();
    if (seed == 0) continue;
    const std::string changed = difference(*after);
    if (!changed.empty()) throw Fault(m.kernel + ": the order of threads changes the result: " + changed);
  }
}

// ---- what kernels call ---------------------------------------------------------------------------------------------

void fault(Site site, const std::string& what) {
  Machine& m = machine();
  if (!m.running) throw Fault(where(site) + ": " + what + ", outside of a kernel");
  m.fault =
      where(site) + ": " + what + ", in block " + tuple(m.block) + ", thread " + std::to_string(m.running->number);
  leave_for_good();
}

bool running() { return machine().running != nullptr; }

Moment now() {
  const Machine& m = machine();
  const unsigned thread = m.running->number;
  return {m.run, m.block_number, thread, m.block_epoch, m.warps[thread / kLanes].epoch};
}

int lane() { return static_cast<int>(machine().running->number % kLanes); }

void block_barrier(Site site) {
  Machine& m = machine();
  Fiber& self = *m.running;
  if (m.at_barrier > 0 && !(m.barrier == site))
    fault(site, "a divergent barrier: another thread waits at " + where(m.barrier));
  m.barrier = site;
  if (++m.at_barrier < m.fibers.size()) {
    self.state = State::kAtBarrier;
    self.site = site;
    self.operation = "barrier of the block";
    yield();
    return;
  }
  m.at_barrier = 0;
  ++m.block_epoch;
  if (counting()) count_barrier();
  for (Fiber& f : m.fibers) {
    f.state = State::kReady;
    m.ready.push_back(f.number);
  }
  yield();
}

namespace {

// The meeting that this lane belongs to; a fault if it and another lane expect different ones.
Meeting& join(Warp& warp, unsigned lane, unsigned mask, Site site, const char* name) {
  const auto what = [=] { return std::string("a ") + name; };
  if (!(mask >> lane & 1u)) fault(site, what() + " whose mask lacks its own lane");
  if (warp.lanes < kLanes && mask >> warp.lanes)
    fault(site, what() + " whose mask names more lanes than the warp's " + std::to_string(warp.lanes));
  if (mask & warp.left)
    fault(site, "an incomplete mask: " + what() + " waits for lane " + std::to_string(__builtin_ctz(mask & warp.left)) +
                    ", which has left the kernel");
  for (Meeting& each : warp.meetings) {
    if (each.mask == mask && each.site == site) return each;
    if (each.mask & mask)
      fault(site, "an incomplete mask: another lane is at a " + std::string(each.operation) + " (" + where(each.site) +
                      ") with another mask or on another line");
  }
  return warp.meetings.emplace_back(Meeting{mask, 0, site, name, {}});
}

}  // namespace

void meet(unsigned mask, Site site, const char* name, void* brought, LaneAction act, const void* context) {
  Machine& m = machine();
  Fiber& self = *m.running;
  const unsigned first = self.number / kLanes * kLanes, lane = self.number - first;
  Warp& warp = m.warps[self.number / kLanes];
  Meeting& meeting = join(warp, lane, mask, site, name);
  meeting.brought[lane] = brought;
  meeting.arrived |= 1u << lane;
  if (meeting.arrived != mask) {
    self.state = State::kAtWarp;
    self.site = site;
    self.operation = name;
    yield();
    return;
  }
  act(meeting.brought, context);
  warp.meetings.erase(warp.meetings.begin() + (&meeting - warp.meetings.data()));
  for (unsigned i = 0; i < warp.lanes; ++i) {
    if (!(mask >> i & 1u)) continue;
    m.fibers[first + i].state = State::kReady;
    m.ready.push_back(first + i);
  }
  yield();
}

// Orders the memory of the warp if all its lanes take part; a part of them only waits.
void warp_barrier(unsigned mask, Site site) {
  meet(
      mask, site, "barrier of the warp", nullptr,
      [](void* const(&)[kLanes], const void* all_lanes) {
        Machine& m = machine();
        if (all_lanes) ++m.warps[m.running->number / kLanes].epoch;
      },
      mask == 0xffffffffu ? "all" : nullptr);
}

unsigned ballot(unsigned mask, bool predicate, Site site) {
  struct Brought {
    bool predicate;
    unsigned result;
  } mine{predicate, 0};
  meet(
      mask, site, "ballot", &mine,
      [](void* const(&brought)[kLanes], const void*) {
        unsigned bits = 0;
        for (int i = 0; i < kLanes; ++i)
          if (brought[i] && static_cast<Brought*>(brought[i])->predicate) bits |= 1u << i;
        for (void* each : brought)
          if (each) static_cast<Brought*>(each)->result = bits;
      },
      nullptr);
  return mine.result;
}

}  // namespace micro_kernels::emu

// A device assertion is a fault of the kernel; one of the host ends the program as usual. The C library's own name and
// promise; inside a kernel fault() leaves without an exception.
// NOLINTNEXTLINE(bugprone-exception-escape,bugprone-reserved-identifier)
extern "C" void __assert_fail(const char* assertion, const char* file, unsigned line, const char* function) noexcept {
  using namespace micro_kernels::emu;
  if (running()) fault({file, static_cast<int>(line)}, std::string("device assertion failed: ") + assertion);
  std::fprintf(stderr, "%s:%u: %s: assertion failed: %s\n", file, line, function, assertion);
  std::abort();
}
