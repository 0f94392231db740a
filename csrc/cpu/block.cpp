#include "block.h"

#include <algorithm>

#include "numbers.h"
#include "products.h"
#include "threads.h"

namespace llmquant {
namespace {

void add(float* to, const float* what, int64_t count) {
  if (what) for (int64_t i = 0; i < count; ++i) to[i] += what[i];
}

// Normalized, if the model does that, and rotated by the position.
void rotate(const Instructions& with, float* heads, const float* norm, const Block& b, int64_t count, const float* cos, const float* sin) {
  for (int64_t h = 0; h < count; ++h, heads += b.head_dim) {
    if (norm) with.rms_norm(heads, norm, b.eps, b.head_dim, heads);
    with.rotate(heads, cos, sin, b.head_dim);
  }
}

}  // namespace

void before_attention(
    const Instructions& with, const Block& b, const void* hidden, const void* cos, const void* sin, int32_t type, float* query,
    void* key, void* value, int threads) {
  const int64_t in = b.q->in, kv = b.kv_heads * b.head_dim;
  float* x = scratch(2 * in + 2 * kv + 2 * b.head_dim, 2);
  float *normed = x + in, *k = normed + in, *v = k + kv, *cosine = v + kv, *sine = cosine + b.head_dim;
  widen(hidden, type, 0, in, x);
  widen(cos, type, 0, b.head_dim, cosine);
  widen(sin, type, 0, b.head_dim, sine);
  with.rms_norm(x, b.input_norm, b.eps, in, normed);
  const Weight* weights[] = {b.q, b.k, b.v};
  float* y[] = {query, k, v};
  one_row_of_several(with, weights, y, 3, normed, threads);
  add(query, b.q_bias, b.q->out), add(k, b.k_bias, kv), add(v, b.v_bias, kv);
  rotate(with, query, b.q_norm, b, b.heads, cosine, sine);
  rotate(with, k, b.k_norm, b, b.kv_heads, cosine, sine);
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
    with.attend(query + h * dim, k, v, type, count, strides[1], strides[3], dim, b.scaling, nullptr, scores + h * count, attended + h * dim);
  });
  one_row_of_several(with, &b.o, &y, 1, attended, threads);
  add(y, b.o_bias, in);
  add(x, y, in);
  with.rms_norm(x, b.post_norm, b.eps, in, normed);
  const Weight* pair[] = {b.gate, b.up};
  float* pair_out[] = {gate, up};
  one_row_of_several(with, pair, pair_out, 2, normed, threads);
  std::fill(gate + b.gate->out, gate + inner, 0.0f);
  std::fill(up + b.gate->out, up + inner, 0.0f);
  with.silu_times(gate, up, inner);
  one_row_of_several(with, &b.down, &y, 1, gate, threads);
  for (int64_t i = 0; i < in; ++i) put_number(out, type, i, x[i] + y[i]);
}

}  // namespace llmquant
