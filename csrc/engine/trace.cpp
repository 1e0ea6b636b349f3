#include "engine/trace.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>

namespace micro::engine {

TraceRecorder::TraceRecorder(const ModelConfig& config, at::ScalarType dtype, at::ScalarType accumulator, bool raw_wide,
                             int64_t rows, int64_t experts_per_token)
    : layers_(config.num_hidden_layers), accumulator_(accumulator), lengths_(static_cast<size_t>(rows), 0) {
  const std::vector<std::vector<char>> empty(static_cast<size_t>(rows));
  const int64_t experts = config.num_experts;
  ids_ = {at::kInt, experts_per_token, empty};
  weights_ = {dtype, experts_per_token, empty};
  probs_ = {accumulator, experts, empty};
  logits_ = {accumulator, experts, empty};
  raw_ = {raw_wide ? accumulator : dtype, experts, empty};
}

void TraceRecorder::extend(int64_t origin, int64_t count) {
  const auto row = static_cast<size_t>(origin);
  lengths_[row] += count;
  for (Field* field : {&ids_, &weights_, &probs_, &logits_, &raw_})
    field->rows[row].resize(static_cast<size_t>(lengths_[row] * layers_ * field->bytes()));
}

void TraceRecorder::copy(Field& field, int64_t layer, int64_t origin, int64_t count, const char* from) {
  const int64_t bytes = field.bytes(), first = lengths_[static_cast<size_t>(origin)] - count;
  char* to = field.rows[static_cast<size_t>(origin)].data() + (first * layers_ + layer) * bytes;
  for (int64_t s = 0; s < count; ++s, to += layers_ * bytes, from += bytes)
    std::memcpy(to, from, static_cast<size_t>(bytes));
}

void TraceRecorder::record(int64_t layer, int64_t origin, int64_t first, int64_t count, const LayerDecision& decision) {
  const auto from = [&](const char* data, const Field& field) { return data + first * field.bytes(); };
  copy(ids_, layer, origin, count, from(decision.ids, ids_));
  copy(weights_, layer, origin, count, from(decision.weights, weights_));
  copy(probs_, layer, origin, count, from(decision.probs, probs_));
  copy(logits_, layer, origin, count, from(decision.effective, logits_));
  copy(raw_, layer, origin, count, from(decision.raw, raw_));
  if (!decision.forced) return;
  // A forced row is given to the kernel as probabilities 1 and 0.
  const int64_t slots = lengths_[static_cast<size_t>(origin)];
  for (int64_t s = slots - count; s < slots; ++s) {
    char* row = logits_.rows[static_cast<size_t>(origin)].data() + (s * layers_ + layer) * logits_.bytes();
    at::from_blob(row, {logits_.width}, at::TensorOptions(accumulator_)).log_();
  }
}

void TraceRecorder::share_first_row() {
  std::fill(lengths_.begin() + 1, lengths_.end(), lengths_[0]);
  for (Field* field : {&ids_, &weights_, &probs_, &logits_, &raw_})
    std::fill(field->rows.begin() + 1, field->rows.end(), field->rows[0]);
}

at::Tensor TraceRecorder::tensor(const Field& field, const std::vector<int64_t>& indent, int64_t slots) const {
  const auto rows = static_cast<int64_t>(lengths_.size());
  at::Tensor out = at::zeros({rows, slots, layers_, field.width}, at::TensorOptions(field.type));
  char* data = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t b = 0; b < rows; ++b) {
    const auto& row = field.rows[static_cast<size_t>(b)];
    if (!row.empty())
      std::memcpy(data + (b * slots + indent[static_cast<size_t>(b)]) * layers_ * field.bytes(), row.data(),
                  row.size());
  }
  return out.permute({2, 0, 1, 3}).contiguous();
}

Trace TraceRecorder::assemble(const std::vector<int64_t>& indent) const {
  int64_t slots = 0;
  for (size_t b = 0; b < lengths_.size(); ++b) slots = std::max(slots, indent[b] + lengths_[b]);
  Trace trace{.ids = tensor(ids_, indent, slots),
              .weights = tensor(weights_, indent, slots),
              .probs = tensor(probs_, indent, slots),
              .logits = tensor(logits_, indent, slots),
              .raw_logits = tensor(raw_, indent, slots).to(accumulator_),
              .mask = at::zeros({static_cast<int64_t>(lengths_.size()), slots}, at::kBool)};
  for (size_t b = 0; b < lengths_.size(); ++b)
    trace.mask[static_cast<int64_t>(b)].narrow(0, indent[b], lengths_[b]).fill_(true);
  return trace;
}

}  // namespace micro::engine
