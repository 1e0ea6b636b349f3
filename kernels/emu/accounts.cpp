// Counts what launches move: bytes and sectors of global memory, turns of the banks of shared memory.

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <tuple>
#include <unordered_set>

#include "emu/moment.h"

namespace micro_kernels::emu {
namespace {

constexpr uint64_t kSector = 32, kBanks = 32, kWord = 4, kTurnBytes = 128;

struct Touch {
  uint64_t address;
  uint32_t bytes;
  int lane;
};
// warp, line of code, shared or global, and which time the lane comes there since the last barrier
using Request = std::tuple<uint32_t, const char*, int, bool, uint32_t>;

struct Ledger {
  bool recording = false, counting = false, active = false;
  std::vector<LaunchRecord> records;
  std::map<Request, std::vector<Touch>> open;
  std::map<std::tuple<uint32_t, const char*, int, bool>, uint32_t> visits;  // thread, line, space
  std::unordered_set<uint64_t> sectors;
};
Ledger& ledger() {
  static Ledger only;
  return only;
}

void settle_global(const std::vector<Touch>& touches, Accounts& a) {
  std::set<uint64_t> sectors, bytes;
  for (const Touch& t : touches)
    for (uint64_t b = t.address; b < t.address + t.bytes; ++b) {
      sectors.insert(b / kSector);
      bytes.insert(b);
    }
  ++a.requests;
  a.sectors += sectors.size();
  a.ideal_sectors += (bytes.size() + kSector - 1) / kSector;
  ledger().sectors.insert(sectors.begin(), sectors.end());
}

// Lanes take turns in groups that ask for 128 bytes together; in a turn each bank gives one word.
void settle_shared(const std::vector<Touch>& touches, Accounts& a) {
  ++a.shared_requests;
  const auto group =
      static_cast<int>(std::min<uint64_t>(kBanks, kTurnBytes / std::max<uint64_t>(touches[0].bytes, kWord)));
  for (int first = 0; first < kLanes; first += group) {
    std::array<std::set<uint64_t>, kBanks> words;
    for (const Touch& t : touches) {
      if (t.lane < first || t.lane >= first + group) continue;
      for (uint64_t w = t.address / kWord; w * kWord < t.address + t.bytes; ++w) words[w % kBanks].insert(w);
    }
    size_t turns = 0;
    for (const auto& bank : words) turns = std::max(turns, bank.size());
    a.shared_phases += turns;
    a.ideal_phases += turns > 0;
  }
}

}  // namespace

void start_record(bool counting) {
  ledger() = {};
  ledger().recording = true;
  ledger().counting = counting;
}

std::vector<LaunchRecord> recorded() {
  std::vector<LaunchRecord> all = std::move(ledger().records);
  ledger() = {};
  return all;
}

bool counting() { return ledger().active; }

void count(bool first_order, const std::string& kernel, const Launch& launch) {
  Ledger& l = ledger();
  l.active = l.recording && l.counting && first_order;
  if (!l.recording || !first_order) return;
  l.sectors.clear();
  l.records.push_back({kernel, launch.grid, launch.block, launch.shared_bytes, launch.stream, {}});
}

void count_access(bool shared, bool write, const void* address, size_t bytes, Site site) {
  Ledger& l = ledger();
  const uint32_t thread = now().thread;
  Accounts& a = l.records.back().accounts;
  if (!shared) (write ? a.store_bytes : a.load_bytes) += bytes;
  const uint32_t visit = l.visits[{thread, site.file, site.line, shared}]++;
  l.open[{thread / kLanes, site.file, site.line, shared, visit}].push_back(
      {reinterpret_cast<uint64_t>(address), static_cast<uint32_t>(bytes), lane()});
}

void count_barrier() {
  Ledger& l = ledger();
  Accounts& a = l.records.back().accounts;
  for (const auto& [request, touches] : l.open)
    std::get<3>(request) ? settle_shared(touches, a) : settle_global(touches, a);
  l.open.clear();
  l.visits.clear();
  a.distinct_sectors = l.sectors.size();
}

}  // namespace micro_kernels::emu
