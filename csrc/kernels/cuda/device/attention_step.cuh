// What a warp of the decode attention does (cuda/attention.cu): it takes kKeys keys of one cache
// head at a time, with all query rows (query s, head of the group) of its block.
//
// Both products run on tensor cores (m16n8k16, fp32 sums) with the codes as A and the rows as the 8
// columns of B:
//
//   scores [key, row] = K codes [key, dim] * q^T [dim, row]         lane (g, t): keys g, g + 8
//   out^T  [dim, row] = V codes^T [dim, key] * w [key, row]         lane (g, t): dims of g
//
// Codes are never scaled one by one. A code's bits, masked out of its word, ARE an fp16 operand:
// the subnormal code * 2^-24 (for the odd nibbles of a byte 16 times that, which q or the result
// takes back). Scale and zero of a key go on the score, s = k_scale (q . code - k_zero sum q), and
// those of a value on its weight, w = exp(s - max) v_scale and out = w . code - w . v_zero, where w
// is rounded to fp16 once, for both terms. q is scaled by a power of two into fp16's range: 16-bit
// queries lose nothing.
//
// kExact, for fp32 queries: q and w are sums of two fp16 numbers, and codes normal ones, since the
// tensor cores cut the low bits of sums of subnormal products.
//
// The running maximum of a row only moves when a score exceeds it by kTop (log2), which one vote a
// step finds out: rescaling is rare.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/device/attention_config.cuh"
#include "kernels/cuda/device/attention_plan.cuh"
#include "kernels/cuda/device/attention_queries.cuh"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/vec.cuh"

namespace quarot::cuda::decode {

constexpr float kTop = 15.0f;  // log2 of the largest weight: fp16 ends at 2^16
constexpr float kRest = 8.0f;  // where a new maximum is put
constexpr float kFirstValueUnit = 0x1p30f;

// ---- The products -------------------------------------------------------------------------------

template <int kWords>
__device__ __forceinline__ void load_words(uint32_t* to, const unsigned char* shared) {
  if constexpr (kWords == 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(shared);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else if constexpr (kWords == 2) {
    const uint2 v = *reinterpret_cast<const uint2*>(shared);
    to[0] = v.x, to[1] = v.y;
  } else {
    to[0] = *reinterpret_cast<const uint32_t*>(shared);
  }
}

/// What a key's codes and weight are combined with.
struct Param {
  float scale;    // of q . code, with everything a score is multiplied by; NaN poisons the key
  float offset;   // -scale * zero
  float v_scale;  // in the warp's unit, finite
  float v_zero;
};

/// Masked code bits as a pair of fp16.
template <class C>
__device__ __forceinline__ uint32_t operand(uint32_t bits) {
  constexpr uint32_t k1024 = 0x64006400;
  return C::kExact ? sub_f16x2(bits | k1024, k1024) : bits;
}

/// The two products' A fragments of a lane's words x and y; i: which 8 bits of each half-word.
template <class C>
__device__ __forceinline__ uint4 key_operands(uint32_t x, uint32_t y, int i) {
  constexpr uint32_t kLow = C::kBits == 4 ? 0x000f000f : 0x00ff00ff;
  constexpr uint32_t kHigh = C::kBits == 4 ? 0x00f000f0 : 0x00ff00ff;
  const int high = C::kBits == 4 ? 8 * i : 8;
  return {operand<C>(x >> (8 * i) & kLow), operand<C>(y >> (8 * i) & kLow),
          operand<C>(x >> high & kHigh), operand<C>(y >> high & kHigh)};
}

/// Where a lane finds its part of a tile's keys and values: bytes from the tile's start. Rows 8 on
/// have the same swizzle.
template <class C>
struct Places {
  int key[C::kKeyVectors];         // of key g
  int value[C::kValueVectors][2];  // of keys 2 t and 2 t + 1
  __device__ __forceinline__ Places() {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int v = 0; v < C::kKeyVectors; ++v) {
      key[v] = (g * C::kRowBytes + (v * 4 + t) * C::kKeyVector * 4) ^ (C::swizzle(g) * 16);
    }
#pragma unroll
    for (int v = 0; v < C::kValueVectors; ++v) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int row = 2 * t + k;
        value[v][k] =
            (row * C::kRowBytes + (v * 8 + g) * C::kValueVector * 2) ^ (C::swizzle(row) * 16);
      }
    }
  }
};

/// scores += K codes * q^T for the 16 keys at `codes`.
template <class C>
__device__ __forceinline__ void multiply_keys(float (&scores)[C::kTiles][4],
                                              const unsigned char* codes, const Places<C>& places,
                                              const Queries<C>& q) {
  uint32_t words[2][C::kKeyWords];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int v = 0; v < C::kKeyVectors; ++v) {
      load_words<C::kKeyVector>(words[h] + v * C::kKeyVector,
                                codes + places.key[v] + h * 8 * C::kRowBytes);
    }
  }
  constexpr int kWordSteps = C::kBits == 4 ? 2 : 1;
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
    const int w = step / kWordSteps;
    const uint4 a = key_operands<C>(words[0][w], words[1][w], step % kWordSteps);
#pragma unroll
    for (int part = 0; part < Queries<C>::kParts; ++part) {
#pragma unroll
      for (int n = 0; n < C::kTiles; ++n) {
        mma_f16(scores[n], a, q.fragment[part][n][step][0], q.fragment[part][n][step][1]);
      }
    }
  }
}

/// out += V codes^T * w for the 16 keys at `codes`; w as B fragments.
template <class C>
__device__ __forceinline__ void multiply_values(
    float (&out)[C::kTiles][C::kDimTiles][4], const unsigned char* codes, const Places<C>& places,
    const uint32_t (&w)[Queries<C>::kParts][C::kTiles][2]) {
  constexpr int kWords = (C::kValueVector + 1) / 2;  // of a vector
#pragma unroll
  for (int v = 0; v < C::kValueVectors; ++v) {
    uint32_t words[4][kWords];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const unsigned char* from = codes + places.value[v][k % 2] + k / 2 * 8 * C::kRowBytes;
      if constexpr (C::kValueVector == 1) {
        words[k][0] = *reinterpret_cast<const uint16_t*>(from);
      } else {
        load_words<kWords>(words[k], from);
      }
    }
#pragma unroll
    for (int u = 0; u < C::kValueVector; ++u) {
      // A unit of two keys side by side: they are neighbours in the sum.
      const unsigned select = u % 2 == 0 ? 0x5410u : 0x7632u;
      const uint32_t x = __byte_perm(words[0][u / 2], words[1][u / 2], select);
      const uint32_t y = __byte_perm(words[2][u / 2], words[3][u / 2], select);
#pragma unroll
      for (int i = 0; i < C::kUnitTiles; ++i) {
        const uint4 keys = key_operands<C>(x, y, i);
        const uint4 a{keys.x, keys.z, keys.y, keys.w};  // rows are dims: the two of a key are apart
        const int tile = (v * C::kValueVector + u) * C::kUnitTiles + i;
#pragma unroll
        for (int n = 0; n < C::kTiles; ++n) {
          if constexpr (C::kExact) {
            // The tensor cores cut the low bits of a sum, not round them: only short sums there.
            float sum[4] = {};
#pragma unroll
            for (int part = 0; part < Queries<C>::kParts; ++part)
              mma_f16(sum, a, w[part][n][0], w[part][n][1]);
#pragma unroll
            for (int j = 0; j < 4; ++j) out[n][tile][j] += sum[j];
          } else {
            mma_f16(out[n][tile], a, w[0][n][0], w[0][n][1]);
          }
        }
      }
    }
  }
}

/// The dimension of out[.][tile][2 * odd] in lane g.
template <class C>
__device__ __forceinline__ int dim_of(int tile, int odd, int g) {
  const int unit = tile / C::kUnitTiles, v = unit / C::kValueVector, u = unit % C::kValueVector;
  return ((v * 8 + g) * C::kValueVector + u) * C::kUnitDims + tile % C::kUnitTiles * 2 + odd;
}

/// 1 / v, v a power of two.
__device__ __forceinline__ float inverse_of_power(float v) {
  return __int_as_float((254 << 23) - __float_as_int(v));
}

/// Maximum over the lanes of a column.
__device__ __forceinline__ float column_max(float v) {
#pragma unroll
  for (int step = 4; step < kWarp; step *= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, step));
  return v;
}
__device__ __forceinline__ float column_sum(float v) {
#pragma unroll
  for (int step = 4; step < kWarp; step *= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

// ---- The step -----------------------------------------------------------------------------------

/// A warp's running result for its columns, rows 2 t and 2 t + 1 of each tile.
template <class C>
struct Running {
  float out[C::kTiles][C::kDimTiles][4];
  float maximum[C::kTiles][2], sum[C::kTiles][2];
  float zeros[C::kTiles][2];  // w . v_zero
  float value_unit;           // 1 / the unit of Param::v_scale, a power of two

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < C::kDimTiles * 4; ++i) out[n][i / 4][i % 4] = 0.0f;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        maximum[n][c] = kLowest;
        sum[n][c] = zeros[n][c] = 0.0f;
      }
    }
    value_unit = kFirstValueUnit;
  }
  __device__ __forceinline__ void scale_out(int n, int c, float factor) {
    zeros[n][c] *= factor;
#pragma unroll
    for (int i = 0; i < C::kDimTiles; ++i) {
      out[n][i][c] *= factor;
      out[n][i][2 + c] *= factor;
    }
  }
};

/// The parameters of the lane's key, of `count` that there are; moves the unit of the values if its
/// scale exceeds it.
template <class C>
__device__ __forceinline__ Param make_param(Running<C>& r, const unsigned char* raw, float factor,
                                            int count) {
  const int key = threadIdx.x % C::kKeys;
  const auto* scales = reinterpret_cast<const uint16_t*>(raw);
  const unsigned char* zeros = raw + C::kKeys * 4;
  float v_scale = f16_to_float(scales[C::kKeys + key]);
  const float poison = v_scale - v_scale;  // 0, or NaN where it is not finite
  if (poison != 0.0f || key >= count) v_scale = 0.0f;
  if (__any_sync(kAllLanes, v_scale * r.value_unit > 1.0f)) {
    const int bits = warp_max(__float_as_int(v_scale));
    const float unit = __int_as_float((253 - (bits >> 23)) << 23);  // v_scale * unit in [1/2, 1)
    const float change = unit * inverse_of_power(r.value_unit);
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
      r.scale_out(n, 0, change);
      r.scale_out(n, 1, change);
    }
    r.value_unit = unit;
  }
  const float scale = f16_to_float(scales[key]) * factor + poison;
  return {scale, -scale * static_cast<float>(zeros[key]), v_scale * r.value_unit,
          static_cast<float>(zeros[C::kKeys + key])};
}

/// One step: kKeys keys from `key` on, whose codes are in `stage`.
template <class C>
__device__ __forceinline__ void attend(Running<C>& r, const AttentionArgs& a, const Queries<C>& q,
                                       const RowsOfBlock& rows, const Places<C>& places,
                                       const unsigned char* stage, Param* params, int key,
                                       int length, bool all_seen) {
  const int lane = threadIdx.x % kWarp, g = lane / 4;
  const Param mine = make_param(r, stage + 2 * C::kCodeBytes, q.factor, length - key);
  if (lane < C::kKeys) params[lane] = mine;
  float scores[C::kKeyTiles][C::kTiles][4] = {};
#pragma unroll
  for (int m = 0; m < C::kKeyTiles; ++m)
    multiply_keys<C>(scores[m], stage + m * kTileKeys * C::kRowBytes, places, q);
  __syncwarp();

  float4 p[C::kKeyTiles][2];
#pragma unroll
  for (int m = 0; m < C::kKeyTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      p[m][h] = *reinterpret_cast<const float4*>(params + m * kTileKeys + 8 * h + g);
  }

  // log2 of the weights; -inf where a key is not seen.
  float logs[C::kKeyTiles][C::kTiles][4];
  float peak[C::kTiles][2];
  const auto for_scores = [&](auto&& f) {
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int m = 0; m < C::kKeyTiles; ++m) f(m, n, i);
      }
    }
  };
  const auto log_of = [&](int m, int n, int i) {
    const float4& param = p[m][i / 2];
    return fmaf(scores[m][n][i], param.x, fmaf(param.y, q.sum[n][i % 2], -r.maximum[n][i % 2]));
  };
  for_scores([&](int m, int n, int i) { logs[m][n][i] = log_of(m, n, i); });
  Sight<C> sight;
  if (!all_seen) {
    sight.find(a, rows, key, length);
    for_scores([&](int m, int n, int i) {
      const int bit = m * kTileKeys + i / 2 * 8 + g;
      if ((sight.bits[n][i % 2] >> bit & 1) == 0) logs[m][n][i] = -INFINITY;
    });
  }
  bool rises = false;
  for_scores([&](int m, int n, int i) { rises = rises || logs[m][n][i] > kTop; });
  if (__any_sync(kAllLanes, rises)) {
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) peak[n][c] = kLowest;
    }
    // Scores from the start: the difference to kLowest has lost them.
    for_scores([&](int m, int n, int i) {
      const float4& param = p[m][i / 2];
      const float score = fmaf(scores[m][n][i], param.x, param.y * q.sum[n][i % 2]);
      logs[m][n][i] = logs[m][n][i] == -INFINITY ? -INFINITY : score;
      peak[n][i % 2] = fmaxf(peak[n][i % 2], logs[m][n][i]);
    });
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float highest = column_max(peak[n][c]), old = r.maximum[n][c];
        const float now = highest - old > kTop ? highest - kRest : old;
        const float factor = exp2_fast(old - now);
        r.maximum[n][c] = now;
        r.sum[n][c] *= factor;
        r.scale_out(n, c, factor);
      }
    }
    for_scores([&](int m, int n, int i) { logs[m][n][i] -= r.maximum[n][i % 2]; });
  }

#pragma unroll
  for (int m = 0; m < C::kKeyTiles; ++m) {
    uint32_t w[Queries<C>::kParts][C::kTiles][2];
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float left = exp2_fast(logs[m][n][2 * h]), right = exp2_fast(logs[m][n][2 * h + 1]);
        r.sum[n][0] += left;
        r.sum[n][1] += right;
        const float x = left * p[m][h].z, y = right * p[m][h].z;
        const uint32_t pair = pack_f16x2(x, y);
        w[0][n][h] = transpose_8x8(pair);
        float kept_x = half_low(pair), kept_y = half_high(pair);
        if constexpr (C::kExact) {
          const uint32_t rest = pack_f16x2(x - kept_x, y - kept_y);
          w[1][n][h] = transpose_8x8(rest);
          kept_x += half_low(rest);
          kept_y += half_high(rest);
        }
        r.zeros[n][0] = fmaf(kept_x, p[m][h].w, r.zeros[n][0]);
        r.zeros[n][1] = fmaf(kept_y, p[m][h].w, r.zeros[n][1]);
      }
    }
    multiply_values<C>(r.out, stage + C::kCodeBytes + m * kTileKeys * C::kRowBytes, places, w);
  }
}

}  // namespace quarot::cuda::decode
