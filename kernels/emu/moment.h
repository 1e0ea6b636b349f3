#pragma once
// What the parts of the machine tell each other: who runs, and when.

#include <cstdint>
#include <memory>
#include <vector>

#include "emu/machine.h"

namespace micro_kernels::emu {

// A point in a run: two accesses are in order if one moment comes after the other (`before`).
struct Moment {
  uint32_t run = 0;  // no run has the number 0
  uint32_t block = 0;
  uint32_t thread = 0;
  uint32_t block_epoch = 0;  // barriers of the block so far
  uint32_t warp_epoch = 0;   // barriers of the warp so far

  // Is everything that was done at this moment sure to be seen at `later`?
  bool before(const Moment& later) const {
    if (run != later.run) return true;
    if (block != later.block) return false;
    if (thread == later.thread || block_epoch < later.block_epoch) return true;
    return thread / kLanes == later.thread / kLanes && warp_epoch < later.warp_epoch;
  }
  bool same_thread(const Moment& other) const {
    return run == other.run && block == other.block && thread == other.thread;
  }
};

// machine.cpp: of the thread that runs now.
bool running();
Moment now();

// memory.cpp
class Snapshot;
std::shared_ptr<Snapshot> take_snapshot();
void restore(const Snapshot& snapshot);
// Empty if memory holds what the snapshot holds, else where it differs.
std::string difference(const Snapshot& snapshot);
void begin_block(size_t shared_bytes);

// accounts.cpp
void count(bool counting, const std::string& kernel, const Launch& launch);
void count_access(bool shared, bool write, const void* address, size_t bytes, Site site);
void count_barrier();
bool counting();

}  // namespace micro_kernels::emu
