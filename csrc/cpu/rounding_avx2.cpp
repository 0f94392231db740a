#define LANES 8
#define INSTRUCTIONS rounding_avx2
#include "rounding.inc.h"

namespace llmquant {
extern const Rounding kRounding_avx2 = {rounding_avx2::fit, rounding_avx2::visit};
}  // namespace llmquant
