#include <algorithm>
#include <memory>

#include "block.h"
#include "numbers.h"
#include "products.h"
#include "threads.h"

namespace llmquant {
namespace {

constexpr int64_t kRowsAtATime = 16;  // of what is done row by row

int64_t to_whole_tiles(int64_t count) { return (count + kRows - 1) / kRows * kRows; }

// Numbers that nothing has been put into.
std::unique_ptr<float[]> numbers(int64_t count) { return std::unique_ptr<float[]>(new float[static_cast<size_t>(count)]); }

void each_row(int64_t rows, int threads, const std::function<void(int64_t)>& work) {
  const int64_t chunks = (rows + kRowsAtATime - 1) / kRowsAtATime;
  for_each(chunks, threads, [&](int64_t chunk) {
    for (int64_t r = chunk * kRowsAtATime; r < std::min(rows, (chunk + 1) * kRowsAtATime); ++r) work(r);
  });
}

// work(first row, number of rows), as equal parts of at most kBlock as they get.
template <class Work>
void each_block(int64_t rows, const Work& work) {
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  for (int64_t i = 0; i < blocks; ++i) work(rows * i / blocks, rows * (i + 1) / blocks - rows * i / blocks);
}

void add(float* to, const float* what, int64_t count) {
  if (what) for (int64_t i = 0; i < count; ++i) to[i] += what[i];
}

void narrow(const float* from, int32_t type, int64_t count, void* to, int64_t first) {
  if (type == kFloat32) std::copy(from, from + count, static_cast<float*>(to) + first);
  else for (int64_t i = 0; i < count; ++i) put_number(to, type, first + i, from[i]);
}

struct Before {
  const Instructions& with;
  const Block& b;
  const Prompt& p;
  const void *cos, *sin;
  int64_t angles;
  void *key, *value;

  void turn(float* heads, const float* norm, int64_t count, const float* cosine, const float* sine) const {
    for (int64_t h = 0; h < count; ++h, heads += b.head_dim) {
      if (norm) with.rms_norm(heads, norm, b.eps, b.head_dim, heads);
      with.rotate(heads, cosine, sine, b.head_dim);
    }
  }

  // Biases, norms and rotation of a row; its key and value go where they belong.
  void finish(int64_t row, float* query, float* k, float* v, float* cosine) const {
    const int64_t dim = b.head_dim, kv = b.kv_heads * dim, sequence = row / p.tokens, token = row % p.tokens;
    float* sine = cosine + dim;
    widen(cos, p.type, sequence * angles + token * dim, dim, cosine);
    widen(sin, p.type, sequence * angles + token * dim, dim, sine);
    add(query, b.q_bias, b.heads * dim), add(k, b.k_bias, kv), add(v, b.v_bias, kv);
    turn(query, b.q_norm, b.heads, cosine, sine);
    turn(k, b.k_norm, b.kv_heads, cosine, sine);
    for (int64_t h = 0; h < b.kv_heads; ++h) {
      const int64_t to = ((sequence * b.kv_heads + h) * p.tokens + token) * dim;
      narrow(k + h * dim, p.type, dim, key, to);
      narrow(v + h * dim, p.type, dim, value, to);
    }
  }
};

}  // namespace

void prompt_before(
    const Instructions& with, const Block& b, const Prompt& p, const void* hidden, const void* cos, const void* sin, int64_t angles,
    float* query, void* key, void* value, int threads) {
  const int64_t in = b.q->in, kv = b.kv_heads * b.head_dim, wide = b.heads * b.head_dim, most = std::min(p.rows(), kBlock);
  const auto memory = numbers(most * (in + 2 * kv));
  float *normed = memory.get(), *keys = normed + most * in, *values = keys + most * kv;
  const Before before{with, b, p, cos, sin, angles, key, value};
  each_block(p.rows(), [&](int64_t first, int64_t rows) {
    each_row(rows, threads, [&](int64_t r) {
      float* row = normed + r * in;
      widen(hidden, p.type, (first + r) * in, in, row);
      with.rms_norm(row, b.input_norm, b.eps, in, row);
    });
    const Weight* weights[] = {b.q, b.k, b.v};
    float* y[] = {query + first * wide, keys, values};
    const int64_t strides[] = {wide, kv, kv};
    rows_of_several(with, weights, y, strides, 3, normed, in, rows, threads);
    each_row(rows, threads, [&](int64_t r) {
      before.finish(first + r, query + (first + r) * wide, keys + r * kv, values + r * kv, scratch(2 * b.head_dim, 3));
    });
  });
}

void prompt_after(
    const Instructions& with, const Block& b, const Prompt& p, const void* hidden, float* query, const Seen& seen, void* out,
    int threads) {
  attend_all(with, b, p, query, seen, threads);
  const int64_t in = b.o->out, wide = b.heads * b.head_dim, inner = to_whole_tiles(b.gate->out), most = std::min(p.rows(), kBlock);
  const auto memory = numbers(most * (3 * in + 2 * inner));
  float *x = memory.get(), *y = x + most * in, *normed = y + most * in, *gate = normed + most * in, *up = gate + most * inner;
  if (inner != b.gate->out) std::fill(gate, gate + 2 * most * inner, 0.0f);
  each_block(p.rows(), [&](int64_t first, int64_t rows) {
    rows_of_several(with, &b.o, &y, &in, 1, query + first * wide, wide, rows, threads);
    each_row(rows, threads, [&](int64_t r) {
      float* row = x + r * in;
      widen(hidden, p.type, (first + r) * in, in, row);
      add(y + r * in, b.o_bias, in);
      add(row, y + r * in, in);
      with.rms_norm(row, b.post_norm, b.eps, in, normed + r * in);
    });
    const Weight* pair[] = {b.gate, b.up};
    float* pair_out[] = {gate, up};
    const int64_t strides[] = {inner, inner};
    rows_of_several(with, pair, pair_out, strides, 2, normed, in, rows, threads);
    each_row(rows, threads, [&](int64_t r) { with.silu_times(gate + r * inner, up + r * inner, inner); });
    rows_of_several(with, &b.down, &y, &in, 1, gate, inner, rows, threads);
    each_row(rows, threads, [&](int64_t r) {
      add(y + r * in, x + r * in, in);
      narrow(y + r * in, p.type, in, out, (first + r) * in);
    });
  });
}

}  // namespace llmquant
