// linear_int4's kernel for every GPU from sm_80 and every shape. Maths and weight layout:
// kernels/linear_int4.h.
//
// Weights are operand A of the tensor cores' mma.sync, tokens its columns: even one token fills the
// channels' side. A block computes kChannels x kTokens of the output. Of its warps, kWarpsN lie
// along the channels, kRowTiles tiles of 16 each, and kWarpsK split the columns, each group of
// kWarpsN warps with a ring of shared memory of its own, filled by cp.async:
//
//     ring      kStages stages, each kDepth steps of 64 columns of
//     weights   kRowTiles tiles of 512 B for each warp; a lane reads its 16 B, the A fragments of
//               two mma steps, and widens them by a shift and two ands
//     tokens    kTokenTiles pieces of 8 tokens x 64 columns, which ldmatrix makes B fragments of
//
// At the end the warps' int32 sums meet in shared memory: integer sums are the same in any order,
// so the result is exact and deterministic. With scales of groups of columns, each group's products
// are added to fp32 sums in ascending order: by the lane that has them, or, if kWarpsK warps work
// on several groups at a time, at the end, from shared memory.
//
// Packed activations meet the packed weights in int4 mma (m16n8k64; native before sm_90 only): a
// lane's word of weights is a fragment as it is, if columns are counted in the order of its
// nibbles, 4 t, 32 + 4 t, 4 t + 1, 33 + 4 t, ...; the tokens' nibbles are interleaved alike.
//
// Bound: few tokens: memory, the weights are read once (tokens come from the L1 and L2). ncu, H200,
// one token, 28672 x 4096: 18.9 us alone, 3.25 TB/s or 68 % of the memory's peak, its start and end
// included; the tensor cores are busy 10 % of the time, and half of the cycles between a warp's
// instructions are waits for the copies. Many tokens: the tensor cores' mma.sync rate.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/linear_int4.cuh"
#include "kernels/cuda/device/ptx.cuh"
#include "kernels/cuda/device/vec.cuh"
#include "kernels/linear_int4.h"

namespace quarot::cuda {

// ---- Config -------------------------------------------------------------------------------------

/// How a block is built; see the top of the file.
template <int kRowTiles_, int kTokenTiles_, int kWarpsN_, int kWarpsK_, int kDepth_, int kStages_,
          int kBlocks_>
struct MmaConfig {
  static constexpr int kRowTiles = kRowTiles_;      // of a warp
  static constexpr int kTokenTiles = kTokenTiles_;  // of a warp and of the block
  static constexpr int kWarpsN = kWarpsN_;
  static constexpr int kWarpsK = kWarpsK_;
  static constexpr int kDepth = kDepth_;  // tiles along the columns in a stage
  static constexpr int kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // a processor, at least

  static constexpr int kThreads = kWarp * kWarpsN * kWarpsK;
  static constexpr int kBlockTiles = kRowTiles * kWarpsN;
  static constexpr int kChannels = kTileRows * kBlockTiles;
  static constexpr int kTokens = kTileTokens * kTokenTiles;
  /// A stage: the weight tiles of each warp of the group, then the token tiles.
  static constexpr int kWeightBytes = kDepth * kRowTiles * kTileBytes;
  static constexpr int kStageBytes = kWarpsN * kWeightBytes + kDepth * kTokenTiles * kTileBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  /// The output tile in shared memory, [token][channel]: the padding puts the 4 x 8 values that a
  /// warp writes at a time, tokens 2 t and channels g, into 32 banks.
  static constexpr int kOutStride = kChannels + 4;
  static constexpr int kOutWords = kTokens * kOutStride;
  static constexpr int kSharedBytes =
      kRingBytes > 4 * kOutWords ? kWarpsK * kRingBytes : kWarpsK * 4 * kOutWords;
  static_assert((kStages & (kStages - 1)) == 0 && kStages >= 2);
  static_assert(kWarpsN == 1 || kWarpsK <= 15, "hardware barriers 1-15");
};

/// Of each row of tiles, that are asked for before the kernel before is done.
constexpr int kPrefetchTiles = 2;

// ---- Device helpers -----------------------------------------------------------------------------

/// Nibble i -> byte i.
__device__ __forceinline__ uint32_t spread(uint32_t nibbles) {
  const uint32_t bytes = (nibbles | (nibbles << 8)) & 0x00ff00ffu;
  return (bytes | (bytes << 4)) & 0x0f0f0f0fu;
}

// ---- Kernel -------------------------------------------------------------------------------------

/// Grid: channel blocks x token blocks, the last fastest.
template <class C, bool kGrouped, bool kPacked>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    mma_kernel(const __grid_constant__ LinearInt4Args a, int token_blocks) {
  // Several warps along the columns: the groups' products wait in shared memory for each other.
  constexpr bool kTerms = kGrouped && C::kWarpsK > 1;
  // Of a token in a tile's piece: 16 columns.
  constexpr int kPieceBytes = kPacked ? kLaneBytes / 2 : kLaneBytes;
  constexpr int kTokenTileBytes = kWarp * kPieceBytes;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int wn = warp % C::kWarpsN, wk = warp / C::kWarpsN;
  const int g = lane / 4, t = lane % 4;
  const int block = static_cast<int>(blockIdx.x);
  const int first_tile = block / token_blocks * C::kBlockTiles;
  const int64_t first_token = int64_t{block % token_blocks} * C::kTokens;
  const int k = static_cast<int>(a.k), k_tiles = (k + kTileColumns - 1) / kTileColumns;
  const int row_tiles = static_cast<int>((a.n + kTileRows - 1) / kTileRows);

  // These warps' columns, in tiles: with kTerms whole groups, else any part.
  const int groups = static_cast<int>(a.groups);
  const int unit = kTerms ? k_tiles / groups : 1;
  const int begin = k_tiles / unit * wk / C::kWarpsK * unit;
  const int end = k_tiles / unit * (wk + 1) / C::kWarpsK * unit;
  const int stages = (end - begin + C::kDepth - 1) / C::kDepth;

  // What this lane copies. Beyond the last channel: the last tile, never stored; beyond the last
  // token: nothing, the columns of the product are independent.
  constexpr int kCopies = (C::kTokenTiles + C::kWarpsN - 1) / C::kWarpsN;
  const uint8_t* weights[C::kRowTiles];
  const int8_t* tokens[kCopies];
  bool exists[kCopies];
#pragma unroll
  for (int i = 0; i < C::kRowTiles; ++i) {
    const int tile = min(first_tile + wn * C::kRowTiles + i, row_tiles - 1);
    weights[i] =
        static_cast<const uint8_t*>(a.w) + int64_t{tile} * k_tiles * kTileBytes + lane * kLaneBytes;
  }
  // Lane i holds the 16 columns i / 8 of token i % 8: the order of ldmatrix.
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int64_t token = first_token + (wn + i * C::kWarpsN) * kTileTokens + lane % kTileTokens;
    exists[i] = token < a.m;
    tokens[i] = a.x + (exists[i] ? token : 0) * (kPacked ? a.k / kInt4PerByte : a.k);
  }
  const uint32_t ring = shared_address(dynamic_shared()) + wk * C::kRingBytes;
  const uint32_t ring_weights = wn * C::kWeightBytes + lane * kLaneBytes;
  const uint32_t ring_tokens = C::kWarpsN * C::kWeightBytes;

  // Weights that only one block reads would drive what the kernels between two linears need out of
  // the L2: their instructions above all.
  const uint64_t hint = l2_hint(token_blocks == 1);
  // Columns beyond the end get weights of zero; those beyond k the tokens of 32 columns before.
  const auto copy = [&](int stage) {
    const uint32_t slot = ring + (stage & (C::kStages - 1)) * C::kStageBytes;
    if (stage < stages) {
#pragma unroll
      for (int j = 0; j < C::kDepth; ++j) {
        const int tile = begin + stage * C::kDepth + j;
        const bool valid = tile < end;
        const int at = valid ? tile : end - 1;
#pragma unroll
        for (int i = 0; i < C::kRowTiles; ++i) {
          cp_async_16_or_zero(slot + ring_weights + (j * C::kRowTiles + i) * kTileBytes,
                              weights[i] + int64_t{at} * kTileBytes, valid, hint);
        }
        int column = at * kTileColumns + lane / kTileTokens * kPieceColumns;
        if (column >= k) column -= kStepColumns;
        if (kPacked) column /= static_cast<int>(kInt4PerByte);
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          const int token_tile = wn + i * C::kWarpsN;
          const bool mine = C::kTokenTiles % C::kWarpsN == 0 || token_tile < C::kTokenTiles;
          if (mine && exists[i]) {
            cp_async_l1<kPieceBytes>(slot + ring_tokens +
                                         (j * C::kTokenTiles + token_tile) * kTokenTileBytes +
                                         lane * kPieceBytes,
                                     tokens[i] + column);
          }
        }
      }
    }
    cp_async_commit();
  };

  // The weights depend on no kernel before this one, or if they do, are mended in the L2: their
  // first tiles may be asked for.
  if (lane < C::kRowTiles) {
    const int tile = min(first_tile + wn * C::kRowTiles + lane, row_tiles - 1);
    const int count = min(end - begin, kPrefetchTiles);
    if (count > 0) {
      bulk_prefetch_l2(
          static_cast<const uint8_t*>(a.w) + (int64_t{tile} * k_tiles + begin) * kTileBytes,
          count * kTileBytes, hint);
    }
  }
  if (!kGrouped && threadIdx.x < C::kBlockTiles) {
    prefetch_l2(a.w_scale +
                min((first_tile + static_cast<int>(threadIdx.x)) * int64_t{kTileRows}, a.n - 1));
  }
  start_next_grid();
  wait_for_previous_grid();

  // [part][token][channel]: the parts are groups of columns (kTerms) or of warps.
  float* sums =
      reinterpret_cast<float*>(dynamic_shared() + (kTerms ? C::kWarpsK * C::kRingBytes : 0));
  /// of(i, j, e) of each lane's share of the block's output to sums[part].
  const int rows = kTerms ? static_cast<int>(min(a.m, int64_t{C::kTokens})) : C::kTokens;
  const int part_words = rows * C::kOutStride;
  const auto store_sums = [&](int part, const auto& of) {
    float* own = sums + part * part_words;
#pragma unroll
    for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < C::kTokenTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int token = j * kTileTokens + 2 * t + e % 2;
          const int channel = (wn * C::kRowTiles + i) * kTileRows + g + 8 * (e / 2);
          const float v = of(i, j, e);
          if (!kTerms || token < rows) own[token * C::kOutStride + channel] = v;
        }
      }
    }
  };

  constexpr int kShift = kPacked ? 0 : kCodeShift;
  int acc[C::kRowTiles][C::kTokenTiles][4] = {};
  // Scales of groups of columns: sums, and the scales and code sums of the current group.
  constexpr int kScaledTiles = kGrouped ? C::kRowTiles : 1,
                kScaledTokens = kGrouped ? C::kTokenTiles : 1;
  float y[kScaledTiles][kScaledTokens][4] = {};
  float x_scale[kScaledTokens][2] = {}, w_scale[kScaledTiles][2] = {};
  int x_zero[kScaledTokens][2] = {}, w_sum[kScaledTiles][2] = {};
  const int group_steps = kGrouped ? k / groups / kStepColumns : 0;
  const int last_group = kTerms ? end / unit : groups;
  int group = kTerms ? begin / unit : 0, group_end = group_steps;  // in steps from `begin`
  const auto load_group = [&]() {
#pragma unroll
    for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t row = int64_t{first_tile + wn * C::kRowTiles + i} * kTileRows + g + 8 * h;
        const int64_t at = (row < a.n ? row : a.n - 1) * groups + min(group, groups - 1);
        w_scale[i][h] = a.w_scale[at];
        if (a.x_zero != nullptr) w_sum[i][h] = a.w_sum[at];
      }
    }
  };
  const auto product = [&](int i, int j, int e) {
    const int sum = (acc[i][j][e] >> kShift) - x_zero[j][e % 2] * w_sum[i][e / 2];
    acc[i][j][e] = 0;
    return scaled(sum, x_scale[j][e % 2], w_scale[i][e / 2]);
  };
  const auto end_group = [&]() {
    if constexpr (kTerms) {
      store_sums(group, product);
    } else {
#pragma unroll
      for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < C::kTokenTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) y[i][j][e] = __fadd_rn(y[i][j][e], product(i, j, e));
        }
      }
    }
    ++group;
    group_end += group_steps;
    load_group();
  };
  if constexpr (kGrouped) {
#pragma unroll
    for (int j = 0; j < C::kTokenTiles; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t token = first_token + j * kTileTokens + 2 * t + h;
        const int64_t at = token < a.m ? token : a.m - 1;
        x_scale[j][h] = a.x_scale[at];
        if (a.x_zero != nullptr) x_zero[j][h] = a.x_zero[at];
      }
    }
    load_group();
  }

#pragma unroll
  for (int stage = 0; stage < C::kStages - 1; ++stage) copy(stage);
  for (int stage = 0; stage < stages; ++stage) {
    cp_async_wait<C::kStages - 2>();
    if constexpr (C::kWarpsN == 1) {
      __syncwarp();
    } else {
      barrier_sync(1 + wk, C::kWarpsN * kWarp);
    }
    copy(stage + C::kStages - 1);  // into the slot that was read before the barrier
    const uint32_t slot = ring + (stage & (C::kStages - 1)) * C::kStageBytes;
#pragma unroll
    for (int j = 0; j < C::kDepth; ++j) {
      uint4 w[C::kRowTiles];
      uint32_t x[C::kTokenTiles][4];
#pragma unroll
      for (int i = 0; i < C::kRowTiles; ++i) {
        w[i] = load_shared(slot + ring_weights + (j * C::kRowTiles + i) * kTileBytes);
      }
#pragma unroll
      for (int i = 0; i < C::kTokenTiles; ++i) {
        const uint32_t at = slot + ring_tokens + (j * C::kTokenTiles + i) * kTokenTileBytes;
        if constexpr (kPacked) {
          uint32_t piece[4];  // columns 16 h + 4 t, and 3 more
#pragma unroll
          for (int h = 0; h < 4; ++h) {
            piece[h] = spread(load_shared_half(at + (h * kTileTokens + g) * kPieceBytes + 2 * t));
          }
          x[i][0] = piece[0] | (piece[2] << 4);
          x[i][1] = piece[1] | (piece[3] << 4);
        } else {
          ldmatrix_x4(x[i], at + lane * kLaneBytes);
        }
      }
#pragma unroll
      for (int step = 0; step < (kPacked ? 1 : kSteps); ++step) {
#pragma unroll
        for (int i = 0; i < C::kRowTiles; ++i) {
          const uint4 fragment = kPacked ? w[i] : widen(w[i], step);
#pragma unroll
          for (int n = 0; n < C::kTokenTiles; ++n) {
            if constexpr (kPacked) {
              mma_s4(acc[i][n], fragment, x[n][0], x[n][1]);
            } else {
              mma_s8(acc[i][n], fragment, x[n][2 * step], x[n][2 * step + 1]);
            }
          }
        }
        if constexpr (kGrouped) {
          const int done = (stage * C::kDepth + j) * kSteps + (kPacked ? kSteps : step + 1);
          if (done == group_end && group < last_group) end_group();
        }
      }
    }
  }
  if constexpr (!kTerms) {
    cp_async_wait_all();
    __syncthreads();  // the ring becomes the sums
    store_sums(wk, [&](int i, int j, int e) {
      return kGrouped ? y[i][j][e] : __int_as_float(acc[i][j][e]);
    });
  }
  __syncthreads();

  const int64_t left = a.m - first_token;
  const int count = static_cast<int>(left < C::kTokens ? left : C::kTokens) * C::kChannels;
  for (int i = threadIdx.x; i < count; i += C::kThreads) {
    const int64_t token = first_token + i / C::kChannels;
    const int64_t channel = int64_t{first_tile} * kTileRows + i % C::kChannels;
    if (channel >= a.n) continue;
    const float* at = sums + i / C::kChannels * C::kOutStride + i % C::kChannels;
    float total = 0.0f;
    if constexpr (kGrouped) {
#pragma unroll 8
      for (int p = 0; p < (kTerms ? groups : 1); ++p) {
        total = __fadd_rn(total, at[p * part_words]);
      }
    } else {
      int sum = 0;
#pragma unroll
      for (int p = 0; p < C::kWarpsK; ++p) sum += __float_as_int(at[p * part_words]);
      sum >>= kShift;
      if (a.x_zero != nullptr) sum -= a.x_zero[token] * a.w_sum[channel];
      total = scaled(sum, a.x_scale[token], a.w_scale[channel]);
    }
    finish(a, token, channel, total);
  }
}

// ---- Launcher -----------------------------------------------------------------------------------

template <class C, bool kGrouped>
int64_t mma_shared_bytes(const LinearInt4Args& args) {
  if (!kGrouped || C::kWarpsK == 1) return C::kSharedBytes;
  const int64_t rows = args.m < C::kTokens ? args.m : C::kTokens;
  return C::kWarpsK * C::kRingBytes + args.groups * 4 * rows * C::kOutStride;
}

/// Shared memory of which no processor has enough for two blocks.
inline int64_t alone(int64_t bytes) {
  const DeviceLimits& limits = device_limits();
  const int64_t half = limits.processor_shared_bytes / 2;
  return std::max(bytes, std::min(half, int64_t{limits.block_shared_bytes}));
}

template <class C, bool kGrouped, bool kPacked>
void launch_mma(const LinearInt4Args& args, Stream stream) {
  const int64_t token_blocks = ceil_div(args.m, C::kTokens);
  const int64_t blocks = ceil_div(args.n, C::kChannels) * token_blocks;
  const int64_t bytes = mma_shared_bytes<C, kGrouped>(args);
  const auto run = [&](const auto& how, int64_t shared_bytes) {
    how(&mma_kernel<C, kGrouped, kPacked>, blocks, C::kThreads, static_cast<int>(shared_bytes),
        stream, args, static_cast<int>(token_blocks));
  };
  // Blocks that come to wait beside those of the kernel before are spread unevenly: a gain only
  // where each has a processor for itself, and, if memory is the only bound, all processors one.
  const int64_t processors = device_limits().processors;
  const bool early =
      blocks <= processors && (C::kTokenTiles > 1 || blocks > processors - processors / 8);
  if (early) {
    run([](const auto&... a) { launch_early(a...); }, alone(bytes));
  } else {
    run([](const auto&... a) { launch(a...); }, bytes);
  }
}

}  // namespace quarot::cuda
