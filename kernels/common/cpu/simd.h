#pragma once
// Vectors as wide as the instruction set that the including file is compiled for. Only the per-ISA files include this:
// everything stands in an unnamed namespace, so that the linker can never swap the code of one set for another's, and
// nothing here touches inline code of the standard library, for the same reason.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace micro_kernels::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

typedef uint16_t HalfVec __attribute__((vector_size(kVectorBytes / 2)));  // one uint16 per float lane

template <class T>
inline Vec<T> load(const T* from) {
  Vec<T> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

template <class T>
inline void store(T* to, Vec<T> v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

template <class T>
inline Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

template <class T>
inline Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

#if defined(__AVX512F__)
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__)
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm256_fmadd_pd(a, b, c); }
#else
template <class T>
inline Vec<T> fma_any(Vec<T> a, Vec<T> b, Vec<T> c) {
  return a * b + c;
}
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return fma_any<float>(a, b, c); }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return fma_any<double>(a, b, c); }
#endif

#if defined(__AVX512BF16__)
// c + the product of two bfloat16 pairs per 32-bit lane.
inline Vec<float> dot_pairs(Vec<uint32_t> a, Vec<uint32_t> b, Vec<float> c) {
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
}
#endif

// The upper half onto the lower half, again and again: the order of a sum depends on the vector width only.
template <int kHalf, class V, size_t... lane>
inline V upper_half(V v, std::index_sequence<lane...>) {
  return __builtin_shufflevector(v, v, ((lane + kHalf) % sizeof...(lane))...);
}

template <int kHalf, class T, class Combine>
inline T fold(Vec<T> v, Combine combine) {
  if constexpr (kHalf == 0) {
    return v[0];
  } else {
    return fold<kHalf / 2, T>(combine(v, upper_half<kHalf>(v, std::make_index_sequence<kLanes<T>>())), combine);
  }
}

template <class T>
inline T sum_lanes(Vec<T> v) {
  return fold<kLanes<T> / 2, T>(v, [](Vec<T> a, Vec<T> b) { return a + b; });
}

template <class T>
inline T max_lanes(Vec<T> v) {
  return fold<kLanes<T> / 2, T>(v, [](Vec<T> a, Vec<T> b) { return max<T>(a, b); });
}

// ---- exp: 2^n times a polynomial, n = round(x / ln 2); |x - n ln 2| <= ln 2 / 2 ------------------------------------

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Int = int32_t;
  static constexpr int kDegree = 7, kMantissa = 23, kBias = 127;  // next term of the series: 5e-9
  static constexpr float kRound = 12582912.0f;                    // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kSmallest = -87.0f;  // below, the result is 0: no denormals
};
template <>
struct ExpConstants<double> {
  using Int = int64_t;
  static constexpr int kDegree = 13, kMantissa = 52, kBias = 1023;  // next term: 4e-18
  static constexpr double kRound = 6755399441055744.0;
  static constexpr double kLog2e = 1.4426950408889634074, kLn2High = 6.93145751953125e-1;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kSmallest = -708.0;
};

template <class T>
constexpr T inverse_factorial(int n) {
  T f = 1;
  for (int i = 2; i <= n; ++i) f *= static_cast<T>(i);
  return T(1) / f;
}

// exp(0) is exactly 1, exp of anything below kSmallest exactly 0, NaN stays NaN. Meant for x <= 80.
template <class T>
inline Vec<T> exp(Vec<T> x) {
  using C = ExpConstants<T>;
  using Int = typename C::Int;
  const Vec<T> shifted = fma(x, broadcast<T>(C::kLog2e), broadcast<T>(C::kRound));
  const Vec<T> n = shifted - C::kRound;
  const Vec<T> r = fma(n, broadcast<T>(-C::kLn2Low), fma(n, broadcast<T>(-C::kLn2High), x));
  Vec<T> p = broadcast<T>(inverse_factorial<T>(C::kDegree));
#pragma GCC unroll 16
  for (int i = C::kDegree - 1; i >= 0; --i) p = fma(p, r, broadcast<T>(inverse_factorial<T>(i)));
  const Vec<Int> exponent = (Vec<Int>)shifted - (Vec<Int>)broadcast<T>(C::kRound) + C::kBias;
  const Vec<T> scale = (Vec<T>)(exponent << C::kMantissa);
  return x < C::kSmallest ? Vec<T>{} : p * scale;
}

// Without overflow on either side: exp is only ever asked for numbers <= 0.
template <class Acc>
inline Vec<Acc> sigmoid(Vec<Acc> x) {
  const Vec<Acc> e = exp<Acc>(x < 0 ? x : -x);
  return (x < 0 ? e : broadcast<Acc>(1)) / (e + Acc(1));
}

// ---- bfloat16 ------------------------------------------------------------------------------------------------------

// GCC 12 makes four instructions of the conversion, where these sets have one.
#if defined(__AVX512F__)
inline Vec<uint32_t> widen(HalfVec v) { return (Vec<uint32_t>)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v); }
#elif defined(__AVX2__)
inline Vec<uint32_t> widen(HalfVec v) { return (Vec<uint32_t>)_mm256_cvtepu16_epi32((__m128i)v); }
#else
inline Vec<uint32_t> widen(HalfVec v) { return __builtin_convertvector(v, Vec<uint32_t>); }
#endif

inline Vec<float> load_bfloat16(const uint16_t* from) {
  HalfVec v;
  __builtin_memcpy(&v, from, sizeof(v));
  return (Vec<float>)(widen(v) << 16);
}

// Round to nearest, ties to even, as BFloat16 of dtype.h. Returned in the low 16 bits of each lane.
inline Vec<uint32_t> bfloat16_bits(Vec<float> v) {
  const Vec<uint32_t> word = (Vec<uint32_t>)v;
  const Vec<uint32_t> rounded = word + 0x7fffu + ((word >> 16) & 1u);
  return (v != v ? word | 0x400000u : rounded) >> 16;  // NaN stays NaN
}

inline void store_bfloat16(uint16_t* to, Vec<float> v) {
  const HalfVec bits = __builtin_convertvector(bfloat16_bits(v), HalfVec);
  __builtin_memcpy(to, &bits, sizeof(bits));
}

// ---- transposition of kLanes x kLanes elements in registers (Eklundh 1972) -----------------------------------------

template <int kStep, class V, size_t... lane>
inline void exchange(V& a, V& b, std::index_sequence<lane...>) {
  constexpr int n = sizeof...(lane);
  const V upper = __builtin_shufflevector(a, b, ((lane & kStep) ? n + lane - kStep : lane)...);
  b = __builtin_shufflevector(a, b, ((lane & kStep) ? n + lane : lane + kStep)...);
  a = upper;
}

template <int kStep, class T>
inline void exchange_rows(Vec<T>* rows) {
  if constexpr (kStep < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i)
      if (!(i & kStep)) exchange<kStep>(rows[i], rows[i + kStep], std::make_index_sequence<kLanes<T>>());
    exchange_rows<kStep * 2, T>(rows);
  }
}

#if defined(__AVX512F__)
// Of each quarter of the registers the lower or upper half, elements of a and b in turn. V has 16 or 8 elements: with
// the narrowest type that fits, each of these is one instruction.
template <int kUpper, class V, size_t... lane>
inline V interleave(V a, V b, std::index_sequence<lane...>) {
  constexpr int n = sizeof...(lane), quarter = n / 4;
  return __builtin_shufflevector(
      a, b, (lane / quarter * quarter + lane % quarter / 2 + kUpper * quarter / 2 + (lane % 2 ? n : 0))...);
}
template <int kUpper, class V>
inline V interleave_elements(V a, V b) {
  return interleave<kUpper>(a, b, std::make_index_sequence<16>());
}
template <int kUpper, class V>
inline V interleave_pairs(V a, V b) {
  return (V)interleave<kUpper>((Vec<uint64_t>)a, (Vec<uint64_t>)b, std::make_index_sequence<8>());
}

// Every other quarter of a, and of b behind them.
template <int kOdd, class V, size_t... lane>
inline V quarters(V a, V b, std::index_sequence<lane...>) {
  return __builtin_shufflevector(a, b, (lane / 4 * 8 + 4 * kOdd + lane % 4)...);
}

// 16 x 16 elements of four bytes: pairs, then fours inside the quarters of the registers, then the quarters. These
// shuffles need no index registers and cost half of the general ones. (No intrinsics: those of GCC 12 warn.)
template <class T>
inline void transpose_words(Vec<T>* rows) {
  using V = Vec<T>;
  constexpr std::make_index_sequence<16> lanes;
  V pair[16], four[16], half[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pair[i] = interleave_elements<0>(rows[i], rows[i + 1]);
    pair[i + 1] = interleave_elements<1>(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    four[i] = interleave_pairs<0>(pair[i], pair[i + 2]);
    four[i + 1] = interleave_pairs<1>(pair[i], pair[i + 2]);
    four[i + 2] = interleave_pairs<0>(pair[i + 1], pair[i + 3]);
    four[i + 3] = interleave_pairs<1>(pair[i + 1], pair[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    half[i] = quarters<0>(four[i], four[i + 4], lanes);
    half[i + 4] = quarters<1>(four[i], four[i + 4], lanes);
    half[i + 8] = quarters<0>(four[i + 8], four[i + 12], lanes);
    half[i + 12] = quarters<1>(four[i + 8], four[i + 12], lanes);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = quarters<0>(half[i], half[i + 8], lanes);
    rows[i + 4] = quarters<0>(half[i + 4], half[i + 12], lanes);
    rows[i + 8] = quarters<1>(half[i], half[i + 8], lanes);
    rows[i + 12] = quarters<1>(half[i + 4], half[i + 12], lanes);
  }
}
#endif

template <class T>
inline void transpose(Vec<T>* rows) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return transpose_words<T>(rows);
#endif
  exchange_rows<1, T>(rows);
}

// Lane l of the result is sum_lanes(rows[l]), bit for bit, in a fraction of the work. Destroys rows.
template <class T, int kHalf = kLanes<T> / 2>
inline Vec<T> sums_of(Vec<T>* rows) {
  if constexpr (kHalf == 0) {
    return rows[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
      exchange<kHalf>(rows[i], rows[i + kHalf], std::make_index_sequence<kLanes<T>>());
      rows[i] += rows[i + kHalf];
    }
    return sums_of<T, kHalf / 2>(rows);
  }
}

}  // namespace
}  // namespace micro_kernels::cpu
