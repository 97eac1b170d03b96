// What the decode attention (cuda/attention.cu) is compiled for, and the layouts that follow.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/vec.cuh"

namespace quarot::cuda::decode {

constexpr int kWarps = 4;  // of a block
constexpr int kThreads = kWarps * kWarp;
constexpr int kStages = 2;           // of a warp's ring; more were not faster
constexpr int kTileKeys = kMmaRows;  // keys of one product

/// Maximum (log2) and sum of a row's weights in a partial result.
struct Stats {
  float maximum, sum;
};
constexpr float kLowest = -0x1p127f;  // a maximum below any score, and finite

/// Blocks of a cluster: as many as every device with clusters can have.
constexpr int kMostBlocks = 8;

/// What a kernel is compiled for: kTiles * 8 query rows; a cluster of kCluster blocks for one
/// sequence's cache head, or 1; kShort: few keys a step, so that the code is short. Among a model's
/// other kernels it runs from memory: that costs a short text more than its keys.
template <int kDim_, int kBits_, int kTiles_, bool kExact_, bool kPaged_, int kCluster_ = 1,
          bool kShort_ = false>
struct Config {
  static constexpr int kDim = kDim_, kBits = kBits_, kTiles = kTiles_, kCluster = kCluster_;
  static constexpr bool kExact = kExact_, kPaged = kPaged_, kShort = kShort_;
  static constexpr int kRows = kTiles * kMmaColumns;
  static constexpr int kRowBytes = kDim * kBits / 8;
  static constexpr int kKeys = kShort || kRowBytes >= 128 ? 16 : 32;  // of a warp's step
  static constexpr int kKeyTiles = kKeys / kTileKeys;
  static constexpr int kBlockKeys = kWarps * kKeys;
  static constexpr bool kWide = kExact || kDim > 128 || kTiles > 1 || kCluster > 1;
  static constexpr int kBlocks = kWide ? 2 : 4;  // of an SM
  // Not for what is rarely one sequence's decode step.
  static constexpr bool kHasClusters = !kExact && !kPaged;
  static constexpr bool kHasShort = kRowBytes % 32 == 0;  // a lane copies 16 bytes at a time
  using Clustered = Config<kDim, kBits, kTiles, kExact, kPaged, kMostBlocks>;
  using Short = Config<kDim, kBits, kTiles, kExact, kPaged, kMostBlocks, kHasShort>;
  static constexpr int kWordDims = 32 / kBits;
  // 1 / what a code's lowest bit is worth as an operand: the smallest subnormal of fp16, or 1.
  static constexpr float kCodeUnit = kExact ? 1.0f : 0x1p24f;

  // A lane's part of a key's row: kKeyVectors vectors, 4 lanes side by side.
  static constexpr int kKeyWords = kRowBytes / 16;
  static constexpr int kKeyVector = kKeyWords % 4 == 0 ? 4 : kKeyWords % 2 == 0 ? 2 : 1;
  static constexpr int kKeyVectors = kKeyWords / kKeyVector;
  static constexpr int kSteps = kDim / kMmaDepth;  // products a score takes
  // A lane's part of a value's row in 16-bit units, 8 lanes side by side.
  static constexpr int kValueUnits = kRowBytes / 16;
  static constexpr int kValueVector = kValueUnits % 8 == 0   ? 8
                                      : kValueUnits % 4 == 0 ? 4
                                      : kValueUnits % 2 == 0 ? 2
                                                             : 1;
  static constexpr int kValueVectors = kValueUnits / kValueVector;
  static constexpr int kUnitDims = 16 / kBits;
  static constexpr int kUnitTiles = kUnitDims / 2;  // dims of a product's two rows, of one lane
  static constexpr int kDimTiles = kDim / kMmaRows;

  // Shared memory of a warp: stages of [K codes][V codes][raw scales and zeros], then Param[kKeys].
  static constexpr int kCodeBytes = kKeys * kRowBytes;
  static constexpr int kRawBytes = kKeys * 6;  // k_scale, v_scale fp16, k_zero, v_zero uint8
  static constexpr int kStageBytes = 2 * kCodeBytes + kRawBytes;
  static constexpr int kParamBytes = kKeys * 16;
  static constexpr int kWarpBytes = kStages * kStageBytes + kParamBytes;
  static_assert(kStageBytes % 16 == 0 && kCodeBytes % (16 * kWarp) == 0 && kRowBytes % 16 == 0);

  /// Permutes the 16-byte chunks within 128-byte lines, so that both products' reads are free of
  /// bank conflicts: chunk c of key r's row stands at c ^ swizzle(r).
  __device__ static constexpr int swizzle(int key) {
    if constexpr (kRowBytes == 32) return ((key >> 2) & 1) << 1;
    if constexpr (kRowBytes == 64) return ((key >> 1) & 3) << 1;
    if constexpr (kRowBytes >= 128) return (((key >> 1) & 3) << 1) ^ ((key & 1) << 2);
    return 0;
  }
};

}  // namespace quarot::cuda::decode
