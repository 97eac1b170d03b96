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
template <DType kType>
struct RowSource {
  const void* data;
  int64_t row_stride;

  static constexpr DType kDtype = kType;
  static constexpr int kInFlight =
      kType == DType::f32 ? 2 : 8;  // chunks a thread loads before it uses them
  static constexpr bool kNormalised = false;
  using Raw = Chunk<kType>;

  static constexpr int kBytes = bytes_of(kType);
  bool is_dense(int64_t n) const { return row_stride == n; }
  /// A chunk is kInputs times 16 bytes: where they are.
  static constexpr int kInputs = kBytes / 2;
  static constexpr int kUnitBytes = kChunk * kBytes;  // between chunks
  __device__ __forceinline__ int input_offset(int input) const { return input * 16; }
  __device__ __forceinline__ void values(float (&v)[kChunk], const uint4 (&in)[kInputs]) const {
    Raw raw;
#pragma unroll
    for (int i = 0; i < kInputs; ++i) raw.words[i] = in[i];
    to_floats<kType>(v, raw);
  }
  __device__ __forceinline__ const char* row(int64_t row) const {
    return static_cast<const char*>(data) + row * row_stride * bytes_of(kType);
  }
  __device__ __forceinline__ Raw load(int64_t row, int column) const {
    return load_chunk<kType>(data, row * row_stride + column);
  }
  __device__ __forceinline__ void values(float (&v)[kChunk], const Raw& raw) const {
    to_floats<kType>(v, raw);
  }

  __device__ float common(int64_t, int, float*) const { return 0.0f; }
  __device__ float value(int64_t row, int column, float) const {
    return load1<kType>(data, row * row_stride + column);
  }
};

/// 1 / (1 + e^-a) to a few ulp; 0 below -88, where the true value is a subnormal number.
__device__ __forceinline__ float sigmoid(float a) {
  return reciprocal_fast(1.0f + exp2_fast(a * -0x1.715476p+0f));  // log2(e)
}

/// The activation to a few ulp.
template <Activation kActivation>
__device__ __forceinline__ float activate(float a) {
  if constexpr (kActivation == Activation::silu) {
    return a * sigmoid(a);
  } else if constexpr (kActivation == Activation::gelu) {
    // 0.5 * a * erfc(-a / sqrt(2)), erfc to 1.5e-7 by Abramowitz and Stegun 7.1.26: erff takes
    // three times the instructions, in code that is unrolled 64 times.
    const float x = fabsf(a) * 0x1.6a09e6p-1f, t = reciprocal_fast(__fmaf_rn(x, 0.3275911f, 1.0f));
    float tail = __fmaf_rn(t, 1.061405429f, -1.453152027f);
    tail = __fmaf_rn(t, tail, 1.421413741f);
    tail = __fmaf_rn(t, tail, -0.284496736f);
    tail = __fmaf_rn(t, tail, 0.254829592f);
    tail *= 0.5f * a * t * exp2_fast(x * x * -0x1.715476p+0f);  // a / 2 * erfc(x)
    return a < 0.0f ? tail : a - tail;
  } else {
    // 0.5 * (1 + tanh(u)) = sigmoid(2 u), u = sqrt(2 / pi) * (a + 0.044715 a^3)
    return a * sigmoid(0x1.988454p+0f * (a + 0.044715f * a * a * a));
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
template <DType kType>
struct GluSource {
  const void* data;
  int64_t row_stride;
  int n;  // columns of gate
  Activation activation;

  static constexpr DType kDtype = DType::f32;
  static constexpr int kInFlight = kType == DType::f32 ? 1 : 2;
  static constexpr bool kNormalised = false;
  struct Raw {
    Chunk<kType> gate, up;
  };

  static constexpr int kBytes = bytes_of(kType);
  bool is_dense(int64_t) const { return false; }
  /// A chunk is kInputs times 16 bytes, first of gate: where they are.
  static constexpr int kHalf = kBytes / 2, kInputs = 2 * kHalf;
  static constexpr int kUnitBytes = kChunk * kBytes;  // between chunks
  __device__ __forceinline__ int input_offset(int input) const {
    return input / kHalf * n * kBytes + input % kHalf * 16;
  }
  __device__ __forceinline__ void values(float (&v)[kChunk], const uint4 (&in)[kInputs]) const {
    Raw raw;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) raw.gate.words[i] = in[i], raw.up.words[i] = in[kHalf + i];
    values(v, raw);
  }
  __device__ __forceinline__ const char* row(int64_t row) const {
    return static_cast<const char*>(data) + row * row_stride * bytes_of(kType);
  }
  __device__ __forceinline__ Raw load(int64_t row, int column) const {
    const int64_t i = row * row_stride + column;
    return {load_chunk<kType>(data, i), load_chunk<kType>(data, i + n)};
  }
  __device__ __forceinline__ void values(float (&v)[kChunk], const Raw& raw) const {
    float up[kChunk];
    to_floats<kType>(v, raw.gate);
    to_floats<kType>(up, raw.up);
    gate(v, up, activation);
  }

  __device__ float common(int64_t, int, float*) const { return 0.0f; }
  __device__ float value(int64_t row, int column, float) const {
    const int64_t i = row * row_stride + column;
    float v[1] = {load1<kType>(data, i)};
    gate(v, {load1<kType>(data, i + n)}, activation);
    return v[0];
  }
};

}  // namespace quarot::cuda
