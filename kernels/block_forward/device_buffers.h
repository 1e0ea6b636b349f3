#pragma once
// Working memory of a layer's launches, and what they ask of parameters: host code of the .cu files.

#include <algorithm>
#include <cstdint>

#include "micro_kernels/block_forward.h"

namespace micro_kernels::cuda {

inline int64_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}
inline int64_t accumulator_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }
inline DType accumulator_of(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// Pieces of aligned memory, one behind the other. With base nullptr it only counts.
class DeviceArena {
 public:
  explicit DeviceArena(void* base) : base_(static_cast<char*>(base)) {}

  char* take(int64_t count, int64_t bytes) {
    constexpr int64_t kLine = 128;
    const int64_t at = used_;
    used_ += (count * bytes + kLine - 1) / kLine * kLine;
    peak_ = std::max(peak_, used_);
    return base_ ? base_ + at : nullptr;
  }
  int32_t* integers(int64_t count) { return reinterpret_cast<int32_t*>(take(count, sizeof(int32_t))); }
  int64_t used() const { return used_; }
  void rewind(int64_t used) { used_ = used; }
  int64_t peak() const { return peak_; }

 private:
  char* base_;
  int64_t used_ = 0, peak_ = 0;
};

// The experts' matrices [experts, out, in] as one tensor; nullptr where they do not lie one behind the other as plain
// parameters.
inline const void* stacked(const Matrix* matrices, int64_t experts, int64_t elements, DType dtype) {
  const char* first = static_cast<const char*>(matrices[0].data);
  for (int64_t e = 0; e < experts; ++e)
    if (matrices[e].format != WeightFormat::kPlain || matrices[e].data != first + e * elements * element_bytes(dtype))
      return nullptr;
  return first;
}

}  // namespace micro_kernels::cuda
