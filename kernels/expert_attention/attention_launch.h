#pragma once
// What the CUDA launchers decide on the host: the sizes of tiles, whether rows are aligned, and how much of the tiles'
// work the queries need.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "micro_kernels/expert_attention.h"

namespace micro_kernels::cuda {

inline constexpr int kThreads = 128;  // of every block
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kMmaRows = 16;      // of one tensor core product: what a warp owns
inline constexpr int kGradQueries = 32;  // that the kernel of grad_k and grad_v takes at a time
inline constexpr int64_t kCopyBytes = 16;
inline constexpr size_t kMostShared =
    99 * 1024;  // bytes of shared memory per block that every device from sm_80 on has

// How many heads share a key, with the division by it as a product: exact for every row, whatever the number is.
struct HeadCount {
  int count;
  int shift = 32;
  uint64_t magic;

  explicit HeadCount(const ExpertAttentionShape& s) : count(static_cast<int>(s.heads / s.groups)) {
    while ((int64_t{1} << (shift - 32)) < count) ++shift;
    magic = ((uint64_t{1} << shift) + count - 1) / count;
  }
  // row / count, for a row that is not negative.
  MICRO_HOST_DEVICE int position(int row) const { return static_cast<int>((row * magic) >> shift); }
};

// Keys at a time: as many as registers and shared memory last for.
template <int kHead>
inline constexpr int kKeyBlock = kHead <= 128 ? 64 : 32;

inline bool all_aligned(std::initializer_list<const void*> tensors) {
  return std::all_of(tensors.begin(), tensors.end(),
                     [](const void* tensor) { return reinterpret_cast<uintptr_t>(tensor) % kCopyBytes == 0; });
}

// Every row of the heads begins at a multiple of 16 bytes.
template <class T>
bool heads_aligned(const void* heads, const HeadStrides& strides) {
  constexpr int64_t kStep = kCopyBytes / sizeof(T);
  for (int64_t stride : {strides.batch, strides.expert, strides.group, strides.key})
    if (stride % kStep != 0) return false;
  return all_aligned({heads});
}

// Calls body.operator()<kHead, kAligned>() with the head size up to what kernels are made for. Single elements are
// moved by one kernel for all sizes.
template <class Body>
auto with_head_size(int64_t head_dim, bool aligned, const Body& body) {
  if (!aligned) return body.template operator()<256, false>();
  if (head_dim <= 64) return body.template operator()<64, true>();
  if (head_dim <= 128) return body.template operator()<128, true>();
  return body.template operator()<256, true>();
}

// ---- the share of the tensor cores' work that is needed ------------------------------------------------------------

// Elements of scores.
struct TileCount {
  int64_t needed = 0, issued = 0;
  TileCount& operator+=(const TileCount& other) {
    needed += other.needed;
    issued += other.issued;
    return *this;
  }
};

inline int64_t needed_scores(const std::vector<int32_t>& slots, int64_t heads) {
  int64_t sum = 0;
  for (int32_t slot : slots) sum += heads * (slot + 1);
  return sum;
}

// Of the forward and of grad_q for heads of up to 128: queries at these slots, so many heads per group, without a mask.
inline TileCount forward_tiles(const std::vector<int32_t>& slots, int64_t heads) {
  TileCount count{needed_scores(slots, heads), 0};
  const int64_t rows = static_cast<int64_t>(slots.size()) * heads;
  constexpr int64_t kKeys = kKeyBlock<128>;
  for (int64_t first = 0; first < rows; first += kMmaRows) {
    const int64_t last = slots[(std::min(first + kMmaRows, rows) - 1) / heads];
    count.issued += kMmaRows * ((last + kKeys) / kKeys * kKeys);
  }
  return count;
}

// Of grad_k and grad_v: 16 keys of a warp with tiles of queries, from the first query on that sees the block's first
// key.
inline TileCount grad_kv_tiles(const std::vector<int32_t>& slots, int64_t heads, int64_t keys) {
  TileCount count{needed_scores(slots, heads), 0};
  constexpr int64_t kBlock = kWarps * kMmaRows;
  for (int64_t j0 = 0; j0 < keys; j0 += kBlock) {
    const auto begin = std::lower_bound(slots.begin(), slots.end(), j0);
    const int64_t rows = (slots.end() - begin) * heads;
    for (int64_t first = 0; first < rows; first += kGradQueries) {
      const int64_t last = begin[(std::min(first + kGradQueries, rows) - 1) / heads];
      for (int64_t own = j0; own < j0 + kBlock && own <= last; own += kMmaRows) count.issued += kMmaRows * kGradQueries;
    }
  }
  return count;
}

}  // namespace micro_kernels::cuda
