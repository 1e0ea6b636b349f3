// CUDA's grouped product and its gradients: plain products against loops in double; everything around a product against
// the plain product, bit for bit where the definition says which roundings there are.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "backend.h"
#include "elements.h"
#include "micro_kernels/expert_linear.h"
#include "micro_kernels/stacked_linear.h"

namespace micro_kernels {
namespace {

using cuda::LinearGradWeightGroup;
using cuda::LinearGradXGroup;
using cuda::LinearGroup;

template <class T>
double wide(T value) {
  return static_cast<accumulator_t<T>>(value);
}

// Of a result, relative to the sum of the terms' sizes: half a unit of the element type, a chain of additions for the
// wider ones.
template <class T>
constexpr double kRounding = 4e-3;
template <>
constexpr double kRounding<Float16> = 5e-4;
template <>
constexpr double kRounding<float> = 1e-6;
template <>
constexpr double kRounding<double> = 1e-14;

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
ConstRows rows_of(const Buffer<T>& data, int64_t stride, const int32_t* index = nullptr) {
  return {data.data(), index, stride};
}
template <class T>
Rows target(const Buffer<T>& data, int64_t stride, const int32_t* index = nullptr) {
  return {data.data(), const_cast<int32_t*>(index), stride};
}

template <class T>
std::vector<T> row(const std::vector<T>& data, int64_t number, int64_t width) {
  return {data.begin() + number * width, data.begin() + (number + 1) * width};
}

struct Shape {
  std::vector<int32_t> offsets;
  int64_t rows, in, out;

  int64_t experts() const { return static_cast<int64_t>(offsets.size()) - 1; }
  // -1: idle
  int64_t expert(int64_t n) const {
    for (int64_t e = 0; e < experts(); ++e)
      if (n >= offsets[e] && n < offsets[e + 1]) return e;
    return -1;
  }
};

// Around tiles (32, 64 and 128 rows, 128 columns), their steps (8, 16, 32 elements) and chunks (2, 4, 8 elements); an
// expert without rows, all rows with one expert, idle rows, no row; widths that chunks do not divide.
const Shape kShapes[] = {
    {{0, 0, 1}, 1, 1, 1},
    {{0, 3, 3, 5}, 7, 16, 8},
    {{0, 0, 33}, 33, 40, 136},
    {{0, 31, 64, 127}, 129, 24, 72},
    {{0, 140, 140}, 140, 64, 128},
    {{0, 4, 9}, 9, 31, 5},
    {{0, 2, 5}, 5, 97, 129},
    {{0, 0, 0}, 3, 8, 8},
    {{0, 0}, 0, 8, 8},
    {{0, 5, 11}, 11, 0, 16},
    {{0, 2, 3}, 3, 128, 0},
};

template <class T>
LinearGroup group_of(const Buffer<T>& x, const Buffer<T>& weight, const Buffer<T>& y, int64_t rows, int64_t experts,
                     int64_t in, int64_t out) {
  LinearGroup group;
  group.x = rows_of(x, in);
  group.weight = weight.data();
  group.weight_expert_stride = in * out;
  group.y = target(y, out);
  group.rows = rows, group.experts = experts, group.in = in, group.out = out;
  return group;
}

template <class T>
void run(const LinearGroup& group) {
  ASSERT_EQ(cuda::linear(&group, 1, kDTypeOf<T>, nullptr), Status::kOk);
}
template <class T>
void run(const LinearGradXGroup& group) {
  ASSERT_EQ(cuda::linear_grad_x(&group, 1, kDTypeOf<T>, nullptr), Status::kOk);
}
template <class T>
void run(const LinearGradWeightGroup& group) {
  ASSERT_EQ(cuda::linear_grad_weight(&group, 1, kDTypeOf<T>, nullptr), Status::kOk);
}

// All of x through one matrix.
template <class T>
std::vector<T> product(const std::vector<T>& x, const std::vector<T>& weight, int64_t in) {
  const int64_t rows = static_cast<int64_t>(x.size()) / in, out = static_cast<int64_t>(weight.size()) / in;
  const Buffer<T> from(x), matrix(weight), y(rows * out);
  run<T>(group_of(from, matrix, y, rows, 1, in, out));
  return y.read();
}

template <class T>
class GroupedLinearTest : public testing::Test {
 protected:
  using Acc = accumulator_t<T>;

  static T rounded(Acc value) { return T(value); }
  static Acc acc(T value) { return static_cast<Acc>(value); }
};
TYPED_TEST_SUITE(GroupedLinearTest, DeviceElementTypes);

// ---- plain products ------------------------------------------------------------------------------------------------

// What a tensor core sees of a factor: float32 is rounded to 10 bits, ties away from zero, where that is allowed.
template <class T>
double factor(T value, bool tf32) {
  if constexpr (std::is_same_v<T, float>)
    if (tf32) return __builtin_bit_cast(float, (__builtin_bit_cast(uint32_t, value) + 0x1000u) & 0xffffe000u);
  return wide(value);
}

struct Sum {
  double value = 0, size = 0;
  void add(double term) {
    value += term;
    size += std::abs(term);
  }
};

template <class T>
void expect_definition(const Shape& s, bool tf32) {
  SCOPED_TRACE(testing::Message() << s.rows << "x" << s.in << "x" << s.out);
  const std::vector<T> x = values<T>(s.rows * s.in, 1), weight = values<T>(s.experts() * s.in * s.out, 2);
  const Buffer<T> from(x), matrix(weight), y(s.rows * s.out);
  const Buffer<int32_t> offsets(s.offsets);
  ASSERT_EQ(MICRO_RUN(expert_linear, ExpertLinearParams{from.data(), matrix.data(), offsets.data(), y.data(), s.rows,
                                                        s.experts(), s.in, s.out, kDTypeOf<T>, tf32}),
            Status::kOk);
  const std::vector<T> got = y.read();
  for (int64_t n = 0; n < s.rows; ++n)
    for (int64_t o = 0; o < s.out; ++o) {
      const int64_t e = s.expert(n);
      Sum want;
      for (int64_t i = 0; e >= 0 && i < s.in; ++i)
        want.add(factor(x[n * s.in + i], tf32) * factor(weight[(e * s.out + o) * s.in + i], tf32));
      ASSERT_NEAR(wide(got[n * s.out + o]), want.value, kRounding<T> * want.size) << n << ", " << o;
    }
}

template <class T>
void expect_gradients(const Shape& s, bool tf32) {
  SCOPED_TRACE(testing::Message() << s.rows << "x" << s.in << "x" << s.out);
  const std::vector<T> x = values<T>(s.rows * s.in, 1), weight = values<T>(s.experts() * s.in * s.out, 2),
                       grad = values<T>(s.rows * s.out, 3);
  const Buffer<T> from(x), matrix(weight), grad_y(grad), grad_x(s.rows * s.in), grad_weight(s.experts() * s.in * s.out);
  const Buffer<int32_t> offsets(s.offsets);
  ASSERT_EQ(
      MICRO_RUN(expert_linear_backward,
                ExpertLinearBackwardParams{grad_y.data(), from.data(), matrix.data(), offsets.data(), grad_x.data(),
                                           grad_weight.data(), s.rows, s.experts(), s.in, s.out, kDTypeOf<T>, tf32}),
      Status::kOk);
  const std::vector<T> by_x = grad_x.read(), by_weight = grad_weight.read();
  for (int64_t n = 0; n < s.rows; ++n)
    for (int64_t i = 0; i < s.in; ++i) {
      const int64_t e = s.expert(n);
      Sum want;
      for (int64_t o = 0; e >= 0 && o < s.out; ++o)
        want.add(factor(grad[n * s.out + o], tf32) * factor(weight[(e * s.out + o) * s.in + i], tf32));
      ASSERT_NEAR(wide(by_x[n * s.in + i]), want.value, kRounding<T> * want.size) << n << ", " << i;
    }
  for (int64_t e = 0; e < s.experts(); ++e)
    for (int64_t o = 0; o < s.out; ++o)
      for (int64_t i = 0; i < s.in; ++i) {
        Sum want;
        for (int64_t n = s.offsets[e]; n < s.offsets[e + 1]; ++n)
          want.add(factor(grad[n * s.out + o], tf32) * factor(x[n * s.in + i], tf32));
        ASSERT_NEAR(wide(by_weight[(e * s.out + o) * s.in + i]), want.value, kRounding<T> * want.size)
            << e << ", " << o << ", " << i;
      }
}

TYPED_TEST(GroupedLinearTest, EqualsTheDefinition) {
  for (const Shape& s : kShapes) expect_definition<TypeParam>(s, false);
}

TYPED_TEST(GroupedLinearTest, GradientsEqualTheDefinition) {
  for (const Shape& s : kShapes) expect_gradients<TypeParam>(s, false);
}

// Where the flag allows it, and only there: the bound is the one of float32. Widths that are no whole chunks keep
// float32.
TEST(GroupedLinear, FactorsOfTf32) {
  const Shape whole{{0, 31, 64, 127}, 129, 24, 72}, ragged{{0, 4, 9}, 9, 31, 5};
  expect_definition<float>(whole, true);
  expect_gradients<float>(whole, true);
  const std::vector<float> x = values<float>(9 * 31, 1), weight = values<float>(2 * 31 * 5, 2);
  const Buffer<float> from(x), matrix(weight), y(9 * 5), z(9 * 5);
  const Buffer<int32_t> offsets(ragged.offsets);
  for (const bool tf32 : {false, true})
    ASSERT_EQ(
        MICRO_RUN(expert_linear, ExpertLinearParams{from.data(), matrix.data(), offsets.data(),
                                                    tf32 ? z.data() : y.data(), 9, 2, 31, 5, DType::kFloat32, tf32}),
        Status::kOk);
  expect_same_bits(z.read(), y.read());
}

// Tiles of many rows, of few, and a row alone give the same bits, forward and backward.
TYPED_TEST(GroupedLinearTest, RowsAreIndependent) {
  using T = TypeParam;
  const int64_t rows = 70, in = 48, out = 40;
  const std::vector<T> x = values<T>(rows * in, 1), weight = values<T>(in * out, 2), grad = values<T>(rows * out, 3);
  const auto gradient = [&](const std::vector<T>& grad_y) {
    const int64_t count = static_cast<int64_t>(grad_y.size()) / out;
    const Buffer<T> from(grad_y), matrix(weight), grad_x(count * in);
    LinearGradXGroup group;
    group.sources[0] = {.grad_y = rows_of(from, out), .weight = matrix.data(), .out = out};
    group.grad_x = target(grad_x, in);
    group.rows = count, group.in = in;
    run<T>(group);
    return grad_x.read();
  };
  const std::vector<T> whole = product(x, weight, in), whole_gradient = gradient(grad);
  for (const int64_t n : {0, 15, 33, 69}) {
    expect_same_bits(product(row(x, n, in), weight, in), row(whole, n, out));
    expect_same_bits(gradient(row(grad, n, out)), row(whole_gradient, n, in));
  }
}

// Memory that begins anywhere takes the slow path, with the same result.
TYPED_TEST(GroupedLinearTest, AddressesNeedNoAlignment) {
  using T = TypeParam;
  const int64_t rows = 5, in = 32, out = 24;
  const auto shifted = [](std::vector<T> data) {
    data.insert(data.begin(), T(1.0f));
    return data;
  };
  const std::vector<T> x = values<T>(rows * in, 1), weight = values<T>(in * out, 2);
  const Buffer<T> from(shifted(x)), matrix(shifted(weight)), y(rows * out + 1);
  LinearGroup group = group_of(from, matrix, y, rows, 1, in, out);
  group.x.data = from.data() + 1, group.weight = matrix.data() + 1, group.y.data = y.data() + 1;
  run<T>(group);
  const std::vector<T> got = y.read_raw();
  expect_same_bits({got.begin() + 1, got.end()}, product(x, weight, in));
}

// ---- around a product ----------------------------------------------------------------------------------------------

TYPED_TEST(GroupedLinearTest, GatherScatterResidualScale) {
  using T = TypeParam;
  using Test = GroupedLinearTest<T>;
  for (const int64_t out : {75, 72}) {
    const int64_t rows = 9, in = 72;
    const std::vector<T> x = values<T>(12 * in, 1), weight = values<T>(2 * out * in, 2),
                         residual = values<T>(11 * out, 3);
    std::vector<T> scale = values<T>(10, 4);
    scale[1] = T(0.0f);  // no result is -0
    const std::vector<int32_t> from{11, 3, 0, 5, -1, 2, 7, 9, 1}, to{8, 1, 2, 3, 9, 5, 6, 7, 0},
        add{0, 10, 2, 3, 4, 5, 6, 7, 8}, offsets{0, 4, 8};
    const Buffer<T> bx(x), bw(weight), br(residual), bs(scale), y(std::vector<T>(10 * out, T(9.0f)));
    const Buffer<int32_t> bfrom(from), bto(to), badd(add), boffsets(offsets);
    LinearGroup group = group_of(bx, bw, y, rows, 2, in, out);
    group.x.index = bfrom.data(), group.y.index = bto.data(), group.offsets = boffsets.data();
    group.residual = rows_of(br, out, badd.data()), group.scale = rows_of(bs, 1, bto.data());
    run<T>(group);
    const std::vector<T> got = y.read();
    for (int64_t n = 0; n < rows; ++n) {
      const std::vector<T> input = from[n] < 0 ? std::vector<T>(in, T(0.0f)) : row(x, from[n], in);
      const std::vector<T> plain = product(input, row(weight, n < 4 ? 0 : 1, out * in), in);
      std::vector<T> want(out, T(0.0f));
      for (int64_t o = 0; n < 8 && o < out; ++o) {
        const T sum = Test::rounded(Test::acc(residual[add[n] * out + o]) + Test::acc(plain[o]));
        want[o] = Test::rounded(Test::acc(sum) * Test::acc(scale[to[n]]) + 0);
      }
      expect_same_bits(row(got, to[n], out), want);
    }
    for (int64_t o = 0; o < out; ++o) ASSERT_EQ(wide(got[4 * out + o]), 9) << "a row that nobody asked for";
  }
}

TYPED_TEST(GroupedLinearTest, GatedUnit) {
  using T = TypeParam;
  for (const int64_t out : {75, 136}) {
    const int64_t rows = 67, in = 24;
    const std::vector<T> x = values<T>(rows * in, 1), gate = values<T>(out * in, 2), up = values<T>(out * in, 3);
    const Buffer<T> bx(x), bg(gate), bu(up), y(rows * out);
    LinearGroup group = group_of(bx, bg, y, rows, 1, in, out);
    group.up = bu.data();
    run<T>(group);
    const std::vector<T> got = y.read(), g = product(x, gate, in), u = product(x, up, in);
    for (size_t i = 0; i < got.size(); ++i) {
      const double want = wide(g[i]) / (1 + std::exp(-wide(g[i]))) * wide(u[i]);
      if (std::is_same_v<T, Float16> && std::abs(want) > 65504) continue;
      ASSERT_NEAR(wide(got[i]), want, kRounding<T> * std::abs(want) + (sizeof(T) == 2 ? 6e-8 : 1e-30)) << i;
    }
  }
}

TYPED_TEST(GroupedLinearTest, NormOnTheWayIn) {
  using T = TypeParam;
  using Test = GroupedLinearTest<T>;
  using Acc = accumulator_t<T>;
  for (const int64_t in : {40, 37}) {
    const int64_t tokens = 6, rows = 7, out = 16;
    const std::vector<T> x = values<T>(tokens * in, 1), weight = values<T>(2 * out * in, 2),
                         gain = values<T>(2 * in, 3);
    const std::vector<Acc> inverse{Acc(0.3), Acc(0.5), Acc(1.25), Acc(0.01), Acc(2), Acc(0.7)};
    const std::vector<int32_t> from{5, 3, 0, 1, 2, 2, 4}, offsets{0, 3, 7};
    const Buffer<T> bx(x), bw(weight), bg(gain), y(rows * out);
    const Buffer<Acc> binverse(inverse);
    const Buffer<int32_t> bfrom(from), boffsets(offsets);
    LinearGroup group = group_of(bx, bw, y, rows, 2, in, out);
    group.x.index = bfrom.data(), group.offsets = boffsets.data();
    group.gain = bg.data(), group.gain_expert_stride = in, group.inverse_rms = binverse.data();
    run<T>(group);
    const std::vector<T> got = y.read();
    for (int64_t n = 0; n < rows; ++n) {
      const int64_t e = n < 3 ? 0 : 1;
      std::vector<T> normed;
      for (int64_t i = 0; i < in; ++i) {
        const T scaled = Test::rounded(Test::acc(x[from[n] * in + i]) * inverse[from[n]]);
        normed.push_back(Test::rounded(Test::acc(scaled) * Test::acc(gain[e * in + i])));
      }
      expect_same_bits(row(got, n, out), product(normed, row(weight, e, out * in), in));
    }
  }
}

TYPED_TEST(GroupedLinearTest, RotationOnTheWayOut) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  for (const int64_t head : {16, 64, 128})
    for (const bool given : {false, true}) {
      const int64_t rows = 5, in = 16, out = 2 * head, positions = 3;
      const std::vector<T> x = values<T>(rows * in, 1), weight = values<T>(out * in, 2);
      std::vector<Acc> cos, sin;
      for (int64_t i = 0; i < positions * head / 2; ++i) {
        cos.push_back(static_cast<Acc>(std::cos(i * 0.7)));
        sin.push_back(static_cast<Acc>(std::sin(i * 0.7)));
      }
      const std::vector<int32_t> from{4, 1, -1, 2, 3}, position{2, 0, 1, 1, 2};
      const Buffer<T> bx(x), bw(weight), y(rows * out);
      const Buffer<Acc> bcos(cos), bsin(sin);
      const Buffer<int32_t> bfrom(from), bposition(position);
      LinearGroup group = group_of(bx, bw, y, rows, 1, in, out);
      group.x.index = bfrom.data();
      group.cos = bcos.data(), group.sin = bsin.data(), group.positions = positions, group.head_dim = head;
      if (given) group.position = bposition.data();
      run<T>(group);
      const std::vector<T> got = y.read(), plain = product(x, weight, in);
      for (int64_t n = 0; n < rows; ++n)
        for (int64_t o = 0; o < out; ++o) {
          if (from[n] < 0) {
            ASSERT_EQ(wide(got[n * out + o]), 0) << "a row of zeros";
            continue;
          }
          const int64_t i = o % head, pair = i % (head / 2),
                        angle = (given ? position[from[n]] : from[n] % positions) * (head / 2) + pair;
          const double a = wide(plain[from[n] * out + o - i + pair]),
                       b = wide(plain[from[n] * out + o - i + pair + head / 2]);
          const double want = i < head / 2 ? a * cos[angle] - b * sin[angle] : b * cos[angle] + a * sin[angle];
          ASSERT_NEAR(wide(got[n * out + o]), want, kRounding<T> * (std::abs(a) + std::abs(b))) << n << ", " << o;
        }
    }
}

TEST(GroupedLinear, RefusesHeadsThatItCannotTurn) {
  const Buffer<float> x(std::vector<float>(4)), weight(std::vector<float>(4 * 96)), y(96),
      table(std::vector<float>(24));
  LinearGroup group = group_of(x, weight, y, 1, 1, 4, 96);
  group.cos = table.data(), group.sin = table.data(), group.positions = 1, group.head_dim = 48;
  EXPECT_EQ(cuda::linear(&group, 1, DType::kFloat32, nullptr), Status::kUnsupported);
}

// Keys of several experts, straight into a cache [experts, heads, slots, head size].
TYPED_TEST(GroupedLinearTest, HeadsApart) {
  using T = TypeParam;
  for (const int64_t head : {16, 6}) {
    const int64_t experts = 2, heads = 3, slots = 7, first = 2, rows = 4, in = 24, out = heads * head;
    const std::vector<T> x = values<T>(rows * in, 1), weight = values<T>(experts * out * in, 2);
    const Buffer<T> bx(x), bw(weight), cache(std::vector<T>(experts * heads * slots * head, T(9.0f)));
    LinearGroup group = group_of(bx, bw, cache, rows, experts, in, out);
    group.y = {cache.data() + first * head, nullptr, head};
    group.y_expert_stride = heads * slots * head, group.y_head_stride = slots * head, group.head_dim = head;
    run<T>(group);
    std::vector<T> want(experts * heads * slots * head, T(9.0f));
    for (int64_t e = 0; e < experts; ++e) {
      const std::vector<T> plain = product(x, row(weight, e, out * in), in);
      for (int64_t n = 0; n < rows; ++n)
        for (int64_t o = 0; o < out; ++o)
          want[((e * heads + o / head) * slots + first + n) * head + o % head] = plain[n * out + o];
    }
    expect_same_bits(cache.read(), want);
  }
}

TYPED_TEST(GroupedLinearTest, GroupsOfDifferentShapesRunTogether) {
  using T = TypeParam;
  const Shape shapes[] = {{{0, 2, 2}, 3, 40, 136}, {{0, 0}, 0, 8, 9}, {{0, 30, 66}, 70, 24, 8}, {{0, 1}, 1, 9, 5}};
  std::vector<Buffer<T>> memory;
  std::vector<Buffer<int32_t>> offsets;
  std::vector<LinearGroup> groups;
  std::vector<std::vector<T>> xs, weights;
  for (const Shape& s : shapes) {
    xs.push_back(values<T>(s.rows * s.in, 1));
    weights.push_back(values<T>(s.experts() * s.out * s.in, 2));
    memory.emplace_back(xs.back());
    memory.emplace_back(weights.back());
    memory.emplace_back(s.rows * s.out);
    offsets.emplace_back(s.offsets);
    const size_t last = memory.size() - 1;
    groups.push_back(group_of(memory[last - 2], memory[last - 1], memory[last], s.rows, s.experts(), s.in, s.out));
    groups.back().offsets = offsets.back().data();
  }
  ASSERT_EQ(cuda::linear(groups.data(), 4, kDTypeOf<T>, nullptr), Status::kOk);
  for (int i = 0; i < 4; ++i) {
    const Shape& s = shapes[i];
    const std::vector<T> got = memory[3 * i + 2].read();
    for (int64_t n = 0; n < s.rows; ++n) {
      const int64_t e = s.expert(n);
      const std::vector<T> want =
          e < 0 ? std::vector<T>(s.out, T(0.0f)) : product(row(xs[i], n, s.in), row(weights[i], e, s.out * s.in), s.in);
      expect_same_bits(row(got, n, s.out), want);
    }
  }
}

// ---- all rows through every expert ---------------------------------------------------------------------------------

TYPED_TEST(GroupedLinearTest, Stacked) {
  using T = TypeParam;
  for (const int64_t inputs : {1, 3})
    for (const bool all : {true, false}) {
      const int64_t experts = 3, tokens = 5, in = 40, out = 24;
      const std::vector<T> x = values<T>(inputs * tokens * in, 1), weight = values<T>(experts * out * in, 2),
                           grad = values<T>(experts * tokens * out, 3);
      const std::vector<int32_t> offsets{0, 2, 2, 5};
      const auto used = [&](int64_t e) { return all || offsets[e] < offsets[e + 1]; };
      const Buffer<T> bx(x), bw(weight), bg(grad), y(experts * tokens * out), grad_x(inputs * tokens * in),
          grad_weight(experts * out * in);
      const Buffer<int32_t> boffsets(offsets);
      const int32_t* given = all ? nullptr : boffsets.data();
      ASSERT_EQ(MICRO_RUN(stacked_linear, StackedLinearParams{bx.data(), bw.data(), given, y.data(), inputs, tokens,
                                                              experts, in, out, kDTypeOf<T>}),
                Status::kOk);
      ASSERT_EQ(
          MICRO_RUN(stacked_linear_backward,
                    StackedLinearBackwardParams{bg.data(), bx.data(), bw.data(), given, grad_x.data(),
                                                grad_weight.data(), inputs, tokens, experts, in, out, kDTypeOf<T>}),
          Status::kOk);
      const std::vector<T> got = y.read(), by_x = grad_x.read(), by_weight = grad_weight.read();
      for (int64_t e = 0; e < experts; ++e) {
        const std::vector<T> slice = row(x, inputs == 1 ? 0 : e, tokens * in);
        expect_same_bits(row(got, e, tokens * out), used(e) ? product(slice, row(weight, e, out * in), in)
                                                            : std::vector<T>(tokens * out, T(0.0f)));
        for (int64_t o = 0; o < out; ++o)
          for (int64_t i = 0; i < in; ++i) {
            double want = 0, size = 0;
            for (int64_t t = 0; used(e) && t < tokens; ++t) {
              const double term = wide(grad[(e * tokens + t) * out + o]) * wide(slice[t * in + i]);
              want += term;
              size += std::abs(term);
            }
            ASSERT_NEAR(wide(by_weight[(e * out + o) * in + i]), want, kRounding<T> * size) << e << o << i;
          }
      }
      for (int64_t r = 0; r < inputs * tokens; ++r)
        for (int64_t i = 0; i < in; ++i) {
          double want = 0, size = 0;
          for (int64_t e = 0; e < experts; ++e) {
            if (!used(e) || (inputs > 1 && e != r / tokens)) continue;
            for (int64_t o = 0; o < out; ++o) {
              const double term =
                  wide(grad[(e * tokens + r % tokens) * out + o]) * wide(weight[(e * out + o) * in + i]);
              want += term;
              size += std::abs(term);
            }
          }
          ASSERT_NEAR(wide(by_x[r * in + i]), want, kRounding<T> * size) << r << ", " << i;
        }
    }
}

// ---- gradients with everything around them -------------------------------------------------------------------------

// Keys and queries of two experts into the gradient of one x: another width each, gathered rows of which some are
// missing, a list of rows per expert.
TYPED_TEST(GroupedLinearTest, GradientOfSeveralSources) {
  using T = TypeParam;
  const int64_t experts = 2, rows = 5, in = 40, keys = 24, queries = 9;
  const std::vector<T> key_weight = values<T>(experts * keys * in, 1),
                       query_weight = values<T>(experts * queries * in, 2),
                       key_grad = values<T>(experts * rows * keys, 3), query_grad = values<T>(4 * queries, 4);
  const std::vector<int32_t> row_of_query{0, -1, 2, -1, -1, 1, -1, -1, 3, -1};
  for (const bool sum : {false, true}) {
    const Buffer<T> kw(key_weight), qw(query_weight), kg(key_grad), qg(query_grad),
        grad_x((sum ? 1 : experts) * rows * in);
    const Buffer<int32_t> index(row_of_query);
    LinearGradXGroup group;
    group.source_count = 2;
    group.sources[0] = {.grad_y = rows_of(kg, keys),
                        .grad_y_expert_stride = rows * keys,
                        .weight = kw.data(),
                        .weight_expert_stride = keys * in,
                        .out = keys};
    group.sources[1] = {.grad_y = rows_of(qg, queries, index.data()),
                        .index_expert_stride = rows,
                        .weight = qw.data(),
                        .weight_expert_stride = queries * in,
                        .out = queries};
    group.grad_x = target(grad_x, in);
    group.grad_x_expert_stride = rows * in;
    group.rows = rows, group.experts = experts, group.in = in, group.sum_experts = sum;
    run<T>(group);
    const std::vector<T> got = grad_x.read();
    for (int64_t r = 0; r < (sum ? 1 : experts) * rows; ++r)
      for (int64_t i = 0; i < in; ++i) {
        double want = 0, size = 0;
        const auto add = [&](T a, T b) {
          want += wide(a) * wide(b);
          size += std::abs(wide(a) * wide(b));
        };
        for (int64_t e = 0; e < experts; ++e) {
          if (!sum && e != r / rows) continue;
          const int64_t n = r % rows, query = row_of_query[e * rows + n];
          for (int64_t o = 0; o < keys; ++o)
            add(key_grad[(e * rows + n) * keys + o], key_weight[(e * keys + o) * in + i]);
          for (int64_t o = 0; query >= 0 && o < queries; ++o)
            add(query_grad[query * queries + o], query_weight[(e * queries + o) * in + i]);
        }
        ASSERT_NEAR(wide(got[r * in + i]), want, kRounding<T> * size) << r << ", " << i;
      }
  }
}

TYPED_TEST(GroupedLinearTest, GradientThroughAGatedUnit) {
  using T = TypeParam;
  for (const int64_t in : {72, 21}) {  // of the last matrix: the gated unit's width
    const int64_t rows = 6, active = 5, out = 16;
    const std::vector<T> weight = values<T>(out * in, 1), grad = values<T>(rows * out, 2);
    std::vector<T> gate = values<T>(rows * in, 3), up = values<T>(rows * in, 4);
    for (int64_t i = active * in; i < rows * in; ++i) gate[i] = up[i] = T(NAN);  // idle rows hold anything
    const std::vector<int32_t> offsets{0, 5};
    const Buffer<T> bw(weight), bg(grad), bgate(gate), bup(up), grad_x(rows * in), grad_gate(rows * in),
        grad_up(rows * in), activation(rows * in);
    const Buffer<int32_t> boffsets(offsets);
    LinearGradXGroup group;
    group.sources[0] = {.grad_y = rows_of(bg, out), .weight = bw.data(), .weight_expert_stride = out * in, .out = out};
    group.grad_x = target(grad_x, in);
    group.offsets = boffsets.data();
    group.rows = rows, group.in = in;
    run<T>(group);
    const std::vector<T> by_y = grad_x.read();
    group.grad_x.data = nullptr;
    group.gate = bgate.data(), group.up = bup.data();
    group.grad_gate = grad_gate.data(), group.grad_up = grad_up.data(), group.activation = activation.data();
    run<T>(group);
    const std::vector<T> by_gate = grad_gate.read(), by_up = grad_up.read(), unit = activation.read();
    for (int64_t i = 0; i < rows * in; ++i) {
      const bool idle = i >= active * in;
      const double g = idle ? 0 : wide(gate[i]), u = idle ? 0 : wide(up[i]), s = 1 / (1 + std::exp(-g)),
                   y = wide(by_y[i]);
      const double tiny = sizeof(T) == 2 ? 6e-8 : 1e-30;
      const auto near = [&](T got, double want, double size) {
        if (std::is_same_v<T, Float16> && std::abs(want) > 65504) return;
        ASSERT_NEAR(wide(got), want, 2 * kRounding<T> * size + tiny) << i;
      };
      near(by_gate[i], y * u * s * (1 + g * (1 - s)), std::abs(y * u * s) * (1 + std::abs(g * (1 - s))));
      near(by_up[i], y * g * s, std::abs(y * g * s));
      near(unit[i], g * s * u, std::abs(g * s * u));
    }
  }
}

// Rows gathered on both sides, over more rows than one tile of steps; an expert without rows; added to what is there.
TYPED_TEST(GroupedLinearTest, GradientOfMatricesGathersAndAdds) {
  using T = TypeParam;
  using Acc = accumulator_t<T>;
  for (const bool accumulate : {false, true})
    for (const int64_t in : {24, 13}) {
      const int64_t rows = 40, tokens = 50, out = 16;
      const std::vector<T> grad = values<T>(tokens * out, 1), x = values<T>(tokens * in, 2);
      std::vector<int32_t> of_grad, of_x;
      for (int32_t n = 0; n < rows; ++n) {
        of_grad.push_back((7 * n + 3) % 50);
        of_x.push_back(n % 9 == 4 ? -1 : (3 * n) % 50);
      }
      const std::vector<int32_t> offsets{0, 0, 37, 38};
      const Buffer<T> bg(grad), bx(x), stored(accumulate ? 0 : 3 * in * out);
      const Buffer<Acc> sums(std::vector<Acc>(accumulate ? 3 * in * out : 0, Acc(3)));
      const Buffer<int32_t> bof_grad(of_grad), bof_x(of_x), boffsets(offsets);
      LinearGradWeightGroup group;
      group.grad_y = rows_of(bg, out, bof_grad.data());
      group.x = rows_of(bx, in, bof_x.data());
      group.grad_weight = accumulate ? static_cast<void*>(sums.data()) : stored.data();
      group.offsets = boffsets.data();
      group.rows = rows, group.experts = 3, group.in = in, group.out = out, group.accumulate = accumulate;
      run<T>(group);
      const std::vector<T> got = stored.read();
      const std::vector<Acc> added = sums.read();
      for (int64_t e = 0; e < 3; ++e)
        for (int64_t o = 0; o < out; ++o)
          for (int64_t i = 0; i < in; ++i) {
            double want = accumulate ? 3 : 0, size = want;
            for (int64_t n = offsets[e]; n < offsets[e + 1]; ++n) {
              if (of_x[n] < 0) continue;
              const double term = wide(grad[of_grad[n] * out + o]) * wide(x[of_x[n] * in + i]);
              want += term;
              size += std::abs(term);
            }
            const int64_t at = (e * out + o) * in + i;
            ASSERT_NEAR(accumulate ? static_cast<double>(added[at]) : wide(got[at]), want,
                        (accumulate ? kRounding<Acc> : kRounding<T>)*size)
                << e << ", " << o << ", " << i;
          }
    }
}

}  // namespace
}  // namespace micro_kernels
