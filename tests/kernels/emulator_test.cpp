// The emulator against kernels that are broken on purpose, each beside its right twin: a check that never fires would
// let every other test pass.

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "common/cuda/arch/copy.cuh"
#include "common/cuda/arch/mma.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/warp.cuh"
#include "emulator_memory.h"

namespace micro_kernels::cuda {
namespace {

struct Row {
  SharedArray<float, kThreads> cells;
};

// What the emulator says of a launch; empty: nothing is wrong.
std::string fault_of(void (*kernel)(Arrays), const Arrays& arrays, dim3 grid = 1, dim3 block = kThreads,
                     size_t shared = sizeof(Row)) {
  try {
    EXPECT_EQ(launch(kernel, grid, block, shared, nullptr, arrays), Status::kOk);
  } catch (const emu::Fault& fault) {
    return fault.what();
  }
  return {};
}

// One input and one output of a block's size; the output is read back where nothing is wrong.
std::string fault_of(void (*kernel)(Arrays), std::vector<float>* result = nullptr) {
  const Device<float> x(counted(kThreads)), y(kThreads);
  const std::string fault = fault_of(kernel, {x.data(), y.data()});
  if (result) *result = y.read();
  return fault;
}

// A fault for the right reason: one of those between the bars. What a missing barrier looks like depends on the order
// of threads.
constexpr char kUnordered[] = "a race|never written|has not been waited for";

testing::AssertionResult says(const std::string& fault, const std::string& reasons) {
  for (size_t at = 0; at <= reasons.size();) {
    const size_t end = std::min(reasons.find('|', at), reasons.size());
    if (fault.find(reasons.substr(at, end - at)) != std::string::npos) return testing::AssertionSuccess();
    at = end + 1;
  }
  return testing::AssertionFailure() << '"' << fault << "\" is not one of " << reasons;
}

void expect_caught(const char* reasons, void (*broken)(Arrays), void (*right)(Arrays)) {
  EXPECT_EQ(fault_of(right), "");
  EXPECT_TRUE(says(fault_of(broken), reasons));
}

// ---- barriers ------------------------------------------------------------------------------------------------------

template <bool kRight>
void turn_through_shared(Arrays p) {
  auto& s = shared_memory<Row>();
  const int t = static_cast<int>(threadIdx.x);
  s.cells.store(t, load(p.x + t));
  if (kRight) __syncthreads();
  store(p.y + t, s.cells.load(kThreads - 1 - t));
}

TEST(Emulator, MissingBarrier) {
  expect_caught(kUnordered, turn_through_shared<false>, turn_through_shared<true>);
  std::vector<float> y;
  fault_of(turn_through_shared<true>, &y);
  EXPECT_EQ(y.front(), kThreads);
  EXPECT_EQ(y.back(), 1);
}

// The second write may overtake a slow reader of the first.
template <bool kRight>
void write_behind_reader(Arrays p) {
  auto& s = shared_memory<Row>();
  const int t = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    s.cells.store(t, load(p.x + t) + static_cast<float>(round));
    __syncthreads();
    sum += s.cells.load((t + 1) % kThreads);
    if (kRight) __syncthreads();
  }
  store(p.y + t, sum);
}

TEST(Emulator, MissingBarrierBeforeTheNextRound) {
  expect_caught(kUnordered, write_behind_reader<false>, write_behind_reader<true>);
}

template <int kHow>
void barrier_of_some(Arrays p) {
  const int t = static_cast<int>(threadIdx.x);
  if (kHow == 0) __syncthreads();
  if (kHow == 1 && t < 32) __syncthreads();
  if (kHow == 2) {
    if (t < 7)
      __syncthreads();
    else
      __syncthreads();
  }
  if (kHow == 3) {
    if (t == 5) return;
    __syncthreads();
  }
  store(p.y + t, load(p.x + t));
}

TEST(Emulator, DivergentBarrier) {
  expect_caught("barrier", barrier_of_some<1>, barrier_of_some<0>);
  EXPECT_TRUE(says(fault_of(barrier_of_some<2>), "barrier")) << "two barriers at once";
  EXPECT_TRUE(says(fault_of(barrier_of_some<3>), "barrier")) << "a thread that has left";
}

// ---- bounds, alignment, first write --------------------------------------------------------------------------------

template <int kLoadAt, int kStoreAt>
void copy_from_to(Arrays p) {
  const int t = static_cast<int>(threadIdx.x);
  store(p.y + t + kStoreAt, load(p.x + t + kLoadAt));
}

TEST(Emulator, GlobalBounds) {
  expect_caught("out of bounds", copy_from_to<1, 0>, copy_from_to<0, 0>);
  EXPECT_TRUE(says(fault_of(copy_from_to<-1, 0>), "out of bounds"));
  EXPECT_TRUE(says(fault_of(copy_from_to<0, 1>), "out of bounds"));
  EXPECT_TRUE(says(fault_of(copy_from_to<0, -1>), "out of bounds"));
}

TEST(Emulator, MemoryOfTheHostAndReleasedMemory) {
  std::vector<float> host(kThreads);
  const Device<float> x(counted(kThreads)), y(kThreads);
  EXPECT_TRUE(says(fault_of(copy_from_to<0, 0>, {host.data(), y.data()}), "out of bounds"));
  EXPECT_TRUE(says(fault_of(copy_from_to<0, 0>, {x.data(), host.data()}), "out of bounds"));
  const float* gone = Device<float>(counted(kThreads)).data();
  EXPECT_TRUE(says(fault_of(copy_from_to<0, 0>, {gone, y.data()}), "out of bounds"));
}

template <int kStoreAt, int kLoadAt>
void shared_from_to(Arrays p) {
  auto& s = shared_memory<Row>();
  const int t = static_cast<int>(threadIdx.x);
  s.cells.store(t + kStoreAt, load(p.x + t));
  __syncthreads();
  store(p.y + t, s.cells.load(t + kLoadAt));
}

TEST(Emulator, SharedBounds) {
  expect_caught("of a shared array", shared_from_to<1, 0>, shared_from_to<0, 0>);
  EXPECT_TRUE(says(fault_of(shared_from_to<-1, 0>), "of a shared array"));
  EXPECT_TRUE(says(fault_of(shared_from_to<0, 1>), "of a shared array"));
}

TEST(Emulator, LessSharedMemoryThanTheKernelTakes) {
  const Device<float> x(counted(kThreads)), y(kThreads);
  EXPECT_TRUE(says(fault_of(turn_through_shared<true>, {x.data(), y.data()}, 1, kThreads, sizeof(Row) - 16),
                   "bytes of shared memory"));
}

template <bool kShared>
void read_what_nobody_wrote(Arrays p) {
  auto& s = shared_memory<Row>();
  const int t = static_cast<int>(threadIdx.x);
  store(p.y + t, kShared ? s.cells.load(t) : load(p.x + t));
}

TEST(Emulator, MemoryNeverWritten) {
  const Device<float> never(kThreads), x(counted(kThreads)), y(kThreads);
  EXPECT_EQ(fault_of(read_what_nobody_wrote<false>, {x.data(), y.data()}), "");
  EXPECT_TRUE(says(fault_of(read_what_nobody_wrote<false>, {never.data(), y.data()}), "never written"));
  EXPECT_TRUE(says(fault_of(read_what_nobody_wrote<true>, {x.data(), y.data()}), "never written"));
}

TEST(Emulator, SharedMemoryOfTheBlockBefore) {
  struct Kernels {
    static void kernel(Arrays p) {
      auto& s = shared_memory<Row>();
      if (blockIdx.x == 0 || p.stride == 0) s.cells.store(static_cast<int>(threadIdx.x), 1);
      store(p.y + blockIdx.x * kThreads + threadIdx.x, s.cells.load(static_cast<int>(threadIdx.x)));
    }
  };
  const Device<float> y(2 * kThreads);
  EXPECT_EQ(fault_of(Kernels::kernel, {nullptr, y.data(), 0}, 2), "");
  EXPECT_TRUE(says(fault_of(Kernels::kernel, {nullptr, y.data(), 1}, 2), "never written"));
}

TEST(Emulator, OutputsThatWereForgotten) {
  const Device<float> x(counted(kThreads)), y(kThreads);
  EXPECT_EQ(fault_of(copy_from_to<0, 0>, {x.data(), y.data()}, 1, kThreads - 1), "");
  EXPECT_FALSE(y.all_written());
  EXPECT_EQ(fault_of(copy_from_to<0, 0>, {x.data(), y.data()}), "");
  EXPECT_TRUE(y.all_written());
}

template <int kWidth, int kLoadAt, int kStoreAt>
void copy_wide(Arrays p) {
  const int t = kWidth * static_cast<int>(threadIdx.x);
  store_vec(p.y + t + kStoreAt, load_vec<kWidth>(p.x + t + kLoadAt));
}

template <int kAt>
void shared_wide(Arrays p) {
  auto& s = shared_memory<Row>();
  const int t = 4 * static_cast<int>(threadIdx.x);
  s.cells.store_vec(t + kAt, load_vec<4>(p.x + t));
  store_vec(p.y + t, s.cells.load_vec<4>(t + kAt));
}

TEST(Emulator, Alignment) {
  const Device<float> x(counted(kThreads + 4)), y(kThreads + 4);
  const auto with = [&](void (*kernel)(Arrays), unsigned threads) {
    return fault_of(kernel, {x.data(), y.data()}, 1, threads);
  };
  EXPECT_EQ((with(copy_wide<4, 0, 0>, 16)), "");
  EXPECT_TRUE(says(with(copy_wide<4, 1, 0>, 16), "misaligned"));
  EXPECT_TRUE(says(with(copy_wide<4, 2, 0>, 16), "misaligned"));
  EXPECT_TRUE(says(with(copy_wide<4, 0, 2>, 16), "misaligned"));
  EXPECT_EQ((with(copy_wide<2, 2, 2>, 16)), "");
  EXPECT_TRUE(says(with(copy_wide<2, 1, 0>, 16), "misaligned"));
  EXPECT_TRUE(says(with(copy_wide<2, 0, 1>, 16), "misaligned"));
  EXPECT_EQ((with(shared_wide<0>, 15)), "");
  EXPECT_TRUE(says(with(shared_wide<2>, 15), "misaligned"));
}

// ---- races ---------------------------------------------------------------------------------------------------------

template <bool kRight>
void two_writers(Arrays p) {
  auto& s = shared_memory<Row>();
  const int t = static_cast<int>(threadIdx.x);
  s.cells.store(kRight ? t : t / 2, load(p.x + t));
  __syncthreads();
  store(p.y + t, s.cells.load(kRight ? t : t / 2));
}

TEST(Emulator, SharedRace) { expect_caught(kUnordered, two_writers<false>, two_writers<true>); }

template <bool kRight>
void global_neighbours(Arrays p) {
  const int t = static_cast<int>(threadIdx.x);
  store(p.y + t, load(p.x + t));
  if (kRight) __syncthreads();
  const float other = load(p.y + kThreads - 1 - t);
  __syncthreads();
  store(p.y + t, other);
}

TEST(Emulator, GlobalRaceInsideABlock) { expect_caught(kUnordered, global_neighbours<false>, global_neighbours<true>); }

// Blocks have no order: the last one differs from seed to seed.
template <bool kRight>
void last_block(Arrays p) {
  if (threadIdx.x == 0) store(p.y + (kRight ? blockIdx.x : 0), static_cast<float>(blockIdx.x));
}

template <bool kRight>
void next_block(Arrays p) {
  if (threadIdx.x != 0) return;
  store(p.y + blockIdx.x, load(p.x));
  if (!kRight) store(p.y + kThreads / 2 + blockIdx.x, load(p.y + (blockIdx.x + 1) % gridDim.x));
}

TEST(Emulator, OrderOfBlocks) {
  const Device<float> x(counted(1)), y(kThreads), z(kThreads);
  EXPECT_EQ(fault_of(last_block<true>, {x.data(), y.data()}, 16), "");
  EXPECT_TRUE(says(fault_of(last_block<false>, {x.data(), y.data()}, 16), kUnordered));
  EXPECT_EQ(fault_of(next_block<true>, {x.data(), z.data()}, 16), "");
  EXPECT_TRUE(says(fault_of(next_block<false>, {x.data(), z.data()}, 16), kUnordered));
}

enum class Between { kNothing, kShuffle, kBarrier };

template <Between kBetween>
void turn_in_warp(Arrays p) {
  auto& s = shared_memory<Row>();
  const int t = static_cast<int>(threadIdx.x);
  float value = load(p.x + t);
  s.cells.store(t, value);
  if (kBetween == Between::kShuffle) value = __shfl_xor_sync(kAllLanes, value, 1);
  if (kBetween == Between::kBarrier) __syncwarp();
  store(p.y + t, value + s.cells.load(t ^ 1));
}

TEST(Emulator, WarpWithoutItsBarrier) {
  expect_caught(kUnordered, turn_in_warp<Between::kNothing>, turn_in_warp<Between::kBarrier>);
  EXPECT_TRUE(says(fault_of(turn_in_warp<Between::kShuffle>), kUnordered)) << "a shuffle orders no memory";
}

// A lane may only write over what another has read once a barrier has parted the two.
template <bool kRight>
void overwrite_in_warp(Arrays p) {
  auto& s = shared_memory<Row>();
  const int t = static_cast<int>(threadIdx.x);
  s.cells.store(t, load(p.x + t));
  __syncwarp();
  const float value = s.cells.load(t ^ 1);
  if (kRight) __syncwarp();
  s.cells.store(t, value + 1);
  __syncwarp();
  store(p.y + t, s.cells.load(t ^ 1));
}

TEST(Emulator, ReadsThatAWarpBarrierParts) {
  expect_caught(kUnordered, overwrite_in_warp<false>, overwrite_in_warp<true>);
}

// __syncwarp orders the lanes of one warp, not two warps.
template <bool kRight>
void turn_between_warps(Arrays p) {
  auto& s = shared_memory<Row>();
  const int t = static_cast<int>(threadIdx.x);
  s.cells.store(t, load(p.x + t));
  __syncwarp();
  store(p.y + t, s.cells.load(kRight ? t ^ 1 : t ^ kWarp));
}

TEST(Emulator, WarpBarrierBetweenWarps) {
  expect_caught(kUnordered, turn_between_warps<false>, turn_between_warps<true>);
}

// ---- errors of the runtime -----------------------------------------------------------------------------------------

TEST(Emulator, WhatTheRuntimeSays) {
  EXPECT_EQ(to_status(cudaErrorNoKernelImageForDevice), Status::kNoImage);
  EXPECT_EQ(to_status(cudaErrorNoDevice), Status::kNoDriver);
  EXPECT_EQ(to_status(cudaErrorInsufficientDriver), Status::kNoDriver) << "the stub that stands where no driver is";
  ::emu::driver_version = 11'000;
  EXPECT_EQ(to_status(cudaErrorInsufficientDriver), Status::kOldDriver);
  ::emu::driver_version = 0;
}

// ---- asynchronous copies -------------------------------------------------------------------------------------------

enum class Copy { kRight, kNoWait, kTooFewWaited, kNoCommit, kNoBarrier, kMisaligned, kOutside };

template <Copy kHow>
void copy_then_read(Arrays p) {
  auto& s = shared_memory<Row>();
  const int t = static_cast<int>(threadIdx.x);
  const int at = 4 * t + (kHow == Copy::kMisaligned ? 2 : kHow == Copy::kOutside ? 4 * (kThreads / 4) : 0);
  copy_async16(s.cells.at(4 * t, 4), p.x + at);
  if (kHow != Copy::kNoCommit) copy_commit();
  if (kHow == Copy::kTooFewWaited)
    copy_wait<1>();
  else if (kHow != Copy::kNoWait)
    copy_wait<0>();
  if (kHow != Copy::kNoBarrier) __syncthreads();
  store_vec(p.y + 4 * t, s.cells.load_vec<4>(4 * (kThreads / 4 - 1 - t)));
}

std::string fault_of_copy(void (*kernel)(Arrays)) {
  const Device<float> x(counted(kThreads)), y(kThreads);
  return fault_of(kernel, {x.data(), y.data()}, 1, kThreads / 4);
}

TEST(Emulator, AsynchronousCopies) {
  EXPECT_EQ(fault_of_copy(copy_then_read<Copy::kRight>), "");
  EXPECT_TRUE(says(fault_of_copy(copy_then_read<Copy::kNoWait>), "has not been waited for|never written"));
  EXPECT_TRUE(says(fault_of_copy(copy_then_read<Copy::kTooFewWaited>), "has not been waited for|never written"));
  EXPECT_TRUE(says(fault_of_copy(copy_then_read<Copy::kNoBarrier>), kUnordered));
  EXPECT_TRUE(says(fault_of_copy(copy_then_read<Copy::kMisaligned>), "misaligned"));
  EXPECT_TRUE(says(fault_of_copy(copy_then_read<Copy::kOutside>), "out of bounds"));
}

// What no group holds is not waited for (cp.async.wait_group counts committed groups).
TEST(Emulator, CopiesThatNobodyCommitted) { EXPECT_TRUE(says(fault_of_copy(copy_then_read<Copy::kNoCommit>), "copy")); }

void own_copy_without_barrier(Arrays p) {
  auto& s = shared_memory<Row>();
  const int t = static_cast<int>(threadIdx.x);
  copy_async16(s.cells.at(4 * t, 4), p.x + 4 * t, t != 3);
  copy_commit();
  copy_wait<0>();
  store_vec(p.y + 4 * t, s.cells.load_vec<4>(4 * t));
}

TEST(Emulator, OwnCopiesNeedNoBarrierAndUnwantedOnesAreZero) {
  const Device<float> x(counted(kThreads)), y(kThreads);
  ASSERT_EQ(fault_of(own_copy_without_barrier, {x.data(), y.data()}, 1, kThreads / 4), "");
  const auto result = y.read();
  for (int i = 0; i < kThreads; ++i) EXPECT_EQ(result[i], i / 4 == 3 ? 0 : i + 1);
}

struct Stages {
  SharedArray<float, 2 * kThreads> cells;
};

// A ring of two stages; the copy of the next round lands in a stage that slow readers may still hold.
template <bool kRight>
void two_stages(Arrays p) {
  auto& s = shared_memory<Stages>();
  const int t = static_cast<int>(threadIdx.x);
  const auto fetch = [&](int round) {
    copy_async16(s.cells.at(round % 2 * kThreads + 4 * t, 4), p.x + round * kThreads + 4 * t);
    copy_commit();
  };
  fetch(0);
  for (int round = 0; round < 4; ++round) {
    if (round < 3) fetch(round + 1);
    round < 3 ? copy_wait<1>() : copy_wait<0>();
    __syncthreads();
    store_vec(p.y + round * kThreads + 4 * t, s.cells.load_vec<4>(round % 2 * kThreads + kThreads - 4 - 4 * t));
    if (kRight) __syncthreads();
  }
}

TEST(Emulator, RingOfCopies) {
  const Device<float> x(counted(4 * kThreads)), y(4 * kThreads);
  const size_t shared = sizeof(Stages);
  EXPECT_EQ(fault_of(two_stages<true>, {x.data(), y.data()}, 1, kThreads / 4, shared), "");
  EXPECT_TRUE(says(fault_of(two_stages<false>, {x.data(), y.data()}, 1, kThreads / 4, shared), kUnordered));
}

// ---- masks ---------------------------------------------------------------------------------------------------------

enum class Mask { kRight, kHalfCame, kLaneOutside, kTwoLines, kNotInMask };

template <Mask kHow>
void shuffle_with(Arrays p) {
  const int t = static_cast<int>(threadIdx.x), lane = t % kWarp;
  float value = load(p.x + t);
  if (kHow == Mask::kRight) value = __shfl_xor_sync(kAllLanes, value, 16);
  if (kHow == Mask::kHalfCame && lane < 16) value = __shfl_xor_sync(kAllLanes, value, 1);
  if (kHow == Mask::kLaneOutside && lane < 16) value = __shfl_xor_sync(0xffffu, value, 16);
  if (kHow == Mask::kNotInMask) value = __shfl_xor_sync(0xffffu, value, 1);
  if (kHow == Mask::kTwoLines) {
    if (lane < 16)
      value = __shfl_xor_sync(kAllLanes, value, 1);
    else
      value = __shfl_xor_sync(kAllLanes, value, 2);
  }
  store(p.y + t, value);
}

TEST(Emulator, ShuffleMasks) {
  expect_caught("shuffle", shuffle_with<Mask::kHalfCame>, shuffle_with<Mask::kRight>);
  EXPECT_TRUE(says(fault_of(shuffle_with<Mask::kLaneOutside>), "shuffle"));
  EXPECT_TRUE(says(fault_of(shuffle_with<Mask::kTwoLines>), "shuffle"));
  EXPECT_TRUE(says(fault_of(shuffle_with<Mask::kNotInMask>), "shuffle"));
  std::vector<float> y;
  fault_of(shuffle_with<Mask::kRight>, &y);
  EXPECT_EQ(y[0], 17);
  EXPECT_EQ(y[63], 48);
}

template <bool kRight>
void mma_of(Arrays p) {
  const int t = static_cast<int>(threadIdx.x);
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (kRight || t % kWarp < 31) mma_16816<BFloat16>(d, a, b);
  store(p.y + t, d[0]);
}

TEST(Emulator, MmaByPartOfAWarp) { expect_caught("mma", mma_of<false>, mma_of<true>); }

// ---- launches ------------------------------------------------------------------------------------------------------

// A launch that a device refuses: as a status, or as a fault.
bool refused(dim3 grid, dim3 block, size_t shared) {
  const Device<float> x(counted(kThreads)), y(kThreads);
  try {
    return launch(barrier_of_some<0>, grid, block, shared, nullptr, Arrays{x.data(), y.data()}) != Status::kOk;
  } catch (const emu::Fault&) {
    return true;
  }
}

TEST(Emulator, Launches) {
  EXPECT_FALSE(refused(1, kThreads, sizeof(Row)));
  EXPECT_TRUE(refused(0, kThreads, sizeof(Row)));
  EXPECT_TRUE(refused(dim3(1, 0), kThreads, sizeof(Row)));
  EXPECT_TRUE(refused(dim3(1, 65536), 1, sizeof(Row))) << "only the first dimension of a grid is long";
  EXPECT_TRUE(refused(1, 0, sizeof(Row)));
  EXPECT_TRUE(refused(1, 1025, sizeof(Row)));
  EXPECT_TRUE(refused(1, kThreads, emu::kMostSharedBytes + 1));
}

template <class Offset>
void write_far(Arrays p) {
  using Bits = std::make_unsigned_t<Offset>;  // wraps as a device does, and as no sanitizer minds
  const auto row = static_cast<Bits>(blockIdx.x + 70000);
  store(p.y + static_cast<Offset>(row * static_cast<Bits>(p.stride)), load(p.x));
}

TEST(Emulator, OffsetsBeyond32Bits) {
  constexpr int64_t kStride = 70000;
  const Device<float> x(counted(1));
  auto* huge = static_cast<float*>(emu::reserve((70000 * kStride + 2 * kStride) * sizeof(float)));
  EXPECT_EQ(fault_of(write_far<int64_t>, {x.data(), huge, kStride}, 2, 1), "");
  EXPECT_EQ(huge[70001 * kStride], 1);
  // 70000 * 70000 wraps to 605032704 as an unsigned number: inside the buffer, at the wrong place.
  EXPECT_EQ(fault_of(write_far<uint32_t>, {x.data(), huge, kStride}, 1, 1), "");
  EXPECT_EQ(huge[605032704], 1) << "a wrapped offset is caught by what it leaves unwritten";
  emu::release(huge);
  auto* far_side = static_cast<float*>(emu::reserve((70000 * kStride + kStride) * sizeof(float)));
  EXPECT_TRUE(says(fault_of(write_far<int32_t>, {x.data(), far_side - 1, -kStride}, 1, 1), "out of bounds"));
  emu::release(far_side);
}

}  // namespace
}  // namespace micro_kernels::cuda
