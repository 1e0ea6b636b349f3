// What the emulator computes in place of a device, and what it counts, against what can be worked out by hand.

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "common/cuda/arch/mma.cuh"
#include "common/cuda/block.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/warp.cuh"
#include "emulator_memory.h"

namespace micro_kernels::cuda {
namespace {

// ---- what the helpers compute --------------------------------------------------------------------------------------

struct Reductions {
  BlockSumMemory<float, kThreads> sums;
  BlockScanMemory<kThreads> scan;
};

void reductions(Arrays p) {
  auto& s = shared_memory<Reductions>();
  const int t = static_cast<int>(threadIdx.x);
  const float x = load(p.x + t);
  int32_t total;
  const int32_t before = block_exclusive_sum<kThreads>(static_cast<int32_t>(x), total, s.scan);
  store(p.y + t, block_sum<kThreads>(x, s.sums));
  store(p.y + kThreads + t, block_max<kThreads>(t == 40 ? 1000 : -x, s.sums));
  store(p.y + 2 * kThreads + t, static_cast<float>(before));
  store(p.y + 3 * kThreads + t, static_cast<float>(total));
}

TEST(EmulatorComputes, BlockReductions) {
  const Device<float> x(counted(kThreads)), y(4 * kThreads);
  ASSERT_EQ(launch(reductions, 1, kThreads, sizeof(Reductions), nullptr, Arrays{x.data(), y.data()}), Status::kOk);
  const auto result = y.read();
  for (int t = 0; t < kThreads; ++t) {
    EXPECT_EQ(result[t], kThreads * (kThreads + 1) / 2);
    EXPECT_EQ(result[kThreads + t], 1000);
    EXPECT_EQ(result[2 * kThreads + t], t * (t + 1) / 2);
    EXPECT_EQ(result[3 * kThreads + t], kThreads * (kThreads + 1) / 2);
  }
}

// a [16, 16] and b [8, 16] (columns of the right factor) through shared memory, ldmatrix and mma; transposed: b [16,
// 8].
struct Factors {
  const void* a;
  const void* b;
  float* d;
};
template <class T>
struct Tiles {
  SharedArray<T, 16 * 16> a;
  SharedArray<T, 16 * 8> b;
};

template <class T, bool kTransposed>
void multiply_tiles(Factors p) {
  auto& s = shared_memory<Tiles<T>>();
  const int lane = static_cast<int>(threadIdx.x);
  s.a.template store_vec<8>(8 * lane, load_vec<8>(static_cast<const T*>(p.a) + 8 * lane));
  if (lane < 16) s.b.template store_vec<8>(8 * lane, load_vec<8>(static_cast<const T*>(p.b) + 8 * lane));
  __syncthreads();
  uint32_t a[4], both[4], b[2];
  // Matrices of a in the order of its registers: upper left, lower left, upper right, lower right.
  load_matrix_x4(a, s.a.at(lane % 16 * 16 + lane / 16 * 8, 8));
  if (kTransposed)
    load_matrix_x4_transposed(both, s.b.at(lane % 16 * 8, 8));
  else
    load_matrix_x4(both, s.b.at(lane % 8 * 16 + lane / 8 % 2 * 8, 8));
  b[0] = both[0], b[1] = both[1];
  float d[4] = {1, 1, 1, 1};
  mma_16816<T>(d, a, b);
  for (int i = 0; i < 4; ++i) store(p.d + (lane / 4 + i / 2 * 8) * 8 + 2 * (lane % 4) + i % 2, d[i]);
}

template <class T>
std::vector<T> small_values(int count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<T> values;
  for (int i = 0; i < count; ++i) values.push_back(T(static_cast<float>(static_cast<int>(random() % 17) - 8)));
  return values;
}

template <class T, bool kTransposed>
void expect_product() {
  const auto a = small_values<T>(16 * 16, 1), b = small_values<T>(16 * 8, 2);
  const Device<T> device_a(a), device_b(b);
  const Device<float> d(16 * 8);
  ASSERT_EQ(launch(multiply_tiles<T, kTransposed>, 1, kWarp, sizeof(Tiles<T>), nullptr,
                   Factors{device_a.data(), device_b.data(), d.data()}),
            Status::kOk);
  const auto result = d.read();
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float sum = 1;
      for (int k = 0; k < 16; ++k)
        sum += static_cast<float>(a[m * 16 + k]) * static_cast<float>(b[kTransposed ? k * 8 + n : n * 16 + k]);
      EXPECT_EQ(result[m * 8 + n], sum) << m << " " << n;
    }
}

TEST(EmulatorComputes, TensorCores) {
  expect_product<BFloat16, false>();
  expect_product<BFloat16, true>();
  expect_product<Float16, false>();
  expect_product<Float16, true>();
}

void multiply_tf32(Factors p) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, c = lane % 4;
  const auto* a = static_cast<const float*>(p.a);
  const auto* b = static_cast<const float*>(p.b);
  const float left[4] = {load(a + g * 8 + c), load(a + (g + 8) * 8 + c), load(a + g * 8 + c + 4),
                         load(a + (g + 8) * 8 + c + 4)};
  const float right[2] = {load(b + c * 8 + g), load(b + (c + 4) * 8 + g)};
  float d[4] = {};
  mma_1688_tf32(d, left, right);
  for (int i = 0; i < 4; ++i) store(p.d + (g + i / 2 * 8) * 8 + 2 * c + i % 2, d[i]);
}

TEST(EmulatorComputes, TensorCoresInTf32) {
  auto a = small_values<float>(16 * 8, 3);
  const auto b = small_values<float>(8 * 8, 4);
  a[0] = 1 + 0x1p-11f;  // halfway between two TF32 numbers: away from zero
  const Device<float> device_a(a), device_b(b), d(16 * 8);
  ASSERT_EQ(launch(multiply_tf32, 1, kWarp, nullptr, Factors{device_a.data(), device_b.data(), d.data()}), Status::kOk);
  a[0] = 1 + 0x1p-10f;
  const auto result = d.read();
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float sum = 0;
      for (int k = 0; k < 8; ++k) sum += a[m * 8 + k] * b[k * 8 + n];
      EXPECT_EQ(result[m * 8 + n], sum) << m << " " << n;
    }
}

// ---- what it counts ------------------------------------------------------------------------------------------------

void strided(Arrays p) {
  const int64_t t = threadIdx.x;
  store(p.y + t, load(p.x + t * p.stride));
}

emu::LaunchRecord record_of(void (*kernel)(Arrays), const Arrays& arrays, unsigned threads, size_t shared) {
  emu::start_record(true);
  EXPECT_EQ(launch(kernel, 1, threads, shared, nullptr, arrays), Status::kOk);
  const auto records = emu::recorded();
  EXPECT_EQ(records.size(), 1u);
  return records.at(0);
}

TEST(EmulatorCounts, CountsSectors) {
  const Device<float> x(counted(32 * 8 + 1)), y(32);
  const auto together = record_of(strided, {x.data(), y.data(), 1}, 32, 0).accounts;
  EXPECT_EQ(together.load_bytes, 128u);
  EXPECT_EQ(together.store_bytes, 128u);
  EXPECT_EQ(together.requests, 2u);
  EXPECT_EQ(together.sectors, 8u);
  EXPECT_EQ(together.ideal_sectors, 8u);
  const auto shifted = record_of(strided, {x.data() + 1, y.data(), 1}, 32, 0).accounts;
  EXPECT_EQ(shifted.sectors, 5u + 4u);
  const auto apart = record_of(strided, {x.data(), y.data(), 8}, 32, 0).accounts;
  EXPECT_EQ(apart.sectors, 32u + 4u);
  EXPECT_EQ(apart.ideal_sectors, 8u);
  const auto same = record_of(strided, {x.data(), y.data(), 0}, 32, 0).accounts;
  EXPECT_EQ(same.load_bytes, 128u);
  EXPECT_EQ(same.distinct_sectors, 1u + 4u);
  EXPECT_EQ(same.sectors, 1u + 4u);
}

struct Table {
  SharedArray<float, 32 * 32 + 32> cells;
};

// Every lane writes and reads one word, `stride` words apart.
void shared_strided(Arrays p) {
  auto& s = shared_memory<Table>();
  const int t = static_cast<int>(threadIdx.x), at = t * static_cast<int>(p.stride);
  s.cells.store(at, static_cast<float>(t));
  store(p.y + t, s.cells.load(at));
}

void shared_wide_rows(Arrays p) {
  auto& s = shared_memory<Table>();
  const int t = static_cast<int>(threadIdx.x), at = t * static_cast<int>(p.stride);
  s.cells.store_vec(at, load_vec<4>(p.x + 4 * t));
  store_vec(p.y + 4 * t, s.cells.load_vec<4>(at));
}

TEST(EmulatorCounts, CountsBankConflicts) {
  const Device<float> x(counted(128)), y(128);
  const auto phases = [&](void (*kernel)(Arrays), int64_t stride) {
    const auto counts = record_of(kernel, {x.data(), y.data(), stride}, 32, sizeof(Table)).accounts;
    EXPECT_EQ(counts.shared_requests, 2u);
    return std::pair(counts.shared_phases, counts.ideal_phases);
  };
  using Pair = std::pair<uint64_t, uint64_t>;
  EXPECT_EQ(phases(shared_strided, 1), Pair(2, 2));
  EXPECT_EQ(phases(shared_strided, 2), Pair(4, 2));
  EXPECT_EQ(phases(shared_strided, 32), Pair(64, 2));
  EXPECT_EQ(phases(shared_strided, 33), Pair(2, 2));
  EXPECT_EQ(phases(shared_wide_rows, 4), Pair(8, 8)) << "16 bytes a lane: a phase is eight lanes";
  EXPECT_EQ(phases(shared_wide_rows, 32), Pair(64, 8));
}

}  // namespace

// Names are those that the linker knows: not in an unnamed namespace.
struct Recorded {
  float* y;
};
void recorded_kernel(Recorded p) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  store(p.y + block * blockDim.x + threadIdx.x, 1.0f);
}

namespace {

TEST(EmulatorCounts, RecordsLaunches) {
  const Device<float> y(kThreads);
  int stream = 0;
  emu::start_record(false);
  EXPECT_EQ(launch(recorded_kernel, 4, 16, nullptr, Recorded{y.data()}), Status::kOk);
  EXPECT_EQ(launch(recorded_kernel, dim3(2, 3, 4), 2, 64, &stream, Recorded{y.data()}), Status::kOk);
  const auto records = emu::recorded();
  ASSERT_EQ(records.size(), 2u) << "once each, however many orders were tried";
  for (const auto& record : records)
    EXPECT_NE(record.kernel.find("recorded_kernel"), std::string::npos) << record.kernel;
  EXPECT_EQ(records[0].grid.x, 4u);
  EXPECT_EQ(records[0].block.x, 16u);
  EXPECT_EQ(records[0].shared_bytes, 0u);
  EXPECT_EQ(records[0].stream, nullptr);
  EXPECT_EQ(records[1].grid.x, 2u);
  EXPECT_EQ(records[1].grid.y, 3u);
  EXPECT_EQ(records[1].grid.z, 4u);
  EXPECT_EQ(records[1].shared_bytes, 64u);
  EXPECT_EQ(records[1].stream, &stream);
}

}  // namespace
}  // namespace micro_kernels::cuda
