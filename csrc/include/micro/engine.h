#pragma once
// Generation without Python: weights packed once, a key/value cache of its own, steering and traces per row.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "micro/checkpoint.h"
#include "micro/config.h"
#include "micro/interventions.h"

namespace micro {

namespace engine {
struct State;
}

// How the engine holds weight matrices: packed in the element type (exact), or as 8-bit integers with one scale per
// output (half of bfloat16's memory; quantization_errors() says what it costs).
enum class WeightStore { kPacked, kInt8 };

// When keys and values of whole-block experts are made (model.md 3.4): for the experts that are used, when they are
// used, from the kept inputs of the layer; or for all experts at once. The results are the same bits.
enum class KeyValuePolicy { kLazy, kEager };

struct EngineOptions {
  std::optional<Numerics> numerics = {};  // none: the configuration's
  WeightStore weights = WeightStore::kPacked;
  KeyValuePolicy keys_values = KeyValuePolicy::kLazy;  // FFN experts share one set: always at once
  std::optional<at::ScalarType> dtype = {};            // kFloat, kDouble or kBFloat16; none: that of the tensors
  int64_t max_length = 0;                              // tokens that a row may hold; 0: max_position_embeddings
};

// Relative error of int8 weights: of the largest element, and root mean square over all elements.
struct QuantizationError {
  double max = 0;
  double rms = 0;
};

// Steering of one call (model.md 4.2, 4.3). An undefined tensor is no control. Every axis may be 1: the same for all.
// B: rows of the call; L: layers; S: slots of the call, counted from each row's first new token; E: experts.
struct Controls {
  at::Tensor ablate = {};  // bool [B|1, L|1, S|1, E]
  at::Tensor bias = {};    // float32 or float64 [B|1, L|1, S|1, E], added to the router logits; -inf ablates
  at::Tensor force = {};   // int64 [B|1, L|1, S|1]: the expert, -1: free
  at::Tensor labels = {};  // int64 [B|1, S|1]: the expert, in every layer (label routing); not together with bias

  bool empty() const { return !ablate.defined() && !bias.defined() && !force.defined() && !labels.defined(); }
};

// Routing decisions: rows of unequal length stand side by side; mask says which slots are real.
struct Trace {
  at::Tensor ids;         // int32 [L, B, S, K], descending by probability
  at::Tensor weights;     // [L, B, S, K], element type
  at::Tensor probs;       // [L, B, S, E] float32 (float64 for float64), as the next two
  at::Tensor logits;      // after steering; the given rows under label routing
  at::Tensor raw_logits;  // before steering
  at::Tensor mask;        // bool [B, S]
  int64_t start = 0;      // slot of the first column
  int64_t prompt_length = 0;
};

struct CallOptions {
  Controls controls = {};
  int64_t experts_per_token = 0;  // 0: the configuration's
  int64_t chunk = 0;              // tokens per row that are worked off at a time; 0: as many as are fast
  bool all_logits = false;        // of all tokens, not of each row's last
  bool trace = false;
  std::function<void()> on_step = {};  // between chunks; an exception ends the call and leaves the rows as they were
  Interventions* interventions = nullptr;  // acts on the call's activations and keeps what it reads; not owned
};

struct CallResult {
  at::Tensor logits;           // float32 (float64 for float64) [B, V]; with all_logits [B, S, V], 0 behind short rows
  std::optional<Trace> trace;  // rows begin in the first column
};

// How a row's next token is drawn. Equal seeds give equal tokens, whatever else is in the batch.
struct Sampling {
  double temperature = 0;         // 0: the most probable token
  int64_t top_k = 0;              // 0: all
  double top_p = 1;               // smallest set of tokens with at least this probability
  double repetition_penalty = 1;  // above 1 discourages tokens of the prompt and the answer
  uint64_t seed = 0;
};

// Why a row ended.
enum class Finish { kLength, kStop, kCallback, kCancelled };
const char* name(Finish value);

struct GenerateOptions {
  int64_t max_new_tokens = 128;
  int64_t min_new_tokens = 0;                            // before so many, no stop id is drawn
  std::vector<Sampling> sampling = {{}};                 // one for all rows (row r: seed + r), or one per row
  std::optional<std::vector<int64_t>> stop_ids = {};     // none: the configuration's end-of-sequence ids
  Controls prompt = {};                                  // while the prompt is read
  Controls answer = {};                                  // afterwards; S is 1
  std::function<Controls(int64_t step)> answer_at = {};  // in place of `answer`: before the pass of new token 1, 2, ...
  int64_t experts_per_token = 0;                         // 0: the configuration's
  int64_t chunk = 0;                                     // as in CallOptions
  bool trace = false;                                    // of prompt + new tokens - 1 slots
  std::function<bool(int64_t row, int64_t token)> on_token = {};  // every new token; true: the row ends with it
  std::function<void()> on_step = {};                             // between steps; an exception ends the generation
  Interventions* interventions = nullptr;                         // as in CallOptions; rows: of the prompts
  int64_t shared_prefix = 0;  // tokens with which all prompts begin: read once, in one row that is then copied, without
                              // actions and controls, which begin behind it; S axes of `prompt` count from there
};

struct Generation {
  std::vector<std::vector<int64_t>> tokens;  // new tokens of each row, the stop token included
  std::vector<Finish> finish;
  std::optional<Trace> trace;  // prompts end in the same column
};

struct CacheBytes {
  int64_t keys_values = 0;  // made
  int64_t inputs = 0;       // kept inputs of layers, from which keys and values can still be made
  int64_t resident = 0;     // pages in memory
};

// A model that answers, on the CPU.
//
//   micro::Engine engine = micro::Engine::open("micro-135m");
//   micro::Generation answer = engine.generate({{1, 400, 28}}, {.max_new_tokens = 64});
//
// An engine holds the rows that it has read: prefill and decode append to them, generate starts anew. Rows may have
// different lengths; each is computed as if it were alone, so that batches, chunks and numbers of threads never change
// a bit. Threads are LibTorch's (at::set_num_threads). One engine serves one caller at a time (a second one is an
// error), several engines several threads; cancel() may come from any thread. A forked child may go on with its copy of
// an engine, in one thread.
class Engine {
 public:
  // From a folder by memory map (micro/checkpoint.h). Throws ValueError.
  static Engine open(const std::string& folder, const EngineOptions& options = {});
  explicit Engine(const Checkpoint& checkpoint, const EngineOptions& options = {});

  // From the parameters of a Python model, by in-memory name: "model.layers.3.blocks.q_proj.weight" [E, out, in].
  // Nothing of them is kept. Throws ValueError that lists what is missing or has another shape.
  Engine(const ModelConfig& config, const std::map<std::string, at::Tensor>& parameters,
         const EngineOptions& options = {});

  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;
  ~Engine();

  const ModelConfig& config() const;
  at::ScalarType dtype() const;
  Numerics numerics() const;
  int64_t max_length() const;
  int64_t weight_bytes() const;
  std::map<std::string, QuantizationError> quantization_errors() const;  // by kind of matrix; empty unless int8

  // Appends tokens to the rows; the first call makes the rows. Every row gets at least one token.
  CallResult prefill(const std::vector<std::vector<int64_t>>& tokens, const CallOptions& options = {});

  // Appends one token to each row: [B] int64.
  CallResult decode(const at::Tensor& tokens, const CallOptions& options = {});

  // Forgets all rows, reads the prompts and writes until every row has ended; rows that ended cost nothing more.
  Generation generate(const std::vector<std::vector<int64_t>>& prompts, const GenerateOptions& options = {});

  // The running generate() ends after its present step, with what it has.
  void cancel();

  // ---- the rows that were read ----
  int64_t rows() const;
  std::vector<int64_t> lengths() const;
  void truncate(int64_t length);                  // every row keeps its first `length` tokens at most
  void truncate(int64_t row, int64_t length);     // this row
  void select(const std::vector<int64_t>& rows);  // row i becomes what rows[i] was: choose, reorder, repeat
  void reset();                                   // forgets all rows and gives their memory back
  CacheBytes cache_bytes() const;

 private:
  std::unique_ptr<engine::State> state_;
};

}  // namespace micro
