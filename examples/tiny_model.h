#pragma once
// A MiCRo language model in small (model.md 2): E expert blocks per layer, a router, label routing. Plain C++ over the
// public operators; every parameter has the name that checkpoints and the curriculum know.

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <micro/combine.h>
#include <micro/cross_entropy.h>
#include <micro/expert_attention.h>
#include <micro/expert_linear.h>
#include <micro/permute.h>
#include <micro/plan.h>
#include <micro/rms_norm.h>
#include <micro/rope.h>
#include <micro/route.h>
#include <micro/stacked_linear.h>
#include <micro/swiglu.h>

#include <cmath>
#include <cstdint>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <vector>

namespace tiny {

struct Shape {
  int64_t vocabulary = 40;
  int64_t layers = 2;
  int64_t experts = 4;
  int64_t hidden = 32;
  int64_t heads = 4;
  int64_t groups = 2;  // key/value heads
  int64_t head_dim = 8;
  int64_t ffn = 64;
};

// B rows of S slots.
struct Batch {
  at::Tensor ids;      // [B, S] int64
  at::Tensor targets;  // [B, S] int64, already shifted; -100: no target
  at::Tensor labels;   // [B, S] int64, the expert that a token belongs to
};

struct Result {
  at::Tensor loss;   // mean cross-entropy of the targets
  at::Tensor usage;  // [L, E] int64, tokens per layer and expert
};

// Numbers from the standard library's generator: the same on every machine, whatever torch does.
inline at::Tensor random(std::mt19937_64& generator, at::IntArrayRef sizes, double deviation) {
  at::Tensor tensor = at::empty(sizes, at::kFloat);
  float* values = tensor.mutable_data_ptr<float>();
  std::normal_distribution<double> normal(0, deviation);
  for (int64_t i = 0; i < tensor.numel(); ++i) values[i] = static_cast<float>(normal(generator));
  return tensor;
}

class Model {
 public:
  // The experts of a layer start as copies of one block, as after upcycling; routers are random.
  Model(const Shape& shape, uint64_t seed) : shape_(shape) {
    std::mt19937_64 generator(seed);
    const auto matrix = [&](int64_t out, int64_t in) { return random(generator, {out, in}, 0.7 / std::sqrt(in)); };
    parameters_["model.embed_tokens.weight"] = random(generator, {shape.vocabulary, shape.hidden}, 1.0);
    parameters_["model.norm.weight"] = at::ones({shape.hidden});
    parameters_["lm_head.weight"] = matrix(shape.vocabulary, shape.hidden);
    for (int64_t l = 0; l < shape.layers; ++l) add_layer("model.layers." + std::to_string(l) + ".", matrix);
  }

  const Shape& shape() const { return shape_; }

  // By in-memory name, in a fixed order; expert parameters are [E, ...].
  const std::map<std::string, at::Tensor>& parameters() const { return parameters_; }

  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const auto& [name, parameter] : parameters_) names.push_back(name);
    return names;
  }

  // by_labels: a token goes to the expert of its label; else the routers decide.
  Result operator()(const Batch& batch, int64_t experts_per_token, bool by_labels) const {
    Pass pass;
    pass.experts_per_token = experts_per_token;
    pass.slots = batch.ids.size(1);
    if (by_labels) pass.rows = at::one_hot(batch.labels.reshape({-1}), shape_.experts).to(at::kFloat);
    const at::Tensor positions = at::arange(pass.slots, at::kLong).repeat({batch.ids.size(0)});
    pass.angles = micro::rope_table(positions, micro::rope_frequencies(shape_.head_dim, kTheta));

    at::Tensor x = at::embedding(of("model.embed_tokens"), batch.ids.reshape({-1}));
    for (int64_t l = 0; l < shape_.layers; ++l) x = layer("model.layers." + std::to_string(l) + ".", x, pass);
    const at::Tensor hidden = micro::rms_norm(x, of("model.norm").unsqueeze(0), std::nullopt, kEps);
    const at::Tensor targets = batch.targets.reshape({-1});
    const at::Tensor sum = micro::cross_entropy(hidden, of("lm_head"), targets);
    return {sum / at::ne(targets, -100).sum(), at::stack(pass.usage).to(at::kLong)};
  }

 private:
  static constexpr double kEps = 1e-5;
  static constexpr double kTheta = 10000;

  // What one forward pass carries from layer to layer.
  struct Pass {
    int64_t experts_per_token = 1;
    int64_t slots = 0;               // per row of the batch
    std::optional<at::Tensor> rows;  // [T, E], the labels as probabilities
    micro::RopeTable angles;         // one row per token
    micro::Plan plan;                // of the current layer
    std::vector<at::Tensor> usage;   // tokens per expert, layer by layer
  };

  const at::Tensor& of(const std::string& module) const { return parameters_.at(module + ".weight"); }

  template <class Matrix>
  void add_layer(const std::string& layer, const Matrix& matrix) {
    const Shape& s = shape_;
    const auto add_experts = [&](const char* module, const at::Tensor& one) {
      std::vector<int64_t> sizes = one.sizes().vec();
      sizes.insert(sizes.begin(), s.experts);
      parameters_[layer + "blocks." + module + ".weight"] = one.expand(sizes).contiguous();
    };
    parameters_[layer + "router.in_proj.weight"] = matrix(s.hidden, s.hidden);
    parameters_[layer + "router.out_proj.weight"] = matrix(s.experts, s.hidden);
    add_experts("input_norm", at::ones({s.hidden}));
    add_experts("post_attention_norm", at::ones({s.hidden}));
    add_experts("q_proj", matrix(s.heads * s.head_dim, s.hidden));
    add_experts("k_proj", matrix(s.groups * s.head_dim, s.hidden));
    add_experts("v_proj", matrix(s.groups * s.head_dim, s.hidden));
    add_experts("o_proj", matrix(s.hidden, s.heads * s.head_dim));
    add_experts("gate_proj", matrix(s.ffn, s.hidden));
    add_experts("up_proj", matrix(s.ffn, s.hidden));
    add_experts("down_proj", matrix(s.hidden, s.ffn));
  }

  // x [T, H] to [T, H] (model.md 2.3, 2.6, 2.8).
  at::Tensor layer(const std::string& name, const at::Tensor& x, Pass& pass) const {
    const at::Tensor r = at::matmul(x, of(name + "router.in_proj").t());
    const at::Tensor logits = at::matmul(r, of(name + "router.out_proj").t());
    micro::RouteOptions options;
    options.rows = pass.rows;
    const micro::Routing routing = micro::route(logits, pass.experts_per_token, options);
    pass.plan = micro::plan(routing.ids, shape_.experts, routing.weights);
    pass.usage.push_back(pass.plan.offsets.diff());

    const at::Tensor rows = micro::permute(x, pass.plan);
    const at::Tensor u = rows + attention(name + "blocks.", x, rows, pass);
    return micro::combine(u + feed_forward(name + "blocks.", u, pass.plan), routing.weights, pass.plan);
  }

  // The routed rows attend to the keys and values that their expert has of every token.
  at::Tensor attention(const std::string& blocks, const at::Tensor& x, const at::Tensor& rows, const Pass& pass) const {
    const int64_t e = shape_.experts, g = shape_.groups, d = shape_.head_dim, tokens = x.size(0);
    const auto& [cos, sin] = pass.angles;
    const micro::Plan& plan = pass.plan;
    const at::Tensor& gain = of(blocks + "input_norm");

    const at::Tensor routed = micro::rms_norm(rows, gain, plan.experts, kEps);
    const at::Tensor q = micro::expert_linear(routed, of(blocks + "q_proj"), plan.offsets);
    const at::Tensor turned = micro::rope(q.view({-1, shape_.heads, d}), cos, sin, plan.tokens);

    const at::Tensor all = micro::rms_norm(x.unsqueeze(0), gain, std::nullopt, kEps);  // [E, T, H]
    const at::Tensor k = micro::stacked_linear(all, of(blocks + "k_proj"), plan.offsets).view({e, tokens, g, d});
    const at::Tensor v = micro::stacked_linear(all, of(blocks + "v_proj"), plan.offsets).view({e, tokens, g, d});
    const auto by_row = [&](const at::Tensor& t) {  // [E, T, G, D] to [B, E, G, S, D], a view
      return t.view({e, tokens / pass.slots, pass.slots, g, d}).permute({1, 0, 3, 2, 4});
    };
    const at::Tensor a = micro::expert_attention(turned, by_row(micro::rope(k, cos, sin)), by_row(v), plan.tokens,
                                                 plan.offsets, pass.slots);
    return micro::expert_linear(a.view({rows.size(0), -1}), of(blocks + "o_proj"), plan.offsets);
  }

  at::Tensor feed_forward(const std::string& blocks, const at::Tensor& u, const micro::Plan& plan) const {
    const at::Tensor n = micro::rms_norm(u, of(blocks + "post_attention_norm"), plan.experts, kEps);
    const at::Tensor gate = micro::expert_linear(n, of(blocks + "gate_proj"), plan.offsets);
    const at::Tensor up = micro::expert_linear(n, of(blocks + "up_proj"), plan.offsets);
    return micro::expert_linear(micro::swiglu(gate, up), of(blocks + "down_proj"), plan.offsets);
  }

  Shape shape_;
  std::map<std::string, at::Tensor> parameters_;
};

// Four invented domains of ten words each, one expert per domain. Within a domain, the next word follows from the
// current one by the domain's own rule; a row holds two sentences, so that domains change in its middle.
inline Batch make_batch(const Shape& shape, int64_t rows, int64_t slots, uint64_t seed) {
  const int64_t words = shape.vocabulary / shape.experts, sentence = slots / 2;
  std::mt19937_64 generator(seed);
  Batch batch{at::empty({rows, slots}, at::kLong), at::full({rows, slots}, -100, at::kLong),
              at::empty({rows, slots}, at::kLong)};
  auto ids = batch.ids.accessor<int64_t, 2>(), targets = batch.targets.accessor<int64_t, 2>(),
       labels = batch.labels.accessor<int64_t, 2>();
  for (int64_t b = 0; b < rows; ++b) {
    int64_t domain = 0, word = 0;
    for (int64_t s = 0; s < slots; ++s) {
      if (s % sentence == 0) {
        domain = static_cast<int64_t>(generator() % shape.experts);
        word = static_cast<int64_t>(generator() % words);
      }
      labels[b][s] = domain;
      ids[b][s] = domain * words + word;
      word = (3 * word + 2 * domain + 1) % words;
      if ((s + 1) % sentence != 0) targets[b][s] = domain * words + word;
    }
  }
  return batch;
}

}  // namespace tiny
