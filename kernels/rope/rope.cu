#include <algorithm>

#include "rope/rope.cuh"

namespace micro_kernels::cuda {
namespace {

// Warps that keep the memory of a large device busy (16 on each of 128 multiprocessors, 2 KB under way for each). With
// fewer rows, a row's heads are divided among warps, which then read its angles once each.
constexpr int64_t kEnoughWarps = 2048;

template <int N>
dim3 rope_grid(const RopeParams& p) {
  const int64_t parts = ceil_div(p.heads, int64_t{kRopeHeads} * rope_lanes<N>(p.head_dim / 2).heads);
  const int64_t wanted = std::clamp<int64_t>(kEnoughWarps / p.rows, 1, parts);
  return dim3(static_cast<unsigned>(ceil_div(p.rows, kRowWarps)), static_cast<unsigned>(wanted));
}

}  // namespace

Status rope(const RopeParams& p, void* stream) {
  if (p.rows * p.heads * p.head_dim == 0) return Status::kOk;
  return dispatch_device(p.dtype, [&]<class T>() {
    constexpr int kN = kVector<T>;
    if (in_vectors<T>(p.head_dim / 2, {p.x, p.y, p.cos, p.sin}))
      return launch(rope_kernel<T, kN>, rope_grid<kN>(p), dim3(kRowThreads), stream, p);
    return launch(rope_kernel<T, 1>, rope_grid<1>(p), dim3(kRowThreads), stream, p);
  });
}

}  // namespace micro_kernels::cuda
