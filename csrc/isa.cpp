#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace posttrain {

static Isa best_of_this_cpu() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

static Isa choose() {
  const Isa best = best_of_this_cpu();
  const char* wanted = std::getenv("POSTTRAIN_ISA");
  if (wanted == nullptr) return best;
  const Isa named = std::strcmp(wanted, "avx512") == 0 ? Isa::avx512
                    : std::strcmp(wanted, "avx2") == 0 ? Isa::avx2
                                                       : Isa::baseline;
  return named < best ? named : best;
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() {
  const char* names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(isa())];
}

}  // namespace posttrain
