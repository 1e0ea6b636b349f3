// The work list: checked, cut into items, largest first, handed to the code of this CPU's instruction set.

#include <algorithm>
#include <vector>

#include "common/cpu/work.h"
#include "expert_attention/attention_items.h"
#include "micro_kernels/isa.h"

namespace micro_kernels::cpu {
namespace {

constexpr int64_t kGrainProducts = 128 * 1024;  // of elements of a query and a key: some microseconds

const AttentionKernels& kernels(DType dtype) {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::kAvx512Bf16:
      return attention_kernels_avx512_bf16(dtype);
    case Isa::kAvx512:
      return attention_kernels_avx512(dtype);
    case Isa::kAvx2:
      return attention_kernels_avx2(dtype);
    case Isa::kPlain:
      break;
  }
#endif
  return attention_kernels_plain(dtype);
}

bool plan_is_valid(const ExpertAttentionShape& s) {
  if (s.offsets[0] != 0 || s.offsets[s.experts] > s.rows) return false;
  for (int64_t e = 0; e < s.experts; ++e) {
    if (s.offsets[e] > s.offsets[e + 1]) return false;
    for (int64_t n = s.offsets[e]; n < s.offsets[e + 1]; ++n) {
      if (s.tokens[n] < 0 || s.tokens[n] >= s.batch * s.slots) return false;
      if (n > s.offsets[e] && s.tokens[n] <= s.tokens[n - 1]) return false;
      if (s.starts && (own_slot(s, n) < 0 || own_slot(s, n) >= s.keys)) return false;
    }
  }
  return true;
}

// Calls body(b, e, begin, end) for the plan rows of each (row, expert), also where there are none.
template <class Body>
void each_run(const ExpertAttentionShape& s, const Body& body) {
  for (int64_t e = 0; e < s.experts; ++e) {
    const int32_t* begin = s.tokens + s.offsets[e];
    const int32_t* const end = s.tokens + s.offsets[e + 1];
    for (int64_t b = 0; b < s.batch; ++b) {
      const int32_t* next = std::lower_bound(begin, end, (b + 1) * s.slots);
      body(b, e, begin - s.tokens, next - s.tokens);
      begin = next;
    }
  }
}

// Work grows with queries times keys; the slot of the last query stands for the keys.
int64_t pairs(const ExpertAttentionShape& s, const AttentionItem& item) {
  return item.end == item.begin ? 0 : (item.end - item.begin) * (own_slot(s, item.end - 1) + 1);
}

// Items of at most `most` positions; most = 0: whole runs, and empty ones too.
std::vector<AttentionItem> work_items(const ExpertAttentionShape& s, int64_t most) {
  std::vector<AttentionItem> items;
  each_run(s, [&](int64_t b, int64_t e, int64_t begin, int64_t end) {
    for (int64_t g = 0; g < s.groups; ++g) {
      if (most == 0) {
        items.push_back({b, e, g, begin, end});
        continue;
      }
      for (int64_t n = begin; n < end; n += most) items.push_back({b, e, g, n, std::min(n + most, end)});
    }
  });
  std::stable_sort(items.begin(), items.end(), [&](const auto& x, const auto& y) { return pairs(s, x) > pairs(s, y); });
  return items;
}

// Few pairs run on the calling thread: to wake another one costs more than it saves.
const ParallelFor& threads_for(const ExpertAttentionShape& s, const std::vector<AttentionItem>& items,
                               const ParallelFor& parallel_for) {
  static const ParallelFor inline_loop = serial;
  int64_t total = 0;
  for (const AttentionItem& item : items) total += pairs(s, item);
  return total * (s.heads / s.groups) * s.head_dim < kGrainProducts ? inline_loop : parallel_for;
}

int64_t most_positions(const std::vector<AttentionItem>& items) {
  int64_t most = 0;
  for (const AttentionItem& item : items) most = std::max(most, item.end - item.begin);
  return most;
}

// Idle rows of a tensor [N, A, D] or [N, A].
template <class T>
void fill_idle(const ExpertAttentionShape& s, void* tensor, int64_t row_size, T value) {
  T* data = static_cast<T*>(tensor);
  std::fill(data + s.offsets[s.experts] * row_size, data + s.rows * row_size, value);
}

}  // namespace

Status expert_attention(const ExpertAttentionParams& p, const ParallelFor& parallel_for) {
  const ExpertAttentionShape& s = p.shape;
  if (!plan_is_valid(s)) return Status::kIndexOutOfRange;
  dispatch(s.dtype, [&]<class T>() {
    fill_idle<T>(s, p.out, s.heads * s.head_dim, T(0));
    fill_idle<accumulator_t<T>>(s, p.logsumexp, s.heads, -static_cast<accumulator_t<T>>(__builtin_inf()));
  });
  const std::vector<AttentionItem> items = work_items(s, kTilesPerItem * tile_positions(s.heads / s.groups));
  const AttentionKernels& code = kernels(s.dtype);
  for_each_item(threads_for(s, items, parallel_for), static_cast<int64_t>(items.size()),
                code.forward_scratch(s, most_positions(items)),
                [&](int64_t i, char* scratch) { code.forward(p, items[i], scratch); });
  return Status::kOk;
}

Status expert_attention_backward(const ExpertAttentionBackwardParams& p, const ParallelFor& parallel_for) {
  const ExpertAttentionShape& s = p.shape;
  if (!plan_is_valid(s)) return Status::kIndexOutOfRange;
  if (p.grad_q) dispatch(s.dtype, [&]<class T>() { fill_idle<T>(s, p.grad_q, s.heads * s.head_dim, T(0)); });
  const std::vector<AttentionItem> items = work_items(s, 0);
  const AttentionKernels& code = kernels(s.dtype);
  for_each_item(threads_for(s, items, parallel_for), static_cast<int64_t>(items.size()),
                code.backward_scratch(s, most_positions(items)),
                [&](int64_t i, char* scratch) { code.backward(p, items[i], scratch); });
  return Status::kOk;
}

}  // namespace micro_kernels::cpu
