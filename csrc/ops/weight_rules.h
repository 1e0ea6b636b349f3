#pragma once
// Weight rules by name, as Python gives them, and as the kernels take them.

#include <c10/util/Exception.h>

#include <array>
#include <string>
#include <string_view>
#include <utility>

#include "micro/route.h"
#include "micro_kernels/route.h"

namespace micro {

inline constexpr std::array<std::pair<std::string_view, WeightRule>, 3> kWeightRules{{
    {"renormalized", WeightRule::kRenormalized},
    {"probability", WeightRule::kProbability},
    {"straight_through", WeightRule::kStraightThrough},
}};

inline std::string_view rule_name(WeightRule rule) {
  for (const auto& [name, value] : kWeightRules)
    if (value == rule) return name;
  TORCH_INTERNAL_ASSERT(false, "unnamed weight rule");
}

inline micro_kernels::WeightRule kernel_rule(const char* function, std::string_view rule) {
  for (const auto& [name, value] : kWeightRules) {
    if (name != rule) continue;
    switch (value) {
      case WeightRule::kRenormalized:
        return micro_kernels::WeightRule::kRenormalized;
      case WeightRule::kProbability:
        return micro_kernels::WeightRule::kProbability;
      case WeightRule::kStraightThrough:
        return micro_kernels::WeightRule::kStraightThrough;
    }
  }
  TORCH_CHECK_VALUE(false, function, ": weight_rule must be renormalized, probability or straight_through, got '",
                    std::string(rule), "'");
}

}  // namespace micro
