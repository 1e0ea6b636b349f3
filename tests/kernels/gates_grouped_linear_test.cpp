// What the grouped product moves: factors once per tile that needs them, from a cache; results once.

#include <gtest/gtest.h>

#include <vector>

#include "elements.h"
#include "expert_linear/linear_layout.h"
#include "gates.h"
#include "micro_kernels/expert_linear.h"

namespace micro_kernels {
namespace {

using cuda::pieces;

// Two experts, rows gathered and scattered.
template <class T>
struct Problem {
  static constexpr int64_t kExperts = 2;
  int64_t rows, in, out, tile_rows, tile_columns;
  std::vector<int32_t> order;
  Buffer<T> x, grad_y, weight, up, y, grad_x, grad_weight;
  Buffer<int32_t> index, offsets;

  Problem(int64_t n, int64_t i, int64_t o, int64_t tile, int64_t columns = 128)
      : rows(n),
        in(i),
        out(o),
        tile_rows(tile),
        tile_columns(columns),
        order(reversed(n)),
        x(random_elements<T>(n * i, 1)),
        grad_y(random_elements<T>(n * o, 2)),
        weight(random_elements<T>(kExperts * o * i, 3)),
        up(random_elements<T>(kExperts * o * i, 4)),
        y(n * o),
        grad_x(n * i),
        grad_weight(kExperts * o * i),
        index(order),
        offsets(std::vector<int32_t>{0, static_cast<int32_t>(n / 2), static_cast<int32_t>(n)}) {}

  static std::vector<int32_t> reversed(int64_t n) {
    std::vector<int32_t> numbers;
    for (int64_t r = n; r > 0; --r) numbers.push_back(static_cast<int32_t>(r - 1));
    return numbers;
  }

  double bytes(int64_t count) const { return static_cast<double>(count) * sizeof(T); }
  double index_bytes() const { return static_cast<double>(rows) * sizeof(int32_t); }
  double matrices() const { return bytes(kExperts * in * out); }
  double row_tiles() const { return static_cast<double>(pieces(rows / kExperts, tile_rows)); }  // of one expert

  Traffic forward(bool gated) const {
    const double columns = static_cast<double>(pieces(out, gated ? tile_columns / 2 : tile_columns));
    const double factors = bytes(rows * in), weights = (gated ? 2 : 1) * matrices();
    return {factors + weights + bytes(rows * out) + index_bytes(),
            (columns - 1) * factors + (row_tiles() - 1) * weights + columns * index_bytes()};
  }
  Traffic backward_x() const {
    const double columns = static_cast<double>(pieces(in, tile_columns));
    return {bytes(rows * out) + matrices() + bytes(rows * in),
            (columns - 1) * bytes(rows * out) + (row_tiles() - 1) * matrices()};
  }
  Traffic backward_weight() const {
    const double across = static_cast<double>(pieces(in, tile_columns)),
                 down = static_cast<double>(pieces(out, tile_rows));
    return {bytes(rows * (in + out)) + matrices(), (down - 1) * bytes(rows * in) + (across - 1) * bytes(rows * out)};
  }

  cuda::LinearGroup group() const {
    cuda::LinearGroup g;
    g.x = {x.data(), index.data(), in};
    g.weight = weight.data(), g.weight_expert_stride = in * out;
    g.y = {y.data(), index.data(), out};
    g.offsets = offsets.data();
    g.rows = rows, g.experts = kExperts, g.in = in, g.out = out;
    return g;
  }
};

template <class T>
void expect_few_bytes(const Problem<T>& p) {
  cuda::LinearGroup group = p.group();
  expect_launches({p.forward(false)}, [&] { return cuda::linear(&group, 1, kDTypeOf<T>, nullptr); });
  group.up = p.up.data();
  expect_launches({p.forward(true)}, [&] { return cuda::linear(&group, 1, kDTypeOf<T>, nullptr); });
  expect_launches({p.backward_x(), p.backward_weight()}, [&] {
    return cuda::expert_linear_backward(
        {p.grad_y.data(), p.x.data(), p.weight.data(), p.offsets.data(), p.grad_x.data(), p.grad_weight.data(), p.rows,
         Problem<T>::kExperts, p.in, p.out, kDTypeOf<T>},
        nullptr);
  });
}

TEST(GroupedLinearTraffic, ManyRows) { expect_few_bytes(Problem<BFloat16>(512, 128, 256, cuda::kManyRows<BFloat16>)); }
TEST(GroupedLinearTraffic, FewRows) {
  Problem<BFloat16> p(32, 256, 128, cuda::kFewRows, cuda::kTileColumns<BFloat16, cuda::kFewRows>);
  cuda::LinearGroup group = p.group();
  expect_launches({p.forward(false)}, [&] { return cuda::linear(&group, 1, DType::kBFloat16, nullptr); });
}
TEST(GroupedLinearTraffic, Float32) { expect_few_bytes(Problem<float>(128, 128, 128, cuda::kManyRows<float>)); }

// 16 bits: no two lanes ask a bank for different words at once, on the way in, in the products and on the way out.
TEST(GroupedLinearTraffic, NoBankConflicts) {
  const Problem<BFloat16> p(64, 64, 128, 128);
  cuda::LinearGroup group = p.group();
  for (const bool gated : {false, true}) {
    group.up = gated ? p.up.data() : nullptr;
    const auto launches = counted_launches([&] { return cuda::linear(&group, 1, DType::kBFloat16, nullptr); });
    EXPECT_EQ(launches[0].accounts.shared_phases, launches[0].accounts.ideal_phases) << gated;
  }
  const auto launches = counted_launches([&] {
    return cuda::expert_linear_backward(
        {p.grad_y.data(), p.x.data(), p.weight.data(), p.offsets.data(), p.grad_x.data(), p.grad_weight.data(), p.rows,
         2, p.in, p.out, DType::kBFloat16},
        nullptr);
  });
  for (const emu::LaunchRecord& launch : launches)
    EXPECT_EQ(launch.accounts.shared_phases, launch.accounts.ideal_phases) << launch.kernel;
}

}  // namespace
}  // namespace micro_kernels
