#include "engine/forward.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/ones.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/interventions.h"
#include "engine/trace.h"
#include "micro/rope.h"
#include "micro_kernels/rms_norm.h"
#include "micro_kernels/rope.h"
#include "ops/common.h"

namespace micro::engine {
namespace {

using micro_kernels::BlockForwardParams;
using micro_kernels::BlockShape;
using micro_kernels::DType;
using micro_kernels::GainRounding;
using micro_kernels::LinearPart;

constexpr char kName[] = "Engine";
constexpr int64_t kAlignment = 64;
constexpr int64_t kPositions = 256;
constexpr int64_t kHeadRows = 256;  // whose logits are formed at once
constexpr int64_t kKeyRows = 256;   // keys that are made up at once

DType dtype_of(at::ScalarType type) {
  return type == at::kDouble ? DType::kFloat64 : type == at::kBFloat16 ? DType::kBFloat16 : DType::kFloat32;
}

micro_kernels::WeightRule kernel_rule(WeightRule rule) {
  switch (rule) {
    case WeightRule::kProbability:
      return micro_kernels::WeightRule::kProbability;
    case WeightRule::kStraightThrough:
      return micro_kernels::WeightRule::kStraightThrough;
    case WeightRule::kRenormalized:
      break;
  }
  return micro_kernels::WeightRule::kRenormalized;
}

BlockShape block_shape(const ModelConfig& c, Numerics numerics, at::ScalarType dtype) {
  const bool olmo = c.backbone == Backbone::kOlmo2;
  return {.hidden = c.hidden_size,
          .heads = c.num_attention_heads,
          .groups = c.num_key_value_heads,
          .head_dim = c.head_dim,
          .inner = c.intermediate_size,
          .experts = c.num_experts,
          .router_hidden = numerics == Numerics::kFast ? 0 : c.router_hidden_size,
          .whole_block = c.is_block(),
          .post_norm = olmo,
          .eps = c.rms_norm_eps,
          .rounding = olmo ? GainRounding::kAfterGain : GainRounding::kBeforeGain,
          .dtype = dtype_of(dtype)};
}

const void* data_of(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }

micro_kernels::BlockWeights block_weights(const LayerWeights& w) {
  return {.q = w.q.data(),
          .k = w.k.data(),
          .v = w.v.data(),
          .o = w.o.data(),
          .gate = w.gate.data(),
          .up = w.up.data(),
          .down = w.down.data(),
          .router_in = w.router_in,
          .router_out = w.router_out,
          .input_norm = data_of(w.input_norm),
          .post_attention_norm = data_of(w.post_attention_norm),
          .post_ffn_norm = data_of(w.post_ffn_norm),
          .q_norm = data_of(w.q_norm),
          .k_norm = data_of(w.k_norm)};
}

LinearPart product(const void* x, const micro_kernels::Matrix& matrix, void* y, int64_t rows, int64_t in, int64_t out) {
  LinearPart part;
  part.x = {.data = x, .stride = in};
  part.matrix = matrix;
  part.y = {.data = y, .stride = out};
  part.rows = rows;
  part.in = in;
  part.out = out;
  return part;
}

// Takes pieces of a workspace, or, with base nullptr, counts their bytes.
struct Pieces {
  char* base;
  int64_t used = 0;
  char* take(int64_t bytes) {
    char* piece = base ? base + used : nullptr;
    used += round_up(bytes, kAlignment);
    return piece;
  }
};

}  // namespace

Forward::Forward(const ModelConfig& config, const Weights& weights, Numerics numerics)
    : config_(config),
      weights_(weights),
      shape_(block_shape(config, numerics, weights.dtype())),
      rule_(kernel_rule(config.weight_rule)),
      element_(static_cast<int64_t>(c10::elementSize(weights.dtype()))),
      wide_(weights.dtype() == at::kDouble ? 8 : 4),
      ones_(at::ones({config.num_experts, config.hidden_size}, weights.dtype())) {}

// Llama rounds the tables to the element type, OLMo-2 does not (model.md 2.2).
void Forward::reserve(int64_t slots) {
  if (slots <= positions_) return;
  slots = round_up(std::max(slots, 2 * positions_), kPositions);  // a growing row asks again and again
  const at::ScalarType accumulator = wide_ == 8 ? at::kDouble : at::kFloat;
  const at::Tensor frequencies = rope_frequencies(config_.head_dim, config_.rope_theta, config_.rope_scaling);
  const RopeTable table = rope_table(at::arange(slots, at::kLong), frequencies);
  const auto rounded = [&](const at::Tensor& t) {
    return (config_.backbone == Backbone::kLlama ? t.to(weights_.dtype()) : t).to(accumulator).contiguous();
  };
  cos_ = rounded(table.cos);
  sin_ = rounded(table.sin);
  slots_.resize(static_cast<size_t>(slots));
  for (int64_t i = positions_; i < slots; ++i) slots_[static_cast<size_t>(i)] = static_cast<int32_t>(i);
  positions_ = slots;
}

void Forward::run(const Tokens& tokens, const BoundControls& controls, int64_t experts_per_token, Cache& cache,
                  TraceRecorder* trace, ActionTable* actions) {
  micro_kernels::BlockHooks hooks;
  int64_t layer = 0;
  if (actions) {
    actions->begin({tokens.counts, cache.lengths().data(), tokens.origins, tokens.rows, tokens.slots});
    for (int64_t l = 0; l < config_.num_hidden_layers; ++l) {  // room for all layers
      hooks.points |= actions->points(l);
      hooks.all_experts = hooks.all_experts || actions->all_experts(l);
    }
    hooks.meet = [&](const micro_kernels::BlockRows& rows) {
      actions->meet(layer, rows);
      return micro_kernels::Status::kOk;
    };
  }
  BlockForwardParams p = params(tokens, experts_per_token, cache, trace != nullptr, hooks.points ? &hooks : nullptr);
  buffers_ = divide(p);
  place(tokens, cache, p);
  embed(tokens, buffers_.x);
  if (trace)
    for (int64_t b = 0; b < tokens.rows; ++b) trace->extend(tokens.origins[b], tokens.counts[b]);
  for (int64_t l = 0; l < config_.num_hidden_layers; ++l) {
    p.weights = block_weights(weights_.layer(l));
    p.cache = cache.view(l);
    p.cache.positions = slots_.data();
    p.x = buffers_.x;
    p.y = buffers_.y;
    controls.apply(l, p.route);
    if (actions) {
      layer = l;
      actions->meet_residual(l, buffers_.x, shape_.dtype);
      hooks.points = actions->points(l);
      hooks.all_experts = actions->all_experts(l);
      p.hooks = hooks.points ? &hooks : nullptr;
    }
    check(kName, micro_kernels::cpu::block_forward(p, buffers_.block, parallel_for));
    if (trace) {
      const LayerDecision decision{buffers_.ids,       buffers_.weights, buffers_.probs,
                                   buffers_.effective, buffers_.raw,     controls.forced(l)};
      for (int64_t b = 0; b < tokens.rows; ++b)
        trace->record(l, tokens.origins[b], b * tokens.slots, tokens.counts[b], decision);
    }
    if (cache.shape().lazy) make_due(l, cache);
    std::swap(buffers_.x, buffers_.y);
  }
  if (actions) actions->meet_residual(config_.num_hidden_layers, buffers_.x, shape_.dtype);
  cache.advance(tokens.counts);
  columns_ = tokens.slots;
}

// Everything that does not change from layer to layer and needs no memory.
BlockForwardParams Forward::params(const Tokens& tokens, int64_t experts_per_token, Cache& cache, bool traced,
                                   const micro_kernels::BlockHooks* hooks) {
  int64_t keys = 0;
  for (int64_t b = 0; b < tokens.rows; ++b) keys = std::max<int64_t>(keys, cache.length(b) + tokens.slots);
  cache.reserve(keys);
  reserve(keys);
  BlockForwardParams p{};
  p.shape = shape_;
  p.cache = cache.view(0);
  p.batch = tokens.rows;
  p.slots = tokens.slots;
  p.starts = cache.lengths().data();
  p.keys = keys;
  p.mask_kind = micro_kernels::AttentionMask::kNone;
  p.masks = 1;
  p.cos = cos_.const_data_ptr();
  p.sin = sin_.const_data_ptr();
  p.positions = positions_;
  p.scale = 1 / std::sqrt(static_cast<double>(shape_.head_dim));
  p.route.tokens = tokens.rows * tokens.slots;
  p.route.experts = shape_.experts;
  p.route.k = experts_per_token;
  p.route.rule = rule_;
  p.route.dtype = shape_.dtype;
  p.raw = traced ? slots_.data() : nullptr;  // anything but null while sizes are asked for
  p.hooks = hooks;
  return p;
}

Forward::Buffers Forward::divide(const BlockForwardParams& p) {
  const int64_t count = p.batch * p.slots, scores = count * shape_.experts * wide_;
  const int64_t block = micro_kernels::cpu::block_forward_workspace(p);
  Buffers b{};
  const auto take_all = [&](char* base) {
    Pieces pieces{base};
    b.x = pieces.take(count * shape_.hidden * element_);
    b.y = pieces.take(count * shape_.hidden * element_);
    b.ids = pieces.take(count * p.route.k * static_cast<int64_t>(sizeof(int32_t)));
    b.weights = pieces.take(count * p.route.k * element_);
    b.probs = pieces.take(scores);
    b.effective = pieces.take(scores);
    b.raw = p.raw ? pieces.take(scores) : nullptr;
    b.position = reinterpret_cast<int32_t*>(pieces.take(count * static_cast<int64_t>(sizeof(int32_t))));
    b.real = reinterpret_cast<bool*>(pieces.take(count));
    b.block = pieces.take(block);
    return pieces.used;
  };
  const int64_t bytes = take_all(nullptr);
  if (bytes > workspace_.bytes()) workspace_ = Mapping(bytes, Pages::kHuge);
  take_all(workspace_.data());
  return b;
}

// Positions, the mask of real tokens, and where decisions go.
void Forward::place(const Tokens& tokens, const Cache& cache, BlockForwardParams& p) {
  bool ragged = false;
  for (int64_t b = 0, t = 0; b < tokens.rows; ++b) {
    ragged = ragged || tokens.counts[b] < tokens.slots;
    for (int64_t s = 0; s < tokens.slots; ++s, ++t) {
      buffers_.position[t] = static_cast<int32_t>(cache.length(b) + s);
      buffers_.real[t] = s < tokens.counts[b];
    }
  }
  p.position = buffers_.position;
  p.real = ragged ? buffers_.real : nullptr;
  p.route.ids = reinterpret_cast<int32_t*>(buffers_.ids);
  p.route.weights = buffers_.weights;
  p.route.probs = buffers_.probs;
  p.route.effective = buffers_.effective;
  p.raw = buffers_.raw;
}

void Forward::embed(const Tokens& tokens, char* x) const {
  const auto* table = static_cast<const char*>(weights_.embedding().const_data_ptr());
  const int64_t bytes = shape_.hidden * element_;
  for (int64_t b = 0, t = 0; b < tokens.rows; ++b)
    for (int64_t s = 0; s < tokens.slots; ++s, ++t) {
      const int64_t id = s < tokens.counts[b] ? tokens.ids[t] : 0;
      std::memcpy(x + t * bytes, table + id * bytes, static_cast<size_t>(bytes));
    }
}

// ---- lazy keys and values ------------------------------------------------------------------------------------------

void Forward::make_due(int64_t layer, Cache& cache) {
  for (int64_t row = 0; row < cache.rows(); ++row) {
    const int32_t due = cache.due(layer, row);
    for (int64_t e = 0; due > 0 && e < shape_.experts; ++e)
      if (cache.filled(layer, row)[e] < due) make_keys(layer, row, e, due, cache);
    cache.release_inputs(layer, row);
  }
}

// Keys and values of one expert and row up to slot `end`, from the kept inputs: the same steps as in a layer.
void Forward::make_keys(int64_t layer, int64_t row, int64_t expert, int32_t end, Cache& cache) {
  const LayerWeights& w = weights_.layer(layer);
  const int64_t hidden = shape_.hidden, width = shape_.groups * shape_.head_dim, e = expert;
  const int64_t head = shape_.head_dim * element_;
  if (key_space_.bytes() == 0) key_space_ = Mapping(kKeyRows * ((hidden + 3 * width) * element_ + wide_), Pages::kHuge);
  char* const normed = key_space_.data();
  char* const k = normed + kKeyRows * hidden * element_;
  char* const other = k + kKeyRows * width * element_;
  char* const v = other + kKeyRows * width * element_;
  char* const inverse_rms = v + kKeyRows * width * element_;
  const auto norm = [&](const void* x, const at::Tensor& gain, void* y, int64_t rows, int64_t size) {
    check(kName,
          micro_kernels::cpu::rms_norm({.x = x,
                                        .gain = static_cast<const char*>(gain.const_data_ptr()) + e * size * element_,
                                        .expert = nullptr,
                                        .y = y,
                                        .inverse_rms = inverse_rms,
                                        .rows = rows,
                                        .copies = 1,
                                        .rows_per_expert = rows,
                                        .hidden = size,
                                        .experts = 1,
                                        .eps = shape_.eps,
                                        .rounding = shape_.rounding,
                                        .dtype = shape_.dtype},
                                       parallel_for));
  };
  int32_t& filled = cache.filled(layer, row)[e];
  for (; filled < end; filled = static_cast<int32_t>(std::min<int64_t>(end, filled + kKeyRows))) {
    const int64_t rows = std::min<int64_t>(end - filled, kKeyRows);
    const void* x = cache.input(layer, row, filled);
    if (!shape_.post_norm) {
      norm(x, w.input_norm.defined() ? w.input_norm : ones_, normed, rows, hidden);
      x = normed;
    }
    const LinearPart parts[] = {product(x, w.k[static_cast<size_t>(e)], k, rows, hidden, width),
                                product(x, w.v[static_cast<size_t>(e)], v, rows, hidden, width)};
    check(kName, micro_kernels::cpu::linear(parts, 2, shape_.dtype, parallel_for));
    char *from = k, *to = other;
    if (shape_.post_norm) {
      norm(from, w.k_norm, to, rows, width);
      std::swap(from, to);
    }
    check(kName, micro_kernels::cpu::rope({.x = from,
                                           .cos = cos_.const_data_ptr(),
                                           .sin = sin_.const_data_ptr(),
                                           .tokens = slots_.data() + filled,
                                           .y = to,
                                           .rows = rows,
                                           .positions = positions_,
                                           .heads = shape_.groups,
                                           .head_dim = shape_.head_dim,
                                           .direction = micro_kernels::RopeDirection::kForward,
                                           .dtype = shape_.dtype},
                                          parallel_for));
    for (int64_t g = 0; g < shape_.groups; ++g)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (r * shape_.groups + g) * head;
        std::memcpy(cache.key(layer, row, e, g, filled + r), to + at, static_cast<size_t>(head));
        std::memcpy(cache.value(layer, row, e, g, filled + r), v + at, static_cast<size_t>(head));
      }
  }
}

// ---- head ----------------------------------------------------------------------------------------------------------

void Forward::logits(const std::vector<int64_t>& row, const std::vector<int64_t>& column, at::Tensor& out) {
  const int64_t hidden = shape_.hidden, vocabulary = config_.vocab_size, count = static_cast<int64_t>(row.size());
  const int64_t most = std::min(count, kHeadRows);
  const int64_t bytes = most * ((2 * hidden + vocabulary) * element_ + wide_) + 3 * kAlignment;
  if (bytes > head_space_.bytes()) head_space_ = Mapping(bytes, Pages::kHuge);
  for (int64_t first = 0; first < count; first += most) {
    const int64_t rows = std::min(most, count - first);
    Pieces pieces{head_space_.data()};
    char* x = pieces.take(most * hidden * element_);
    char* normed = pieces.take(most * hidden * element_);
    char* inverse_rms = pieces.take(most * wide_);
    char* scores = pieces.take(rows * vocabulary * element_);
    for (int64_t i = 0; i < rows; ++i) {
      const auto n = static_cast<size_t>(first + i);
      std::memcpy(x + i * hidden * element_, buffers_.x + (row[n] * columns_ + column[n]) * hidden * element_,
                  static_cast<size_t>(hidden * element_));
    }
    check(kName, micro_kernels::cpu::rms_norm({.x = x,
                                               .gain = weights_.final_norm().const_data_ptr(),
                                               .expert = nullptr,
                                               .y = normed,
                                               .inverse_rms = inverse_rms,
                                               .rows = rows,
                                               .copies = 1,
                                               .rows_per_expert = rows,
                                               .hidden = hidden,
                                               .experts = 1,
                                               .eps = shape_.eps,
                                               .rounding = shape_.rounding,
                                               .dtype = shape_.dtype},
                                              parallel_for));
    const LinearPart part = product(normed, weights_.head(), scores, rows, hidden, vocabulary);
    check(kName, micro_kernels::cpu::linear(&part, 1, shape_.dtype, parallel_for));
    out.narrow(0, first, rows).copy_(at::from_blob(scores, {rows, vocabulary}, at::TensorOptions(weights_.dtype())));
  }
}

}  // namespace micro::engine
