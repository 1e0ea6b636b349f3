#include "engine/sampler.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace micro::engine {
namespace {

void check(const Sampling& s) {
  TORCH_CHECK_VALUE(std::isfinite(s.temperature) && s.temperature >= 0, "Engine: temperature is ", s.temperature,
                    ", expected a number >= 0 (0: the most probable token)");
  TORCH_CHECK_VALUE(s.top_k >= 0, "Engine: top_k is ", s.top_k, ", expected a number of tokens, or 0 for all");
  TORCH_CHECK_VALUE(s.top_p > 0 && s.top_p <= 1, "Engine: top_p is ", s.top_p, ", expected a share in (0, 1]");
  TORCH_CHECK_VALUE(std::isfinite(s.repetition_penalty) && s.repetition_penalty > 0, "Engine: repetition_penalty is ",
                    s.repetition_penalty, ", expected a number above 0");
}

// SplitMix64 (Steele, Lea and Flood 2014) of a counter: a number in [0, 1) for each (seed, step).
double uniform(uint64_t seed, uint64_t step) {
  const auto mixed = [](uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  };
  const uint64_t stream = mixed(seed + 0x9e3779b97f4a7c15u);
  return static_cast<double>(mixed(stream + (step + 1) * 0x9e3779b97f4a7c15u) >> 11) * 0x1.0p-53;
}

struct Candidate {
  double score;  // NaN counts as -inf
  int64_t id;
};

// Heaps have the largest score, and of equal ones the lowest id, in front.
bool behind(const Candidate& a, const Candidate& b) { return a.score != b.score ? a.score < b.score : a.id > b.id; }

// The candidate at which the sum of weights, from the first on, exceeds share * total.
int64_t pick(const std::vector<Candidate>& candidates, const std::vector<double>& weights, double total, double share) {
  double sum = 0;
  for (size_t i = 0; i < candidates.size(); ++i) {
    sum += weights[i];
    if (sum > share * total) return candidates[i].id;
  }
  return candidates.back().id;
}

}  // namespace

Sampler::Sampler(const std::vector<Sampling>& sampling, int64_t rows, int64_t vocabulary) {
  TORCH_CHECK_VALUE(sampling.size() == 1 || static_cast<int64_t>(sampling.size()) == rows,
                    "Engine: sampling is given for ", sampling.size(), " rows, expected 1 (for all) or ", rows);
  for (int64_t row = 0; row < rows; ++row) {
    Row own{
        .sampling = sampling.size() == 1 ? sampling[0] : sampling[static_cast<size_t>(row)], .seen = {}, .known = {}};
    check(own.sampling);
    if (sampling.size() == 1) own.sampling.seed += static_cast<uint64_t>(row);
    if (own.sampling.repetition_penalty != 1) own.known.assign(static_cast<size_t>(vocabulary), false);
    rows_.push_back(std::move(own));
  }
}

void Sampler::see(int64_t row, int64_t token) {
  Row& own = rows_[static_cast<size_t>(row)];
  if (own.known.empty() || own.known[static_cast<size_t>(token)]) return;
  own.known[static_cast<size_t>(token)] = true;
  own.seen.push_back(static_cast<int32_t>(token));
}

// The order of transformers: penalty, temperature, top-k, top-p.
int64_t Sampler::draw(int64_t row, int64_t step, const at::Tensor& logits) {
  const Row& own = rows_[static_cast<size_t>(row)];
  const Sampling& s = own.sampling;
  const int64_t vocabulary = logits.size(0);
  std::vector<Candidate> candidates(static_cast<size_t>(vocabulary));
  for (int64_t id = 0; id < vocabulary; ++id) {
    const double score = logits.scalar_type() == at::kDouble ? logits.const_data_ptr<double>()[id]
                                                             : static_cast<double>(logits.const_data_ptr<float>()[id]);
    candidates[static_cast<size_t>(id)] = {std::isnan(score) ? -std::numeric_limits<double>::infinity() : score, id};
  }
  for (const int32_t id : own.seen) {
    double& score = candidates[static_cast<size_t>(id)].score;
    score = score > 0 ? score / s.repetition_penalty : score * s.repetition_penalty;
  }
  const Candidate best = *std::max_element(candidates.begin(), candidates.end(), behind);
  if (s.temperature == 0 || std::isinf(best.score)) return best.id;
  double total = 0;
  std::vector<double> weights;
  const auto weight = [&](const Candidate& c) { return std::exp((c.score - best.score) / s.temperature); };
  if (s.top_k == 0 && s.top_p == 1) {
    for (const Candidate& c : candidates) total += weights.emplace_back(weight(c));
    return pick(candidates, weights, total, uniform(s.seed, static_cast<uint64_t>(step)));
  }
  if (s.top_k > 0 && s.top_k < vocabulary) {
    std::nth_element(candidates.begin(), candidates.begin() + (s.top_k - 1), candidates.end(),
                     [](const Candidate& a, const Candidate& b) { return behind(b, a); });
    candidates.resize(static_cast<size_t>(s.top_k));
  }
  for (const Candidate& c : candidates) total += weight(c);
  std::make_heap(candidates.begin(), candidates.end(), behind);
  std::vector<Candidate> kept;
  double sum = 0;
  while (!candidates.empty() && (kept.empty() || sum < s.top_p * total)) {
    std::pop_heap(candidates.begin(), candidates.end(), behind);
    kept.push_back(candidates.back());
    candidates.pop_back();
    sum += weights.emplace_back(weight(kept.back()));
  }
  return pick(kept, weights, sum, uniform(s.seed, static_cast<uint64_t>(step)));
}

}  // namespace micro::engine
