// What attention moves: queries and results once, keys and values once per tile of queries that reads them, from a
// cache.

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "elements.h"
#include "expert_attention/attention_launch.h"
#include "gates.h"
#include "micro_kernels/expert_attention.h"

namespace micro_kernels {
namespace {

// One batch row, one expert, every token routed to it: the last `tokens` of `keys` slots.
template <class T>
struct Problem {
  using Acc = accumulator_t<T>;
  int64_t tokens, keys, heads, groups, head_dim;
  Buffer<T> q, k, v, grad_out, out, grad_q, grad_k, grad_v;
  Buffer<Acc> logsumexp;
  Buffer<int32_t> plan, offsets;

  Problem(int64_t s, int64_t j, int64_t a, int64_t g, int64_t d)
      : tokens(s),
        keys(j),
        heads(a),
        groups(g),
        head_dim(d),
        q(random_elements<T>(s * a * d, 1)),
        k(random_elements<T>(g * j * d, 2)),
        v(random_elements<T>(g * j * d, 3)),
        grad_out(random_elements<T>(s * a * d, 4)),
        out(s * a * d),
        grad_q(s * a * d),
        grad_k(g * j * d),
        grad_v(g * j * d),
        logsumexp(s * a),
        plan(ascending(s)),
        offsets(std::vector<int32_t>{0, static_cast<int32_t>(s)}) {}

  static std::vector<int32_t> ascending(int64_t count) {
    std::vector<int32_t> numbers(count);
    std::iota(numbers.begin(), numbers.end(), 0);
    return numbers;
  }

  double queries() const { return static_cast<double>(tokens * heads * head_dim * sizeof(T)); }
  double key_bytes() const { return static_cast<double>(groups * keys * head_dim * sizeof(T)); }  // of k, or of v
  double statistics() const { return static_cast<double>(tokens * heads * sizeof(Acc)); }         // of one kind
  double indices() const { return 4.0 * static_cast<double>(tokens); }

  // Rows of keys that tiles of queries read, beyond each once: keys or values alone, in bytes.
  double keys_again(int64_t rows_of_tile) const {
    const int64_t per_position = heads / groups, rows = tokens * per_position;
    int64_t read = 0;
    for (int64_t first = 0; first < rows; first += rows_of_tile)
      read += keys - tokens + (std::min(first + rows_of_tile, rows) - 1) / per_position + 1;
    return static_cast<double>((read - keys) * groups * head_dim * sizeof(T));
  }
  // Rows of queries that blocks of keys read, beyond each once: q or grad_out alone, in bytes.
  double queries_again(int64_t keys_of_block) const {
    int64_t read = 0;
    for (int64_t j0 = 0; j0 < keys; j0 += keys_of_block) read += std::min(tokens, keys - j0);
    return static_cast<double>((read - tokens) * heads * head_dim * sizeof(T));
  }

  ExpertAttentionShape shape() const {
    return {.tokens = plan.data(),
            .offsets = offsets.data(),
            .mask = nullptr,
            .mask_kind = AttentionMask::kNone,
            .masks = 0,
            .rows = tokens,
            .heads = heads,
            .groups = groups,
            .head_dim = head_dim,
            .batch = 1,
            .experts = 1,
            .slots = tokens,
            .keys = keys,
            .start = keys - tokens,
            .starts = nullptr,
            .scale = 0.1,
            .dtype = kDTypeOf<T>};
  }
  HeadStrides strides() const { return {0, 0, keys * head_dim, head_dim}; }
  Status forward() const {
    return MICRO_RUN_WITH_WORKSPACE(
        expert_attention, ExpertAttentionParams{shape(), q.data(), k.data(), v.data(), strides(), strides(), out.data(),
                                                logsumexp.data()});
  }
  Status backward() const {
    return MICRO_RUN_WITH_WORKSPACE(
        expert_attention_backward,
        ExpertAttentionBackwardParams{shape(), grad_out.data(), q.data(), k.data(), v.data(), out.data(),
                                      logsumexp.data(), strides(), strides(), grad_q.data(), grad_k.data(),
                                      grad_v.data(), strides(), strides()});
  }
};

// Twelve heads share three keys of 64 elements, as in the smallest backbone. Every block also reads the plan's rows of
// its queries a few times: tokens, and what the forward kept of them.
TEST(AttentionTraffic, ManyTokens) {
  const Problem<BFloat16> p(96, 96, 12, 3, 64);
  const double blocks = 3.0 * 4 * 96 / 64;
  expect_launches({{2 * p.queries() + 2 * p.key_bytes() + p.statistics() + p.indices(),
                    2 * p.keys_again(64) + (blocks - 1) * 16 * 4}},
                  [&] { return p.forward(); });
  const double of_query = p.statistics() * 2, kept = p.queries();
  expect_launches({{2 * kept + p.statistics()},
                   {3 * p.queries() + 2 * p.key_bytes() + of_query + p.indices(), 2 * p.keys_again(64)},
                   {2 * p.queries() + 4 * p.key_bytes() + of_query + p.indices(),
                    2 * p.queries_again(64) + 2 * of_query + 3 * p.indices()}},
                  [&] { return p.backward(); });
}

// One token: keys and values once; the partial results of 256 keys each are small beside them. Their maxima are read
// three times.
TEST(AttentionTraffic, OneToken) {
  const Problem<BFloat16> p(1, 520, 12, 3, 64);
  const double partial = 3 * 12 * 66 * 4.0;
  expect_launches(
      {{p.queries() + 2 * p.key_bytes() + partial}, {partial + p.queries() + p.statistics(), 3 * 12 * 4.0 * 3}},
      [&] { return p.forward(); });
}

TEST(AttentionTraffic, Float32) {
  const Problem<float> p(32, 32, 4, 2, 64);
  expect_launches({{2 * p.queries() + 2 * p.key_bytes() + p.statistics() + p.indices(), 2 * p.keys_again(16)}},
                  [&] { return p.forward(); });
}

// 16 bits: no two lanes ask a bank for different words at once.
TEST(AttentionTraffic, NoBankConflicts) {
  for (int64_t head_dim : {64, 128, 256})
    for (int64_t tokens : {2, 48}) {
      const Problem<BFloat16> p(tokens, 64, 2, 1, head_dim);
      auto launches = counted_launches([&] { return p.forward(); });
      for (emu::LaunchRecord& launch : counted_launches([&] { return p.backward(); })) launches.push_back(launch);
      for (const emu::LaunchRecord& launch : launches)
        EXPECT_EQ(launch.accounts.shared_phases, launch.accounts.ideal_phases) << launch.kernel;
    }
}

}  // namespace
}  // namespace micro_kernels
