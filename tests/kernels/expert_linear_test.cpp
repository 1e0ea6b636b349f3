// The grouped product and its gradients against plain loops in double. The suite runs once per instruction set
// (MICRO_ISA).

#include "micro_kernels/expert_linear.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace micro_kernels {
namespace {

struct Shape {
  int64_t rows, in, out;
};

template <class T>
constexpr DType kTag = std::is_same_v<T, double>  ? DType::kFloat64
                       : std::is_same_v<T, float> ? DType::kFloat32
                                                  : DType::kBFloat16;

template <class T>
double wide(T value) {
  return static_cast<accumulator_t<T>>(value);
}

// Of a result, relative to the sum of the terms' sizes: half a unit of bfloat16, a chain of additions otherwise.
template <class T>
constexpr double kRounding = std::is_same_v<T, double>  ? 1e-14
                             : std::is_same_v<T, float> ? 1e-6
                                                        : 4e-3;

// Not plain noise: every fifth value is an outlier.
template <class T>
std::vector<T> values(int64_t count, int seed) {
  std::mt19937 random(seed + count);
  std::normal_distribution<float> normal;
  std::vector<T> result;
  for (int64_t i = 0; i < count; ++i) result.push_back(T(normal(random) * (i % 5 == 0 ? 20.0f : 1.0f)));
  return result;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Two threads that share the pieces.
void two_threads(int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  std::thread other([&] { body(0, count / 2); });
  body(count / 2, count);
  other.join();
}

template <class T>
struct Packed {
  std::vector<T> data;
  Matrix matrix;
  Packed(const std::vector<T>& plain, int64_t in, int64_t out) : data(cpu::packed_elements(in, out), T(7.0f)) {
    EXPECT_EQ(cpu::pack_weight(plain.data(), in, out, kTag<T>, data.data(), serial), Status::kOk);
    matrix = {data.data(), nullptr, WeightFormat::kPacked};
  }
};

template <class T>
LinearPart part_of(const std::vector<T>& x, const Matrix& matrix, std::vector<T>& y, Shape s) {
  LinearPart part;
  part.x = {x.data(), nullptr, s.in};
  part.matrix = matrix;
  part.y = {y.data(), nullptr, s.out};
  part.rows = s.rows, part.in = s.in, part.out = s.out;
  return part;
}

template <class T>
std::vector<T> run(const std::vector<T>& x, const Matrix& matrix, Shape s, const ParallelFor& threads = serial) {
  std::vector<T> y(s.rows * s.out, T(9.0f));
  const LinearPart part = part_of(x, matrix, y, s);
  EXPECT_EQ(cpu::linear(&part, 1, kTag<T>, threads), Status::kOk);
  return y;
}

class LinearTest : public testing::TestWithParam<Shape> {
 protected:
  template <class T>
  void equals_the_definition() {
    const Shape s = GetParam();
    const std::vector<T> x = values<T>(s.rows * s.in, 1), weight = values<T>(s.out * s.in, 2);
    const std::vector<T> y = run(x, {weight.data()}, s);
    for (int64_t r = 0; r < s.rows; ++r)
      for (int64_t o = 0; o < s.out; ++o) {
        double want = 0, size = 0;
        for (int64_t i = 0; i < s.in; ++i) {
          const double term = wide(x[r * s.in + i]) * wide(weight[o * s.in + i]);
          want += term;
          size += std::abs(term);
        }
        ASSERT_NEAR(wide(y[r * s.out + o]), want, kRounding<T> * size) << r << ", " << o;
      }
    EXPECT_TRUE(same_bits(y, run(x, Packed<T>(weight, s.in, s.out).matrix, s))) << "packed";
    EXPECT_TRUE(same_bits(y, run(x, {weight.data()}, s, two_threads))) << "two threads";
  }

  template <class T>
  void rows_are_independent() {
    const Shape s = GetParam();
    const std::vector<T> x = values<T>(s.rows * s.in, 1), weight = values<T>(s.out * s.in, 2);
    const std::vector<T> whole = run(x, {weight.data()}, s);
    for (int64_t r = 0; r < s.rows; ++r) {
      const std::vector<T> row(x.begin() + r * s.in, x.begin() + (r + 1) * s.in);
      const std::vector<T> expected(whole.begin() + r * s.out, whole.begin() + (r + 1) * s.out);
      ASSERT_TRUE(same_bits(run(row, {weight.data()}, {1, s.in, s.out}), expected)) << r;
    }
  }

  template <class T>
  void gradients_equal_the_definition() {
    const Shape s = GetParam();
    const std::vector<T> x = values<T>(s.rows * s.in, 1), weight = values<T>(s.out * s.in, 2);
    const std::vector<T> grad_y = values<T>(s.rows * s.out, 3);
    std::vector<T> grad_x(s.rows * s.in, T(9.0f)), grad_weight(s.out * s.in, T(9.0f));
    const LinearSource sources[] = {{{grad_y.data(), nullptr, s.out}, weight.data()},
                                    {{grad_y.data(), nullptr, s.out}, weight.data()}};
    const LinearGradXPart by_x{sources, 2, {grad_x.data(), nullptr, s.in}, s.rows, s.in, s.out};
    EXPECT_EQ(cpu::linear_grad_x(&by_x, 1, kTag<T>, serial), Status::kOk);
    for (int64_t r = 0; r < s.rows; ++r)
      for (int64_t i = 0; i < s.in; ++i) {
        double want = 0, size = 0;
        for (int64_t o = 0; o < s.out; ++o) {
          const double term = 2 * wide(grad_y[r * s.out + o]) * wide(weight[o * s.in + i]);
          want += term;
          size += std::abs(term);
        }
        ASSERT_NEAR(wide(grad_x[r * s.in + i]), want, kRounding<T> * size) << r << ", " << i;
      }
    const LinearGradWeightPart by_weight{
        {grad_y.data(), nullptr, s.out}, {x.data(), nullptr, s.in}, grad_weight.data(), s.rows, s.in, s.out, false};
    EXPECT_EQ(cpu::linear_grad_weight(&by_weight, 1, kTag<T>, serial), Status::kOk);
    using Acc = accumulator_t<T>;
    std::vector<Acc> sum(s.out * s.in, Acc(3));
    LinearGradWeightPart added = by_weight;
    added.grad_weight = sum.data(), added.accumulate = true;
    EXPECT_EQ(cpu::linear_grad_weight(&added, 1, kTag<T>, two_threads), Status::kOk);
    for (int64_t o = 0; o < s.out; ++o)
      for (int64_t i = 0; i < s.in; ++i) {
        double want = 0, size = 3;
        for (int64_t r = 0; r < s.rows; ++r) {
          const double term = wide(grad_y[r * s.out + o]) * wide(x[r * s.in + i]);
          want += term;
          size += std::abs(term);
        }
        ASSERT_NEAR(wide(grad_weight[o * s.in + i]), want, kRounding<T> * size) << o << ", " << i;
        ASSERT_NEAR(sum[o * s.in + i], want + 3, kRounding<Acc> * size) << o << ", " << i;
      }
  }
};

TEST_P(LinearTest, Float32) { equals_the_definition<float>(); }
TEST_P(LinearTest, Float64) { equals_the_definition<double>(); }
TEST_P(LinearTest, BFloat16) { equals_the_definition<BFloat16>(); }
TEST_P(LinearTest, RowsAreIndependentFloat32) { rows_are_independent<float>(); }
TEST_P(LinearTest, RowsAreIndependentFloat64) { rows_are_independent<double>(); }
TEST_P(LinearTest, RowsAreIndependentBFloat16) { rows_are_independent<BFloat16>(); }
TEST_P(LinearTest, GradientsFloat32) { gradients_equal_the_definition<float>(); }
TEST_P(LinearTest, GradientsFloat64) { gradients_equal_the_definition<double>(); }
TEST_P(LinearTest, GradientsBFloat16) { gradients_equal_the_definition<BFloat16>(); }

// Sizes around tiles (6 rows, 64 columns), chunks (96 and 192 inputs), blocks (384 rows, 96 outputs, 192 inputs), and
// vectors; odd reductions, which pairs do not divide.
INSTANTIATE_TEST_SUITE_P(Shapes, LinearTest,
                         testing::Values(Shape{0, 8, 4}, Shape{1, 1, 1}, Shape{1, 576, 33}, Shape{2, 31, 5},
                                         Shape{3, 33, 64}, Shape{4, 64, 65}, Shape{5, 97, 7}, Shape{6, 200, 130},
                                         Shape{7, 193, 97}, Shape{13, 16, 3}, Shape{31, 95, 192}, Shape{127, 40, 70},
                                         Shape{390, 10, 66}, Shape{401, 9, 9}),
                         [](const auto& info) {
                           return std::to_string(info.param.rows) + "x" + std::to_string(info.param.in) + "to" +
                                  std::to_string(info.param.out);
                         });

// ---- gather, scatter and epilogues ---------------------------------------------------------------------------------

template <class T>
class EpilogueTest : public testing::Test {};
using Elements = testing::Types<float, double, BFloat16>;
TYPED_TEST_SUITE(EpilogueTest, Elements);

template <class T>
T sum_of(T a, T b) {
  return T(static_cast<accumulator_t<T>>(a) + static_cast<accumulator_t<T>>(b));
}
template <class T>
T product_of(T a, T b) {
  return T(static_cast<accumulator_t<T>>(a) * static_cast<accumulator_t<T>>(b));
}

TYPED_TEST(EpilogueTest, GatherScatterResidualScale) {
  using T = TypeParam;
  const Shape s{9, 70, 75};
  const std::vector<T> x = values<T>(12 * s.in, 1), weight = values<T>(s.out * s.in, 2);
  const std::vector<T> residual = values<T>(11 * s.out, 3), scale = values<T>(10, 4);
  const std::vector<int32_t> from{11, 3, 0, 5, 5, 2, 7, 9, 1}, to{8, 1, 2, 3, 9, 5, 6, 7, 0},
      add{0, 10, 2, 3, 4, 5, 6, 7, 8};
  std::vector<T> gathered;
  for (const int32_t row : from) gathered.insert(gathered.end(), x.begin() + row * s.in, x.begin() + (row + 1) * s.in);
  const std::vector<T> plain = run(gathered, {weight.data()}, s);

  std::vector<T> y(10 * s.out, T(9.0f));
  LinearPart part = part_of(x, {weight.data()}, y, s);
  part.x.index = from.data();
  part.y.index = to.data();
  part.residual = {residual.data(), add.data(), s.out};
  part.scale = {scale.data(), to.data(), 1};
  ASSERT_EQ(cpu::linear(&part, 1, kTag<T>, serial), Status::kOk);
  for (int64_t r = 0; r < s.rows; ++r)
    for (int64_t o = 0; o < s.out; ++o) {
      const T want = product_of(sum_of(residual[add[r] * s.out + o], plain[r * s.out + o]), scale[to[r]]);
      ASSERT_EQ(wide(y[to[r] * s.out + o]), wide(want)) << r << ", " << o;
    }
  for (int64_t o = 0; o < s.out; ++o) ASSERT_EQ(wide(y[4 * s.out + o]), 9) << "a row that nobody asked for";
}

TYPED_TEST(EpilogueTest, GatedUnit) {
  using T = TypeParam;
  const Shape s{8, 70, 75};
  const std::vector<T> x = values<T>(s.rows * s.in, 1), gate = values<T>(s.out * s.in, 2),
                       up = values<T>(s.out * s.in, 3);
  const std::vector<T> g = run(x, {gate.data()}, s), u = run(x, {up.data()}, s);
  std::vector<T> y(s.rows * s.out);
  LinearPart part = part_of(x, {gate.data()}, y, s);
  part.up = {up.data()};
  ASSERT_EQ(cpu::linear(&part, 1, kTag<T>, serial), Status::kOk);
  for (size_t i = 0; i < y.size(); ++i) {
    const double want = wide(g[i]) / (1 + std::exp(-wide(g[i]))) * wide(u[i]);
    ASSERT_NEAR(wide(y[i]), want, kRounding<T> * std::abs(want) + 1e-30) << i;
  }
}

TYPED_TEST(EpilogueTest, IntegersAreExactUpToTheirScale) {
  using T = TypeParam;
  const Shape s{7, 101, 75};
  const std::vector<T> x = values<T>(s.rows * s.in, 1), weight = values<T>(s.out * s.in, 2);
  std::vector<int8_t> data(cpu::packed_elements(s.in, s.out));
  std::vector<float> scales(s.out);
  ASSERT_EQ(cpu::pack_weight_int8(weight.data(), s.in, s.out, kTag<T>, data.data(), scales.data(), serial),
            Status::kOk);
  const std::vector<T> y = run(x, {data.data(), scales.data(), WeightFormat::kInt8}, s);
  for (int64_t r = 0; r < s.rows; ++r)
    for (int64_t o = 0; o < s.out; ++o) {
      double want = 0, size = 0;
      for (int64_t i = 0; i < s.in; ++i) {
        const double integer = std::nearbyint(wide(weight[o * s.in + i]) / scales[o]);
        ASSERT_LE(std::abs(integer), 127);
        want += wide(x[r * s.in + i]) * integer * scales[o];
        size += std::abs(wide(x[r * s.in + i]) * integer * scales[o]);
      }
      ASSERT_NEAR(wide(y[r * s.out + o]), want, kRounding<T> * size) << r << ", " << o;
    }
}

TEST(LinearParts, OfDifferentShapesRunTogether) {
  const Shape a{3, 40, 70}, b{0, 8, 9}, c{130, 33, 5};
  std::vector<std::vector<float>> xs, weights, ys;
  std::vector<LinearPart> parts;
  for (const Shape s : {a, b, c}) {
    xs.push_back(values<float>(s.rows * s.in, 1));
    weights.push_back(values<float>(s.out * s.in, 2));
    ys.emplace_back(s.rows * s.out);
  }
  const Shape shapes[] = {a, b, c};
  for (int i = 0; i < 3; ++i) parts.push_back(part_of(xs[i], {weights[i].data()}, ys[i], shapes[i]));
  ASSERT_EQ(cpu::linear(parts.data(), 3, DType::kFloat32, two_threads), Status::kOk);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(same_bits(ys[i], run(xs[i], {weights[i].data()}, shapes[i]))) << i;
}

}  // namespace
}  // namespace micro_kernels
