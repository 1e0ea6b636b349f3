// Launchers of the forward.

#include "common/cuda/launch.cuh"
#include "expert_attention/attention_forward_fma.cuh"
#include "expert_attention/attention_launch.h"
#include "micro_kernels/expert_attention.h"

namespace micro_kernels::cuda {
namespace {

// So few tokens of a batch row leave most of a device idle, unless the keys are split.
constexpr int64_t kFewSlots = 4;

int64_t splits_of(const ExpertAttentionShape& s) { return s.slots <= kFewSlots ? ceil_div(s.keys, kSplitKeys) : 1; }

template <class Memory>
Status start(void (*kernel)(ForwardArgs), int rows_of_tile, ForwardArgs args, void* stream) {
  static_assert(sizeof(Memory) <= kMostShared);
  const ExpertAttentionShape& s = args.p.shape;
  args.tiles = ceil_div(s.slots * args.heads.count, rows_of_tile);
  const int64_t blocks = args.tiles * args.splits * s.batch * s.experts * s.groups + ceil_div(s.rows, kIdleRows);
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), sizeof(Memory), stream, args);
}

template <class T, int kHead, bool kAligned>
Status forward(const ForwardArgs& args, void* stream) {
  if constexpr (sizeof(T) > 2) {
    return start<ForwardFmaMemory<T, kHead>>(attention_forward_fma<T, kHead, kAligned>, kFmaRows, args, stream);
  } else if (args.p.shape.slots <= kFewSlots) {
    return start<DecodeMemory<T, kHead>>(attention_decode<T, kHead, kAligned>, DecodeMemory<T, kHead>::kRows, args,
                                         stream);
  } else {
    return start<ForwardMemory<T, kHead>>(attention_forward<T, kHead, kAligned>, ForwardMemory<T, kHead>::kRows, args,
                                          stream);
  }
}

}  // namespace

int64_t expert_attention_workspace(const ExpertAttentionParams& p) {
  const ExpertAttentionShape& s = p.shape;
  const int64_t splits = splits_of(s);
  if (splits == 1) return 0;
  const int64_t element = s.dtype == DType::kFloat64 ? 8 : 4;
  return ceil_div(splits * s.rows * s.heads * (s.head_dim + 2) * element, 16) * 16;
}

Status expert_attention(const ExpertAttentionParams& p, void* workspace, void* stream) {
  const ExpertAttentionShape& s = p.shape;
  if (s.rows == 0) return Status::kOk;
  ForwardArgs args{
      .p = p, .heads = HeadCount(s), .tiles = 0, .splits = splits_of(s), .partial = workspace, .aligned = false};
  return dispatch_device(s.dtype, [&]<class T>() {
    args.aligned =
        all_aligned({p.q, p.out}) && heads_aligned<T>(p.k, p.k_strides) && heads_aligned<T>(p.v, p.v_strides);
    const Status status = with_head_size(s.head_dim, args.aligned, [&]<int kHead, bool kAligned>() {
      return forward<T, kHead, kAligned>(args, stream);
    });
    if (status != Status::kOk || args.splits == 1) return status;
    return launch(attention_merge<T>, dim3(static_cast<unsigned>(ceil_div(s.rows * s.heads, kMergeRows))),
                  dim3(kThreads), stream, args);
  });
}

}  // namespace micro_kernels::cuda
