// AVX-VNNI: the dot product of AVX-512 VNNI in 256 bits. Compilers from GCC 11 and Clang 12 on have it; an older one leaves it out.
#ifdef __AVXVNNI__
#include <cpuid.h>
#define LANES 8
#define INSTRUCTIONS int8_avxvnni
#include "int8.inc.h"
#else
#include "int8.h"
#endif

namespace llmquant {

#ifdef __AVXVNNI__
static bool available() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) &&
         (eax >> 4 & 1);
}

extern const Int8Instructions kInt8_avxvnni = {
    "avxvnni", available, int8_avxvnni::int8::round, int8_avxvnni::int8::one_row, int8_avxvnni::int8::block,
};
#else
static bool available() { return false; }

extern const Int8Instructions kInt8_avxvnni = {"avxvnni", available, nullptr, nullptr, nullptr};
#endif

}  // namespace llmquant
