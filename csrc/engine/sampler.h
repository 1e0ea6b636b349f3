#pragma once
// Draws the next token of every row.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "micro/engine.h"

namespace micro::engine {

class Sampler {
 public:
  // Throws ValueError.
  Sampler(const GenerateOptions& options, const std::vector<int64_t>& stop_ids, int64_t rows, int64_t vocabulary);

  // Tokens that the repetition penalty of a row knows.
  void see(int64_t row, int64_t token);

  // ids[b] is the token number steps[b] of row rows[b], from logits [>= rows.size(), V] (float32 or float64).
  void draw(const at::Tensor& logits, const std::vector<int64_t>& rows, const std::vector<int64_t>& steps,
            std::vector<int64_t>& ids);

 private:
  struct Row {
    std::vector<int64_t> seen;  // distinct
    std::vector<bool> known;    // [V], where there is a penalty
  };
  const Sampling& of(int64_t row) const { return sampling_[sampling_.size() == 1 ? 0 : static_cast<size_t>(row)]; }
  // Rows [first, first + count) of the call, which share their options.
  void draw_some(const at::Tensor& logits, const std::vector<int64_t>& rows, const int64_t* steps, int64_t first,
                 int64_t count, int64_t* ids);

  std::vector<Sampling> sampling_;  // one for all rows, or one per row
  std::vector<int64_t> stop_ids_;
  int64_t min_new_tokens_, vocabulary_;
  std::vector<Row> rows_;
  std::vector<int64_t> seeds_, previous_;
};

}  // namespace micro::engine
