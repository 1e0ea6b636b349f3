// The engine without Python: small random models from parameters; every way through it gives the same bits.

#include "micro/engine.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace micro {
namespace {

using Parameters = std::map<std::string, at::Tensor>;
using Rows = std::vector<std::vector<int64_t>>;

ModelConfig small(BlockKind kind = BlockKind::kBlock, Backbone backbone = Backbone::kLlama) {
  ModelConfig config;
  config.backbone = backbone;
  config.block_type = kind;
  config.vocab_size = 53;
  config.hidden_size = config.router_hidden_size = 32;
  config.intermediate_size = 40;
  config.num_hidden_layers = 2;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 8;
  config.num_experts = 4;
  config.max_position_embeddings = 256;
  config.expert_names = {"logic", "social", "world", "language"};
  config.eos_token_ids = {};
  return config;
}

class Random {
 public:
  explicit Random(uint64_t seed) : generator_(seed) {}
  at::Tensor operator()(const std::vector<int64_t>& sizes, double mean, double deviation) {
    at::Tensor tensor = at::zeros(sizes, at::kFloat);
    std::normal_distribution<double> normal(mean, deviation);
    for (int64_t i = 0; i < tensor.numel(); ++i)
      tensor.mutable_data_ptr<float>()[i] = static_cast<float>(normal(generator_));
    return tensor;
  }

 private:
  std::mt19937_64 generator_;
};

Parameters parameters_of(const ModelConfig& c, at::ScalarType dtype = at::kBFloat16, uint64_t seed = 0) {
  Random random(seed);
  Parameters out;
  const int64_t queries = c.num_attention_heads * c.head_dim, keys = c.num_key_value_heads * c.head_dim;
  const bool block = c.is_block(), olmo = c.backbone == Backbone::kOlmo2;
  const auto add = [&](const std::string& name, std::vector<int64_t> sizes, bool stacked, double mean = 0) {
    if (stacked) sizes.insert(sizes.begin(), c.num_experts);
    out[name + ".weight"] = random(sizes, mean, 0.2).to(dtype);
  };
  add("model.embed_tokens", {c.vocab_size, c.hidden_size}, false);
  add("model.norm", {c.hidden_size}, false, 1);
  add("lm_head", {c.vocab_size, c.hidden_size}, false);
  for (int64_t l = 0; l < c.num_hidden_layers; ++l) {
    const std::string at = "model.layers." + std::to_string(l) + ".", own = at + (block ? "blocks." : "self_attn.");
    add(at + "router.in_proj", {c.router_hidden_size, c.hidden_size}, false);
    add(at + "router.out_proj", {c.num_experts, c.router_hidden_size}, false);
    add(own + "q_proj", {queries, c.hidden_size}, block);
    add(own + "k_proj", {keys, c.hidden_size}, block);
    add(own + "v_proj", {keys, c.hidden_size}, block);
    add(own + "o_proj", {c.hidden_size, queries}, block);
    add(at + "blocks.gate_proj", {c.intermediate_size, c.hidden_size}, true);
    add(at + "blocks.up_proj", {c.intermediate_size, c.hidden_size}, true);
    add(at + "blocks.down_proj", {c.hidden_size, c.intermediate_size}, true);
    add(at + (block ? "blocks.post_attention_norm" : "post_attention_layernorm"), {c.hidden_size}, block, 1);
    if (olmo) {
      add(own + "q_norm", {queries}, block, 1);
      add(own + "k_norm", {keys}, block, 1);
      add(at + (block ? "blocks.post_ffn_norm" : "post_feedforward_layernorm"), {c.hidden_size}, block, 1);
    } else {
      add(at + (block ? "blocks.input_norm" : "input_layernorm"), {c.hidden_size}, block, 1);
    }
  }
  return out;
}

Engine engine_of(const ModelConfig& config, const EngineOptions& options = {}, uint64_t seed = 0) {
  return Engine(config, parameters_of(config, at::kBFloat16, seed), options);
}

std::vector<int64_t> some_ids(int64_t count, int64_t seed = 1) {
  std::mt19937_64 generator(static_cast<uint64_t>(seed));
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < count; ++i) ids.push_back(static_cast<int64_t>(generator() % 53));
  return ids;
}

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "nothing was thrown";
}

void expect_message(const std::string& part, const std::function<void()>& call) {
  const std::string message = message_of(call);
  EXPECT_NE(message.find(part), std::string::npos) << message;
}

const Rows kPrompts = {some_ids(9, 2), some_ids(3, 3), some_ids(14, 4)};

TEST(Engine, EveryCutOfASequenceGivesTheSameBits) {
  for (const BlockKind kind : {BlockKind::kBlock, BlockKind::kFfn})
    for (const Backbone backbone : {Backbone::kLlama, Backbone::kOlmo2})
      for (const KeyValuePolicy policy : {KeyValuePolicy::kLazy, KeyValuePolicy::kEager}) {
        Engine engine = engine_of(small(kind, backbone), {.keys_values = policy});
        const std::vector<int64_t> ids = some_ids(21);
        const at::Tensor whole = engine.prefill({ids}, {.all_logits = true}).logits;
        ASSERT_TRUE(whole.isfinite().all().item<bool>());
        for (const int64_t chunk : {1, 4, 64}) {
          engine.reset();
          EXPECT_TRUE(engine.prefill({ids}, {.chunk = chunk, .all_logits = true}).logits.equal(whole));
        }
        engine.reset();
        engine.prefill({{ids.begin(), ids.begin() + 20}});
        const at::Tensor last = engine.decode(at::tensor({ids[20]}, at::kLong)).logits;
        EXPECT_TRUE(last[0].equal(whole[0][20]));
      }
}

TEST(Engine, LazyAndEagerAreTheSameBitsAndLazyIsSmaller) {
  Engine lazy = engine_of(small()), eager = engine_of(small(), {.keys_values = KeyValuePolicy::kEager});
  const Controls force{.force = at::full({1, 1, 1}, 2, at::kLong)};
  const Rows rows = {some_ids(100), some_ids(60, 5)};
  EXPECT_TRUE(lazy.prefill(rows, {.controls = force}).logits.equal(eager.prefill(rows, {.controls = force}).logits));
  EXPECT_EQ(lazy.cache_bytes().keys_values * 4, eager.cache_bytes().keys_values);
  EXPECT_EQ(lazy.cache_bytes().inputs, 2 * 160 * 32 * 2);
  for (Engine* engine : {&lazy, &eager}) engine->truncate(0, 90);
  EXPECT_TRUE(lazy.prefill(rows).logits.equal(eager.prefill(rows).logits));
  EXPECT_EQ(lazy.lengths(), (std::vector<int64_t>{190, 120}));
}

TEST(Engine, RowsAreIndependent) {
  Engine engine = engine_of(small());
  const Generation all = engine.generate(kPrompts, {.max_new_tokens = 9, .sampling = {{.temperature = 1.0}}});
  for (size_t row = 0; row < kPrompts.size(); ++row) {
    const Generation alone =
        engine.generate({kPrompts[row]}, {.max_new_tokens = 9, .sampling = {{.temperature = 1.0, .seed = row}}});
    EXPECT_EQ(alone.tokens[0], all.tokens[row]);
    EXPECT_EQ(all.finish[row], Finish::kLength);
  }
}

TEST(Engine, ThreadsChangeNothing) {
  const int threads = at::get_num_threads();
  Engine engine = engine_of(small());
  at::set_num_threads(1);
  const at::Tensor one = engine.prefill(kPrompts, {.all_logits = true}).logits;
  engine.reset();
  at::set_num_threads(2);
  EXPECT_TRUE(engine.prefill(kPrompts, {.all_logits = true}).logits.equal(one));
  at::set_num_threads(threads);
}

TEST(Engine, SelectReordersAndRepeats) {
  Engine engine = engine_of(small());
  engine.prefill(kPrompts);
  engine.select({2, 0, 2});
  EXPECT_EQ(engine.lengths(), (std::vector<int64_t>{14, 9, 14}));
  const at::Tensor logits = engine.decode(at::tensor({7, 7, 7}, at::kLong)).logits;
  EXPECT_TRUE(logits[0].equal(logits[2]));
  Engine fresh = engine_of(small());
  std::vector<int64_t> longer = kPrompts[2];
  longer.push_back(7);
  EXPECT_TRUE(fresh.prefill({longer}).logits[0].equal(logits[0]));
}

TEST(Engine, RowsThatEndLeaveTheBatch) {
  Engine engine = engine_of(small());
  const Generation free = engine.generate(kPrompts, {.max_new_tokens = 12});
  const int64_t stop = free.tokens[0][4];
  std::vector<int64_t> streamed;
  GenerateOptions options{.max_new_tokens = 12, .stop_ids = std::vector<int64_t>{stop}, .trace = true};
  options.on_token = [&](int64_t row, int64_t token) {
    if (row == 0) streamed.push_back(token);
    return false;
  };
  const Generation found = engine.generate(kPrompts, options);
  for (size_t row = 0; row < kPrompts.size(); ++row) {
    std::vector<int64_t> want = free.tokens[row];
    const auto at = std::find(want.begin(), want.end(), stop);
    if (at != want.end()) want.erase(at + 1, want.end());
    EXPECT_EQ(found.tokens[row], want);
    EXPECT_EQ(found.trace->mask[static_cast<int64_t>(row)].sum().item<int64_t>(),
              static_cast<int64_t>(kPrompts[row].size() + want.size() - 1));
  }
  EXPECT_EQ(found.finish[0], Finish::kStop);
  EXPECT_EQ(streamed, found.tokens[0]);
  EXPECT_EQ(found.trace->prompt_length, 14);
  EXPECT_EQ(engine.rows(), 0);
}

TEST(Engine, SteeringReachesPromptAndAnswer) {
  Engine engine = engine_of(small());
  GenerateOptions options{.max_new_tokens = 5, .trace = true};
  options.prompt.force = at::full({1, 1, 1}, 1, at::kLong);
  options.answer.force = at::tensor({2, 3, -1}, at::kLong).view({3, 1, 1});
  const Trace trace = *engine.generate(kPrompts, options).trace;
  for (int64_t row = 0; row < 3; ++row) {
    const at::Tensor ids = trace.ids.select(1, row);
    EXPECT_TRUE(ids.slice(1, 14 - static_cast<int64_t>(kPrompts[static_cast<size_t>(row)].size()), 14)
                    .eq(1)
                    .all()
                    .item<bool>());
    if (row < 2) {
      EXPECT_TRUE(ids.slice(1, 14, 18).eq(row + 2).all().item<bool>());
    }
  }
  options.answer_at = [](int64_t step) { return Controls{.force = at::full({1, 1, 1}, step % 4, at::kLong)}; };
  const at::Tensor ids = engine.generate(kPrompts, options).trace->ids;
  for (int64_t step = 1; step < 5; ++step) EXPECT_TRUE(ids.select(2, 13 + step).eq(step % 4).all().item<bool>());
}

TEST(Engine, CancelAndExceptionsEndAGeneration) {
  ModelConfig config = small();
  config.max_position_embeddings = 4000;
  Engine engine = engine_of(config);
  int64_t steps = 0;
  GenerateOptions options{.max_new_tokens = 3000};
  options.on_step = [&] {
    if (++steps == 5) engine.cancel();
  };
  const Generation found = engine.generate({some_ids(3)}, options);
  EXPECT_EQ(found.finish[0], Finish::kCancelled);
  EXPECT_EQ(found.tokens[0].size(), 4u);
  options.on_step = [] { throw std::runtime_error("no more"); };
  EXPECT_THROW(engine.generate({some_ids(3)}, options), std::runtime_error);
  EXPECT_EQ(engine.rows(), 0);
}

TEST(Engine, SeveralEnginesInSeveralThreads) {
  std::vector<Engine> engines;
  std::vector<Rows> want, got(3);
  for (uint64_t seed = 0; seed < 3; ++seed) {
    engines.push_back(engine_of(small(), {}, seed));
    want.push_back(engines.back().generate(kPrompts, {.max_new_tokens = 20}).tokens);
  }
  std::vector<std::thread> threads;
  for (size_t i = 0; i < 3; ++i)
    threads.emplace_back([&, i] { got[i] = engines[i].generate(kPrompts, {.max_new_tokens = 20}).tokens; });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(got, want);
}

TEST(Engine, ReservedMemoryCostsNothingUntilItIsWritten) {
  ModelConfig config = small();
  config.max_position_embeddings = 1 << 20;
  Engine engine = engine_of(config);
  engine.prefill({some_ids(8)});
  // Two layers, two stores, eight heads each, and the inputs: a page or so for each.
  EXPECT_LT(engine.cache_bytes().resident, 1 << 20);
  for (int i = 0; i < 50; ++i) engine.decode(at::tensor({5}, at::kLong));
  EXPECT_LT(engine.cache_bytes().resident, 1 << 20);
  engine.reset();
  EXPECT_EQ(engine.cache_bytes().resident, 0);
}

TEST(Engine, WrongParametersAndOptionsAreNamed) {
  const ModelConfig config = small();
  Parameters parameters = parameters_of(config);
  parameters.erase("model.layers.1.blocks.up_proj.weight");
  parameters["model.norm.weight"] = at::zeros({31}, at::kBFloat16);
  expect_message("2 problems: model.layers.1.blocks.up_proj.weight is missing; model.norm.weight has shape [31]",
                 [&] { Engine(config, parameters); });
  expect_message("float32, bfloat16 or float64", [&] { Engine(config, parameters_of(config, at::kHalf)); });
  Engine engine = engine_of(config);
  expect_message("row 0 has no tokens", [&] { engine.prefill({{}}); });
  expect_message("token id 53, expected 0..52", [&] { engine.generate({{53}}); });
  expect_message("max_new_tokens is 0", [&] { engine.generate({{1}}, {.max_new_tokens = 0}); });
  expect_message("expected [1|1, 2|1, S|1, 4]", [&] {
    engine.prefill({{1}}, {.controls = {.ablate = at::zeros({1, 1, 4}, at::kBool)}});
  });
  expect_message("S axis is 1", [&] {
    engine.generate({{1}}, {.answer = {.ablate = at::zeros({1, 1, 2, 4}, at::kBool)}});
  });
  EXPECT_EQ(engine.rows(), 0);
}

}  // namespace
}  // namespace micro
