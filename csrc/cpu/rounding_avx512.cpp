#define LANES 16
#define INSTRUCTIONS rounding_avx512
#include "rounding.inc.h"

namespace llmquant {
extern const Rounding kRounding_avx512 = {rounding_avx512::fit, rounding_avx512::visit};
}  // namespace llmquant
