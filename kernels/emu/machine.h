#pragma once
// The machine that runs CUDA kernels on the CPU, for tests. One fiber per thread of a block; blocks one after the
// other; the order of both comes from a seed. Everything a kernel does to memory passes here (memory.h) and is checked.
//
// It cannot show: the memory order between real warps beyond what barriers promise, the rounding of tensor cores,
// the time at which an asynchronous copy really lands, and speed.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace micro_kernels::emu {

inline constexpr int kLanes = 32;
inline constexpr int kMostSharedBytes = 99 * 1024;  // of sm_86, sm_89 and sm_120, the smallest of the built ones

// A fault of a kernel or its launch: what, which block and thread, which line.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A line of kernel code.
struct Site {
  const char* file;
  int line;
  bool operator==(const Site&) const = default;
};

struct Size {
  unsigned x, y, z;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

struct Launch {
  const void* kernel;
  Size grid, block;
  size_t shared_bytes;
  const void* stream;
  void (*enter_block)(Size);
  void (*enter_thread)(Size);
  std::function<void()> body;  // what one thread does
};

// Runs every thread of every block, once per seed; throws Fault. All runs must leave the same bytes in memory.
void run(const Launch& launch);

// How many orders of threads and blocks each launch is run in (MICRO_EMU_SEEDS, 3 unless set).
void set_seeds(int count);

// ---- memory of the device, brought by tests ------------------------------------------------------------------------

// `bytes` of memory aligned to 256, full of a pattern, and nothing of it written yet.
void* allocate(size_t bytes);
// As large as wanted, without a page behind it until it is touched; not compared between seeds.
void* reserve(size_t bytes);
void release(void* memory);
// What the host does to it: written_by_host makes it readable for kernels; first_unwritten tells the first byte of the
// range that nobody has written, or `bytes`.
void written_by_host(void* memory, size_t bytes);
size_t first_unwritten(const void* memory, size_t bytes);

// ---- for the kernel side (cuda_runtime.h, memory.h, copy.h, mma.h) -------------------------------------------------

[[noreturn]] void fault(Site site, const std::string& what);

void block_barrier(Site site);
void warp_barrier(unsigned mask, Site site);

// Waits until all lanes of `mask` have come to the same line with the same mask; the last one calls `act` with what
// the lanes brought (nullptr for lanes outside the mask). Orders no memory.
using LaneAction = void (*)(void* const (&brought)[kLanes], const void* context);
void meet(unsigned mask, Site site, const char* name, void* brought, LaneAction act, const void* context);
int lane();

// from(lane): the lane whose value this one takes.
template <class T, class From>
T shuffle(unsigned mask, T value, Site site, From from) {
  struct Brought {
    T value, result;
    int from;
    bool valid;
  } mine{value, value, from(lane()) & (kLanes - 1), true};
  meet(
      mask, site, "shuffle", &mine,
      [](void* const(&brought)[kLanes], const void*) {
        for (void* each : brought) {
          if (!each) continue;
          auto* taken = static_cast<Brought*>(each);
          const auto* given = static_cast<const Brought*>(brought[taken->from]);
          taken->valid = given != nullptr;
          if (given) taken->result = given->value;
        }
      },
      nullptr);
  if (!mine.valid) fault(site, "a shuffle reads a lane outside its mask");
  return mine.result;
}

unsigned ballot(unsigned mask, bool predicate, Site site);

// What memory.h asks before it touches anything.
void check_read(const void* address, size_t bytes, Site site);
void check_write(void* address, size_t bytes, Site site);
void check_shared_read(const void* address, size_t bytes, Site site);
void check_shared_write(void* address, size_t bytes, Site site);
void* shared_bytes(size_t wanted, Site site);

void copy_async(void* to, const void* from, bool wanted, Site site);
void copy_commit();
void copy_wait(int open, Site site);

// ---- accounting ----------------------------------------------------------------------------------------------------

// Of one launch, in its first order of threads. A request is what the lanes of one warp ask for on one line of code.
struct Accounts {
  uint64_t load_bytes = 0, store_bytes = 0;  // global memory, as lanes ask for it
  uint64_t requests = 0;
  uint64_t sectors = 0, ideal_sectors = 0;  // of 32 bytes, that the requests touch and would touch if they lay dense
  uint64_t distinct_sectors = 0;            // that the launch touches at all
  uint64_t shared_requests = 0;
  uint64_t shared_phases = 0, ideal_phases = 0;  // turns that the banks take, and would take without conflicts
};
struct LaunchRecord {
  std::string kernel;
  Size grid, block;
  size_t shared_bytes;
  const void* stream;
  Accounts accounts;
};

// From here to `recorded` every launch is noted; with `counting` its accesses too (slow).
void start_record(bool counting);
std::vector<LaunchRecord> recorded();

}  // namespace micro_kernels::emu
