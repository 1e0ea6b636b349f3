// The loop from prompts to answers.

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "engine/sampler.h"
#include "engine/state.h"

namespace micro {
namespace {

using engine::BoundControls;
using engine::PreparedControls;

// The rows that still write. Position b in the batch belongs to prompt origins[b].
class Answers {
 public:
  Answers(engine::State& state, const std::vector<std::vector<int64_t>>& prompts, const GenerateOptions& options)
      : state_(state),
        options_(options),
        stops_(options.stop_ids.value_or(state.config.eos_token_ids)),
        sampler_(options, stops_, static_cast<int64_t>(prompts.size()), state.config.vocab_size),
        origins_(prompts.size()) {
    std::iota(origins_.begin(), origins_.end(), 0);
    result_.tokens.resize(prompts.size());
    result_.finish.assign(prompts.size(), Finish::kCancelled);
    for (size_t row = 0; row < prompts.size(); ++row)
      for (const int64_t token : prompts[row]) sampler_.see(static_cast<int64_t>(row), token);
  }

  bool any() const { return !origins_.empty(); }
  const std::vector<int64_t>& origins() const { return origins_; }
  const std::vector<int64_t>& next() const { return next_; }  // token of each row of the batch
  Generation& result() { return result_; }

  // A token for every row; rows that end leave the batch, and the last row takes their place. Returns whether any did.
  bool take(const at::Tensor& logits) {
    const size_t count = origins_.size();
    steps_.clear();
    for (const int64_t row : origins_) steps_.push_back(static_cast<int64_t>(tokens(row).size()));
    sampler_.draw(logits, origins_, steps_, next_);
    ends_.resize(count);
    for (size_t b = 0; b < count; ++b) {
      tokens(origins_[b]).push_back(next_[b]);
      sampler_.see(origins_[b], next_[b]);
      ends_[b] = end(origins_[b], next_[b]);
    }
    for (size_t b = count; b-- > 0;) {
      if (!ends_[b]) continue;
      result_.finish[static_cast<size_t>(origins_[b])] = *ends_[b];
      state_.cache.drop(static_cast<int64_t>(b));
      for (auto* list : {&origins_, &next_}) {
        (*list)[b] = list->back();
        list->pop_back();
      }
    }
    return origins_.size() < count;
  }

 private:
  std::vector<int64_t>& tokens(int64_t row) { return result_.tokens[static_cast<size_t>(row)]; }

  // Why a row ends with its newest token, or nothing.
  std::optional<Finish> end(int64_t row, int64_t token) {
    const bool told = options_.on_token && options_.on_token(row, token);
    if (std::find(stops_.begin(), stops_.end(), token) != stops_.end()) return Finish::kStop;
    if (told) return Finish::kCallback;
    return static_cast<int64_t>(tokens(row).size()) >= options_.max_new_tokens ? std::optional(Finish::kLength)
                                                                               : std::nullopt;
  }

  engine::State& state_;
  const GenerateOptions& options_;
  std::vector<int64_t> stops_;
  engine::Sampler sampler_;
  std::vector<int64_t> origins_, next_, steps_;
  std::vector<std::optional<Finish>> ends_;
  Generation result_;
};

void check_options(const engine::State& state, const std::vector<std::vector<int64_t>>& prompts,
                   const GenerateOptions& options) {
  state.check_ids(prompts);
  TORCH_CHECK_VALUE(options.max_new_tokens >= 1, "Engine: max_new_tokens is ", options.max_new_tokens,
                    ", expected at least 1");
  TORCH_CHECK_VALUE(options.chunk >= 0, "Engine: chunk is ", options.chunk, ", expected a number of tokens or 0");
  for (size_t row = 0; row < prompts.size(); ++row)
    TORCH_CHECK_VALUE(static_cast<int64_t>(prompts[row].size()) + options.max_new_tokens - 1 <= state.max_length,
                      "Engine: prompt ", row, " has ", prompts[row].size(),
                      " tokens; with max_new_tokens = ", options.max_new_tokens,
                      " it exceeds max_length = ", state.max_length);
  const int64_t shared = options.shared_prefix;
  TORCH_CHECK_VALUE(shared >= 0, "Engine: shared_prefix is ", shared, ", expected a number of tokens");
  for (size_t row = 0; row < prompts.size(); ++row) {
    TORCH_CHECK_VALUE(static_cast<int64_t>(prompts[row].size()) > shared, "Engine: shared_prefix is ", shared,
                      " and prompt ", row, " has ", prompts[row].size(), " tokens; at least one must be behind it");
    TORCH_CHECK_VALUE(std::equal(prompts[row].begin(), prompts[row].begin() + shared, prompts[0].begin()),
                      "Engine: prompt ", row, " differs from prompt 0 in the first ", shared,
                      " tokens, which shared_prefix says they share");
  }
}

// What the prompts have behind their first `shared` tokens.
std::vector<std::vector<int64_t>> behind(const std::vector<std::vector<int64_t>>& prompts, int64_t shared) {
  std::vector<std::vector<int64_t>> rest;
  for (const auto& prompt : prompts) rest.emplace_back(prompt.begin() + shared, prompt.end());
  return rest;
}

// The cache is empty afterwards, by whatever way.
struct EmptyAtEnd {
  engine::Cache& cache;
  ~EmptyAtEnd() { cache.reset(); }
};

}  // namespace

Generation Engine::generate(const std::vector<std::vector<int64_t>>& prompts, const GenerateOptions& options) {
  engine::State& s = *state_;
  const engine::Turn turn(s);
  check_options(s, prompts, options);
  const auto rows = static_cast<int64_t>(prompts.size());
  const int64_t k = s.experts_per_token(options.experts_per_token);
  const PreparedControls in_prompt(options.prompt, s.config, rows, s.accumulator());
  const auto prepared = [&](const Controls& controls) {
    const PreparedControls out(controls, s.config, rows, s.accumulator());
    TORCH_CHECK_VALUE(out.same_at_all_slots(),
                      "controls: those of the answer hold for all its tokens; their S axis is 1");
    return out;
  };
  const PreparedControls in_answer = prepared(options.answer);
  int64_t longest = 0;
  for (const auto& prompt : prompts) longest = std::max(longest, static_cast<int64_t>(prompt.size()));

  Answers answers(s, prompts, options);
  const auto trace = s.recorder(options.trace, rows, k);
  engine::ActionTable* const actions = s.actions(options.interventions);
  const EmptyAtEnd empty{s.cache};
  s.cancelled.store(false);
  s.cache.reset();
  const auto step = [&] {
    if (options.on_step) options.on_step();
    return s.cancelled.load();
  };
  at::Tensor logits;
  const auto read = [&](const std::vector<std::vector<int64_t>>& tokens, const PreparedControls& controls,
                        engine::ActionTable* acting) {
    return s.read({.tokens = tokens,
                   .controls = controls,
                   .k = k,
                   .chunk = options.chunk,
                   .all_logits = false,
                   .trace = trace.get(),
                   .step = step,
                   .actions = acting},
                  logits);
  };
  const int64_t shared = options.shared_prefix;
  bool going = true;
  s.cache.start(shared > 0 ? 1 : rows, longest + options.max_new_tokens);
  if (shared > 0) {
    const std::vector<int64_t> prefix(prompts[0].begin(), prompts[0].begin() + shared);
    going = read({prefix}, PreparedControls(Controls{}, s.config, 1, s.accumulator()), nullptr);
    s.cache.select(std::vector<int64_t>(prompts.size(), 0));
    if (trace) trace->share_first_row();
  }
  going = going && read(behind(prompts, shared), in_prompt, actions);
  BoundControls controls(s.config, s.accumulator());
  const std::vector<int32_t> ones(prompts.size(), 1);
  const std::vector<int64_t> zeros(prompts.size(), 0);
  std::vector<int64_t> batch(prompts.size());
  std::iota(batch.begin(), batch.end(), 0);
  for (int64_t number = 1; going; ++number) {
    const bool changed = answers.take(logits) || number == 1;
    if (!answers.any() || step()) break;
    const auto count = static_cast<int64_t>(answers.origins().size());
    const engine::CallRows call{count, 1, ones.data(), zeros.data(), answers.origins().data()};
    if (options.answer_at)
      controls.bind(prepared(options.answer_at(number)), call);
    else if (changed)
      controls.bind(in_answer, call);
    if (changed) {
      batch.resize(answers.origins().size());
      logits = logits.narrow(0, 0, count);
    }
    s.forward.run({answers.next().data(), ones.data(), answers.origins().data(), count, 1}, controls, k, s.cache,
                  trace.get(), actions);
    s.forward.logits(batch, zeros, logits);
  }
  if (trace) {
    std::vector<int64_t> indent;
    for (const auto& prompt : prompts) indent.push_back(longest - static_cast<int64_t>(prompt.size()));
    answers.result().trace = trace->assemble(indent);
    answers.result().trace->prompt_length = longest;
  }
  return std::move(answers.result());
}

}  // namespace micro
