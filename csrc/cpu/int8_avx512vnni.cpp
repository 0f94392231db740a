#define LANES 16
#define INSTRUCTIONS int8_avx512vnni
#include "int8.inc.h"

namespace llmquant {

static bool available() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

extern const Int8Instructions kInt8_avx512vnni = {
    "avx512vnni", available, int8_avx512vnni::int8::round, int8_avx512vnni::int8::one_row, int8_avx512vnni::int8::block,
};

}  // namespace llmquant
