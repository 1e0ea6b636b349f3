#pragma once
// Tensors between Python and libmicro by DLPack: no copy, and torch's own Python library is not linked.

#include <ATen/DLConvertor.h>
#include <ATen/core/Tensor.h>

#include "bindings/module.h"

// None for an undefined tensor.
inline py::object to_python(const at::Tensor& tensor) {
  if (!tensor.defined()) return py::none();
  // Who takes the tensor renames the capsule; otherwise it goes with the capsule.
  PyObject* capsule = PyCapsule_New(at::toDLPack(tensor), "dltensor", [](PyObject* self) {
    if (!PyCapsule_IsValid(self, "dltensor")) return;
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(self, "dltensor"));
    managed->deleter(managed);
  });
  if (!capsule) throw py::error_already_set();
  return py::module_::import("torch.utils.dlpack").attr("from_dlpack")(py::reinterpret_steal<py::object>(capsule));
}

// Undefined for None. The gradient graph stays behind.
inline at::Tensor from_python(const py::object& tensor) {
  if (tensor.is_none()) return {};
  const py::object capsule = py::module_::import("torch.utils.dlpack").attr("to_dlpack")(tensor.attr("detach")());
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (!managed) throw py::error_already_set();
  at::Tensor out = at::fromDLPack(managed);
  PyCapsule_SetName(capsule.ptr(), "used_dltensor");
  return out;
}
