#pragma once
// A buffer whose elements begin `offset` elements after its memory does, as those of a view may: then rows do not lie
// on vectors of 16 bytes, and kernels move single elements.

#include <vector>

#include "backend.h"

namespace micro_kernels {

template <class T>
class OffsetBuffer {
 public:
  OffsetBuffer(int64_t count, int64_t offset) : offset_(offset), memory_(count + offset) {}
  OffsetBuffer(std::vector<T> values, int64_t offset) : OffsetBuffer(static_cast<int64_t>(values.size()), offset) {
    values.insert(values.begin(), offset, T());
    memory_.write(values);
  }
  T* data() const { return memory_.data() + offset_; }
  std::vector<T> read() const {
    if (offset_ == 0) return memory_.read();
    std::vector<T> values = memory_.read_raw();
    values.erase(values.begin(), values.begin() + offset_);
    return values;
  }

 private:
  int64_t offset_;
  Buffer<T> memory_;
};

}  // namespace micro_kernels
