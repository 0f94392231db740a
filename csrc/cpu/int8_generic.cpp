#define LANES 4
#define INSTRUCTIONS int8_generic
#include "int8.inc.h"

namespace llmquant {

static bool available() { return true; }

extern const Int8Instructions kInt8_generic = {
    "generic", available, int8_generic::int8::round, int8_generic::int8::one_row, int8_generic::int8::block,
};

}  // namespace llmquant
