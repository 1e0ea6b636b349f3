#include "micro/build_info.h"

#include "micro/version.h"
#include "micro_kernels/isa.h"

namespace micro {

BuildInfo build_info() {
  const micro_kernels::cpu::IsaChoice& choice = micro_kernels::cpu::isa_choice();
  return {
      .version = MICRO_VERSION,
      .isa = micro_kernels::cpu::isa_name(choice.isa),
      .isa_best = micro_kernels::cpu::isa_name(choice.best),
      .isa_requested = choice.requested ? choice.requested : "",
      .isa_honoured = choice.honoured,
  };
}

}  // namespace micro
