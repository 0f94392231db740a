// The data that the CPU kernel multiplies by, shared by every instruction set. One source, compiled several times: linear.inc.h.
//
// A weight [out, in] is stored in tiles of 16 output rows. A lane of a vector is an output row; consecutive words of a lane hold
// consecutive input columns. So a scale is a vector, nothing is summed across lanes, and the bytes of a tile are read in one stream:
//
//   words   uint32 [tiles][padded_in * bits / 32][16]   2, 4, 8 bits: code i of a word in bits i*bits...
//                                                       3 bits: for 32 columns two words of low two bits, one of high bits (below)
//   scales  [tiles][groups][16]   bfloat16, float16 or float32, whichever holds them exactly
//   zeros   uint8 [tiles][groups][16], or null: 2^(bits-1) everywhere
//   columns int32 [padded_in], or null: the input column of each stored column, -1 for padding
//
// A group is padded to a whole number of words (`width` columns, of which real ones come first), and columns that have an order of
// their own (g_idx) are stored sorted by group: both are a matter of `columns` alone, the inner loops do not know.
//
// 16 bits: not quantized; words are the numbers themselves, [tiles][in][16] of `scale_type`, there are no scales and zeros.
//
// 3 bits: column i of 32 has its low bits in word i / 16 at bit 2 * (i % 16), its high bit in the third word at bit
// 8 * (i % 16 / 4) + i % 4 + 4 * (i / 16), so that bytes line up with the low bits' when four columns are multiplied at once.
#pragma once
#include <cstdint>

namespace llmquant {

constexpr int kRows = 16;       // output rows of a tile
constexpr int kMostTiles = 2;   // of any instruction set
constexpr int kPanel = 256;     // input columns of a panel of decoded weights; 16 rows of float32 are 16 KiB, half of a first-level cache

enum Number : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Weight {
  const uint32_t* words;
  const void* scales;
  const uint8_t* zeros;
  const int32_t* columns;
  int64_t out, in, groups, width;
  int32_t bits, scale_type;

  int64_t padded_in() const { return groups * width; }
  int64_t tiles() const { return (out + kRows - 1) / kRows; }
  int64_t tile_words() const { return padded_in() * bits / 32 * kRows; }
};

// Columns that a whole number of words holds.
constexpr int unit(int bits) { return bits == 3 ? 32 : bits == 16 ? 1 : 32 / bits; }

// Position `column` of a unit: the factor that its masked, unshifted bits carry, see `linear.inc.h`.
constexpr int shift_of(int bits, int column) { return column % (32 / bits) * bits; }
constexpr bool in_place(int bits, int column) { return shift_of(bits, column) + bits < 32; }

// Masks of codes of 1, 2, 4 and 8 bits (first index: log2) that begin at each bit, as vectors: read from memory with the word they
// mask. In a file of its own, since a compiler that sees the constants makes each anew, with two instructions, at every use.
extern const uint32_t kMasks[4][32][kRows];
constexpr int log2_of(int bits) { return bits == 1 ? 0 : bits == 2 ? 1 : bits == 4 ? 2 : 3; }

// Where `multiply` begins and ends its sums: from[tile][row][16], tiles `from_step` floats apart, or null for 0; to[tile][row][16], tiles
// `to_step` apart and rows `stride`.
struct Sums {
  const float* from;
  int64_t from_step;
  float* to;
  int64_t to_step, stride;
};

// What one instruction set offers. `x` is float32 and already in the stored order of columns.
struct Instructions {
  const char* name;
  bool (*available)();
  int most_rows;   // rows of x that one pass over a panel multiplies, and
  int most_tiles;  // tiles that it does so for: as many sums as there are registers for
  // One row: y[16] of a tile. `x` as `spread` leaves it, `sums` the sum of x over each group.
  void (*one_row)(const Weight&, int64_t tile, const float* x, const float* sums, float* y);
  // Lays one row of x out for `one_row`: every column times what its code lacks, and the groups' sums.
  void (*spread)(const Weight&, const float* x, float* spread, float* sums);
  // Decoded weights of stored columns [first, first + count) of a tile: panel[count][16].
  void (*decode)(const Weight&, int64_t tile, int64_t first, int64_t count, float* panel);
  // to = from + x[count][rows] * panel[tile][count][16], panels of tiles kPanel * 16 floats apart; 1 <= rows <= most_rows, 1 <= tiles <=
  // most_tiles.
  void (*multiply)(const float* panel, const float* x, int64_t count, int rows, int tiles, const Sums& sums);
  // Attention of one query [dim] over `count` keys and values, rows of `type` that are `stride` numbers apart; of those where the
  // mask, if there is one, is not 0. scores[count] is scratch.
  void (*attend)(const float* query, const void* keys, const void* values, int32_t type, int64_t count, int64_t key_stride,
                 int64_t value_stride, int64_t dim, float scaling, const uint8_t* mask, float* scores, float* out);
  // scores[t][16] of 16 queries become e^(score - the query's largest), for t in [first, last); sums[16] of them. Query i sees t where
  // mask[t][i] is not 0; without a mask, up to diagonal + i.
  void (*softmax_columns)(float* scores, int64_t first, int64_t last, int64_t diagonal, const uint8_t* mask, float* sums);
  // gate[i] = silu(gate[i]) * up[i]; count a multiple of 16.
  void (*silu_times)(float* gate, const float* up, int64_t count);
  // to = weight * x / root mean square of x; may be in place.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t count, float* to);
  // x cos + rotate_half(x) sin of one head, in place.
  void (*rotate)(float* head, const float* cos, const float* sin, int64_t dim);
};

}  // namespace llmquant
