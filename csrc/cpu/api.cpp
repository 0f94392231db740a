// What Python calls, through ctypes: plain C, no torch, no Python. Shapes and alignment were checked before.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "block.h"
#include "numbers.h"
#include "packed.h"
#include "products.h"
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
  product(*kAll[instructions], *w, x, rows, type, bias, y, threads);
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

// As llmquant_block_before_attention for `sequences` of `tokens` each; see block.h.
void llmquant_prompt_before(
    int instructions, const Block* b, int64_t sequences, int64_t tokens, int32_t type, const void* hidden, const void* cos,
    const void* sin, int64_t angles, float* query, void* key, void* value, int threads) {
  prompt_before(*kAll[instructions], *b, {sequences, tokens, type}, hidden, cos, sin, angles, query, key, value, threads);
}

void llmquant_prompt_after(
    int instructions, const Block* b, int64_t sequences, int64_t tokens, int32_t type, const void* hidden, float* query,
    const Seen* seen, void* out, int threads) {
  prompt_after(*kAll[instructions], *b, {sequences, tokens, type}, hidden, query, *seen, out, threads);
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
