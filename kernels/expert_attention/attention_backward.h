#pragma once
// Backward of one item. Scores are computed again, p = exp(score - logsumexp), and
//   dv = p^T do,  ds = p * (do v^T - delta) * scale,  dk = ds^T q,  dq = ds k,  delta = sum_d do * out.

#include "expert_attention/attention_tiles.h"

namespace micro_kernels::cpu {
namespace {

// Each tensor in the forms that its products want. With exact cells one form serves all.
template <class Mode>
struct BackwardBuffers {
  using Acc = typename Mode::Acc;
  using Cell = typename Mode::Cell;
  Cell *q, *grad_out;                    // [tiles * rows, step_width]: reduced along the head
  Cell *q_pairs, *grad_out_pairs;        // [tiles * rows / kPair, width]: reduced along the rows
  Acc* grad_q;                           // [tiles * rows, width]
  Acc *delta, *logsumexp;                // [tiles * rows]
  Cell *keys, *values;                   // [step_width, kKeyBlock]
  Cell* key_pairs;                       // [kKeyBlock / kPair, width]
  Acc *grad_k, *grad_v;                  // [kKeyBlock, width]
  Acc *scores, *grad_weights;            // [rows, kKeyBlock]
  Cell* weight_pairs;                    // [rows / kPair, kKeyBlock]
  Cell *grad_scores, *grad_score_pairs;  // [rows, kKeyBlock / kPair] and [rows / kPair, kKeyBlock]
  TileBias<Acc> bias;
  int64_t bytes;

  BackwardBuffers(const TileSizes<Mode>& z, char* scratch) {
    constexpr bool one_form = Mode::kPair == 1;
    Arena arena{scratch};
    const int64_t rows = z.tiles * z.rows;
    q = arena.take<Cell>(rows * z.step_width);
    grad_out = arena.take<Cell>(rows * z.step_width);
    q_pairs = one_form ? q : arena.take<Cell>(rows / Mode::kPair * z.width);
    grad_out_pairs = one_form ? grad_out : arena.take<Cell>(rows / Mode::kPair * z.width);
    grad_q = arena.take<Acc>(rows * z.width);
    delta = arena.take<Acc>(rows);
    logsumexp = arena.take<Acc>(rows);
    keys = arena.take<Cell>(z.step_width * kKeyBlock);
    values = arena.take<Cell>(z.step_width * kKeyBlock);
    key_pairs = arena.take<Cell>(kKeyBlock / Mode::kPair * z.width);
    grad_k = arena.take<Acc>(kKeyBlock * z.width);
    grad_v = arena.take<Acc>(kKeyBlock * z.width);
    scores = arena.take<Acc>(z.rows * kKeyBlock);
    grad_weights = arena.take<Acc>(z.rows * kKeyBlock);
    if constexpr (one_form) {  // written over what they were computed from
      weight_pairs = scores;
      grad_scores = grad_score_pairs = grad_weights;
    } else {
      weight_pairs = arena.take<Cell>(z.rows / Mode::kPair * kKeyBlock);
      grad_scores = arena.take<Cell>(z.rows * kKeyBlock / Mode::kPair);
      grad_score_pairs = arena.take<Cell>(z.rows / Mode::kPair * kKeyBlock);
    }
    bias.rows = arena.take<Acc>(z.positions * kKeyBlock);
    bytes = arena.used;
  }
};

// One vector of a row: p and ds.
template <class Acc>
struct WeightGrad {
  Vec<Acc> p, ds;
  WeightGrad(Vec<Acc> score, Vec<Acc> grad_p, const Acc* bias, Acc scale, Acc logsumexp, Acc delta)
      : p(exp<Acc>(biased<Acc>(score * scale, bias) - logsumexp)), ds(p * (grad_p - delta) * scale) {}
};

template <class Mode>
struct BackwardItem {
  using T = typename Mode::T;
  using Acc = typename Mode::Acc;
  using Cell = typename Mode::Cell;
  const ExpertAttentionBackwardParams& p;
  const AttentionItem& item;
  const TileSizes<Mode> z;
  const BackwardBuffers<Mode> buffer;
  const Visibility<Acc> sees;

  BackwardItem(const ExpertAttentionBackwardParams& params, const AttentionItem& i, char* scratch)
      : p(params), item(i), z(params.shape, i.end - i.begin), buffer(z, scratch), sees{params.shape, i.b} {}

  const T* query_row(const void* tensor, int64_t n, int64_t h) const {
    return static_cast<const T*>(tensor) + query_at(p.shape, n, item.g) + h * p.shape.head_dim;
  }

  // Rows of a tile start at a multiple of z.rows: the pairs of two tiles never mix.
  void load_tile(int64_t first, int64_t begin, int64_t end) const {
    constexpr int64_t kMostRows = Mode::kPair;
    const int64_t rows = (end - begin) * z.heads, head_dim = p.shape.head_dim;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = begin + r / z.heads, h = r % z.heads;
      pack_row<Mode>(buffer.q + (first + r) * z.step_width, query_row(p.q, n, h), head_dim, z.step_width);
      pack_row<Mode>(buffer.grad_out + (first + r) * z.step_width, query_row(p.grad_out, n, h), head_dim, z.step_width);
      load_statistics(first + r, n, h);
    }
    if constexpr (Mode::kPair > 1) {
      for (int64_t r = 0; r < rows; r += Mode::kPair) {
        const T *q[kMostRows], *grad_out[kMostRows];
        for (int64_t i = 0; i < Mode::kPair; ++i) {
          const int64_t n = begin + (r + i) / z.heads, h = (r + i) % z.heads;
          q[i] = r + i < rows ? query_row(p.q, n, h) : nullptr;
          grad_out[i] = r + i < rows ? query_row(p.grad_out, n, h) : nullptr;
        }
        const int64_t at = (first + r) / Mode::kPair * z.width;
        pack_rows<Mode>(buffer.q_pairs + at, z.width, q, Mode::kPair, head_dim);
        pack_rows<Mode>(buffer.grad_out_pairs + at, z.width, grad_out, Mode::kPair, head_dim);
      }
    }
    for (int64_t i = first * z.width; i < (first + z.rows) * z.width; ++i) buffer.grad_q[i] = 0;
  }

  void load_statistics(int64_t r, int64_t n, int64_t h) const {
    const T *out = query_row(p.out, n, h), *grad_out = query_row(p.grad_out, n, h);
    Vec<Acc> sum{};
    for (int64_t d = 0; d < p.shape.head_dim; d += kLanes<Acc>)
      sum = fma(load_wide(out + d, p.shape.head_dim - d), load_wide(grad_out + d, p.shape.head_dim - d), sum);
    buffer.delta[r] = sum_lanes<Acc>(sum);
    const int64_t at = query_at(p.shape, n, item.g) / p.shape.head_dim + h;
    const Acc logsumexp = static_cast<const Acc*>(p.logsumexp)[at];
    buffer.logsumexp[r] = logsumexp == kHidden<Acc> ? -kHidden<Acc> : logsumexp;  // nothing seen: all weights 0
  }

  WeightGrad<Acc> weight_grad(int64_t r, int64_t j, const Acc* bias, int64_t first) const {
    const int64_t at = r * kKeyBlock + j;
    return {load(buffer.scores + at),        load(buffer.grad_weights + at), bias ? bias + j : nullptr,
            static_cast<Acc>(p.shape.scale), buffer.logsumexp[first + r],    buffer.delta[first + r]};
  }

  // Scores and grad_weights of the tile to weights and grad_scores, in the forms that the products read.
  void differentiate(const KeyBlock<T>& block, int64_t first, int64_t begin, int64_t end) const {
    const int64_t rows = (end - begin) * z.heads;
    const Acc* of_position[kMostTilePositions];
    for (int64_t n = begin; n < end; ++n)
      of_position[n - begin] = buffer.bias.at(sees, n - begin, n, block.first, block.has_hidden);
    for (int64_t r = 0; r < rows; r += Mode::kPair) {
      const Acc* bias[Mode::kPair] = {};
      for (int64_t i = 0; i < Mode::kPair && r + i < rows; ++i) bias[i] = of_position[(r + i) / z.heads];
      if constexpr (Mode::kPair == 1) {
        for (int64_t j = 0; j < kKeyBlock; j += kLanes<Acc>) {
          const WeightGrad<Acc> w = weight_grad(r, j, bias[0], first);
          store(buffer.weight_pairs + r * kKeyBlock + j, w.p);
          store(buffer.grad_scores + r * kKeyBlock + j, w.ds);
        }
      } else {
        for (int64_t j = 0; j < kKeyBlock; j += kLanes<Acc>) differentiate_pair(r, j, rows, bias, first);
      }
    }
  }

  void differentiate_pair(int64_t r, int64_t j, int64_t rows, const Acc* const* bias, int64_t first) const {
    Vec<Cell> weights{}, grads{};
    for (int i = 0; i < Mode::kPair && r + i < rows; ++i) {
      const WeightGrad<Acc> w = weight_grad(r + i, j, bias[i], first);
      const Vec<Cell> grad = bfloat16_bits(w.ds);
      weights |= bfloat16_bits(w.p) << (16 * i);
      grads |= grad << (16 * i);
      const HalfVec half = __builtin_convertvector(grad, HalfVec);
      __builtin_memcpy(reinterpret_cast<uint16_t*>(buffer.grad_scores) + (r + i) * kKeyBlock + j, &half, sizeof(half));
    }
    const int64_t at = r / Mode::kPair * kKeyBlock + j;
    store(buffer.weight_pairs + at, weights);
    store(buffer.grad_score_pairs + at, grads);
  }

  void visit(const KeyBlock<T>& block, int64_t tile, int64_t begin, int64_t end) const {
    const int64_t first = tile * z.rows, rows = (end - begin) * z.heads;
    const int64_t row_steps = round_up(rows, Mode::kPair) / Mode::kPair;
    const int64_t key_steps = round_up(block.count, Mode::kPair) / Mode::kPair;
    const int64_t at = first * z.step_width, pairs_at = first / Mode::kPair * z.width;
    product<Mode>(
        {buffer.q + at, z.step_width, 1, buffer.keys, kKeyBlock, buffer.scores, kKeyBlock, z.steps, false, nullptr},
        rows, kKeyBlock);
    product<Mode>({buffer.grad_out + at, z.step_width, 1, buffer.values, kKeyBlock, buffer.grad_weights, kKeyBlock,
                   z.steps, false, nullptr},
                  rows, kKeyBlock);
    differentiate(block, first, begin, end);
    if (p.grad_v)
      product<Mode>({buffer.weight_pairs, 1, kKeyBlock, buffer.grad_out_pairs + pairs_at, z.width, buffer.grad_v,
                     z.width, row_steps, true, nullptr},
                    block.count, z.width);
    if (p.grad_k)
      product<Mode>({buffer.grad_score_pairs, 1, kKeyBlock, buffer.q_pairs + pairs_at, z.width, buffer.grad_k, z.width,
                     row_steps, true, nullptr},
                    block.count, z.width);
    if (p.grad_q)
      product<Mode>({buffer.grad_scores, kKeyBlock / Mode::kPair, 1, buffer.key_pairs, z.width,
                     buffer.grad_q + first * z.width, z.width, key_steps, true, nullptr},
                    rows, z.width);
  }

  void store_row(T* to, const Acc* from) const {
    for (int64_t d = 0; d < p.shape.head_dim; d += kLanes<Acc>)
      store_narrow(to + d, load(from + d), p.shape.head_dim - d);
  }

  // Rows [j0, j0 + count) of a key or value gradient; from null: zeros.
  void store_keys(void* grad, const HeadStrides& strides, const Acc* from, int64_t j0, int64_t count) const {
    if (!grad) return;
    T* to = const_cast<T*>(head_rows<T>(grad, strides, item));
    for (int64_t j = 0; j < count; ++j) {
      T* row = to + (j0 + j) * strides.key;
      if (from) {
        store_row(row, from + j * z.width);
      } else {
        for (int64_t d = 0; d < p.shape.head_dim; ++d) row[d] = 0;
      }
    }
  }

  void store_queries() const {
    if (!p.grad_q) return;
    const int64_t positions = item.end - item.begin;
    for (int64_t i = 0; i < positions; ++i)
      for (int64_t h = 0; h < z.heads; ++h)
        store_row(const_cast<T*>(query_row(p.grad_q, item.begin + i, h)),
                  buffer.grad_q + ((i / z.positions) * z.rows + (i % z.positions) * z.heads + h) * z.width);
  }

  template <class Body>
  void each_tile(const Body& body) const {
    for (int64_t tile = 0; tile < z.tiles; ++tile) {
      const int64_t begin = item.begin + tile * z.positions;
      body(tile, begin, begin + z.positions < item.end ? begin + z.positions : item.end);
    }
  }

  void visit_block(const KeyBlock<T>& block) const {
    pack_columns<Mode>(buffer.keys, kKeyBlock, block.keys, kKeyBlock, p.shape.head_dim);
    pack_columns<Mode>(buffer.values, kKeyBlock, block.values, kKeyBlock, p.shape.head_dim);
    if (p.grad_q) pack_rows<Mode>(buffer.key_pairs, z.width, block.keys, block.count, p.shape.head_dim);
    for (int64_t i = 0; i < kKeyBlock * z.width; ++i) buffer.grad_k[i] = buffer.grad_v[i] = 0;
    each_tile([&](int64_t tile, int64_t begin, int64_t end) {
      if (sees.largest_limit(begin, end) > block.first) visit(block, tile, begin, end);
    });
  }

  void run() const {
    each_tile([&](int64_t tile, int64_t begin, int64_t end) { load_tile(tile * z.rows, begin, end); });
    const T* k = head_rows<T>(p.k, p.k_strides, item);
    const T* v = head_rows<T>(p.v, p.v_strides, item);
    const int64_t limit = sees.largest_limit(item.begin, item.end);
    for (int64_t j0 = 0; j0 < limit; j0 += kKeyBlock) {
      const KeyBlock<T> block(sees, k, p.k_strides.key, v, p.v_strides.key, j0, limit);
      if (!block.empty) visit_block(block);
      store_keys(p.grad_k, p.grad_k_strides, block.empty ? nullptr : buffer.grad_k, j0, block.count);
      store_keys(p.grad_v, p.grad_v_strides, block.empty ? nullptr : buffer.grad_v, j0, block.count);
    }
    store_keys(p.grad_k, p.grad_k_strides, nullptr, limit, p.shape.keys - limit);
    store_keys(p.grad_v, p.grad_v_strides, nullptr, limit, p.shape.keys - limit);
    store_queries();
  }
};

template <class Mode>
int64_t backward_scratch(const ExpertAttentionShape& shape, int64_t positions) {
  return BackwardBuffers<Mode>(TileSizes<Mode>(shape, positions), nullptr).bytes;
}

template <class Mode>
void backward_item(const ExpertAttentionBackwardParams& p, const AttentionItem& item, char* scratch) {
  BackwardItem<Mode>(p, item, scratch).run();
}

}  // namespace
}  // namespace micro_kernels::cpu
