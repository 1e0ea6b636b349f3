#include "micro/spans.h"

#include <pybind11/numpy.h>

#include "bindings/module.h"

namespace {

// Arrays are read where they lie: no dtype is converted and nothing is copied, so a wrong array is an error.
template <typename T>
std::span<const T> view(const py::array& array, const char* name, const char* type, py::ssize_t rank) {
  if (!py::isinstance<py::array_t<T>>(array) || array.ndim() != rank || !(array.flags() & py::array::c_style)) {
    throw py::type_error(std::string(name) + ": expected a contiguous " + type + " array of rank " +
                         std::to_string(rank) + ", got " + std::string(py::str(array.dtype())) + " of rank " +
                         std::to_string(array.ndim()));
  }
  return {static_cast<const T*>(array.data()), static_cast<std::size_t>(array.size())};
}

std::span<const micro::TokenOffset> offsets(const py::array& array, const char* name) {
  static_assert(sizeof(micro::TokenOffset) == 2 * sizeof(std::int64_t));
  const auto flat = view<std::int64_t>(array, name, "int64", 2);
  if (array.shape(1) != 2) throw py::type_error(std::string(name) + ": expected the shape [n, 2]");
  return {reinterpret_cast<const micro::TokenOffset*>(flat.data()), flat.size() / 2};
}

py::array_t<std::int64_t> token_pieces(const py::array& text, const py::array& tokens, const py::array& cuts) {
  const auto points = view<std::uint32_t>(text, "text", "uint32", 1);
  const auto places = offsets(tokens, "tokens");
  const auto ends = view<std::int64_t>(cuts, "cuts", "int64", 1);
  py::array_t<std::int64_t> pieces(static_cast<py::ssize_t>(places.size()));
  micro::token_pieces(points, places, ends, {pieces.mutable_data(), places.size()});
  return pieces;
}

py::array_t<bool> tokens_in_regions(const py::array& tokens, const py::array& regions) {
  const auto places = offsets(tokens, "tokens");
  const auto wanted = offsets(regions, "regions");
  py::array_t<bool> inside(static_cast<py::ssize_t>(places.size()));
  micro::tokens_in_regions(places, wanted, {inside.mutable_data(), places.size()});
  return inside;
}

}  // namespace

void bind_spans(py::module_& m) {
  m.def("token_pieces", &token_pieces, py::arg("text"), py::arg("tokens"), py::arg("cuts"),
        "Piece of each token, int64 [T]: text uint32 [N] code points, tokens int64 [T,2], cuts int64 [n].");
  m.def("tokens_in_regions", &tokens_in_regions, py::arg("tokens"), py::arg("regions"),
        "Whether each token (int64 [T,2]) shares a character with a region (int64 [n,2]), bool [T].");
}
