// The gather and its gradient, bit for bit: rows are copied, and the order of the sums is fixed.

#include "micro_kernels/permute.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "backend.h"
#include "elements.h"
#include "offset.h"

namespace micro_kernels {
namespace {

struct Shape {
  int64_t tokens, k, hidden;
  int64_t offset = 0;  // of every row from its vectors, in elements
};

// Sizes around vectors, warps and the pieces of a row that a warp takes; more pairs than a warp has lanes.
const Shape kShapes[] = {{0, 2, 8},   {1, 1, 1},   {3, 2, 33},   {31, 4, 32},   {33, 1, 64}, {129, 1, 8},
                         {4, 2, 0},   {9, 3, 15},  {9, 3, 16},   {9, 3, 17},    {7, 2, 127}, {7, 2, 128},
                         {7, 2, 129}, {2, 2, 300}, {2, 2, 1032}, {5, 2, 64, 1}, {3, 40, 24}, {5, 0, 8}};

enum class Idle { kSome, kNone, kAll };

// A plan of one expert: any permutation of the pairs, of which the last fifth is idle, or none, or all.
template <class T>
struct Problem {
  Shape shape;
  int64_t rows;
  std::vector<int32_t> tokens, inverse, offsets{0, 0};
  std::vector<T> x, grad_y;

  Problem(Shape s, Idle idle)
      : shape(s),
        rows(s.tokens * s.k),
        tokens(rows),
        inverse(rows),
        x(random_elements<T>(s.tokens * s.hidden, 1)),
        grad_y(random_elements<T>(rows * s.hidden, 2)) {
    std::mt19937 random(static_cast<unsigned>(s.tokens + s.hidden));
    std::iota(inverse.begin(), inverse.end(), 0);
    std::shuffle(inverse.begin(), inverse.end(), random);
    for (int64_t pair = 0; pair < rows; ++pair) tokens[inverse[pair]] = static_cast<int32_t>(pair / s.k);
    offsets[1] = static_cast<int32_t>(idle == Idle::kNone ? rows : idle == Idle::kAll ? 0 : rows - rows / 5);
  }
};

template <class T>
struct PermuteTest : testing::Test {
  using Acc = accumulator_t<T>;

  static void forward(const Problem<T>& problem) {
    const auto& [s, rows, tokens, inverse, offsets, x, grad_y] = problem;
    const OffsetBuffer<T> from(x, s.offset), y(rows * s.hidden, s.offset);
    const Buffer<int32_t> token(tokens), offset(offsets);
    ASSERT_EQ(MICRO_RUN(permute, PermuteParams{from.data(), token.data(), offset.data(), y.data(), s.tokens, rows,
                                               s.hidden, 1, kDTypeOf<T>}),
              Status::kOk);
    std::vector<T> want(rows * s.hidden, T(Acc(0)));
    for (int64_t n = 0; n < offsets[1]; ++n)
      std::copy_n(x.begin() + tokens[n] * s.hidden, s.hidden, want.begin() + n * s.hidden);
    expect_same_bits(y.read(), want);
  }

  static void backward(const Problem<T>& problem) {
    const auto& [s, rows, tokens, inverse, offsets, x, grad_y] = problem;
    const OffsetBuffer<T> from(grad_y, s.offset), grad_x(s.tokens * s.hidden, s.offset);
    const Buffer<int32_t> row(inverse), offset(offsets);
    ASSERT_EQ(MICRO_RUN(permute_backward, PermuteBackwardParams{from.data(), offset.data(), row.data(), grad_x.data(),
                                                                s.tokens, s.k, s.hidden, 1, kDTypeOf<T>}),
              Status::kOk);
    std::vector<T> want;
    for (int64_t t = 0; t < s.tokens; ++t)
      for (int64_t h = 0; h < s.hidden; ++h) {
        Acc sum = 0;
        for (int64_t i = 0; i < s.k; ++i)
          if (const int64_t n = inverse[t * s.k + i]; n < offsets[1]) sum += static_cast<Acc>(grad_y[n * s.hidden + h]);
        want.push_back(T(sum));
      }
    expect_same_bits(grad_x.read(), want);
  }

  template <class Body>
  static void each_problem(const Body& body) {
    for (const Shape& s : kShapes) each_problem(s, Idle::kSome, body);
    for (const Shape& s : {Shape{9, 3, 16}, Shape{7, 2, 129}})
      for (Idle idle : {Idle::kNone, Idle::kAll}) each_problem(s, idle, body);
  }
  template <class Body>
  static void each_problem(const Shape& s, Idle idle, const Body& body) {
    SCOPED_TRACE(testing::Message() << s.tokens << " tokens, K " << s.k << ", H " << s.hidden << ", offset " << s.offset
                                    << ", idle " << static_cast<int>(idle));
    body(Problem<T>(s, idle));
  }
};
TYPED_TEST_SUITE(PermuteTest, DeviceElementTypes);

TYPED_TEST(PermuteTest, RowsAreCopiedAndIdleRowsAreZero) { TestFixture::each_problem(TestFixture::forward); }

TYPED_TEST(PermuteTest, BackwardSumsTheRowsOfAToken) { TestFixture::each_problem(TestFixture::backward); }

TEST(Permute, AnIndexOutsideIsRefused) {
  if (kOnDevice) GTEST_SKIP() << "a device assertion";
  Problem<float> problem({3, 2, 8}, Idle::kNone);
  std::vector<float> y(problem.grad_y.size()), grad_x(problem.x.size());
  problem.tokens.back() = 3;
  EXPECT_EQ(cpu::permute({problem.x.data(), problem.tokens.data(), problem.offsets.data(), y.data(), 3, 6, 8, 1,
                          DType::kFloat32},
                         serial),
            Status::kIndexOutOfRange);
  problem.inverse.back() = -1;
  EXPECT_EQ(cpu::permute_backward({problem.grad_y.data(), problem.offsets.data(), problem.inverse.data(), grad_x.data(),
                                   3, 2, 8, 1, DType::kFloat32},
                                  serial),
            Status::kIndexOutOfRange);
}

}  // namespace
}  // namespace micro_kernels
