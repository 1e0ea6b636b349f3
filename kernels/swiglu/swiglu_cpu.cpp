#include "micro_kernels/isa.h"
#include "micro_kernels/swiglu.h"
#include "swiglu/swiglu_loop.h"

namespace micro_kernels::cpu {

const SwigluLoops kSwigluPlain = kLoops;

namespace {

constexpr int64_t kGrainElements = 8 * 1024;  // an exponential each: below this, a second thread does not pay

const SwigluLoops& loops_for_this_cpu() {
#if defined(__x86_64__)
  if (isa() >= Isa::kAvx512) return kSwigluAvx512;
  if (isa() >= Isa::kAvx2) return kSwigluAvx2;
#endif
  return kSwigluPlain;
}

// Calls body(loop) with the loop of the element type.
template <class Body>
void with_loop(DType dtype, const Body& body) {
  const SwigluLoops& loops = loops_for_this_cpu();
  switch (dtype) {
    case DType::kFloat32:
      return body(loops.float32);
    case DType::kFloat64:
      return body(loops.float64);
    case DType::kBFloat16:
      return body(loops.bfloat16);
    case DType::kFloat16:  // on CUDA only: refused by callers
      return;
  }
}

template <class T>
const T* at(const void* base, int64_t i) {
  return static_cast<const T*>(base) + i;
}
template <class T>
T* at(void* base, int64_t i) {
  return static_cast<T*>(base) + i;
}

}  // namespace

Status swiglu(const SwigluParams& p, const ParallelFor& parallel_for) {
  with_loop(p.dtype, [&]<class T>(const SwigluLoop<T>& loop) {
    parallel_for(p.count, kGrainElements, [&](int64_t i, int64_t end) {
      loop.forward(at<T>(p.gate, i), at<T>(p.up, i), at<T>(p.y, i), end - i);
    });
  });
  return Status::kOk;
}

Status swiglu_backward(const SwigluBackwardParams& p, const ParallelFor& parallel_for) {
  with_loop(p.dtype, [&]<class T>(const SwigluLoop<T>& loop) {
    parallel_for(p.count, kGrainElements, [&](int64_t i, int64_t end) {
      loop.backward(at<T>(p.grad_y, i), at<T>(p.gate, i), at<T>(p.up, i), at<T>(p.grad_gate, i), at<T>(p.grad_up, i),
                    end - i);
    });
  });
  return Status::kOk;
}

}  // namespace micro_kernels::cpu
