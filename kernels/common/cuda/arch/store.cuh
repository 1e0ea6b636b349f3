#pragma once
// Stores of whole vectors. Written as PTX, because the compiler now and then takes a struct's store apart into one
// store per element; its loads stay whole.

#include <cstdint>

namespace micro_kernels::cuda {

// The machine's word of a vector's size.
template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

__device__ __forceinline__ void store_global(void* to, uint16_t word) { *static_cast<uint16_t*>(to) = word; }
__device__ __forceinline__ void store_global(void* to, uint32_t word) { *static_cast<uint32_t*>(to) = word; }
__device__ __forceinline__ void store_global(void* to, uint2 word) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(word.x), "r"(word.y)
               : "memory");
}
__device__ __forceinline__ void store_global(void* to, uint4 word) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(word.x), "r"(word.y),
               "r"(word.z), "r"(word.w)
               : "memory");
}

__device__ __forceinline__ void store_shared(void* to, uint16_t word) { *static_cast<uint16_t*>(to) = word; }
__device__ __forceinline__ void store_shared(void* to, uint32_t word) { *static_cast<uint32_t*>(to) = word; }
__device__ __forceinline__ void store_shared(void* to, uint2 word) {
  const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(target), "r"(word.x), "r"(word.y) : "memory");
}
__device__ __forceinline__ void store_shared(void* to, uint4 word) {
  const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(word.x), "r"(word.y), "r"(word.z),
               "r"(word.w)
               : "memory");
}

}  // namespace micro_kernels::cuda
