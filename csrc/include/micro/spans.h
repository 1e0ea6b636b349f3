#pragma once
// Labels of tokens from the places that they stand at: the inner step of turning labelled answers into training rows.

#include <cstdint>
#include <span>

namespace micro {

// Code points [start, end) of one token in its text. An empty range (some tokenizers trim white space off their
// offsets) begins where the token before it ended.
struct TokenOffset {
  std::int64_t start;
  std::int64_t end;
};

// The piece of a text that owns each token (model.md 8.4, offsets mode): the piece of the token's first character that
// is no white space, or of its first character where it is nothing else. Piece i holds the characters up to cuts[i].
//
// text:   N code points.
// tokens: T offsets, 0 <= start <= end <= N.
// cuts:   n ends of pieces, ascending, in [0, N].
// pieces: T results in [0, n]: how many cuts stand at or before the owning character.
//
// Throws ValueError where an offset or a cut is out of range, or the cuts descend.
//
//   micro::token_pieces(text, offsets, cuts, pieces);
void token_pieces(std::span<const std::uint32_t> text, std::span<const TokenOffset> tokens,
                  std::span<const std::int64_t> cuts, std::span<std::int64_t> pieces);

// Whether each token shares a character with one of the regions [start, end), which ascend and do not overlap. Used for
// the loss mask (model.md 8.5).
//
// Throws ValueError where a region is reversed, or begins before the one before it ends.
void tokens_in_regions(std::span<const TokenOffset> tokens, std::span<const TokenOffset> regions,
                       std::span<bool> inside);

}  // namespace micro
