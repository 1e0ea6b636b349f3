#include <algorithm>

#include "rms_norm/rms_norm.cuh"

namespace micro_kernels::cuda {
namespace {

constexpr int64_t kLeastChunk = 128;  // rows of one part of the gain's gradient
constexpr int64_t kMostChunks = 64;

bool aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

template <class T>
bool fits_registers(int64_t hidden, std::initializer_list<const void*> pointers) {
  return hidden <= kRmsNormLongest<T> && hidden % kRmsNormVector<T> == 0 && aligned(pointers);
}

int64_t chunk_rows(const RmsNormBackwardParams& p) {
  return std::max(kLeastChunk, ceil_div(p.copies * p.rows, kMostChunks));
}
int64_t chunk_count(const RmsNormBackwardParams& p) { return ceil_div(p.copies * p.rows, chunk_rows(p)); }

template <class T>
Status grad_x(const RmsNormBackwardParams& p, void* stream) {
  const bool fits = fits_registers<T>(p.hidden, {p.grad_y, p.x, p.gain, p.grad_x});
  return launch(fits ? rms_norm_grad_x_kernel<T> : rms_norm_grad_x_long_kernel<T>, dim3(p.rows), dim3(kRmsNormThreads),
                sizeof(RmsNormShared<accumulator_t<T>>), stream, p);
}

template <class T>
Status grad_gain(const RmsNormBackwardParams& p, void* workspace, void* stream) {
  const RmsNormGainParams q{p, workspace, chunk_rows(p), chunk_count(p)};
  if (q.chunks > 0) {
    const int vector = p.hidden % kRmsNormVector<T> == 0 && aligned({p.grad_y, p.x}) ? kRmsNormVector<T> : 1;
    const dim3 grid(ceil_div(p.hidden, int64_t{kRmsNormThreads} * vector), p.experts, q.chunks);
    const Status status =
        launch(vector > 1 ? rms_norm_gain_parts_kernel<T, kRmsNormVector<T>> : rms_norm_gain_parts_kernel<T, 1>, grid,
               dim3(kRmsNormThreads), stream, q);
    if (status != Status::kOk) return status;
  }
  return launch(rms_norm_gain_kernel<accumulator_t<T>>, dim3(ceil_div(p.experts * p.hidden, kRmsNormThreads)),
                dim3(kRmsNormThreads), stream, q);
}

}  // namespace

Status rms_norm(const RmsNormParams& p, void* stream) {
  if (p.rows == 0 || p.hidden == 0) return Status::kOk;
  return dispatch_device(p.dtype, [&]<class T>() {
    const bool fits = fits_registers<T>(p.hidden, {p.x, p.gain, p.y});
    return launch(fits ? rms_norm_kernel<T> : rms_norm_long_kernel<T>, dim3(p.rows), dim3(kRmsNormThreads),
                  sizeof(RmsNormShared<accumulator_t<T>>), stream, p);
  });
}

int64_t rms_norm_backward_workspace(const RmsNormBackwardParams& p) {
  if (!p.grad_gain) return 0;
  const int64_t element = p.dtype == DType::kFloat64 ? 8 : 4;
  return ceil_div(chunk_count(p) * p.experts * p.hidden * element, 16) * 16;
}

Status rms_norm_backward(const RmsNormBackwardParams& p, void* workspace, void* stream) {
  if (p.hidden == 0) return Status::kOk;
  return dispatch_device(p.dtype, [&]<class T>() {
    if (p.grad_x && p.rows > 0) {
      const Status status = grad_x<T>(p, stream);
      if (status != Status::kOk) return status;
    }
    return p.grad_gain ? grad_gain<T>(p, workspace, stream) : Status::kOk;
  });
}

}  // namespace micro_kernels::cuda
