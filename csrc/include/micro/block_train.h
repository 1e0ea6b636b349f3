#pragma once

#include "micro/block_forward.h"

namespace micro {

// What a layer keeps for its backward pass, beside its input, its decision, rotated queries, keys and values, and what
// attention gave.
enum class Activations {
  kSave,       // gate and up in front of the gated unit, and experts' outputs where a gradient reads them
  kRecompute,  // nothing: the products of the feed-forward part run once more
};

// block_forward for whole-block experts without a cache, with a gradient: for x, the parameters and options.bias, from
// y, raw, weights, probs and effective. Bit for bit the gradients of the separate operators, but nothing that belongs
// to an expert (norms, gathered rows, gated units) is kept. The router has two maps (router_in is given).
//
//   micro::BlockResult layer = micro::block_train(x, parameters, cos, sin, 8, 1e-5, {.slots = 512}, 1);
//   layer.y.sum().backward();
//
// Throws as block_forward; ValueError where a cache is given.
BlockResult block_train(const at::Tensor& x, const BlockParameters& parameters, const at::Tensor& cos,
                        const at::Tensor& sin, int64_t heads, double eps, const BlockCall& call, int64_t k,
                        const RouteOptions& options = {}, bool run_router = true,
                        Activations activations = Activations::kSave);

}  // namespace micro
