#pragma once
// What forward and backward share: what a query may see, and the tiles of an item. Included by the per-ISA files only.
//
// An item is walked key block by key block, and inside a block tile by tile. A tile is a few query positions times the
// heads of one group: its rows ascend by slot, so that it stops at its own last key. Key blocks start at multiples of
// kKeyBlock, whatever the call, the batch or the cache is: a query meets the same sums in the same order always
// (performance.md 9.9).

#include "common/cpu/tiles.h"
#include "expert_attention/attention_items.h"

namespace micro_kernels::cpu {
namespace {

constexpr int64_t kKeyBlock = 64;

template <class Acc>
constexpr Acc kHidden = -static_cast<Acc>(__builtin_inf());

// Hands out pieces of one allocation. With a null base it only measures.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * int64_t{sizeof(T)}, 64);
    return piece;
  }
};

// Sizes of an item's buffers.
template <class Mode>
struct TileSizes {
  int64_t heads;      // per group: rows of one position
  int64_t positions;  // per tile
  int64_t tiles;
  int64_t rows;        // of a tile, a multiple of kPair
  int64_t steps;       // reduction over the head
  int64_t step_width;  // the same, up to a whole number of vectors
  int64_t width;       // head size up to a whole number of vectors
  TileSizes(const ExpertAttentionShape& s, int64_t item_positions)
      : heads(s.heads / s.groups),
        positions(item_positions < tile_positions(heads) ? item_positions : tile_positions(heads)),
        tiles(item_positions == 0 ? 0 : (item_positions + positions - 1) / positions),
        rows(round_up(positions * heads, Mode::kPair)),
        steps(s.head_dim / Mode::kPair),
        step_width(round_up(steps, kLanes<typename Mode::Cell>)),
        width(round_up(s.head_dim, kLanes<typename Mode::Acc>)) {}
};

// What the queries of one item may see.
template <class Acc>
struct Visibility {
  const ExpertAttentionShape& shape;
  int64_t b;

  bool pairwise() const { return shape.mask_kind == AttentionMask::kPairs || shape.mask_kind == AttentionMask::kBias; }
  const uint8_t* key_mask() const {
    return shape.mask_kind == AttentionMask::kKeys ? static_cast<const uint8_t*>(shape.mask) + b * shape.keys : nullptr;
  }
  // The slots that the query of plan row n can see lie below this.
  int64_t limit(int64_t n) const {
    if (pairwise()) return shape.keys;
    const int64_t own = own_slot(shape, n);
    const uint8_t* real = key_mask();
    return real && !real[own] ? 0 : own + 1;
  }
  int64_t largest_limit(int64_t begin, int64_t end) const {
    int64_t largest = 0;
    for (int64_t n = begin; n < end; ++n) largest = limit(n) > largest ? limit(n) : largest;
    return largest;
  }
  // Row n of the scores in block j0 is complete as it is.
  bool sees_all(int64_t n, int64_t j0, bool block_has_hidden) const {
    return !pairwise() && !block_has_hidden && limit(n) >= j0 + kKeyBlock;
  }
  // What to add to the scores of plan row n in block j0; kHidden hides, whatever the score is.
  void fill_bias(int64_t n, int64_t j0, Acc* bias) const {
    const int64_t end = limit(n) - j0 < kKeyBlock ? limit(n) - j0 : kKeyBlock;
    for (int64_t j = 0; j < kKeyBlock; ++j) bias[j] = j < end ? Acc(0) : kHidden<Acc>;
    if (shape.mask_kind == AttentionMask::kKeys) {
      hide_false(key_mask() + j0, end, bias);
    } else if (pairwise()) {
      const int64_t row = (shape.masks > 1 ? b * shape.slots : 0) + shape.tokens[n] % shape.slots;
      const int64_t at = row * shape.keys + j0;
      if (shape.mask_kind == AttentionMask::kPairs) {
        hide_false(static_cast<const uint8_t*>(shape.mask) + at, end, bias);
      } else {
        for (int64_t j = 0; j < end; ++j) bias[j] = static_cast<const Acc*>(shape.mask)[at + j];
      }
    }
  }

 private:
  static void hide_false(const uint8_t* mask, int64_t count, Acc* bias) {
    for (int64_t j = 0; j < count; ++j) bias[j] = mask[j] ? Acc(0) : kHidden<Acc>;
  }
};

// One block of keys and values as row pointers. Slots that no query of the item can see are null and are never read:
// what stands in an unwritten or padded slot, were it NaN, reaches no result.
template <class T>
struct KeyBlock {
  const T* keys[kKeyBlock];
  const T* values[kKeyBlock];
  int64_t first;    // slot
  int64_t count;    // slots of the block below the item's limit
  bool has_hidden;  // a slot below the limit is not real
  bool empty;       // no slot is real

  // Every slot of it can be read.
  bool whole() const { return count == kKeyBlock && !has_hidden; }

  template <class Acc>
  KeyBlock(const Visibility<Acc>& sees, const T* k, int64_t k_step, const T* v, int64_t v_step, int64_t j0,
           int64_t limit)
      : first(j0), count(limit - j0 < kKeyBlock ? limit - j0 : kKeyBlock), has_hidden(false), empty(true) {
    const uint8_t* real = sees.key_mask();
    for (int64_t j = 0; j < kKeyBlock; ++j) {
      const bool there = j < count && (!real || real[j0 + j]);
      keys[j] = there ? k + (j0 + j) * k_step : nullptr;
      values[j] = there ? v + (j0 + j) * v_step : nullptr;
      has_hidden |= j < count && !there;
      empty &= !there;
    }
  }
};

// Biases of a tile's positions in one block, made where they are needed.
template <class Acc>
struct TileBias {
  Acc* rows;  // [positions, kKeyBlock]
  // Of position i, which is plan row n; nullptr: nothing to add.
  const Acc* at(const Visibility<Acc>& sees, int64_t i, int64_t n, int64_t j0, bool block_has_hidden) const {
    if (sees.sees_all(n, j0, block_has_hidden)) return nullptr;
    sees.fill_bias(n, j0, rows + i * kKeyBlock);
    return rows + i * kKeyBlock;
  }
};

template <class Acc>
inline Vec<Acc> biased(Vec<Acc> score, const Acc* bias) {
  if (!bias) return score;
  const Vec<Acc> b = load(bias);
  return b == kHidden<Acc> ? b : score + b;
}

template <class T>
inline const T* head_rows(const void* base, const HeadStrides& s, const AttentionItem& item) {
  return static_cast<const T*>(base) + item.b * s.batch + item.e * s.expert + item.g * s.group;
}

// Heads of group g of plan row n in a tensor [N, A, D].
inline int64_t query_at(const ExpertAttentionShape& s, int64_t n, int64_t g) {
  return (n * s.heads + g * (s.heads / s.groups)) * s.head_dim;
}

}  // namespace
}  // namespace micro_kernels::cpu
