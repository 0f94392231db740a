// float32, bfloat16 and float16 as they come in and go out: widened exactly, rounded once to nearest even.
#pragma once
#include <cstdint>
#include <cstring>

#include "packed.h"

namespace llmquant {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float widen_bf16(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

inline float widen_fp16(uint16_t h) {
  const uint32_t exponent = h >> 10 & 31;
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  if (exponent == 31) return float_of(sign | 0x7f800000u | static_cast<uint32_t>(h & 0x3ff) << 13);
  return float_of(sign | bits_of(float_of(static_cast<uint32_t>(h & 0x7fff) << 13) * 0x1p112f));
}

inline uint16_t round_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t round_fp16(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000u) {  // a subnormal half: adding 1/2 leaves it, rounded, in the low bits
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  }
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

inline float number_at(const void* data, int32_t type, int64_t index) {
  if (type == kFloat32) return static_cast<const float*>(data)[index];
  const uint16_t half = static_cast<const uint16_t*>(data)[index];
  return type == kBFloat16 ? widen_bf16(half) : widen_fp16(half);
}

inline void put_number(void* data, int32_t type, int64_t index, float value) {
  if (type == kFloat32) static_cast<float*>(data)[index] = value;
  else static_cast<uint16_t*>(data)[index] = type == kBFloat16 ? round_bf16(value) : round_fp16(value);
}

inline int64_t size_of(int32_t type) { return type == kFloat32 ? 4 : 2; }

// Consecutive numbers as floats.
inline void widen(const void* from, int32_t type, int64_t first, int64_t count, float* to) {
  if (type == kFloat32) std::memcpy(to, static_cast<const float*>(from) + first, 4 * count);
  else for (int64_t i = 0; i < count; ++i) to[i] = number_at(from, type, first + i);
}

}  // namespace llmquant
