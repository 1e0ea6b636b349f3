#include "free_linear.h"

void pack_free(const uint16_t* plain, int64_t in, int64_t out, int columns, uint16_t* packed) {
  for (int64_t first = 0; first < out; first += columns)
    for (int64_t pair = 0; pair < in / 2; ++pair)
      for (int64_t c = 0; c < columns; ++c)
        for (int64_t i = 0; i < 2; ++i) *packed++ = plain[(first + c) * in + 2 * pair + i];
}
