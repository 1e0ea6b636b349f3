#pragma once
// What the losses over routing decisions share: sums over the real tokens of each layer, in two launches. The first
// gives each block a share of one layer's tokens and writes its sum; the second, a single block, adds the sums in a
// fixed order. All in double, as on the CPU: a row is a handful of numbers, and its sums run over many tokens.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/cuda/arch/trap.cuh"
#include "common/cuda/block.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/score_row.cuh"

namespace micro_kernels::cuda {

inline constexpr int kTokenThreads = 256;
inline constexpr int64_t kMostTokenBlocks = 32;  // of a layer: its sums are then few enough for one block

using TokenSumMemory = BlockSumMemory<double, kTokenThreads>;

// Blocks of each layer; 0 where there is no token.
inline int64_t token_blocks(int64_t tokens) {
  return std::min<int64_t>(kMostTokenBlocks, ceil_div(tokens, kTokenThreads));
}

inline dim3 token_grid(int64_t layers, int64_t tokens) {
  return dim3(static_cast<unsigned>(layers * token_blocks(tokens)));
}

// What a block of the first launch, or of a backward, works on: every token of `layer` with
// token = first + i * step, i = 0, 1, ...
struct TokenShare {
  int64_t layer, block, first, step;

  __device__ explicit TokenShare(int64_t blocks)
      : layer(blockIdx.x / blocks),
        block(blockIdx.x % blocks),
        first(block * kTokenThreads + threadIdx.x),
        step(blocks * kTokenThreads) {}
};

__device__ inline bool is_real(const bool* mask, int64_t token) { return !mask || load(mask + token); }

// Number of real tokens, at least 1: it only ever divides. Counted by the whole block.
__device__ inline double real_tokens(const bool* mask, int64_t tokens, TokenSumMemory& memory) {
  int64_t count = mask ? 0 : tokens;
  if (mask) {
    const int64_t head = (16 - reinterpret_cast<uintptr_t>(mask) % 16) % 16;  // up to the first aligned 16
    const int64_t vectors = tokens > head ? (tokens - head) / 16 : 0;
    int32_t mine = 0;
    for (int64_t i = threadIdx.x; i < vectors; i += kTokenThreads) {
      const Vec<bool, 16> part = load_vec<16>(mask + head + i * 16);
#pragma unroll
      for (int j = 0; j < 16; ++j) mine += part[j] ? 1 : 0;
    }
    const int64_t rest = tokens - vectors * 16;  // the head, and what is left behind the vectors
    for (int64_t i = threadIdx.x; i < rest; i += kTokenThreads)
      mine += load(mask + (i < head ? i : i + vectors * 16)) ? 1 : 0;
    count = static_cast<int64_t>(block_sum<kTokenThreads>(static_cast<double>(mine), memory));
  }
  return count > 1 ? static_cast<double>(count) : 1.0;
}

template <class T, int kWidth>
__device__ double wide_at(const ScoreRow<T, kWidth>& row, int e) {
  return static_cast<double>(row[e]);
}

// log sum_e exp(z[e]). -inf for a row of -inf.
template <class T, int kWidth>
__device__ double log_sum_exp(const ScoreRow<T, kWidth>& z) {
  double top = -INFINITY;
  bool is_nan = false;
#pragma unroll
  for (int e = 0; e < z.size(); ++e) {
    const double value = wide_at(z, e);
    is_nan = is_nan || value != value;
    top = value > top ? value : top;
  }
  if (is_nan) return NAN;
  if (fabs(top) == INFINITY) return top;
  double sum = 0;
#pragma unroll
  for (int e = 0; e < z.size(); ++e) sum += exp(wide_at(z, e) - top);
  return top + log(sum);
}

// ---- the first launch ----------------------------------------------------------------------------------------------

template <class Params>
struct TokenSumsLaunch {
  Params op;
  double* sums;  // [layers, blocks]; behind them the numbers of real tokens, [blocks]
  int64_t blocks;

  __device__ double* real() const { return sums + op.layers * blocks; }
};

template <class Params>
int64_t token_sums_workspace(const Params& p) {
  return ((p.layers + 1) * token_blocks(p.tokens) * static_cast<int64_t>(sizeof(double)) + 15) / 16 * 16;
}

// Term::inside(p, token) says whether the token's indices may be used, Term::wanted(p, layer) whether a layer is read
// at all, and Term::value(p, layer, token) is the summand of a token.
template <class Term>
__global__ void __launch_bounds__(kTokenThreads, 1) token_sums_kernel(TokenSumsLaunch<typename Term::Params> launch) {
  const auto& p = launch.op;
  auto& memory = shared_memory<TokenSumMemory>();
  const TokenShare share(launch.blocks);
  const bool wanted = Term::wanted(p, share.layer);
  double sum = 0, real = 0;
  bool inside = true;
  for (int64_t t = share.first; t < p.tokens; t += share.step) {
    const bool usable = Term::inside(p, t);
    inside = inside && usable;
    if (!is_real(p.mask, t)) continue;
    real += 1;
    if (wanted && usable) sum += Term::value(p, share.layer, t);
  }
  sum = block_sum<kTokenThreads>(sum, memory);
  if (threadIdx.x == 0) store(launch.sums + blockIdx.x, sum);
  if (share.layer == 0) {  // of the whole block
    real = block_sum<kTokenThreads>(real, memory);
    if (threadIdx.x == 0) store(launch.real() + share.block, real);
  }
  require(inside);
}

template <class Term>
Status launch_token_sums(const TokenSumsLaunch<typename Term::Params>& params, void* stream) {
  if (params.op.layers * params.op.tokens == 0) return Status::kOk;
  return launch(token_sums_kernel<Term>, token_grid(params.op.layers, params.op.tokens), dim3(kTokenThreads),
                sizeof(TokenSumMemory), stream, params);
}

// ---- the second ----------------------------------------------------------------------------------------------------

// Number of real tokens, at least 1, from the counts of the first launch. Without layers nothing was counted.
__device__ inline double counted_tokens(const double* real, int64_t layers, int64_t blocks, TokenSumMemory& memory) {
  const double mine = layers > 0 && threadIdx.x < blocks ? load(real + threadIdx.x) : 0.0;
  const double count = block_sum<kTokenThreads>(mine, memory);
  return count > 1 ? count : 1.0;
}
static_assert(kMostTokenBlocks <= kWarp && kWarp <= kTokenThreads);

}  // namespace micro_kernels::cuda
