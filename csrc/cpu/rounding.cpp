// What Python calls to choose codes, through ctypes. Instruction sets have the numbers of `llmquant_instructions`.
#include "rounding.h"

#include <algorithm>
#include <vector>

#include "threads.h"

namespace llmquant {

extern const Rounding kRounding_generic;
#if defined(__x86_64__)
extern const Rounding kRounding_avx2, kRounding_avx512;
static const Rounding* const kAll[] = {&kRounding_avx512, &kRounding_avx2, &kRounding_generic};
#else
static const Rounding* const kAll[] = {&kRounding_generic};
#endif

static float* scratch(int64_t floats) {
  thread_local std::vector<float> kept;
  if (static_cast<int64_t>(kept.size()) < floats) kept = std::vector<float>(floats);
  return kept.data();
}

}  // namespace llmquant

using namespace llmquant;

#pragma GCC visibility push(default)
extern "C" {

// Scales and zero-points of every group.
void llmquant_fit(int instructions, const Fit* fit, int threads) {
  // Pieces of about 64 Ki weights: long enough to be worth a thread, short enough that none is left alone with the last.
  const int64_t step = std::max<int64_t>(1, 65536 / (fit->groups * fit->width));
  for_each((fit->rows + step - 1) / step, threads, [&](int64_t chunk) {
    kAll[instructions]->fit(*fit, chunk * step, std::min(fit->rows, (chunk + 1) * step), scratch(fit->scratch()));
  });
}

// Codes and errors of columns [first, last) of a block of GPTQ.
void llmquant_visit(int instructions, const Visit* visit, int threads) {
  for_each((visit->out + kStripe - 1) / kStripe, threads, [&](int64_t stripe) {
    kAll[instructions]->visit(*visit, stripe, scratch((visit->last - visit->first) * kStripe));
  });
}

}  // extern "C"
#pragma GCC visibility pop
