// probe [threads [times]]  peaks and bandwidths of this machine as one line of JSON, each the best of `times` (5)
// probe serve [threads]    one measurement in GB/s for every line "read" or "copy" on standard input: the partner of an
//                          interleaved pair

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>

#include "probe.h"

namespace {

double best(double (*measure)(int), int threads, int times) {
  double found = 0;
  for (int i = 0; i < times; ++i) found = std::max(found, measure(threads));
  return found / 1e9;
}

int number(int count, char** arguments, int which, int otherwise) {
  if (which >= count) return otherwise;
  const int value = std::atoi(arguments[which]);
  if (value >= 1 && value <= 1024) return value;
  std::cerr << "probe: '" << arguments[which] << "' is no number from 1 to 1024\n";
  std::exit(2);
}

}  // namespace

int main(int count, char** arguments) {
  const bool serve = count > 1 && std::strcmp(arguments[1], "serve") == 0;
  const int threads = number(count, arguments, serve ? 2 : 1, 1);
  if (serve) {
    for (std::string line; std::getline(std::cin, line);)
      std::cout << (line == "copy" ? probe::memory_copy(threads) : probe::stream_read(threads)) / 1e9 << std::endl;
    return 0;
  }
  const int times = number(count, arguments, 2, 5);
  std::cout << "{\"threads\": " << threads << ", \"float32_gflops\": " << best(probe::float32_peak, threads, times)
            << ", \"bfloat16_gflops\": " << best(probe::bfloat16_peak, threads, times)
            << ", \"stream_read_gb_per_s\": " << best(probe::stream_read, threads, times)
            << ", \"memory_copy_gb_per_s\": " << best(probe::memory_copy, threads, times) << "}\n";
}
