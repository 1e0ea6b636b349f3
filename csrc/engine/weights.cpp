#include "engine/weights.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/stack.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

#include "ops/common.h"

namespace micro::engine {
namespace {

using micro_kernels::Matrix;
using micro_kernels::WeightFormat;

constexpr char kName[] = "Engine";
constexpr int64_t kAlignment = 64;
constexpr int64_t kMapping = 64 << 20;  // reserved at once; pages appear where weights are written

// Sums and products before the one rounding to the element type.
at::Tensor wide(const at::Tensor& tensor) {
  return tensor.to(tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// The file's copy of a tensor that is packed need not stay in memory beside it.
void let_go(const std::vector<at::Tensor>& mapped) {
  for (const at::Tensor& tensor : mapped)
    engine::let_go(tensor.const_data_ptr(), tensor.numel() * tensor.element_size());
}

at::Tensor with_gain(const at::Tensor& matrix, const at::Tensor& gain, at::ScalarType dtype) {
  return (wide(matrix) * wide(gain)).to(dtype);
}

}  // namespace

Weights::Weights(const ModelConfig& config, const ModelTensors& tensors, const Layers& layers, Numerics numerics,
                 WeightStore store, at::ScalarType dtype)
    : dtype_(dtype), store_(store) {
  const at::Tensor table = typed(tensors.embed_tokens);
  embedding_ = !tensors.mapped && table.is_alias_of(tensors.embed_tokens) ? table.clone() : table;
  bytes_ += embedding_.numel() * embedding_.element_size();
  final_norm_ = gains({tensors.final_norm});
  head_ = pack("lm_head", {tensors.lm_head})[0];
  if (tensors.mapped) let_go({tensors.embed_tokens, tensors.lm_head});
  layers_.reserve(static_cast<size_t>(config.num_hidden_layers));
  for (int64_t l = 0; l < config.num_hidden_layers; ++l) {
    const LayerTensors layer = layers(l);
    add_layer(config, layer, numerics == Numerics::kFast);
    if (!tensors.mapped) continue;
    let_go({layer.router_in_proj, layer.router_out_proj});
    for (const auto* list : {&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj, &layer.gate_proj,
                             &layer.up_proj, &layer.down_proj})
      let_go(*list);
  }
}

void Weights::add_layer(const ModelConfig& config, LayerTensors tensors, bool fold) {
  if (fold) fold_gains(config, tensors);
  LayerWeights layer;
  layer.q = pack("q_proj", tensors.q_proj);
  layer.k = pack("k_proj", tensors.k_proj);
  layer.v = pack("v_proj", tensors.v_proj);
  layer.o = pack("o_proj", tensors.o_proj);
  layer.gate = pack("gate_proj", tensors.gate_proj);
  layer.up = pack("up_proj", tensors.up_proj);
  layer.down = pack("down_proj", tensors.down_proj);
  // Routing is a step function: routers are never quantised.
  if (tensors.router_in_proj.defined()) layer.router_in = pack_exact(typed(tensors.router_in_proj));
  layer.router_out = pack_exact(fold ? wide(tensors.router_out_proj).contiguous() : typed(tensors.router_out_proj));
  layer.input_norm = gains(tensors.input_norm);
  layer.post_attention_norm = gains(tensors.post_attention_norm);
  layer.post_ffn_norm = gains(tensors.post_ffn_norm);
  layer.q_norm = gains(tensors.q_norm);
  layer.k_norm = gains(tensors.k_norm);
  layers_.push_back(std::move(layer));
}

// Fast numerics: one router map, and the gains in front of matrices inside them, multiplied before the one rounding
// (performance.md 9.1, 9.2). OLMo-2 has its norms behind the matrices, where they stay.
void Weights::fold_gains(const ModelConfig& config, LayerTensors& t) {
  at::Tensor router = wide(t.router_out_proj).matmul(wide(t.router_in_proj));
  t.router_in_proj.reset();
  if (config.backbone == Backbone::kLlama) {
    const auto fold = [this](std::vector<at::Tensor>& matrices, const std::vector<at::Tensor>& gain) {
      for (size_t e = 0; e < matrices.size(); ++e)
        matrices[e] = with_gain(matrices[e], gain[std::min(e, gain.size() - 1)], dtype_);
    };
    fold(t.q_proj, t.input_norm);
    fold(t.k_proj, t.input_norm);
    fold(t.v_proj, t.input_norm);
    fold(t.gate_proj, t.post_attention_norm);
    fold(t.up_proj, t.post_attention_norm);
    if (!config.is_block()) router = router * wide(t.post_attention_norm[0]);  // it reads the same normalised rows
    t.input_norm.clear();
    t.post_attention_norm.clear();
  }
  t.router_out_proj = router;  // its logits are not rounded to the element type either
}

std::vector<Matrix> Weights::pack(const char* kind, const std::vector<at::Tensor>& tensors) {
  std::vector<Matrix> out;
  out.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors)
    out.push_back(store_ == WeightStore::kInt8 ? pack_int8(kind, typed(tensor)) : pack_exact(typed(tensor)));
  return out;
}

Matrix Weights::pack_exact(const at::Tensor& tensor) {
  const int64_t out = tensor.size(0), in = tensor.size(1);
  char* data = take(micro_kernels::cpu::packed_elements(in, out) * tensor.element_size());
  check(kName, micro_kernels::cpu::pack_weight(tensor.const_data_ptr(), in, out, kernel_dtype(kName, tensor), data,
                                               parallel_for));
  return {.data = data, .scales = nullptr, .format = WeightFormat::kPacked};
}

Matrix Weights::pack_int8(const char* kind, const at::Tensor& tensor) {
  const int64_t out = tensor.size(0), in = tensor.size(1);
  const at::Tensor plain = wide(tensor);
  const double largest = plain.abs().max().item<double>();
  TORCH_CHECK_VALUE(std::isfinite(largest), "Engine: a ", kind,
                    " matrix holds NaN or infinity, which 8-bit integers cannot; use weights=\"packed\", or mend it");
  char* data = take(micro_kernels::cpu::packed_elements(in, out));
  auto* scales = reinterpret_cast<float*>(take(out * static_cast<int64_t>(sizeof(float))));
  check(kName, micro_kernels::cpu::pack_weight_int8(tensor.const_data_ptr(), in, out, kernel_dtype(kName, tensor),
                                                    reinterpret_cast<int8_t*>(data), scales, parallel_for));
  const at::Tensor scale = at::from_blob(scales, {out, 1}, at::kFloat).clamp_min(1e-30);
  const at::Tensor error = ((plain / scale).round_() * scale).sub_(plain);
  ErrorSum& sum = errors_[kind];
  if (largest > 0) sum.largest = std::max(sum.largest, error.abs().max().item<double>() / largest);
  sum.squares += error.square().sum(at::kDouble).item<double>();
  sum.weights += plain.square().sum(at::kDouble).item<double>();
  return {.data = data, .scales = scales, .format = WeightFormat::kInt8};
}

at::Tensor Weights::gains(const std::vector<at::Tensor>& tensors) {
  if (tensors.empty()) return {};
  at::Tensor stacked = at::stack(tensors).to(dtype_);
  bytes_ += stacked.numel() * stacked.element_size();
  return stacked;
}

at::Tensor Weights::typed(const at::Tensor& tensor) const { return tensor.to(dtype_).contiguous(); }

// From large mappings: a matrix alone may be too small for large pages, and these save a good part of its reading time.
char* Weights::take(int64_t bytes) {
  bytes = round_up(bytes, kAlignment);
  if (bytes > free_) {
    memory_.emplace_back(std::max(bytes, kMapping), Pages::kHuge);
    free_ = memory_.back().bytes();
  }
  char* data = memory_.back().data() + memory_.back().bytes() - free_;
  free_ -= bytes;
  bytes_ += bytes;
  return data;
}

std::map<std::string, QuantizationError> Weights::errors() const {
  std::map<std::string, QuantizationError> out;
  for (const auto& [kind, sum] : errors_)
    out[kind] = {.max = sum.largest, .rms = sum.weights > 0 ? std::sqrt(sum.squares / sum.weights) : 0};
  return out;
}

}  // namespace micro::engine
