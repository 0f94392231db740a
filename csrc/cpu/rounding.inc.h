// The arithmetic of rounding.h for vectors of LANES floats. No function here may be one that another file also defines: the linker would
// keep one of the two, perhaps the one whose instructions the processor lacks.
#include <cstring>

#include "rounding.h"

#if defined(__FMA__)
#include <immintrin.h>
#endif

#ifndef LANES
#error "define LANES"
#endif

namespace llmquant {
namespace INSTRUCTIONS {
namespace {

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef float vf_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline vf load(const float* p) { return *reinterpret_cast<const vf_at*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf_at*>(p) = v; }
inline vf all(float value) { return value - vf{}; }
inline vf least(vf a, vf b) { return a < b ? a : b; }
inline vf most(vf a, vf b) { return a > b ? a : b; }
inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// To the nearest integer, ties to even, for magnitudes below 2^22: where a float of 2^23 has no room for fractions.
constexpr float kNoFractions = 0x1.8p23f;
template <typename T>
inline T nearest(T x) { return (x + kNoFractions) - kNoFractions; }

inline float clamped(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// weight.py's eight_bits() of a number >= 0 inside fp16's normal range, where the caller has moved every group.
inline float portable(float scale) {
  const float inside = clamped(scale, 0x1p-14f, 65280.0f);
  uint32_t bits;
  std::memcpy(&bits, &inside, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  float rounded;
  std::memcpy(&rounded, &bits, 4);
  return clamped(rounded, 0x1p-14f, 65280.0f);
}

// The sum of n numbers as grid.py folds them: the second half onto the first until one is left; of an odd number the middle one stays.
inline float folded(float* numbers, int64_t n) {
  while (n > LANES) {
    if (n & 1) numbers[n++] = 0.0f;
    n /= 2;
    // The last vector may also change what lies behind the half, which nothing reads any more.
    for (int64_t i = 0; i < n; i += LANES) store(numbers + i, load(numbers + i) + load(numbers + n + i));
  }
  if (n == LANES) {
    float v[LANES];
    store(v, load(numbers));
    for (int half = LANES / 2; half; half /= 2)
      for (int i = 0; i < half; ++i) v[i] += v[i + half];
    return v[0];
  }
  for (; n > 1; n -= n / 2)
    for (int64_t i = 0; i < n / 2; ++i) numbers[i] += numbers[n - n / 2 + i];
  return numbers[0];
}

// A group as its two halves, each padded with zeros to whole vectors; the costs likewise.
struct Group {
  const float *low, *high, *low_cost, *high_cost;
  int64_t half;
};

struct Candidates {
  float scale;
  float low[3], high[3];  // the codes of each, less its zero-point
};

// Squared errors of COUNT candidates that share a magnitude of scale, and so the division.
template <int COUNT, bool COST>
inline void errors(const Group& group, const Candidates& of, float* buffer, int64_t stride, float* sums) {
  float low = of.low[0], high = of.high[0];
  for (int c = 1; c < COUNT; ++c) {
    low = of.low[c] < low ? of.low[c] : low;
    high = of.high[c] > high ? of.high[c] : high;
  }
  const auto one_half = [&](const float* weight, const float* cost, int64_t i, vf* error) {
    const vf w = load(weight + i);
    // Bounds are integers, so clamping before rounding is clamping after it.
    const vf code = nearest(least(most(w / of.scale, all(low)), all(high)));
    for (int c = 0; c < COUNT; ++c) {
      const vf own = COUNT == 1 ? code : least(most(code, all(of.low[c])), all(of.high[c]));
      const vf delta = own * of.scale - w;
      error[c] = COST ? delta * delta * load(cost + i) : delta * delta;
    }
  };
  for (int64_t i = 0; i < group.half; i += LANES) {
    vf first[COUNT], second[COUNT];
    one_half(group.low, group.low_cost, i, first);
    one_half(group.high, group.high_cost, i, second);
    for (int c = 0; c < COUNT; ++c) store(buffer + c * stride + i, first[c] + second[c]);
  }
  for (int c = 0; c < COUNT; ++c) sums[c] = folded(buffer + c * stride, group.half);
}

template <bool COST>
struct Search {
  const Fit& fit;
  Group group;
  float* buffer;

  template <int COUNT>
  void measure(const Candidates& of, float* sums) const { errors<COUNT, COST>(group, of, buffer, fit.padded_half(), sums); }

  void symmetric(float reach, float* scale, uint8_t* zero) const {
    const float middle = static_cast<float>((fit.max_code + 1) / 2);
    // Under the negative scale the codes are the mirrored ones, and so is the weight over the scale: the error is the same to the bit.
    Candidates of{portable(reach * fit.factors[0]), {-middle, 1.0f - middle}, {middle - 1.0f, middle}};
    *scale = of.scale;
    *zero = static_cast<uint8_t>(middle);
    if (!fit.steps) return;
    float best, error[2], tried = 0.0f;
    measure<1>(of, &best);
    for (int step = 1; step <= fit.steps; ++step) {
      of.scale = portable(reach * fit.factors[step]);
      if (of.scale == tried) continue;
      tried = of.scale;
      measure<2>(of, error);
      for (int c = 0; c < 2; ++c) {
        if (!(error[c] < best)) continue;
        best = error[c];
        *scale = c ? -of.scale : of.scale;
      }
    }
  }

  void asymmetric(float low, float high, float* scale, uint8_t* zero) const {
    const float max_code = static_cast<float>(fit.max_code), span = high - low;
    float best = 0.0f, error[3];
    for (int step = 0; step < (fit.steps ? fit.steps : 1); ++step) {
      Candidates of;
      of.scale = portable(span * fit.factors[step]);
      const float middle = nearest(clamped(-low * fit.fractions[step] / of.scale, 0.0f, max_code));
      const float zeros[3] = {middle, clamped(middle + 1.0f, 0.0f, max_code), clamped(middle - 1.0f, 0.0f, max_code)};
      if (step == 0) {
        *scale = of.scale;
        *zero = static_cast<uint8_t>(middle);
        if (!fit.steps) return;
      }
      for (int c = 0; c < 3; ++c) {
        of.low[c] = -zeros[c];
        of.high[c] = max_code - zeros[c];
      }
      measure<3>(of, error);
      if (step == 0) best = error[0];
      for (int c = 0; c < 3; ++c) {
        if (!(error[c] < best)) continue;
        best = error[c];
        *scale = of.scale;
        *zero = static_cast<uint8_t>(zeros[c]);
      }
    }
  }
};

// Both halves of `numbers` where whole vectors may be read: in place, or in `copy`, which has room for two padded halves.
inline void halves(const float* numbers, int64_t width, int64_t padded, float* copy, const float** low, const float** high) {
  const int64_t half = (width + 1) / 2;
  *low = numbers;
  *high = numbers + half;
  if (width % (2 * LANES) == 0) return;
  std::memset(copy, 0, 8 * padded);
  std::memcpy(copy, numbers, 4 * half);
  std::memcpy(copy + padded, numbers + half, 4 * (width - half));
  *low = copy;
  *high = copy + padded;
}

template <bool COST>
inline void fit_rows(const Fit& fit, int64_t first, int64_t last, float* scratch) {
  const int64_t padded = fit.padded_half();
  Search<COST> search{fit, {nullptr, nullptr, nullptr, nullptr, (fit.width + 1) / 2}, scratch + 4 * padded};
  for (int64_t row = first; row < last; ++row) {
    for (int64_t g = 0; g < fit.groups; ++g) {
      const int64_t at = row * fit.groups + g;
      const float* weight = fit.weight + at * fit.width;
      halves(weight, fit.width, padded, scratch, &search.group.low, &search.group.high);
      if (COST) {
        halves(fit.cost + g * fit.width, fit.width, padded, scratch + 2 * padded, &search.group.low_cost, &search.group.high_cost);
      }
      vf lows{}, highs{};
      for (int64_t i = 0; i < search.group.half; i += LANES) {
        const vf a = load(search.group.low + i), b = load(search.group.high + i);
        lows = least(lows, least(a, b));
        highs = most(highs, most(a, b));
      }
      float low = 0.0f, high = 0.0f;
      for (int i = 0; i < LANES; ++i) {
        low = lows[i] < low ? lows[i] : low;
        high = highs[i] > high ? highs[i] : high;
      }
      if (fit.symmetric) search.symmetric(high > -low ? high : -low, fit.scales + at, fit.zeros + at);
      else search.asymmetric(low, high, fit.scales + at, fit.zeros + at);
    }
  }
}

void fit(const Fit& fit, int64_t first, int64_t last, float* scratch) {
  if (fit.cost) fit_rows<true>(fit, first, last, scratch);
  else fit_rows<false>(fit, first, last, scratch);
}

// from - factor * by, rounded once, as torch's addr_ does on a processor with fused multiply-add.
inline vf without(vf from, float factor, vf by) {
#if defined(__FMA__) && LANES == 16
  return reinterpret_cast<vf>(_mm512_fnmadd_ps(_mm512_set1_ps(factor), reinterpret_cast<__m512>(by), reinterpret_cast<__m512>(from)));
#elif defined(__FMA__) && LANES == 8
  return reinterpret_cast<vf>(_mm256_fnmadd_ps(_mm256_set1_ps(factor), reinterpret_cast<__m256>(by), reinterpret_cast<__m256>(from)));
#else
  vf result;
  for (int i = 0; i < LANES; ++i) result[i] = __builtin_fmaf(-factor, by[i], from[i]);
  return result;
#endif
}

// kStripe numbers from `from`, of which `count` are there; the others are `otherwise`. `room` takes an incomplete stripe.
inline const float* stripe_of(const float* from, int64_t count, float otherwise, float* room) {
  if (count == kStripe) return from;
  for (int64_t i = 0; i < kStripe; ++i) room[i] = i < count ? from[i] : otherwise;
  return room;
}

inline void put_stripe(const vf* values, int64_t count, float* to) {
  if (count == kStripe) {
    for (int v = 0; v < kStripe / LANES; ++v) store(to + v * LANES, values[v]);
    return;
  }
  float room[kStripe];
  for (int v = 0; v < kStripe / LANES; ++v) store(room + v * LANES, values[v]);
  std::memcpy(to, room, 4 * count);
}

void visit(const Visit& at, int64_t stripe, float* errors) {
  constexpr int vectors = kStripe / LANES;
  const int64_t out = at.out, from = stripe * kStripe, count = lesser(kStripe, out - from), block = at.stop - at.start;
  const float max_code = static_cast<float>(at.max_code);
  float rooms[3][kStripe];
  for (int64_t column = at.first; column < at.stop; ++column) {
    float* weight = at.weight + column * out + from;
    const float* now = stripe_of(weight, count, 0.0f, rooms[0]);
    const float* upper = at.upper + (column - at.start) * block + (at.first - at.start);
    vf w[vectors];
    for (int v = 0; v < vectors; ++v) w[v] = load(now + v * LANES);
    const int64_t before = lesser(column, at.last) - at.first;
    for (int64_t i = 0; i < before; ++i)
      for (int v = 0; v < vectors; ++v) w[v] = without(w[v], upper[i], load(errors + i * kStripe + v * LANES));
    if (column >= at.last) {
      put_stripe(w, count, weight);
      continue;
    }
    const int64_t group = at.group_of[column] * out + from;
    const float* scales = stripe_of(at.scales + group, count, 1.0f, rooms[1]);
    const float* zeros = stripe_of(at.zeros + group, count, 0.0f, rooms[2]);
    vf codes[vectors], error[vectors];
    for (int v = 0; v < vectors; ++v) {
      const vf scale = load(scales + v * LANES), zero = load(zeros + v * LANES);
      const vf code = nearest(least(most(w[v] / scale, -zero), max_code - zero));
      codes[v] = code + zero;
      error[v] = (w[v] - code * scale) / upper[before];
      store(errors + before * kStripe + v * LANES, error[v]);
    }
    put_stripe(codes, count, at.codes + column * out + from);
    put_stripe(error, count, at.errors + (column - at.start) * out + from);
  }
}

}  // namespace
}  // namespace INSTRUCTIONS
}  // namespace llmquant
