#pragma once
// For the tests of the emulator: its memory, and what it says of a launch.

#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "common/cuda/launch.cuh"
#include "emu/machine.h"

namespace micro_kernels::cuda {

inline constexpr int kThreads = 64;

// Memory of the device; `values` written by the host, or nothing yet.
template <class T>
class Device {
 public:
  explicit Device(int64_t count) : count_(count), data_(static_cast<T*>(emu::allocate(count * sizeof(T)))) {}
  explicit Device(const std::vector<T>& values) : Device(static_cast<int64_t>(values.size())) {
    std::memcpy(data_, values.data(), values.size() * sizeof(T));
    emu::written_by_host(data_, values.size() * sizeof(T));
  }
  Device(const Device&) = delete;
  ~Device() { emu::release(data_); }
  T* data() const { return data_; }
  bool all_written() const { return emu::first_unwritten(data_, count_ * sizeof(T)) == count_ * sizeof(T); }
  std::vector<T> read() const { return {data_, data_ + count_}; }

 private:
  int64_t count_;
  T* data_;
};

inline std::vector<float> counted(int64_t count) {
  std::vector<float> values(count);
  std::iota(values.begin(), values.end(), 1.0f);
  return values;
}

struct Arrays {
  const float* x;
  float* y;
  int64_t stride = 1;
};

}  // namespace micro_kernels::cuda
