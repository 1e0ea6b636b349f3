#pragma once
// Each file of this folder adds one class (or one family of helpers) to the module.

#include <pybind11/pybind11.h>

namespace py = pybind11;

// bindings/<name>.cpp defines bind_<name>; module.cpp calls them.
void bind_build_info(py::module_& m);
void bind_checkpoint(py::module_& m);
void bind_curriculum(py::module_& m);
void bind_engine(py::module_& m);
void bind_interventions(py::module_& m);
void bind_spans(py::module_& m);
