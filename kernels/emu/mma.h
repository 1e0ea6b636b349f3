#pragma once
// The emulator's side of common/cuda/arch/mma.cuh: the fragments of the real instructions, sums in float32 in ascending
// order (a tensor core's own order and rounding are not specified).

#include <cmath>
#include <cstring>

#include "cuda_runtime.h"
#include "emu/machine.h"
#include "micro_kernels/dtype.h"

namespace micro_kernels::cuda {
namespace detail {

struct MatrixLoad {
  uint32_t* r;
  const void* row;
  bool transposed;
  emu::Site site;
};

inline void load_matrices(void* const (&brought)[emu::kLanes], const void*) {
  uint16_t cells[4][8][8];
  for (int lane = 0; lane < emu::kLanes; ++lane)
    std::memcpy(cells[lane / 8][lane % 8], static_cast<const MatrixLoad*>(brought[lane])->row, 16);
  for (int lane = 0; lane < emu::kLanes; ++lane) {
    const auto& mine = *static_cast<const MatrixLoad*>(brought[lane]);
    for (int i = 0; i < 4; ++i) {
      const int a = lane / 4, b = 2 * (lane % 4);
      const uint16_t low = mine.transposed ? cells[i][b][a] : cells[i][a][b];
      const uint16_t high = mine.transposed ? cells[i][b + 1][a] : cells[i][a][b + 1];
      mine.r[i] = low | (uint32_t{high} << 16);
    }
  }
}

inline void load_matrix(uint32_t (&r)[4], const void* row, bool transposed, emu::Site site) {
  emu::check_shared_read(row, 16, site);
  MatrixLoad mine{r, row, transposed, site};
  emu::meet(0xffffffffu, site, "ldmatrix", &mine, load_matrices, nullptr);
}

template <class Factor>
struct MmaOperands {
  float* d;
  const Factor* a;
  const Factor* b;
};

// Cell (row, k) of a 16 x (2 Pair 4) factor, and (k, column) of an 8-column one, from the lanes' registers.
template <class T>
float cell16(uint32_t reg, int half) {
  T value;
  value.bits = static_cast<uint16_t>(reg >> (16 * half));
  return static_cast<float>(value);
}

template <class T>
void multiply16(void* const (&brought)[emu::kLanes], const void*) {
  using Operands = MmaOperands<uint32_t>;
  float a[16][16], b[16][8];
  for (int lane = 0; lane < emu::kLanes; ++lane) {
    const auto& from = *static_cast<const Operands*>(brought[lane]);
    const int g = lane / 4, c = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i)
      for (int half = 0; half < 2; ++half) a[g + 8 * (i % 2)][c + 8 * (i / 2) + half] = cell16<T>(from.a[i], half);
    for (int i = 0; i < 2; ++i)
      for (int half = 0; half < 2; ++half) b[c + 8 * i + half][g] = cell16<T>(from.b[i], half);
  }
  for (int lane = 0; lane < emu::kLanes; ++lane) {
    float* d = static_cast<const Operands*>(brought[lane])->d;
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 16; ++k) d[i] += a[lane / 4 + 8 * (i / 2)][k] * b[k][2 * (lane % 4) + i % 2];
  }
}

// To TF32: 10 bits of mantissa, to nearest, ties away from zero (cvt.rna).
inline float tf32(float value) {
  if (!std::isfinite(value)) return value;
  return __builtin_bit_cast(float, (__builtin_bit_cast(uint32_t, value) + 0x1000u) & 0xffffe000u);
}

inline void multiply_tf32(void* const (&brought)[emu::kLanes], const void*) {
  using Operands = MmaOperands<float>;
  float a[16][8], b[8][8];
  for (int lane = 0; lane < emu::kLanes; ++lane) {
    const auto& from = *static_cast<const Operands*>(brought[lane]);
    const int g = lane / 4, c = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][c + 4 * (i / 2)] = tf32(from.a[i]);
    for (int i = 0; i < 2; ++i) b[c + 4 * i][g] = tf32(from.b[i]);
  }
  for (int lane = 0; lane < emu::kLanes; ++lane) {
    float* d = static_cast<const Operands*>(brought[lane])->d;
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 8; ++k) d[i] += a[lane / 4 + 8 * (i / 2)][k] * b[k][2 * (lane % 4) + i % 2];
  }
}

}  // namespace detail

inline void load_matrix_x4(uint32_t (&r)[4], const void* row, MICRO_EMU_SITE) {
  detail::load_matrix(r, row, false, MICRO_EMU_HERE);
}
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row, MICRO_EMU_SITE) {
  detail::load_matrix(r, row, true, MICRO_EMU_HERE);
}
template <class T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], MICRO_EMU_SITE) {
  detail::MmaOperands<uint32_t> mine{d, a, b};
  emu::meet(0xffffffffu, MICRO_EMU_HERE, "mma", &mine, detail::multiply16<T>, nullptr);
}
inline void mma_1688_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2], MICRO_EMU_SITE) {
  detail::MmaOperands<float> mine{d, a, b};
  emu::meet(0xffffffffu, MICRO_EMU_HERE, "mma", &mine, detail::multiply_tf32, nullptr);
}

}  // namespace micro_kernels::cuda
