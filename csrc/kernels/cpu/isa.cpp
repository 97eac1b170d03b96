#include "kernels/cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels/error.h"

#if defined(QUAROT_WITH_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace quarot::cpu {
namespace {

/// Whether the processor multiplies tiles of int8 and of bf16 and the kernel lets this process use
/// them.
bool has_amx() {
#if defined(QUAROT_WITH_AMX)
  constexpr unsigned kTiles = 1u << 24 | 1u << 25 | 1u << 22;  // of leaf 7's edx: tile, int8, bf16
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTiles) != kTiles) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, its feature
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return "baseline";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::amx:
      return "amx";
  }
  __builtin_unreachable();
}

bool isa_available(Isa isa) {
#if defined(__x86_64__)
  // The feature lists of x86-64-v2, -v3 and -v4, by their members: clang 14 and GCC 11 do not know
  // the level names in __builtin_cpu_supports.
  __builtin_cpu_init();
  const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  switch (isa) {
    case Isa::baseline:
      return v2;
    case Isa::avx2:
      return v3;
    case Isa::avx512:
      return v4;
    case Isa::amx:
      return v4 && has_amx();
  }
  __builtin_unreachable();
#else
  return isa == Isa::baseline;
#endif
}

namespace {

Isa choose() {
  if (const char* wanted = std::getenv("QUAROT_CPU_ISA"); wanted != nullptr && *wanted != '\0') {
    for (const Isa isa : kIsas) {
      if (std::strcmp(wanted, isa_name(isa)) != 0) continue;
      if (isa_available(isa)) return isa;
      throw std::runtime_error(std::string("quarot: QUAROT_CPU_ISA=") + wanted +
                               ": this build or this processor does not have it");
    }
    throw std::runtime_error(
        std::string("quarot: QUAROT_CPU_ISA must be baseline, avx2, avx512 or amx; got '") +
        wanted + "'");
  }
  if (isa_available(Isa::amx)) return Isa::amx;
  if (isa_available(Isa::avx512)) return Isa::avx512;
  if (isa_available(Isa::avx2)) return Isa::avx2;
  QUAROT_ASSERT(isa_available(Isa::baseline), "the processor lacks SSE4.2 (x86-64-v2)");
  return Isa::baseline;
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace quarot::cpu
