#pragma once
// Forward of one item: softmax with running maximum and sum (Milakov and Gimelshein 2018; Dao et al. 2022).

#include "expert_attention/attention_few_rows.h"

namespace micro_kernels::cpu {
namespace {

template <class Mode>
struct ForwardBuffers {
  using Acc = typename Mode::Acc;
  using Cell = typename Mode::Cell;
  Cell* q;        // [tiles * rows, step_width]
  Cell* keys;     // [step_width, kKeyBlock]
  Cell* values;   // [kKeyBlock / kPair, width]
  Acc* scores;    // [rows, kKeyBlock]
  Cell* weights;  // [rows, kKeyBlock / kPair]
  Acc* out;       // [tiles * rows, width], not yet divided by the sum
  Acc* maximum;   // [tiles * rows]
  Acc* sum;       // [tiles * rows, lanes], to be added up at the end
  Acc* factor;    // [rows]: exp(old maximum - new maximum)
  TileBias<Acc> bias;
  int64_t bytes;

  ForwardBuffers(const TileSizes<Mode>& z, char* scratch) {
    Arena arena{scratch};
    q = arena.take<Cell>(z.tiles * z.rows * z.step_width);
    keys = arena.take<Cell>(z.step_width * kKeyBlock);
    values = arena.take<Cell>(kKeyBlock / Mode::kPair * z.width);
    scores = arena.take<Acc>(z.rows * kKeyBlock);
    weights = arena.take<Cell>(z.rows * kKeyBlock / Mode::kPair);
    out = arena.take<Acc>(z.tiles * z.rows * z.width);
    maximum = arena.take<Acc>(z.tiles * z.rows);
    sum = arena.take<Acc>(z.tiles * z.rows * kLanes<Acc>);
    factor = arena.take<Acc>(z.rows);
    bias.rows = arena.take<Acc>(z.positions * kKeyBlock);
    bytes = arena.used;
  }
};

template <class Mode>
inline void store_weights(typename Mode::Cell* row, int64_t j, Vec<typename Mode::Acc> p) {
  if constexpr (Mode::kPair == 1) {
    store(row + j, p);
  } else {
    store_bfloat16(reinterpret_cast<uint16_t*>(row) + j, p);
  }
}

// Scores of one row and block to exp(score - maximum); returns what earlier blocks must be multiplied with.
template <class Mode>
inline typename Mode::Acc softmax_row(const typename Mode::Acc* scores, const typename Mode::Acc* bias,
                                      typename Mode::Acc scale, typename Mode::Acc* maximum, typename Mode::Acc* sum,
                                      typename Mode::Cell* weights) {
  using Acc = typename Mode::Acc;
  constexpr int lanes = kLanes<Acc>;
  constexpr int vectors = kKeyBlock / lanes;
  Vec<Acc> x[vectors];
  Vec<Acc> top = broadcast(*maximum);
#pragma GCC unroll 4
  for (int i = 0; i < vectors; ++i) {
    x[i] = biased<Acc>(load(scores + i * lanes) * scale, bias ? bias + i * lanes : nullptr);
    top = max<Acc>(top, x[i]);
  }
  const Acc before = *maximum, now = max_lanes<Acc>(top);
  const Acc shift = now == kHidden<Acc> ? Acc(0) : now;  // nothing seen yet: every weight becomes 0
  const Acc factor = before == now ? Acc(1) : exp<Acc>(broadcast(before - shift))[0];
  Vec<Acc> total = load(sum) * factor;
#pragma GCC unroll 4
  for (int i = 0; i < vectors; ++i) {
    const Vec<Acc> p = exp<Acc>(x[i] - shift);
    total += p;
    store_weights<Mode>(weights, i * lanes, p);
  }
  *maximum = now;
  store(sum, total);
  return factor;
}

template <class Mode>
struct ForwardItem {
  using T = typename Mode::T;
  using Acc = typename Mode::Acc;
  using Cell = typename Mode::Cell;
  const ExpertAttentionParams& p;
  const AttentionItem& item;
  const TileSizes<Mode> z;
  const ForwardBuffers<Mode> buffer;
  const Visibility<Acc> sees;

  ForwardItem(const ExpertAttentionParams& params, const AttentionItem& i, char* scratch)
      : p(params), item(i), z(params.shape, i.end - i.begin), buffer(z, scratch), sees{params.shape, i.b} {}

  void load_queries() const {
    const int64_t rows = (item.end - item.begin) * z.heads;
    for (int64_t n = item.begin, r = 0; n < item.end; ++n)
      for (int64_t h = 0; h < z.heads; ++h, ++r)
        pack_row<Mode>(buffer.q + r * z.step_width,
                       static_cast<const T*>(p.q) + query_at(p.shape, n, item.g) + h * p.shape.head_dim,
                       p.shape.head_dim, z.step_width);
    for (int64_t i = 0; i < rows * z.width; ++i) buffer.out[i] = 0;
    for (int64_t i = 0; i < rows * kLanes<Acc>; ++i) buffer.sum[i] = 0;
    for (int64_t i = 0; i < rows; ++i) buffer.maximum[i] = kHidden<Acc>;
  }

  // Scores of a tile to weights, and what its sums so far must be multiplied with.
  void weigh(const KeyBlock<T>& block, int64_t begin, int64_t end) const {
    const int64_t first = (begin - item.begin) * z.heads;
    for (int64_t n = begin, r = 0; n < end; ++n) {
      const Acc* bias = buffer.bias.at(sees, n - begin, n, block.first, block.has_hidden);
      for (int64_t h = 0; h < z.heads; ++h, ++r)
        buffer.factor[r] = softmax_row<Mode>(buffer.scores + r * kKeyBlock, bias, static_cast<Acc>(p.shape.scale),
                                             buffer.maximum + first + r, buffer.sum + (first + r) * kLanes<Acc>,
                                             buffer.weights + r * kKeyBlock / Mode::kPair);
    }
  }

  // Columns behind the last key that any query sees are neither packed nor multiplied: their scores are hidden.
  void visit(const KeyBlock<T>& block, int64_t begin, int64_t end) const {
    const int64_t first = (begin - item.begin) * z.heads, rows = (end - begin) * z.heads;
    product<Mode>({buffer.q + first * z.step_width, z.step_width, 1, buffer.keys, kKeyBlock, buffer.scores, kKeyBlock,
                   z.steps, false, nullptr},
                  rows, round_up(block.count, kLanes<Acc>));
    weigh(block, begin, end);
    product<Mode>({buffer.weights, kKeyBlock / Mode::kPair, 1, buffer.values, z.width, buffer.out + first * z.width,
                   z.width, round_up(block.count, Mode::kPair) / Mode::kPair, true, buffer.factor},
                  rows, z.width);
  }

  void visit_packed(const KeyBlock<T>& block) const {
    pack_columns<Mode>(buffer.keys, kKeyBlock, block.keys, block.count, p.shape.head_dim);
    pack_rows<Mode>(buffer.values, z.width, block.values, block.count, p.shape.head_dim);
    for (int64_t begin = item.begin; begin < item.end; begin += z.positions) {
      const int64_t end = begin + z.positions < item.end ? begin + z.positions : item.end;
      if (sees.largest_limit(begin, end) > block.first) visit(block, begin, end);
    }
  }

  // The whole item is one tile.
  void visit_few(const KeyBlock<T>& block, bool last) const {
    const auto ahead = [last](int64_t step) { return last ? 0 : kKeyBlock * step * int64_t{sizeof(T)}; };
    const FewRows<Mode> few{block, z.steps, z.width, ahead(p.k_strides.key), ahead(p.v_strides.key)};
    const int64_t rows = (item.end - item.begin) * z.heads;
    each_few(rows, [&]<int kRows>(int64_t r) {
      few_scores<Mode, kRows>(few, buffer.q + r * z.step_width, buffer.scores + r * kKeyBlock);
    });
    weigh(block, item.begin, item.end);
    each_few(rows, [&]<int kRows>(int64_t r) {
      few_outputs<Mode, kRows>(few, buffer.weights + r * kKeyBlock / Mode::kPair, buffer.factor + r,
                               buffer.out + r * z.width);
    });
  }

  void finish() const {
    for (int64_t n = item.begin, r = 0; n < item.end; ++n) {
      const int64_t at = query_at(p.shape, n, item.g);
      for (int64_t h = 0; h < z.heads; ++h, ++r) {
        const Acc sum = sum_lanes<Acc>(load(buffer.sum + r * kLanes<Acc>));
        const Acc divisor = sum == 0 ? Acc(1) : sum;  // nothing seen: 0 / 1
        T* out = static_cast<T*>(p.out) + at + h * p.shape.head_dim;
        // + 0: bfloat16 products flush to -0, and only there would a hidden key, which adds 0, show.
        for (int64_t d = 0; d < p.shape.head_dim; d += kLanes<Acc>)
          store_narrow(out + d, load(buffer.out + r * z.width + d) / divisor + Acc(0), p.shape.head_dim - d);
        static_cast<Acc*>(p.logsumexp)[at / p.shape.head_dim + h] =
            sum == 0 ? kHidden<Acc> : buffer.maximum[r] + static_cast<Acc>(__builtin_log(sum));
      }
    }
  }

  void run() const {
    load_queries();
    const T* k = head_rows<T>(p.k, p.k_strides, item);
    const T* v = head_rows<T>(p.v, p.v_strides, item);
    const int64_t limit = sees.largest_limit(item.begin, item.end);
    const bool few = few_rows_fit(z, (item.end - item.begin) * z.heads);
    for (int64_t j0 = 0; j0 < limit; j0 += kKeyBlock) {
      const KeyBlock<T> block(sees, k, p.k_strides.key, v, p.v_strides.key, j0, limit);
      if (block.empty) continue;
      if (few && block.whole())
        visit_few(block, j0 + kKeyBlock >= limit);
      else
        visit_packed(block);
    }
    finish();
  }
};

template <class Mode>
int64_t forward_scratch(const ExpertAttentionShape& shape, int64_t positions) {
  return ForwardBuffers<Mode>(TileSizes<Mode>(shape, positions), nullptr).bytes;
}

template <class Mode>
void forward_item(const ExpertAttentionParams& p, const AttentionItem& item, char* scratch) {
  ForwardItem<Mode>(p, item, scratch).run();
}

}  // namespace
}  // namespace micro_kernels::cpu
