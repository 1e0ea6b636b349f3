#pragma once
// Grouped products without the promise that an output is one chain of additions in order: other tiles, and sums in
// several parts. For benchmarks only: they show what that promise costs.

#include <cstdint>

struct FreeVariant {
  const char* name;
  int columns;  // of a panel of packed weights
  // y [rows, out] = x [index, in] times a packed matrix, bfloat16; `in` is even, `out` a multiple of `columns`.
  void (*run)(const uint16_t* x, const int32_t* index, int64_t rows, int64_t in, const uint16_t* packed, int64_t out,
              uint16_t* y);
};

extern const FreeVariant kFreeVariants[];
extern const int kFreeVariantCount;

// Panels of `columns` outputs; in a panel pairs of inputs, of every pair all outputs. No instruction set is needed.
void pack_free(const uint16_t* plain, int64_t in, int64_t out, int columns, uint16_t* packed);
