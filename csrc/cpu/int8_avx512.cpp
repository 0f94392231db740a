#define LANES 16
#define INSTRUCTIONS int8_avx512
#include "int8.inc.h"

namespace llmquant {

static bool available() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

extern const Int8Instructions kInt8_avx512 = {
    "avx512", available, int8_avx512::int8::round, int8_avx512::int8::one_row, int8_avx512::int8::block,
};

}  // namespace llmquant
