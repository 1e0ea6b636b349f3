#pragma once
// The emulator's side of common/cuda/memory.cuh: the same names, each access checked first.

#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"
#include "emu/machine.h"

namespace micro_kernels::cuda {

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16);
  T v[N];
  T& operator[](int i) { return v[i]; }
  const T& operator[](int i) const { return v[i]; }
};

template <class T>
T load(const T* address, MICRO_EMU_SITE) {
  emu::check_read(address, sizeof(T), MICRO_EMU_HERE);
  return *address;
}
template <class T>
void store(T* address, std::type_identity_t<T> value, MICRO_EMU_SITE) {
  emu::check_write(address, sizeof(T), MICRO_EMU_HERE);
  *address = value;
}
template <int N, class T>
Vec<T, N> load_vec(const T* address, MICRO_EMU_SITE) {
  emu::check_read(address, sizeof(T) * N, MICRO_EMU_HERE);
  Vec<T, N> value;
  std::memcpy(static_cast<void*>(&value), address, sizeof(value));
  return value;
}
template <int N, class T>
void store_vec(T* address, const Vec<T, N>& value, MICRO_EMU_SITE) {
  emu::check_write(address, sizeof(T) * N, MICRO_EMU_HERE);
  std::memcpy(static_cast<void*>(address), &value, sizeof(value));
}

template <class T, int N>
struct alignas(16) SharedArray {
  T data[N];

  T load(int i, MICRO_EMU_SITE) const { return *static_cast<const T*>(read(i, 1, MICRO_EMU_HERE)); }
  void store(int i, T value, MICRO_EMU_SITE) {
    inside(i, 1, MICRO_EMU_HERE);
    emu::check_shared_write(data + i, sizeof(T), MICRO_EMU_HERE);
    data[i] = value;
  }
  template <int M>
  Vec<T, M> load_vec(int i, MICRO_EMU_SITE) const {
    Vec<T, M> value;
    std::memcpy(static_cast<void*>(&value), read(i, M, MICRO_EMU_HERE), sizeof(value));
    return value;
  }
  template <int M>
  void store_vec(int i, const Vec<T, M>& value, MICRO_EMU_SITE) {
    inside(i, M, MICRO_EMU_HERE);
    emu::check_shared_write(data + i, sizeof(value), MICRO_EMU_HERE);
    std::memcpy(static_cast<void*>(data + i), &value, sizeof(value));
  }
  T* at(int i, int count, MICRO_EMU_SITE) {
    inside(i, count, MICRO_EMU_HERE);
    return data + i;
  }
  const T* at(int i, int count, MICRO_EMU_SITE) const {
    inside(i, count, MICRO_EMU_HERE);
    return data + i;
  }

 private:
  void inside(int i, int count, emu::Site site) const {
    if (i < 0 || i + count > N)
      emu::fault(site, "elements " + std::to_string(i) + " to " + std::to_string(i + count - 1) +
                           " of a shared array of " + std::to_string(N));
  }
  const void* read(int i, int count, emu::Site site) const {
    inside(i, count, site);
    emu::check_shared_read(data + i, sizeof(T) * count, site);
    return data + i;
  }
};

template <class S>
S& shared_memory(MICRO_EMU_SITE) {
  return *static_cast<S*>(emu::shared_bytes(sizeof(S), MICRO_EMU_HERE));
}

}  // namespace micro_kernels::cuda
