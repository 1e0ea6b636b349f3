#include <algorithm>
#include <atomic>
#include <vector>

#include "micro_kernels/plan.h"

namespace micro_kernels::cpu {
namespace {

constexpr int64_t kChunkPairs = 16 * 1024;  // pairs that one thread counts and places before it takes the next chunk

// The bin of a pair: its expert, or expert_count where it is idle.
template <class T>
int64_t bin_of(const PlanParams& p, int64_t token, int64_t pair) {
  using Acc = accumulator_t<T>;
  const bool padded = p.mask && !p.mask[token];
  const bool weightless = p.weights && static_cast<Acc>(static_cast<const T*>(p.weights)[pair]) == 0;
  return padded || weightless ? p.expert_count : p.ids[pair];
}

// One count per bin over the tokens [begin, end). False: an id lies outside.
template <class T>
bool count(const PlanParams& p, int64_t begin, int64_t end, int32_t* counts) {
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t pair = token * p.k; pair < (token + 1) * p.k; ++pair) {
      if (p.ids[pair] < 0 || p.ids[pair] >= p.expert_count) return false;
      ++counts[bin_of<T>(p, token, pair)];
    }
  }
  return true;
}

// Puts the pairs of the tokens [begin, end) at the next free row of their bin.
template <class T>
void place(const PlanParams& p, int64_t begin, int64_t end, int32_t* next_row) {
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t pair = token * p.k; pair < (token + 1) * p.k; ++pair) {
      const int32_t row = next_row[bin_of<T>(p, token, pair)]++;
      p.tokens[row] = static_cast<int32_t>(token);
      p.experts[row] = p.ids[pair];
      p.inverse[pair] = row;
    }
  }
}

// Counts [chunks, bins] become first rows: bins one after the other, inside a bin the chunks in order. That is what
// makes the sort stable, and its result the same for any number of chunks and threads.
void counts_to_first_rows(const PlanParams& p, int64_t chunks, std::vector<int32_t>& counts) {
  const int64_t bins = p.expert_count + 1;
  int32_t row = 0;
  for (int64_t bin = 0; bin < bins; ++bin) {
    p.offsets[bin] = row;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int32_t here = counts[chunk * bins + bin];
      counts[chunk * bins + bin] = row;
      row += here;
    }
  }
}

}  // namespace

Status plan(const PlanParams& p, const ParallelFor& parallel_for) {
  const int64_t bins = p.expert_count + 1;
  const int64_t chunk_tokens = std::max<int64_t>(1, kChunkPairs / p.k);
  const int64_t chunks = (p.token_count + chunk_tokens - 1) / chunk_tokens;
  std::vector<int32_t> rows(chunks * bins, 0);
  std::atomic<bool> inside = true;
  dispatch(p.dtype, [&]<class T>() {
    const auto token_end = [&](int64_t chunk) { return std::min((chunk + 1) * chunk_tokens, p.token_count); };
    parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        if (!count<T>(p, c * chunk_tokens, token_end(c), rows.data() + c * bins)) inside = false;
    });
    if (!inside) return;
    counts_to_first_rows(p, chunks, rows);
    parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) place<T>(p, c * chunk_tokens, token_end(c), rows.data() + c * bins);
    });
  });
  return inside ? Status::kOk : Status::kIndexOutOfRange;
}

}  // namespace micro_kernels::cpu
