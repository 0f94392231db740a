// One Llama-like decoder block in two halves: between them the caller adds keys and values to its cache. Everything inside is
// float32. block.cpp steps one token of one sequence, prompt.cpp does many rows at once.
#pragma once
#include <cstdint>

#include "packed.h"

namespace llmquant {

struct Block {
  const Weight *q, *k, *v, *o, *gate, *up, *down;
  const float *q_bias, *k_bias, *v_bias, *o_bias, *q_norm, *k_norm, *input_norm, *post_norm;
  int64_t heads, kv_heads, head_dim;
  float eps, scaling;
};

// hidden [in] to query [heads * head_dim] in float32, key and value [kv_heads * head_dim] of `type`, rotated by cos and sin [head_dim].
void before_attention(
    const Instructions&, const Block&, const void* hidden, const void* cos, const void* sin, int32_t type, float* query, void* key,
    void* value, int threads);

// The rest: attention over `count` keys and values [kv_heads][count][head_dim] with the given strides between heads and between tokens,
// output projection, residual, MLP, residual.
void block_after(
    const Instructions&, const Block&, const void* hidden, const float* query, const void* keys, const void* values, int32_t type,
    int64_t count, const int64_t* strides, void* out, int threads);

// Several sequences of as many tokens: rows of hidden, in order.
struct Prompt {
  int64_t sequences, tokens;
  int32_t type;
  int64_t rows() const { return sequences * tokens; }
};

// Keys and values [sequences][kv_heads][count][head_dim] with the strides between sequences, heads and tokens of either. A query sees
// what the mask [sequences][tokens][count] has not 0 for; without one, the keys of its own position and of those before: the last
// query's is the last.
struct Seen {
  const void *keys, *values;
  int64_t count;
  int64_t strides[6];
  const uint8_t* mask;
  int64_t mask_strides[2];  // between sequences, between tokens
};

// As before_attention for all rows: query [rows][heads * head_dim] in float32, key and value [sequences][kv_heads][tokens][head_dim] of
// the type; cos and sin [tokens][head_dim], `angles` numbers apart between sequences.
void prompt_before(
    const Instructions&, const Block&, const Prompt&, const void* hidden, const void* cos, const void* sin, int64_t angles,
    float* query, void* key, void* value, int threads);

// The rest, for all rows; overwrites the query.
void prompt_after(
    const Instructions&, const Block&, const Prompt&, const void* hidden, float* query, const Seen&, void* out, int threads);

// attention.cpp: what the queries see, in their place.
void attend_all(const Instructions&, const Block&, const Prompt&, float* query, const Seen&, int threads);

}  // namespace llmquant
