// What a decoder block does between its linears, for vectors of LANES floats as linear.inc.h has them; included behind it.
#pragma once

namespace llmquant {
namespace INSTRUCTIONS {

// e^x within 2 units in the last place: 2^n times a polynomial in the rest (Cephes expf); 0 below -87.
static inline ALWAYS vf exp_of(vf x) {
  const vf low = all(-87.0f), high = all(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const vf shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the integer is in the low bits
  const vf n = shifted - 12582912.0f;
  const vf r = x - n * 0.693359375f - n * -2.12194440e-4f;
  vf p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const vf power = reinterpret_cast<vf>((__builtin_convertvector(n, vi) + 127) << 23);
  return (p * r * r + r + 1.0f) * power;
}

static void silu_times(float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) {
    const vf g = load(gate + i);
    store(gate + i, g / (exp_of(-g) + 1.0f) * load(up + i));
  }
}

static inline ALWAYS float sum_of(vf v) {
  float lanes[LANES], total = 0;
  store(lanes, v);
  for (float lane : lanes) total += lane;
  return total;
}

static void rms_norm(const float* x, const float* weight, float eps, int64_t count, float* to) {
  constexpr int kSums = 4;
  vf sum[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * LANES <= count; i += kSums * LANES)
    for (int j = 0; j < kSums; ++j) {
      const vf v = load(x + i + j * LANES);
      sum[j] += v * v;
    }
  double squares = static_cast<double>(sum_of(sum[0] + sum[1])) + sum_of(sum[2] + sum[3]);
  for (; i < count; ++i) squares += static_cast<double>(x[i]) * x[i];
  const float factor = 1.0f / __builtin_sqrtf(static_cast<float>(squares / static_cast<double>(count)) + eps);
  for (i = 0; i + LANES <= count; i += LANES) store(to + i, load(weight + i) * (load(x + i) * factor));
  for (; i < count; ++i) to[i] = weight[i] * (x[i] * factor);
}

static void rotate(float* head, const float* cos, const float* sin, int64_t dim) {
  const int64_t half = dim / 2;
  int64_t i = 0;
  for (; i + LANES <= half; i += LANES) {
    const vf first = load(head + i), second = load(head + half + i);
    store(head + i, first * load(cos + i) - second * load(sin + i));
    store(head + half + i, second * load(cos + half + i) + first * load(sin + half + i));
  }
  for (; i < half; ++i) {
    const float first = head[i], second = head[half + i];
    head[i] = first * cos[i] - second * sin[i];
    head[half + i] = second * cos[half + i] + first * sin[half + i];
  }
}

// Below every score: the maximum of a row of which nothing may be seen, so that no infinity is taken from another.
constexpr float kLeast = -1e30f;

template <int TYPE>
static inline ALWAYS vf number(const void* p, int64_t i) {
  if constexpr (TYPE == kFloat32) return load(static_cast<const float*>(p) + i);
  if constexpr (TYPE == kBFloat16) return widen_bf16(static_cast<const uint16_t*>(p) + i);
  return widen_fp16(static_cast<const uint16_t*>(p) + i);
}

template <int TYPE>
static void attend_of(const float* query, const void* keys, const void* values, int64_t count, int64_t key_stride,
                      int64_t value_stride, int64_t dim, float scaling, const uint8_t* mask, float* scores, float* out) {
  // Several tokens side by side, then several vectors of the output: a sum of its own for each, so that none waits for another.
  constexpr int kTokens = 4, kParts = 4;
  float most = kLeast;
  for (int64_t t = 0; t < count;) {
    const int tokens = count - t < kTokens ? 1 : kTokens;
    vf sum[kTokens] = {};
    for (int64_t i = 0; i < dim; i += LANES) {
      const vf q = load(query + i);
      if (tokens == 1) sum[0] += q * number<TYPE>(keys, t * key_stride + i);
      else for (int j = 0; j < kTokens; ++j) sum[j] += q * number<TYPE>(keys, (t + j) * key_stride + i);
    }
    for (int j = 0; j < tokens; ++j, ++t) {
      scores[t] = mask && !mask[t] ? -__builtin_inff() : sum_of(sum[j]) * scaling;
      most = scores[t] > most ? scores[t] : most;
    }
  }
  float total = 0;
  for (int64_t t = 0; t < count; t += LANES) {
    float lanes[LANES];
    for (int i = 0; i < LANES; ++i) lanes[i] = t + i < count ? scores[t + i] - most : -__builtin_inff();
    store(lanes, exp_of(load(lanes)));
    for (int i = 0; i < LANES && t + i < count; ++i) total += scores[t + i] = lanes[i];
  }
  int64_t i = 0;
  for (; i + kParts * LANES <= dim; i += kParts * LANES) {
    vf sum[kParts] = {};
    for (int64_t t = 0; t < count; ++t)
      for (int j = 0; j < kParts; ++j) sum[j] += number<TYPE>(values, t * value_stride + i + j * LANES) * scores[t];
    for (int j = 0; j < kParts; ++j) store(out + i + j * LANES, sum[j] / total);
  }
  for (; i < dim; i += LANES) {
    vf sum = {};
    for (int64_t t = 0; t < count; ++t) sum += number<TYPE>(values, t * value_stride + i) * scores[t];
    store(out + i, sum / total);
  }
}

static void attend(const float* query, const void* keys, const void* values, int32_t type, int64_t count, int64_t key_stride,
                   int64_t value_stride, int64_t dim, float scaling, const uint8_t* mask, float* scores, float* out) {
  const auto with = type == kFloat32 ? attend_of<kFloat32> : type == kBFloat16 ? attend_of<kBFloat16> : attend_of<kFloat16>;
  with(query, keys, values, count, key_stride, value_stride, dim, scaling, mask, scores, out);
}

static void softmax_columns(float* scores, int64_t first, int64_t last, int64_t diagonal, const uint8_t* mask, float* sums) {
  constexpr int kSums = 4;
  float number_of[kRows];
  for (int i = 0; i < kRows; ++i) number_of[i] = static_cast<float>(i);
  const vf hidden = all(-__builtin_inff());
  for (int v = 0; v < kVectors; ++v) {
    const vf lane = load(number_of + v * LANES);
    vf most = all(kLeast);
    for (int64_t t = first; t < last; ++t) {
      float* at = scores + t * kRows + v * LANES;
      vf score = load(at);
      if (mask) {
        const vu seen = __builtin_convertvector(*reinterpret_cast<const vb_at*>(mask + t * kRows + v * LANES), vu);
        store(at, score = seen != 0 ? score : hidden);
      } else if (t > diagonal) {
        store(at, score = lane < all(static_cast<float>(t - diagonal)) ? hidden : score);
      }
      most = most < score ? score : most;
    }
    vf total[kSums] = {};
    int64_t t = first;
    for (; t + kSums <= last; t += kSums)
      for (int j = 0; j < kSums; ++j) {
        float* at = scores + (t + j) * kRows + v * LANES;
        const vf power = exp_of(load(at) - most);
        store(at, power);
        total[j] += power;
      }
    for (; t < last; ++t) {
      float* at = scores + t * kRows + v * LANES;
      const vf power = exp_of(load(at) - most);
      store(at, power);
      total[0] += power;
    }
    store(sums + v * LANES, (total[0] + total[1]) + (total[2] + total[3]));
  }
}

}  // namespace INSTRUCTIONS
}  // namespace llmquant
