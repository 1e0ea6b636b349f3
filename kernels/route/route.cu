#include "common/cuda/launch.cuh"
#include "route/route.cuh"

namespace micro_kernels::cuda {
namespace {

dim3 grid_of(int64_t tokens) { return dim3(static_cast<unsigned>(ceil_div(tokens, kRouteThreads))); }

}  // namespace

Status route(const RouteParams& p, void* stream) {
  if (p.tokens == 0) return Status::kOk;
  return dispatch_device(p.dtype, [&]<class T>() {
    using Acc = accumulator_t<T>;
    const auto start = [&]<int kWidth>() {
      return launch(route_kernel<T, kWidth>, grid_of(p.tokens), dim3(kRouteThreads), stream, p);
    };
    return dispatch_width<T>(p.experts, start, static_cast<const T*>(p.logits), static_cast<const Acc*>(p.rows),
                             static_cast<const Acc*>(p.bias), static_cast<const Acc*>(p.probs),
                             static_cast<const Acc*>(p.effective));
  });
}

Status route_backward(const RouteBackwardParams& p, void* stream) {
  if (p.tokens == 0) return Status::kOk;
  return dispatch_device(p.dtype, [&]<class T>() {
    using Acc = accumulator_t<T>;
    const auto start = [&]<int kWidth>() {
      return launch(route_backward_kernel<T, kWidth>, grid_of(p.tokens), dim3(kRouteThreads), stream, p);
    };
    return dispatch_width<T>(p.experts, start, static_cast<const Acc*>(p.grad_probs),
                             static_cast<const Acc*>(p.grad_effective), static_cast<const Acc*>(p.probs),
                             static_cast<const Acc*>(p.effective), static_cast<const Acc*>(p.grad_z));
  });
}

}  // namespace micro_kernels::cuda
