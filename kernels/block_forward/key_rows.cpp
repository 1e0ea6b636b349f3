#include "block_forward/key_rows.h"

#include <algorithm>
#include <cstring>
#include <tuple>

namespace micro_kernels::cpu {
namespace {

// A row with a length of its own keeps nothing of what is not real: its next call begins there.
bool keeps(const BlockForwardParams& p, int64_t token) { return !p.starts || !p.real || p.real[token]; }

}  // namespace

void list_all_tokens(const BlockForwardParams& p, const int32_t* offsets, bool own_norms, const KeyRows& list) {
  const Sizes size(p);
  int32_t row = 0;
  for (int64_t e = 0; e < size.key_experts; ++e) {
    list.offsets[e] = row;
    if (offsets && offsets[e] == offsets[e + 1]) continue;
    for (int64_t t = 0; t < size.tokens; ++t) {
      if (!keeps(p, t)) continue;
      list.source[row] = static_cast<int32_t>(own_norms ? e * size.tokens + t : t);
      list.expert[row] = static_cast<int32_t>(e);
      list.batch[row] = static_cast<int32_t>(t / p.slots);
      list.slot[row] = static_cast<int32_t>(first_slot(p, t / p.slots) + t % p.slots);
      list.position[row] = p.position ? p.position[t] : static_cast<int32_t>(t);
      ++row;
    }
  }
  list.offsets[size.key_experts] = row;
}

MissingKeys missing_keys(const BlockForwardParams& p, const int32_t* tokens, const int32_t* offsets) {
  // A mask that replaces the causal rule may show a query what comes behind it.
  const bool to_the_end = p.mask_kind == AttentionMask::kPairs || p.mask_kind == AttentionMask::kBias;
  MissingKeys missing;
  for (int64_t e = 0; e < p.shape.experts; ++e) {
    const int32_t* next = tokens + offsets[e];
    const int32_t* const end = tokens + offsets[e + 1];
    for (int64_t b = 0; b < p.batch && next != end; ++b) {
      const int32_t* const behind = std::lower_bound(next, end, static_cast<int32_t>((b + 1) * p.slots));
      if (behind == next) continue;
      const int64_t start = first_slot(p, b), filled = p.cache.filled[b * p.shape.experts + e];
      const int64_t last = to_the_end ? p.slots : behind[-1] % p.slots + 1;
      if (filled < start) missing.late.push_back({e, b, filled, start});
      missing.now.push_back({e, b, start, start + last});
      next = behind;
    }
  }
  return missing;
}

int64_t total_slots(const std::vector<SlotRange>& ranges) {
  int64_t total = 0;
  for (const SlotRange& range : ranges) total += range.end - range.begin;
  return total;
}

std::vector<std::vector<SlotRange>> in_batches(const std::vector<SlotRange>& ranges, int64_t most) {
  std::vector<std::vector<SlotRange>> batches;
  int64_t room = 0;
  for (SlotRange range : ranges) {
    while (range.begin < range.end) {
      if (room == 0) {
        batches.emplace_back();
        room = most;
      }
      SlotRange part = range;
      part.end = std::min(range.end, range.begin + room);
      batches.back().push_back(part);
      room -= part.end - part.begin;
      range.begin = part.end;
    }
  }
  return batches;
}

std::vector<SlotRange> joined(const std::vector<SlotRange>& a, const std::vector<SlotRange>& b) {
  std::vector<SlotRange> all(a);
  all.insert(all.end(), b.begin(), b.end());
  std::sort(all.begin(), all.end(), [](const SlotRange& x, const SlotRange& y) {
    return std::tie(x.expert, x.batch, x.begin) < std::tie(y.expert, y.batch, y.begin);
  });
  return all;
}

void list_ranges(const BlockForwardParams& p, const std::vector<SlotRange>& ranges, bool normalised,
                 const KeyRows& list, int32_t* first_late) {
  const int64_t input_rows = p.cache.x_batch_stride / p.shape.hidden;
  int32_t row = 0;
  auto range = ranges.begin();
  for (int64_t e = 0; e < p.shape.experts; ++e) {
    list.offsets[e] = row;
    for (; range != ranges.end() && range->expert == e; ++range) {
      const int64_t b = range->batch;
      for (int64_t slot = range->begin; slot < range->end; ++slot, ++row) {
        if (slot == first_slot(p, b)) first_late[b * p.shape.experts + e] = row;
        list.source[row] = normalised ? row : static_cast<int32_t>(b * input_rows + slot);
        list.expert[row] = static_cast<int32_t>(e);
        list.batch[row] = static_cast<int32_t>(b);
        list.slot[row] = static_cast<int32_t>(slot);
        list.position[row] =
            p.cache.positions ? p.cache.positions[b * p.cache.positions_stride + slot] : static_cast<int32_t>(slot);
      }
    }
  }
  list.offsets[p.shape.experts] = row;
}

void store_inputs(const BlockForwardParams& p) {
  const int64_t element = element_bytes(p.shape.dtype), bytes = p.shape.hidden * element;
  for (int64_t t = 0; t < p.batch * p.slots; ++t) {
    if (!keeps(p, t)) continue;
    const int64_t b = t / p.slots, slot = first_slot(p, b) + t % p.slots;
    std::memcpy(static_cast<char*>(p.cache.x) + b * p.cache.x_batch_stride * element + slot * bytes,
                static_cast<const char*>(p.x) + t * bytes, bytes);
  }
}

}  // namespace micro_kernels::cpu
