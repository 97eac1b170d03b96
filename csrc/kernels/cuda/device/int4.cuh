// The quantizers' arithmetic on the device: kernels/quantize.h, step by step. The intrinsics with
// _rn are never contracted into an FMA, so that codes are the CPU's.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device/ptx.cuh"
#include "kernels/cuda/device/vec.cuh"
#include "kernels/quantize.h"

namespace quarot::cuda {

/// The bits of infinity. As integers, magnitudes compare as they do as floats, and NaN is above
/// infinity.
constexpr int kInfinityBits = 0x7f800000;
/// Smallest normal float: a smaller scale becomes 1, since its inverse could overflow.
constexpr float kScaleFloor = 0x1p-126f;
/// v + kRound has rint(v) in its low bits, ties to even, for |v| < 2^22.
constexpr float kRound = 0x1.8p23f;

/// The range of some values, as bits of floats >= 0: symmetric, high = max |x|; else high = max(x,
/// 0), low = -min(x, 0). NaN where a value is NaN.
struct Range {
  int high = 0, low = 0;
};

__device__ __forceinline__ Range range_of(const float (&v)[kChunk], bool symmetric) {
  float high = 0.0f, low = 0.0f;
  if (symmetric) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) high = max_nan(high, fabsf(v[i]));
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      high = max_nan(high, v[i]);
      low = max_nan(low, -v[i]);
    }
  }
  // + 0: -0 would be the smallest integer. |.| of NaN: its sign is not defined.
  return {__float_as_int(high) & 0x7fffffff, __float_as_int(low) & 0x7fffffff};
}
__device__ __forceinline__ Range merge(const Range& a, const Range& b) {
  return {max(a.high, b.high), max(a.low, b.low)};
}

/// How values become codes: clamp(rint(x * inv), low, high) + shift.
struct Grid {
  float scale, inv, low, high;
  int shift;  // also the stored zero point
};

/// The grid of values whose range, before they are multiplied by factor >= 0, is given.
__device__ __forceinline__ Grid make_grid(const Range& range, float factor, float clip, int bits,
                                          bool symmetric) {
  const float top = __fmul_rn(__int_as_float(range.high), factor);
  const float bottom = __fmul_rn(__int_as_float(range.low), factor);
  if (!(top < __int_as_float(kInfinityBits) && bottom < __int_as_float(kInfinityBits))) {
    return {__int_as_float(0x7fc00000), 0.0f, 0.0f, 0.0f, 0};
  }
  const int half = 1 << (bits - 1);
  const float hi = __fmul_rn(clip, top), lo = -__fmul_rn(clip, bottom);
  const float steps = static_cast<float>(symmetric ? half - 1 : 2 * half - 1);
  const float ratio = __fdiv_rn(symmetric ? hi : __fsub_rn(hi, lo), steps);
  const float scale = ratio < kScaleFloor ? 1.0f : ratio;
  const float inv = __fdiv_rn(1.0f, scale);
  if (symmetric) return {scale, inv, static_cast<float>(-half), static_cast<float>(half - 1), 0};
  const float zero = rintf(__fmul_rn(-lo, inv));
  // clamp(rint(v) + zero, 0, steps) = clamp(rint(v), -zero, steps - zero) + zero: the bounds are
  // integers.
  return {scale, inv, -zero, steps - zero, static_cast<int>(zero) - half};
}

/// The code in the low byte; what is above it is not defined. NaN gives the code of grid.low.
__device__ __forceinline__ uint32_t code_bits(float x, const Grid& grid) {
  const float v = fminf(fmaxf(__fmul_rn(x, grid.inv), grid.low), grid.high);
  return static_cast<uint32_t>(__float_as_int(__fadd_rn(v, kRound)) + grid.shift);
}

/// The same in fewer instructions, for values that are not exact anyway: x * inv is not rounded
/// before it is rounded to a code.
struct FusedGrid {
  float inv, offset, low, high;

  __device__ __forceinline__ FusedGrid(const Grid& grid, float factor)
      : inv(grid.inv * factor),
        offset(kRound + static_cast<float>(grid.shift)),
        low(offset + grid.low),
        high(offset + grid.high) {}
  __device__ __forceinline__ uint32_t code_bits(float x) const {
    return __float_as_uint(fminf(fmaxf(__fmaf_rn(x, inv, offset), low), high));
  }
};

/// Four low bytes as a word.
__device__ __forceinline__ uint32_t pack_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}
/// Eight codes, a byte each -> eight nibbles, the even index low.
__device__ __forceinline__ uint32_t pack_nibbles(const uint2& codes) {
  const uint32_t a = (codes.x & 0x000f000fu) | ((codes.x >> 4) & 0x00f000f0u);
  const uint32_t b = (codes.y & 0x000f000fu) | ((codes.y >> 4) & 0x00f000f0u);
  return __byte_perm(a, b, 0x6420);
}
/// The inverse: four nibbles of the low half -> four signed bytes.
__device__ __forceinline__ uint32_t unpack_nibbles(uint32_t nibbles) {
  const uint32_t spread =
      __byte_perm(nibbles, 0, 0x4140);  // byte 0 in the low half, byte 1 in the high half
  const uint32_t bytes = (spread & 0x000f000fu) | ((spread & 0x00f000f0u) << 4);
  return bytes | ((bytes & 0x08080808u) * 0x1eu);  // sign: 8 * 0x1e = 0xf0
}

/// Writes the codes, in the low bytes of c, of elements [i, i + 8) of all rows; i a multiple of 8.
__device__ __forceinline__ void store_code_bits(const QuantizedRows& out, int64_t i,
                                                const uint32_t (&c)[kChunk]) {
  const uint2 bytes{pack_bytes(c[0], c[1], c[2], c[3]), pack_bytes(c[4], c[5], c[6], c[7])};
  if (out.packed) {
    static_cast<uint32_t*>(out.codes)[i / kChunk] = pack_nibbles(bytes);
  } else {
    static_cast<uint2*>(out.codes)[i / kChunk] = bytes;
  }
}
__device__ __forceinline__ void store_codes(const QuantizedRows& out, int64_t i,
                                            const float (&v)[kChunk], const Grid& grid) {
  uint32_t c[kChunk];
#pragma unroll
  for (int e = 0; e < kChunk; ++e) c[e] = code_bits(v[e], grid);
  store_code_bits(out, i, c);
}

}  // namespace quarot::cuda
