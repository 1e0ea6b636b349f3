// The tiles of CUDA's grouped product, evaluated on the host: no bank conflicts, enough blocks, little wasted work.

#include "expert_linear/linear_layout.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <set>
#include <vector>

namespace micro_kernels::cuda {
namespace {

template <class T>
class LinearLayoutTest : public testing::Test {
 protected:
  // Eight lanes that move 16 bytes each are served at once if these lie in different quarters of the banks.
  static void expect_no_conflict(const std::vector<int>& elements) {
    std::set<int> columns;
    for (const int element : elements) {
      ASSERT_EQ(element % kChunk<T>, 0);
      columns.insert(element / kChunk<T> % 8);
    }
    ASSERT_EQ(columns.size(), elements.size());
  }

  // No two chunks at one place, and all inside the tile.
  static void expect_a_permutation(const std::vector<int>& elements) {
    const std::set<int> places(elements.begin(), elements.end());
    EXPECT_EQ(places.size(), elements.size());
    EXPECT_EQ(*places.begin(), 0);
    EXPECT_EQ(*places.rbegin(), (static_cast<int>(elements.size()) - 1) * kChunk<T>);
  }

  template <int kWidth>
  static void width_major_is_free_of_conflicts() {
    constexpr int chunks = kWidth / kChunk<T>;
    std::vector<int> all;
    for (int step = 0; step < 8; ++step)
      for (int chunk = 0; chunk < chunks; ++chunk) all.push_back(width_major<T, kWidth>(step, chunk));
    expect_a_permutation(all);
    for (int chunk = 0; sizeof(T) != 4 && chunk < chunks; ++chunk) {  // a fragment's matrix: eight steps
      std::vector<int> phase;
      for (int step = 0; step < 8; ++step) phase.push_back(width_major<T, kWidth>(step, chunk));
      expect_no_conflict(phase);
    }
    for (int thread = 0; thread < kLinearThreads; thread += 8) {  // copies, and chunks of finished rows
      std::vector<int> phase;
      for (int i = thread; i < thread + 8; ++i) phase.push_back(width_major<T, kWidth>(i / chunks, i % chunks));
      expect_no_conflict(phase);
    }
  }
};
using Elements = testing::Types<float, double, BFloat16>;
TYPED_TEST_SUITE(LinearLayoutTest, Elements);

TYPED_TEST(LinearLayoutTest, TilesAlongTheReduction) {
  using T = TypeParam;
  std::vector<int> all;
  for (int row = 0; row < 128; ++row)
    for (int chunk = 0; chunk < 4; ++chunk) all.push_back(reduction_major<T>(row, chunk));
  this->expect_a_permutation(all);
  for (int row = 0; row < 128; row += 8)
    for (int chunk = 0; chunk < 4; ++chunk) {  // a fragment's matrix, or the rows of threads side by side
      std::vector<int> phase;
      for (int i = row; i < row + 8; ++i) phase.push_back(reduction_major<T>(i, chunk));
      this->expect_no_conflict(phase);
    }
  for (int thread = 0; thread < kLinearThreads; thread += 8) {  // copies
    std::vector<int> phase;
    for (int i = thread; i < thread + 8; ++i) phase.push_back(reduction_major<T>(i / 4, i % 4));
    this->expect_no_conflict(phase);
  }
}

TYPED_TEST(LinearLayoutTest, TilesAlongTheWidth) {
  if constexpr (kChunk<TypeParam> == 2) this->template width_major_is_free_of_conflicts<32>();
  this->template width_major_is_free_of_conflicts<64>();
  this->template width_major_is_free_of_conflicts<128>();
}

// Fragments of 32 bits, as lanes read them: 8 rows or columns by 4 steps.
TEST(LinearLayout, FragmentsOfFloat32) {
  for (int first = 0; first < 64; first += 8)
    for (int step = 0; step < kTileSteps<float>; step += 4) {
      std::set<int> along_reduction, along_width;
      for (int lane = 0; lane < 32; ++lane) {
        const int outer = first + lane / 4, inner = step + lane % 4;
        along_reduction.insert((reduction_major<float>(outer, inner / 4) + inner % 4) % 32);
        along_width.insert((width_major<float, 64>(inner, outer / 4) + outer % 4) % 32);
      }
      ASSERT_EQ(along_reduction.size(), 32);
      ASSERT_EQ(along_width.size(), 32);
    }
}

// Pairs of sums of a fragment: 32 lanes, 32 banks.
TEST(LinearLayout, FinishedFragments) {
  for (int row = 0; row < 128; row += 8)
    for (int column = 0; column < 128; column += 8) {
      std::set<int> banks;
      for (int lane = 0; lane < 32; ++lane)
        banks.insert((width_major<BFloat16, 128>(row + lane / 4, column / 8) + lane % 4 * 2) / 2 % 32);
      ASSERT_EQ(banks.size(), 32);
    }
}

TEST(LinearLayout, WorstCaseOfRowTilesIsReachedAndNeverExceeded) {
  for (int64_t rows = 0; rows <= 14; ++rows) {
    int64_t most = 0;
    for (int64_t a = 0; a <= rows; ++a)
      for (int64_t b = a; b <= rows; ++b) {
        const int64_t tiles = pieces(a, 4) + pieces(b - a, 4) + pieces(rows - b, 4);
        most = std::max(most, tiles);
      }
    EXPECT_EQ(worst_row_tiles(rows, 3, 4), most) << rows;
  }
  EXPECT_EQ(row_tiles(100, 3, false, 32), 12);
  EXPECT_EQ(row_tiles(100, 2, true, 32), worst_row_tiles(100, 3, 32));
}

TEST(LinearLayout, Remainders) {
  std::mt19937 random(1);
  for (uint32_t divisor : {1u, 2u, 3u, 5u, 7u, 2048u, 4095u, 65537u, 1000003u, 0x7ffffffeu, 0x7fffffffu}) {
    const Remainder remainder(divisor);
    for (const uint32_t number : {0u, 1u, divisor - 1, divisor, divisor + 1, 0x7ffffffeu, 0x7fffffffu})
      EXPECT_EQ(remainder.of(number & 0x7fffffffu), (number & 0x7fffffffu) % divisor) << number << " % " << divisor;
    for (int i = 0; i < 1000; ++i) {
      const uint32_t number = static_cast<uint32_t>(random()) & 0x7fffffffu;
      ASSERT_EQ(remainder.of(number), number % divisor) << number << " % " << divisor;
    }
  }
}

// Rows that the tensor cores compute against rows that are there: even, uneven and one-sided routings of T tokens.
TEST(LinearLayout, MostOfTheWorkIsUseful) {
  std::mt19937 random(1);
  for (const int64_t tokens : {2048, 4096})
    for (const int64_t experts : {2, 4, 8})
      for (const double skew : {0.0, 0.5, 1.0, 2.0}) {
        std::vector<double> share;
        for (int64_t e = 0; e < experts; ++e) share.push_back(std::pow(e + 1, -skew));
        std::discrete_distribution<int> choose(share.begin(), share.end());
        std::vector<int64_t> rows(experts);
        for (int64_t t = 0; t < tokens; ++t) ++rows[choose(random)];
        int64_t issued = 0;
        for (const int64_t count : rows) issued += issued_rows(count);
        EXPECT_GE(static_cast<double>(tokens) / issued, 0.9) << tokens << ", " << experts << ", " << skew;
      }
}

}  // namespace
}  // namespace micro_kernels::cuda
