#include "micro/engine.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/module.h"
#include "bindings/tensors.h"

namespace {

using namespace py::literals;
using micro::Engine;
using Rows = std::vector<std::vector<int64_t>>;
using Tensors = std::map<std::string, py::object>;

template <class Enum>
Enum choice(const char* what, const std::string& word, const std::vector<std::pair<const char*, Enum>>& words) {
  std::string known;
  for (const auto& [name, value] : words) {
    if (word == name) return value;
    known += (known.empty() ? "" : " or ") + std::string("'") + name + "'";
  }
  TORCH_CHECK_VALUE(false, what, " is '", word, "', expected ", known);
}

// ---- what goes in --------------------------------------------------------------------------------------------------

template <class T>
T take(const py::dict& fields, const char* name) {
  TORCH_CHECK_VALUE(fields.contains(name), "Engine: the configuration has no ", name);
  try {
    return fields[name].cast<T>();
  } catch (const py::cast_error&) {
    TORCH_CHECK_VALUE(false, "Engine: the configuration's ", name, " cannot be ", std::string(py::repr(fields[name])));
  }
}

micro::ModelConfig model_config(const py::dict& f) {
  micro::ModelConfig config{
      .backbone = choice<micro::Backbone>("backbone", take<std::string>(f, "backbone"),
                                          {{"llama", micro::Backbone::kLlama}, {"olmo2", micro::Backbone::kOlmo2}}),
      .block_type = micro::parse_block_kind(take<std::string>(f, "block_type")),
      .vocab_size = take<int64_t>(f, "vocab_size"),
      .hidden_size = take<int64_t>(f, "hidden_size"),
      .intermediate_size = take<int64_t>(f, "intermediate_size"),
      .num_hidden_layers = take<int64_t>(f, "num_hidden_layers"),
      .num_attention_heads = take<int64_t>(f, "num_attention_heads"),
      .num_key_value_heads = take<int64_t>(f, "num_key_value_heads"),
      .head_dim = take<int64_t>(f, "head_dim"),
      .num_experts = take<int64_t>(f, "num_experts"),
      .num_experts_per_tok = take<int64_t>(f, "num_experts_per_tok"),
      .router_hidden_size = take<int64_t>(f, "router_hidden_size"),
      .max_position_embeddings = take<int64_t>(f, "max_position_embeddings"),
      .expert_names = take<std::vector<std::string>>(f, "expert_names"),
      .rms_norm_eps = take<double>(f, "rms_norm_eps"),
      .rope_theta = take<double>(f, "rope_theta"),
      .weight_rule = choice<micro::WeightRule>("weight_rule", take<std::string>(f, "weight_rule"),
                                               {{"renormalized", micro::WeightRule::kRenormalized},
                                                {"probability", micro::WeightRule::kProbability},
                                                {"straight_through", micro::WeightRule::kStraightThrough}}),
      .tie_word_embeddings = take<bool>(f, "tie_word_embeddings"),
      .eos_token_ids = take<std::vector<int64_t>>(f, "eos_token_ids"),
  };
  if (const auto s = take<std::optional<std::vector<double>>>(f, "rope_scaling"))
    config.rope_scaling = micro::RopeScaling{s->at(0), s->at(1), s->at(2), s->at(3)};
  return config;
}

micro::EngineOptions engine_options(const std::optional<std::string>& dtype, const std::optional<std::string>& numerics,
                                    const std::string& weights, const std::string& keys_values, int64_t max_length) {
  micro::EngineOptions options;
  if (dtype)
    options.dtype = choice<at::ScalarType>(
        "dtype", *dtype, {{"float32", at::kFloat}, {"bfloat16", at::kBFloat16}, {"float64", at::kDouble}});
  if (numerics)
    options.numerics = choice<micro::Numerics>(
        "numerics", *numerics, {{"reference", micro::Numerics::kReference}, {"fast", micro::Numerics::kFast}});
  options.weights = choice<micro::WeightStore>(
      "weights", weights, {{"packed", micro::WeightStore::kPacked}, {"int8", micro::WeightStore::kInt8}});
  options.keys_values = choice<micro::KeyValuePolicy>(
      "keys_values", keys_values, {{"lazy", micro::KeyValuePolicy::kLazy}, {"eager", micro::KeyValuePolicy::kEager}});
  options.max_length = max_length;
  return options;
}

micro::Controls controls_of(const Tensors& given) {
  const auto find = [&](const char* name) {
    const auto found = given.find(name);
    return found == given.end() ? at::Tensor() : from_python(found->second);
  };
  return {.ablate = find("ablate"), .bias = find("bias"), .force = find("force"), .labels = find("labels")};
}

// ---- what comes out ------------------------------------------------------------------------------------------------

py::object trace_of(const std::optional<micro::Trace>& trace) {
  if (!trace) return py::none();
  return py::dict("ids"_a = to_python(trace->ids), "weights"_a = to_python(trace->weights),
                  "probs"_a = to_python(trace->probs), "logits"_a = to_python(trace->logits),
                  "raw_logits"_a = to_python(trace->raw_logits), "mask"_a = to_python(trace->mask),
                  "start"_a = trace->start, "prompt_length"_a = trace->prompt_length);
}

py::tuple result_of(const micro::CallResult& result) {
  return py::make_tuple(to_python(result.logits), trace_of(result.trace));
}

// ---- calls: the interpreter is free while the engine computes ------------------------------------------------------

// Only the main thread hears signals.
std::function<void()> signal_check() {
  const py::module_ threading = py::module_::import("threading");
  if (!threading.attr("current_thread")().is(threading.attr("main_thread")())) return {};
  return [] {
    const py::gil_scoped_acquire held;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  };
}

micro::CallOptions call_options(const Tensors& controls, int64_t experts_per_token, int64_t chunk, bool all_logits,
                                bool trace, micro::Interventions* interventions) {
  return {controls_of(controls), experts_per_token, chunk, all_logits, trace, signal_check(), interventions};
}

py::tuple prefill(Engine& engine, const Rows& rows, const Tensors& controls, int64_t experts_per_token, int64_t chunk,
                  bool all_logits, bool trace, micro::Interventions* interventions) {
  const micro::CallOptions options = call_options(controls, experts_per_token, chunk, all_logits, trace, interventions);
  micro::CallResult result;
  {
    const py::gil_scoped_release free;
    result = engine.prefill(rows, options);
  }
  return result_of(result);
}

py::tuple decode(Engine& engine, const py::object& tokens, const Tensors& controls, int64_t experts_per_token,
                 bool trace, micro::Interventions* interventions) {
  const micro::CallOptions options = call_options(controls, experts_per_token, 0, false, trace, interventions);
  const at::Tensor ids = from_python(tokens);
  micro::CallResult result;
  {
    const py::gil_scoped_release free;
    result = engine.decode(ids, options);
  }
  return result_of(result);
}

using Draw = std::tuple<double, int64_t, double, double, uint64_t>;

py::dict generate(Engine& engine, const Rows& prompts, int64_t max_new_tokens, const std::vector<Draw>& sampling,
                  std::optional<std::vector<int64_t>> stop_ids, const Tensors& prompt, const Tensors& answer,
                  const py::object& answer_at, int64_t min_new_tokens, int64_t experts_per_token, int64_t chunk,
                  bool trace, const py::object& on_token, micro::Interventions* interventions, int64_t shared_prefix) {
  micro::GenerateOptions options;
  options.max_new_tokens = max_new_tokens;
  options.min_new_tokens = min_new_tokens;
  options.sampling.clear();
  for (const auto& [temperature, top_k, top_p, penalty, seed] : sampling)
    options.sampling.push_back({temperature, top_k, top_p, penalty, seed});
  options.stop_ids = std::move(stop_ids);
  options.prompt = controls_of(prompt);
  options.answer = controls_of(answer);
  if (!answer_at.is_none())
    options.answer_at = [&answer_at](int64_t step) {
      const py::gil_scoped_acquire held;
      return controls_of(answer_at(step).cast<Tensors>());
    };
  options.experts_per_token = experts_per_token;
  options.chunk = chunk;
  options.trace = trace;
  if (!on_token.is_none())
    options.on_token = [&on_token](int64_t row, int64_t token) {
      const py::gil_scoped_acquire held;
      const int truth = PyObject_IsTrue(on_token(row, token).ptr());
      if (truth < 0) throw py::error_already_set();
      return truth != 0;
    };
  options.on_step = signal_check();
  options.interventions = interventions;
  options.shared_prefix = shared_prefix;
  micro::Generation result;
  {
    const py::gil_scoped_release free;
    result = engine.generate(prompts, options);
  }
  std::vector<std::string> finish;
  for (const micro::Finish value : result.finish) finish.emplace_back(micro::name(value));
  return py::dict("tokens"_a = result.tokens, "finish"_a = finish, "trace"_a = trace_of(result.trace));
}

std::string dtype_name(const Engine& engine) {
  return engine.dtype() == at::kDouble ? "float64" : engine.dtype() == at::kBFloat16 ? "bfloat16" : "float32";
}

py::dict config_dict(const Engine& engine) {
  const micro::ModelConfig& c = engine.config();
  return py::dict("num_hidden_layers"_a = c.num_hidden_layers, "num_experts"_a = c.num_experts,
                  "num_experts_per_tok"_a = c.num_experts_per_tok, "vocab_size"_a = c.vocab_size,
                  "expert_names"_a = c.expert_names, "eos_token_ids"_a = c.eos_token_ids);
}

}  // namespace

void bind_engine(py::module_& m) {
  const auto options = std::make_tuple(py::kw_only(), "dtype"_a = py::none(), "numerics"_a = py::none(),
                                       "weights"_a = "packed", "keys_values"_a = "lazy", "max_length"_a = 0);
  py::class_<Engine> engine(
      m, "Engine",
      "Generation on the CPU: packed weights, a cache of its own. micro.engine.Engine is the class to use.");
  std::apply(
      [&](const auto&... args) {
        engine.def(py::init([](const py::dict& config, const Tensors& parameters,
                               const std::optional<std::string>& dtype, const std::optional<std::string>& numerics,
                               const std::string& weights, const std::string& keys_values, int64_t max_length) {
                     std::map<std::string, at::Tensor> tensors;
                     for (const auto& [name, tensor] : parameters) tensors[name] = from_python(tensor);
                     const micro::ModelConfig model = model_config(config);
                     const micro::EngineOptions chosen =
                         engine_options(dtype, numerics, weights, keys_values, max_length);
                     const py::gil_scoped_release free;
                     return std::make_unique<Engine>(model, tensors, chosen);
                   }),
                   "config"_a, "parameters"_a, args...);
        engine.def_static(
            "open",
            [](const std::string& folder, const std::optional<std::string>& dtype,
               const std::optional<std::string>& numerics, const std::string& weights, const std::string& keys_values,
               int64_t max_length) {
              const micro::EngineOptions chosen = engine_options(dtype, numerics, weights, keys_values, max_length);
              const py::gil_scoped_release free;
              return std::make_unique<Engine>(Engine::open(folder, chosen));
            },
            "From a model folder by memory map.", "folder"_a, args...);
      },
      options);
  engine
      .def("prefill", &prefill, "Append tokens to the rows: (logits, trace or None).", "rows"_a, "controls"_a,
           py::kw_only(), "experts_per_token"_a = 0, "chunk"_a = 0, "all_logits"_a = false, "trace"_a = false,
           "interventions"_a = py::none())
      .def("decode", &decode, "Append one token to each row: (logits, trace or None).", "tokens"_a, "controls"_a,
           py::kw_only(), "experts_per_token"_a = 0, "trace"_a = false, "interventions"_a = py::none())
      .def("generate", &generate, "Read prompts and write answers: tokens, finish, trace.", "prompts"_a,
           "max_new_tokens"_a, "sampling"_a, "stop_ids"_a, "prompt"_a, "answer"_a, py::kw_only(),
           "answer_at"_a = py::none(), "min_new_tokens"_a = 0, "experts_per_token"_a = 0, "chunk"_a = 0,
           "trace"_a = false, "on_token"_a = py::none(), "interventions"_a = py::none(), "shared_prefix"_a = 0)
      .def("cancel", &Engine::cancel, "End the running generate() after its present step, from any thread.")
      .def_property_readonly("rows", &Engine::rows)
      .def_property_readonly("lengths", &Engine::lengths)
      .def("truncate", py::overload_cast<int64_t>(&Engine::truncate), "length"_a, "Cut every row.")
      .def("truncate_row", py::overload_cast<int64_t, int64_t>(&Engine::truncate), "row"_a, "length"_a, "Cut one row.")
      .def("select", &Engine::select, "rows"_a, "Row i becomes what rows[i] was.")
      .def("reset", &Engine::reset, "Forget all rows.")
      .def("cache_bytes",
           [](const Engine& e) {
             const micro::CacheBytes bytes = e.cache_bytes();
             return py::dict("keys_values"_a = bytes.keys_values, "inputs"_a = bytes.inputs,
                             "resident"_a = bytes.resident);
           })
      .def_property_readonly("config", &config_dict)
      .def_property_readonly("dtype", &dtype_name)
      .def_property_readonly(
          "numerics", [](const Engine& e) { return e.numerics() == micro::Numerics::kFast ? "fast" : "reference"; })
      .def_property_readonly("max_length", &Engine::max_length)
      .def_property_readonly("weight_bytes", &Engine::weight_bytes)
      .def_property_readonly("quantization_errors", [](const Engine& e) {
        std::map<std::string, std::pair<double, double>> errors;
        for (const auto& [kind, error] : e.quantization_errors()) errors[kind] = {error.max, error.rms};
        return errors;
      });
}
