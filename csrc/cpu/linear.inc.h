// The arithmetic, for vectors of LANES floats, in the vector extensions of GCC and Clang: the same lines become SSE2, NEON, AVX2 or
// AVX-512 by the flags of the file that includes them. Everything is in float32; weights are never rounded.
//
// One row of x is bound by memory and by decoding. The code stays where it is in its word: masked, converted to float it is
// q * 2^shift, exactly, and x was multiplied by 2^-shift beforehand, exactly. Zero-points come off once per group:
//   y += scale * (sum q x  -  zero * sum x).
// Several rows decode a panel of weights, (q - zero) * scale in float32, bit for bit QuantizedWeight.dequantize, and multiply it as
// a matrix product does, from registers of accumulators.
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>

#include "packed.h"

#ifndef LANES
#error "define LANES"
#endif

// Templates that unroll a word column by column must not become calls.
#define ALWAYS __attribute__((always_inline))

namespace llmquant {
namespace INSTRUCTIONS {

constexpr int kVectors = kRows / LANES;
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef float vf_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vu_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t vh_at __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint8_t vb_at __attribute__((vector_size(LANES), aligned(1), may_alias));

static inline ALWAYS vf load(const float* p) { return *reinterpret_cast<const vf_at*>(p); }
static inline ALWAYS vu load(const uint32_t* p) { return *reinterpret_cast<const vu_at*>(p); }
static inline ALWAYS void store(float* p, vf v) { *reinterpret_cast<vf_at*>(p) = v; }
// Asks for the words that come 4 KiB later. The processor's own prefetcher stops at the end of a page and is no further ahead than a
// few lines: one row read 11.9 GB/s without and 16.9 with it (AVX-512, 4 bits).
static inline ALWAYS void prefetch(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + 4096); }
static inline ALWAYS vf all(float value) { return value - vf{}; }
static inline ALWAYS vf to_float(vu v) { return __builtin_convertvector(reinterpret_cast<vi>(v), vf); }

static inline ALWAYS vf widen_bf16(const uint16_t* p) {
  return reinterpret_cast<vf>(__builtin_convertvector(*reinterpret_cast<const vh_at*>(p), vu) << 16);
}

static inline ALWAYS vf widen_fp16(const uint16_t* p) {
#if LANES == 8 && defined(__F16C__)
  return reinterpret_cast<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif LANES == 16 && defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#endif
  // Exponent and fraction moved into place mean 2^-112 of the number, for subnormals too.
  const vu h = __builtin_convertvector(*reinterpret_cast<const vh_at*>(p), vu);
  const vf magnitude = reinterpret_cast<vf>((h & 0x7fffu) << 13) * 0x1p112f;
  return reinterpret_cast<vf>(reinterpret_cast<vu>(magnitude) | (h & 0x8000u) << 16);
}

static inline ALWAYS vf scale_at(const Weight& w, int64_t index) {
  if (w.scale_type == kBFloat16) return widen_bf16(static_cast<const uint16_t*>(w.scales) + index);
  if (w.scale_type == kFloat16) return widen_fp16(static_cast<const uint16_t*>(w.scales) + index);
  return load(static_cast<const float*>(w.scales) + index);
}

static inline ALWAYS vf zero_at(const Weight& w, int64_t index) {
  if (!w.zeros) return all(static_cast<float>(1 << (w.bits - 1)));
  return to_float(__builtin_convertvector(*reinterpret_cast<const vb_at*>(w.zeros + index), vu));
}

// ---- one row ----

// The low or only part of a code, times 2^shift where it is left in place.
template <int BITS, int COLUMN>
static inline ALWAYS vf masked(vu word) {
  constexpr int shift = shift_of(BITS, COLUMN);
  if constexpr (in_place(BITS, COLUMN)) return to_float(word & load(kMasks[log2_of(BITS)][shift]));
  return to_float(word >> shift);
}

template <int BITS>
static inline ALWAYS float lacking(int column) {
  return in_place(BITS, column) ? 1.0f / static_cast<float>(1u << shift_of(BITS, column)) : 1.0f;
}

constexpr int high_bit(int column) { return 8 * (column % 16 / 4) + column % 4 + 4 * (column / 16); }

template <int BITS>
static void spread_of(const Weight& w, const float* x, float* spread, float* sums) {
  constexpr int columns = unit(BITS), copies = BITS == 3 ? 2 : 1;  // low and high parts of 3 bits have factors of their own
  float factor[columns], high[columns];
  for (int i = 0; i < columns; ++i) {
    factor[i] = lacking<BITS == 3 ? 2 : BITS>(i);
    high[i] = BITS == 3 && high_bit(i) < 31 ? 4.0f / static_cast<float>(1u << high_bit(i)) : 4.0f;
  }
  for (int64_t g = 0; g < w.groups; ++g) {
    float partial[8] = {};
    for (int64_t k = 0; k < w.width; k += columns, spread += copies * columns, x += columns) {
      for (int i = 0; i < columns; ++i) spread[i] = x[i] * factor[i];
      if (copies == 2) for (int i = 0; i < columns; ++i) spread[columns + i] = x[i] * high[i];
      for (int i = 0; i < columns; i += 8)
        for (int lane = 0; lane < 8 && lane < columns; ++lane) partial[lane] += x[i + lane];
    }
    sums[g] = ((partial[0] + partial[4]) + (partial[1] + partial[5])) + ((partial[2] + partial[6]) + (partial[3] + partial[7]));
  }
}

static void spread(const Weight& w, const float* x, float* spread, float* sums) {
  switch (w.bits) {
    case 2: return spread_of<2>(w, x, spread, sums);
    case 3: return spread_of<3>(w, x, spread, sums);
    case 4: return spread_of<4>(w, x, spread, sums);
    case 8: return spread_of<8>(w, x, spread, sums);
    default: std::memcpy(spread, x, w.in * sizeof(float));
  }
}

constexpr int kChains = 8 / kVectors > 0 ? 8 / kVectors : 1;  // independent sums per vector: enough to hide the latency of a multiply-add

template <int BITS, int COLUMN, int END>
static inline ALWAYS void add_columns(const vu* word, const float* x, vf (*sum)[kChains]) {
  if constexpr (COLUMN < END) {
    const vf factor = all(x[COLUMN]);
    for (int v = 0; v < kVectors; ++v) sum[v][COLUMN % kChains] += masked<BITS, COLUMN>(word[v]) * factor;
    add_columns<BITS, COLUMN + 1, END>(word, x, sum);
  }
}

template <int COLUMN>
static inline ALWAYS void add_high_bits(const vu* word, const float* x, vf (*sum)[kChains]) {
  if constexpr (COLUMN < 32) {
    constexpr int bit = high_bit(COLUMN);
    const vf factor = all(x[COLUMN]);
    for (int v = 0; v < kVectors; ++v)
      sum[v][COLUMN % kChains] += (bit < 31 ? to_float(word[v] & load(kMasks[0][bit])) : to_float(word[v] >> 31)) * factor;
    add_high_bits<COLUMN + 1>(word, x, sum);
  }
}

// One unit of columns; moves on `words` and `x`.
template <int BITS>
static inline ALWAYS void add_unit(const uint32_t*& words, const float*& x, vf (*sum)[kChains]) {
  vu word[kVectors];
  for (int part = 0; part < (BITS == 3 ? 2 : 1); ++part, words += kRows) {
    prefetch(words);
    for (int v = 0; v < kVectors; ++v) word[v] = load(words + v * LANES);
    if constexpr (BITS == 3) add_columns<2, 0, 16>(word, x + 16 * part, sum);
    else add_columns<BITS, 0, unit(BITS)>(word, x, sum);
  }
  x += unit(BITS);
  if constexpr (BITS == 3) {
    prefetch(words);
    for (int v = 0; v < kVectors; ++v) word[v] = load(words + v * LANES);
    add_high_bits<0>(word, x, sum);
    words += kRows;
    x += 32;
  }
}

template <int BITS>
static void one_row_of(const Weight& w, int64_t tile, const float* x, const float* sums, float* y) {
  const uint32_t* words = w.words + tile * w.tile_words();
  vf total[kVectors] = {};
  for (int64_t g = 0; g < w.groups; ++g) {
    vf sum[kVectors][kChains] = {};
    for (int64_t k = 0; k < w.width; k += unit(BITS)) add_unit<BITS>(words, x, sum);
    for (int v = 0; v < kVectors; ++v) {
      vf products = sum[v][0];
      for (int c = 1; c < kChains; ++c) products += sum[v][c];
      const int64_t index = (tile * w.groups + g) * kRows + v * LANES;
      total[v] += scale_at(w, index) * (products - zero_at(w, index) * sums[g]);
    }
  }
  for (int v = 0; v < kVectors; ++v) store(y + v * LANES, total[v]);
}

static inline ALWAYS vf half_at(const Weight& w, const uint16_t* p) {
  return w.scale_type == kBFloat16 ? widen_bf16(p) : widen_fp16(p);
}

static void one_row_of_halves(const Weight& w, int64_t tile, const float* x, float* y) {
  const uint16_t* p = reinterpret_cast<const uint16_t*>(w.words) + tile * w.in * kRows;
  vf sum[kVectors][kChains] = {};
  int64_t k = 0;
  for (; k + kChains <= w.in; k += kChains, p += kChains * kRows)
    for (int c = 0; c < kChains; ++c) {
      if (c % 2 == 0) prefetch(p + c * kRows);  // two columns to a line
      for (int v = 0; v < kVectors; ++v) sum[v][c] += half_at(w, p + c * kRows + v * LANES) * x[k + c];
    }
  for (; k < w.in; ++k, p += kRows)
    for (int v = 0; v < kVectors; ++v) sum[v][0] += half_at(w, p + v * LANES) * x[k];
  for (int v = 0; v < kVectors; ++v) {
    for (int c = 1; c < kChains; ++c) sum[v][0] += sum[v][c];
    store(y + v * LANES, sum[v][0]);
  }
}

static void one_row(const Weight& w, int64_t tile, const float* x, const float* sums, float* y) {
  switch (w.bits) {
    case 16: return one_row_of_halves(w, tile, x, y);
    case 2: return one_row_of<2>(w, tile, x, sums, y);
    case 3: return one_row_of<3>(w, tile, x, sums, y);
    case 4: return one_row_of<4>(w, tile, x, sums, y);
    default: return one_row_of<8>(w, tile, x, sums, y);
  }
}

// ---- several rows ----

template <int BITS, int COLUMN, int END>
static inline ALWAYS void decode_columns(const vu* word, const vu* high, const vf* zero, const vf* scale, float* panel) {
  if constexpr (COLUMN < END) {
    constexpr int stored = BITS == 3 ? 2 : BITS;
    for (int v = 0; v < kVectors; ++v) {
      vu code = word[v] >> shift_of(stored, COLUMN);
      if constexpr (shift_of(stored, COLUMN) + stored < 32) code &= (1u << stored) - 1;
      if constexpr (BITS == 3) code |= (high[v] >> high_bit(COLUMN) & 1u) << 2;
      store(panel + COLUMN * kRows + v * LANES, (to_float(code) - zero[v]) * scale[v]);
    }
    decode_columns<BITS, COLUMN + 1, END>(word, high, zero, scale, panel);
  }
}

template <int BITS>
static inline ALWAYS void decode_unit(const uint32_t*& words, const vf* zero, const vf* scale, float* panel) {
  vu first[kVectors], second[kVectors], high[kVectors];
  prefetch(words);
  for (int v = 0; v < kVectors; ++v) first[v] = load(words + v * LANES);
  if constexpr (BITS == 3) {
    prefetch(words + kRows), prefetch(words + 2 * kRows);
    for (int v = 0; v < kVectors; ++v) second[v] = load(words + kRows + v * LANES), high[v] = load(words + 2 * kRows + v * LANES);
    decode_columns<3, 0, 16>(first, high, zero, scale, panel);
    decode_columns<3, 16, 32>(second, high, zero, scale, panel);
    words += 3 * kRows;
  } else {
    decode_columns<BITS, 0, unit(BITS)>(first, high, zero, scale, panel);
    words += kRows;
  }
}

template <int BITS>
static void decode_of(const Weight& w, int64_t tile, int64_t first, int64_t count, float* panel) {
  const uint32_t* words = w.words + tile * w.tile_words() + first * BITS / 32 * kRows;
  for (int64_t k = first; k < first + count;) {
    const int64_t group = k / w.width;
    vf zero[kVectors], scale[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t index = (tile * w.groups + group) * kRows + v * LANES;
      zero[v] = zero_at(w, index), scale[v] = scale_at(w, index);
    }
    int64_t end = (group + 1) * w.width;
    if (end > first + count) end = first + count;
    for (; k < end; k += unit(BITS), panel += unit(BITS) * kRows) decode_unit<BITS>(words, zero, scale, panel);
  }
}

static void decode_halves(const Weight& w, int64_t tile, int64_t first, int64_t count, float* panel) {
  const uint16_t* p = reinterpret_cast<const uint16_t*>(w.words) + (tile * w.in + first) * kRows;
  for (int64_t i = 0; i < count * kRows; i += 2 * kRows) {
    prefetch(p + i);
    for (int64_t j = i; j < std::min(i + 2 * kRows, count * kRows); j += LANES) store(panel + j, half_at(w, p + j));
  }
}

static void decode(const Weight& w, int64_t tile, int64_t first, int64_t count, float* panel) {
  switch (w.bits) {
    case 16: return decode_halves(w, tile, first, count, panel);
    case 2: return decode_of<2>(w, tile, first, count, panel);
    case 3: return decode_of<3>(w, tile, first, count, panel);
    case 4: return decode_of<4>(w, tile, first, count, panel);
    default: return decode_of<8>(w, tile, first, count, panel);
  }
}

// Vector `v` of the TILES tiles of a pass is vector v % kVectors of tile v / kVectors, `step` numbers behind the one before.
template <int ROWS, int TILES>
static void multiply_rows(const float* panel, const float* x, int64_t count, const Sums& sums) {
  constexpr int vectors = TILES * kVectors;
  vf sum[ROWS][vectors] = {};
  const auto tile_at = [](int v, int64_t step) { return v / kVectors * step + v % kVectors * LANES; };
  if (sums.from) {
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < vectors; ++v) sum[r][v] = load(sums.from + r * kRows + tile_at(v, sums.from_step));
  }
  for (int64_t k = 0; k < count; ++k, panel += kRows, x += ROWS) {
    vf column[vectors];
    for (int v = 0; v < vectors; ++v) column[v] = load(panel + tile_at(v, kPanel * kRows));
    for (int r = 0; r < ROWS; ++r) {
      const vf factor = all(x[r]);
      for (int v = 0; v < vectors; ++v) sum[r][v] += factor * column[v];
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < vectors; ++v) store(sums.to + r * sums.stride + tile_at(v, sums.to_step), sum[r][v]);
}

#if LANES == 16
constexpr int kMostRows = 12, kTiles = 2;
#elif LANES == 8 || defined(__aarch64__)
constexpr int kMostRows = 6, kTiles = 1;
#else
constexpr int kMostRows = 3, kTiles = 1;
#endif

template <int TILES, int ROWS = kMostRows>
static inline ALWAYS void multiply_up_to(const float* panel, const float* x, int64_t count, int rows, const Sums& sums) {
  if (rows == ROWS) return multiply_rows<ROWS, TILES>(panel, x, count, sums);
  if constexpr (ROWS > 1) multiply_up_to<TILES, ROWS - 1>(panel, x, count, rows, sums);
}

static void multiply(const float* panel, const float* x, int64_t count, int rows, int tiles, const Sums& sums) {
  if (tiles == 1) return multiply_up_to<1>(panel, x, count, rows, sums);
  if constexpr (kTiles == 2) multiply_up_to<2>(panel, x, count, rows, sums);
}

}  // namespace INSTRUCTIONS
}  // namespace llmquant
