// grouped_linear ROWS ROUNDS [quick]: the grouped gathered product of one expert layer, ROWS rows for each of four
// experts, bfloat16, one thread, weights packed before and rotating over enough layers to come from memory; in every
// round beside the peak probe and the free variants. One line of JSON.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "free_linear.h"
#include "micro_kernels/expert_linear.h"
#include "probe.h"

namespace {

using micro_kernels::BFloat16;
using micro_kernels::DType;
using micro_kernels::LinearPart;
using micro_kernels::Status;

constexpr int kExperts = 4;

struct Product {
  int64_t out, in;
};

struct Sizes {
  int64_t rows;    // per expert
  int64_t layers;  // in rotation
  std::vector<Product> products;

  int64_t tokens() const { return rows * kExperts; }
  double flops() const {
    double sum = 0;
    for (const Product& p : products) sum += 2.0 * static_cast<double>(p.out * p.in);
    return sum * static_cast<double>(tokens() * layers);
  }
};

void require(Status status, const char* what) {
  if (status == Status::kOk) return;
  std::cerr << "grouped_linear: " << what << " failed\n";
  std::exit(1);
}

// 64-byte aligned, zeros.
struct Buffer {
  explicit Buffer(int64_t count)
      : data(static_cast<uint16_t*>(std::aligned_alloc(64, static_cast<size_t>((count * 2 + 63) / 64 * 64)))) {
    std::memset(data.get(), 0, static_cast<size_t>(count * 2));
  }
  struct Free {
    void operator()(uint16_t* memory) const { std::free(memory); }
  };
  std::unique_ptr<uint16_t, Free> data;
};

// Random bfloat16 of a standard deviation near `scale`.
void draw(uint16_t* to, int64_t count, float scale, std::minstd_rand& random) {
  std::uniform_real_distribution<float> uniform(-1.7f * scale, 1.7f * scale);
  for (int64_t i = 0; i < count; ++i) to[i] = BFloat16(uniform(random)).bits;
}

float value(uint16_t bits) {
  BFloat16 number;
  number.bits = bits;
  return static_cast<float>(number);
}

// One product of all layers: weights in every packing, inputs, the rows of each expert.
class Bench {
 public:
  Bench(const Sizes& sizes, const Product& product, std::minstd_rand& random)
      : sizes_(sizes), product_(product), x_(sizes.tokens() * product.in), y_(sizes.tokens() * product.out) {
    draw(x_.data.get(), sizes.tokens() * product.in, 1.0f, random);
    index_.resize(static_cast<size_t>(sizes.tokens()));
    std::iota(index_.begin(), index_.end(), 0);
    std::shuffle(index_.begin(), index_.end(), random);
    for (int e = 0; e < kExperts; ++e)  // tokens of one expert stay in their order, as the plan leaves them
      std::sort(index_.begin() + e * sizes.rows, index_.begin() + (e + 1) * sizes.rows);
    Buffer plain(product.out * product.in);
    for (int64_t i = 0; i < sizes.layers * kExperts; ++i) {
      draw(plain.data.get(), product.out * product.in, 1.0f / std::sqrt(static_cast<float>(product.in)), random);
      pack(plain.data.get());
    }
    first_ = std::move(plain);  // the last matrix, for the check
  }

  void ours() {
    for (int64_t layer = 0; layer < sizes_.layers; ++layer) {
      LinearPart parts[kExperts];
      for (int e = 0; e < kExperts; ++e) {
        parts[e].x = {x_.data.get(), index_.data() + e * sizes_.rows, product_.in};
        parts[e].matrix.data = packed_[static_cast<size_t>(layer * kExperts + e)].data.get();
        parts[e].matrix.format = micro_kernels::WeightFormat::kPacked;
        parts[e].y = {y_.data.get() + e * sizes_.rows * product_.out, nullptr, product_.out};
        parts[e].rows = sizes_.rows;
        parts[e].in = product_.in;
        parts[e].out = product_.out;
      }
      require(micro_kernels::cpu::linear(parts, kExperts, DType::kBFloat16, micro_kernels::serial), "linear");
    }
  }

  void free(const FreeVariant& variant) {
    const std::vector<Buffer>& packed = free_.at(variant.columns);
    for (int64_t layer = 0; layer < sizes_.layers; ++layer)
      for (int e = 0; e < kExperts; ++e)
        variant.run(x_.data.get(), index_.data() + e * sizes_.rows, sizes_.rows, product_.in,
                    packed[static_cast<size_t>(layer * kExperts + e)].data.get(), product_.out,
                    y_.data.get() + e * sizes_.rows * product_.out);
  }

  // Distance of the last expert's outputs in the last layer from float64, relative to their length.
  double difference() const {
    double error = 0, length = 0;
    for (int64_t r = (kExperts - 1) * sizes_.rows; r < sizes_.tokens(); ++r)
      for (int64_t o = 0; o < product_.out; ++o) {
        double want = 0;
        const uint16_t* x = x_.data.get() + index_[static_cast<size_t>(r)] * product_.in;
        for (int64_t i = 0; i < product_.in; ++i)
          want += static_cast<double>(value(x[i])) * value(first_.data.get()[o * product_.in + i]);
        const double got = value(y_.data.get()[r * product_.out + o]);
        error += (got - want) * (got - want);
        length += want * want;
      }
    return std::sqrt(error / length);
  }

 private:
  void pack(const uint16_t* plain) {
    packed_.emplace_back(micro_kernels::cpu::packed_elements(product_.in, product_.out));
    require(micro_kernels::cpu::pack_weight(plain, product_.in, product_.out, DType::kBFloat16,
                                            packed_.back().data.get(), micro_kernels::serial),
            "pack_weight");
    for (const int columns : {32, 48, 64}) {
      free_[columns].emplace_back(product_.in * product_.out);
      pack_free(plain, product_.in, product_.out, columns, free_[columns].back().data.get());
    }
  }

  Sizes sizes_;
  Product product_;
  Buffer x_, y_, first_{1};
  std::vector<int32_t> index_;
  std::vector<Buffer> packed_;
  std::map<int, std::vector<Buffer>> free_;  // by columns of a panel
};

double timed(const std::function<void()>& run) {
  const double begin = probe::seconds();
  run();
  return probe::seconds() - begin;
}

void print(const std::string& name, const std::vector<double>& values, bool last) {
  std::cout << '"' << name << "\": [";
  for (size_t i = 0; i < values.size(); ++i) std::cout << (i ? ", " : "") << values[i];
  std::cout << (last ? "]" : "], ");
}

}  // namespace

int main(int count, char** arguments) {
  const int64_t rows = count > 1 ? std::atoll(arguments[1]) : 0, rounds = count > 2 ? std::atoll(arguments[2]) : 0;
  const bool quick = count > 3 && std::strcmp(arguments[3], "quick") == 0;
  if (rows < 1 || rounds < 1) {
    std::cerr << "usage: grouped_linear ROWS ROUNDS [quick]\n";
    return 2;
  }
  // Gate and up, down, queries and output of the SmolLM2-135M shape.
  Sizes sizes{rows, 16, {{3072, 576}, {576, 1536}, {576, 576}}};
  if (quick) sizes = {rows, 1, {{192, 64}, {192, 96}}};
  std::minstd_rand random(1);
  std::vector<std::unique_ptr<Bench>> benches;
  for (const Product& product : sizes.products) benches.push_back(std::make_unique<Bench>(sizes, product, random));
  double difference = 0;
  const auto check = [&](const std::function<void(Bench&)>& run) {
    for (auto& bench : benches) {
      run(*bench);
      difference = std::max(difference, bench->difference());
    }
  };
  check([](Bench& bench) { bench.ours(); });
  const int variants = __builtin_cpu_supports("avx512bf16") ? kFreeVariantCount : 0;
  for (int v = 0; v < variants; ++v) check([v](Bench& bench) { bench.free(kFreeVariants[v]); });
  if (!(difference < 4e-3)) {  // one rounding to bfloat16 is 2^-9 at most
    std::cerr << "grouped_linear: outputs differ from float64 by " << difference << "; nothing was timed\n";
    return 1;
  }
  std::vector<double> ours, peak;
  std::vector<std::vector<double>> free(static_cast<size_t>(variants));
  for (int64_t round = 0; round < rounds; ++round) {
    ours.push_back(timed([&] {
      for (auto& bench : benches) bench->ours();
    }));
    peak.push_back(sizes.flops() / std::max(probe::bfloat16_peak(1), probe::float32_peak(1)));
    for (int v = 0; v < variants; ++v)
      free[static_cast<size_t>(v)].push_back(timed([&] {
        for (auto& bench : benches) bench->free(kFreeVariants[v]);
      }));
  }
  std::cout << "{\"rows\": " << rows << ", \"layers\": " << sizes.layers << ", \"flops\": " << sizes.flops()
            << ", \"difference\": " << difference << ", \"free\": [";
  for (int v = 0; v < variants; ++v) std::cout << (v ? ", " : "") << '"' << kFreeVariants[v].name << '"';
  std::cout << "], \"seconds\": {";
  print("ours", ours, false);
  for (int v = 0; v < variants; ++v) print(kFreeVariants[v].name, free[static_cast<size_t>(v)], false);
  print("peak", peak, true);
  std::cout << "}}\n";
}
