// Compiled for AVX512_BF16 and called where the CPU has it. Nothing here touches inline code of the standard library,
// so that no other file gets code for an instruction set that it did not ask for.

#include <immintrin.h>

#include <cstdint>

#include "free_linear.h"

namespace {

// `height` rows times `vectors` * 16 columns; `parts` sums per output, which take the pairs of inputs in turn.
template <int height, int vectors, int parts>
void tile(const uint16_t* const* x, int64_t in, const uint16_t* panel, uint16_t* y, int64_t stride) {
  __m512 sums[parts][height][vectors];
#pragma GCC unroll 4
  for (int p = 0; p < parts; ++p)
#pragma GCC unroll 16
    for (int r = 0; r < height; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sums[p][r][v] = _mm512_setzero_ps();
  const int64_t pairs = in / 2;
  for (int64_t k = 0; k + parts <= pairs; k += parts) {
#pragma GCC unroll 4
    for (int p = 0; p < parts; ++p) {
      const uint16_t* row = panel + (k + p) * vectors * 32;
      __m512bh weights[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        weights[v] = (__m512bh)_mm512_loadu_si512(row + 32 * v);
        __builtin_prefetch(row + 32 * v + 1024);
      }
#pragma GCC unroll 16
      for (int r = 0; r < height; ++r) {
        int32_t pair;
        __builtin_memcpy(&pair, x[r] + 2 * (k + p), sizeof pair);
        const __m512bh inputs = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sums[p][r][v] = _mm512_dpbf16_ps(sums[p][r][v], inputs, weights[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < height; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      __m512 sum = sums[0][r][v];
#pragma GCC unroll 4
      for (int p = 1; p < parts; ++p) sum += sums[p][r][v];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + r * stride + 16 * v), (__m256i)_mm512_cvtneps_pbh(sum));
    }
}

// The last rows, fewer than a tile has.
template <int height, int vectors, int parts>
void rest(int64_t rows, const uint16_t* const* x, int64_t in, const uint16_t* panel, uint16_t* y, int64_t stride) {
  if constexpr (height > 0) {
    if (rows == height) return tile<height, vectors, parts>(x, in, panel, y, stride);
    rest<height - 1, vectors, parts>(rows, x, in, panel, y, stride);
  }
}

template <int height, int vectors, int parts>
void product(const uint16_t* x, const int32_t* index, int64_t rows, int64_t in, const uint16_t* packed, int64_t out,
             uint16_t* y) {
  constexpr int columns = 16 * vectors;
  for (int64_t first = 0; first < out; first += columns, packed += columns * in) {
    for (int64_t r = 0; r < rows; r += height) {
      const int64_t here = rows - r < height ? rows - r : height;
      const uint16_t* pointers[height];
      for (int64_t i = 0; i < here; ++i) pointers[i] = x + index[r + i] * in;
      uint16_t* to = y + r * out + first;
      if (here == height)
        tile<height, vectors, parts>(pointers, in, packed, to, out);
      else
        rest<height - 1, vectors, parts>(here, pointers, in, packed, to, out);
    }
  }
}

}  // namespace

const FreeVariant kFreeVariants[] = {
    {"6 rows x 64 columns", 64, product<6, 4, 1>},         {"14 rows x 32 columns", 32, product<14, 2, 1>},
    {"8 rows x 48 columns", 48, product<8, 3, 1>},         {"4 rows x 64 columns", 64, product<4, 4, 1>},
    {"4 rows x 32 columns, 2 sums", 32, product<4, 2, 2>}, {"2 rows x 64 columns, 2 sums", 64, product<2, 4, 2>},
    {"1 row x 64 columns, 4 sums", 64, product<1, 4, 4>},
};
const int kFreeVariantCount = sizeof kFreeVariants / sizeof kFreeVariants[0];
