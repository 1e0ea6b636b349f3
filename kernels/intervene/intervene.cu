#include "intervene/intervene.cuh"

namespace micro_kernels::cuda {
namespace {

template <class T>
Status values(const InterveneBackwardParams& b, void* stream) {
  const InterveneParams& p = b.forward;
  if (p.value_rows > kMostValueRows)
    return launch(intervene_source_kernel<T>, dim3(static_cast<unsigned>(ceil_div(p.width, kRowThreads))),
                  dim3(kRowThreads), stream, b);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.width, kWarp)), static_cast<unsigned>(p.value_rows));
  return launch(intervene_value_kernel<T>, grid, dim3(kRowThreads), sizeof(ValueSumMemory<accumulator_t<T>>), stream,
                b);
}

}  // namespace

Status intervene(const InterveneParams& p, void* stream) {
  if (p.rows == 0 || p.width == 0) return Status::kOk;
  return dispatch_device(p.dtype, [&]<class T>() {
    constexpr int kN = kVector<T>;
    if (in_vectors<T>(p.width, {p.x, p.y}))
      return launch(intervene_kernel<T, kN>, piece_grid(p.rows, p.width, kN), dim3(kRowThreads), stream, p);
    return launch(intervene_kernel<T, 1>, piece_grid(p.rows, p.width, 1), dim3(kRowThreads), stream, p);
  });
}

Status intervene_backward(const InterveneBackwardParams& b, void* stream) {
  const InterveneParams& p = b.forward;
  if (p.width == 0) return Status::kOk;
  return dispatch_device(p.dtype, [&]<class T>() {
    constexpr int kN = kVector<T>;
    if (b.grad_value && p.value_rows > 0)
      if (const Status status = values<T>(b, stream); status != Status::kOk) return status;
    if (!b.grad_x || p.rows == 0) return Status::kOk;
    if (in_vectors<T>(p.width, {b.grad_y, b.grad_x}))
      return launch(intervene_backward_kernel<T, kN>, piece_grid(p.rows, p.width, kN), dim3(kRowThreads), stream, b);
    return launch(intervene_backward_kernel<T, 1>, piece_grid(p.rows, p.width, 1), dim3(kRowThreads), stream, b);
  });
}

}  // namespace micro_kernels::cuda
