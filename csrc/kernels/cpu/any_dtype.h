// Loads and stores whose element type is known only at run time, for the edges of a kernel: a
// switch a vector, where instantiating the kernel for each type would multiply its code and compile
// time. Only for *_isa.cpp files (see vec.h).
#pragma once

#include <cstdint>

#include "kernels/cpu/vec.h"

namespace quarot::cpu::QUAROT_ISA {

/// Elements [i, min(i + 16, n)) of an array of `dtype` as fp32; the other lanes are +0.
QUAROT_INLINE F32 load_any(DType dtype, const void* data, int64_t i, int64_t n) {
  switch (dtype) {
    case DType::f32:
      return load_upto<DType::f32>(data, i, n);
    case DType::f16:
      return load_upto<DType::f16>(data, i, n);
    case DType::bf16:
      return load_upto<DType::bf16>(data, i, n);
  }
  __builtin_unreachable();
}

/// Stores elements [i, min(i + 16, n)), rounded once to `dtype`.
QUAROT_INLINE void store_any(DType dtype, void* data, int64_t i, int64_t n, const F32& v) {
  switch (dtype) {
    case DType::f32:
      return store_upto<DType::f32>(data, i, n, v);
    case DType::f16:
      return store_upto<DType::f16>(data, i, n, v);
    case DType::bf16:
      return store_upto<DType::bf16>(data, i, n, v);
  }
  __builtin_unreachable();
}

}  // namespace quarot::cpu::QUAROT_ISA
