#include "products.h"

#include <vector>

#include "numbers.h"
#include "threads.h"

namespace llmquant {

float* scratch(size_t floats, int slot) {
  thread_local std::vector<float> kept[4];
  if (kept[slot].size() < floats) kept[slot] = std::vector<float>(floats);
  return kept[slot].data();
}

namespace {

constexpr int64_t kTilesAtATime = 8;  // tiles that share these rows of x while they are in the cache

// One row of x in the stored order of columns.
const float* stored_order(const Weight& w, const void* x, int32_t type, int64_t row, float* to) {
  if (!w.columns) {
    if (type == kFloat32) return static_cast<const float*>(x) + row * w.in;
    widen(x, type, row * w.in, w.in, to);
    return to;
  }
  for (int64_t k = 0; k < w.padded_in(); ++k) to[k] = w.columns[k] < 0 ? 0.0f : number_at(x, type, row * w.in + w.columns[k]);
  return to;
}

struct Output {
  void* y;
  const void* bias;  // of y's type, or null
  int32_t type;
  int64_t stride;  // between rows, in numbers

  // Where the numbers of a tile can be written as they are; null: they must be put.
  float* place(const Weight& w, int64_t row, int64_t tile) const {
    if (type != kFloat32 || bias || (tile + 1) * kRows > w.out) return nullptr;
    return static_cast<float*>(y) + row * stride + tile * kRows;
  }

  void put(const Weight& w, int64_t row, int64_t tile, const float* values) const {
    const int64_t first = tile * kRows, count = std::min<int64_t>(kRows, w.out - first), at = row * stride + first;
    for (int64_t i = 0; i < count; ++i) {
      // A bias is added to the rounded product, as torch adds it.
      float value = values[i];
      if (bias) {
        if (type == kBFloat16) value = widen_bf16(round_bf16(value));
        else if (type == kFloat16) value = widen_fp16(round_fp16(value));
        value += number_at(bias, type, first + i);
      }
      put_number(y, type, at + i, value);
    }
  }
};

void one_row(const Instructions& with, const Weight& w, const void* x, int32_t type, const Output& to, int threads) {
  const int64_t padded = w.padded_in();
  float* spread = scratch(static_cast<size_t>(padded) * (w.bits == 3 ? 2 : 1) + w.groups, 0);
  float* sums = spread + padded * (w.bits == 3 ? 2 : 1);
  with.spread(w, stored_order(w, x, type, 0, scratch(padded, 1)), spread, sums);
  const int64_t tiles = w.tiles();
  if (tiles * kRows * padded < kWorthThreads) threads = 1;
  const int64_t step = std::max<int64_t>(1, tiles / (threads * 8));
  for_each((tiles + step - 1) / step, threads, [&](int64_t chunk) {
    float values[kRows];
    for (int64_t tile = chunk * step; tile < std::min(tiles, (chunk + 1) * step); ++tile) {
      with.one_row(w, tile, spread, sums, values);
      to.put(w, 0, tile, values);
    }
  });
}

template <int ROWS>
void interleave_rows(const float* from, int64_t stride, int64_t count, float* to) {
  for (int64_t k = 0; k < count; ++k, to += ROWS)
    for (int r = 0; r < ROWS; ++r) to[r] = from[r * stride + k];
}

// Where rows of x come from: `stride` numbers of `type` apart.
struct Rows {
  const void* x;
  int32_t type;
  int64_t stride;
};

// Columns [start, start + count) of a row, in the stored order.
void columns_of(const Weight& w, const Rows& from, int64_t row, int64_t start, int64_t count, float* line) {
  const int64_t at = row * from.stride;
  if (!w.columns) return widen(from.x, from.type, at + start, count, line);
  for (int64_t k = 0; k < count; ++k) {
    const int32_t column = w.columns[start + k];
    line[k] = column < 0 ? 0.0f : number_at(from.x, from.type, at + column);
  }
}

// x [columns of a panel][rows of a pass], panel after panel, pass after pass.
void pack_rows(const Weight& w, const Rows& from, int64_t row, const Passes& passes, float* packed, int threads) {
  const int64_t padded = w.padded_in(), panels = (padded + kPanel - 1) / kPanel;
  for_each(passes.count * panels, threads, [&](int64_t i) {
    const int64_t pass = i / panels, start = i % panels * kPanel, count = std::min<int64_t>(kPanel, padded - start);
    const int size = passes.size(pass);
    const int64_t first = row + passes.first(pass);
    float* to = packed + start * passes.rows + passes.first(pass) * count;
    if (!w.columns && from.type == kFloat32) {
      return interleave(static_cast<const float*>(from.x) + first * from.stride + start, from.stride, size, count, to);
    }
    for (int r = 0; r < size; ++r) {
      float line[kPanel];
      columns_of(w, from, first + r, start, count, line);
      for (int64_t k = 0; k < count; ++k) to[k * size + r] = line[k];
    }
  });
}

// Tiles [first, last) times packed rows, into rows `row` and following of the output.
void tiles_of_rows(
    const Instructions& with, const Weight& w, int64_t first, int64_t last, const float* packed, const Passes& passes, int64_t row,
    const Output& to) {
  const int64_t padded = w.padded_in(), size = passes.rows * kRows;
  float* sums = scratch(static_cast<size_t>((last - first) * size), 2);
  alignas(64) float panel[kMostTiles * kPanel * kRows];
  for (int64_t start = 0; start < padded; start += kPanel) {
    const int64_t count = std::min<int64_t>(kPanel, padded - start);
    for (int64_t tile = first, tiles; tile < last; tile += tiles) {
      tiles = std::min<int64_t>(with.most_tiles, last - tile);
      if (to.place(w, row, tile) && !to.place(w, row, tile + tiles - 1)) tiles = 1;  // the last tile has an end of its own
      for (int64_t t = 0; t < tiles; ++t) with.decode(w, tile + t, start, count, panel + t * kPanel * kRows);
      float* sum = sums + (tile - first) * size;
      float* in_place = start + count == padded ? to.place(w, row, tile) : nullptr;
      for (int64_t p = 0; p < passes.count; ++p) {
        const int64_t at = passes.first(p);
        const float* from = start == 0 ? nullptr : sum + at * kRows;
        const Sums ends = in_place ? Sums{from, size, in_place + at * to.stride, kRows, to.stride}
                                   : Sums{from, size, sum + at * kRows, size, kRows};
        with.multiply(panel, packed + start * passes.rows + at * count, count, passes.size(p), static_cast<int>(tiles), ends);
      }
    }
  }
  for (int64_t tile = first; tile < last; ++tile) {
    if (to.place(w, row, tile)) continue;
    for (int64_t r = 0; r < passes.rows; ++r) to.put(w, row + r, tile, sums + (tile - first) * size + r * kRows);
  }
}

int64_t tiles_at_a_time(int64_t tiles, int threads) { return std::clamp<int64_t>(tiles / (threads * 8), 1, kTilesAtATime); }

void several_rows(
    const Instructions& with, const Weight& w, const void* x, int32_t type, int64_t rows, const Output& to, int threads) {
  const int64_t padded = w.padded_in(), tiles = w.tiles();
  if (rows * tiles * kRows * padded < kWorthThreads) threads = 1;
  const int64_t step = tiles_at_a_time(tiles, threads), blocks = (rows + kBlock - 1) / kBlock;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = rows * block / blocks;
    const Passes passes(rows * (block + 1) / blocks - row, with.most_rows);
    float* packed = scratch(static_cast<size_t>(passes.rows * padded), 0);
    pack_rows(w, {x, type, w.in}, row, passes, packed, threads);
    for_each((tiles + step - 1) / step, threads, [&](int64_t chunk) {
      tiles_of_rows(with, w, chunk * step, std::min(tiles, (chunk + 1) * step), packed, passes, row, to);
    });
  }
}

size_t several_size(const Weight* const* weights, int count) {
  size_t size = 0;
  for (int i = 0; i < count; ++i) size += weights[i]->padded_in() * (weights[i]->bits == 3 ? 2 : 1) + weights[i]->groups;
  return size;
}

}  // namespace

void product(
    const Instructions& with, const Weight& w, const void* x, int64_t rows, int32_t type, const void* bias, void* y, int threads) {
  const Output to{y, bias, type, w.out};
  if (rows == 1) one_row(with, w, x, type, to, threads);
  else if (rows > 1) several_rows(with, w, x, type, rows, to, threads);
}

void interleave(const float* from, int64_t stride, int rows, int64_t count, float* to) {
  switch (rows) {
    case 3: return interleave_rows<3>(from, stride, count, to);
    case 5: return interleave_rows<5>(from, stride, count, to);
    case 6: return interleave_rows<6>(from, stride, count, to);
    case 11: return interleave_rows<11>(from, stride, count, to);
    case 12: return interleave_rows<12>(from, stride, count, to);
    default:
      for (int64_t k = 0; k < count; ++k, to += rows)
        for (int r = 0; r < rows; ++r) to[r] = from[r * stride + k];
  }
}

void one_row_of_several(
    const Instructions& with, const Weight* const* weights, float* const* y, int count, const float* x, int threads) {
  const float* spreads[3];
  const float* sums[3];
  int64_t first_tile[4] = {0}, work = 0;
  float* free = scratch(several_size(weights, count), 0);
  for (int i = 0; i < count; ++i) {
    const Weight& w = *weights[i];
    const bool same = i > 0 && !w.columns && !weights[i - 1]->columns && w.bits == weights[i - 1]->bits && w.width == weights[i - 1]->width;
    const int64_t size = w.padded_in() * (w.bits == 3 ? 2 : 1);
    spreads[i] = same ? spreads[i - 1] : free;
    sums[i] = same ? sums[i - 1] : free + size;
    if (!same) {
      const float* row = stored_order(w, x, kFloat32, 0, scratch(w.padded_in(), 1));
      with.spread(w, row, free, free + size);
      free += size + w.groups;
    }
    first_tile[i + 1] = first_tile[i] + w.tiles();
    work += w.tiles() * kRows * w.padded_in();
  }
  if (work < kWorthThreads) threads = 1;
  const int64_t tiles = first_tile[count], step = std::max<int64_t>(1, tiles / (threads * 8));
  for_each((tiles + step - 1) / step, threads, [&](int64_t chunk) {
    float values[kRows];
    int i = 0;
    for (int64_t at = chunk * step; at < std::min(tiles, (chunk + 1) * step); ++at) {
      while (at >= first_tile[i + 1]) ++i;
      const int64_t tile = at - first_tile[i];
      with.one_row(*weights[i], tile, spreads[i], sums[i], values);
      const int64_t valid = std::min<int64_t>(kRows, weights[i]->out - tile * kRows);
      std::copy(values, values + valid, y[i] + tile * kRows);
    }
  });
}

void rows_of_several(
    const Instructions& with, const Weight* const* weights, float* const* y, const int64_t* strides, int count, const float* x,
    int64_t stride, int64_t rows, int threads) {
  if (rows == 1) return one_row_of_several(with, weights, y, count, x, threads);
  const Passes passes(rows, with.most_rows);
  const Weight* packed_for = nullptr;
  float* packed = nullptr;
  for (int i = 0; i < count; ++i) {
    const Weight& w = *weights[i];
    const int64_t tiles = w.tiles();
    const int team = rows * tiles * kRows * w.padded_in() < kWorthThreads ? 1 : threads;
    if (!packed_for || w.columns || packed_for->columns || w.padded_in() != packed_for->padded_in()) {
      packed_for = &w;
      packed = scratch(static_cast<size_t>(rows * w.padded_in()), 0);
      pack_rows(w, {x, kFloat32, stride}, 0, passes, packed, team);
    }
    const Output to{y[i], nullptr, kFloat32, strides[i]};
    const int64_t step = tiles_at_a_time(tiles, team);
    for_each((tiles + step - 1) / step, team, [&](int64_t chunk) {
      tiles_of_rows(with, w, chunk * step, std::min(tiles, (chunk + 1) * step), packed, passes, 0, to);
    });
  }
}

}  // namespace llmquant
