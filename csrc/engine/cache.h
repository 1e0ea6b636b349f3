#pragma once
// Keys, values and (lazy policy) the layers' inputs of the rows that an engine has read (model.md 3, performance.md
// 9.14). Address space is reserved for `slots` tokens per row; pages appear where something is written.

#include <cstdint>
#include <numeric>
#include <vector>

#include "engine/memory.h"
#include "micro/engine.h"
#include "micro_kernels/block_forward.h"

namespace micro::engine {

struct CacheShape {
  int64_t layers, experts, groups, head_dim, hidden;  // experts: those with keys of their own
  int64_t element;                                    // bytes
  bool lazy;
};

class Cache {
 public:
  explicit Cache(const CacheShape& shape) : shape_(shape) {}

  int64_t rows() const { return static_cast<int64_t>(lengths_.size()); }
  int64_t slots() const { return slots_; }  // for which there is room in each row
  int32_t length(int64_t row) const { return lengths_[static_cast<size_t>(row)]; }
  const std::vector<int32_t>& lengths() const { return lengths_; }
  const CacheShape& shape() const { return shape_; }

  void start(int64_t rows, int64_t slots);     // empty rows
  void reserve(int64_t slots);                 // room for so many slots, what is there stays
  void advance(const int32_t* counts);         // each row has so many slots more
  void truncate(int64_t row, int32_t length);  // to the row's length or less
  void drop(int64_t row);                      // the last row takes its number
  void select(const std::vector<int64_t>& rows);
  void reset();

  // Without the table of positions, which is the caller's.
  micro_kernels::BlockCache view(int64_t layer) const;

  // ---- lazy keys and values: slots below filled(layer, row)[e] are made, inputs from inputs_from() on are kept ----
  int32_t* filled(int64_t layer, int64_t row) {
    return filled_.data() + (layer * capacity_rows_ + row) * shape_.experts;
  }
  const int32_t* filled(int64_t layer, int64_t row) const {
    return filled_.data() + (layer * capacity_rows_ + row) * shape_.experts;
  }

  // To which slot experts that lag behind must be made up, so that a slot never takes more memory than keys and values
  // of all experts (performance.md 4.3). Small lags are left alone: they are made up together.
  int32_t due(int64_t layer, int64_t row) const;

  // Gives the inputs back that no expert needs any more.
  void release_inputs(int64_t layer, int64_t row);

  const char* input(int64_t layer, int64_t row, int64_t slot) const;
  char* key(int64_t layer, int64_t row, int64_t expert, int64_t group, int64_t slot) const;
  char* value(int64_t layer, int64_t row, int64_t expert, int64_t group, int64_t slot) const;

  CacheBytes bytes() const;

 private:
  int64_t head_bytes() const { return shape_.head_dim * shape_.element; }
  int64_t input_bytes() const { return shape_.hidden * shape_.element; }
  int64_t group_stride() const { return slots_ * head_bytes(); }
  int64_t row_stride() const { return round_up(shape_.experts * shape_.groups * group_stride(), page_bytes()); }
  // Whole pages, so that rows share none, and whole inputs: kernels count a row's distance in them.
  int64_t input_stride() const { return round_up(slots_ * input_bytes(), std::lcm(page_bytes(), input_bytes())); }
  char* head(const std::vector<Mapping>& store, int64_t layer, int64_t row, int64_t expert, int64_t group,
             int64_t slot) const;
  int32_t& inputs_from(int64_t layer, int64_t row) {
    return inputs_from_[static_cast<size_t>(layer * capacity_rows_ + row)];
  }
  int32_t inputs_from(int64_t layer, int64_t row) const {
    return inputs_from_[static_cast<size_t>(layer * capacity_rows_ + row)];
  }
  int32_t made(int64_t layer, int64_t row, int64_t expert) const;
  void allocate(int64_t rows, int64_t slots);
  void copy_row(const Cache& from, int64_t source, int64_t target);
  void discard_heads(int64_t layer, int64_t row, int32_t begin, int32_t end);
  void discard_inputs(int64_t layer, int64_t row, int32_t begin, int32_t end);

  CacheShape shape_;
  int64_t slots_ = 0, capacity_rows_ = 0;
  std::vector<Mapping> keys_, values_, inputs_;  // one of each per layer
  std::vector<int32_t> lengths_;
  std::vector<int32_t> filled_;       // [L, rows, E]
  std::vector<int32_t> inputs_from_;  // [L, rows]
};

}  // namespace micro::engine
