#pragma once
// Which instruction set the CPU kernels of this process use. Chosen once, at the first question.

#include <cstdint>

namespace micro_kernels::cpu {

enum class Isa : int8_t { kPlain, kAvx2, kAvx512, kAvx512Bf16 };

struct IsaChoice {
  Isa isa;                // what runs
  Isa best;               // what this CPU and this build could run
  const char* requested;  // the environment's MICRO_ISA, or nullptr
  bool honoured;          // false: `requested` is no known name, or lies above `best`; then `isa` is `best`
};

// MICRO_ISA = plain | avx2 | avx512 | avx512_bf16 lowers the choice, for tests and comparisons.
const IsaChoice& isa_choice();

inline Isa isa() { return isa_choice().isa; }

// The name as MICRO_ISA takes it.
const char* isa_name(Isa isa);

}  // namespace micro_kernels::cpu
