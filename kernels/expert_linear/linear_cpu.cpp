// The work list of the grouped product: panels of all parts, one after the other, handed out dynamically.

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/cpu/work.h"
#include "expert_linear/linear_items.h"
#include "micro_kernels/isa.h"

namespace micro_kernels::cpu {
namespace {

const LinearKernels& kernels(DType dtype) {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::kAvx512Bf16:
      return linear_kernels_avx512_bf16(dtype);
    case Isa::kAvx512:
      return linear_kernels_avx512(dtype);
    case Isa::kAvx2:
      return linear_kernels_avx2(dtype);
    case Isa::kPlain:
      break;
  }
#endif
  return linear_kernels_plain(dtype);
}

int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

// Calls body(part number, piece, scratch) for each of pieces_of(part) pieces of each part.
template <class Part, class PiecesOf, class Body>
void each_piece(const Part* parts, int64_t count, int64_t scratch, const ParallelFor& parallel_for,
                const PiecesOf& pieces_of, const Body& body) {
  std::vector<int64_t> first(count + 1, 0);
  for (int64_t i = 0; i < count; ++i) first[i + 1] = first[i] + pieces_of(parts[i]);
  for_each_item(parallel_for, first[count], scratch, [&](int64_t item, char* memory) {
    const int64_t i = std::upper_bound(first.begin(), first.end(), item) - first.begin() - 1;
    body(i, item - first[i], memory);
  });
}

// Both packed layouts: [panel][pairs of inputs][kPanel][2] for two-byte and one-byte elements, else
// [panel][in][kPanel].
int64_t packed_index(int64_t in, int64_t o, int64_t i, int64_t pair) {
  const int64_t panel = o / kPanel, width = (in + pair - 1) / pair * pair;
  return panel * kPanel * width + (i / pair * kPanel + o % kPanel) * pair + i % pair;
}

}  // namespace

Status linear(const LinearPart* parts, int64_t count, DType dtype, const ParallelFor& parallel_for) {
  const LinearKernels& code = kernels(dtype);
  each_piece(
      parts, count, code.scratch(), parallel_for,
      [](const LinearPart& part) { return part.rows == 0 ? 0 : pieces(part.out, kPanel); },
      [&](int64_t i, int64_t panel, char* scratch) {
        code.forward(parts[i], panel, i + 1 < count ? &parts[i + 1] : nullptr, scratch);
      });
  return Status::kOk;
}

Status linear_grad_x(const LinearGradXPart* parts, int64_t count, DType dtype, const ParallelFor& parallel_for) {
  const LinearKernels& code = kernels(dtype);
  each_piece(
      parts, count, code.scratch(), parallel_for,
      [](const LinearGradXPart& part) { return part.rows == 0 ? 0 : pieces(part.in, kPanel * kGradientPanels); },
      [&](int64_t i, int64_t group, char* scratch) { code.grad_x(parts[i], group, scratch); });
  return Status::kOk;
}

Status linear_grad_weight(const LinearGradWeightPart* parts, int64_t count, DType dtype,
                          const ParallelFor& parallel_for) {
  const LinearKernels& code = kernels(dtype);
  each_piece(
      parts, count, code.scratch(), parallel_for,
      [](const LinearGradWeightPart& part) { return pieces(part.in, kPanel * kGradientPanels); },
      [&](int64_t i, int64_t group, char* scratch) { code.grad_weight(parts[i], group, scratch); });
  return Status::kOk;
}

// ---- packing -------------------------------------------------------------------------------------------------------

int64_t packed_elements(int64_t in, int64_t out) { return pieces(out, kPanel) * kPanel * pieces(in, 2) * 2; }

Status pack_weight(const void* plain, int64_t in, int64_t out, DType dtype, void* packed,
                   const ParallelFor& parallel_for) {
  dispatch(dtype, [&]<class T>() {
    constexpr int64_t pair = sizeof(T) == 2 ? 2 : 1;
    parallel_for(pieces(out, kPanel), 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        T* to = static_cast<T*>(packed) + packed_index(in, panel * kPanel, 0, pair);
        for (int64_t i = 0; i < pieces(in, pair) * pair; i += pair)
          for (int64_t o = panel * kPanel; o < (panel + 1) * kPanel; ++o)
            for (int64_t j = 0; j < pair; ++j)
              *to++ = o < out && i + j < in ? static_cast<const T*>(plain)[o * in + i + j] : T{};
      }
    });
  });
  return Status::kOk;
}

Status pack_weight_int8(const void* plain, int64_t in, int64_t out, DType dtype, int8_t* data, float* scales,
                        const ParallelFor& parallel_for) {
  std::fill(data, data + packed_elements(in, out), int8_t{0});
  dispatch(dtype, [&]<class T>() {
    parallel_for(out, 1, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        const T* row = static_cast<const T*>(plain) + o * in;
        double largest = 0;
        for (int64_t i = 0; i < in; ++i)
          largest = std::max(largest, std::abs(static_cast<double>(static_cast<accumulator_t<T>>(row[i]))));
        scales[o] = static_cast<float>(largest / 127);
        if (scales[o] == 0) continue;
        for (int64_t i = 0; i < in; ++i) {
          const double steps = static_cast<double>(static_cast<accumulator_t<T>>(row[i])) / scales[o];
          data[packed_index(in, o, i, 2)] = static_cast<int8_t>(std::clamp(std::nearbyint(steps), -127.0, 127.0));
        }
      }
    });
  });
  return Status::kOk;
}

}  // namespace micro_kernels::cpu
