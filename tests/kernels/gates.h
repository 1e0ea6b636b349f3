#pragma once
// What a launch may move, as the emulator counts it.

#include <gtest/gtest.h>

#include <cstdio>
#include <string>
#include <vector>

#include "backend.h"
#include "emu/machine.h"

namespace micro_kernels {

// In bytes. `least`: what the definition makes any kernel move, inputs read once and outputs written once. `again`:
// what this kernel reads more than once on purpose, because it is small or has just been read, and so comes from a
// cache.
struct Traffic {
  double least, again = 0;
};

inline constexpr double kMostTraffic = 1.15;  // over the least
inline constexpr double kMostSectors = 1.1;   // that requests touch, over those of requests that lie dense

template <class Body>
std::vector<emu::LaunchRecord> counted_launches(const Body& body) {
  emu::set_seeds(1);
  emu::start_record(true);
  EXPECT_EQ(body(), Status::kOk);
  return emu::recorded();
}

// One line per launch in the program's output: the name, and the three ratios that have a limit.
inline void expect_traffic(const emu::LaunchRecord& launch, const Traffic& traffic) {
  const emu::Accounts& a = launch.accounts;
  const double moved = 32.0 * static_cast<double>(a.distinct_sectors) / traffic.least;
  const double asked = 32.0 * static_cast<double>(a.sectors) / (traffic.least + traffic.again);
  const double spread = static_cast<double>(a.sectors) / static_cast<double>(a.ideal_sectors);
  std::printf("%s;%.3f;%.3f;%.3f\n", launch.kernel.c_str(), moved, asked, spread);
  EXPECT_GE(moved, 0.999) << launch.kernel << ": moves less than the least, so the least is wrong";
  EXPECT_LE(moved, kMostTraffic) << launch.kernel << ": memory touched at all, over the least";
  EXPECT_LE(asked, kMostTraffic) << launch.kernel << ": memory asked for, over the least and what is read again";
  EXPECT_LE(spread, kMostSectors) << launch.kernel << ": sectors over those of dense requests";
}

// The launches of one operator, in their order.
template <class Body>
void expect_launches(const std::vector<Traffic>& traffic, const Body& body) {
  const std::vector<emu::LaunchRecord> launches = counted_launches(body);
  ASSERT_EQ(launches.size(), traffic.size());
  for (size_t i = 0; i < traffic.size(); ++i) expect_traffic(launches[i], traffic[i]);
}

}  // namespace micro_kernels
