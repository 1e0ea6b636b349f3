#include "probe.h"

#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace probe {
namespace {

constexpr int64_t kBytes = int64_t{512} << 20;  // far above the last cache
constexpr int64_t kSteps = 25'000'000;

volatile float sink;  // what the loops computed goes here, so that no compiler drops them

// Runs body(thread) on `threads` threads and returns the seconds from the first start to the last end.
double side_by_side(int threads, const std::function<void(int)>& body) {
  const double begin = seconds();
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(body, t);
  body(0);
  for (std::thread& other : others) other.join();
  return seconds() - begin;
}

#if defined(__x86_64__)
// Twenty chains hide the latency of two units: the next step of a chain waits for its last. The empty asm statements
// hide that all chains start alike.
struct Sums512 {
  __m512 a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9;
};
struct Sums256 {
  __m256 a0, a1, a2, a3, a4, a5, b0, b1, b2, b3, b4, b5;  // of sixteen registers
};

__attribute__((target("avx512f"))) double float32_avx512(int64_t steps) {
  Sums512 s = {};
  asm(""
      : "+v"(s.a0), "+v"(s.a1), "+v"(s.a2), "+v"(s.a3), "+v"(s.a4), "+v"(s.a5), "+v"(s.a6), "+v"(s.a7), "+v"(s.a8),
        "+v"(s.a9));
  asm(""
      : "+v"(s.b0), "+v"(s.b1), "+v"(s.b2), "+v"(s.b3), "+v"(s.b4), "+v"(s.b5), "+v"(s.b6), "+v"(s.b7), "+v"(s.b8),
        "+v"(s.b9));
  const __m512 x = _mm512_set1_ps(0.5f), y = _mm512_set1_ps(1.5f);
  for (int64_t i = 0; i < steps; ++i) {
    s.a0 = _mm512_fmadd_ps(x, y, s.a0);
    s.a1 = _mm512_fmadd_ps(x, y, s.a1);
    s.a2 = _mm512_fmadd_ps(x, y, s.a2);
    s.a3 = _mm512_fmadd_ps(x, y, s.a3);
    s.a4 = _mm512_fmadd_ps(x, y, s.a4);
    s.a5 = _mm512_fmadd_ps(x, y, s.a5);
    s.a6 = _mm512_fmadd_ps(x, y, s.a6);
    s.a7 = _mm512_fmadd_ps(x, y, s.a7);
    s.a8 = _mm512_fmadd_ps(x, y, s.a8);
    s.a9 = _mm512_fmadd_ps(x, y, s.a9);
    s.b0 = _mm512_fmadd_ps(x, y, s.b0);
    s.b1 = _mm512_fmadd_ps(x, y, s.b1);
    s.b2 = _mm512_fmadd_ps(x, y, s.b2);
    s.b3 = _mm512_fmadd_ps(x, y, s.b3);
    s.b4 = _mm512_fmadd_ps(x, y, s.b4);
    s.b5 = _mm512_fmadd_ps(x, y, s.b5);
    s.b6 = _mm512_fmadd_ps(x, y, s.b6);
    s.b7 = _mm512_fmadd_ps(x, y, s.b7);
    s.b8 = _mm512_fmadd_ps(x, y, s.b8);
    s.b9 = _mm512_fmadd_ps(x, y, s.b9);
  }
  sink = (s.a0 + s.a1 + s.a2 + s.a3 + s.a4 + s.a5 + s.a6 + s.a7 + s.a8 + s.a9 + s.b0 + s.b1 + s.b2 + s.b3 + s.b4 +
          s.b5 + s.b6 + s.b7 + s.b8 + s.b9)[0];
  return 2.0 * 16 * 20 * static_cast<double>(steps);
}

__attribute__((target("avx512f,avx512bf16"))) double bfloat16_avx512(int64_t steps) {
  Sums512 s = {};
  asm(""
      : "+v"(s.a0), "+v"(s.a1), "+v"(s.a2), "+v"(s.a3), "+v"(s.a4), "+v"(s.a5), "+v"(s.a6), "+v"(s.a7), "+v"(s.a8),
        "+v"(s.a9));
  asm(""
      : "+v"(s.b0), "+v"(s.b1), "+v"(s.b2), "+v"(s.b3), "+v"(s.b4), "+v"(s.b5), "+v"(s.b6), "+v"(s.b7), "+v"(s.b8),
        "+v"(s.b9));
  const __m512bh x = (__m512bh)_mm512_set1_epi16(0x3f00), y = (__m512bh)_mm512_set1_epi16(0x3fc0);
  for (int64_t i = 0; i < steps; ++i) {
    s.a0 = _mm512_dpbf16_ps(s.a0, x, y);
    s.a1 = _mm512_dpbf16_ps(s.a1, x, y);
    s.a2 = _mm512_dpbf16_ps(s.a2, x, y);
    s.a3 = _mm512_dpbf16_ps(s.a3, x, y);
    s.a4 = _mm512_dpbf16_ps(s.a4, x, y);
    s.a5 = _mm512_dpbf16_ps(s.a5, x, y);
    s.a6 = _mm512_dpbf16_ps(s.a6, x, y);
    s.a7 = _mm512_dpbf16_ps(s.a7, x, y);
    s.a8 = _mm512_dpbf16_ps(s.a8, x, y);
    s.a9 = _mm512_dpbf16_ps(s.a9, x, y);
    s.b0 = _mm512_dpbf16_ps(s.b0, x, y);
    s.b1 = _mm512_dpbf16_ps(s.b1, x, y);
    s.b2 = _mm512_dpbf16_ps(s.b2, x, y);
    s.b3 = _mm512_dpbf16_ps(s.b3, x, y);
    s.b4 = _mm512_dpbf16_ps(s.b4, x, y);
    s.b5 = _mm512_dpbf16_ps(s.b5, x, y);
    s.b6 = _mm512_dpbf16_ps(s.b6, x, y);
    s.b7 = _mm512_dpbf16_ps(s.b7, x, y);
    s.b8 = _mm512_dpbf16_ps(s.b8, x, y);
    s.b9 = _mm512_dpbf16_ps(s.b9, x, y);
  }
  sink = (s.a0 + s.a1 + s.a2 + s.a3 + s.a4 + s.a5 + s.a6 + s.a7 + s.a8 + s.a9 + s.b0 + s.b1 + s.b2 + s.b3 + s.b4 +
          s.b5 + s.b6 + s.b7 + s.b8 + s.b9)[0];
  return 2.0 * 32 * 20 * static_cast<double>(steps);
}

__attribute__((target("avx2,fma"))) double float32_avx2(int64_t steps) {
  Sums256 s = {};
  asm("" : "+x"(s.a0), "+x"(s.a1), "+x"(s.a2), "+x"(s.a3), "+x"(s.a4), "+x"(s.a5));
  asm("" : "+x"(s.b0), "+x"(s.b1), "+x"(s.b2), "+x"(s.b3), "+x"(s.b4), "+x"(s.b5));
  const __m256 x = _mm256_set1_ps(0.5f), y = _mm256_set1_ps(1.5f);
  for (int64_t i = 0; i < steps; ++i) {
    s.a0 = _mm256_fmadd_ps(x, y, s.a0);
    s.a1 = _mm256_fmadd_ps(x, y, s.a1);
    s.a2 = _mm256_fmadd_ps(x, y, s.a2);
    s.a3 = _mm256_fmadd_ps(x, y, s.a3);
    s.a4 = _mm256_fmadd_ps(x, y, s.a4);
    s.a5 = _mm256_fmadd_ps(x, y, s.a5);
    s.b0 = _mm256_fmadd_ps(x, y, s.b0);
    s.b1 = _mm256_fmadd_ps(x, y, s.b1);
    s.b2 = _mm256_fmadd_ps(x, y, s.b2);
    s.b3 = _mm256_fmadd_ps(x, y, s.b3);
    s.b4 = _mm256_fmadd_ps(x, y, s.b4);
    s.b5 = _mm256_fmadd_ps(x, y, s.b5);
  }
  sink = (s.a0 + s.a1 + s.a2 + s.a3 + s.a4 + s.a5 + s.b0 + s.b1 + s.b2 + s.b3 + s.b4 + s.b5)[0];
  return 2.0 * 8 * 12 * static_cast<double>(steps);
}
#endif

double float32_plain(int64_t steps) {
  constexpr int chains = 32;
  float sums[chains] = {};
  for (int64_t i = 0; i < steps; ++i)
    for (int c = 0; c < chains; ++c) sums[c] += 0.5f * static_cast<float>(i & 1);
  sink = sums[0] + sums[chains - 1];
  return 2.0 * chains * static_cast<double>(steps);
}

double peak(int threads, double (*loop)(int64_t)) {
  std::vector<double> operations(static_cast<size_t>(threads));
  const double spent = side_by_side(threads, [&](int t) { operations[static_cast<size_t>(t)] = loop(kSteps); });
  double all = 0;
  for (const double one : operations) all += one;
  return all / spent;
}

// Memory whose pages exist.
std::unique_ptr<char[]> touched(int64_t bytes) {
  std::unique_ptr<char[]> memory(new char[static_cast<size_t>(bytes)]);
  std::memset(memory.get(), 1, static_cast<size_t>(bytes));
  return memory;
}

uint64_t read_plain(const char* from, int64_t bytes) {
  uint64_t sums[8] = {};
  for (int64_t i = 0; i + 64 <= bytes; i += 64) {
    uint64_t words[8];
    std::memcpy(words, from + i, sizeof words);
    for (int k = 0; k < 8; ++k) sums[k] += words[k];
  }
  uint64_t sum = 0;
  for (const uint64_t one : sums) sum += one;
  return sum;
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) uint64_t read_avx512(const char* from, int64_t bytes) {
  __m512i sums[4] = {};
  for (int64_t i = 0; i + 256 <= bytes; i += 256)
    for (int k = 0; k < 4; ++k) sums[k] = _mm512_add_epi64(sums[k], _mm512_loadu_si512(from + i + 64 * k));
  uint64_t lanes[8];
  std::memcpy(lanes, &(sums[0] += sums[1] + sums[2] + sums[3]), sizeof lanes);
  uint64_t sum = 0;
  for (const uint64_t lane : lanes) sum += lane;
  return sum;
}
#endif

uint64_t read_all(const char* from, int64_t bytes) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return read_avx512(from, bytes);
#endif
  return read_plain(from, bytes);
}

}  // namespace

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double float32_peak(int threads) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return peak(threads, float32_avx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return peak(threads, float32_avx2);
#endif
  return peak(threads, float32_plain);
}

double bfloat16_peak(int threads) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16")) return peak(threads, bfloat16_avx512);
#endif
  return 0.0 * threads;
}

double stream_read(int threads) {
  static const std::unique_ptr<char[]> memory = touched(kBytes);
  const int64_t share = kBytes / threads;
  std::vector<uint64_t> sums(static_cast<size_t>(threads));
  const double spent =
      side_by_side(threads, [&](int t) { sums[static_cast<size_t>(t)] = read_all(memory.get() + t * share, share); });
  for (const uint64_t sum : sums) sink = static_cast<float>(sum);
  return static_cast<double>(share * threads) / spent;
}

double memory_copy(int threads) {
  static const std::unique_ptr<char[]> from = touched(kBytes / 2), to = touched(kBytes / 2);
  const int64_t share = kBytes / 2 / threads;
  const double spent = side_by_side(
      threads, [&](int t) { std::memcpy(to.get() + t * share, from.get() + t * share, static_cast<size_t>(share)); });
  sink = to[static_cast<size_t>(kBytes / 2 - 1)];
  return 2.0 * static_cast<double>(share * threads) / spent;
}

}  // namespace probe
