// token_pieces and tokens_in_regions under mutated arguments: a ValueError, or what the plain definition says.
//
//   spans_fuzz CORPUS [ROUNDS] [SEED]
//
// A file of the corpus has four lines of numbers: code points, pairs of offsets, cuts, pairs of regions. spans.cpp is
// compiled into this program with the sanitizers.

#include <c10/util/Exception.h>
#include <micro/spans.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace {

using Numbers = std::vector<std::int64_t>;
using Input = std::array<Numbers, 4>;

Input read(const std::filesystem::path& path) {
  Input input;
  std::ifstream file(path);
  for (Numbers& numbers : input) {
    std::string line;
    std::getline(file, line);
    std::istringstream words(line);
    for (std::int64_t number = 0; words >> number;) numbers.push_back(number);
  }
  return input;
}

void mutate(Input& input, std::mt19937& random) {
  const auto below = [&random](std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(random); };
  constexpr std::int64_t kOdd[] = {-1, 0, 1, 2, 9, 32, 0x3000, INT32_MAX, INT64_MAX, INT64_MIN};
  for (std::size_t times = 1 + below(3); times > 0; --times) {
    Numbers& numbers = input[below(input.size())];
    const std::size_t at = below(numbers.size() + 1);
    if (at == numbers.size()) {
      numbers.push_back(kOdd[below(std::size(kOdd))]);
    } else if (below(3) == 0) {
      numbers.erase(numbers.begin() + static_cast<std::ptrdiff_t>(at));
    } else if (below(2) == 0) {
      numbers[at] = kOdd[below(std::size(kOdd))];
    } else {
      numbers[at] = static_cast<std::int64_t>(static_cast<std::uint64_t>(numbers[at]) + below(3) - 1);
    }
  }
}

std::vector<micro::TokenOffset> pairs(const Numbers& numbers) {
  std::vector<micro::TokenOffset> result;
  for (std::size_t i = 0; i + 1 < numbers.size(); i += 2) result.push_back({numbers[i], numbers[i + 1]});
  return result;
}

void require(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "spans_fuzz: %s\n", what);
    std::abort();
  }
}

// Whether the arguments were accepted. Any exception but ValueError ends the program.
bool check_pieces(const Input& input) {
  const std::vector<std::uint32_t> text(input[0].begin(), input[0].end());
  const std::vector<micro::TokenOffset> tokens = pairs(input[1]);
  Numbers pieces(tokens.size(), -1);
  try {
    micro::token_pieces(text, tokens, input[2], pieces);
  } catch (const c10::ValueError&) {
    return false;
  }
  for (const std::int64_t piece : pieces)
    require(0 <= piece && piece <= static_cast<std::int64_t>(input[2].size()), "a piece is out of range");
  for (std::size_t t = 0; t < tokens.size(); ++t) {  // a token that no cut divides belongs where its characters do
    const auto [start, end] = tokens[t];
    const auto at_or_before = [](std::int64_t place) { return [place](std::int64_t cut) { return cut <= place; }; };
    const auto low = std::count_if(input[2].begin(), input[2].end(), at_or_before(start));
    if (start < end && low == std::count_if(input[2].begin(), input[2].end(), at_or_before(end - 1)))
      require(pieces[t] == low, "an undivided token stands in the wrong piece");
  }
  return true;
}

bool check_regions(const Input& input) {
  const std::vector<micro::TokenOffset> tokens = pairs(input[1]), regions = pairs(input[3]);
  const auto inside = std::make_unique<bool[]>(tokens.size());
  try {
    micro::tokens_in_regions(tokens, regions, {inside.get(), tokens.size()});
  } catch (const c10::ValueError&) {
    return false;
  }
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    const auto [start, end] = tokens[t];
    if (start >= end) continue;
    const bool shares = std::any_of(regions.begin(), regions.end(), [start = start, end = end](const auto& region) {
      return std::max(region.start, start) < std::min(region.end, end);
    });
    require(inside[t] == shares, "a token is inside where it shares no character, or the reverse");
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: spans_fuzz CORPUS [ROUNDS] [SEED]\n");
    return 2;
  }
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 20000;
  std::mt19937 random(argc > 3 ? static_cast<unsigned>(std::atoi(argv[3])) : 0);
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(argv[1])) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  require(!files.empty(), "the corpus is empty");
  int pieces = 0, regions = 0;
  for (int round = 0; round < rounds; ++round) {
    Input input = read(files[static_cast<std::size_t>(round) % files.size()]);
    if (round >= static_cast<int>(files.size())) mutate(input, random);
    pieces += check_pieces(input);
    regions += check_regions(input);
  }
  std::printf("spans_fuzz: %d inputs; accepted: %d by token_pieces, %d by tokens_in_regions\n", rounds, pieces,
              regions);
  require(rounds < 1000 || (pieces > rounds / 20 && pieces < rounds && regions > rounds / 20 && regions < rounds),
          "the mutations are too mild or too wild to test anything");
  return 0;
}
