// ffn_experts FOLDER HIDDEN INNER EXPERTS LAYERS: the feed-forward experts of a layer as the engine runs them: router,
// plan, gate and up with gather and SwiGLU, down with scatter and weight; bfloat16, one thread, weights packed once.
// FOLDER/weights.bin holds, layer by layer, router in [H,H] and out [E,H], gate and up [E,F,H], down [E,H,F].
// Commands on standard input, one answer line each:
//   rows T   reads FOLDER/x.bin [T,H]
//   write    one pass over layer 0, its output to FOLDER/y.bin
//   time     seconds of a pass over all layers

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "micro_kernels/expert_linear.h"
#include "micro_kernels/plan.h"
#include "micro_kernels/route.h"
#include "probe.h"

namespace {

using micro_kernels::ConstRows;
using micro_kernels::DType;
using micro_kernels::LinearPart;
using micro_kernels::Matrix;
using micro_kernels::serial;
using micro_kernels::Status;

struct Shape {
  int64_t hidden, inner, experts;
};

void require(bool holds, const std::string& what) {
  if (holds) return;
  std::cerr << "ffn_experts: " << what << "\n";
  std::exit(1);
}

void require(Status status, const std::string& what) { require(status == Status::kOk, what + " failed"); }

std::vector<uint16_t> read(std::ifstream& stream, int64_t count) {
  std::vector<uint16_t> values(static_cast<size_t>(count));
  stream.read(reinterpret_cast<char*>(values.data()), count * 2);
  require(stream.good(), "a file is shorter than its shape");
  return values;
}

class Packed {
 public:
  Packed(std::ifstream& stream, int64_t out, int64_t in)
      : memory_(std::aligned_alloc(64, static_cast<size_t>((packed_bytes(in, out) + 63) / 64 * 64)), std::free) {
    const std::vector<uint16_t> plain = read(stream, out * in);
    require(micro_kernels::cpu::pack_weight(plain.data(), in, out, DType::kBFloat16, memory_.get(), serial),
            "pack_weight");
  }
  Matrix matrix() const {
    return {.data = memory_.get(), .scales = nullptr, .format = micro_kernels::WeightFormat::kPacked};
  }

 private:
  static int64_t packed_bytes(int64_t in, int64_t out) { return 2 * micro_kernels::cpu::packed_elements(in, out); }
  std::unique_ptr<void, decltype(&std::free)> memory_;
};

struct Layer {
  Layer(std::ifstream& stream, const Shape& s)
      : router_in(stream, s.hidden, s.hidden), router_out(stream, s.experts, s.hidden) {
    for (int64_t e = 0; e < s.experts; ++e) gate.emplace_back(stream, s.inner, s.hidden);
    for (int64_t e = 0; e < s.experts; ++e) up.emplace_back(stream, s.inner, s.hidden);
    for (int64_t e = 0; e < s.experts; ++e) down.emplace_back(stream, s.hidden, s.inner);
  }
  Packed router_in, router_out;
  std::vector<Packed> gate, up, down;
};

// Tokens and what a pass over a layer needs beside them.
struct Tokens {
  Tokens(const std::string& file, int64_t count, const Shape& s)
      : count(count),
        routed(at(count * s.hidden)),
        logits(at(count * s.experts)),
        weights(at(count)),
        inner(at(count * s.inner)),
        y(at(count * s.hidden)),
        probs(at(count * s.experts)),
        effective(probs),
        ids(at(count)),
        tokens(ids),
        experts(ids),
        inverse(ids),
        offsets(at(s.experts + 1)) {
    std::ifstream stream(file, std::ios::binary);
    x = read(stream, count * s.hidden);
  }
  static size_t at(int64_t size) { return static_cast<size_t>(size); }

  int64_t count;
  std::vector<uint16_t> x, routed, logits, weights, inner, y;
  std::vector<float> probs, effective;
  std::vector<int32_t> ids, tokens, experts, inverse, offsets;
};

void multiply(const std::vector<LinearPart>& parts) {
  require(micro_kernels::cpu::linear(parts.data(), static_cast<int64_t>(parts.size()), DType::kBFloat16, serial),
          "linear");
}

LinearPart part(const void* x, const Matrix& matrix, void* y, int64_t rows, int64_t in, int64_t out) {
  LinearPart p;
  p.x = {x, nullptr, in};
  p.matrix = matrix;
  p.y = {y, nullptr, out};
  p.rows = rows;
  p.in = in;
  p.out = out;
  return p;
}

void route(const Layer& layer, const Shape& s, Tokens& t) {
  multiply({part(t.x.data(), layer.router_in.matrix(), t.routed.data(), t.count, s.hidden, s.hidden)});
  multiply({part(t.routed.data(), layer.router_out.matrix(), t.logits.data(), t.count, s.hidden, s.experts)});
  micro_kernels::RouteParams decision = {};
  decision.logits = t.logits.data();
  decision.ids = t.ids.data();
  decision.weights = t.weights.data();
  decision.probs = t.probs.data();
  decision.effective = t.effective.data();
  decision.tokens = t.count;
  decision.experts = s.experts;
  decision.k = 1;
  decision.dtype = DType::kBFloat16;
  require(micro_kernels::cpu::route(decision, serial), "route");
  require(micro_kernels::cpu::plan({.ids = t.ids.data(),
                                    .weights = t.weights.data(),
                                    .mask = nullptr,
                                    .tokens = t.tokens.data(),
                                    .experts = t.experts.data(),
                                    .offsets = t.offsets.data(),
                                    .inverse = t.inverse.data(),
                                    .token_count = t.count,
                                    .k = 1,
                                    .expert_count = s.experts,
                                    .dtype = DType::kBFloat16},
                                   serial),
          "plan");
}

void run(const Layer& layer, const Shape& s, Tokens& t) {
  route(layer, s, t);
  std::vector<LinearPart> wide, narrow;
  for (int64_t e = 0; e < s.experts; ++e) {
    const auto expert = static_cast<size_t>(e);
    const int64_t first = t.offsets[expert], rows = t.offsets[expert + 1] - first;
    if (rows == 0) continue;
    uint16_t* inner = t.inner.data() + first * s.inner;
    wide.push_back(part(t.x.data(), layer.gate[expert].matrix(), inner, rows, s.hidden, s.inner));
    wide.back().up = layer.up[expert].matrix();
    wide.back().x.index = t.tokens.data() + first;
    narrow.push_back(part(inner, layer.down[expert].matrix(), t.y.data(), rows, s.inner, s.hidden));
    narrow.back().y.index = t.tokens.data() + first;
    narrow.back().scale = {t.weights.data(), t.tokens.data() + first, 1};
  }
  multiply(wide);
  multiply(narrow);
}

}  // namespace

int main(int count, char** arguments) {
  require(count == 6, "usage: ffn_experts FOLDER HIDDEN INNER EXPERTS LAYERS");
  const std::string folder = arguments[1];
  const Shape shape{std::atoll(arguments[2]), std::atoll(arguments[3]), std::atoll(arguments[4])};
  std::ifstream stream(folder + "/weights.bin", std::ios::binary);
  std::vector<Layer> layers;
  for (int64_t i = 0; i < std::atoll(arguments[5]); ++i) layers.emplace_back(stream, shape);
  std::unique_ptr<Tokens> tokens;
  for (std::string command; std::cin >> command;) {
    double answer = 0;
    if (command == "rows") {
      int64_t rows = 0;
      std::cin >> rows;
      tokens = std::make_unique<Tokens>(folder + "/x.bin", rows, shape);
    } else if (command == "write") {
      run(layers[0], shape, *tokens);
      std::ofstream(folder + "/y.bin", std::ios::binary)
          .write(reinterpret_cast<const char*>(tokens->y.data()), tokens->count * shape.hidden * 2);
    } else {
      const double begin = probe::seconds();
      for (const Layer& layer : layers) run(layer, shape, *tokens);
      answer = probe::seconds() - begin;
    }
    std::cout << answer << std::endl;
  }
}
