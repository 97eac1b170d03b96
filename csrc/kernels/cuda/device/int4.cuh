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
constexpr int kRoundBits = 0x4b400000;

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
/// The range of 16-bit values, collected two at a time.
template <DType kDtype>
struct PairRange {
  uint32_t high = 0, low = 0;  // the largest and the smallest ones, with 0

  __device__ __forceinline__ void add(uint32_t pair) {
    if constexpr (kDtype == DType::f16) {
      high = max_nan_f16x2(high, pair);
      low = min_nan_f16x2(low, pair);
    } else {
      high = max_nan_bf16x2(high, pair);
      low = min_nan_bf16x2(low, pair);
    }
  }
  __device__ __forceinline__ void add(const uint4& pairs) {
    add(pairs.x);
    add(pairs.y);
    add(pairs.z);
    add(pairs.w);
  }
  __device__ __forceinline__ Range range(bool symmetric) const {
    const auto larger = [](uint32_t pair) {  // of two magnitudes
      const uint32_t sizes = pair & 0x7fff7fffu;
      if constexpr (kDtype == DType::f16) {
        return max(__float_as_int(f16_to_float(static_cast<uint16_t>(sizes))),
                   __float_as_int(f16_to_float(static_cast<uint16_t>(sizes >> 16))));
      } else {
        return static_cast<int>(max(sizes << 16, sizes & 0xffff0000u));
      }
    };
    const Range r{larger(high), larger(low)};
    return symmetric ? Range{max(r.high, r.low), 0} : r;
  }
};
__device__ __forceinline__ Range merge(const Range& a, const Range& b) {
  return {max(a.high, b.high), max(a.low, b.low)};
}

/// How values become codes: clamp(rint(x * inv) + shift + half, 0, top) - half, half = 2^(bits -
/// 1).
struct Grid {
  float scale, inv;
  int shift;  // also the stored zero point
  int top;    // 2^bits - 1; half if a value was not finite: 0, inf and NaN times 0 then give 0
};

/// x / steps for steps = 7, 15, 127 or 255 and x >= 0, rounded to nearest (tried: all x of two
/// binades, and all up to a quotient of 2^-126, below which it need only be below): a division
/// without the general one's special cases.
__device__ __forceinline__ float divide_by_steps(float x, float steps) {
  const float inverse = steps == 7.0f     ? 1.0f / 7.0f
                        : steps == 15.0f  ? 1.0f / 15.0f
                        : steps == 127.0f ? 1.0f / 127.0f
                                          : 1.0f / 255.0f;
  const float q = __fmul_rn(x, inverse);
  const float rest = __fmaf_rn(-steps, q, x);
  return q < __int_as_float(kInfinityBits) ? __fmaf_rn(rest, inverse, q) : q;
}

/// The grid of values whose range, before they are multiplied by factor >= 0, is given.
__device__ __forceinline__ Grid make_grid(const Range& range, float factor, float clip, int bits,
                                          bool symmetric) {
  const int half = 1 << (bits - 1);
  const float top = __fmul_rn(__int_as_float(range.high), factor);
  const float bottom = __fmul_rn(__int_as_float(range.low), factor);
  if (!(top < __int_as_float(kInfinityBits) && bottom < __int_as_float(kInfinityBits))) {
    return {__int_as_float(0x7fc00000), 0.0f, 0, half};
  }
  const float hi = __fmul_rn(clip, top), lo = -__fmul_rn(clip, bottom);
  const float steps = symmetric ? (bits == 4 ? 7.0f : 127.0f) : (bits == 4 ? 15.0f : 255.0f);
  const float ratio = divide_by_steps(symmetric ? hi : __fsub_rn(hi, lo), steps);
  const float scale = ratio < kScaleFloor ? 1.0f : ratio;
  const float inv = __frcp_rn(scale);
  const int zero = symmetric ? half : __float2int_rn(__fmul_rn(-lo, inv));
  return {scale, inv, zero - half, 2 * half - 1};
}

/// exact: as kernels/quantize.h says, for |x * inv| < 2^22, that is, a range that was clipped to no
/// less than kLeastClip. fused: the same, but x * inv is not rounded before it is rounded to a
/// code, an instruction less, for values that are not exact anyway. any: exact for all x.
enum class Rounding { exact, fused, any };
constexpr float kLeastClip = 0x1p-12f;

/// clamp(rint(x * inv) + shift + half, 0, top), NaN as infinity.
template <Rounding kRounding>
__device__ __forceinline__ int code_of(float x, const Grid& grid, int half) {
  float v;
  if constexpr (kRounding == Rounding::fused) {
    v = __fmaf_rn(x, grid.inv, kRound);
  } else {
    v = __fmul_rn(x, grid.inv);
    if constexpr (kRounding == Rounding::any) {
      v = max_nan(v, -0x1p21f);  // what is above comes out right
    }
    v = __fadd_rn(v, kRound);
  }
  return __viaddmin_s32_relu(__float_as_int(v), grid.shift + half - kRoundBits, grid.top);
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

/// The codes of 32 / kBits values without a sign, that is, plus half, the first in the lowest bits.
template <int kBits, Rounding kRounding>
__device__ __forceinline__ uint32_t code_word(const float* v, const Grid& grid, int half) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 32 / kBits; ++i) {
    word += static_cast<uint32_t>(code_of<kRounding>(v[i], grid, half)) << (kBits * i);
  }
  return word;
}

/// Writes words to the place of the `run`-th such number of words.
template <int kWords>
__device__ __forceinline__ void store_words_once(void* to, int64_t run,
                                                 const uint32_t (&words)[kWords]) {
  static_assert(kWords == 1 || kWords == 2 || kWords % 4 == 0);
  if constexpr (kWords == 1) {
    __stcs(static_cast<uint32_t*>(to) + run, words[0]);
  } else if constexpr (kWords == 2) {
    __stcs(static_cast<uint2*>(to) + run, uint2{words[0], words[1]});
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      __stcs(static_cast<uint4*>(to) + (run * kWords + i) / 4,
             uint4{words[i], words[i + 1], words[i + 2], words[i + 3]});
    }
  }
}

/// The codes of kCount values as they are stored; half = 2^(bits - 1).
template <int kBits, Rounding kRounding, int kCount>
__device__ __forceinline__ void make_codes(uint32_t (&words)[kCount * kBits / 32],
                                           const float (&v)[kCount], const Grid& grid, int half) {
  // u - half in two's complement: the highest bit of u flipped, where u fills its place.
  const uint32_t fill = kBits == 8 ? static_cast<uint32_t>(128 - half) * 0x01010101u : 0;
  const uint32_t flip = kBits == 8 ? 0x80808080u : 0x88888888u;
#pragma unroll
  for (int i = 0; i < kCount * kBits / 32; ++i)
    words[i] = (code_word<kBits, kRounding>(v + i * (32 / kBits), grid, half) + fill) ^ flip;
}

/// Writes the codes of run `run` of kCount elements of all rows; the range was clipped to no less
/// than kLeastClip.
template <Rounding kRounding, int kCount>
__device__ __forceinline__ void store_run_codes(const QuantizedRows& out, int64_t run,
                                                const float (&v)[kCount], const Grid& grid) {
  const int half = 1 << (out.bits - 1);
  if (out.packed) {
    uint32_t words[kCount / 8];
    make_codes<4, kRounding>(words, v, grid, half);
    store_words_once(out.codes, run, words);
  } else {
    uint32_t words[kCount / 4];
    make_codes<8, kRounding>(words, v, grid, half);
    store_words_once(out.codes, run, words);
  }
}
/// The same, of elements [i, i + 8) of all rows.
template <Rounding kRounding>
__device__ __forceinline__ void store_codes(const QuantizedRows& out, int64_t i,
                                            const float (&v)[kChunk], const Grid& grid) {
  store_run_codes<kRounding>(out, i / kChunk, v, grid);
}

}  // namespace quarot::cuda
