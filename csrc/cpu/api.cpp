// What Python calls, through ctypes: plain C, no torch, no Python. Shapes and alignment were checked before.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "numbers.h"
#include "packed.h"
#include "threads.h"

namespace llmquant {

extern const Instructions kInstructions_generic;
#if defined(__x86_64__)
extern const Instructions kInstructions_avx2, kInstructions_avx512;
static const Instructions* const kAll[] = {&kInstructions_avx512, &kInstructions_avx2, &kInstructions_generic};
#else
static const Instructions* const kAll[] = {&kInstructions_generic};
#endif

namespace {

constexpr int64_t kBlock = 264;                // rows of x at a time: with a panel's columns 264 KiB, for the second-level cache
constexpr int64_t kTilesAtATime = 8;           // tiles that share these rows of x while they are in the cache
constexpr int64_t kWorthThreads = 32 * 1024;   // multiply-adds below which a team costs more than it saves

// Memory that a thread keeps for its next call.
float* scratch(size_t floats, int slot) {
  thread_local std::vector<float> kept[4];
  if (kept[slot].size() < floats) kept[slot] = std::vector<float>(floats);
  return kept[slot].data();
}

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

  void put(const Weight& w, int64_t row, int64_t tile, const float* values) const {
    const int64_t first = tile * kRows, count = std::min<int64_t>(kRows, w.out - first);
    for (int64_t i = 0; i < count; ++i) {
      // A bias is added to the rounded product, as torch adds it.
      float value = values[i];
      if (bias) {
        if (type == kBFloat16) value = widen_bf16(round_bf16(value));
        else if (type == kFloat16) value = widen_fp16(round_fp16(value));
        value += number_at(bias, type, first + i);
      }
      put_number(y, type, row * w.out + first + i, value);
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

// How `rows` rows are cut into passes of at most `most` rows, as equal as they get.
struct Passes {
  int64_t rows, count, base, longer;
  Passes(int64_t n, int most) : rows(n), count((n + most - 1) / most), base(n / count), longer(n % count) {}
  int64_t first(int64_t i) const { return i * base + std::min(i, longer); }
  int size(int64_t i) const { return static_cast<int>(base + (i < longer)); }
};

// x [columns of a panel][rows of a pass], panel after panel, pass after pass.
void pack_rows(const Weight& w, const void* x, int32_t type, int64_t row, const Passes& passes, float* packed, int threads) {
  const int64_t padded = w.padded_in(), panels = (padded + kPanel - 1) / kPanel;
  for_each(passes.count * panels, threads, [&](int64_t i) {
    const int64_t pass = i / panels, start = i % panels * kPanel, count = std::min<int64_t>(kPanel, padded - start);
    const int size = passes.size(pass);
    float* to = packed + start * passes.rows + passes.first(pass) * count;
    for (int r = 0; r < size; ++r) {
      const int64_t at = (row + passes.first(pass) + r) * w.in;
      float line[kPanel];
      const float* from = line;
      if (w.columns) {
        for (int64_t k = 0; k < count; ++k) {
          const int32_t column = w.columns[start + k];
          line[k] = column < 0 ? 0.0f : number_at(x, type, at + column);
        }
      } else if (type == kFloat32) {
        from = static_cast<const float*>(x) + at + start;
      } else {
        widen(x, type, at + start, count, line);
      }
      for (int64_t k = 0; k < count; ++k) to[k * size + r] = from[k];
    }
  });
}

void several_rows(
    const Instructions& with, const Weight& w, const void* x, int32_t type, int64_t rows, const Output& to, int threads) {
  const int64_t padded = w.padded_in(), tiles = w.tiles();
  if (rows * tiles * kRows * padded < kWorthThreads) threads = 1;
  const int64_t step = std::clamp<int64_t>(tiles / (threads * 8), 1, kTilesAtATime);
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = rows * block / blocks;
    const Passes passes(rows * (block + 1) / blocks - row, with.most_rows);
    float* packed = scratch(static_cast<size_t>(passes.rows * padded), 0);
    pack_rows(w, x, type, row, passes, packed, threads);
    for_each((tiles + step - 1) / step, threads, [&](int64_t chunk) {
      const int64_t first = chunk * step, last = std::min(tiles, first + step);
      float* sums = scratch(static_cast<size_t>((last - first) * passes.rows * kRows), 2);
      std::fill(sums, sums + (last - first) * passes.rows * kRows, 0.0f);
      alignas(64) float panel[kPanel * kRows];
      for (int64_t start = 0; start < padded; start += kPanel) {
        const int64_t count = std::min<int64_t>(kPanel, padded - start);
        for (int64_t tile = first; tile < last; ++tile) {
          with.decode(w, tile, start, count, panel);
          float* sum = sums + (tile - first) * passes.rows * kRows;
          for (int64_t p = 0; p < passes.count; ++p) {
            const int64_t at = passes.first(p);
            with.multiply(panel, packed + start * passes.rows + at * count, count, passes.size(p), sum + at * kRows);
          }
        }
      }
      for (int64_t tile = first; tile < last; ++tile)
        for (int64_t r = 0; r < passes.rows; ++r)
          to.put(w, row + r, tile, sums + ((tile - first) * passes.rows + r) * kRows);
    });
  }
}

size_t several_size(const Weight* const* weights, int count) {
  size_t size = 0;
  for (int i = 0; i < count; ++i) size += weights[i]->padded_in() * (weights[i]->bits == 3 ? 2 : 1) + weights[i]->groups;
  return size;
}

// One row of x times several weights, in one go of the threads: y[i] float32 [out of weights[i]].
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

// One decoding step of one sequence in one Llama-like decoder block, in two halves: between them the caller adds keys and values to
// its cache. Everything inside is float32.
struct Block {
  const Weight *q, *k, *v, *o, *gate, *up, *down;
  const float *q_bias, *k_bias, *v_bias, *o_bias, *q_norm, *k_norm, *input_norm, *post_norm;
  int64_t heads, kv_heads, head_dim;
  float eps, scaling;
};

void add(float* to, const float* what, int64_t count) {
  if (what) for (int64_t i = 0; i < count; ++i) to[i] += what[i];
}

void rms_norm(const float* x, const float* weight, float eps, int64_t count, float* to) {
  double squares = 0;
  for (int64_t i = 0; i < count; ++i) squares += static_cast<double>(x[i]) * x[i];
  const float factor = 1.0f / std::sqrt(static_cast<float>(squares / count) + eps);
  for (int64_t i = 0; i < count; ++i) to[i] = weight[i] * (x[i] * factor);
}

// Normalized, if the model does that, and rotated by the position: x cos + rotate_half(x) sin.
void rotate(float* heads, const float* norm, const Block& b, int64_t count, const float* cos, const float* sin) {
  const int64_t dim = b.head_dim, half = dim / 2;
  for (int64_t h = 0; h < count; ++h, heads += dim) {
    if (norm) rms_norm(heads, norm, b.eps, dim, heads);
    for (int64_t i = 0; i < half; ++i) {
      const float first = heads[i], second = heads[half + i];
      heads[i] = first * cos[i] - second * sin[i];
      heads[half + i] = second * cos[half + i] + first * sin[half + i];
    }
  }
}

void before_attention(
    const Instructions& with, const Block& b, const void* hidden, const void* cos, const void* sin, int32_t type, float* query,
    void* key, void* value, int threads) {
  const int64_t in = b.q->in, kv = b.kv_heads * b.head_dim;
  float* x = scratch(2 * in + 2 * kv + 2 * b.head_dim, 2);
  float *normed = x + in, *k = normed + in, *v = k + kv, *cosine = v + kv, *sine = cosine + b.head_dim;
  widen(hidden, type, 0, in, x);
  widen(cos, type, 0, b.head_dim, cosine);
  widen(sin, type, 0, b.head_dim, sine);
  rms_norm(x, b.input_norm, b.eps, in, normed);
  const Weight* weights[] = {b.q, b.k, b.v};
  float* y[] = {query, k, v};
  one_row_of_several(with, weights, y, 3, normed, threads);
  add(query, b.q_bias, b.q->out), add(k, b.k_bias, kv), add(v, b.v_bias, kv);
  rotate(query, b.q_norm, b, b.heads, cosine, sine);
  rotate(k, b.k_norm, b, b.kv_heads, cosine, sine);
  for (int64_t i = 0; i < kv; ++i) put_number(key, type, i, k[i]), put_number(value, type, i, v[i]);
}

void block_after(
    const Instructions& with, const Block& b, const void* hidden, const float* query, const void* keys, const void* values,
    int32_t type, int64_t count, const int64_t* strides, void* out, int threads) {
  const int64_t in = b.o->out, dim = b.head_dim, inner = (b.gate->out + kRows - 1) / kRows * kRows;
  float* x = scratch(3 * in + b.heads * (dim + count) + 2 * inner, 2);
  float *y = x + in, *normed = y + in, *attended = normed + in, *gate = attended + b.heads * dim, *up = gate + inner;
  float* scores = up + inner;
  widen(hidden, type, 0, in, x);
  const int64_t share = b.heads / b.kv_heads, bytes = size_of(type);
  for_each(b.heads, count * b.heads * dim < kWorthThreads ? 1 : threads, [&](int64_t h) {
    const char* k = static_cast<const char*>(keys) + h / share * strides[0] * bytes;
    const char* v = static_cast<const char*>(values) + h / share * strides[2] * bytes;
    with.attend(query + h * dim, k, v, type, count, strides[1], strides[3], dim, b.scaling, scores + h * count, attended + h * dim);
  });
  one_row_of_several(with, &b.o, &y, 1, attended, threads);
  add(y, b.o_bias, in);
  add(x, y, in);
  rms_norm(x, b.post_norm, b.eps, in, normed);
  const Weight* pair[] = {b.gate, b.up};
  float* pair_out[] = {gate, up};
  one_row_of_several(with, pair, pair_out, 2, normed, threads);
  std::fill(gate + b.gate->out, gate + inner, 0.0f);
  std::fill(up + b.gate->out, up + inner, 0.0f);
  with.silu_times(gate, up, inner);
  one_row_of_several(with, &b.down, &y, 1, gate, threads);
  for (int64_t i = 0; i < in; ++i) put_number(out, type, i, x[i] + y[i]);
}

uint32_t code_bits(int bits, const uint8_t* codes, const int32_t* columns, int64_t unit_start, int word) {
  const auto code = [&](int i) -> uint32_t {
    const int64_t k = unit_start + i;
    const int64_t column = columns ? columns[k] : k;
    return column < 0 ? 0u : codes[column];
  };
  uint32_t packed = 0;
  if (bits == 3 && word == 2) {
    for (int i = 0; i < 32; ++i) packed |= (code(i) >> 2 & 1u) << (8 * (i % 16 / 4) + i % 4 + 4 * (i / 16));
  } else if (bits == 3) {
    for (int i = 0; i < 16; ++i) packed |= (code(16 * word + i) & 3u) << 2 * i;
  } else {
    for (int i = 0; i < 32 / bits; ++i) packed |= code(i) << bits * i;
  }
  return packed;
}

}  // namespace
}  // namespace llmquant

using namespace llmquant;

#pragma GCC visibility push(default)
extern "C" {

// Instruction sets from best to plainest: names, and whether this processor has them. Null after the last.
const char* llmquant_instructions(int index, int* available) {
  if (index < 0 || index >= static_cast<int>(std::size(kAll))) return nullptr;
  *available = kAll[index]->available();
  return kAll[index]->name;
}

int llmquant_has_threads() { return has_threads(); }

// uint8 codes [out, in] to words [tiles][padded_in * bits / 32][16]; rows beyond `out` are zero.
void llmquant_pack(const Weight* w, const uint8_t* codes, uint32_t* words, int threads) {
  const int columns = unit(w->bits), words_of_unit = w->bits == 3 ? 3 : 1;
  for_each(w->tiles(), threads, [&](int64_t tile) {
    uint32_t* to = words + tile * w->tile_words();
    for (int64_t k = 0; k < w->padded_in(); k += columns)
      for (int word = 0; word < words_of_unit; ++word)
        for (int r = 0; r < kRows; ++r, ++to) {
          const int64_t row = tile * kRows + r;
          *to = row < w->out ? code_bits(w->bits, codes + row * w->in, w->columns, k, word) : 0;
        }
  });
}

// y [rows, out] = x [rows, in] times the weight, transposed, plus bias [out]; x, y and bias of one type.
void llmquant_linear(
    int instructions, const Weight* w, const void* x, int64_t rows, int32_t type, const void* bias, void* y, int threads) {
  const Instructions& with = *kAll[instructions];
  const Output to{y, bias, type};
  if (rows == 1) one_row(with, *w, x, type, to, threads);
  else if (rows > 1) several_rows(with, *w, x, type, rows, to, threads);
}

// Decoded weights, transposed: to[in][ld] of `type`, output rows [first, first + count) with first a multiple of 16.
void llmquant_decode(
    int instructions, const Weight* w, int64_t first, int64_t count, int32_t type, void* to, int64_t ld, int threads) {
  const Instructions& with = *kAll[instructions];
  const int64_t padded = w->padded_in(), tiles = (count + kRows - 1) / kRows;
  for_each(tiles, threads, [&](int64_t tile) {
    alignas(64) float panel[kPanel * kRows];
    const int64_t valid = std::min<int64_t>(kRows, count - tile * kRows);
    for (int64_t start = 0; start < padded; start += kPanel) {
      const int64_t columns = std::min<int64_t>(kPanel, padded - start);
      with.decode(*w, first / kRows + tile, start, columns, panel);
      for (int64_t k = 0; k < columns; ++k) {
        const int64_t column = w->columns ? w->columns[start + k] : start + k;
        if (column < 0) continue;
        for (int64_t r = 0; r < valid; ++r) put_number(to, type, column * ld + tile * kRows + r, panel[k * kRows + r]);
      }
    }
  });
}

// hidden [in] to query [heads * head_dim] in float32, key and value [kv_heads * head_dim] of `type`, rotated by cos and sin [head_dim].
void llmquant_block_before_attention(
    int instructions, const Block* b, const void* hidden, const void* cos, const void* sin, int32_t type, float* query, void* key,
    void* value, int threads) {
  before_attention(*kAll[instructions], *b, hidden, cos, sin, type, query, key, value, threads);
}

// The rest of the block: attention over `count` keys and values [kv_heads][count][head_dim] with the given strides between heads and
// between tokens, output projection, residual, MLP, residual.
void llmquant_block_after(
    int instructions, const Block* b, const void* hidden, const float* query, const void* keys, const void* values, int32_t type,
    int64_t count, const int64_t* strides, void* out, int threads) {
  block_after(*kAll[instructions], *b, hidden, query, keys, values, type, count, strides, out, threads);
}

// One step through several blocks, one behind the other: hidden [in] of `type` is read and overwritten. For each block its buffers of
// keys and values, four strides as above, and how many tokens they hold; the new one is written behind those.
void llmquant_blocks_step(
    int instructions, const Block* const* blocks, int64_t count, void* hidden, const void* cos, const void* sin, int32_t type,
    char* const* keys, char* const* values, const int64_t* strides, const int64_t* held, int threads) {
  const Instructions& with = *kAll[instructions];
  const int64_t bytes = size_of(type);
  with_team(threads, [&] {
    for (int64_t i = 0; i < count; ++i, strides += 4) {
      const Block& b = *blocks[i];
      const int64_t kv = b.kv_heads * b.head_dim;
      float* query = scratch(b.heads * b.head_dim + 2 * kv, 3);  // a number of any type fits in a float
      char *key = reinterpret_cast<char*>(query + b.heads * b.head_dim), *value = key + kv * sizeof(float);
      before_attention(with, b, hidden, cos, sin, type, query, key, value, threads);
      for (int64_t h = 0; h < b.kv_heads; ++h) {
        const int64_t from = h * b.head_dim * bytes, size = b.head_dim * bytes;
        std::memcpy(keys[i] + (h * strides[0] + held[i] * strides[1]) * bytes, key + from, size);
        std::memcpy(values[i] + (h * strides[2] + held[i] * strides[3]) * bytes, value + from, size);
      }
      block_after(with, b, hidden, query, keys[i], values[i], type, held[i] + 1, strides, hidden, threads);
    }
  });
}

}  // extern "C"
#pragma GCC visibility pop
