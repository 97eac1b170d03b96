// What the kernels of linear_int4 share: the weight layout's numbers, and the way from an exact sum
// to an output.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device/vec.cuh"
#include "kernels/linear_int4.h"

namespace quarot::cuda {

constexpr int kTileRows = kLinearInt4Channels;
constexpr int kTileColumns = kLinearInt4Columns;
constexpr int kTileBytes = kLinearInt4TileBytes;
constexpr int kTileTokens = 8;     // of mma's n
constexpr int kLaneBytes = 16;     // of a tile of weights, or of 8 tokens x 64 columns
constexpr int kPieceColumns = 16;  // of ldmatrix's pieces of a row
constexpr int kStepColumns = 32;   // of one int8 mma
constexpr int kSteps = kTileColumns / kStepColumns;
/// Codes are multiplied as 16 times themselves.
constexpr int kCodeShift = 4;

/// What is multiplied: 16 times the codes of a lane's low (step 0) or high nibbles.
__device__ __forceinline__ uint4 widen(const uint4& w, int step) {
  constexpr uint32_t kHighNibbles = 0xf0f0f0f0u;
  if (step == 1) {
    return {w.x & kHighNibbles, w.y & kHighNibbles, w.z & kHighNibbles, w.w & kHighNibbles};
  }
  return {(w.x << 4) & kHighNibbles, (w.y << 4) & kHighNibbles, (w.z << 4) & kHighNibbles,
          (w.w << 4) & kHighNibbles};
}

/// (acc * s_x) * s_w.
__device__ __forceinline__ float scaled(int acc, float x_scale, float w_scale) {
  return __fmul_rn(__fmul_rn(static_cast<float>(acc), x_scale), w_scale);
}

/// Bias, residual, rounding.
__device__ __forceinline__ void finish(const LinearInt4Args& a, int64_t token, int64_t channel,
                                       float y) {
  const int64_t i = token * a.n + channel;
  if (a.bias != nullptr) y = __fadd_rn(y, load1(a.bias_dtype, a.bias, channel));
  if (a.residual != nullptr) y = __fadd_rn(y, load1(a.residual_dtype, a.residual, i));
  store1(a.out_dtype, a.out, i, y);
}

}  // namespace quarot::cuda
