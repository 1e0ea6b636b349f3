// Few rows against big matrices: the weights are cut into pieces of some columns of y, and shared out.

#include <algorithm>
#include <vector>

#include "common/cpu/work.h"
#include "expert_linear/few_rows_items.h"
#include "micro_kernels/isa.h"

namespace micro_kernels::cpu {
namespace {

constexpr int64_t kPieceBytes = 128 * 1024;  // of weights: a few microseconds of memory traffic

FewRowsKernel kernel(DType dtype) {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::kAvx512Bf16:
      return few_rows_avx512_bf16(dtype);
    case Isa::kAvx512:
      return few_rows_avx512(dtype);
    case Isa::kAvx2:
      return few_rows_avx2(dtype);
    case Isa::kPlain:
      break;
  }
#endif
  return few_rows_plain(dtype);
}

int64_t element_size(DType dtype) {
  return dispatch(dtype, []<class T>() { return static_cast<int64_t>(sizeof(T)); });
}

}  // namespace

Status few_rows_linear(const LinearRows* parts, int64_t count, int64_t in, int64_t out, DType dtype,
                       const ParallelFor& parallel_for) {
  // A multiple of 16: no register tile is cut, and no two threads write one cache line of a row but at its ends.
  const int64_t columns = std::max<int64_t>(16, kPieceBytes / std::max<int64_t>(1, in * element_size(dtype)) / 16 * 16);
  const int64_t pieces = (out + columns - 1) / columns;
  const FewRowsKernel run = kernel(dtype);
  for_each_item(parallel_for, count * pieces, 0, [&](int64_t item, char*) {
    const int64_t begin = item % pieces * columns;
    run(parts[item / pieces], in, out, begin, std::min(begin + columns, out));
  });
  return Status::kOk;
}

}  // namespace micro_kernels::cpu
