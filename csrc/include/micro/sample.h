#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace micro {

// How the next token is chosen. B rows, V ids.
struct SampleOptions {
  double temperature = 0.0;         // 0: the largest logit; top_k and top_p then change nothing
  int64_t top_k = 0;                // 0: all; else the k largest, and those equal to the last of them
  double top_p = 1.0;               // the largest that together have this share of the probability, at least one
  double repetition_penalty = 1.0;  // divides logits of previous ids where they are positive, multiplies negative ones
  int64_t min_new_tokens = 0;       // rows with fewer steps than this get no stop id
  std::optional<at::Tensor> previous = {};  // [B, P] int64, ids of the row so far; those outside 0 .. V - 1 are skipped
  std::optional<at::Tensor> stop_ids = {};  // [n] int64
  std::optional<at::Tensor> seeds = {};     // [B] int64, one per row; needed where temperature > 0
  std::optional<at::Tensor> steps = {};     // [B] int64, tokens the row has been given; with seeds or min_new_tokens
};

// The next token of each row: the distribution of transformers' processors, in their order: repetition penalty, stop
// ids, temperature, top-k, top-p.
//
// logits: [B, V], float32, float64 or bfloat16; computed in float32 (float64 for float64). Of equal logits the lowest
//         id; NaN is chosen only in a row that holds nothing else.
//
// Returns [B] int64. A draw depends on the row's logits, seed and step, and on nothing else in the batch: Philox
// 4x32-10 with the seed as key and the step as counter gives u in [0, 1), which is looked up in the probabilities
// summed in the order of ids. No gradient. Throws ValueError or TypeError that names the argument.
//
//   at::Tensor ids = micro::sample(logits, {.temperature = 0.8, .top_p = 0.95, .seeds = seeds, .steps = steps});
at::Tensor sample(const at::Tensor& logits, const SampleOptions& options = {});

}  // namespace micro
