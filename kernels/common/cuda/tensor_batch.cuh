#pragma once
// Many tensors in few launches: a kernel takes a batch of them by value, and each of its blocks one chunk of one
// tensor. Where chunks begin depends on the tensors' sizes only.

#include <algorithm>
#include <cstdint>

#include "common/cuda/launch.cuh"

namespace micro_kernels::cuda {

inline constexpr int64_t kChunkElements = 8192;

// kMost: as many as fit into a kernel's parameters, 4 KiB together with whatever else the kernel takes.
template <class Tensor, int kMost>
struct TensorBatch {
  Tensor tensors[kMost];  // each has a `size`
  int32_t first_chunk[kMost + 1] = {};
  int32_t count = 0;

  bool add(const Tensor& tensor) {  // false: the batch is full now
    tensors[count] = tensor;
    first_chunk[count + 1] = first_chunk[count] + static_cast<int32_t>(ceil_div(tensor.size, kChunkElements));
    return ++count < kMost;
  }
  int32_t chunks() const { return first_chunk[count]; }

  // The tensor that a chunk belongs to.
  __device__ __forceinline__ int tensor_of(int32_t chunk) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_chunk[middle] <= chunk)
        low = middle;
      else
        high = middle;
    }
    return low;
  }
};

// Fills batches with entry(tensor) of all tensors of one type, in their order, and starts each: start(batch).
template <class Batch, class Tensor, class Entry, class Start>
Status in_batches(const Tensor* tensors, int64_t count, DType dtype, const Entry& entry, const Start& start) {
  Batch batch;
  for (int64_t t = 0; t < count; ++t) {
    if (tensors[t].dtype != dtype || tensors[t].size == 0) continue;
    if (batch.add(entry(tensors[t]))) continue;
    if (const Status status = start(batch); status != Status::kOk) return status;
    batch = {};
  }
  return batch.count > 0 ? start(batch) : Status::kOk;
}

// Calls body(dtype) for every type that CUDA kernels compute in, until one fails.
template <class Body>
Status for_each_device_type(const Body& body) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16})
    if (const Status status = body(dtype); status != Status::kOk) return status;
  return Status::kOk;
}

}  // namespace micro_kernels::cuda
