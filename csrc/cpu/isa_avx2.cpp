#define LANES 8
#define INSTRUCTIONS isa_avx2
#include "linear.inc.h"
#include "between.inc.h"

namespace llmquant {

static bool available() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

extern const Instructions kInstructions_avx2 = {
    "avx2", available, isa_avx2::kMostRows, isa_avx2::kTiles, isa_avx2::one_row, isa_avx2::spread, isa_avx2::decode, isa_avx2::multiply, isa_avx2::attend,
    isa_avx2::softmax_columns, isa_avx2::silu_times, isa_avx2::rms_norm, isa_avx2::rotate,
};

}  // namespace llmquant
