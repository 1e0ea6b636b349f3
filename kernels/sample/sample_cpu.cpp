#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <span>

#include "common/cpu/work.h"
#include "micro_kernels/isa.h"
#include "micro_kernels/sample.h"
#include "sample/philox.h"
#include "sample/sample_loop.h"

namespace micro_kernels {

double sample_uniform(int64_t seed, int64_t step) { return philox_uniform(seed, step); }

namespace cpu {

const SampleLoops kSamplePlain = kLoops;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

const SampleLoops& loops_for_this_cpu() {
#if defined(__x86_64__)
  if (isa() >= Isa::kAvx512) return kSampleAvx512;
  if (isa() >= Isa::kAvx2) return kSampleAvx2;
#endif
  return kSamplePlain;
}

int64_t blocks(int64_t vocab) { return (vocab + kSampleBlock - 1) / kSampleBlock; }

// Working memory of one row.
template <class Acc>
struct Workspace {
  Acc* scores;      // [vocab], later weights
  double* sums;     // [blocks]
  int32_t* ids;     // [vocab] candidates of top_p ...
  Acc* candidates;  // [vocab] ... and their weights
  Acc* largest_k;   // [top_k] a heap, its smallest first

  static int64_t bytes(const SampleParams& p) {
    return blocks(p.vocab) * int64_t{sizeof(double)} + p.vocab * int64_t{2 * sizeof(Acc) + sizeof(int32_t)} +
           std::min(p.top_k, p.vocab) * int64_t{sizeof(Acc)};
  }
  Workspace(char* memory, const SampleParams& p) {
    sums = reinterpret_cast<double*>(memory);
    scores = reinterpret_cast<Acc*>(sums + blocks(p.vocab));
    candidates = scores + p.vocab;
    largest_k = candidates + p.vocab;
    ids = reinterpret_cast<int32_t*>(largest_k + std::min(p.top_k, p.vocab));
  }
};

template <class T, class Acc>
class Row {
 public:
  Row(const SampleParams& p, int64_t row, const SampleLoop<T, Acc>& loop, const SampleLoop<Acc, Acc>& wide,
      char* memory)
      : p_(p),
        row_(row),
        logits_(static_cast<const T*>(p.logits) + row * p.vocab),
        loop_(loop),
        wide_(wide),
        work_(memory, p) {}

  int64_t choose() {
    if (p_.temperature == 0) {
      if (!has_changes()) return lowest_of_largest(loop_, logits_);
      make_scores(1);
      return lowest_of_largest(wide_, work_.scores);
    }
    make_scores(p_.temperature);
    const Acc largest = wide_.largest(work_.scores, p_.vocab);
    if (std::isinf(largest)) return choose_among_infinite(largest);
    return draw(largest);
  }

 private:
  bool is_penalised() const { return p_.repetition_penalty != 1 && p_.previous_count > 0; }
  bool is_barred() const { return p_.min_new_tokens > 0 && p_.steps[row_] < p_.min_new_tokens; }
  bool has_changes() const { return is_penalised() || is_barred(); }

  // z' / divisor.
  void make_scores(double divisor) {
    loop_.divide(logits_, static_cast<Acc>(divisor), work_.scores, p_.vocab);
    if (is_penalised()) {
      const int64_t* previous = p_.previous + row_ * p_.previous_count;
      for (int64_t i = 0; i < p_.previous_count; ++i)  // an id that comes twice is changed once
        if (in_vocabulary(previous[i])) work_.scores[previous[i]] = penalised(previous[i]) / static_cast<Acc>(divisor);
    }
    if (is_barred())
      for (int64_t i = 0; i < p_.stop_count; ++i)
        if (in_vocabulary(p_.stop_ids[i])) work_.scores[p_.stop_ids[i]] = static_cast<Acc>(-kInfinity);
  }

  bool in_vocabulary(int64_t id) const { return id >= 0 && id < p_.vocab; }

  Acc penalised(int64_t id) const {
    T stored = logits_[id];
    Acc logit;
    loop_.divide(&stored, 1, &logit, 1);
    const auto penalty = static_cast<Acc>(p_.repetition_penalty);
    return logit < 0 ? logit * penalty : logit / penalty;
  }

  template <class U>
  int64_t lowest_of_largest(const SampleLoop<U, Acc>& loop, const U* x) const {
    const Acc largest = loop.largest(x, p_.vocab);
    if (largest > static_cast<Acc>(-kInfinity)) return loop.next(x, 0, p_.vocab, largest);
    for (int64_t v = 0; v < p_.vocab; ++v) {  // nothing but -inf and NaN
      Acc value;
      loop.divide(x + v, 1, &value, 1);
      if (!std::isnan(value)) return v;
    }
    return 0;
  }

  // +inf: all of them are as likely; -inf: there is nothing to draw from.
  int64_t choose_among_infinite(Acc largest) {
    if (largest < 0) return lowest_of_largest(wide_, work_.scores);
    for (int64_t v = 0; v < p_.vocab; ++v)
      work_.scores[v] = static_cast<Acc>(work_.scores[v] == largest ? 0 : -kInfinity);
    return draw(0);
  }

  int64_t draw(Acc largest) {
    wide_.weigh(work_.scores, p_.vocab, largest, least_of_top_k(), work_.sums);
    const double u = sample_uniform(p_.seeds[row_], p_.steps[row_]);
    if (p_.top_p < 1) return draw_from(nucleus(), u);
    const int64_t count = blocks(p_.vocab);
    double left = u * std::accumulate(work_.sums, work_.sums + count, 0.0);
    int64_t block = 0;
    while (block + 1 < count && left >= work_.sums[block]) left -= work_.sums[block++];
    return draw_in_block(block, left);
  }

  // The k-th largest score; -inf where all are kept. A heap of the k largest so far; most scores only meet its
  // smallest.
  Acc least_of_top_k() {
    const int64_t k = std::min(p_.top_k, p_.vocab);
    if (k == 0 || k == p_.vocab) return static_cast<Acc>(-kInfinity);
    Acc *begin = work_.largest_k, *end = begin + k;
    std::fill(begin, end, static_cast<Acc>(-kInfinity));
    for (int64_t v = -1; (v = wide_.next(work_.scores, v + 1, p_.vocab, *begin)) < p_.vocab;) {
      if (work_.scores[v] == *begin) continue;
      std::pop_heap(begin, end, std::greater<>());
      end[-1] = work_.scores[v];
      std::push_heap(begin, end, std::greater<>());
    }
    return *begin;
  }

  // Rounding may leave a little beyond the last weight of a block: then it is the last that has any.
  int64_t draw_in_block(int64_t block, double left) const {
    const int64_t end = std::min(p_.vocab, (block + 1) * kSampleBlock);
    int64_t last = -1;
    for (int64_t v = block * kSampleBlock; v < end; ++v) {
      if (work_.scores[v] == 0) continue;
      last = v;
      left -= static_cast<double>(work_.scores[v]);
      if (left < 0) return v;
    }
    return last >= 0 ? last : draw_in_block(block - 1, kInfinity);
  }

  // The ids that top_p keeps, ascending. Only weights from a bound on are looked at, one that leaves enough of them.
  std::span<int32_t> nucleus() {
    const double enough = p_.top_p * std::accumulate(work_.sums, work_.sums + blocks(p_.vocab), 0.0);
    constexpr Acc kAll = std::numeric_limits<Acc>::min();  // exp gives nothing between this and 0
    std::span<int32_t> found;
    for (Acc bound = Acc(1) / 16; found.empty(); bound = bound > Acc(1e-6) ? bound / 16 : kAll) {
      const int64_t count = wide_.collect(work_.scores, p_.vocab, bound, work_.ids);
      double sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(work_.candidates[i] = work_.scores[work_.ids[i]]);
      if (sum >= enough || bound == kAll) found = {work_.ids, static_cast<size_t>(count)};
    }
    const Cut cut = cut_at(enough, {work_.candidates, found.size()});
    size_t kept = 0;
    double before = cut.above;
    for (const int32_t v : found) {
      const Acc weight = work_.scores[v];
      if (weight < cut.weight || (weight == cut.weight && before >= enough && before > 0)) continue;
      if (weight == cut.weight) before += static_cast<double>(weight);
      found[kept++] = v;
    }
    return found.first(kept);
  }

  // The weight at which `enough` is reached, descending, and the sum of all that are larger.
  struct Cut {
    Acc weight;
    double above;
  };

  // By halves, like a selection: the part that holds the cut is divided again. Reorders the weights.
  static Cut cut_at(double enough, std::span<Acc> weights) {
    double above = 0;
    for (;;) {
      const Acc pivot = weights[weights.size() / 2];
      const auto smaller = std::partition(weights.begin(), weights.end(), [=](Acc w) { return w > pivot; });
      const double larger = std::accumulate(weights.begin(), smaller, 0.0);
      if (smaller != weights.begin() && above + larger >= enough) {
        weights = {weights.begin(), smaller};
        continue;
      }
      const auto rest = std::partition(smaller, weights.end(), [=](Acc w) { return w == pivot; });
      const double equal = static_cast<double>(pivot) * static_cast<double>(rest - smaller);
      if (above + larger + equal >= enough || rest == weights.end()) return {pivot, above + larger};
      above += larger + equal;
      weights = {rest, weights.end()};
    }
  }

  int64_t draw_from(std::span<const int32_t> kept, double u) const {
    const auto weight = [&](int32_t v) { return static_cast<double>(work_.scores[v]); };
    double left = 0;
    for (const int32_t v : kept) left += weight(v);
    left *= u;
    for (const int32_t v : kept)
      if ((left -= weight(v)) < 0) return v;
    return kept.back();
  }

  const SampleParams& p_;
  int64_t row_;
  const T* logits_;
  const SampleLoop<T, Acc>& loop_;
  const SampleLoop<Acc, Acc>& wide_;
  Workspace<Acc> work_;
};

template <class T, class Acc>
void sample_rows(const SampleParams& p, const SampleLoop<T, Acc>& loop, const SampleLoop<Acc, Acc>& wide,
                 const ParallelFor& parallel_for) {
  for_each_item(parallel_for, p.rows, Workspace<Acc>::bytes(p),
                [&](int64_t row, char* memory) { p.ids[row] = Row<T, Acc>(p, row, loop, wide, memory).choose(); });
}

}  // namespace

Status sample(const SampleParams& p, const ParallelFor& parallel_for) {
  const SampleLoops& loops = loops_for_this_cpu();
  switch (p.dtype) {
    case DType::kFloat32:
      sample_rows(p, loops.float32, loops.float32, parallel_for);
      break;
    case DType::kFloat64:
      sample_rows(p, loops.float64, loops.float64, parallel_for);
      break;
    case DType::kBFloat16:
      sample_rows(p, loops.bfloat16, loops.float32, parallel_for);
      break;
    case DType::kFloat16:  // on CUDA only: refused by callers
      break;
  }
  return Status::kOk;
}

}  // namespace cpu
}  // namespace micro_kernels
