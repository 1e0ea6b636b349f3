#pragma once
// One test body for every back end. A program runs the CPU's kernels, or (MICRO_TEST_CUDA) the CUDA kernels: under the
// emulator (MICRO_EMULATED) or on a device.

#include <gtest/gtest.h>

#include <cstring>
#include <optional>
#include <vector>

#include "micro_kernels/dtype.h"
#include "micro_kernels/parallel.h"
#include "micro_kernels/status.h"

#ifdef MICRO_EMULATED
#include "emu/machine.h"
#elif defined(MICRO_TEST_CUDA)
#include <cuda_runtime.h>
#endif

namespace micro_kernels {

#ifdef MICRO_TEST_CUDA
inline constexpr bool kOnDevice = true;
using DeviceElementTypes = testing::Types<float, double, BFloat16, Float16>;
#else
inline constexpr bool kOnDevice = false;
using DeviceElementTypes = testing::Types<float, double, BFloat16>;
#endif

// Memory that kernels of this back end can reach. What a test does not write holds a pattern, never zeros.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : count_(count), memory_(allocate(count * sizeof(T))) {}
  Buffer(const std::vector<T>& values) : Buffer(static_cast<int64_t>(values.size())) { write(values); }  // NOLINT
  Buffer(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : count_(other.count_), memory_(other.memory_) { other.memory_ = nullptr; }
  ~Buffer() {
    if (memory_) release(memory_);
  }

  T* data() const { return static_cast<T*>(memory_); }
  int64_t size() const { return count_; }

  void write(const std::vector<T>& values) {
    ASSERT_EQ(static_cast<int64_t>(values.size()), count_);
    if (count_ > 0) to_device(memory_, values.data(), count_ * sizeof(T));
  }
  // What is there now. Under the emulator every element must have been written by somebody.
  std::vector<T> read() const {
#ifdef MICRO_EMULATED
    const size_t bytes = count_ * sizeof(T), hole = emu::first_unwritten(memory_, bytes);
    EXPECT_EQ(hole, bytes) << "element " << hole / sizeof(T) << " of " << count_ << " was never written";
#endif
    return read_raw();
  }
  std::vector<T> read_raw() const {
    std::vector<T> values(count_);
    if (count_ > 0) from_device(values.data(), memory_, count_ * sizeof(T));
    return values;
  }

 private:
#ifdef MICRO_EMULATED
  static void* allocate(size_t bytes) { return emu::allocate(bytes); }
  static void release(void* memory) { emu::release(memory); }
  static void to_device(void* to, const void* from, size_t bytes) {
    std::memcpy(to, from, bytes);
    emu::written_by_host(to, bytes);
  }
  static void from_device(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
#elif defined(MICRO_TEST_CUDA)
  static void* allocate(size_t bytes) {
    void* memory = nullptr;
    EXPECT_EQ(cudaMalloc(&memory, bytes + 1), cudaSuccess);
    EXPECT_EQ(cudaMemset(memory, 0xff, bytes), cudaSuccess);
    return memory;
  }
  static void release(void* memory) { cudaFree(memory); }
  static void to_device(void* to, const void* from, size_t bytes) {
    EXPECT_EQ(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), cudaSuccess);
  }
  static void from_device(void* to, const void* from, size_t bytes) {
    EXPECT_EQ(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), cudaSuccess);
  }
#else
  static void* allocate(size_t bytes) {
    void* memory = ::operator new(bytes);  // exactly as long as asked for: the address sanitizer sees its end
    std::memset(memory, 0xff, bytes);
    return memory;
  }
  static void release(void* memory) { ::operator delete(memory); }
  static void to_device(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
  static void from_device(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
#endif

  int64_t count_;
  void* memory_;
};

// A pointer for a parameter that may be absent: nullptr for no buffer.
template <class T>
T* data_of(const std::optional<Buffer<T>>& buffer) {
  return buffer ? buffer->data() : nullptr;
}

}  // namespace micro_kernels

// The launcher `op` of this program's back end.
#ifdef MICRO_TEST_CUDA
#define MICRO_RUN(op, ...) ::micro_kernels::cuda::op((__VA_ARGS__), nullptr)
#define MICRO_RUN_WITH_WORKSPACE(op, ...)                                                             \
  [&](const auto& micro_run_params) {                                                                 \
    ::micro_kernels::Buffer<char> workspace(::micro_kernels::cuda::op##_workspace(micro_run_params)); \
    return ::micro_kernels::cuda::op(micro_run_params, workspace.data(), nullptr);                    \
  }(__VA_ARGS__)
#else
#define MICRO_RUN(op, ...) ::micro_kernels::cpu::op((__VA_ARGS__), ::micro_kernels::serial)
#define MICRO_RUN_WITH_WORKSPACE(op, ...) MICRO_RUN(op, __VA_ARGS__)
#endif
