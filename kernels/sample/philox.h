#pragma once
// Random words from a key and a counter, without state (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
// 3").

#include <array>
#include <cstdint>

namespace micro_kernels {

using Philox = std::array<uint32_t, 4>;

// Philox 4x32 with ten rounds.
inline Philox philox(Philox counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    key = {key[0] + 0x9E3779B9u, key[1] + 0xBB67AE85u};
  }
  return counter;
}

}  // namespace micro_kernels
