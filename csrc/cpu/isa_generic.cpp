#define LANES 4
#define INSTRUCTIONS isa_generic
#include "linear.inc.h"
#include "between.inc.h"

namespace llmquant {

static bool available() { return true; }

extern const Instructions kInstructions_generic = {
    "generic", available, isa_generic::kMostRows, isa_generic::kTiles, isa_generic::one_row, isa_generic::spread, isa_generic::decode, isa_generic::multiply, isa_generic::attend,
    isa_generic::softmax_columns, isa_generic::silu_times, isa_generic::rms_norm, isa_generic::rotate,
};

}  // namespace llmquant
