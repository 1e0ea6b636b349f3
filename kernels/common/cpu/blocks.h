#pragma once
// Many tensors as one list of blocks of fixed size, so that threads share the work evenly and no sum depends on how
// many of them there are.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace micro_kernels::cpu {

constexpr int64_t kBlockElements = 32 * 1024;  // 128 KiB of float32: long streams, and enough blocks for all threads

struct Block {
  int64_t tensor, begin, end;
};

template <class Tensor>
std::vector<Block> blocks_of(const Tensor* tensors, int64_t count) {
  std::vector<Block> blocks;
  for (int64_t t = 0; t < count; ++t)
    for (int64_t begin = 0; begin < tensors[t].size; begin += kBlockElements)
      blocks.push_back({t, begin, std::min(begin + kBlockElements, tensors[t].size)});
  return blocks;
}

}  // namespace micro_kernels::cpu
