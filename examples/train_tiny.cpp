// Trains a small mixture of cognitive experts through all three stages, without Python: `example_train_tiny`.

#include <cstdio>

#include "tiny_trainer.h"

namespace {

constexpr int64_t kRows = 16, kSlots = 16, kReportEvery = 20;

// Share of tokens that the first layer sends to the expert of their domain, over texts of one domain each.
double accuracy(const tiny::Model& model) {
  const at::NoGradGuard no_gradients;
  const int64_t experts = model.shape().experts, words = model.shape().vocabulary / experts;
  double right = 0;
  for (int64_t domain = 0; domain < experts; ++domain) {
    const tiny::Batch batch = tiny::make_batch(model.shape(), kRows, kSlots, /*seed=*/1);
    batch.ids.remainder_(words).add_(domain * words);
    right += model(batch, 1, /*by_labels=*/false).usage[0][domain].item<double>();
  }
  return right / static_cast<double>(experts * kRows * kSlots);
}

}  // namespace

int main() {
  tiny::Model model(tiny::Shape{}, /*seed=*/0);
  micro::Curriculum curriculum = tiny::tiny_curriculum({80, 60, 60});
  tiny::Trainer trainer(model, curriculum);
  for (uint64_t seed = 100; !curriculum.done(); ++seed) {
    const int64_t step = curriculum.step(), steps = curriculum.steps()[curriculum.stage()];
    if (step == 0)
      std::printf("stage %s: %lld trainable parameters\n", curriculum.current().name.c_str(),
                  static_cast<long long>(trainer.trainable()));
    const double loss = trainer.step(tiny::make_batch(model.shape(), kRows, kSlots, seed));
    if (step % kReportEvery == 0 || step + 1 == steps)
      std::printf("  step %3lld  loss %.3f\n", static_cast<long long>(step + 1), loss);
    if (step + 1 == steps)
      std::printf("  tokens routed to the expert of their domain: %.0f %%\n", 100 * accuracy(model));
  }
  return 0;
}
