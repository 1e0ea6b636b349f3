// probe [threads]        peaks and bandwidths of this machine as one line of JSON, best of five each
// probe serve [threads]  one measurement in GB/s for every line "read" or "copy" on standard input: the partner of an
//                        interleaved pair

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>

#include "probe.h"

namespace {

double best(double (*measure)(int), int threads) {
  double found = 0;
  for (int i = 0; i < 5; ++i) found = std::max(found, measure(threads));
  return found / 1e9;
}

int threads_of(const char* text) {
  const int threads = std::atoi(text);
  if (threads >= 1 && threads <= 1024) return threads;
  std::cerr << "probe: '" << text << "' is no number of threads from 1 to 1024\n";
  std::exit(2);
}

}  // namespace

int main(int count, char** arguments) {
  const bool serve = count > 1 && std::strcmp(arguments[1], "serve") == 0;
  const int first = serve ? 2 : 1;
  const int threads = count > first ? threads_of(arguments[first]) : 1;
  if (serve) {
    for (std::string line; std::getline(std::cin, line);)
      std::cout << (line == "copy" ? probe::memory_copy(threads) : probe::stream_read(threads)) / 1e9 << std::endl;
    return 0;
  }
  std::cout << "{\"threads\": " << threads << ", \"float32_gflops\": " << best(probe::float32_peak, threads)
            << ", \"bfloat16_gflops\": " << best(probe::bfloat16_peak, threads)
            << ", \"stream_read_gb_per_s\": " << best(probe::stream_read, threads)
            << ", \"memory_copy_gb_per_s\": " << best(probe::memory_copy, threads) << "}\n";
}
