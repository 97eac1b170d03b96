// Eight elements at a time between memory and fp32 registers, and division by a number known at
// launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device/ptx.cuh"
#include "kernels/types.h"

namespace quarot::cuda {

/// Elements of a chunk: 16 bytes of a 16-bit type.
constexpr int kChunk = 8;
constexpr int kWarp = 32;

__host__ __device__ constexpr int bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// ---- One element: 16-bit types are their bits ---------------------------------------------------

__device__ __forceinline__ float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

template <DType kDtype>
__device__ __forceinline__ float load1(const void* data, int64_t i) {
  if constexpr (kDtype == DType::f32) {
    return static_cast<const float*>(data)[i];
  } else {
    const uint16_t bits = static_cast<const uint16_t*>(data)[i];
    return kDtype == DType::f16 ? f16_to_float(bits) : bf16_low(bits);
  }
}
template <DType kDtype>
__device__ __forceinline__ void store1(void* data, int64_t i, float v) {
  if constexpr (kDtype == DType::f32) {
    static_cast<float*>(data)[i] = v;
  } else {
    const uint32_t bits = kDtype == DType::f16 ? pack_f16x2(v, 0.0f) : pack_bf16x2(v, 0.0f);
    static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(bits);
  }
}
/// load1 of a type known only at run time.
__device__ __forceinline__ float load1(DType dtype, const void* data, int64_t i) {
  switch (dtype) {
    case DType::f32:
      return load1<DType::f32>(data, i);
    case DType::f16:
      return load1<DType::f16>(data, i);
    default:
      return load1<DType::bf16>(data, i);
  }
}
/// store1 of a type known only at run time.
__device__ __forceinline__ void store1(DType dtype, void* data, int64_t i, float v) {
  switch (dtype) {
    case DType::f32:
      return store1<DType::f32>(data, i, v);
    case DType::f16:
      return store1<DType::f16>(data, i, v);
    default:
      return store1<DType::bf16>(data, i, v);
  }
}

// ---- Chunks: data + i must be 16-byte aligned ---------------------------------------------------

/// The bytes of a chunk.
template <DType kDtype>
struct Chunk {
  uint4 words[kDtype == DType::f32 ? 2 : 1];
};

template <DType kDtype>
__device__ __forceinline__ Chunk<kDtype> load_chunk(const void* data, int64_t i) {
  const auto* p =
      reinterpret_cast<const uint4*>(static_cast<const char*>(data) + i * bytes_of(kDtype));
  Chunk<kDtype> c;
  c.words[0] = load_once(p);
  if constexpr (kDtype == DType::f32) c.words[1] = load_once(p + 1);
  return c;
}

template <DType kDtype>
__device__ __forceinline__ void to_floats(float (&v)[kChunk], const Chunk<kDtype>& c) {
  const uint32_t w[4] = {c.words[0].x, c.words[0].y, c.words[0].z, c.words[0].w};
  if constexpr (kDtype == DType::f32) {
    const uint32_t u[4] = {c.words[1].x, c.words[1].y, c.words[1].z, c.words[1].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] = __uint_as_float(w[i]);
      v[4 + i] = __uint_as_float(u[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kDtype == DType::f16) {
        v[2 * i] = f16_to_float(static_cast<uint16_t>(w[i]));
        v[2 * i + 1] = f16_to_float(static_cast<uint16_t>(w[i] >> 16));
      } else {
        v[2 * i] = bf16_low(w[i]);
        v[2 * i + 1] = bf16_high(w[i]);
      }
    }
  }
}

/// The low one of a pair of 16-bit elements.
template <DType kDtype>
__device__ __forceinline__ float to_float(uint32_t pair) {
  static_assert(kDtype != DType::f32);
  return kDtype == DType::f16 ? f16_to_float(static_cast<uint16_t>(pair)) : bf16_low(pair);
}
/// The larger ones of two pairs, or NaN where one is NaN.
template <DType kDtype>
__device__ __forceinline__ uint32_t max_pairs(uint32_t a, uint32_t b) {
  static_assert(kDtype != DType::f32);
  return kDtype == DType::f16 ? max_nan_f16x2(a, b) : max_nan_bf16x2(a, b);
}
/// A pair times 2^exponent, which must be a normal number of the type.
template <DType kDtype>
__device__ __forceinline__ uint32_t scale_pair(uint32_t pair, int exponent) {
  static_assert(kDtype != DType::f32);
  if constexpr (kDtype == DType::f16) {
    return mul_f16x2(pair, static_cast<uint32_t>(exponent + 15) * 0x04000400u);
  } else {
    return fma_bf16x2(pair, static_cast<uint32_t>(exponent + 127) * 0x00800080u, 0x80008000u);
  }
}

/// Two floats as a pair of 16-bit elements.
template <DType kDtype>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  static_assert(kDtype != DType::f32);
  return kDtype == DType::f16 ? pack_f16x2(low, high) : pack_bf16x2(low, high);
}

template <DType kDtype>
__device__ __forceinline__ void store_chunk(void* data, int64_t i, const float (&v)[kChunk]) {
  auto* p = reinterpret_cast<uint4*>(static_cast<char*>(data) + i * bytes_of(kDtype));
  if constexpr (kDtype == DType::f32) {
    store_once(p, {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                   __float_as_uint(v[3])});
    store_once(p + 1, {__float_as_uint(v[4]), __float_as_uint(v[5]), __float_as_uint(v[6]),
                       __float_as_uint(v[7])});
  } else {
    store_once(p, {pack2<kDtype>(v[0], v[1]), pack2<kDtype>(v[2], v[3]), pack2<kDtype>(v[4], v[5]),
                   pack2<kDtype>(v[6], v[7])});
  }
}

// ---- Division -----------------------------------------------------------------------------------

/// x / divisor for x < 2^31 by a multiplication (Granlund and Montgomery 1994).
class FastDiv {
 public:
  FastDiv() = default;
  explicit FastDiv(int divisor) : divisor_(divisor) {
    while ((int64_t{1} << shift_) < divisor) ++shift_;
    multiplier_ = static_cast<uint32_t>(
        ((uint64_t{1} << 32) * ((uint64_t{1} << shift_) - static_cast<uint64_t>(divisor))) /
            static_cast<uint64_t>(divisor) +
        1);
  }
  __device__ __forceinline__ int operator()(int x) const {
    const auto u = static_cast<uint32_t>(x);
    return static_cast<int>((__umulhi(u, multiplier_) + u) >> shift_);
  }
  __host__ __device__ int divisor() const { return divisor_; }

 private:
  int divisor_ = 1;
  uint32_t multiplier_ = 1;
  int shift_ = 0;
};

}  // namespace quarot::cuda
