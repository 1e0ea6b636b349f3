// micro._C: what is not a function on tensors. One file per bound class; this one gathers them.

#include "bindings/module.h"

#include <c10/util/Exception.h>

#include <exception>

#include "micro/version.h"

namespace {

// libmicro reports wrong arguments with torch's exceptions; Python gets the class of the same name, without a C++
// trace.
void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const c10::ValueError& error) {
    py::set_error(PyExc_ValueError, error.what_without_backtrace());
  } catch (const c10::TypeError& error) {
    py::set_error(PyExc_TypeError, error.what_without_backtrace());
  } catch (const c10::IndexError& error) {
    py::set_error(PyExc_IndexError, error.what_without_backtrace());
  } catch (const c10::NotImplementedError& error) {
    py::set_error(PyExc_NotImplementedError, error.what_without_backtrace());
  } catch (const c10::Error& error) {
    py::set_error(PyExc_RuntimeError, error.what_without_backtrace());
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The parts of libmicro that are not functions on tensors.";
  m.attr("__version__") = MICRO_VERSION;
  py::register_local_exception_translator(translate);
  bind_build_info(m);
  bind_checkpoint(m);
  bind_curriculum(m);
  bind_interventions(m);
  bind_engine(m);
  bind_spans(m);
}
