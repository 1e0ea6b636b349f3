#pragma once
// Tensor cores (mma.sync) and their loads from shared memory (ldmatrix). Called by all 32 lanes of a warp.

#ifdef MICRO_EMULATED
#include "emu/mma.h"
#else

#include <cstdint>

#include "micro_kernels/dtype.h"

namespace micro_kernels::cuda {

// Four 8x8 matrices of 16-bit elements. Lanes 8 i .. 8 i + 7 give the addresses of the 8 rows (16 bytes each, aligned
// to 16) of matrix i; register i of lane l receives the elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of it.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  const auto source = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(source)
               : "memory");
}

// The same, each 8x8 matrix transposed on the way.
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  const auto source = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(source)
               : "memory");
}

// d += a b, 16x16 times 16x8, sums in float32. Lane l holds, with g = l / 4 and c = 2 (l % 4):
//   a[0]: (g, c..c+1)   a[1]: (g + 8, c..c+1)   a[2]: (g, c+8..c+9)   a[3]: (g + 8, c+8..c+9)
//   b[0]: (c..c+1, g)   b[1]: (c+8..c+9, g)
//   d[0]: (g, c)   d[1]: (g, c + 1)   d[2]: (g + 8, c)   d[3]: (g + 8, c + 1)
template <class T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_16816<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_16816<Float16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a b, 16x8 times 8x8, factors rounded to TF32. Lane l holds, with g = l / 4 and c = l % 4:
//   a[0]: (g, c)   a[1]: (g + 8, c)   a[2]: (g, c + 4)   a[3]: (g + 8, c + 4)      b[0]: (c, g)   b[1]: (c + 4, g)
//   d as above
__device__ __forceinline__ void mma_1688_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  uint32_t r[6];
  for (int i = 0; i < 4; ++i) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r[i]) : "f"(a[i]));
  for (int i = 0; i < 2; ++i) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r[4 + i]) : "f"(b[i]));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "r"(r[4]), "r"(r[5]));
}

}  // namespace micro_kernels::cuda

#endif
