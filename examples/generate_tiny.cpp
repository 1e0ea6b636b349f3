// Trains a small mixture, then lets the engine continue a text without Python: `example_generate_tiny`.
// With a model folder: `example_generate_tiny FOLDER ID ID ...` continues these token ids.

#include <ATen/core/grad_mode.h>
#include <micro/engine.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

#include "tiny_trainer.h"

namespace {

constexpr int64_t kRows = 16, kSlots = 16, kNewTokens = 12;

micro::ModelConfig config_of(const tiny::Shape& shape) {
  micro::ModelConfig config;
  config.vocab_size = shape.vocabulary;
  config.hidden_size = config.router_hidden_size = shape.hidden;
  config.intermediate_size = shape.ffn;
  config.num_hidden_layers = shape.layers;
  config.num_attention_heads = shape.heads;
  config.num_key_value_heads = shape.groups;
  config.head_dim = shape.head_dim;
  config.num_experts = shape.experts;
  config.max_position_embeddings = 64;
  return config;
}

// The words of one domain stand together in the vocabulary.
std::vector<int64_t> text_of_domain(const tiny::Shape& shape, int64_t domain) {
  const int64_t words = shape.vocabulary / shape.experts;
  const at::Tensor ids = tiny::make_batch(shape, 1, kSlots, /*seed=*/3).ids.remainder(words).add(domain * words);
  return {ids.const_data_ptr<int64_t>(), ids.const_data_ptr<int64_t>() + ids.numel()};
}

void print(const char* what, const micro::Generation& answer) {
  for (size_t row = 0; row < answer.tokens.size(); ++row) {
    std::printf("%s, row %zu:", what, row);
    for (const int64_t token : answer.tokens[row]) std::printf(" %lld", static_cast<long long>(token));
    std::printf("  (%s)\n", micro::name(answer.finish[row]));
  }
}

// Share of each expert in the choices of all layers at the rows' real slots.
void print_usage(const micro::Generation& answer, int64_t experts) {
  const micro::Trace& trace = *answer.trace;
  const at::Tensor real = trace.mask.expand({trace.ids.size(0), trace.mask.size(0), trace.mask.size(1)});
  for (int64_t e = 0; e < experts; ++e)
    std::printf("  expert %lld: %.0f %%\n", static_cast<long long>(e),
                100 * trace.ids.select(3, 0).eq(e).logical_and(real).sum().item<double>() / real.sum().item<double>());
}

void of_training() {
  tiny::Model model(tiny::Shape{}, /*seed=*/0);
  micro::Curriculum curriculum = tiny::tiny_curriculum({80, 60, 60});
  tiny::Trainer trainer(model, curriculum);
  for (uint64_t seed = 100; !curriculum.done(); ++seed)
    trainer.step(tiny::make_batch(model.shape(), kRows, kSlots, seed));

  const at::NoGradGuard no_gradients;
  micro::Engine engine(config_of(model.shape()), model.parameters());
  std::vector<std::vector<int64_t>> prompts;
  for (int64_t domain = 0; domain < model.shape().experts; ++domain)
    prompts.push_back(text_of_domain(model.shape(), domain));
  micro::GenerateOptions options{.max_new_tokens = kNewTokens, .trace = true};
  const micro::Generation free = engine.generate(prompts, options);
  print("free", free);
  print_usage(free, model.shape().experts);
  options.prompt.force = options.answer.force = at::zeros({1, 1, 1}, at::kLong);
  const micro::Generation forced = engine.generate(prompts, options);
  print("expert 0 alone", forced);
  print_usage(forced, model.shape().experts);
}

void of_folder(const char* folder, const std::vector<int64_t>& prompt) {
  micro::Engine engine = micro::Engine::open(folder);
  micro::GenerateOptions options{.max_new_tokens = 40};
  options.on_token = [](int64_t, int64_t token) {
    std::printf("%lld ", static_cast<long long>(token));
    std::fflush(stdout);
    return false;
  };
  engine.generate({prompt}, options);
  std::printf("\n");
}

}  // namespace

int main(int count, char** arguments) {
  try {
    std::vector<int64_t> prompt;
    for (int i = 2; i < count; ++i) prompt.push_back(std::atoll(arguments[i]));
    if (count > 1)
      of_folder(arguments[1], prompt);
    else
      of_training();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
