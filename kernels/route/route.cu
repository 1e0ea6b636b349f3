#include "common/cuda/launch.cuh"
#include "route/route.cuh"

namespace micro_kernels::cuda {
namespace {

// Two ids, and two weights (or their gradients, if any), lie where one instruction moves them.
template <class T>
bool choices_are_two(int64_t k, const int32_t* ids, const void* weights) {
  return k == 2 && reinterpret_cast<uintptr_t>(ids) % (2 * sizeof(int32_t)) == 0 &&
         reinterpret_cast<uintptr_t>(weights) % (2 * sizeof(T)) == 0;
}

dim3 grid_of(int64_t tokens) { return dim3(static_cast<unsigned>(ceil_div(tokens, kRouteThreads))); }

}  // namespace

Status route(const RouteParams& p, void* stream) {
  if (p.tokens == 0) return Status::kOk;
  return dispatch_device(p.dtype, [&]<class T>() {
    using Acc = accumulator_t<T>;
    const RouteLaunch<RouteParams> params{p, choices_are_two<T>(p.k, p.ids, p.weights)};
    const auto start = [&]<int kWidth>() {
      return launch(route_kernel<T, kWidth>, grid_of(p.tokens), dim3(kRouteThreads), stream, params);
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
    const RouteLaunch<RouteBackwardParams> params{p, choices_are_two<T>(p.k, p.ids, p.grad_weights)};
    const auto start = [&]<int kWidth>() {
      return launch(route_backward_kernel<T, kWidth>, grid_of(p.tokens), dim3(kRouteThreads), stream, params);
    };
    return dispatch_width<T>(p.experts, start, static_cast<const Acc*>(p.grad_probs),
                             static_cast<const Acc*>(p.grad_effective), static_cast<const Acc*>(p.probs),
                             static_cast<const Acc*>(p.effective), static_cast<const Acc*>(p.grad_z));
  });
}

}  // namespace micro_kernels::cuda
