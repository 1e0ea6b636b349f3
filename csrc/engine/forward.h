#pragma once
// One pass of the model over new tokens of all rows: embedding, layers, head.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "engine/cache.h"
#include "engine/controls.h"
#include "engine/memory.h"
#include "engine/weights.h"
#include "micro/engine.h"
#include "micro_kernels/block_forward.h"

namespace micro::engine {

class ActionTable;
class TraceRecorder;

// New tokens of every row of the cache: row b has the first counts[b] of `slots` columns.
struct Tokens {
  const int64_t* ids;  // [rows, slots]; anything behind a row's count
  const int32_t* counts;
  const int64_t* origins;  // the caller's number of each row: what traces are filed under
  int64_t rows, slots;
};

class Forward {
 public:
  Forward(const ModelConfig& config, const Weights& weights, Numerics numerics);

  const micro_kernels::BlockShape& shape() const { return shape_; }
  int64_t max_position() const { return positions_; }

  // Makes rotary tables for so many slots.
  void reserve(int64_t slots);

  // Appends the tokens to the cache. `trace` and `actions` may be nullptr.
  void run(const Tokens& tokens, const BoundControls& controls, int64_t experts_per_token, Cache& cache,
           TraceRecorder* trace, ActionTable* actions = nullptr);

  // Logits of columns of the last run, [count, V] in the accumulator type: token row[i], column[i].
  void logits(const std::vector<int64_t>& row, const std::vector<int64_t>& column, at::Tensor& out);

 private:
  struct Buffers {  // of one run, pieces of one workspace
    char *x, *y, *ids, *weights, *probs, *effective, *raw, *block;
    int32_t* position;
    bool* real;
  };

  micro_kernels::BlockForwardParams params(const Tokens& tokens, int64_t experts_per_token, Cache& cache, bool traced,
                                           const micro_kernels::BlockHooks* hooks);
  Buffers divide(const micro_kernels::BlockForwardParams& params);
  void embed(const Tokens& tokens, char* x) const;
  void place(const Tokens& tokens, const Cache& cache, micro_kernels::BlockForwardParams& params);
  void make_due(int64_t layer, Cache& cache);
  void make_keys(int64_t layer, int64_t row, int64_t expert, int32_t end, Cache& cache);

  const ModelConfig& config_;
  const Weights& weights_;
  micro_kernels::BlockShape shape_;
  micro_kernels::WeightRule rule_;
  int64_t element_, wide_;      // bytes of an element and of an accumulator
  at::Tensor ones_;             // [E, H]: the gain of a norm whose own is folded
  at::Tensor cos_, sin_;        // [positions, D / 2]
  std::vector<int32_t> slots_;  // 0, 1, 2, ...: the position of a slot
  int64_t positions_ = 0;
  Mapping workspace_, head_space_, key_space_;
  Buffers buffers_{};
  int64_t columns_ = 0;
};

}  // namespace micro::engine
