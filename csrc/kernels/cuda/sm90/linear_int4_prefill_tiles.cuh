// How the work of linear_int4_prefill.cuh is cut: the sizes of a tile and of shared memory, and
// which tiles and columns are whose. The design is described there.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "kernels/cuda/device/ptx.cuh"
#include "kernels/cuda/device/vec.cuh"
#include "kernels/linear_int4.h"

namespace quarot::cuda::prefill {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kConsumers = 4;       // warpgroups that multiply
constexpr int kThreads = (kConsumers + 1) * kGroupThreads;
// setmaxnreg: a launch has 96 registers for each of 640 threads; the producer leaves its own.
constexpr int kConsumerRegisters = 112;
constexpr int kProducerRegisters = 24;

constexpr int kGroupChannels = 64;  // of a warpgroup: wgmma's rows
constexpr int kChannels = kConsumers * kGroupChannels;
constexpr int kColumns = 128;  // of a stage: a row of the 128-byte swizzle

// The weight layout: strips of 16 channels, 512 bytes for 64 columns.
constexpr int kStrip = 16;
constexpr int kHalfStripBytes = 512;
constexpr int kStripBytes = 2 * kHalfStripBytes;  // of a stage
constexpr int kGroupWeightBytes = kGroupChannels / kStrip * kStripBytes;
constexpr int kWeightBytes = kConsumers * kGroupWeightBytes;

// Outputs of a warpgroup leave in pieces; a box of the copy engine is one.
constexpr int kPieceTokens = 16;
constexpr int kPieceSums = kPieceTokens / 2;  // of a thread
constexpr int kPieceBytes = kPieceTokens * kGroupChannels * 2;
constexpr int kPieceSumBytes = kPieceSums * kGroupThreads * 4;

constexpr int kMaxCluster = 8;  // blocks: more are not portable
/// Pieces of other blocks that a block receives at most, if a tile has `pieces`.
constexpr int most_received(int pieces) {
  int most = 0;
  for (int parts = 2; parts <= kMaxCluster; ++parts) {
    const int received = (pieces + parts - 1) / parts * (parts - 1);
    most = received > most ? received : most;
  }
  return most;
}

constexpr int kSwizzleBytes = 1024;
constexpr int kBlockSharedBytes = 227 * 1024;  // sm_90's limit

/// What depends on the tokens of a tile.
template <int kTokens_>
struct Config {
  static constexpr int kTokens = kTokens_;
  static constexpr int kSums = kTokens / 2;  // of a thread
  static constexpr int kPieces = kTokens / kPieceTokens;

  // Shared memory, from a multiple of the swizzle's 1024 bytes: boxes of outputs, scales and zeros
  // of each warpgroup's tokens, scales and code sums of its channels, barriers; and the ring has
  // the rest.
  static constexpr int kTokenBytes = kTokens * kColumns;
  static constexpr int kBoxBytes = kConsumers * kPieces * kPieceBytes;
  static constexpr int kTokenScaleBytes = kConsumers * kTokens * 4;
  static constexpr int kChannelScaleBytes = kConsumers * kGroupChannels * 4;
  static constexpr int kBarrierBytes = 256;
  static constexpr int kStages = (kBlockSharedBytes - kSwizzleBytes - kBoxBytes -
                                  2 * kTokenScaleBytes - 2 * kChannelScaleBytes - kBarrierBytes) /
                                 (kTokenBytes + kWeightBytes);
  static constexpr int kWeightsAt = kStages * kTokenBytes;
  static constexpr int kPiecesAt = kWeightsAt + kStages * kWeightBytes;
  static constexpr int kScalesAt = kPiecesAt + kBoxBytes;
  static constexpr int kZerosAt = kScalesAt + kTokenScaleBytes;
  static constexpr int kChannelScalesAt = kZerosAt + kTokenScaleBytes;
  static constexpr int kChannelSumsAt = kChannelScalesAt + kChannelScaleBytes;
  static constexpr int kFullAt = kChannelSumsAt + kChannelScaleBytes;
  static constexpr int kEmptyAt = kFullAt + kStages * 8;
  static constexpr int kResidualAt = kEmptyAt + kStages * 8;
  static constexpr int kSentAt = kResidualAt + kConsumers * 8;
  static constexpr int kSharedBytes = kSwizzleBytes + kSentAt + kConsumers * 8;
  static_assert(2 * (kStages + kConsumers) * 8 <= kBarrierBytes);
  static_assert(kTokenBytes % kSwizzleBytes == 0 && kPieceBytes % kSwizzleBytes == 0);
  // The ring holds what the parts of k exchange.
  static_assert(most_received(kConsumers* kPieces) * kPieceSumBytes <= kPiecesAt);
};

/// The first of the warpgroups' barriers; 0 is __syncthreads.
constexpr int kGroupBarrier = 1;

/// sums are 16 * acc.
constexpr int kWidenShift = 4;
/// Of a block's first tile, that are asked for before the kernel before is done. More of them, from
/// all blocks, would push each other out of the L2.
constexpr int kPrefetchStages = 3;
/// Token tiles that are worked on together, so that their activations and the weights meet in L2.
constexpr int kTokenTiles = 16;

struct Params {
  LinearInt4Args args;
  CUtensorMap x;         // int8 [m, k]
  CUtensorMap w;         // 4-byte words [strips, bytes of a strip / 4]
  CUtensorMap out;       // 16-bit [m, n], if stored by the copy engine
  CUtensorMap residual;  // the same, if loaded by the copy engine
  int channel_tiles;     // of a cluster
  int token_tiles;
  FastDiv set_tiles;    // tiles of kTokenTiles token tiles
  FastDiv last_tokens;  // token tiles of the last set
  int stages;           // of k
  int cluster;          // blocks
  int pair;             // blocks of a cluster that have neighbouring whole tiles
  int whole_tiles;      // of a cluster
  bool parted;          // its blocks share the columns of each
  FastDiv parts;        // `cluster` then
  int narrow_tiles;     // of a cluster, after the whole ones; token tiles are one set then
  int narrow_groups;    // warpgroups that have channels there
  int copied_groups;    // warpgroups whose weights are copied; more than need them in narrow tiles
  int narrow_channel;   // the first one
  FastDiv narrow_tokens;  // token tiles
  bool boxes;             // outputs of 16 bits leave through the copy engine
  bool load_boxes;        // and the residual comes through it
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// A place in the ring of stages, and the parity of its phase.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

/// Where a tile begins, the stages [first, last) of this block's part of k, and how many
/// warpgroups have channels.
struct Tile {
  int channel, token;
  int first, last;
  int groups;
};

/// Tile t of block `rank` of a cluster: in sets of kTokenTiles token tiles, these for one channel
/// tile after the other.
template <class C>
__device__ __forceinline__ Tile tile_at(const Params& p, int t, int rank) {
  const int set = p.set_tiles(t);
  const int rest = t - set * p.set_tiles.divisor();
  const bool whole = (set + 1) * kTokenTiles <= p.token_tiles;
  const int channel = whole ? rest / kTokenTiles : p.last_tokens(rest);
  const int token = rest - channel * (whole ? kTokenTiles : p.last_tokens.divisor());
  const int first_token = (set * kTokenTiles + token) * C::kTokens;
  if (p.parted) {
    return {channel * kChannels, first_token, p.stages * rank / p.cluster,
            p.stages * (rank + 1) / p.cluster, kConsumers};
  }
  return {(channel * p.pair + rank) * kChannels, first_token, 0, p.stages, kConsumers};
}

/// The same of narrow tiles.
template <class C>
__device__ __forceinline__ Tile narrow_tile(const Params& p, int t, int rank) {
  const int column = p.narrow_tokens(t);
  const int channels = p.narrow_groups * kGroupChannels;
  return {p.narrow_channel + (column * p.pair + rank) * channels,
          (t - column * p.narrow_tokens.divisor()) * C::kTokens, 0, p.stages, p.narrow_groups};
}

/// The number of this block's cluster, and the block's in it.
__device__ __forceinline__ int cluster_of(const Params& p) {
  return static_cast<int>(blockIdx.x) / p.cluster;
}
__device__ __forceinline__ int rank_of(const Params& p) {
  return static_cast<int>(blockIdx.x) % p.cluster;
}

/// Calls body(tile) for each tile of this block.
template <class C, class Body>
__device__ __forceinline__ void for_tiles(const Params& p, const Body& body) {
  const int cluster = cluster_of(p), rank = rank_of(p);
  const int clusters = static_cast<int>(gridDim.x) / p.cluster;
  bool narrow = false;
  for (int t = cluster; !narrow; t += clusters) {
    narrow = t >= p.whole_tiles;
    if (narrow && cluster >= p.narrow_tiles) return;
    body(narrow ? narrow_tile<C>(p, cluster, rank) : tile_at<C>(p, t, rank));
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quarot::cuda::prefill
