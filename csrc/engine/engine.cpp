#include "micro/engine.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "engine/state.h"

namespace micro {
namespace {

using engine::Turn;

constexpr int64_t kChunkTokens = 1024;  // of all rows together; the working memory grows with it
constexpr int64_t kLeastChunk = 32;     // columns
constexpr int64_t kMostHeadDim = 256;

at::ScalarType checked_dtype(at::ScalarType type, WeightStore store) {
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16, "Engine: the tensors are ",
                    type, "; pass the dtype to compute in: float32, bfloat16 or float64");
  TORCH_CHECK_VALUE(store != WeightStore::kInt8 || type != at::kDouble,
                    "Engine: int8 weights go with float32 or bfloat16, not with float64");
  return type;
}

const ModelConfig& checked(const ModelConfig& config) {
  TORCH_CHECK_VALUE(config.head_dim % 8 == 0 && config.head_dim <= kMostHeadDim, "Engine: head_dim is ",
                    config.head_dim, ", expected a multiple of 8 up to ", kMostHeadDim);
  return config;
}

engine::CacheShape cache_shape(const ModelConfig& config, at::ScalarType dtype, KeyValuePolicy policy) {
  return {.layers = config.num_hidden_layers,
          .experts = config.is_block() ? config.num_experts : 1,
          .groups = config.num_key_value_heads,
          .head_dim = config.head_dim,
          .hidden = config.hidden_size,
          .element = static_cast<int64_t>(c10::elementSize(dtype)),
          .lazy = config.is_block() && policy == KeyValuePolicy::kLazy};
}

// A call that fails leaves the rows as they were.
class Undo {
 public:
  explicit Undo(engine::Cache& cache) : cache_(cache), lengths_(cache.lengths()) {}
  ~Undo() {
    if (done_) return;
    if (lengths_.empty()) cache_.reset();
    for (size_t row = 0; row < lengths_.size(); ++row) cache_.truncate(static_cast<int64_t>(row), lengths_[row]);
  }
  Undo(const Undo&) = delete;
  Undo& operator=(const Undo&) = delete;
  void done() { done_ = true; }

 private:
  engine::Cache& cache_;
  std::vector<int32_t> lengths_;
  bool done_ = false;
};

std::vector<int64_t> numbers(int64_t count) {
  std::vector<int64_t> out(static_cast<size_t>(count));
  std::iota(out.begin(), out.end(), 0);
  return out;
}

}  // namespace

const char* name(Finish value) {
  switch (value) {
    case Finish::kLength:
      return "length";
    case Finish::kStop:
      return "stop";
    case Finish::kCallback:
      return "callback";
    case Finish::kCancelled:
      break;
  }
  return "cancelled";
}

engine::Turn::Turn(State& state) : state_(state) {
  TORCH_CHECK(!state.busy.exchange(true), "Engine: another thread is using this engine; make one engine per thread");
  if (getpid() == state.process) return;
  state.process = getpid();
  at::set_num_threads(1);
}

// ---- state ---------------------------------------------------------------------------------------------------------

engine::State::State(ModelConfig model, const EngineOptions& options, at::ScalarType stored,
                     const engine::ModelTensors& tensors, const engine::Weights::Layers& layers)
    : config(checked(model)),
      numerics(options.numerics.value_or(config.numerics)),
      dtype(checked_dtype(options.dtype.value_or(stored), options.weights)),
      max_length(options.max_length > 0 ? options.max_length : config.max_position_embeddings),
      weights(config, tensors, layers, numerics, options.weights, dtype),
      forward(config, weights, numerics),
      cache(cache_shape(config, dtype, options.keys_values)) {
  TORCH_CHECK_VALUE(options.max_length >= 0 && max_length > 0, "Engine: max_length is ", options.max_length,
                    ", expected a number of tokens, or 0 for the configuration's ", config.max_position_embeddings);
}

int64_t engine::State::experts_per_token(int64_t asked) const {
  const int64_t k = asked == 0 ? config.num_experts_per_tok : asked;
  TORCH_CHECK_VALUE(k >= 1 && k <= config.num_experts, "Engine: experts_per_token is ", k, ", expected 1..",
                    config.num_experts);
  return k;
}

void engine::State::check_ids(const std::vector<std::vector<int64_t>>& rows) const {
  TORCH_CHECK_VALUE(!rows.empty(), "Engine: there are no rows; give at least one list of token ids");
  for (size_t b = 0; b < rows.size(); ++b) {
    TORCH_CHECK_VALUE(!rows[b].empty(), "Engine: row ", b, " has no tokens");
    for (const int64_t id : rows[b])
      TORCH_CHECK_VALUE(id >= 0 && id < config.vocab_size, "Engine: row ", b, " holds the token id ", id,
                        ", expected 0..", config.vocab_size - 1);
  }
}

std::unique_ptr<engine::TraceRecorder> engine::State::recorder(bool wanted, int64_t rows, int64_t k) const {
  if (!wanted) return nullptr;
  return std::make_unique<engine::TraceRecorder>(config, dtype, accumulator(), numerics == Numerics::kFast, rows, k);
}

engine::ActionTable* engine::State::actions(const Interventions* given) const {
  if (!given) return nullptr;
  given->table().check_fits(config);
  return &given->table();
}

bool engine::State::read(const Reading& reading, at::Tensor& logits) {
  const auto rows = static_cast<int64_t>(reading.tokens.size());
  int64_t longest = 0;
  for (const auto& row : reading.tokens) longest = std::max(longest, static_cast<int64_t>(row.size()));
  const int64_t chunk = reading.chunk > 0 ? reading.chunk : std::max(kLeastChunk, kChunkTokens / rows);
  const std::vector<int64_t> origins = numbers(rows);
  std::vector<int64_t> ids, offsets(origins.size()), row, column;
  std::vector<int32_t> counts(origins.size());
  engine::BoundControls controls(config, accumulator());
  logits = reading.all_logits ? at::zeros({rows, longest, config.vocab_size}, accumulator())
                              : at::empty({rows, config.vocab_size}, accumulator());
  for (int64_t first = 0; first < longest; first += chunk) {
    if (reading.step && reading.step()) return false;
    const int64_t slots = std::min(chunk, longest - first);
    ids.assign(static_cast<size_t>(rows * slots), 0);
    row.clear();
    column.clear();
    for (int64_t b = 0; b < rows; ++b) {
      const auto& own = reading.tokens[static_cast<size_t>(b)];
      const int64_t length = static_cast<int64_t>(own.size()), count = std::clamp<int64_t>(length - first, 0, slots);
      counts[static_cast<size_t>(b)] = static_cast<int32_t>(count);
      offsets[static_cast<size_t>(b)] = first;
      if (count == 0) continue;
      std::copy_n(own.begin() + first, count, ids.begin() + b * slots);
      const bool ends = first + count == length;
      for (int64_t s = reading.all_logits ? 0 : ends ? count - 1 : count; s < count; ++s) {
        row.push_back(b);
        column.push_back(s);
      }
    }
    controls.bind(reading.controls, {rows, slots, counts.data(), offsets.data(), origins.data()});
    forward.run({ids.data(), counts.data(), origins.data(), rows, slots}, controls, reading.k, cache, reading.trace,
                reading.actions);
    if (row.empty()) continue;
    at::Tensor part = at::empty({static_cast<int64_t>(row.size()), config.vocab_size}, accumulator());
    forward.logits(row, column, part);
    for (size_t i = 0; i < row.size(); ++i) {
      const at::Tensor target = reading.all_logits ? logits[row[i]][first + column[i]] : logits[row[i]];
      target.copy_(part[static_cast<int64_t>(i)]);
    }
  }
  return true;
}

// ---- making --------------------------------------------------------------------------------------------------------

Engine Engine::open(const std::string& folder, const EngineOptions& options) {
  return Engine(Checkpoint::open(folder), options);
}

Engine::Engine(const Checkpoint& checkpoint, const EngineOptions& options)
    : state_(std::make_unique<engine::State>(checkpoint.config(), options, checkpoint.dtype(),
                                             engine::ModelTensors{checkpoint.embed_tokens(), checkpoint.final_norm(),
                                                                  checkpoint.lm_head(), /*mapped=*/true},
                                             [&](int64_t index) { return checkpoint.layer(index); })) {}

Engine::Engine(const ModelConfig& config, const std::map<std::string, at::Tensor>& parameters,
               const EngineOptions& options) {
  const engine::Parameters found(config, parameters);
  state_ = std::make_unique<engine::State>(config, options, found.dtype(), found.tensors(),
                                           [&](int64_t index) { return found.layer(index); });
}

Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;
Engine::~Engine() = default;

const ModelConfig& Engine::config() const { return state_->config; }
at::ScalarType Engine::dtype() const { return state_->dtype; }
Numerics Engine::numerics() const { return state_->numerics; }
int64_t Engine::max_length() const { return state_->max_length; }
int64_t Engine::weight_bytes() const { return state_->weights.bytes(); }
std::map<std::string, QuantizationError> Engine::quantization_errors() const { return state_->weights.errors(); }

// ---- calls ---------------------------------------------------------------------------------------------------------

CallResult Engine::prefill(const std::vector<std::vector<int64_t>>& tokens, const CallOptions& options) {
  engine::State& s = *state_;
  const Turn turn(s);
  s.check_ids(tokens);
  const auto rows = static_cast<int64_t>(tokens.size());
  TORCH_CHECK_VALUE(s.cache.rows() == 0 || s.cache.rows() == rows, "Engine: ", s.cache.rows(),
                    " rows were read before and ", rows, " are given; continue all of them, or reset() first");
  TORCH_CHECK_VALUE(options.chunk >= 0, "Engine: chunk is ", options.chunk, ", expected a number of tokens or 0");
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t length =
        (s.cache.rows() ? s.cache.length(b) : 0) + static_cast<int64_t>(tokens[static_cast<size_t>(b)].size());
    TORCH_CHECK_VALUE(length <= s.max_length, "Engine: row ", b, " would hold ", length, " tokens; max_length is ",
                      s.max_length);
  }
  const int64_t k = s.experts_per_token(options.experts_per_token);
  const engine::PreparedControls controls(options.controls, s.config, rows, s.accumulator());
  const auto trace = s.recorder(options.trace, rows, k);
  Undo undo(s.cache);
  if (s.cache.rows() == 0) s.cache.start(rows, s.max_length);
  CallResult result;
  std::function<bool()> step;
  if (options.on_step)
    step = [&] {
      options.on_step();
      return false;
    };
  s.read({.tokens = tokens,
          .controls = controls,
          .k = k,
          .chunk = options.chunk,
          .all_logits = options.all_logits,
          .trace = trace.get(),
          .step = step,
          .actions = s.actions(options.interventions)},
         result.logits);
  undo.done();
  if (trace) result.trace = trace->assemble(std::vector<int64_t>(tokens.size(), 0));
  return result;
}

CallResult Engine::decode(const at::Tensor& tokens, const CallOptions& options) {
  const int64_t rows = this->rows();
  TORCH_CHECK_VALUE(rows > 0, "Engine: no row was read; prefill() comes before decode()");
  TORCH_CHECK_TYPE(at::isIntegralType(tokens.scalar_type(), false), "Engine: tokens are ", tokens.scalar_type(),
                   ", expected int64");
  TORCH_CHECK_VALUE(tokens.dim() == 1 && tokens.size(0) == rows, "Engine: tokens has shape ", tokens.sizes(),
                    ", expected [", rows, "]: one for each row");
  const at::Tensor ids = tokens.to(at::kLong).cpu().contiguous();
  std::vector<std::vector<int64_t>> lists;
  for (int64_t b = 0; b < rows; ++b) lists.push_back({ids.const_data_ptr<int64_t>()[b]});
  return prefill(lists, options);
}

void Engine::cancel() { state_->cancelled.store(true); }

// ---- rows ----------------------------------------------------------------------------------------------------------

int64_t Engine::rows() const { return state_->cache.rows(); }

std::vector<int64_t> Engine::lengths() const {
  return {state_->cache.lengths().begin(), state_->cache.lengths().end()};
}

void Engine::truncate(int64_t length) {
  for (int64_t row = 0; row < rows(); ++row) truncate(row, std::min<int64_t>(length, state_->cache.length(row)));
}

void Engine::truncate(int64_t row, int64_t length) {
  const Turn turn(*state_);
  TORCH_CHECK_INDEX(row >= 0 && row < rows(), "Engine: row ", row, " does not exist; there are ", rows());
  TORCH_CHECK_VALUE(length >= 0 && length <= state_->cache.length(row), "Engine: row ", row, " holds ",
                    state_->cache.length(row), " tokens and cannot be cut to ", length);
  state_->cache.truncate(row, static_cast<int32_t>(length));
}

void Engine::select(const std::vector<int64_t>& rows) {
  const Turn turn(*state_);
  TORCH_CHECK_VALUE(!rows.empty(), "Engine: select() of no rows; reset() forgets all of them");
  for (const int64_t row : rows)
    TORCH_CHECK_INDEX(row >= 0 && row < this->rows(), "Engine: row ", row, " does not exist; there are ", this->rows());
  state_->cache.select(rows);
}

void Engine::reset() {
  const Turn turn(*state_);
  state_->cache.reset();
}

CacheBytes Engine::cache_bytes() const { return state_->cache.bytes(); }

}  // namespace micro
