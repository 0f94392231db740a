// The product with activations rounded to 8 bits: an option of its own, named `cpu_int8`, never a silent replacement of `linear.inc.h`.
//
// Stored columns are cut into blocks: a group, and where a group is wider than 128 columns, pieces of 128. Each block of each row of x
// has a scale of its own:
//   s = max|x| / 127,   x8 = x * (127 / max|x|), rounded to nearest even;
//   y = sum over blocks, in their order, of  s_w * s * (sum q x8  -  zero * sum x8).
// The bracket is an integer below 2^22 (255 * 127 * 128 at most), so it is exact in int32 and in float32, and no instruction set can
// differ in it. The rest is three float32 operations per block that are never fused: every instruction set, number of threads and
// number of rows gives the same bits.
//
// A block with a NaN or an infinity has the scale NaN: all outputs of its row are NaN. A block whose max|x| is below 2^-120 counts as
// zero, because 127 / max would overflow.
#pragma once
#include "packed.h"

namespace llmquant {

constexpr int kBlockColumns = 128;

// Blocks of one row of x over all stored columns.
struct Blocks {
  int64_t of_group, count;
  explicit Blocks(const Weight& w) : of_group((w.width + kBlockColumns - 1) / kBlockColumns), count(of_group * w.groups) {}
  int64_t first(const Weight& w, int64_t block) const { return block / of_group * w.width + block % of_group * kBlockColumns; }
  int64_t columns(const Weight& w, int64_t block) const {
    const int64_t left = w.width - block % of_group * kBlockColumns;
    return left < kBlockColumns ? left : kBlockColumns;
  }
};

// What one instruction set offers. Bytes of x lie in the order in which a word's planes hold the columns, see `int8.inc.h`.
struct Int8Instructions {
  const char* name;
  bool (*available)();
  // Rounds one block of one row.
  void (*round)(int bits, const float* x, int64_t columns, int8_t* bytes, float* scale, int32_t* sum);
  // One row: y[16] of a tile. bytes [padded_in], scales and sums [blocks].
  void (*one_row)(const Weight&, int64_t tile, const int8_t* bytes, const float* scales, const int32_t* sums, float* y);
  // Several rows: y[rows][16] += one block of a tile. bytes [rows][columns of the block], scales and sums [rows].
  void (*block)(const Weight&, int64_t tile, int64_t block, const int8_t* bytes, const float* scales, const int32_t* sums,
                int64_t rows, float* y);
};

}  // namespace llmquant
