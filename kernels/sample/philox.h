#pragma once
// Random numbers from a key and a counter, without state (Salmon et al. 2011, "Parallel random numbers: as easy as 1,
// 2, 3"). The same for every device.

#include <cstdint>

#include "micro_kernels/dtype.h"

namespace micro_kernels {

struct Philox {
  uint32_t word[4];
  bool operator==(const Philox&) const = default;
};
struct PhiloxKey {
  uint32_t word[2];
};

// Philox 4x32 with ten rounds.
MICRO_HOST_DEVICE inline Philox philox(Philox counter, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter.word[0], b = uint64_t{0xCD9E8D57} * counter.word[2];
    counter = {{static_cast<uint32_t>(b >> 32) ^ counter.word[1] ^ key.word[0], static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ counter.word[3] ^ key.word[1], static_cast<uint32_t>(a)}};
    key = {{key.word[0] + 0x9E3779B9u, key.word[1] + 0xBB67AE85u}};
  }
  return counter;
}

// A number in [0, 1), a multiple of 2^-53: key = seed, counter = step.
MICRO_HOST_DEVICE inline double philox_uniform(int64_t seed, int64_t step) {
  const auto low = [](int64_t x) { return static_cast<uint32_t>(x); };
  const auto high = [](int64_t x) { return static_cast<uint32_t>(static_cast<uint64_t>(x) >> 32); };
  const Philox random = philox({{low(step), high(step), 0, 0}}, {{low(seed), high(seed)}});
  return static_cast<double>((uint64_t{random.word[0]} << 32 | random.word[1]) >> 11) * 0x1p-53;
}

}  // namespace micro_kernels
