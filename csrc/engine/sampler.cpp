#include "engine/sampler.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

#include "micro_kernels/sample.h"
#include "ops/common.h"

namespace micro::engine {
namespace {

void check_numbers(const Sampling& s) {
  using micro_kernels::kColdest;
  TORCH_CHECK_VALUE(s.temperature == 0 || (std::isfinite(s.temperature) && s.temperature >= kColdest),
                    "Engine: temperature is ", s.temperature,
                    ", expected 0 (the most probable token) or a number from ", kColdest, " on");
  TORCH_CHECK_VALUE(s.top_k >= 0, "Engine: top_k is ", s.top_k, ", expected a number of tokens, or 0 for all");
  TORCH_CHECK_VALUE(s.top_p > 0 && s.top_p <= 1, "Engine: top_p is ", s.top_p, ", expected a share in (0, 1]");
  TORCH_CHECK_VALUE(std::isfinite(s.repetition_penalty) && s.repetition_penalty > 0, "Engine: repetition_penalty is ",
                    s.repetition_penalty, ", expected a number above 0");
}

}  // namespace

Sampler::Sampler(const GenerateOptions& options, const std::vector<int64_t>& stop_ids, int64_t rows, int64_t vocabulary)
    : sampling_(options.sampling),
      stop_ids_(stop_ids),
      min_new_tokens_(options.min_new_tokens),
      vocabulary_(vocabulary),
      rows_(static_cast<size_t>(rows)) {
  const auto given = static_cast<int64_t>(sampling_.size());
  TORCH_CHECK_VALUE(given == 1 || given == rows, "Engine: sampling is given for ", given,
                    " rows, expected 1 (for all) or ", rows);
  TORCH_CHECK_VALUE(min_new_tokens_ >= 0, "Engine: min_new_tokens is ", min_new_tokens_, ", expected a number >= 0");
  for (const Sampling& sampling : sampling_) check_numbers(sampling);
  for (int64_t row = 0; row < rows; ++row)
    if (of(row).repetition_penalty != 1)
      rows_[static_cast<size_t>(row)].known.assign(static_cast<size_t>(vocabulary), false);
}

void Sampler::see(int64_t row, int64_t token) {
  Row& own = rows_[static_cast<size_t>(row)];
  if (own.known.empty() || own.known[static_cast<size_t>(token)]) return;
  own.known[static_cast<size_t>(token)] = true;
  own.seen.push_back(token);
}

void Sampler::draw(const at::Tensor& logits, const std::vector<int64_t>& rows, const std::vector<int64_t>& steps,
                   std::vector<int64_t>& ids) {
  const auto count = static_cast<int64_t>(rows.size());
  ids.resize(rows.size());
  if (sampling_.size() == 1) return draw_some(logits, rows, steps.data(), 0, count, ids.data());
  for (int64_t b = 0; b < count; ++b) draw_some(logits, rows, steps.data(), b, 1, ids.data());
}

void Sampler::draw_some(const at::Tensor& logits, const std::vector<int64_t>& rows, const int64_t* steps, int64_t first,
                        int64_t count, int64_t* ids) {
  const Sampling& s = of(rows[static_cast<size_t>(first)]);
  const auto row_of = [&](int64_t b) { return rows[static_cast<size_t>(first + b)]; };
  size_t longest = 0;
  for (int64_t b = 0; b < count; ++b) longest = std::max(longest, rows_[static_cast<size_t>(row_of(b))].seen.size());
  previous_.assign(static_cast<size_t>(count) * longest, -1);  // which is no token
  seeds_.resize(static_cast<size_t>(count));
  for (int64_t b = 0; b < count; ++b) {
    const auto& seen = rows_[static_cast<size_t>(row_of(b))].seen;
    std::copy(seen.begin(), seen.end(), previous_.begin() + b * static_cast<int64_t>(longest));
    const uint64_t seed = s.seed + (sampling_.size() == 1 ? static_cast<uint64_t>(row_of(b)) : 0);
    seeds_[static_cast<size_t>(b)] = static_cast<int64_t>(seed);
  }
  const char* from = static_cast<const char*>(logits.const_data_ptr()) + first * vocabulary_ * logits.element_size();
  check("Engine", micro_kernels::cpu::sample({.logits = from,
                                              .previous = previous_.data(),
                                              .stop_ids = stop_ids_.data(),
                                              .seeds = seeds_.data(),
                                              .steps = steps + first,
                                              .ids = ids + first,
                                              .rows = count,
                                              .vocab = vocabulary_,
                                              .previous_count = static_cast<int64_t>(longest),
                                              .stop_count = static_cast<int64_t>(stop_ids_.size()),
                                              .min_new_tokens = min_new_tokens_,
                                              .top_k = s.top_k,
                                              .top_p = s.top_p,
                                              .temperature = s.temperature,
                                              .repetition_penalty = s.repetition_penalty,
                                              .dtype = kernel_dtype("Engine", logits)},
                                             parallel_for));
}

}  // namespace micro::engine
