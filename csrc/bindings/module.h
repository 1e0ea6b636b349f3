#pragma once
// Each file of this folder adds one class (or one family of helpers) to the module.

#include <pybind11/pybind11.h>

namespace py = pybind11;
