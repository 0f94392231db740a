#include "packed.h"

namespace llmquant {

#define ROW(b, s) {MASK(b, s), MASK(b, s), MASK(b, s), MASK(b, s), MASK(b, s), MASK(b, s), MASK(b, s), MASK(b, s), \
                   MASK(b, s), MASK(b, s), MASK(b, s), MASK(b, s), MASK(b, s), MASK(b, s), MASK(b, s), MASK(b, s)}
#define MASK(b, s) (((1u << (b)) - 1) << (s))
#define FOUR(b, s) ROW(b, s), ROW(b, s + 1), ROW(b, s + 2), ROW(b, s + 3)
#define ALL(b) {FOUR(b, 0), FOUR(b, 4), FOUR(b, 8), FOUR(b, 12), FOUR(b, 16), FOUR(b, 20), FOUR(b, 24), FOUR(b, 28)}

alignas(64) extern const uint32_t kMasks[4][32][kRows] = {ALL(1), ALL(2), ALL(4), ALL(8)};

}  // namespace llmquant
