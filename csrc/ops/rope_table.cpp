// The angles of the rotary embedding. Plain tensor functions in one fixed order: a frequency that is off by one unit in
// the last place moves router logits by 3e-5 at position 3000 (model.md 2.2).

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <numbers>
#include <tuple>

#include "micro/rope.h"
#include "ops/arguments.h"
#include "ops/common.h"

namespace micro {
namespace {

using at::Tensor;
using OptionalNumbers = std::optional<at::ArrayRef<double>>;

constexpr char kFrequencies[] = "micro::rope_frequencies";
constexpr char kTable[] = "micro::rope_table";

void check_positive(const char* name, double value) {
  TORCH_CHECK_VALUE(value > 0, kFrequencies, ": ", name, " must be positive, got ", value);
}

Tensor scaled(const Tensor& f, const RopeScaling& scaling) {
  check_positive("factor", scaling.factor);
  check_positive("low", scaling.low);
  check_positive("context", scaling.context);
  TORCH_CHECK_VALUE(scaling.high > scaling.low, kFrequencies, ": high must be greater than low, got low ", scaling.low,
                    " and high ", scaling.high);
  const Tensor wavelength = f.reciprocal() * (2 * std::numbers::pi);
  const Tensor smooth = (wavelength.reciprocal() * scaling.context - scaling.low) / (scaling.high - scaling.low);
  const Tensor middle = (1 - smooth) * f / scaling.factor + smooth * f;
  const Tensor longer = at::where(wavelength > scaling.context / scaling.low, f / scaling.factor, middle);
  return at::where(wavelength < scaling.context / scaling.high, f, longer);
}

Tensor frequencies_op(int64_t head_dim, double theta, OptionalNumbers scaling) {
  if (!scaling) return rope_frequencies(head_dim, theta);
  TORCH_CHECK_VALUE(scaling->size() == 4, kFrequencies, ": scaling must be (factor, low, high, old context), got ",
                    scaling->size(), " numbers");
  const auto& s = *scaling;
  return rope_frequencies(head_dim, theta, RopeScaling{s[0], s[1], s[2], s[3]});
}

std::tuple<Tensor, Tensor> table_op(const Tensor& position_ids, const Tensor& frequencies) {
  RopeTable table = rope_table(position_ids, frequencies);
  return {table.cos, table.sin};
}

}  // namespace

Tensor rope_frequencies(int64_t head_dim, double theta, const std::optional<RopeScaling>& scaling) {
  TORCH_CHECK_VALUE(head_dim > 0 && head_dim % 2 == 0, kFrequencies, ": head_dim must be a positive even number, got ",
                    head_dim);
  check_positive("theta", theta);
  const Tensor exponent = at::arange(0, head_dim, 2, at::TensorOptions().dtype(at::kFloat)) / head_dim;
  const Tensor f = at::pow(at::Scalar(theta), exponent).reciprocal();
  return scaling ? scaled(f, *scaling) : f;
}

RopeTable rope_table(const Tensor& position_ids, const Tensor& frequencies) {
  const Argument positions{kTable, "position_ids", position_ids};
  positions.is(at::kLong);
  positions.has_dims(1, "[P]");
  const Argument argument{kTable, "frequencies", frequencies};
  argument.is(at::kFloat);
  argument.has_dims(1, "[D / 2]");
  argument.is_beside("position_ids", position_ids);
  const Tensor angle = position_ids.unsqueeze(1).to(at::kFloat) * frequencies;
  return {angle.cos(), angle.sin()};
}

TORCH_LIBRARY_FRAGMENT(micro, m) {
  m.def("rope_frequencies(int head_dim, float theta, float[]? scaling=None) -> Tensor", frequencies_op);
  m.def("rope_table(Tensor position_ids, Tensor frequencies) -> (Tensor cos, Tensor sin)", table_op);
}

}  // namespace micro
