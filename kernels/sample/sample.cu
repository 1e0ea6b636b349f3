#include <bit>

#include "common/cuda/launch.cuh"
#include "sample/sample.cuh"

namespace micro_kernels::cuda {
namespace {

bool is_greedy(const SampleParams& p) {
  const bool is_penalised = p.repetition_penalty != 1 && p.previous_count > 0;
  const bool is_barred = p.min_new_tokens > 0 && p.stop_count > 0;
  return p.temperature == 0 && !is_penalised && !is_barred;
}

bool is_searched(const SampleParams& p) {
  return p.temperature > 0 && (p.top_p < 1 || (p.top_k > 0 && p.top_k < p.vocab));
}

int64_t slots(const SampleParams& p) { return ceil_div(p.vocab, kSampleThreads) * kSampleThreads; }

// The largest weight, such that the sum of as many as there are ids stays below 2^63.
double scale(const SampleParams& p) {
  return static_cast<double>(uint64_t{1} << (62 - std::bit_width(static_cast<uint64_t>(p.vocab))));
}

}  // namespace

int64_t sample_workspace(const SampleParams& p) {
  if (is_greedy(p)) return 0;
  return p.rows * slots(p) * int64_t{sizeof(uint64_t)} * (is_searched(p) ? 2 : 1);
}

Status sample(const SampleParams& p, void* workspace, void* stream) {
  if (p.rows == 0) return Status::kOk;
  auto* const numbers = static_cast<uint64_t*>(workspace);
  SampleLaunch parameters{.params = p,
                          .in_vectors = false,
                          .slots = slots(p),
                          .numbers = numbers,
                          .candidates = is_searched(p) ? numbers + p.rows * slots(p) : nullptr,
                          .scale = scale(p)};
  return dispatch_device(p.dtype, [&]<class T>() {
    parameters.in_vectors = in_vectors<T>(p.vocab, {p.logits});
    const dim3 grid(static_cast<unsigned>(p.rows)), block(kSampleThreads);
    return is_greedy(p) ? launch(greedy_kernel<T>, grid, block, sizeof(LargestMemory), stream, parameters)
                        : launch(sample_kernel<T>, grid, block, sizeof(SampleMemory), stream, parameters);
  });
}

}  // namespace micro_kernels::cuda
