// What Python calls for the product with 8-bit activations; the definition stands in int8.h.
#include <algorithm>
#include <vector>

#include "int8.h"
#include "numbers.h"
#include "threads.h"

namespace llmquant {

extern const Int8Instructions kInt8_generic;
#if defined(__x86_64__)
extern const Int8Instructions kInt8_avx2, kInt8_avxvnni, kInt8_avx512, kInt8_avx512vnni;
static const Int8Instructions* const kInt8[] = {&kInt8_avx512vnni, &kInt8_avx512, &kInt8_avxvnni, &kInt8_avx2, &kInt8_generic};
#else
static const Int8Instructions* const kInt8[] = {&kInt8_generic};
#endif

namespace {

constexpr int64_t kRowsAtATime = 256;         // rows of x: a block of them is 32 KiB
constexpr int64_t kTilesAtATime = 8;          // tiles that share these rows while they are in the second-level cache
constexpr int64_t kWorthThreads = 64 * 1024;  // multiply-adds below which a team costs more than it saves

// Memory that a thread keeps for its next call; a slot per use.
template <typename T>
T* scratch(size_t count, int slot) {
  thread_local std::vector<T> kept[2];
  if (kept[slot].size() < count) kept[slot] = std::vector<T>(count);
  return kept[slot].data();
}

// Rows of x, rounded: block after block of columns, in each the rows one after another.
struct Rounded {
  int64_t rows;
  int8_t* bytes;    // [blocks][rows][columns of the block]
  float* scales;    // [blocks][rows]
  int32_t* sums;    // [blocks][rows]
};

void round_row(
    const Int8Instructions& with, const Weight& w, const Blocks& blocks, const void* x, int32_t type, int64_t row, const Rounded& to,
    int64_t at) {
  float gathered[kBlockColumns];
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t first = blocks.first(w, b), columns = blocks.columns(w, b);
    const float* from = gathered;
    if (w.columns) {
      for (int64_t k = 0; k < columns; ++k) {
        const int32_t column = w.columns[first + k];
        gathered[k] = column < 0 ? 0.0f : number_at(x, type, row * w.in + column);
      }
    } else if (type == kFloat32) {
      from = static_cast<const float*>(x) + row * w.in + first;
    } else {
      widen(x, type, row * w.in + first, columns, gathered);
    }
    const int64_t index = b * to.rows + at;
    with.round(w.bits, from, columns, to.bytes + first * to.rows + at * columns, to.scales + index, to.sums + index);
  }
}

void put(const Weight& w, void* y, int32_t type, int64_t row, int64_t tile, const float* values) {
  const int64_t first = tile * kRows, count = std::min<int64_t>(kRows, w.out - first);
  for (int64_t i = 0; i < count; ++i) put_number(y, type, row * w.out + first + i, values[i]);
}

void one_row(const Int8Instructions& with, const Weight& w, const Rounded& x, void* y, int32_t type, int64_t row, int threads) {
  const int64_t tiles = w.tiles(), step = std::max<int64_t>(1, tiles / (threads * 8));
  for_each((tiles + step - 1) / step, threads, [&](int64_t chunk) {
    float values[kRows];
    for (int64_t tile = chunk * step; tile < std::min(tiles, (chunk + 1) * step); ++tile) {
      with.one_row(w, tile, x.bytes, x.scales, x.sums, values);
      put(w, y, type, row, tile, values);
    }
  });
}

void several_rows(
    const Int8Instructions& with, const Weight& w, const Blocks& blocks, const Rounded& x, void* y, int32_t type, int64_t row,
    int threads) {
  const int64_t tiles = w.tiles(), step = std::clamp<int64_t>(tiles / (threads * 8), 1, kTilesAtATime);
  for_each((tiles + step - 1) / step, threads, [&](int64_t chunk) {
    const int64_t first = chunk * step, last = std::min(tiles, first + step), size = x.rows * kRows;
    float* totals = scratch<float>(static_cast<size_t>((last - first) * size), 1);
    std::fill(totals, totals + (last - first) * size, 0.0f);
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int8_t* bytes = x.bytes + blocks.first(w, b) * x.rows;
      for (int64_t tile = first; tile < last; ++tile)
        with.block(w, tile, b, bytes, x.scales + b * x.rows, x.sums + b * x.rows, x.rows, totals + (tile - first) * size);
    }
    for (int64_t tile = first; tile < last; ++tile)
      for (int64_t r = 0; r < x.rows; ++r) put(w, y, type, row + r, tile, totals + (tile - first) * size + r * kRows);
  });
}

}  // namespace
}  // namespace llmquant

using namespace llmquant;

#pragma GCC visibility push(default)
extern "C" {

// As llmquant_instructions, for llmquant_int8_linear.
const char* llmquant_int8_instructions(int index, int* available) {
  if (index < 0 || index >= static_cast<int>(std::size(kInt8))) return nullptr;
  *available = kInt8[index]->available();
  return kInt8[index]->name;
}

// y [rows, out] = x [rows, in], rounded to 8 bits, times the weight, transposed; x and y of one type.
void llmquant_int8_linear(int instructions, const Weight* w, const void* x, int64_t rows, int32_t type, void* y, int threads) {
  const Int8Instructions& with = *kInt8[instructions];
  const Blocks blocks(*w);
  const int64_t passes = (rows + kRowsAtATime - 1) / kRowsAtATime;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t row = rows * pass / passes, count = rows * (pass + 1) / passes - row;
    const Rounded rounded{
        count, scratch<int8_t>(static_cast<size_t>(count * w->padded_in()), 0),
        scratch<float>(static_cast<size_t>(count * blocks.count), 0), scratch<int32_t>(static_cast<size_t>(count * blocks.count), 0)};
    const int team = count * w->tiles() * kRows * w->padded_in() < kWorthThreads ? 1 : threads;
    for_each(count, count == 1 ? 1 : team, [&](int64_t r) { round_row(with, *w, blocks, x, type, row + r, rounded, r); });
    if (count == 1) one_row(with, *w, rounded, y, type, row, team);
    else several_rows(with, *w, blocks, rounded, y, type, row, team);
  }
}

}  // extern "C"
#pragma GCC visibility pop
