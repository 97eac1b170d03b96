// Which instruction set the CPU kernels use. Every <family>_isa.cpp is compiled once per variant,
// into the namespace quarot::cpu::<variant>; <family>.cpp declares the copies with
// QUAROT_DECLARE_VARIANTS and picks one with QUAROT_PICK, once a process. linear_int4 alone has a
// copy in quarot::cpu::amx too; <family>_amx.cpp is compiled there only.
#pragma once

namespace quarot::cpu {

enum class Isa { baseline, avx2, avx512, amx };
inline constexpr Isa kIsas[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::amx};

/// "baseline" (x86-64-v2, or plain code on another processor), "avx2" (x86-64-v3), "avx512"
/// (x86-64-v4 with VNNI) or "amx" (avx512 but for linear_int4, which multiplies tiles of int8).
const char* isa_name(Isa isa);

/// Whether this build has the variant and this processor can run it.
bool isa_available(Isa isa);

/// The variant in use: the environment variable QUAROT_CPU_ISA if set, else the best available.
/// Decided at the first call. Throws if the variable names no variant or one that cannot run here.
Isa active_isa();

#if defined(__x86_64__)
#define QUAROT_DECLARE_VARIANTS(declaration) \
  namespace baseline {                       \
  declaration;                               \
  }                                          \
  namespace avx2 {                           \
  declaration;                               \
  }                                          \
  namespace avx512 {                         \
  declaration;                               \
  }

template <class Function>
Function* pick(Function* baseline, Function* avx2, Function* avx512) {
  switch (active_isa()) {
    case Isa::avx512:
    case Isa::amx:
      return avx512;
    case Isa::avx2:
      return avx2;
    case Isa::baseline:
      return baseline;
  }
  __builtin_unreachable();
}
/// The active variant of `function` (a plain name declared by QUAROT_DECLARE_VARIANTS).
#define QUAROT_PICK(function) \
  (::quarot::cpu::pick(&baseline::function, &avx2::function, &avx512::function))
#else
#define QUAROT_DECLARE_VARIANTS(declaration) \
  namespace baseline {                       \
  declaration;                               \
  }
#define QUAROT_PICK(function) (&baseline::function)
#endif

}  // namespace quarot::cpu
