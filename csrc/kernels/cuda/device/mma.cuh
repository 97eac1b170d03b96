// Matrix products on tensor cores, m16n8k16, 16-bit operands and fp32 sums. With g = lane / 4 and
// t = lane % 4, a lane's fragment is, in this order, of
//
// * A [16, 16] 4 words: columns (2 t, 2 t + 1) of rows g and g + 8, then columns (2 t + 8, 2 t + 9)
//   of the same rows;
// * B [16, 8] 2 words: rows (2 t, 2 t + 1), then (2 t + 8, 2 t + 9) of column g;
// * D [16, 8] 4 floats: columns 2 t and 2 t + 1 of row g, then of row g + 8.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device/ptx.cuh"
#include "kernels/cuda/device/vec.cuh"

namespace quarot::cuda {

constexpr int kMmaRows = 16;    // of A and D
constexpr int kMmaColumns = 8;  // of B and D
constexpr int kMmaDepth = 16;   // columns of A, rows of B

/// d += a * b, operands of kDtype.
template <DType kDtype>
__device__ __forceinline__ void mma(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  static_assert(kDtype != DType::f32);
  if constexpr (kDtype == DType::f16) {
    mma_f16(d, a, b0, b1);
  } else {
    mma_bf16(d, a, b0, b1);
  }
}

/// d = a * b.
template <DType kDtype>
__device__ __forceinline__ void mma_first(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  d[0] = d[1] = d[2] = d[3] = 0.0f;
  mma<kDtype>(d, a, b0, b1);
}

/// +1, -1 or 0 as 16 bits of kDtype.
template <DType kDtype>
__host__ __device__ constexpr uint32_t sign_bits(int sign) {
  constexpr uint32_t kOne = kDtype == DType::f16 ? 0x3c00 : 0x3f80;
  return sign == 0 ? 0 : kOne | (sign < 0 ? 0x8000u : 0u);
}

}  // namespace quarot::cuda
