#include "combine/combine.cuh"

namespace micro_kernels::cuda {

Status combine(const CombineParams& p, void* stream) {
  if (p.token_count == 0 || p.hidden == 0) return Status::kOk;
  return dispatch_device(p.dtype, [&]<class T>() {
    constexpr int kN = kVector<T>;
    if (in_vectors<T>(p.hidden, {p.y, p.out}))
      return launch(combine_kernel<T, kN>, piece_grid(p.token_count, p.hidden, kN), dim3(kRowThreads), stream, p);
    return launch(combine_kernel<T, 1>, piece_grid(p.token_count, p.hidden, 1), dim3(kRowThreads), stream, p);
  });
}

Status combine_backward(const CombineBackwardParams& p, void* stream) {
  if (p.token_count * p.k == 0 || (!p.grad_y && !p.grad_weights)) return Status::kOk;
  return dispatch_device(p.dtype, [&]<class T>() {
    const dim3 grid(static_cast<unsigned>(ceil_div(p.token_count, kRowWarps)));
    if (in_vectors<T>(p.hidden, {p.grad, p.grad_weights ? p.y : nullptr, p.grad_y}))
      return launch(combine_backward_kernel<T, kVector<T>>, grid, dim3(kRowThreads), stream, p);
    return launch(combine_backward_kernel<T, 1>, grid, dim3(kRowThreads), stream, p);
  });
}

}  // namespace micro_kernels::cuda
