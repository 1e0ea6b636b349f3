#include "swiglu/swiglu.cuh"

namespace micro_kernels::cuda {
namespace {

dim3 swiglu_grid(int64_t count, int N) {
  return dim3(static_cast<unsigned>(ceil_div(count, int64_t{kSwigluVectors} * kSwigluThreads * N)));
}

}  // namespace

Status swiglu(const SwigluParams& p, void* stream) {
  if (p.count == 0) return Status::kOk;
  return dispatch_device(p.dtype, [&]<class T>() {
    constexpr int kN = kVector<T>;
    if (in_vectors<T>(0, {p.gate, p.up, p.y}))
      return launch(swiglu_kernel<T, kN>, swiglu_grid(p.count, kN), dim3(kSwigluThreads), stream, p);
    return launch(swiglu_kernel<T, 1>, swiglu_grid(p.count, 1), dim3(kSwigluThreads), stream, p);
  });
}

Status swiglu_backward(const SwigluBackwardParams& p, void* stream) {
  if (p.count == 0) return Status::kOk;
  return dispatch_device(p.dtype, [&]<class T>() {
    constexpr int kN = kVector<T>;
    if (in_vectors<T>(0, {p.grad_y, p.gate, p.up, p.grad_gate, p.grad_up}))
      return launch(swiglu_backward_kernel<T, kN>, swiglu_grid(p.count, kN), dim3(kSwigluThreads), stream, p);
    return launch(swiglu_backward_kernel<T, 1>, swiglu_grid(p.count, 1), dim3(kSwigluThreads), stream, p);
  });
}

}  // namespace micro_kernels::cuda
