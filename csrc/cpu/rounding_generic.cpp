#define LANES 4
#define INSTRUCTIONS rounding_generic
#include "rounding.inc.h"

namespace llmquant {
extern const Rounding kRounding_generic = {rounding_generic::fit, rounding_generic::visit};
}  // namespace llmquant
