// Launchers of the backward.

#include "common/cuda/launch.cuh"
#include "expert_attention/attention_backward_fma.cuh"
#include "expert_attention/attention_backward_mma.cuh"
#include "expert_attention/attention_launch.h"
#include "micro_kernels/expert_attention.h"

namespace micro_kernels::cuda {
namespace {

template <class Memory>
Status start(void (*kernel)(BackwardArgs), int64_t tiles, BackwardArgs args, void* stream) {
  static_assert(sizeof(Memory) <= kMostShared);
  const ExpertAttentionShape& s = args.p.shape;
  args.tiles = tiles;
  return launch(kernel, dim3(static_cast<unsigned>(tiles * s.batch * s.experts * s.groups)), dim3(kThreads),
                sizeof(Memory), stream, args);
}

template <class T, int kHead, bool kAligned>
Status grad_q(const BackwardArgs& args, void* stream) {
  const ExpertAttentionShape& s = args.p.shape;
  const int64_t rows = s.slots * args.heads.count;
  if constexpr (sizeof(T) > 2)
    return start<GradQueryFmaMemory<T, kHead>>(attention_grad_q_fma<T, kHead, kAligned>, ceil_div(rows, kFmaRows), args,
                                               stream);
  else
    return start<GradQueryMemory<T, kHead>>(attention_grad_q<T, kHead, kAligned>,
                                            ceil_div(rows, GradQueryMemory<T, kHead>::kRows), args, stream);
}

template <class T, int kHead, bool kAligned>
Status grad_kv(const BackwardArgs& args, void* stream) {
  const int64_t keys = args.p.shape.keys;
  if constexpr (sizeof(T) > 2) {
    return start<GradKeyFmaMemory<T, kHead>>(attention_grad_kv_fma<T, kHead, kAligned>, ceil_div(keys, kFmaRows), args,
                                             stream);
  } else {
    using Memory = GradKeyMemory<T, kHead>;
    const int64_t tiles = ceil_div(keys, Memory::kKeys);
    if constexpr (kHead <= 128) {
      return start<Memory>(attention_grad_kv<T, kHead, kAligned, true, true>, tiles, args, stream);
    } else {
      if (args.p.grad_k) {
        const Status status = start<Memory>(attention_grad_kv<T, kHead, kAligned, true, false>, tiles, args, stream);
        if (status != Status::kOk) return status;
      }
      return args.p.grad_v ? start<Memory>(attention_grad_kv<T, kHead, kAligned, false, true>, tiles, args, stream)
                           : Status::kOk;
    }
  }
}

template <class T>
Status delta(const BackwardArgs& args, void* stream) {
  const ExpertAttentionShape& s = args.p.shape;
  const int64_t idle = args.p.grad_q ? ceil_div(s.rows, kIdleRows) : 0;
  return launch(attention_delta<T>, dim3(static_cast<unsigned>(ceil_div(s.rows * s.heads, kDeltaRows) + idle)),
                dim3(kThreads), stream, args);
}

}  // namespace

int64_t expert_attention_backward_workspace(const ExpertAttentionBackwardParams& p) {
  const ExpertAttentionShape& s = p.shape;
  return ceil_div(s.rows * s.heads * (s.dtype == DType::kFloat64 ? 8 : 4), 16) * 16;
}

Status expert_attention_backward(const ExpertAttentionBackwardParams& p, void* workspace, void* stream) {
  const ExpertAttentionShape& s = p.shape;
  BackwardArgs args{.p = p, .heads = HeadCount(s), .delta = workspace, .tiles = 0, .aligned = false};
  return dispatch_device(s.dtype, [&]<class T>() {
    args.aligned = all_aligned({p.q, p.out, p.grad_out, p.grad_q}) && heads_aligned<T>(p.k, p.k_strides) &&
                   heads_aligned<T>(p.v, p.v_strides) && heads_aligned<T>(p.grad_k, p.grad_k_strides) &&
                   heads_aligned<T>(p.grad_v, p.grad_v_strides);
    if (s.rows > 0) {
      const Status status = delta<T>(args, stream);
      if (status != Status::kOk) return status;
    }
    return with_head_size(s.head_dim, args.aligned, [&]<int kHead, bool kAligned>() {
      if (s.rows > 0 && p.grad_q) {
        const Status status = grad_q<T, kHead, kAligned>(args, stream);
        if (status != Status::kOk) return status;
      }
      const bool any_keys = s.batch * s.experts * s.keys > 0;
      return any_keys && (p.grad_k || p.grad_v) ? grad_kv<T, kHead, kAligned>(args, stream) : Status::kOk;
    });
  });
}

}  // namespace micro_kernels::cuda
