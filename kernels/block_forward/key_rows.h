#pragma once
// Which keys and values a call makes: of all tokens, of the experts that are used, or, in a lazy cache, of the slots
// that an expert has not seen since it was last used.

#include <vector>

#include "block_forward/buffers.h"

namespace micro_kernels::cpu {

// Slots [begin, end) of one expert in one row.
struct SlotRange {
  int64_t expert, batch, begin, end;
};

inline int64_t first_slot(const BlockForwardParams& p, int64_t batch) { return p.starts ? p.starts[batch] : p.start; }

// All tokens for every expert; with `offsets`, only for experts that have a row. Source rows are tokens, or, where
// every expert has a norm of its own, expert * tokens + token.
void list_all_tokens(const BlockForwardParams& p, const int32_t* offsets, bool own_norms, const KeyRows& list);

// Lazy: what a plan needs and has not been made. `late` are slots before this call.
struct MissingKeys {
  std::vector<SlotRange> late, now;
};
MissingKeys missing_keys(const BlockForwardParams& p, const int32_t* tokens, const int32_t* offsets);

int64_t total_slots(const std::vector<SlotRange>& ranges);
// Cuts ranges, in order, into lists of at most `most` slots.
std::vector<std::vector<SlotRange>> in_batches(const std::vector<SlotRange>& ranges, int64_t most);
// Ranges sorted by expert, then row, then slot.
std::vector<SlotRange> joined(const std::vector<SlotRange>& a, const std::vector<SlotRange>& b);
// Source rows are list rows, or, where the cached input is read as it is, rows of the cached input.
void list_ranges(const BlockForwardParams& p, const std::vector<SlotRange>& ranges, bool normalised,
                 const KeyRows& list, int32_t* first_late);

// The call's inputs into a lazy cache.
void store_inputs(const BlockForwardParams& p);

}  // namespace micro_kernels::cpu
