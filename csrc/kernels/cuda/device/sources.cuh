// What a kernel reads: rows of a type, or activation(gate) * up. For transform.cuh, rows.cuh and
// any_transform.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device/vec.cuh"
#include "kernels/fused_quantize.h"
#include "kernels/types.h"

namespace quarot::cuda {

/// Whether chunks of these rows may be loaded as 16 bytes.
inline bool chunks_are_aligned(const Rows& x) {
  const int64_t bytes = bytes_of(x.dtype);
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && (x.row_stride * bytes) % 16 == 0 &&
         x.n % kChunk == 0;
}

/// Rows as they are.
template <DType kDtype>
struct RowSource {
  const void* data;
  int64_t row_stride;

  static constexpr bool kIsFloat = kDtype == DType::f32;
  static constexpr DType kOperand = kIsFloat ? DType::bf16 : kDtype;  // of transform.cuh
  static constexpr int kOperands = kIsFloat ? 3 : 1;
  static constexpr int kInFlight = kIsFloat ? 2 : 8;  // chunks a thread loads before it uses them
  static constexpr bool kNormalised = false;
  using Raw = Chunk<kDtype>;

  __device__ __forceinline__ const void* address(int64_t row, int column) const {
    return static_cast<const char*>(data) + (row * row_stride + column) * bytes_of(kDtype);
  }
  __device__ __forceinline__ Raw load(int64_t row, int column) const {
    return load_chunk<kDtype>(data, row * row_stride + column);
  }
  __device__ __forceinline__ void values(float (&v)[kChunk], const Raw& raw) const {
    to_floats<kDtype>(v, raw);
  }

  __device__ float common(int64_t, int, float*) const { return 0.0f; }
  __device__ float value(int64_t row, int column, float) const {
    return load1<kDtype>(data, row * row_stride + column);
  }
};

/// The activation to a few ulp: the exponential and the quotient are the fast ones.
template <Activation kActivation>
__device__ __forceinline__ float activate(float a) {
  if constexpr (kActivation == Activation::silu) {
    return __fdividef(a, 1.0f + __expf(-a));
  } else if constexpr (kActivation == Activation::gelu) {
    return 0.5f * a * (1.0f + erff(a * 0x1.6a09e6p-1f));  // 1 / sqrt(2)
  } else {
    // 0.5 * (1 + tanh(u)) = 1 / (1 + e^(-2u)), u = sqrt(2 / pi) * (a + 0.044715 a^3)
    const float u2 = 0x1.988454p+0f * (a + 0.044715f * a * a * a);
    return __fdividef(a, 1.0f + __expf(-u2));
  }
}

/// v[i] = activation(v[i]) * up[i].
template <int kCount>
__device__ __forceinline__ void gate(float (&v)[kCount], const float (&up)[kCount],
                                     Activation activation) {
  const auto all = [&](auto function) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = function(v[i]) * up[i];
  };
  switch (activation) {
    case Activation::silu:
      return all([](float a) { return activate<Activation::silu>(a); });
    case Activation::gelu:
      return all([](float a) { return activate<Activation::gelu>(a); });
    case Activation::gelu_tanh:
      return all([](float a) { return activate<Activation::gelu_tanh>(a); });
  }
}

/// activation(gate) * up of rows [gate | up]. The activation is chosen at run time, once a chunk:
/// as a template parameter it would triple the kernels.
template <DType kDtype>
struct GluSource {
  const void* data;
  int64_t row_stride;
  int n;  // columns of gate
  Activation activation;

  static constexpr DType kOperand = DType::bf16;
  static constexpr int kOperands = 3;
  static constexpr int kInFlight = kDtype == DType::f32 ? 1 : 2;
  static constexpr bool kNormalised = false;
  struct Raw {
    Chunk<kDtype> gate, up;
  };

  __device__ __forceinline__ Raw load(int64_t row, int column) const {
    const int64_t i = row * row_stride + column;
    return {load_chunk<kDtype>(data, i), load_chunk<kDtype>(data, i + n)};
  }
  __device__ __forceinline__ void values(float (&v)[kChunk], const Raw& raw) const {
    float up[kChunk];
    to_floats<kDtype>(v, raw.gate);
    to_floats<kDtype>(up, raw.up);
    gate(v, up, activation);
  }

  __device__ float common(int64_t, int, float*) const { return 0.0f; }
  __device__ float value(int64_t row, int column, float) const {
    const int64_t i = row * row_stride + column;
    float v[1] = {load1<kDtype>(data, i)};
    gate(v, {load1<kDtype>(data, i + n)}, activation);
    return v[0];
  }
};

}  // namespace quarot::cuda
