#define LANES 8
#define INSTRUCTIONS int8_avx2
#include "int8.inc.h"

namespace llmquant {

static bool available() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

extern const Int8Instructions kInt8_avx2 = {
    "avx2", available, int8_avx2::int8::round, int8_avx2::int8::one_row, int8_avx2::int8::block,
};

}  // namespace llmquant
