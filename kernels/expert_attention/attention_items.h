#pragma once
// Between the work list (expert_attention_cpu.cpp) and the code of one instruction set (attention_*.cpp).

#include "micro_kernels/expert_attention.h"

namespace micro_kernels::cpu {

// Rows [begin, end) of the plan: queries of expert e in row b, ascending by slot, and their heads of group g.
struct AttentionItem {
  int64_t b, e, g;
  int64_t begin, end;
};

// Where the token of plan row n stands among the keys of its row.
static inline int64_t own_slot(const ExpertAttentionShape& s, int64_t n) {
  const int64_t token = s.tokens[n];
  return (s.starts ? s.starts[token / s.slots] : s.start) + token % s.slots;
}

// One work item at a time, in scratch memory of the size asked for, aligned to 64 bytes. A forward item owns its rows
// of out and logsumexp; a backward item must hold all queries of (b, e), and owns their grad_q and all of grad_k and
// grad_v of (b, e, g). No item writes what another one writes.
struct AttentionKernels {
  int64_t (*forward_scratch)(const ExpertAttentionShape&, int64_t positions);
  void (*forward)(const ExpertAttentionParams&, const AttentionItem&, char* scratch);
  int64_t (*backward_scratch)(const ExpertAttentionShape&, int64_t positions);
  void (*backward)(const ExpertAttentionBackwardParams&, const AttentionItem&, char* scratch);
};

constexpr int64_t kTilesPerItem = 8;  // of a forward item: enough to pay for packing the keys, few enough to share out

// Query positions whose heads of one group fill a tile: about 30 rows, five register tiles (performance.md 3.4).
constexpr int64_t kMostTilePositions = 30;
constexpr int64_t tile_positions(int64_t heads_per_group) {
  return heads_per_group >= kMostTilePositions ? 1 : kMostTilePositions / heads_per_group;
}

const AttentionKernels& attention_kernels_plain(DType);
const AttentionKernels& attention_kernels_avx2(DType);
const AttentionKernels& attention_kernels_avx512(DType);
const AttentionKernels& attention_kernels_avx512_bf16(DType);

}  // namespace micro_kernels::cpu
