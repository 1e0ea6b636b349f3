#include "engine/cache.h"

#include <algorithm>
#include <cstring>

namespace micro::engine {
namespace {

// Slots by which the slowest experts may lag behind a full set of keys and values before they are made up: one reading
// of their weights serves so many slots.
constexpr int32_t kLag = 64;

}  // namespace

// ---- rows ----------------------------------------------------------------------------------------------------------

void Cache::allocate(int64_t rows, int64_t slots) {
  capacity_rows_ = rows;
  slots_ = slots;
  const auto layers = static_cast<size_t>(shape_.layers);
  keys_.clear();
  values_.clear();
  inputs_.clear();
  keys_.reserve(layers);
  values_.reserve(layers);
  for (size_t l = 0; l < layers; ++l) {
    keys_.emplace_back(rows * row_stride(), Pages::kSmall);
    values_.emplace_back(rows * row_stride(), Pages::kSmall);
    if (shape_.lazy) inputs_.emplace_back(rows * input_stride(), Pages::kSmall);
  }
  lengths_.assign(static_cast<size_t>(rows), 0);
  filled_.assign(layers * static_cast<size_t>(rows * shape_.experts), 0);
  inputs_from_.assign(layers * static_cast<size_t>(rows), 0);
}

void Cache::start(int64_t rows, int64_t slots) { allocate(rows, slots); }

void Cache::reset() {
  keys_.clear();
  values_.clear();
  inputs_.clear();
  lengths_.clear();
  filled_.clear();
  inputs_from_.clear();
  slots_ = capacity_rows_ = 0;
}

void Cache::reserve(int64_t slots) {
  if (slots <= slots_) return;
  Cache larger(shape_);
  larger.allocate(rows(), slots);
  for (int64_t row = 0; row < rows(); ++row) larger.copy_row(*this, row, row);
  *this = std::move(larger);
}

void Cache::select(const std::vector<int64_t>& rows) {
  Cache chosen(shape_);
  chosen.allocate(static_cast<int64_t>(rows.size()), slots_);
  for (size_t i = 0; i < rows.size(); ++i) chosen.copy_row(*this, rows[i], static_cast<int64_t>(i));
  *this = std::move(chosen);
}

void Cache::drop(int64_t row) {
  const int64_t last = rows() - 1;
  if (row != last) {
    truncate(row, 0);
    copy_row(*this, last, row);
  }
  truncate(last, 0);
  lengths_.pop_back();
}

void Cache::advance(const int32_t* counts) {
  for (size_t row = 0; row < lengths_.size(); ++row) lengths_[row] += counts[row];
}

void Cache::truncate(int64_t row, int32_t length) {
  int32_t& own = lengths_[static_cast<size_t>(row)];
  for (int64_t l = 0; l < shape_.layers; ++l) {
    discard_heads(l, row, length, own);
    if (!shape_.lazy) continue;
    discard_inputs(l, row, length, static_cast<int32_t>(slots_));
    int32_t* slots_made = filled(l, row);
    for (int64_t e = 0; e < shape_.experts; ++e) slots_made[e] = std::min(slots_made[e], length);
    inputs_from(l, row) = std::min(inputs_from(l, row), length);
  }
  own = length;
}

// Into an empty row.
void Cache::copy_row(const Cache& from, int64_t source, int64_t target) {
  const int32_t length = from.length(source);
  for (int64_t l = 0; l < shape_.layers; ++l) {
    for (int64_t e = 0; e < shape_.experts; ++e) {
      const auto size = static_cast<size_t>(from.made(l, source, e) * head_bytes());
      for (int64_t g = 0; g < shape_.groups; ++g) {
        std::memcpy(key(l, target, e, g, 0), from.key(l, source, e, g, 0), size);
        std::memcpy(value(l, target, e, g, 0), from.value(l, source, e, g, 0), size);
      }
    }
    if (!shape_.lazy) continue;
    std::copy_n(from.filled(l, source), shape_.experts, filled(l, target));
    const int32_t first = inputs_from(l, target) = from.inputs_from(l, source);
    std::memcpy(inputs_[static_cast<size_t>(l)].data() + target * input_stride() + first * input_bytes(),
                from.input(l, source, first), static_cast<size_t>((length - first) * input_bytes()));
  }
  lengths_[static_cast<size_t>(target)] = length;
}

// ---- addresses -----------------------------------------------------------------------------------------------------

char* Cache::head(const std::vector<Mapping>& store, int64_t layer, int64_t row, int64_t expert, int64_t group,
                  int64_t slot) const {
  return store[static_cast<size_t>(layer)].data() + row * row_stride() +
         (expert * shape_.groups + group) * group_stride() + slot * head_bytes();
}

char* Cache::key(int64_t layer, int64_t row, int64_t expert, int64_t group, int64_t slot) const {
  return head(keys_, layer, row, expert, group, slot);
}

char* Cache::value(int64_t layer, int64_t row, int64_t expert, int64_t group, int64_t slot) const {
  return head(values_, layer, row, expert, group, slot);
}

const char* Cache::input(int64_t layer, int64_t row, int64_t slot) const {
  return inputs_[static_cast<size_t>(layer)].data() + row * input_stride() + slot * input_bytes();
}

micro_kernels::BlockCache Cache::view(int64_t layer) const {
  const auto l = static_cast<size_t>(layer);
  const micro_kernels::HeadStrides strides = {row_stride() / shape_.element,
                                              shape_.groups * group_stride() / shape_.element,
                                              group_stride() / shape_.element, shape_.head_dim};
  micro_kernels::BlockCache cache{};
  cache.k = keys_[l].data();
  cache.v = values_[l].data();
  cache.k_strides = cache.v_strides = strides;
  if (shape_.lazy) {
    cache.x = inputs_[l].data();
    cache.x_batch_stride = input_stride() / shape_.element;
    cache.filled = const_cast<int32_t*>(filled(layer, 0));
  }
  return cache;
}

// ---- what is made, kept and given back -----------------------------------------------------------------------------

int32_t Cache::made(int64_t layer, int64_t row, int64_t expert) const {
  return shape_.lazy ? filled(layer, row)[expert] : length(row);
}

// With n experts made, a slot takes n units of keys and values and its input takes x units until all have it. Where
// n + x exceeds all of them, the rest are made and the input goes.
int32_t Cache::due(int64_t layer, int64_t row) const {
  const int64_t unit = 2 * shape_.groups * shape_.head_dim, spare = shape_.experts * unit - shape_.hidden;
  const int32_t* slots_made = filled(layer, row);
  // The largest slot count that `few` or more experts have reached, where few is the least n with n units > spare.
  const int64_t few = std::max<int64_t>(spare < 0 ? 0 : spare / unit + 1, 1);
  if (few >= shape_.experts) return 0;
  int32_t reached = 0, slowest = slots_made[0];
  for (int64_t e = 0; e < shape_.experts; ++e) {
    int64_t others = 0;
    for (int64_t other = 0; other < shape_.experts; ++other) others += slots_made[other] >= slots_made[e];
    if (others >= few) reached = std::max(reached, slots_made[e]);
    slowest = std::min(slowest, slots_made[e]);
  }
  return reached - slowest >= kLag ? reached : 0;
}

void Cache::release_inputs(int64_t layer, int64_t row) {
  const int32_t* slots_made = filled(layer, row);
  const int32_t needed = *std::min_element(slots_made, slots_made + shape_.experts);
  int32_t& from = inputs_from(layer, row);
  // A page that two calls free in part is freed by the second: begin at its first slot.
  if (needed > from) discard_inputs(layer, row, from, needed);
  from = needed;
}

void Cache::discard_heads(int64_t layer, int64_t row, int32_t begin, int32_t end) {
  for (const auto* store : {&keys_, &values_}) {
    const Mapping& mapping = (*store)[static_cast<size_t>(layer)];
    for (int64_t e = 0; e < shape_.experts; ++e)
      for (int64_t g = 0; g < shape_.groups; ++g) {
        const int64_t base = head(*store, layer, row, e, g, 0) - mapping.data();
        const int64_t behind = round_up(base + end * head_bytes(), page_bytes());  // nothing else lies on that page ...
        mapping.discard(base + begin * head_bytes(), std::min(behind, base + group_stride()));  // ... up to here
      }
  }
}

void Cache::discard_inputs(int64_t layer, int64_t row, int32_t begin, int32_t end) {
  const Mapping& mapping = inputs_[static_cast<size_t>(layer)];
  const int64_t base = row * input_stride(), page = page_bytes();
  // Slots before `begin` in its page are free already when the row's first kept input moves up; round down then.
  const int64_t first = begin == inputs_from(layer, row) ? begin * input_bytes() / page * page : begin * input_bytes();
  mapping.discard(base + first, base + end * input_bytes());
}

CacheBytes Cache::bytes() const {
  CacheBytes out;
  for (int64_t l = 0; l < shape_.layers; ++l)
    for (int64_t row = 0; row < rows(); ++row) {
      for (int64_t e = 0; e < shape_.experts; ++e)
        out.keys_values += 2 * made(l, row, e) * shape_.groups * head_bytes();
      if (shape_.lazy) out.inputs += (length(row) - inputs_from(l, row)) * input_bytes();
    }
  for (const auto* store : {&keys_, &values_, &inputs_})
    for (const Mapping& mapping : *store) out.resident += mapping.resident_bytes();
  return out;
}

}  // namespace micro::engine
