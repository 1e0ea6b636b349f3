#include "micro/build_info.h"

#include "bindings/module.h"

void bind_build_info(py::module_& m) {
  m.def(
      "build_info",
      [] {
        const micro::BuildInfo info = micro::build_info();
        py::dict result;
        result["version"] = info.version;
        result["isa"] = info.isa;
        result["isa_best"] = info.isa_best;
        result["isa_requested"] = info.isa_requested;
        result["isa_honoured"] = info.isa_honoured;
        return result;
      },
      "What libmicro is and which instruction set it chose.");
}
