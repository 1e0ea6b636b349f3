#pragma once
// Which operands of a group can be moved in chunks of 16 bytes.

#include "expert_linear/linear_layout.h"
#include "micro_kernels/expert_linear.h"

namespace micro_kernels::cuda {

// Elements: widths, strides, offsets.
template <class T, class... Sizes>
bool in_chunks(Sizes... sizes) {
  return ((sizes % kChunk<T> == 0) && ...);
}

template <class... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <class T>
bool fast_factors(const LinearGroup& g) {
  return aligned(g.x.data, g.gain, g.weight, g.up) &&
         in_chunks<T>(g.in, g.x.stride, g.x_expert_stride, g.gain_expert_stride, g.weight_expert_stride);
}
// Heads that turn lie whole in a tile of outputs, and their halves in whole chunks.
template <class T, int kRows>
bool can_rotate(const LinearGroup& g) {
  return g.head_dim > 0 && kTileColumns<T, kRows> % g.head_dim == 0 && g.head_dim % (2 * kChunk<T>) == 0 &&
         g.out % g.head_dim == 0 && !g.up;
}

// Tiles of few rows: where all groups have few, and no head is wider than the tile.
template <class Group>
bool takes_few_rows(const Group& g) {
  return takes_few_rows(g.rows, g.experts, g.offsets != nullptr);
}
template <class T>
bool fits_few_rows(const LinearGradXGroup& g) {
  return takes_few_rows(g);
}
template <class T>
bool fits_few_rows(const LinearGroup& g) {
  return takes_few_rows(g) && (!g.cos || can_rotate<T, kFewRows>(g));
}

// By which row numbers turn into positions.
template <class Group>
uint32_t positions(const Group&) {
  return 1;
}
inline uint32_t positions(const LinearGroup& g) { return g.positions > 0 ? static_cast<uint32_t>(g.positions) : 1; }

template <class T>
bool fast_result(const LinearGroup& g) {
  return aligned(g.y.data, g.residual.data) &&
         in_chunks<T>(g.out, g.y.stride, g.y_expert_stride, g.y_head_stride, g.residual.stride) &&
         (!g.y_head_stride || in_chunks<T>(g.head_dim));
}

template <class T>
bool fast_factors(const LinearGradXGroup& g) {
  bool fast = in_chunks<T>(g.in);
  for (int64_t s = 0; s < g.source_count; ++s) {
    const LinearGradXSource& source = g.sources[s];
    fast = fast && aligned(source.grad_y.data, source.weight) &&
           in_chunks<T>(source.grad_y.stride, source.grad_y_expert_stride, source.out, source.weight_expert_stride);
  }
  return fast;
}
template <class T>
bool fast_result(const LinearGradXGroup& g) {
  return aligned(g.grad_x.data, g.gate, g.up, g.grad_gate, g.grad_up, g.activation) &&
         in_chunks<T>(g.in, g.grad_x.stride, g.grad_x_expert_stride);
}

template <class T>
bool fast_factors(const LinearGradWeightGroup& g) {
  return aligned(g.grad_y.data, g.x.data) && in_chunks<T>(g.grad_y.stride, g.grad_y_expert_stride, g.out) &&
         in_chunks<T>(g.x.stride, g.x_expert_stride, g.in);
}
template <class T>
bool fast_result(const LinearGradWeightGroup& g) {
  return aligned(g.grad_weight) && in_chunks<T>(g.in);
}

}  // namespace micro_kernels::cuda
