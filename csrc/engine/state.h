#pragma once
// What an Engine holds. Nothing of it is shared between engines.

#include <unistd.h>

#include <atomic>
#include <memory>
#include <vector>

#include "engine/cache.h"
#include "engine/forward.h"
#include "engine/interventions.h"
#include "engine/trace.h"
#include "engine/weights.h"
#include "micro/engine.h"

namespace micro::engine {

struct State {
  State(ModelConfig model, const EngineOptions& options, at::ScalarType stored, const ModelTensors& tensors,
        const Weights::Layers& layers);

  at::ScalarType accumulator() const { return dtype == at::kDouble ? at::kDouble : at::kFloat; }
  int64_t experts_per_token(int64_t asked) const;
  void check_ids(const std::vector<std::vector<int64_t>>& rows) const;
  std::unique_ptr<TraceRecorder> recorder(bool wanted, int64_t rows, int64_t k) const;
  ActionTable* actions(const Interventions* given) const;  // nullptr for nothing

  // Reads tokens of all rows, `chunk` columns at a time; between chunks `step` is called, which may return true to
  // end. Writes the logits of each row's last token, or of all tokens, to `logits`.
  struct Reading {
    const std::vector<std::vector<int64_t>>& tokens;
    const PreparedControls& controls;
    int64_t k, chunk;
    bool all_logits;
    TraceRecorder* trace;
    std::function<bool()> step;
    ActionTable* actions;
  };
  bool read(const Reading& reading, at::Tensor& logits);

  ModelConfig config;
  Numerics numerics;
  at::ScalarType dtype;
  int64_t max_length;
  Weights weights;
  Forward forward;
  Cache cache;
  std::atomic<bool> busy{false}, cancelled{false};
  pid_t process = getpid();
};

// One caller at a time. A forked child computes with one thread: OpenMP's others stayed with the parent.
class Turn {
 public:
  explicit Turn(State& state);
  ~Turn() { state_.busy.store(false); }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  State& state_;
};

}  // namespace micro::engine
