#include "micro/sample.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "micro_kernels/sample.h"
#include "ops/arguments.h"
#include "ops/common.h"
#include "ops/workspace.h"

namespace micro {
namespace {

using at::Tensor;
using micro_kernels::kColdest;

constexpr char kName[] = "micro::sample";

void check_ids(const char* name, const OptionalTensor& ids, const Tensor& logits) {
  const Argument argument{kName, name, *ids};
  argument.is(at::kLong);
  argument.is_beside("logits", logits);
}

void check_per_row(const char* name, const OptionalTensor& numbers, const Tensor& logits) {
  if (!numbers) return;
  check_ids(name, numbers, logits);
  Argument{kName, name, *numbers}.has_sizes(logits.sym_sizes().slice(0, 1));
}

void check_numbers(const SampleOptions& o) {
  TORCH_CHECK_VALUE(o.temperature == 0 || (o.temperature >= kColdest && std::isfinite(o.temperature)), kName,
                    ": temperature must be 0 (the largest) or a number from ", kColdest, " on, got ", o.temperature);
  TORCH_CHECK_VALUE(o.top_k >= 0, kName, ": top_k must be 0 (all) or positive, got ", o.top_k);
  TORCH_CHECK_VALUE(o.top_p >= 0 && o.top_p <= 1, kName, ": top_p must lie in [0, 1], got ", o.top_p);
  TORCH_CHECK_VALUE(o.repetition_penalty > 0 && std::isfinite(o.repetition_penalty), kName,
                    ": repetition_penalty must be a positive number, got ", o.repetition_penalty);
  TORCH_CHECK_VALUE(o.min_new_tokens >= 0, kName, ": min_new_tokens must not be negative, got ", o.min_new_tokens);
}

// What one option needs of another one.
void check_company(const SampleOptions& o) {
  TORCH_CHECK_VALUE(o.temperature == 0 || (o.seeds && o.steps), kName,
                    ": a temperature above 0 needs seeds and steps, one of each per row");
  TORCH_CHECK_VALUE(o.repetition_penalty == 1 || o.previous, kName, ": a repetition_penalty needs previous ids");
  TORCH_CHECK_VALUE(o.min_new_tokens == 0 || (o.stop_ids && o.steps), kName,
                    ": min_new_tokens needs stop_ids, and steps, one per row");
}

void check_arguments(const Tensor& logits, const SampleOptions& o) {
  kernel_dtype(kName, logits);
  Argument{kName, "logits", logits}.has_dims(2, "[B, V]");
  TORCH_CHECK_VALUE(logits.sym_size(1).sym_ge(1).expect_true(__FILE__, __LINE__) &&
                        logits.sym_size(1).sym_le(std::numeric_limits<int32_t>::max()).expect_true(__FILE__, __LINE__),
                    kName, ": logits must be [B, V] with V in 1 .. 2^31 - 1, got ", logits.sym_sizes());
  check_numbers(o);
  check_company(o);
  check_per_row("seeds", o.seeds, logits);
  check_per_row("steps", o.steps, logits);
  if (o.previous) {
    check_ids("previous", o.previous, logits);
    const Argument argument{kName, "previous", *o.previous};
    argument.has_dims(2, "[B, P]");
    argument.has_sizes({logits.sym_size(0), o.previous->sym_size(1)});
  }
  if (o.stop_ids) {
    check_ids("stop_ids", o.stop_ids, logits);
    Argument{kName, "stop_ids", *o.stop_ids}.has_dims(1, "[n]");
  }
}

Tensor allocate(const Tensor& logits) {
  return at::empty_symint({logits.sym_size(0)}, logits.options().dtype(at::kLong));
}

Tensor run(const Tensor& logits_, const SampleOptions& o) {
  check_arguments(logits_, o);
  const c10::DeviceGuard device(logits_.device());
  const Tensor logits = logits_.contiguous();
  const OptionalTensor previous = contiguous(o.previous), stop_ids = contiguous(o.stop_ids),
                       seeds = contiguous(o.seeds), steps = contiguous(o.steps);
  const auto data = [](const OptionalTensor& t) { return t ? t->const_data_ptr<int64_t>() : nullptr; };
  Tensor ids = allocate(logits);
  const micro_kernels::SampleParams params{
      .logits = logits.const_data_ptr(),
      .previous = data(previous),
      .stop_ids = data(stop_ids),
      .seeds = data(seeds),
      .steps = data(steps),
      .ids = ids.mutable_data_ptr<int64_t>(),
      .rows = logits.size(0),
      .vocab = logits.size(1),
      .previous_count = previous ? previous->size(1) : 0,
      .stop_count = stop_ids ? stop_ids->size(0) : 0,
      .min_new_tokens = o.min_new_tokens,
      .top_k = o.top_k,
      .top_p = o.top_p,
      .temperature = o.temperature,
      .repetition_penalty = o.repetition_penalty,
      .dtype = kernel_dtype(kName, logits),
  };
  if (logits.is_cuda()) {
    const Tensor workspace = device_workspace(logits, micro_kernels::cuda::sample_workspace(params));
    check(kName, micro_kernels::cuda::sample(params, workspace.mutable_data_ptr(), current_stream(logits)));
  } else {
    check(kName, micro_kernels::cpu::sample(params, parallel_for));
  }
  return ids;
}

SampleOptions gather(double temperature, int64_t top_k, double top_p, double repetition_penalty,
                     const OptionalTensor& previous, int64_t min_new_tokens, const OptionalTensor& stop_ids,
                     const OptionalTensor& seeds, const OptionalTensor& steps) {
  return {.temperature = temperature,
          .top_k = top_k,
          .top_p = top_p,
          .repetition_penalty = repetition_penalty,
          .min_new_tokens = min_new_tokens,
          .previous = previous,
          .stop_ids = stop_ids,
          .seeds = seeds,
          .steps = steps};
}

// The options as the schema lists them.
using Signature = Tensor(const Tensor& logits, double temperature, int64_t top_k, double top_p,
                         double repetition_penalty, const OptionalTensor& previous, int64_t min_new_tokens,
                         const OptionalTensor& stop_ids, const OptionalTensor& seeds, const OptionalTensor& steps);

auto call_forward() {
  static const auto call = op<Signature>("micro::sample");
  return call;
}

template <class... Options>
Tensor forward(const Tensor& logits, Options... options) {
  return run(logits, gather(options...));
}

template <class... Options>
Tensor forward_meta(const Tensor& logits, Options... options) {
  check_arguments(logits, gather(options...));
  return allocate(logits);
}

// Ids carry no gradient, even where the logits do.
template <class... Options>
Tensor forward_autograd(const Tensor& logits, Options... options) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_forward().call(logits, options...);
}

}  // namespace

Tensor sample(const Tensor& logits, const SampleOptions& o) {
  return call_forward().call(logits, o.temperature, o.top_k, o.top_p, o.repetition_penalty, o.previous,
                             o.min_new_tokens, o.stop_ids, o.seeds, o.steps);
}

TORCH_LIBRARY_FRAGMENT(micro, m) {
  m.def(
      "sample(Tensor logits, *, float temperature=0.0, int top_k=0, float top_p=1.0, float repetition_penalty=1.0,"
      " Tensor? previous=None, int min_new_tokens=0, Tensor? stop_ids=None, Tensor? seeds=None, Tensor? steps=None)"
      " -> Tensor");
}
TORCH_LIBRARY_IMPL(micro, Autograd, m) { m.impl("sample", static_cast<Signature*>(forward_autograd)); }
TORCH_LIBRARY_IMPL(micro, CPU, m) { m.impl("sample", static_cast<Signature*>(forward)); }
TORCH_LIBRARY_IMPL(micro, CUDA, m) { m.impl("sample", static_cast<Signature*>(forward)); }
TORCH_LIBRARY_IMPL(micro, Meta, m) { m.impl("sample", static_cast<Signature*>(forward_meta)); }

}  // namespace micro
