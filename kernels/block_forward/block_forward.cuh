#pragma once
// Device code of what lies between a layer's products: statistics, the decision, rows that are turned or added. One
// warp per row; sums have one order, whatever the number of rows. The second number of the launch bounds keeps the
// compiler from trading a few spills for more blocks.

#include "common/cuda/arch/trap.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/rows.cuh"
#include "micro_kernels/block_forward.h"
#include "route/route.cuh"

namespace micro_kernels::cuda {

__device__ __forceinline__ int64_t warp_row() { return int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarp; }
__device__ __forceinline__ int warp_lane() { return static_cast<int>(threadIdx.x) % kWarp; }

// Calls body(h) for every N-th column of a row, the lanes of a warp side by side.
template <int N, class Body>
__device__ __forceinline__ void each_column(int64_t width, Body body) {
  for (int64_t h = int64_t{warp_lane()} * N; h < width; h += kWarp * N) body(h);
}

// N neighbours in the type of sums, by as few loads as there can be.
template <int N, class T>
__device__ __forceinline__ void load_wide(const T* from, accumulator_t<T> (&values)[N]) {
  constexpr int kPart = N < kVector<T> ? N : kVector<T>;
#pragma unroll
  for (int i = 0; i < N; i += kPart) {
    const Vec<T, kPart> part = load_vec<kPart>(from + i);
#pragma unroll
    for (int j = 0; j < kPart; ++j) values[i + j] = static_cast<accumulator_t<T>>(part[j]);
  }
}

// Of one row, the same in all lanes.
template <class T, int N>
__device__ __forceinline__ accumulator_t<T> inverse_rms_of(const T* row, int64_t width, double eps) {
  using Acc = accumulator_t<T>;
  Acc sum = 0;
  each_column<N>(width, [&](int64_t h) {
    Acc x[N];
    load_wide<N>(row + h, x);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += x[i] * x[i];
  });
  return Acc(1) / sqrt(warp_sum(sum) / static_cast<Acc>(width) + static_cast<Acc>(eps));
}

template <class T>
__device__ __forceinline__ T normed(accumulator_t<T> x, accumulator_t<T> scale, accumulator_t<T> gain,
                                    GainRounding rounding) {
  accumulator_t<T> value = x * scale;
  if (rounding == GainRounding::kBeforeGain) value = static_cast<accumulator_t<T>>(T(value));
  return T(value * gain);
}

// ---- one token: statistic, places, decision ------------------------------------------------------------------------

// Where the keys and values of a token go: rows of `unit` elements, as the grouped product counts them.
struct KeyPlaces {
  int32_t* keys;  // [T]; nullptr: not asked for
  int32_t* values;
  HeadStrides key_strides, value_strides;
  int64_t key_unit, value_unit;
  int64_t slots, start;
  const int32_t* starts;
};

__device__ inline int64_t slot_of(int64_t token, int64_t slots, int64_t start, const int32_t* starts, int64_t& batch) {
  batch = static_cast<uint32_t>(token) / static_cast<uint32_t>(slots);
  return (starts ? load(starts + batch) : start) + token - batch * slots;
}

__device__ inline void place_token(const KeyPlaces& p, int64_t token) {
  int64_t batch;
  const int64_t slot = slot_of(token, p.slots, p.start, p.starts, batch);
  const auto in_units = [](int64_t elements, int64_t unit) {
    return static_cast<int32_t>(static_cast<uint64_t>(elements) / static_cast<uint64_t>(unit));
  };
  store(p.keys + token, in_units(batch * p.key_strides.batch + slot * p.key_strides.key, p.key_unit));
  store(p.values + token, in_units(batch * p.value_strides.batch + slot * p.value_strides.key, p.value_unit));
}

struct TokenStep {
  const void* x;      // [T, H], for inverse_rms
  void* inverse_rms;  // [T], accumulator type; nullptr: not asked for
  int64_t tokens, hidden;
  double eps;
  KeyPlaces places;
  int32_t* everyone;  // [T], 0, 1, ...; with whole [2], 0 and T; nullptr: not asked for
  int32_t* whole;
  void* ones;  // [H]; nullptr: not asked for
  // The decision: logits = router_input router_out^T into route.logits, and what follows from them.
  bool decides;
  const void* router_input;  // [T, router_width], nullptr: the logits are not asked for
  const void* router_out;    // [E, router_width], the type of the logits
  void* logits;
  int64_t router_width;
  RouteParams route;
};

// Experts that share the reading of a token's row; a double takes two registers.
template <class Acc>
inline constexpr int kLogitsAtOnce = sizeof(Acc) == 8 ? 2 : 4;

template <class T, class Logit, int N>
__device__ __forceinline__ void make_logits(const TokenStep& p, int64_t token) {
  using Acc = accumulator_t<T>;
  constexpr int kMost = kLogitsAtOnce<Acc>;
  const T* x = static_cast<const T*>(p.router_input) + token * p.router_width;
  Logit* logits = static_cast<Logit*>(p.logits) + token * p.route.experts;
  for (int64_t first = 0; first < p.route.experts; first += kMost) {
    const Logit* weight = static_cast<const Logit*>(p.router_out) + first * p.router_width;
    Acc sums[kMost] = {};
    each_column<N>(p.router_width, [&](int64_t h) {
      Acc values[N];
      load_wide<N>(x + h, values);
#pragma unroll
      for (int e = 0; e < kMost; ++e) {
        if (first + e >= p.route.experts) continue;
        Acc weights[N];
        load_wide<N>(weight + e * p.router_width + h, weights);
#pragma unroll
        for (int i = 0; i < N; ++i) sums[e] += values[i] * weights[i];
      }
    });
#pragma unroll
    for (int e = 0; e < kMost; ++e) {
      const Acc sum = warp_sum(sums[e]);
      if (warp_lane() == 0 && first + e < p.route.experts) store(logits + first + e, Logit(sum));
    }
  }
}

template <class T, class Logit, int N, int kWidth>
__global__ void __launch_bounds__(kRowThreads, 2) block_token_kernel(TokenStep p) {
  using Acc = accumulator_t<T>;
  const int64_t token = warp_row();
  const int lane = warp_lane();
  if (token >= p.tokens) return;
  if (p.inverse_rms) {
    const Acc scale = inverse_rms_of<T, N>(static_cast<const T*>(p.x) + token * p.hidden, p.hidden, p.eps);
    if (lane == 0) store(static_cast<Acc*>(p.inverse_rms) + token, scale);
  }
  if (p.ones && token == 0)
    for (int64_t h = lane; h < p.hidden; h += kWarp) store(static_cast<T*>(p.ones) + h, T(Acc(1)));
  if (p.router_input) make_logits<T, Logit, N>(p, token);
  if (lane != 0) return;
  if (p.places.keys) place_token(p.places, token);
  if (p.everyone) store(p.everyone + token, static_cast<int32_t>(token));
  if (p.everyone && token == 0) {
    store(p.whole, 0);
    store(p.whole + 1, static_cast<int32_t>(p.tokens));
  }
  if (p.decides) route_token<T, kWidth, Logit>(p.route, token);
}

// ---- queries, keys and values that the product could not put where they belong -------------------------------------

// Heads of a row, one behind the other, that are normed (gain != nullptr), turned (turns), and stored at `to`, heads
// `head_stride` apart.
struct TurnRows {
  const void* from;  // [rows, heads, D]; nullptr: no rows
  void* to;
  const void* gain;  // [experts, heads * D], or nullptr
  int64_t rows, heads;
  bool turns;
};

struct TurnStep {
  TurnRows queries, keys, values;  // rows of the plan; rows [key experts, T] twice
  const int32_t* query_tokens;     // [N]
  const int32_t* query_experts;    // [N], or nullptr: 0
  HeadStrides key_strides, value_strides;
  int64_t tokens, slots, start;
  const int32_t* starts;
  const bool* real;  // with starts: what is not real keeps nothing
  const void* cos;
  const void* sin;
  const int32_t* position;
  int64_t positions, head_dim;
  double eps;
  GainRounding rounding;
  bool backwards;  // by the opposite angle
};

Status start_turn(const TurnStep& step, DType dtype, void* stream);  // block_forward.cu

template <class T, int N>
__device__ __forceinline__ void turn_pairs(const TurnStep& p, int64_t at, accumulator_t<T> (&a)[N],
                                           accumulator_t<T> (&b)[N]) {
  using Acc = accumulator_t<T>;
  Acc cos[N], sin[N];
  load_wide<N>(static_cast<const Acc*>(p.cos) + at, cos);
  load_wide<N>(static_cast<const Acc*>(p.sin) + at, sin);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const Acc x = a[i], y = b[i], turn = p.backwards ? -sin[i] : sin[i];
    a[i] = x * cos[i] - y * turn;
    b[i] = y * cos[i] + x * turn;
  }
}

template <class T, int N>
__device__ __forceinline__ void turn_row(const TurnStep& p, const TurnRows& rows, int64_t row, T* to,
                                         int64_t head_stride, int64_t expert, int64_t token) {
  using Acc = accumulator_t<T>;
  const int64_t width = rows.heads * p.head_dim, half = p.head_dim / 2;
  const T* from = static_cast<const T*>(rows.from) + row * width;
  const T* gain = rows.gain ? static_cast<const T*>(rows.gain) + expert * width : nullptr;
  const Acc scale = gain ? inverse_rms_of<T, N>(from, width, p.eps) : Acc(1);
  const int64_t position = p.position ? load(p.position + token) : token;
  require(!rows.turns || (position >= 0 && position < p.positions));
  const auto read = [&](int64_t at, Acc(&values)[N]) {
    load_wide<N>(from + at, values);
    if (!gain) return;
    Acc gains[N];
    load_wide<N>(gain + at, gains);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = static_cast<Acc>(normed<T>(values[i], scale, gains[i], p.rounding));
  };
  each_column<N>(width / 2, [&](int64_t pair) {
    const int64_t head = static_cast<uint32_t>(pair) / static_cast<uint32_t>(half), c = pair - head * half;
    Acc a[N], b[N];
    read(head * p.head_dim + c, a);
    read(head * p.head_dim + c + half, b);
    if (rows.turns) turn_pairs<T, N>(p, position * half + c, a, b);
    Vec<T, N> first, second;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      first[i] = T(a[i]);
      second[i] = T(b[i]);
    }
    store_vec<N>(to + head * head_stride + c, first);
    store_vec<N>(to + head * head_stride + c + half, second);
  });
}

template <class T, int N>
__device__ __forceinline__ void turn_key(const TurnStep& p, const TurnRows& rows, int64_t row,
                                         const HeadStrides& strides) {
  const int64_t expert = static_cast<uint32_t>(row) / static_cast<uint32_t>(p.tokens), token = row - expert * p.tokens;
  if (p.starts && p.real && !load(p.real + token)) return;
  int64_t batch;
  const int64_t slot = slot_of(token, p.slots, p.start, p.starts, batch);
  T* to = static_cast<T*>(rows.to) + batch * strides.batch + expert * strides.expert + slot * strides.key;
  turn_row<T, N>(p, rows, row, to, strides.group, expert, token);
}

template <class T, int N>
__global__ void __launch_bounds__(kRowThreads, 2) block_turn_kernel(TurnStep p) {
  int64_t row = warp_row();
  if (row < p.queries.rows) {
    const int64_t expert = p.query_experts ? load(p.query_experts + row) : 0;
    T* to = static_cast<T*>(p.queries.to) + row * p.queries.heads * p.head_dim;
    turn_row<T, N>(p, p.queries, row, to, p.head_dim, expert, load(p.query_tokens + row));
    return;
  }
  row -= p.queries.rows;
  if (row < p.keys.rows) return turn_key<T, N>(p, p.keys, row, p.key_strides);
  row -= p.keys.rows;
  if (row < p.values.rows) turn_key<T, N>(p, p.values, row, p.value_strides);
}

// ---- a residual, a norm in front of it, a weight behind it ---------------------------------------------------------

// y[o] = (a[i] + norm(b[n])) * scale[o], each step rounded: i = a_index[n] or n, o = y_index[n] or n, expert[n] or 0.
struct JoinStep {
  const void* a;
  const int32_t* a_index;
  const void* b;     // [rows, H]
  const void* gain;  // [., H]; nullptr: no norm
  const int32_t* expert;
  const void* scale;  // nullptr: none
  void* y;
  const int32_t* y_index;
  const int32_t* active;  // rows from here on are idle: 0; nullptr: none is
  int64_t rows, hidden;
  double eps;
  GainRounding rounding;
};

template <class T, int N>
__device__ __forceinline__ void join_columns(const JoinStep& p, int64_t row, const T* a, const T* b, T* y,
                                             accumulator_t<T> weight) {
  using Acc = accumulator_t<T>;
  const T* gain = nullptr;
  if (p.gain) gain = static_cast<const T*>(p.gain) + (p.expert ? load(p.expert + row) : 0) * p.hidden;
  const Acc inverse = gain ? inverse_rms_of<T, N>(b, p.hidden, p.eps) : Acc(1);
  each_column<N>(p.hidden, [&](int64_t h) {
    Acc left[N], right[N], gains[N];
    load_wide<N>(a + h, left);
    load_wide<N>(b + h, right);
    if (gain) load_wide<N>(gain + h, gains);
    Vec<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Acc term = gain ? static_cast<Acc>(normed<T>(right[i], inverse, gains[i], p.rounding)) : right[i];
      result[i] = T(left[i] + term);
      // + 0: the sum over a token's experts begins with it.
      if (p.scale) result[i] = T(static_cast<Acc>(result[i]) * weight + Acc(0));
    }
    store_vec<N>(y + h, result);
  });
}

template <class T, int N>
__global__ void __launch_bounds__(kRowThreads, 2) block_join_kernel(JoinStep p) {
  using Acc = accumulator_t<T>;
  const int64_t row = warp_row();
  if (row >= p.rows) return;
  const int64_t to = p.y_index ? load(p.y_index + row) : row;
  T* y = static_cast<T*>(p.y) + to * p.hidden;
  if (p.active && row >= load(p.active)) {
    each_column<N>(p.hidden, [&](int64_t h) { store_vec<N>(y + h, Vec<T, N>{}); });
    return;
  }
  const int64_t from = p.a_index ? load(p.a_index + row) : row;
  const Acc weight = p.scale ? static_cast<Acc>(load(static_cast<const T*>(p.scale) + to)) : Acc(1);
  join_columns<T, N>(p, row, static_cast<const T*>(p.a) + from * p.hidden, static_cast<const T*>(p.b) + row * p.hidden,
                     y, weight);
}

}  // namespace micro_kernels::cuda
