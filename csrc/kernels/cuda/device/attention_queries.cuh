// The query rows of a block of the decode attention, as its products take them
// (attention_step.cuh), and which keys they see.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/device/attention_config.cuh"
#include "kernels/cuda/device/attention_plan.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/vec.cuh"

namespace quarot::cuda::decode {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr int kQueryExponent = 13;  // of the largest query entry, after scaling

__device__ __forceinline__ float half_low(uint32_t pair) {
  return f16_to_float(static_cast<uint16_t>(pair));
}
__device__ __forceinline__ float half_high(uint32_t pair) {
  return f16_to_float(static_cast<uint16_t>(pair >> 16));
}

/// The queries as B fragments, and what scores are made of them with.
template <class C>
struct Queries {
  static constexpr int kParts = C::kExact ? 2 : 1;
  static constexpr DType kRaw = C::kExact ? DType::f32 : DType::f16;  // of as many bits as a query
  static constexpr int kDims = C::kDim / 4;                           // of a row, in one lane
  Chunk<kRaw> raw[C::kTiles][kDims / kChunk];
  uint32_t fragment[kParts][C::kTiles][C::kSteps][2];
  float sum[C::kTiles][2];  // of q, in units of the scores' sums, of the lane's columns
  float factor;             // of a score

  /// Starts the reads, long before `convert` needs them.
  __device__ __forceinline__ void load(const AttentionArgs& a, const RowsOfBlock& rows) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
      const int r = n * kMmaColumns + g;
      const int64_t from = r < rows.rows ? rows.at(a, r) * C::kDim : -1;
#pragma unroll
      for (int i = 0; i < kDims; i += kChunk) {
        constexpr int kVectorDims = C::kKeyVector * C::kWordDims;
        const int dim = (i / kVectorDims * 4 + t) * kVectorDims + i % kVectorDims;
        raw[n][i / kChunk] = from >= 0 ? load_chunk<kRaw>(a.q, from + dim) : Chunk<kRaw>{};
      }
    }
  }

  __device__ __forceinline__ void convert(const AttentionArgs& a) {
    float v[C::kTiles][kDims];
    float largest = 0.0f;
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < kDims; i += kChunk) {
        float chunk[kChunk];
        if (kRaw == DType::f16 && a.dtype == DType::bf16) {
          Chunk<DType::bf16> same;
          same.words[0] = raw[n][i / kChunk].words[0];
          to_floats<DType::bf16>(chunk, same);
        } else {
          to_floats<kRaw>(chunk, raw[n][i / kChunk]);
        }
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          v[n][i + e] = chunk[e];
          const float size = fabsf(chunk[e]);
          if (size < INFINITY) largest = fmaxf(largest, size);
        }
      }
    }
    // Floats of one sign order as their bits do.
    const int bits = warp_max(__float_as_int(largest));
    const int exponent = min(max((bits >> 23) - kQueryExponent, 1), 253 - kQueryExponent);
    const float inverse = __int_as_float(exponent << 23);
    const float unit = __int_as_float((254 - exponent) << 23);
    factor = a.scale * kLog2e * C::kCodeUnit * inverse;
    // A code of one everywhere makes the sum a product.
    constexpr uint32_t kOnes = 0x3c003c00, kHigh = C::kBits == 4 ? 0x4c004c00 : kOnes;  // 1, 16
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
      sum[n][0] = sum[n][1] = 0.0f;
#pragma unroll
      for (int step = 0; step < C::kSteps; ++step) {
        float now[4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // The entries that meet a.x and a.z of multiply_keys.
          constexpr int kApart = C::kBits == 4 ? 4 : 2;
          const int i = C::kBits == 4 ? step / 2 * 8 + step % 2 * 2 + half : step * 4 + half;
          const float shrink = C::kBits == 4 && half == 1 ? unit / 16 : unit;
          const float x = v[n][i] * shrink, y = v[n][i + kApart] * shrink;
          const uint32_t pair = pack_f16x2(x, y);
          fragment[0][n][step][half] = pair;
          if constexpr (C::kExact)
            fragment[1][n][step][half] = pack_f16x2(x - half_low(pair), y - half_high(pair));
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          mma_f16(now, {kOnes, kOnes, kHigh, kHigh}, fragment[part][n][step][0],
                  fragment[part][n][step][1]);
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) sum[n][c] += now[c] / C::kCodeUnit;
      }
    }
  }
};

/// Which keys of a step the lane's columns see, where not all are seen.
template <class C>
struct Sight {
  uint32_t bits[C::kTiles][2];  // bit k: key k of the step

  __device__ __forceinline__ void find(const AttentionArgs& a, const RowsOfBlock& rows, int key,
                                       int length) {
    const int lane = threadIdx.x % kWarp, t = lane % 4;
    const bool one = a.seq == 1 && a.mask_head_stride == 0;  // for all rows
    uint32_t seen = 0;
#pragma unroll 1  // rare, and long
    for (int row = 0; row < (one ? 1 : C::kRows); ++row) {
      const int s = rows.s(row);
      if (row < rows.rows &&
          (row == 0 || a.mask_head_stride != 0 || (rows.first + row) % rows.group == 0)) {
        const int limit = length - static_cast<int>(a.seq) + s + 1;
        bool visible = key + lane < limit && key + lane >= limit - static_cast<int>(a.window);
        if (a.mask != nullptr && visible) {
          visible =
              key + lane < a.mask_keys &&
              a.mask[rows.b * a.mask_batch_stride + rows.query_head(row) * a.mask_head_stride +
                     s * a.mask_seq_stride + key + lane];
        }
        seen = __ballot_sync(kAllLanes, visible);
      }
#pragma unroll
      for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (one || row == n * kMmaColumns + 2 * t + c) bits[n][c] = seen;
      }
    }
  }
};

}  // namespace quarot::cuda::decode
