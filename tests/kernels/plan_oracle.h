#pragma once
// Pairs to plan, and their plan by a stable sort.

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace micro_kernels {

struct PlanShape {
  int64_t tokens, k, experts;
};

inline std::string name_of(const PlanShape& s) {
  return std::to_string(s.tokens) + "_K" + std::to_string(s.k) + "_E" + std::to_string(s.experts);
}

struct Plan {
  std::vector<int32_t> tokens, experts, offsets, inverse;
  bool operator==(const Plan&) const = default;
};

struct PlanProblem {
  PlanShape shape;
  std::vector<int32_t> ids;
  std::vector<float> weights;
  std::vector<char> mask;

  explicit PlanProblem(PlanShape s) : shape(s), mask(s.tokens) {
    std::mt19937 random(static_cast<unsigned>(s.tokens * 10 + s.k));
    for (int64_t pair = 0; pair < s.tokens * s.k; ++pair) {
      ids.push_back(static_cast<int32_t>(random() % std::max<int64_t>(1, s.experts - 1)));  // the last one stays empty
      weights.push_back(random() % 5 == 0 ? (random() % 2 ? 0.0f : -0.0f) : 0.5f);
    }
    for (auto& m : mask) m = random() % 7 != 0;
  }

  bool idle(int64_t pair) const { return weights[pair] == 0 || !mask[pair / shape.k]; }

  Plan oracle() const {
    const int64_t pairs = shape.tokens * shape.k;
    std::vector<int32_t> order(pairs);
    std::iota(order.begin(), order.end(), 0);
    const auto bin = [this](int32_t pair) { return idle(pair) ? static_cast<int32_t>(shape.experts) : ids[pair]; };
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return bin(a) < bin(b); });
    Plan r{{}, {}, std::vector<int32_t>(shape.experts + 1, 0), std::vector<int32_t>(pairs)};
    for (int64_t row = 0; row < pairs; ++row) {
      r.tokens.push_back(static_cast<int32_t>(order[row] / shape.k));
      r.experts.push_back(ids[order[row]]);
      r.inverse[order[row]] = static_cast<int32_t>(row);
      for (int64_t e = bin(order[row]) + 1; e <= shape.experts; ++e) ++r.offsets[e];
    }
    return r;
  }
};

}  // namespace micro_kernels
