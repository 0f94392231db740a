// Choosing codes: the search for a group's scale and zero-point (llmquant/algorithms/grid.py) and the columns of a block of GPTQ
// (llmquant/algorithms/gptq.py). Both give, bit for bit, what the torch code of those files gives in float32, whatever the instruction
// set and the number of threads: the files that hold the arithmetic are compiled with -ffp-contract=off.
#pragma once
#include <cstdint>

namespace llmquant {

// The groups of a weight and the candidates to try for each.
struct Fit {
  const float* weight;     // [rows][groups][width]
  const float* cost;       // [groups][width], or null for equal ones
  const float* factors;    // scale = portable(reach * factor); symmetric: min-max, then `steps` ranges; else max(steps, 1) ranges
  const float* fractions;  // asymmetric: zero = round(-low * fraction / scale)
  float* scales;           // [rows][groups]
  uint8_t* zeros;          // [rows][groups]
  int64_t rows, groups, width;
  int32_t max_code, symmetric, steps;

  // Floats of scratch that a thread needs: a group in two halves, its cost, the errors of three candidates, and a vector read past them.
  int64_t scratch() const { return 7 * padded_half() + 16; }
  int64_t padded_half() const { return (width / 2 + 16) / 16 * 16; }
};

constexpr int64_t kStripe = 64;  // output channels that pass through a block of GPTQ together

// Columns [first, last) of a block of GPTQ, and what their errors do to columns [last, stop) of it. One column is one contiguous row.
struct Visit {
  float* weight;            // [in][out]; columns [last, stop) are updated
  float* codes;             // [in][out]
  float* errors;            // [block][out]
  const float* upper;       // [block][block]: U of this block, transposed
  const float* scales;      // [groups][out]
  const float* zeros;       // [groups][out]
  const int64_t* group_of;  // [in]
  int64_t out, start, first, last, stop;
  int32_t max_code;
};

// What one instruction set offers.
struct Rounding {
  void (*fit)(const Fit&, int64_t first_row, int64_t last_row, float* scratch);
  void (*visit)(const Visit&, int64_t stripe, float* scratch);  // scratch: [last - first][kStripe]
};

}  // namespace llmquant
