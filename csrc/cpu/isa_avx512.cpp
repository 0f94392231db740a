#define LANES 16
#define INSTRUCTIONS isa_avx512
#include "linear.inc.h"
#include "between.inc.h"

namespace llmquant {

static bool available() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

extern const Instructions kInstructions_avx512 = {
    "avx512", available, isa_avx512::kMostRows, isa_avx512::kTiles, isa_avx512::one_row, isa_avx512::spread, isa_avx512::decode, isa_avx512::multiply, isa_avx512::attend,
    isa_avx512::softmax_columns, isa_avx512::silu_times, isa_avx512::rms_norm, isa_avx512::rotate,
};

}  // namespace llmquant
