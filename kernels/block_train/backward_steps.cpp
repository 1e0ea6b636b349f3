#include "block_train/backward_steps.h"

#include <cstring>

#include "block_forward/row_steps.h"

namespace micro_kernels::cpu {

BackwardSteps::BackwardSteps(const BlockTrainBackwardParams& p, Arena arena, const ParallelFor& parallel_for)
    : p_(p),
      s_(p.shape),
      g_(p.grad),
      saved_(p.saved),
      needs_(p),
      size_(p),
      m_(p, arena),
      parallel_(parallel_for),
      element_(element_bytes(s_.dtype)),
      active_(saved_.offsets[s_.experts]) {
  for (int64_t e = 0; e < s_.experts; ++e)
    if (saved_.offsets[e] < saved_.offsets[e + 1]) used_.push_back(e);
}

Status BackwardSteps::norm(const void* x, const void* gain, char* y, char* inverse_rms, int64_t width) {
  return rms_norm({.x = x,
                   .gain = gain,
                   .expert = saved_.experts,
                   .y = y,
                   .inverse_rms = inverse_rms,
                   .rows = active_,
                   .copies = 1,
                   .rows_per_expert = active_,
                   .hidden = width,
                   .experts = s_.experts,
                   .eps = s_.eps,
                   .rounding = s_.rounding,
                   .dtype = s_.dtype},
                  parallel_);
}

Status BackwardSteps::norm_backward(const void* grad_y, const void* x, const void* gain, const char* inverse_rms,
                                    void* grad_x, void* grad_gain, int64_t width) {
  MICRO_RETURN_IF_FAILS(rms_norm_backward({.grad_y = grad_y,
                                           .x = x,
                                           .gain = gain,
                                           .expert = saved_.experts,
                                           .inverse_rms = inverse_rms,
                                           .grad_x = grad_x,
                                           .grad_gain = grad_gain ? m_.gains : nullptr,
                                           .rows = active_,
                                           .copies = 1,
                                           .rows_per_expert = active_,
                                           .hidden = width,
                                           .experts = s_.experts,
                                           .dtype = s_.dtype},
                                          parallel_));
  if (grad_gain) round(m_.gains, grad_gain, s_.experts * width);
  return Status::kOk;
}

Status BackwardSteps::rotate(const void* x, const int32_t* positions, int64_t heads, void* y, int64_t rows,
                             RopeDirection direction) {
  return rope({.x = x,
               .cos = p_.cos,
               .sin = p_.sin,
               .tokens = positions,
               .y = y,
               .rows = rows,
               .positions = size_.tokens,
               .heads = heads,
               .head_dim = s_.head_dim,
               .direction = direction,
               .dtype = s_.dtype},
              parallel_);
}

LinearPart BackwardSteps::product(const char* x, const Matrix& matrix, char* y, int64_t first, int64_t rows, int64_t in,
                                  int64_t out) const {
  LinearPart part;
  part.x = {at(x, first, in), nullptr, in};
  part.matrix = matrix;
  part.y = {at(y, first, out), nullptr, out};
  part.rows = rows, part.in = in, part.out = out;
  return part;
}

Status BackwardSteps::input_gradient(const char* grad_y, const Matrix* matrices, char* grad_x, int64_t in,
                                     int64_t out) {
  std::vector<LinearSource> sources;
  sources.reserve(used_.size());
  std::vector<LinearGradXPart> parts;
  each_used([&](int64_t e, int64_t first, int64_t rows) {
    sources.push_back({{at(grad_y, first, out), nullptr, out}, matrices[e].data});
    parts.push_back({&sources.back(), 1, {at(grad_x, first, in), nullptr, in}, rows, in, out});
  });
  return linear_grad_x(parts.data(), count(parts), s_.dtype, parallel_);
}

Status BackwardSteps::plain_input_gradient(const LinearSource& source, void* grad_x, int64_t in, int64_t out) {
  const LinearGradXPart part{&source, 1, {grad_x, nullptr, in}, size_.tokens, in, out};
  return linear_grad_x(&part, 1, s_.dtype, parallel_);
}

Status BackwardSteps::weight_gradient(const char* grad_y, const ConstRows& x, void* grad_weight, int64_t in,
                                      int64_t out) {
  std::vector<LinearGradWeightPart> parts;
  for (int64_t e = 0; e < s_.experts; ++e) {
    const int64_t first = saved_.offsets[e];
    const ConstRows rows = x.index ? ConstRows{x.data, x.index + first, x.stride}
                                   : ConstRows{at(x.data, first, x.stride), nullptr, x.stride};
    parts.push_back({{at(grad_y, first, out), nullptr, out},
                     rows,
                     at(grad_weight, e * out, in),
                     saved_.offsets[e + 1] - first,
                     in,
                     out,
                     false});
  }
  return linear_grad_weight(parts.data(), count(parts), s_.dtype, parallel_);
}

void BackwardSteps::add(const void* a, const void* b, void* y, int64_t rows, int64_t width) {
  add_rows({.a = a, .b = b, .y = y, .rows = rows, .width = width, .dtype = s_.dtype}, parallel_);
}

void BackwardSteps::round(const void* x, void* y, int64_t count) const {
  dispatch(s_.dtype, [&]<class T>() {
    const auto* from = static_cast<const accumulator_t<T>*>(x);
    for (int64_t i = 0; i < count; ++i) static_cast<T*>(y)[i] = T(from[i]);
  });
}

void BackwardSteps::clear(void* y, int64_t bytes) {
  if (y) std::memset(y, 0, bytes);
}

void BackwardSteps::clear_experts() {
  if (!p_.grad_y) return;
  const int64_t maps = s_.experts * s_.hidden * element_;
  for (void* y : {g_.q, g_.o}) clear(y, maps * size_.query_width);
  for (void* y : {g_.k, g_.v}) clear(y, maps * size_.key_width);
  for (void* y : {g_.gate, g_.up, g_.down}) clear(y, maps * s_.inner);
  for (void* y : {g_.input_norm, g_.post_attention_norm, g_.post_ffn_norm}) clear(y, maps);
  clear(g_.q_norm, s_.experts * size_.query_width * element_);
  clear(g_.k_norm, s_.experts * size_.key_width * element_);
  clear(g_.x, size_.tokens * s_.hidden * element_);
}

}  // namespace micro_kernels::cpu
