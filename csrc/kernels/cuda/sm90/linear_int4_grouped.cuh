// The device side of linear_int4 with scales of groups of columns on sm_90a: int8 wgmma. Maths:
// kernels/linear_int4.h; fragments and widening: linear_int4_prefill.cuh.
//
// At the end of a group its sums are converted, scaled twice and added up in fp32, in the order of
// the definition: four instructions a sum. So instructions count:
//
//     many tokens (Tiles)  A block makes tiles of 256 channels x 64 tokens; two warpgroups have 128
//                          channels each, so that the tokens' scales stay in registers. While one
//                          converts, the other multiplies; the next weights are widened between the
//                          conversions.
//     few tokens (Relay)   A block makes tiles of 64 channels x 16, 32 or 64 tokens; four
//                          warpgroups take turns along the columns, a group each. Each scales its
//                          group's sums, waits for the sum of all groups before, adds its own, and
//                          hands the sum on through shared memory: in ascending order, though four
//                          groups are worked on at a time.
//
// A thread of a further warpgroup fills a ring of stages of 128 columns with the copy engine.
//
// Bound: many tokens, the instructions of the conversions; few, memory and the chain of turns.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "kernels/cuda/device/linear_int4.cuh"
#include "kernels/cuda/device/ptx.cuh"
#include "kernels/cuda/device/vec.cuh"
#include "kernels/cuda/sm90/linear_int4_prefill.cuh"
#include "kernels/linear_int4.h"

namespace quarot::cuda::grouped {

using prefill::kColumns;
using prefill::kGroupChannels;
using prefill::kGroupThreads;
using prefill::kHalfStripBytes;
using prefill::kStrip;
using prefill::kStripBytes;
using prefill::kSwizzleBytes;
using prefill::kTokenTiles;
using prefill::kWidenShift;

constexpr int kHalfColumns = kColumns / 2;
constexpr int kPieceTokens = 16;  // of a box that the copy engine stores
constexpr int kPieceBytes = kPieceTokens * kGroupChannels * 2;
constexpr int kBlock = 8;  // sums of a thread that are worked on together: 16 tokens, two channels

/// Sizes, and the layout of shared memory from a multiple of the swizzle's 1024 bytes. A strip is 64
/// channels; a group is a multiple of kHalves halves of a stage.
template <int kTokens_, int kStrips_, int kWarpgroups_, int kHalves_, int kStages_>
struct Layout {
  static constexpr int kTokens = kTokens_;
  static constexpr int kStrips = kStrips_;          // of a tile
  static constexpr int kWarpgroups = kWarpgroups_;  // that multiply
  static constexpr int kHalves = kHalves_;
  static constexpr int kStages = kStages_;
  static constexpr int kChannels = kStrips * kGroupChannels;
  static constexpr int kSums = kTokens / 2;  // of a thread, of a strip
  static constexpr int kPieces = kTokens / kPieceTokens;
  static constexpr int kThreads = (kWarpgroups + 1) * kGroupThreads;
  // setmaxnreg: the rest of the processor's registers is the producer's.
  static constexpr int kRegisters = kWarpgroups == 2 ? 240 : 112;

  static constexpr int kTokenBytes = kTokens * kColumns;
  static constexpr int kWeightBytes = kChannels / kStrip * kStripBytes;
  static constexpr int kBoxes = kStrips > kWarpgroups ? kStrips : kWarpgroups;
  static constexpr int kWeightsAt = kStages * kTokenBytes;
  static constexpr int kBoxesAt = kWeightsAt + kStages * kWeightBytes;
  static constexpr int kFactorsAt = kBoxesAt + kBoxes * kPieces * kPieceBytes;
  static constexpr int kFactorBytes = 2 * kTokens * 4;  // scales and zeros: of a warpgroup
  static constexpr int kFullAt = kFactorsAt + kWarpgroups * kFactorBytes;
  static constexpr int kEmptyAt = kFullAt + kStages * 8;
  static constexpr int kResidualAt = kEmptyAt + kStages * 8;
  static constexpr int kRestAt = kResidualAt + kWarpgroups * 8 + 16 & ~15;
};

/// Many tokens.
template <int kHalves>
struct TilesConfig : Layout<64, 4, 2, kHalves, 7> {
  using Base = Layout<64, 4, 2, kHalves, 7>;
  static constexpr int kStripsEach = 2;                             // of a warpgroup
  static constexpr int kEmptyArrivals = 2 * kGroupThreads / kWarp;  // of a block of the cluster
  // Weight scales and sums of codes of kFetchGroups groups are fetched together, into two buffers.
  static constexpr int kFetchGroups = 4;
  static constexpr int kFetchBytes = kFetchGroups * kGroupThreads * 4;
  static constexpr int kScalesAt = Base::kRestAt;
  static constexpr int kSumsAt = kScalesAt + 2 * 2 * kFetchBytes;
  static constexpr int kSharedBytes = kSwizzleBytes + kSumsAt + 2 * 2 * kFetchBytes;
  static_assert(kSharedBytes <= prefill::kBlockSharedBytes);
};

/// Few tokens.
template <int kTokens, int kHalves>
struct RelayConfig : Layout<kTokens, 1, 4, kHalves, kTokens == 64 ? 8 : 16> {
  using Base = Layout<kTokens, 1, 4, kHalves, kTokens == 64 ? 8 : 16>;
  static constexpr int kEmptyArrivals = 2 / kHalves * kGroupThreads / kWarp;
  static constexpr int kTotalsAt = Base::kRestAt;
  static constexpr int kSharedBytes = kSwizzleBytes + kTotalsAt + Base::kSums * kGroupThreads * 4;
  static_assert(kSharedBytes <= prefill::kBlockSharedBytes);
};

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
  int pair;             // blocks of a cluster: neighbouring channels, the same tokens
  int stages;           // of k
  bool boxes;           // outputs of 16 bits leave through the copy engine
  bool load_boxes;      // and the residual comes through it
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

using prefill::descriptor;
using prefill::kStepUnits;
using prefill::multiply;
using prefill::Ring;
using prefill::shared_pointer;
using prefill::wait;
using prefill::widen;

/// Where a tile begins.
struct Tile {
  int channel, token;
};

/// Calls body(tile) for each tile of this block: in sets of kTokenTiles token tiles, these for one
/// channel tile after the other.
template <class C, class Body>
__device__ __forceinline__ void for_tiles(const Params& p, const Body& body) {
  const int neighbour = static_cast<int>(cluster_rank());
  const int tiles = p.channel_tiles * p.token_tiles;
  for (int t = blockIdx.x / p.pair; t < tiles; t += gridDim.x / p.pair) {
    const int set = p.set_tiles(t);
    const int rest = t - set * p.set_tiles.divisor();
    const bool whole = (set + 1) * kTokenTiles <= p.token_tiles;
    const int channel = whole ? rest / kTokenTiles : p.last_tokens(rest);
    const int token = rest - channel * (whole ? kTokenTiles : p.last_tokens.divisor());
    body(Tile{(channel * p.pair + neighbour) * C::kChannels,
              (set * kTokenTiles + token) * C::kTokens});
  }
}

template <class C>
__device__ __forceinline__ void fill_ring(const Params& p, uint32_t shared) {
  const int tokens = C::kTokens / p.pair;  // that this block copies, to all blocks of the cluster
  const int first_token = static_cast<int>(cluster_rank()) * tokens;
  const auto blocks = static_cast<uint16_t>((1 << p.pair) - 1);
  Ring<C::kStages> ring;
  for_tiles<C>(p, [&](const Tile& tile) {
    for (int s = 0; s < p.stages; ++s) {
      const uint32_t full = shared + C::kFullAt + ring.stage * 8;
      wait(shared + C::kEmptyAt + ring.stage * 8, ring.parity ^ 1);
      mbarrier_expect(full, C::kTokenBytes + C::kWeightBytes);
      tma_load(shared + C::kWeightsAt + ring.stage * C::kWeightBytes, &p.w, s * (kStripBytes / 4),
               tile.channel / kStrip, full);
      const uint32_t to = shared + ring.stage * C::kTokenBytes + first_token * kColumns;
      if (p.pair == 1) {
        tma_load(to, &p.x, s * kColumns, tile.token, full);
      } else {
        tma_load_multicast(to, &p.x, s * kColumns, tile.token + first_token, full, blocks);
      }
      ring.next();
    }
  });
}

// ---- What both kinds of warpgroups do -----------------------------------------------------------

template <class C>
struct Worker {
  static constexpr int kSums = C::kSums;

  const Params& p;
  uint32_t shared;  // the block's
  int group;        // the warpgroup
  uint32_t thread;  // in the warpgroup

  __device__ __forceinline__ int warp() const { return static_cast<int>(thread) / kWarp; }
  __device__ __forceinline__ int lane() const { return static_cast<int>(thread) % kWarp; }
  __device__ __forceinline__ void sync() const {
    barrier_sync(prefill::kGroupBarrier + group, kGroupThreads);
  }
  /// Of a thread's two channels of a strip: this one and 8 more.
  __device__ __forceinline__ int first_channel() const { return warp() * kStrip + lane() / 4; }

  __device__ __forceinline__ void await_stage(int stage, uint32_t parity) const {
    wait(shared + C::kFullAt + stage * 8, parity);
  }
  /// This warp needs the stage no more, nor does any block that copies to it have to wait for it.
  __device__ __forceinline__ void release_stage(int stage) const {
    if (lane() < p.pair) {
      mbarrier_arrive(cluster_address(shared + C::kEmptyAt + stage * 8, lane()));
    }
  }
  /// This thread's weights of half of a stage.
  __device__ __forceinline__ uint4 weights(int stage, int half, int strip) const {
    return load_shared(shared + C::kWeightsAt + stage * C::kWeightBytes +
                       (strip * 4 + warp()) * kStripBytes + half * kHalfStripBytes + lane() * 16);
  }
  __device__ __forceinline__ uint64_t tokens(int stage, int half) const {
    return descriptor(shared + stage * C::kTokenBytes) + half * 2 * kStepUnits;
  }

  // A warpgroup's scales and zeros of tokens lie so that the four that belong to a block of sums are
  // 16 bytes: token 16 b + 8 j + 2 t + e at 16 b + 4 t + 2 j + e.
  __device__ __forceinline__ static int slot_of(int token) {
    return (token & ~15) | (token >> 1 & 3) << 2 | (token >> 3 & 1) << 1 | (token & 1);
  }
  /// Of the four, the one of element i of a block.
  __device__ __forceinline__ static constexpr int of_four(int i) { return i / 4 * 2 + i % 2; }
  /// Shared [2][kTokens] of this warpgroup: scales / 16, zeros.
  __device__ __forceinline__ float* factors() const {
    return reinterpret_cast<float*>(
        shared_pointer(shared + C::kFactorsAt + group * C::kFactorBytes));
  }
  __device__ __forceinline__ void load_scales(float (&s_x)[4], int b) const {
    const float4 four = *reinterpret_cast<const float4*>(factors() + b * 16 + lane() % 4 * 4);
    s_x[0] = four.x;
    s_x[1] = four.y;
    s_x[2] = four.z;
    s_x[3] = four.w;
  }

  __device__ __forceinline__ void share_tokens(const Tile& tile) const {
    const int in_tile = static_cast<int>(thread) % C::kTokens;
    const int token = min(tile.token + in_tile, static_cast<int>(p.args.m) - 1);
    // Sums are converted as they are, 16 * acc; exact unless the scale is below 2^-122.
    factors()[slot_of(in_tile)] = p.args.x_scale[token] * (1.0f / (1 << kWidenShift));
    const int zero = p.args.x_zero == nullptr ? 0 : p.args.x_zero[token];
    factors()[C::kTokens + slot_of(in_tile)] = __int_as_float(zero << kWidenShift);
    sync();
  }

  /// sums -= 16 * zero * w_sum.
  __device__ __forceinline__ void subtract_zeros(int (&sums)[kSums], const int (&w_sum)[2]) const {
#pragma unroll
    for (int b = 0; b < kSums / kBlock; ++b) {
      const int4 four = *reinterpret_cast<const int4*>(factors() + C::kTokens + b * 16 +
                                                       lane() % 4 * 4);
      const int z[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < kBlock; ++i) sums[b * kBlock + i] -= z[of_four(i)] * w_sum[i / 2 % 2];
    }
  }

  /// (acc * s_x) * s_w of a block. Step by step: a chain would wait.
  __device__ __forceinline__ static void scale_block(float (&v)[kBlock], const int* sums,
                                                     const float (&s_x)[4],
                                                     const float (&s_w)[2]) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) v[i] = static_cast<float>(sums[i]);
#pragma unroll
    for (int i = 0; i < kBlock; ++i) v[i] = __fmul_rn(v[i], s_x[of_four(i)]);
#pragma unroll
    for (int i = 0; i < kBlock; ++i) v[i] = __fmul_rn(v[i], s_w[i / 2 % 2]);
  }

  // -- Outputs of a strip, a block at a time: tokens 16 b to 16 b + 15. Element i is of channel
  // first_channel() + i / 2 % 2 * 8 of the strip and of token:

  __device__ __forceinline__ int token_of(int b, int i) const {
    return 2 * kBlock * b + i / 4 * 8 + lane() % 4 * 2 + i % 2;
  }
  __device__ __forceinline__ uint32_t box(int number, int piece) const {
    return shared + C::kBoxesAt + (number * C::kPieces + piece) * kPieceBytes;
  }
  /// This lane's row of the four 8x8 matrices of its warp in a box: a token's 64 channels are 128
  /// bytes, in the 128-byte swizzle.
  __device__ __forceinline__ uint32_t box_row(int number, int piece) const {
    const int row = lane() / 16 * 8 + lane() % 8;
    const int chunk = warp() * 2 + lane() / 8 % 2;
    return box(number, piece) + row * 128 + ((chunk ^ row % 8) << 4);
  }

  __device__ __forceinline__ void load_bias(float (&bias)[2], const Tile& strip) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int j = min(strip.channel + first_channel() + 8 * h, static_cast<int>(p.args.n) - 1);
      bias[h] = p.args.bias == nullptr ? 0.0f : load1(p.args.bias_dtype, p.args.bias, j);
    }
  }

  /// Begins to copy the residual of a piece to its box; by one thread, after mbarrier_expect.
  __device__ __forceinline__ void fetch_piece(const Tile& strip, int number, int piece) const {
    tma_load(box(number, piece), &p.residual, strip.channel, strip.token + piece * kPieceTokens,
             shared + C::kResidualAt + group * 8);
  }

  /// Adds bias and residual and rounds, to the box.
  __device__ __forceinline__ void finish_box(float (&v)[kBlock], int b, const float (&bias)[2],
                                             int number) const {
    const LinearInt4Args& args = p.args;
    if (args.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) v[i] = __fadd_rn(v[i], bias[i / 2 % 2]);
    }
    const uint32_t row = box_row(number, b);
    uint32_t words[kBlock / 2];  // two tokens each
    if (p.load_boxes) {
      ldmatrix_x4_trans(words, row);
#pragma unroll
      for (int i = 0; i < kBlock / 2; ++i) {
        const bool half = args.residual_dtype == DType::f16;
        const float low = half ? f16_to_float(static_cast<uint16_t>(words[i]))
                               : __uint_as_float(words[i] << 16);
        const float high = half ? f16_to_float(static_cast<uint16_t>(words[i] >> 16))
                                : __uint_as_float(words[i] & 0xffff0000u);
        v[2 * i] = __fadd_rn(v[2 * i], low);
        v[2 * i + 1] = __fadd_rn(v[2 * i + 1], high);
      }
    }
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) {
      words[i] = args.out_dtype == DType::f16 ? pack_f16x2(v[2 * i], v[2 * i + 1])
                                              : pack_bf16x2(v[2 * i], v[2 * i + 1]);
    }
    stmatrix_x4_trans(row, words[0], words[1], words[2], words[3]);
  }
  /// The same of any type, any n: one by one, in a loop, since as straight code it would fill the
  /// instruction cache. The box holds the block.
  __device__ __forceinline__ void finish_elements(const float (&v)[kBlock], int b,
                                                  const Tile& strip, int number) const {
    static_assert(kPieceBytes == kGroupThreads * kBlock * 2);
    float* mine = reinterpret_cast<float*>(shared_pointer(box(number, 0))) + thread * 4;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) mine[i] = half == 0 ? v[i] : v[4 + i];
#pragma unroll 1
      for (int j = 0; j < 4; ++j) {
        const int i = half * 4 + j;
        const int64_t token = strip.token + token_of(b, i);
        const int64_t channel = strip.channel + first_channel() + i / 2 % 2 * 8;
        if (token < p.args.m && channel < p.args.n) finish(p.args, token, channel, mine[j]);
      }
    }
  }

  /// Sends a strip's boxes; by one thread, which commits.
  __device__ __forceinline__ void send_boxes(const Tile& strip, int number) const {
#pragma unroll 1
    for (int piece = 0; piece < C::kPieces; ++piece) {
      tma_store(&p.out, strip.channel, strip.token + piece * kPieceTokens, box(number, piece));
    }
  }
};

// ---- Many tokens --------------------------------------------------------------------------------

template <class C>
struct Tiles : Worker<C> {
  using Base = Worker<C>;
  using Base::group, Base::p, Base::shared, Base::thread;
  static constexpr int kSums = C::kSums;
  static constexpr int kStripsEach = C::kStripsEach;
  static constexpr int kBlocks = kSums / kBlock;
  static_assert(C::kHalves * kStripsEach <= kBlocks);

  Ring<C::kStages> ring;

  __device__ __forceinline__ Tile strip_of(const Tile& tile, int r) const {
    return {tile.channel + (group * kStripsEach + r) * kGroupChannels, tile.token};
  }

  __device__ __forceinline__ void run() {
    uint32_t parity = 0;
    for_tiles<C>(p, [&](const Tile& tile) {
      make_tile(tile, parity);
      parity ^= 1;
    });
    if (thread == 0) tma_store_wait_read<0>();
    __syncwarp();
  }

  __device__ __forceinline__ void make_tile(const Tile& tile, uint32_t parity) {
    this->share_tokens(tile);
    float total[kStripsEach][kSums];
    multiply_groups(total, tile);
    if (p.load_boxes) {
      wait(shared + C::kResidualAt + group * 8, parity);
    } else {
      if (thread == 0) tma_store_wait_read<0>();  // the boxes are free
      this->sync();
    }
#pragma unroll
    for (int r = 0; r < kStripsEach; ++r) {
      const Tile strip = strip_of(tile, r);
      const int number = group * kStripsEach + r;
      float bias[2];
      this->load_bias(bias, strip);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        pin(thread);  // what is worked out from it takes no registers before
        float v[kBlock];
#pragma unroll
        for (int i = 0; i < kBlock; ++i) v[i] = total[r][b * kBlock + i];
        if (p.boxes) {
          this->finish_box(v, b, bias, number);
        } else {
          this->finish_elements(v, b, strip, number);
        }
      }
    }
    async_proxy_fence();
    this->sync();  // boxes are full, factors have been read
    if (thread == 0 && p.boxes) {
#pragma unroll 1
      for (int r = 0; r < kStripsEach; ++r) {
        this->send_boxes(strip_of(tile, r), group * kStripsEach + r);
      }
      tma_store_commit();
    }
  }

  /// Begins to copy some of the residual, so that all has been asked for at the end of k: all at once
  /// would hold up the ring.
  __device__ __forceinline__ void fetch_residual(const Tile& tile, int stage) const {
    if (!p.load_boxes || thread != 0) return;
    constexpr int kAll = kStripsEach * C::kPieces;
    if (stage == 0) {
      tma_store_wait_read<0>();
      mbarrier_expect(shared + C::kResidualAt + group * 8, kAll * kPieceBytes);
    }
    const int end = stage + 1 == p.stages ? kAll : min(stage + 1, kAll);
#pragma unroll 1
    for (int i = min(stage, kAll); i < end; ++i) {
      const int r = i / C::kPieces;
      this->fetch_piece(strip_of(tile, r), group * kStripsEach + r, i % C::kPieces);
    }
  }

  /// Shared [2][channels of the warpgroup][kFetchGroups].
  __device__ __forceinline__ uint32_t fetched(int at, int g) const {
    return shared + at +
           (group * 2 + (g / C::kFetchGroups & 1)) * C::kFetchBytes + (g % C::kFetchGroups) * 4;
  }
  /// Begins to copy what is at `row` of groups [first, first + kFetchGroups); 32-bit words.
  __device__ __forceinline__ void fetch(int at, const void* row, unsigned first) const {
    const auto* from = static_cast<const float*>(row) + first;
    const uint32_t to = fetched(at, first) + thread * (C::kFetchGroups * 4);
    const int groups = static_cast<int>(p.args.groups);
    if (groups % C::kFetchGroups == 0) {
      cp_async_l1<16>(to, from);
    } else {
#pragma unroll
      for (int i = 0; i < C::kFetchGroups; ++i) {
        cp_async_l1<4>(to + i * 4, from + min(i, groups - 1 - static_cast<int>(first)));
      }
    }
  }
  /// What was fetched of group g, of this thread's channels.
  template <class Word>
  __device__ __forceinline__ void load_fetched(Word (&data)[kStripsEach][2], int at,
                                               unsigned g) const {
    const uint32_t from = fetched(at, g) + this->first_channel() * (C::kFetchGroups * 4);
    const auto* words = reinterpret_cast<const Word*>(shared_pointer(from));
#pragma unroll
    for (int r = 0; r < kStripsEach; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        data[r][h] = words[(r * kGroupChannels + h * 8) * C::kFetchGroups];
      }
    }
  }

  /// total = the sum over groups of (acc * s_x) * s_w.
  __device__ __forceinline__ void multiply_groups(float (&total)[kStripsEach][kSums],
                                                  const Tile& tile) {
    const LinearInt4Args& args = p.args;
    const unsigned groups = static_cast<unsigned>(args.groups);
    const int halves = static_cast<int>(args.k) / kHalfColumns;
    const int group_halves = halves / static_cast<int>(groups);
    const int channel = min(strip_of(tile, 0).channel + static_cast<int>(thread),
                            static_cast<int>(args.n) - 1);
    static_assert(kStripsEach * kGroupChannels == kGroupThreads);
    const int64_t row = channel * args.groups;
    const auto fetch_groups = [&](unsigned first) {
      if (first >= groups) return;
      fetch(C::kScalesAt, args.w_scale + row, first);
      if (args.x_zero != nullptr) fetch(C::kSumsAt, args.w_sum + row, first);
    };
    fetch_groups(0);
#pragma unroll
    for (int r = 0; r < kStripsEach; ++r) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) total[r][i] = 0.0f;
    }
    float s_x[kBlocks][4];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) this->load_scales(s_x[b], b);

    int sums[kStripsEach][kSums];
    uint32_t a[C::kHalves][kStripsEach][2][4];
    uint4 next[C::kHalves][kStripsEach];  // weights that are not widened yet
    unsigned g = 0;                       // the group
    const auto load_next = [&](int stage, int half) {
#pragma unroll
      for (int h = 0; h < C::kHalves; ++h) {
#pragma unroll
        for (int r = 0; r < kStripsEach; ++r) {
          next[h][r] = this->weights(stage, half + h, group * kStripsEach + r);
        }
      }
    };
    const auto widen_next = [&](int i) {
      widen(a[i / kStripsEach][i % kStripsEach], next[i / kStripsEach][i % kStripsEach]);
    };
    const auto widen_all = [&] {
#pragma unroll
      for (int i = 0; i < C::kHalves * kStripsEach; ++i) widen_next(i);
    };
    const auto start = [&](int half, bool add) {
      wgmma_fence();
#pragma unroll
      for (int r = 0; r < kStripsEach; ++r) {
#pragma unroll
        for (int h = 0; h < C::kHalves; ++h) {
          multiply(sums[r], a[h][r], this->tokens(ring.stage, half + h), h > 0 || add);
        }
      }
      wgmma_commit();
    };
    float s_w[kStripsEach][2];
    const auto load_group = [&] {
      if (g % C::kFetchGroups == 0) {
        cp_async_wait_all();
        this->sync();
        fetch_groups(g + C::kFetchGroups);
      }
      load_fetched(s_w, C::kScalesAt, g);
    };
    /// Adds a group, and widens what comes next in between.
    const auto convert = [&] {
      if (args.x_zero != nullptr) {
        int w_sum[kStripsEach][2];
        load_fetched(w_sum, C::kSumsAt, g);
#pragma unroll
        for (int r = 0; r < kStripsEach; ++r) this->subtract_zeros(sums[r], w_sum[r]);
      }
      ++g;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        if (b < C::kHalves * kStripsEach) widen_next(b);
#pragma unroll
        for (int r = 0; r < kStripsEach; ++r) {
          float v[kBlock];
          Base::scale_block(v, sums[r] + b * kBlock, s_x[b], s_w[r]);
#pragma unroll
          for (int i = 0; i < kBlock; ++i) {
            total[r][b * kBlock + i] = __fadd_rn(total[r][b * kBlock + i], v[i]);
          }
        }
      }
    };
    const auto next_stage = [&](int used) {
      this->release_stage(used);
    };
    this->await_stage(ring.stage, ring.parity);
    load_next(ring.stage, 0);
    widen_all();
    int done = 0;  // halves of the group
    for (int s = 0; s < p.stages; ++s) {
      fetch_residual(tile, s);
      const int used = ring.stage;
      const bool last = s + 1 == p.stages;
      if constexpr (C::kHalves == 1) {  // a group is half a stage
        start(0, false);
        load_group();
        if (2 * s + 1 < halves) load_next(used, 1);
        wgmma_wait<0>();
        convert();
        if (2 * s + 1 < halves) {
          start(1, false);
          load_group();
        }
      } else {
        start(0, done > 0);
        done += 2;
        if (done == group_halves) load_group();
      }
      ring.next();
      if (!last) {
        this->await_stage(ring.stage, ring.parity);
        load_next(ring.stage, 0);
      }
      wgmma_wait<0>();
      next_stage(used);
      if (C::kHalves == 1 ? 2 * s + 1 < halves : done == group_halves) {
        done = 0;
        convert();
      } else {
        widen_all();
      }
    }
  }
};

// ---- Few tokens ---------------------------------------------------------------------------------

template <class C>
struct Relay : Worker<C> {
  using Base = Worker<C>;
  using Base::group, Base::p, Base::shared, Base::thread;
  static constexpr int kSums = C::kSums;
  /// Barriers: warpgroup w may read the sum.
  static constexpr int kTurnBarrier = prefill::kGroupBarrier + C::kWarpgroups;

  /// The sum so far: for each four sums of a thread 16 bytes a thread.
  __device__ __forceinline__ uint4* totals(int b) const {
    return reinterpret_cast<uint4*>(shared_pointer(shared + C::kTotalsAt)) +
           b * (kBlock / 4) * kGroupThreads + thread;
  }
  __device__ __forceinline__ void await_turn() const {
    barrier_sync(kTurnBarrier + group, 2 * kGroupThreads);
  }
  __device__ __forceinline__ void end_turn() const {
    barrier_arrive(kTurnBarrier + (group + 1) % C::kWarpgroups, 2 * kGroupThreads);
  }

  __device__ __forceinline__ void run() {
    const LinearInt4Args& args = p.args;
    const int groups = static_cast<int>(args.groups), last_row = static_cast<int>(args.n) - 1;
    int stages_before = 0, turns_before = 0;  // of this block's other tiles
    uint32_t parity = 0;                      // of this warpgroup's residuals
    for_tiles<C>(p, [&](const Tile& tile) {
      this->sync();  // the last tile's factors have been read
      this->share_tokens(tile);
      int64_t row[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        row[h] = min(tile.channel + this->first_channel() + 8 * h, last_row) * args.groups;
      }
      int g = (group - turns_before) & (C::kWarpgroups - 1);
      float s_w[2] = {};
      const auto load_scale = [&] {
        if (g >= groups) return;
        s_w[0] = args.w_scale[row[0] + g];
        s_w[1] = args.w_scale[row[1] + g];
      };
      load_scale();
#pragma unroll 1
      for (; g < groups; g += C::kWarpgroups) {
        const bool last = g == groups - 1;
        if (last) free_boxes(tile);
        int sums[kSums];
        multiply_group(sums, g, stages_before);
        if (args.x_zero != nullptr) {
          this->subtract_zeros(sums, {args.w_sum[row[0] + g], args.w_sum[row[1] + g]});
        }
        float term[kSums];
#pragma unroll
        for (int b = 0; b < kSums / kBlock; ++b) {
          float s_x[4], v[kBlock];
          this->load_scales(s_x, b);
          Base::scale_block(v, sums + b * kBlock, s_x, s_w);
#pragma unroll
          for (int i = 0; i < kBlock; ++i) term[b * kBlock + i] = v[i];
        }
        g += C::kWarpgroups;
        load_scale();
        g -= C::kWarpgroups;
        if (turns_before + g > 0) await_turn();
        add(term, g == 0);
        if (!last) hand_on(term);
        end_turn();
        if (!last) continue;
        store(term, tile, parity);
        parity ^= 1;
      }
      stages_before += p.stages;
      turns_before += groups;
    });
    // The last turn was handed on, too.
    if (turns_before > 0 && (turns_before & (C::kWarpgroups - 1)) == group) await_turn();
    if (thread == 0) tma_store_wait_read<0>();
    __syncwarp();
  }

  /// sums = 16 * acc of group g.
  __device__ __forceinline__ void multiply_group(int (&sums)[kSums], int g,
                                                 int stages_before) const {
    const int halves = static_cast<int>(p.args.k) / kHalfColumns;
    const int group_halves = halves / static_cast<int>(p.args.groups);
    const int begin = g * group_halves;
#pragma unroll 1
    for (int i = begin; i < begin + group_halves; i += C::kHalves) {
      const int count = stages_before + i / 2, half = C::kHalves == 2 ? 0 : i % 2;
      const int stage = count & (C::kStages - 1);
      this->await_stage(stage, count / C::kStages & 1);
      uint32_t a[C::kHalves][2][4];
#pragma unroll
      for (int h = 0; h < C::kHalves; ++h) widen(a[h], this->weights(stage, half + h, 0));
      wgmma_fence();
#pragma unroll
      for (int h = 0; h < C::kHalves; ++h) {
        multiply(sums, a[h], this->tokens(stage, half + h), h > 0 || i > begin);
      }
      wgmma_commit();
      wgmma_wait<0>();
      this->release_stage(stage);
      // Each half is released; the last one may be alone.
      if (C::kHalves == 1 && half == 0 && i + 1 == halves) this->release_stage(stage);
    }
  }

  /// term += the sum of all groups before.
  __device__ __forceinline__ void add(float (&term)[kSums], bool first) const {
#pragma unroll
    for (int b = 0; b < kSums / kBlock; ++b) {
      const uint4 low = totals(b)[0], high = totals(b)[kGroupThreads];
      const uint32_t words[kBlock] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const float before = first ? 0.0f : __uint_as_float(words[i]);
        term[b * kBlock + i] = __fadd_rn(before, term[b * kBlock + i]);
      }
    }
  }
  __device__ __forceinline__ void hand_on(const float (&total)[kSums]) const {
#pragma unroll
    for (int v = 0; v < kSums / 4; ++v) {
      totals(0)[v * kGroupThreads] = {
          __float_as_uint(total[4 * v]), __float_as_uint(total[4 * v + 1]),
          __float_as_uint(total[4 * v + 2]), __float_as_uint(total[4 * v + 3])};
    }
  }

  /// This warpgroup's boxes take the residual or outputs.
  __device__ __forceinline__ void free_boxes(const Tile& tile) const {
    if (thread == 0) {
      tma_store_wait_read<0>();
      if (p.load_boxes) {
        mbarrier_expect(shared + C::kResidualAt + group * 8, C::kPieces * kPieceBytes);
#pragma unroll 1
        for (int piece = 0; piece < C::kPieces; ++piece) this->fetch_piece(tile, group, piece);
      }
    }
    this->sync();
  }
  __device__ __forceinline__ void store(const float (&total)[kSums], const Tile& tile,
                                        uint32_t parity) const {
    float bias[2];
    this->load_bias(bias, tile);
    if (p.load_boxes) wait(shared + C::kResidualAt + group * 8, parity);
#pragma unroll
    for (int b = 0; b < kSums / kBlock; ++b) {
      float v[kBlock];
#pragma unroll
      for (int i = 0; i < kBlock; ++i) v[i] = total[b * kBlock + i];
      if (p.boxes) {
        this->finish_box(v, b, bias, group);
      } else {
        this->finish_elements(v, b, tile, group);
      }
    }
    async_proxy_fence();
    this->sync();  // the boxes are full
    if (thread == 0 && p.boxes) {
      this->send_boxes(tile, group);
      tma_store_commit();
    }
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quarot::cuda::grouped
