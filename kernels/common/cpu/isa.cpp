#include "micro_kernels/isa.h"

#include <cstdlib>
#include <cstring>
#include <iterator>

namespace micro_kernels::cpu {
namespace {

constexpr const char* kNames[] = {"plain", "avx2", "avx512", "avx512_bf16"};

// Every bit that the files of a level are compiled for is asked for by itself (performance.md 10.5).
Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Bf16;
  if (avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPlain;
}

IsaChoice choose() {
  const Isa best = best_isa();
  const char* requested = std::getenv("MICRO_ISA");
  if (!requested || !*requested) return {best, best, nullptr, true};
  for (size_t i = 0; i < std::size(kNames); ++i) {
    const Isa wanted = static_cast<Isa>(i);
    if (std::strcmp(requested, kNames[i]) == 0 && wanted <= best) return {wanted, best, requested, true};
  }
  return {best, best, requested, false};
}

}  // namespace

const IsaChoice& isa_choice() {
  static const IsaChoice choice = choose();
  return choice;
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace micro_kernels::cpu
