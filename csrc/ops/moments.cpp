#include "micro/moments.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "micro_kernels/moments.h"
#include "ops/arguments.h"
#include "ops/common.h"

namespace micro {
namespace {

using at::Tensor;

constexpr char kName[] = "micro::moments_";

void check_state(const char* name, const Tensor& state, c10::SymIntArrayRef sizes, const Tensor& x) {
  const Argument argument{kName, name, state};
  argument.is(at::kDouble);
  argument.has_sizes(sizes);
  argument.is_beside("x", x);
  TORCH_CHECK_VALUE(state.is_contiguous(), kName, ": ", name, " must be contiguous: it is changed in place");
}

void check_rows(const char* name, const OptionalTensor& tensor, at::ScalarType type, const Tensor& x) {
  if (!tensor) return;
  const Argument argument{kName, name, *tensor};
  argument.is(type);
  argument.has_sizes({x.sym_size(0)});
  argument.is_beside("x", x);
}

void check_arguments(const Tensor& x, const Tensor& count, const Tensor& mean, const Tensor& m2,
                     const OptionalTensor& scatter, const OptionalTensor& touched, const OptionalTensor& experts) {
  kernel_dtype(kName, x);
  Argument{kName, "x", x}.has_dims(2, "[N, W]");
  Argument{kName, "count", count}.has_dims(1, "[E']");
  const c10::SymInt e = count.sym_size(0), w = x.sym_size(1);
  check_state("count", count, {e}, x);
  check_state("mean", mean, {e, w}, x);
  check_state("m2", m2, {e, w}, x);
  if (scatter) check_state("scatter", *scatter, {e, w, w}, x);
  check_rows("touched", touched, at::kBool, x);
  check_rows("experts", experts, at::kInt, x);
}

void take(const Tensor& x, const Tensor& count, const Tensor& mean, const Tensor& m2, const OptionalTensor& touched,
          const OptionalTensor& experts) {
  const micro_kernels::MomentsParams params{
      .x = x.const_data_ptr(),
      .touched = touched ? touched->const_data_ptr<bool>() : nullptr,
      .expert = experts ? experts->const_data_ptr<int32_t>() : nullptr,
      .count = count.mutable_data_ptr<double>(),
      .mean = mean.mutable_data_ptr<double>(),
      .m2 = m2.mutable_data_ptr<double>(),
      .rows = x.size(0),
      .width = x.size(1),
      .experts = count.size(0),
      .dtype = kernel_dtype(kName, x),
  };
  const auto status = x.is_cuda() ? micro_kernels::cuda::moments(params, current_stream(x))
                                  : micro_kernels::cpu::moments(params, parallel_for);
  TORCH_CHECK_VALUE(status != micro_kernels::Status::kIndexOutOfRange, kName,
                    ": a row that is taken in has an expert outside [0, ", params.experts, ")");
  check(kName, status);
}

// Of the rows named; on CUDA nobody waits for their number, and the others become 0 (not by a product: 0 times
// infinity).
Tensor deviations_cpu(const Tensor& x, const Tensor& mean, const Tensor& mine) {
  return x.index_select(0, mine.nonzero().squeeze(1)).to(at::kDouble) - mean;
}

// Of the call's rows alone: sum (x - mean)(x - mean)^T per expert, as one product; joined to what was there by means.
void take_scatter(const Tensor& x, const Tensor& count, const Tensor& mean, Tensor scatter,
                  const OptionalTensor& touched, const OptionalTensor& experts) {
  const Tensor own_count = at::zeros_like(count), own_mean = at::zeros_like(mean), own_m2 = at::zeros_like(mean);
  take(x, own_count, own_mean, own_m2, touched, experts);
  for (int64_t e = 0; e < count.size(0); ++e) {
    Tensor mine = experts ? experts->eq(e) : at::ones({x.size(0)}, x.options().dtype(at::kBool));
    if (touched) mine = mine.logical_and(*touched);
    const Tensor kept = x.is_cpu() ? deviations_cpu(x, own_mean[e], mine)
                                   : at::where(mine.unsqueeze(1), x.to(at::kDouble) - own_mean[e], 0.0);
    scatter[e].addmm_(kept.t(), kept);
  }
  const Tensor delta = own_mean - mean, total = (count + own_count).clamp_min(1);
  const Tensor share = (count * own_count / total).reshape({-1, 1, 1});
  scatter.add_(delta.unsqueeze(2) * delta.unsqueeze(1) * share);
}

void moments_here(const Tensor& x_, Tensor& count, Tensor& mean, Tensor& m2, const OptionalTensor& scatter,
                  const OptionalTensor& touched_, const OptionalTensor& experts_) {
  check_arguments(x_, count, mean, m2, scatter, touched_, experts_);
  const c10::DeviceGuard device(x_.device());
  const Tensor x = x_.contiguous();
  const OptionalTensor touched = contiguous(touched_), experts = contiguous(experts_);
  if (scatter) take_scatter(x, count, mean, *scatter, touched, experts);
  take(x, count, mean, m2, touched, experts);
}

void moments_meta(const Tensor& x, Tensor& count, Tensor& mean, Tensor& m2, const OptionalTensor& scatter,
                  const OptionalTensor& touched, const OptionalTensor& experts) {
  check_arguments(x, count, mean, m2, scatter, touched, experts);
}

}  // namespace

void moments_(const Tensor& x, Tensor& count, Tensor& mean, Tensor& m2, const OptionalTensor& scatter,
              const OptionalTensor& touched, const OptionalTensor& experts) {
  static const auto call = op<decltype(moments_here)>("micro::moments_");
  call.call(x, count, mean, m2, scatter, touched, experts);
}

TORCH_LIBRARY_FRAGMENT(micro, m) {
  m.def(
      "moments_(Tensor x, Tensor(a!) count, Tensor(b!) mean, Tensor(c!) m2, Tensor(d!)? scatter=None, "
      "Tensor? touched=None, Tensor? experts=None) -> ()");
}
TORCH_LIBRARY_IMPL(micro, CPU, m) { m.impl("moments_", moments_here); }
TORCH_LIBRARY_IMPL(micro, CUDA, m) { m.impl("moments_", moments_here); }
TORCH_LIBRARY_IMPL(micro, Meta, m) { m.impl("moments_", moments_meta); }

}  // namespace micro
