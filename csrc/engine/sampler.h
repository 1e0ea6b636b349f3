#pragma once
// Draws the next token of every row.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "micro/engine.h"

namespace micro::engine {

class Sampler {
 public:
  // sampling: one for all rows (row r draws with seed + r), or one per row. Throws ValueError.
  Sampler(const std::vector<Sampling>& sampling, int64_t rows, int64_t vocabulary);

  // Tokens that the repetition penalty of a row knows.
  void see(int64_t row, int64_t token);

  // The token of row `row`, its draw number `step`, from its logits [V] (float32 or float64).
  int64_t draw(int64_t row, int64_t step, const at::Tensor& logits);

 private:
  struct Row {
    Sampling sampling;
    std::vector<int32_t> seen;  // distinct
    std::vector<bool> known;    // [V], where there is a penalty
  };
  std::vector<Row> rows_;
};

}  // namespace micro::engine
