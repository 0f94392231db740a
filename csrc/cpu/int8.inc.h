// Integer products for vectors of LANES words. A lane is an output row; a shifted and masked word of it, a *plane*, is four codes, one a
// byte, and one 32-bit word of x8 holds the four columns that they meet, the same for all lanes. So no byte is ever moved:
//   4 bits: plane p of a word holds columns 2b + p, b = 0 ... 3 the byte
//   2 bits: columns 4b + p
//   3 bits: the two low words as 2 bits, with bit 2 from the third word: columns 16 * (p / 4) + 4b + p % 4
//   8 bits: columns b, minus 128 where the instruction wants small or signed numbers; 128 then comes off the zero-point too
// Sums of two products fit 16 bits, and so do some of those (kFold), before they are added up in 32 bits.
#include "int8.h"
#include "linear.inc.h"  // the vectors; what it multiplies is not used here

#if defined(__x86_64__) && (LANES > 4)
#include <immintrin.h>
#endif

namespace llmquant {
namespace INSTRUCTIONS {
namespace int8 {

typedef int16_t vs __attribute__((vector_size(4 * LANES)));

static inline vu all_words(const int8_t* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, 4);
  return word - vu{};
}

// Sum: what products are collected in. add<BITS>: sum += the four products of every lane. fold: the lanes' totals.
#if defined(__AVX512VNNI__) && LANES == 16

#define DOT_PRODUCTS
typedef vi Sum;
template <int BITS>
static inline void add(Sum& sum, vu codes, vu x) {
  sum = reinterpret_cast<vi>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(codes), reinterpret_cast<__m512i>(x)));
}

#elif defined(__AVXVNNI__) && LANES == 8

#define DOT_PRODUCTS
typedef vi Sum;
template <int BITS>
static inline void add(Sum& sum, vu codes, vu x) {
  sum = reinterpret_cast<vi>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(codes), reinterpret_cast<__m256i>(x)));
}

#elif defined(__AVX512BW__) && LANES == 16

typedef vs Sum;
template <int BITS>
static inline void add(Sum& sum, vu codes, vu x) {
  __m512i a = reinterpret_cast<__m512i>(codes), b = reinterpret_cast<__m512i>(x);
  if constexpr (BITS == 8) {
    b = _mm512_mask_sub_epi8(b, _mm512_movepi8_mask(a), _mm512_setzero_si512(), b);
    a = _mm512_abs_epi8(a);
  }
  sum += reinterpret_cast<vs>(_mm512_maddubs_epi16(a, b));
}
static inline vi fold(Sum sum) { return reinterpret_cast<vi>(_mm512_madd_epi16(reinterpret_cast<__m512i>(sum), _mm512_set1_epi16(1))); }

#elif defined(__AVX2__) && LANES == 8

typedef vs Sum;
template <int BITS>
static inline void add(Sum& sum, vu codes, vu x) {
  __m256i a = reinterpret_cast<__m256i>(codes), b = reinterpret_cast<__m256i>(x);
  if constexpr (BITS == 8) b = _mm256_sign_epi8(b, a), a = _mm256_abs_epi8(a);
  sum += reinterpret_cast<vs>(_mm256_maddubs_epi16(a, b));
}
static inline vi fold(Sum sum) { return reinterpret_cast<vi>(_mm256_madd_epi16(reinterpret_cast<__m256i>(sum), _mm256_set1_epi16(1))); }

#else

typedef vs Sum;
template <int BITS>
static inline void add(Sum& sum, vu codes, vu x) {
  const vs odd = BITS == 8 ? reinterpret_cast<vs>(codes) >> 8 : reinterpret_cast<vs>(codes >> 8 & 0x00ff00ffu);
  const vs even = BITS == 8 ? reinterpret_cast<vs>(codes << 8) >> 8 : reinterpret_cast<vs>(codes & 0x00ff00ffu);
  sum += even * (reinterpret_cast<vs>(x << 8) >> 8) + odd * (reinterpret_cast<vs>(x) >> 8);
}
static inline vi fold(Sum sum) { return (reinterpret_cast<vi>(sum) << 16 >> 16) + (reinterpret_cast<vi>(sum) >> 16); }

#endif

// Planes that may be added up before 16 bits are full: 2 * 127 * (the largest code) each.
#ifdef DOT_PRODUCTS
template <int BITS>
constexpr int kFold = kBlockColumns / 4;
static inline vi fold(Sum sum) { return sum; }
#else
template <int BITS>
constexpr int kFold = BITS == 2 ? 32 : BITS == 3 ? 16 : BITS == 4 ? 8 : 1;
static_assert(2 * 127 * 3 * kFold<2> < 32768 && 2 * 127 * 7 * kFold<3> < 32768 && 2 * 127 * 15 * kFold<4> < 32768 && 2 * 127 * 128 < 32768);
#endif

template <int BITS>
constexpr int kPlanes = unit(BITS) / 4;
template <int BITS>
constexpr int kWords = BITS == 3 ? 3 : 1;

template <int BITS>
constexpr int column_of(int plane, int byte) {
  constexpr int planes = BITS == 3 ? 4 : 8 / BITS;
  return 4 * planes * (plane / planes) + planes * byte + plane % planes;
}

template <int BITS, int PLANE>
static inline vu plane_of(const vu* word) {
  if constexpr (BITS == 4) return word[0] >> 4 * PLANE & 0x0f0f0f0fu;
  if constexpr (BITS == 2) return word[0] >> 2 * PLANE & 0x03030303u;
  if constexpr (BITS == 3) {
    constexpr int up = PLANE < 4 ? 2 - PLANE : 2 - PLANE % 4 - 4;  // from bit 8b + p or 8b + 4 + p to bit 8b + 2
    const vu high = up >= 0 ? word[2] << (up >= 0 ? up : 0) : word[2] >> (up >= 0 ? 0 : -up);
    return (word[PLANE / 4] >> 2 * (PLANE % 4) & 0x03030303u) | (high & 0x04040404u);
  }
#ifdef DOT_PRODUCTS
  return word[0];
#else
  return word[0] ^ 0x80808080u;
#endif
}

// The zero-point as the planes' codes have it.
template <int BITS>
static inline vf plane_zero(const Weight& w, int64_t index) {
#ifndef DOT_PRODUCTS
  if constexpr (BITS == 8) return zero_at(w, index) - 128.0f;
#endif
  return zero_at(w, index);
}

// y += s_w * s * (products - zero * sum); the bracket is exact.
static inline vf plus(vf y, vi products, vf zero, vf weight_scale, float scale, int32_t sum) {
  const vf whole = __builtin_convertvector(products, vf) - zero * static_cast<float>(sum);
  return y + whole * (weight_scale * scale);
}

// ---- rounding ----

template <int BITS>
static void round_of(const float* x, int64_t columns, int8_t* bytes, float* scale, int32_t* sum) {
  int32_t largest = 0;  // of the magnitudes' bits: finite numbers, infinities and NaN are ordered so
  for (int64_t k = 0; k < columns; ++k) {
    int32_t bits;
    __builtin_memcpy(&bits, x + k, 4);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  const bool finite = largest < 0x7f800000;
  *sum = 0;
  if (!finite || largest < 0x03800000) {  // 2^-120
    *scale = finite ? 0.0f : __builtin_nanf("");
    __builtin_memset(bytes, 0, columns);
    return;
  }
  float most;
  __builtin_memcpy(&most, &largest, 4);
  *scale = most / 127.0f;
  const float factor = 127.0f / most;
  int32_t whole[kBlockColumns], total = 0;
  for (int64_t k = 0; k < columns; ++k) {
    // Added to 1.5 * 2^23, a number is rounded to an integer, to nearest even, in the low bits.
    const float shifted = x[k] * factor + 12582912.0f;
    int32_t bits;
    __builtin_memcpy(&bits, &shifted, 4);
    whole[k] = bits - 0x4b400000;
    total += whole[k];
  }
  *sum = total;
  for (int64_t k = 0; k < columns; k += unit(BITS))
    for (int plane = 0; plane < kPlanes<BITS>; ++plane)
      for (int byte = 0; byte < 4; ++byte) *bytes++ = static_cast<int8_t>(whole[k + column_of<BITS>(plane, byte)]);
}

static void round(int bits, const float* x, int64_t columns, int8_t* bytes, float* scale, int32_t* sum) {
  switch (bits) {
    case 2: return round_of<2>(x, columns, bytes, scale, sum);
    case 3: return round_of<3>(x, columns, bytes, scale, sum);
    case 4: return round_of<4>(x, columns, bytes, scale, sum);
    default: return round_of<8>(x, columns, bytes, scale, sum);
  }
}

// ---- one row, straight from the packed words ----

// An instruction that adds to its own sum waits for the last one: those have several.
#ifdef DOT_PRODUCTS
template <int BITS>
constexpr int kSums = kPlanes<BITS> < 4 ? kPlanes<BITS> : 4;
#else
template <int BITS>
constexpr int kSums = 1;
#endif

template <int BITS, int PLANE = 0>
static inline void add_planes(const vu (*word)[kWords<BITS>], const int8_t* x, Sum (*part)[kSums<BITS>]) {
  if constexpr (PLANE < kPlanes<BITS>) {
    const vu four = all_words(x + 4 * PLANE);
    for (int v = 0; v < kVectors; ++v) add<BITS>(part[v][PLANE % kSums<BITS>], plane_of<BITS, PLANE>(word[v]), four);
    add_planes<BITS, PLANE + 1>(word, x, part);
  }
}

template <int BITS>
static inline void add_word(const uint32_t* words, const int8_t* x, Sum (*part)[kSums<BITS>]) {
  vu word[kVectors][kWords<BITS>];
  for (int v = 0; v < kVectors; ++v)
    for (int i = 0; i < kWords<BITS>; ++i) word[v][i] = load(words + i * kRows + v * LANES);
  add_planes<BITS>(word, x, part);
}

template <int BITS>
static void one_row_of(const Weight& w, int64_t tile, const int8_t* x, const float* scales, const int32_t* sums, float* y) {
  constexpr int columns = unit(BITS), words_of_unit = kWords<BITS> * kRows;
  constexpr int units_of_fold = kFold<BITS> / kPlanes<BITS>;
  const Blocks blocks(w);
  const uint32_t* words = w.words + tile * w.tile_words();
  vf total[kVectors] = {};
  for (int64_t b = 0; b < blocks.count; ++b) {
    vi sum[kVectors] = {};
    for (int64_t left = blocks.columns(w, b) / columns; left > 0; left -= units_of_fold) {
      Sum part[kVectors][kSums<BITS>] = {};
      if (left >= units_of_fold) {
        for (int u = 0; u < units_of_fold; ++u, words += words_of_unit, x += columns) add_word<BITS>(words, x, part);
      } else {
        for (int u = 0; u < left; ++u, words += words_of_unit, x += columns) add_word<BITS>(words, x, part);
      }
      for (int v = 0; v < kVectors; ++v)
        for (int i = 0; i < kSums<BITS>; ++i) sum[v] += fold(part[v][i]);
    }
    for (int v = 0; v < kVectors; ++v) {
      const int64_t index = (tile * w.groups + b / blocks.of_group) * kRows + v * LANES;
      total[v] = plus(total[v], sum[v], plane_zero<BITS>(w, index), scale_at(w, index), scales[b], sums[b]);
    }
  }
  for (int v = 0; v < kVectors; ++v) store(y + v * LANES, total[v]);
}

static void one_row(const Weight& w, int64_t tile, const int8_t* x, const float* scales, const int32_t* sums, float* y) {
  switch (w.bits) {
    case 2: return one_row_of<2>(w, tile, x, scales, sums, y);
    case 3: return one_row_of<3>(w, tile, x, scales, sums, y);
    case 4: return one_row_of<4>(w, tile, x, scales, sums, y);
    default: return one_row_of<8>(w, tile, x, scales, sums, y);
  }
}

// ---- several rows: a block's planes are laid out once ----

template <int BITS, int PLANE = 0>
static inline void store_planes(const vu* word, uint32_t* panel) {
  if constexpr (PLANE < kPlanes<BITS>) {
    *reinterpret_cast<vu_at*>(panel + PLANE * kRows) = plane_of<BITS, PLANE>(word);
    store_planes<BITS, PLANE + 1>(word, panel);
  }
}

template <int BITS>
static inline void planes_of_block(const uint32_t* words, int64_t columns, uint32_t* panel) {
  for (int64_t k = 0; k < columns; k += unit(BITS), words += kWords<BITS> * kRows, panel += kPlanes<BITS> * kRows)
    for (int v = 0; v < kVectors; ++v) {
      vu word[kWords<BITS>];
      for (int i = 0; i < kWords<BITS>; ++i) word[i] = load(words + i * kRows + v * LANES);
      store_planes<BITS>(word, panel + v * LANES);
    }
}

template <int BITS, int ROWS>
static inline void add_panel(const uint32_t* panel, int planes, const int8_t* x, int64_t columns, Sum (*part)[kVectors]) {
// Unrolled further, GCC 12 multiplies everything before it adds anything, and spills it: half the speed.
#pragma GCC unroll 2
  for (int p = 0; p < planes; ++p, panel += kRows, x += 4) {
    vu codes[kVectors];
    for (int v = 0; v < kVectors; ++v) codes[v] = load(panel + v * LANES);
    for (int r = 0; r < ROWS; ++r) {
      const vu four = all_words(x + r * columns);
      for (int v = 0; v < kVectors; ++v) add<BITS>(part[r][v], codes[v], four);
    }
  }
}

template <int BITS, int ROWS>
static inline void multiply_rows(const uint32_t* panel, const int8_t* x, int64_t columns, vi (*sum)[kVectors]) {
  constexpr int fold_at = kFold<BITS>;
  for (int64_t left = columns / 4; left > 0; left -= fold_at, panel += fold_at * kRows, x += 4 * fold_at) {
    Sum part[ROWS][kVectors] = {};
    if (left >= fold_at) add_panel<BITS, ROWS>(panel, fold_at, x, columns, part);
    else add_panel<BITS, ROWS>(panel, static_cast<int>(left), x, columns, part);
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < kVectors; ++v) sum[r][v] += fold(part[r][v]);
  }
}

#if LANES == 16
constexpr int kMost = 12;
#elif defined(DOT_PRODUCTS)
constexpr int kMost = 6;
#elif LANES == 8 || defined(__aarch64__)
constexpr int kMost = 4;
#else
constexpr int kMost = 2;
#endif

struct Scales {
  vf weight[kVectors], zero[kVectors];
};

template <int BITS, int ROWS>
static void rows_of_block(
    const uint32_t* panel, const Scales& by, const int8_t* x, int64_t columns, const float* scales, const int32_t* sums, float* y) {
  vi sum[ROWS][kVectors] = {};
  multiply_rows<BITS, ROWS>(panel, x, columns, sum);
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < kVectors; ++v) {
      float* to = y + r * kRows + v * LANES;
      store(to, plus(load(to), sum[r][v], by.zero[v], by.weight[v], scales[r], sums[r]));
    }
}

template <int BITS, int ROWS = kMost>
static inline void rows_up_to(
    int64_t rows, const uint32_t* panel, const Scales& by, const int8_t* x, int64_t columns, const float* scales, const int32_t* sums,
    float* y) {
  if (rows == ROWS) return rows_of_block<BITS, ROWS>(panel, by, x, columns, scales, sums, y);
  if constexpr (ROWS > 1) rows_up_to<BITS, ROWS - 1>(rows, panel, by, x, columns, scales, sums, y);
}

template <int BITS>
static void block_of(
    const Weight& w, int64_t tile, int64_t b, const int8_t* x, const float* scales, const int32_t* sums, int64_t rows, float* y) {
  const Blocks blocks(w);
  const int64_t first = blocks.first(w, b), columns = blocks.columns(w, b);
  alignas(64) uint32_t panel[kBlockColumns / 4 * kRows];
  planes_of_block<BITS>(w.words + tile * w.tile_words() + first * BITS / 32 * kRows, columns, panel);
  Scales by;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t index = (tile * w.groups + b / blocks.of_group) * kRows + v * LANES;
    by.weight[v] = scale_at(w, index), by.zero[v] = plane_zero<BITS>(w, index);
  }
  for (int64_t r = 0, size; r < rows; r += size) {
    const int64_t passes = (rows - r + kMost - 1) / kMost;
    size = (rows - r + passes - 1) / passes;
    rows_up_to<BITS>(size, panel, by, x + r * columns, columns, scales + r, sums + r, y + r * kRows);
  }
}

static void block(
    const Weight& w, int64_t tile, int64_t b, const int8_t* x, const float* scales, const int32_t* sums, int64_t rows, float* y) {
  switch (w.bits) {
    case 2: return block_of<2>(w, tile, b, x, scales, sums, rows, y);
    case 3: return block_of<3>(w, tile, b, x, scales, sums, rows, y);
    case 4: return block_of<4>(w, tile, b, x, scales, sums, rows, y);
    default: return block_of<8>(w, tile, b, x, scales, sums, rows, y);
  }
}

}  // namespace int8
}  // namespace INSTRUCTIONS
}  // namespace llmquant
