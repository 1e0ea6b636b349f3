// Changed rows bit for bit against plain loops, and their gradients; sums of gradients in float64 to rounding.

#include "micro_kernels/intervene.h"

#include <gtest/gtest.h>

#include <cmath>
#include <optional>
#include <vector>

#include "backend.h"
#include "elements.h"
#include "offset.h"

namespace micro_kernels {
namespace {

struct Shape {
  int64_t rows, width, experts;
  int64_t value_rows = 0, value_width = 0;  // 0: as experts and width
  int64_t offset = 0;                       // of every row from its vectors, in elements
};

const Shape kShapes[] = {{0, 8, 4},         {1, 1, 1},    {33, 33, 4},        {31, 64, 4, 1},
                         {9, 129, 3, 0, 1}, {12, 520, 2}, {7, 40, 4, 1, 1, 1}};
constexpr Change kChanges[] = {Change::kZero, Change::kScale, Change::kShift, Change::kReplace};

// Every third row is not touched and belongs to no expert; every fourth column is not named.
template <class T>
struct Problem {
  using Acc = accumulator_t<T>;
  Shape shape;
  Change change;
  bool by_index;
  std::vector<T> x, value, grad_y;
  std::vector<uint8_t> touched, columns;
  std::vector<int32_t> expert;
  std::vector<int64_t> index;

  Problem(Shape s, Change c, bool indexed) : shape(s), change(c), by_index(indexed) {
    if (shape.value_rows == 0) shape.value_rows = indexed ? 100 : shape.experts;
    if (shape.value_width == 0) shape.value_width = shape.width;
    x = random_elements<T>(s.rows * s.width, 1);
    value = random_elements<T>(shape.value_rows * shape.value_width, 2);
    grad_y = random_elements<T>(s.rows * s.width, 3);
    for (int64_t n = 0; n < s.rows; ++n) {
      touched.push_back(n % 3 != 1);
      expert.push_back(touched.back() ? static_cast<int32_t>(n * 7 % s.experts) : -1);
      index.push_back(touched.back() ? n * 31 % shape.value_rows : -5);
    }
    for (int64_t i = 0; i < s.experts * s.width; ++i) columns.push_back(i % 4 != 2);
  }

  bool changes(int64_t n, int64_t w) const { return touched[n] && columns[expert[n] * shape.width + w]; }
  int64_t value_row(int64_t n) const { return by_index ? index[n] : shape.value_rows == 1 ? 0 : expert[n]; }
  Acc value_at(int64_t n, int64_t w) const {
    return static_cast<Acc>(value[value_row(n) * shape.value_width + (shape.value_width == 1 ? 0 : w)]);
  }
  T want(int64_t n, int64_t w) const {
    const T from = x[n * shape.width + w];
    if (!changes(n, w)) return from;
    switch (change) {
      case Change::kZero:
        return T(Acc(0));
      case Change::kScale:
        return T(static_cast<Acc>(from) * value_at(n, w));
      case Change::kShift:
        return T(static_cast<Acc>(from) + value_at(n, w));
      case Change::kReplace:
        break;
    }
    return T(value_at(n, w));
  }
};

template <class T>
struct InterveneTest : testing::Test {
  using Acc = accumulator_t<T>;

  struct Memory {
    OffsetBuffer<T> x, y, grad_y, grad_x;
    Buffer<T> value;
    Buffer<uint8_t> touched, columns;
    Buffer<int32_t> expert;
    Buffer<int64_t> index;
    Buffer<Acc> grad_value;

    explicit Memory(const Problem<T>& p)
        : x(p.x, p.shape.offset),
          y(static_cast<int64_t>(p.x.size()), p.shape.offset),
          grad_y(p.grad_y, p.shape.offset),
          grad_x(static_cast<int64_t>(p.x.size()), p.shape.offset),
          value(p.value),
          touched(p.touched),
          columns(p.columns),
          expert(p.expert),
          index(p.index),
          grad_value(p.shape.value_rows * p.shape.width) {}

    InterveneParams params(const Problem<T>& p) const {
      return {.x = x.data(),
              .y = y.data(),
              .touched = reinterpret_cast<const bool*>(touched.data()),
              .expert = expert.data(),
              .columns = reinterpret_cast<const bool*>(columns.data()),
              .value = p.change == Change::kZero ? nullptr : value.data(),
              .index = p.by_index ? index.data() : nullptr,
              .rows = p.shape.rows,
              .width = p.shape.width,
              .experts = p.shape.experts,
              .value_rows = p.shape.value_rows,
              .value_width = p.shape.value_width,
              .change = p.change,
              .dtype = kDTypeOf<T>};
    }
  };

  static void forward(const Problem<T>& problem) {
    const Memory memory(problem);
    std::vector<T> want;
    for (int64_t n = 0; n < problem.shape.rows; ++n)
      for (int64_t w = 0; w < problem.shape.width; ++w) want.push_back(problem.want(n, w));
    InterveneParams params = memory.params(problem);
    ASSERT_EQ(MICRO_RUN(intervene, params), Status::kOk);
    expect_same_bits(memory.y.read(), want);
    params.y = memory.x.data();  // in place
    ASSERT_EQ(MICRO_RUN(intervene, params), Status::kOk);
    expect_same_bits(memory.x.read(), want);
  }

  static void backward(const Problem<T>& problem) {
    const Memory memory(problem);
    const Shape& s = problem.shape;
    std::vector<T> to_x;
    std::vector<double> to_value(s.value_rows * s.width), size(s.value_rows * s.width, 1e-30);
    for (int64_t n = 0; n < s.rows; ++n)
      for (int64_t w = 0; w < s.width; ++w) {
        const T grad = problem.grad_y[n * s.width + w];
        const bool changes = problem.changes(n, w);
        if (!changes || problem.change == Change::kShift)
          to_x.push_back(grad);
        else
          to_x.push_back(problem.change == Change::kScale ? T(static_cast<Acc>(grad) * problem.value_at(n, w))
                                                          : T(Acc(0)));
        if (!changes) continue;
        const double factor =
            problem.change == Change::kScale ? static_cast<double>(static_cast<Acc>(problem.x[n * s.width + w])) : 1;
        const double term = static_cast<double>(static_cast<Acc>(grad)) * factor;
        to_value[problem.value_row(n) * s.width + w] += term;
        size[problem.value_row(n) * s.width + w] += std::abs(term);
      }
    const bool zero = problem.change == Change::kZero;
    ASSERT_EQ(MICRO_RUN(intervene_backward,
                        InterveneBackwardParams{memory.params(problem), memory.grad_y.data(), memory.grad_x.data(),
                                                zero ? nullptr : memory.grad_value.data()}),
              Status::kOk);
    expect_same_bits(memory.grad_x.read(), to_x);
    if (zero) return;
    const std::vector<Acc> got = memory.grad_value.read();
    const double epsilon = sizeof(Acc) == 8 ? 1e-14 : 1e-5;  // a sum of at most 33 products, each rounded
    for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], to_value[i], epsilon * size[i]) << i;
  }
};
TYPED_TEST_SUITE(InterveneTest, DeviceElementTypes);

TYPED_TEST(InterveneTest, RowsAreChangedWhereTheyAreNamed) {
  for (const Shape& shape : kShapes)
    for (const Change change : kChanges) {
      TestFixture::forward(Problem<TypeParam>(shape, change, false));
      if (change != Change::kZero && shape.value_rows == 0)
        TestFixture::forward(Problem<TypeParam>(shape, change, true));
    }
}

TYPED_TEST(InterveneTest, GradientsGoToRowsAndValues) {
  for (const Shape& shape : kShapes)
    for (const Change change : kChanges) {
      TestFixture::backward(Problem<TypeParam>(shape, change, false));
      if (change != Change::kZero && shape.value_rows == 0)
        TestFixture::backward(Problem<TypeParam>(shape, change, true));
    }
}

TEST(Intervene, WithoutMasksEverythingIsChanged) {
  const Buffer<float> x(std::vector<float>{1, 2, 3, 4, 5, 6}), y(6), value(std::vector<float>{2});
  const InterveneParams params{.x = x.data(),
                               .y = y.data(),
                               .touched = nullptr,
                               .expert = nullptr,
                               .columns = nullptr,
                               .value = value.data(),
                               .index = nullptr,
                               .rows = 2,
                               .width = 3,
                               .experts = 0,
                               .value_rows = 1,
                               .value_width = 1,
                               .change = Change::kScale,
                               .dtype = DType::kFloat32};
  ASSERT_EQ(MICRO_RUN(intervene, params), Status::kOk);
  expect_same_bits(y.read(), {2, 4, 6, 8, 10, 12});
}

#ifndef MICRO_TEST_CUDA
TEST(Intervene, IndicesOutsideTheirRangeAreRefused) {
  Problem<float> problem({9, 8, 3}, Change::kScale, false);
  problem.expert[0] = 3;
  const InterveneTest<float>::Memory wrong_expert(problem);
  EXPECT_EQ(cpu::intervene(wrong_expert.params(problem), serial), Status::kIndexOutOfRange);
  Problem<float> other({9, 8, 3}, Change::kReplace, true);
  other.index[2] = 100;
  const InterveneTest<float>::Memory wrong_index(other);
  EXPECT_EQ(cpu::intervene(wrong_index.params(other), serial), Status::kIndexOutOfRange);
}
#endif

}  // namespace
}  // namespace micro_kernels
