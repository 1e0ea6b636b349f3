#include "permute/permute.cuh"

namespace micro_kernels::cuda {

Status permute(const PermuteParams& p, void* stream) {
  if (p.rows == 0 || p.hidden == 0) return Status::kOk;
  return dispatch_device(p.dtype, [&]<class T>() {
    constexpr int kN = kVector<T>;
    if (in_vectors<T>(p.hidden, {p.x, p.y}))
      return launch(permute_kernel<T, kN>, piece_grid(p.rows, p.hidden, kN), dim3(kRowThreads), stream, p);
    return launch(permute_kernel<T, 1>, piece_grid(p.rows, p.hidden, 1), dim3(kRowThreads), stream, p);
  });
}

Status permute_backward(const PermuteBackwardParams& p, void* stream) {
  if (p.token_count == 0 || p.hidden == 0) return Status::kOk;
  return dispatch_device(p.dtype, [&]<class T>() {
    constexpr int kN = kVector<T>;
    if (in_vectors<T>(p.hidden, {p.grad_y, p.grad_x}))
      return launch(permute_backward_kernel<T, kN>, piece_grid(p.token_count, p.hidden, kN), dim3(kRowThreads), stream,
                    p);
    return launch(permute_backward_kernel<T, 1>, piece_grid(p.token_count, p.hidden, 1), dim3(kRowThreads), stream, p);
  });
}

}  // namespace micro_kernels::cuda
