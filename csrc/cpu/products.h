// Products with packed weights, for one row and for several: what api.cpp and the blocks call.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "packed.h"

namespace llmquant {

constexpr int64_t kBlock = 264;               // rows of x at a time: with a panel's columns 264 KiB, for the second-level cache
constexpr int64_t kWorthThreads = 32 * 1024;  // multiply-adds below which a team costs more than it saves

// Memory that a thread keeps for its next call.
float* scratch(size_t floats, int slot);

// y = x [1, in] or [rows, in] times the weight, transposed, plus bias; x, y and bias (or null) of one type.
void product(const Instructions&, const Weight&, const void* x, int64_t rows, int32_t type, const void* bias, void* y, int threads);

// One row of x times several weights, in one go of the threads: y[i] float32 [out of weights[i]].
void one_row_of_several(
    const Instructions&, const Weight* const* weights, float* const* y, int count, const float* x, int threads);

// Up to kBlock rows of x, `stride` floats apart, times several weights: y[i] float32, rows `strides[i]` apart.
void rows_of_several(
    const Instructions&, const Weight* const* weights, float* const* y, const int64_t* strides, int count, const float* x,
    int64_t stride, int64_t rows, int threads);

// How `rows` rows are cut into passes of at most `most` rows, as equal as they get.
struct Passes {
  int64_t rows, count, base, longer;
  Passes(int64_t n, int most) : rows(n), count((n + most - 1) / most), base(n / count), longer(n % count) {}
  int64_t first(int64_t i) const { return i * base + std::min(i, longer); }
  int size(int64_t i) const { return static_cast<int>(base + (i < longer)); }
};

// to[count][rows]: a pass of rows, `stride` floats apart, as `multiply` reads it.
void interleave(const float* rows_from, int64_t stride, int rows, int64_t count, float* to);

}  // namespace llmquant
