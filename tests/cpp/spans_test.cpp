#include "micro/spans.h"

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <array>
#include <string_view>
#include <vector>

namespace {

using micro::TokenOffset;

std::vector<std::uint32_t> points(std::u32string_view text) { return {text.begin(), text.end()}; }

std::vector<std::int64_t> pieces(std::u32string_view text, const std::vector<TokenOffset>& tokens,
                                 const std::vector<std::int64_t>& cuts) {
  std::vector<std::int64_t> result(tokens.size());
  micro::token_pieces(points(text), tokens, cuts, result);
  return result;
}

TEST(TokenPieces, TheFirstCharacterThatIsNoSpaceOwnsTheToken) {
  // "He ran. So" with a cut after the full stop: " So" belongs to the second piece, its space stands before the cut's
  // end.
  EXPECT_EQ(pieces(U"He ran. So", {{0, 2}, {2, 6}, {6, 7}, {7, 10}}, {7}), (std::vector<std::int64_t>{0, 0, 0, 1}));
  // A cut inside the white space of a token: the word decides.
  EXPECT_EQ(pieces(U"a  b", {{0, 1}, {1, 4}}, {2}), (std::vector<std::int64_t>{0, 1}));
}

TEST(TokenPieces, WhiteSpaceOnlyCountsByItsFirstCharacter) {
  EXPECT_EQ(pieces(U"a\n\nb", {{0, 1}, {1, 3}, {3, 4}}, {2}), (std::vector<std::int64_t>{0, 0, 1}));
}

TEST(TokenPieces, AnEmptyRangeBeginsWhereTheTokenBeforeItEnded) {
  EXPECT_EQ(pieces(U"a  b", {{0, 1}, {3, 3}, {3, 4}}, {2}), (std::vector<std::int64_t>{0, 0, 1}));
}

TEST(TokenPieces, NoTokensNoCutsEmptyPieces) {
  EXPECT_TRUE(pieces(U"", {}, {}).empty());
  EXPECT_EQ(pieces(U"ab", {{0, 2}}, {}), (std::vector<std::int64_t>{0}));
  EXPECT_EQ(pieces(U"ab", {{0, 1}, {1, 2}}, {1, 1, 2}), (std::vector<std::int64_t>{0, 2}));
}

TEST(TokenPieces, ValuesOutOfRangeAreRefused) {
  EXPECT_THROW(pieces(U"ab", {{0, 3}}, {}), c10::ValueError);
  EXPECT_THROW(pieces(U"ab", {{-1, 1}}, {}), c10::ValueError);
  EXPECT_THROW(pieces(U"ab", {{1, 0}}, {}), c10::ValueError);
  EXPECT_THROW(pieces(U"ab", {{0, 1}}, {2, 1}), c10::ValueError);
  EXPECT_THROW(pieces(U"ab", {{0, 1}}, {3}), c10::ValueError);
  std::array<std::int64_t, 2> room{};
  const std::vector<TokenOffset> one{{0, 1}};
  EXPECT_THROW(micro::token_pieces(points(U"ab"), one, {}, room), c10::ValueError);
}

TEST(TokensInRegions, AnySharedCharacterCounts) {
  const std::vector<TokenOffset> tokens{{0, 2}, {2, 4}, {4, 4}, {4, 7}, {7, 9}};
  const std::vector<TokenOffset> regions{{1, 1}, {3, 5}, {7, 7}};
  std::array<bool, 5> inside{};
  micro::tokens_in_regions(tokens, regions, inside);
  EXPECT_EQ(inside, (std::array<bool, 5>{false, true, false, true, false}));
}

TEST(TokensInRegions, RegionsAscend) {
  std::array<bool, 1> inside{};
  const std::vector<TokenOffset> token{{0, 1}}, crossed{{0, 3}, {2, 4}}, reversed{{3, 1}};
  EXPECT_THROW(micro::tokens_in_regions(token, crossed, inside), c10::ValueError);
  EXPECT_THROW(micro::tokens_in_regions(token, reversed, inside), c10::ValueError);
}

}  // namespace
