#define LANES 4
#define INSTRUCTIONS isa_generic
#include "linear.inc.h"

namespace llmquant {

static bool available() { return true; }

extern const Instructions kInstructions_generic = {
    "generic", available, isa_generic::kMostRows, isa_generic::one_row, isa_generic::spread, isa_generic::decode, isa_generic::multiply, isa_generic::attend,
    isa_generic::silu_times,
};

}  // namespace llmquant
