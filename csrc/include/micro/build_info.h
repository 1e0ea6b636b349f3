#pragma once

#include <string>

namespace micro {

// What this library is and what it chose on this machine; `micro doctor` prints it.
struct BuildInfo {
  std::string version;
  std::string isa;            // instruction set of the CPU kernels: plain, avx2, avx512 or avx512_bf16
  std::string isa_best;       // the best one that this CPU and this build have
  std::string isa_requested;  // the environment's MICRO_ISA; empty: not set
  bool isa_honoured;          // false: MICRO_ISA names nothing known, or more than isa_best
};

//   std::cout << micro::build_info().isa;
BuildInfo build_info();

}  // namespace micro
