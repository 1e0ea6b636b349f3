#include "micro/spans.h"

#include <c10/util/Exception.h>

#include <algorithm>

namespace micro {

namespace {

// What Python's str.isspace says, so that both languages agree on every text.
bool is_space(std::uint32_t c) {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

void check_tokens(const char* function, std::span<const TokenOffset> tokens, std::int64_t limit) {
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    const auto [start, end] = tokens[t];
    TORCH_CHECK_VALUE(0 <= start && start <= end && end <= limit, function, ": token ", t, " has the offsets ", start,
                      "..", end, ", expected 0 <= start <= end <= ", limit);
  }
}

// Where a token begins; see TokenOffset.
std::int64_t beginning(std::span<const TokenOffset> tokens, std::size_t t) {
  if (tokens[t].start < tokens[t].end || t == 0) return tokens[t].start;
  return std::min(tokens[t - 1].end, tokens[t].start);
}

}  // namespace

void token_pieces(std::span<const std::uint32_t> text, std::span<const TokenOffset> tokens,
                  std::span<const std::int64_t> cuts, std::span<std::int64_t> pieces) {
  const auto length = static_cast<std::int64_t>(text.size());
  TORCH_CHECK_VALUE(pieces.size() == tokens.size(), "token_pieces: expected room for ", tokens.size(), " pieces, got ",
                    pieces.size());
  check_tokens("token_pieces", tokens, length);
  for (std::size_t i = 0; i < cuts.size(); ++i) {
    const std::int64_t low = i == 0 ? 0 : cuts[i - 1];
    TORCH_CHECK_VALUE(low <= cuts[i] && cuts[i] <= length, "token_pieces: cut ", i, " is ", cuts[i],
                      ", expected ascending cuts in 0..", length);
  }
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    const std::int64_t begin = beginning(tokens, t);
    std::int64_t owner = begin;
    while (owner < tokens[t].end && is_space(text[owner])) ++owner;
    if (owner >= tokens[t].end) owner = begin;
    pieces[t] = std::upper_bound(cuts.begin(), cuts.end(), owner) - cuts.begin();
  }
}

void tokens_in_regions(std::span<const TokenOffset> tokens, std::span<const TokenOffset> regions,
                       std::span<bool> inside) {
  TORCH_CHECK_VALUE(inside.size() == tokens.size(), "tokens_in_regions: expected room for ", tokens.size(),
                    " results, got ", inside.size());
  for (std::size_t r = 0; r < regions.size(); ++r) {
    const std::int64_t low = r == 0 ? regions[r].start : regions[r - 1].end;
    TORCH_CHECK_VALUE(low <= regions[r].start && regions[r].start <= regions[r].end, "tokens_in_regions: region ", r,
                      " is ", regions[r].start, "..", regions[r].end, ", expected ascending regions without overlap");
  }
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    const std::int64_t begin = beginning(tokens, t);
    const std::int64_t end = tokens[t].end;
    // Regions before this one end before the token begins; empty ones hold no character.
    auto region =
        std::partition_point(regions.begin(), regions.end(), [begin](const TokenOffset& r) { return r.end <= begin; });
    while (region != regions.end() && region->start == region->end) ++region;
    inside[t] = begin < end && region != regions.end() && region->start < end;
  }
}

}  // namespace micro
