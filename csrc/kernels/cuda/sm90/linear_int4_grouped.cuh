// The device side of linear_int4 with scales of groups of columns on sm_90a: int8 wgmma. Maths:
// kernels/linear_int4.h; fragments and widening: linear_int4_prefill.cuh. One file, though long:
// both kinds of kernels share a layout, the ring and the way to an output.
//
// At the end of a group its sums are converted, scaled twice and added up in fp32, in the order of
// the definition: four instructions a sum, which is what counts:
//
//     many tokens (Strips) A block makes tiles of 128 channels x 128 or 64 tokens; two warpgroups
//                          have 64 channels each. Of the two halves of its tokens a warpgroup
//                          converts one while the other is multiplied.
//     few tokens (Relay)   A block makes tiles of 64 channels x 16, 32 or 64 tokens; four
//                          warpgroups take turns along the columns, a group or two each. Each
//                          scales its groups' sums, waits for the sum of all groups before, adds
//                          its own, and hands the sum on through shared memory: in ascending order,
//                          though four turns are worked on at a time.
//
// A thread of a further warpgroup fills a ring of stages of 128 columns with the copy engine.
//
// Bound: many tokens, tensor cores and instructions together. A scheduler that issues an
// instruction each cycle keeps wgmma waiting: measured on an H200, the share of time that the
// tensor cores are busy and the instructions a cycle add up to 1.0 to 1.1. A stage of a tile of 128
// x 128 takes 512 cycles of tensor cores and 2 x 360 instructions a scheduler, and was measured to
// take 1240. Few tokens: the instructions of a turn, 240 for two groups of 16 tokens, of four warps
// a scheduler; a stage was measured to take 331 cycles in one group, 391 in two.
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

/// Sizes, and the layout of shared memory from a multiple of the swizzle's 1024 bytes. A group is
/// a multiple of kHalves halves of a stage.
template <int kTokens_, int kStrips_, int kWarpgroups_, int kHalves_, int kStages_>
struct Layout {
  static constexpr int kTokens = kTokens_;
  static constexpr int kStrips = kStrips_;          // of a tile, of 64 channels
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
  static constexpr int kWeightsAt = kStages * kTokenBytes;
  static constexpr int kBoxesAt = kWeightsAt + kStages * kWeightBytes;
  static constexpr int kFactorsAt = kBoxesAt + kWarpgroups * kPieces * kPieceBytes;
  static constexpr int kFactorBytes = 2 * kTokens * 4;  // scales and zeros: of a warpgroup
  static constexpr int kFullAt = kFactorsAt + kWarpgroups * kFactorBytes;
  static constexpr int kEmptyAt = kFullAt + kStages * 8;
  static constexpr int kResidualAt = kEmptyAt + kStages * 8;
  static constexpr int kRestAt = (kResidualAt + kWarpgroups * 8 + 15) & ~15;
};

/// Many tokens. kLong: groups of several steps.
template <int kTokens, int kHalves, bool kLong_>
struct StripsConfig : Layout<kTokens, 2, 2, kHalves, kTokens == 128 ? 7 : 8> {
  using Base = Layout<kTokens, 2, 2, kHalves, kTokens == 128 ? 7 : 8>;
  static constexpr bool kLong = kLong_;
  static constexpr int kEmptyArrivals = 2 * kGroupThreads / kWarp;  // of a block of the cluster
  static constexpr int kSharedBytes = kSwizzleBytes + Base::kRestAt;
  static_assert(kSharedBytes <= prefill::kBlockSharedBytes);
};

/// Few tokens. Groups of at most kRelayColumns.
constexpr int kRelayColumns = 256;
template <int kTokens, int kHalves>
struct RelayConfig : Layout<kTokens, 1, 4, kHalves, kTokens == 64 ? 8 : 16> {
  using Base = Layout<kTokens, 1, 4, kHalves, kTokens == 64 ? 8 : 16>;
  static constexpr int kGroups = kTokens == 64 ? 1 : 2;  // of a turn
  // The parity of a stage's barrier tells neighbouring laps of the ring apart. So a turn must not
  // begin more than a lap after the last stage that is known to be there, of the turn before.
  static_assert((Base::kWarpgroups - 1) * kGroups * kRelayColumns / kColumns < Base::kStages);
  static constexpr bool kSharesStages = kHalves * kGroups == 1;  // a stage is of two turns
  static constexpr int kEmptyArrivals = (kSharesStages ? 2 : 1) * kGroupThreads / kWarp;
  static constexpr int kTurnsAt = Base::kRestAt;  // a barrier a warp
  static constexpr int kTotalsAt = kTurnsAt + Base::kWarpgroups * kGroupThreads / kWarp * 8;
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
  int group_steps;      // of kHalves halves of a stage
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
  uint32_t empty;   // the ring's barriers that this lane, below `pair`, arrives at

  __device__ __forceinline__ int warp() const { return static_cast<int>(thread / kWarp); }
  __device__ __forceinline__ int lane() const { return static_cast<int>(thread % kWarp); }
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
    if (lane() < p.pair) mbarrier_arrive(empty + stage * 8);
  }
  /// This thread's weights of half of a stage.
  __device__ __forceinline__ uint4 weights(int stage, int half, int strip) const {
    return load_shared(shared + C::kWeightsAt + stage * C::kWeightBytes +
                       (strip * 4 + warp()) * kStripBytes + half * kHalfStripBytes + lane() * 16);
  }
  __device__ __forceinline__ uint64_t tokens(int stage, int half) const {
    return descriptor(shared + stage * C::kTokenBytes) + half * 2 * kStepUnits;
  }

  // A warpgroup's scales and zeros of tokens lie so that the four that belong to a block of sums
  // are 16 bytes: token 16 b + 8 j + 2 t + e at 16 b + 4 t + 2 j + e.
  __device__ __forceinline__ static int slot_of(int token) {
    return (token & ~15) | (token >> 1 & 3) << 2 | (token >> 3 & 1) << 1 | (token & 1);
  }
  /// Of the four, the one of element i of a block.
  __device__ __forceinline__ static constexpr int of_four(int i) { return i / 4 * 2 + i % 2; }
  /// Shared [2][kTokens] of this warpgroup: scales, zeros.
  __device__ __forceinline__ uint32_t factors() const {
    return shared + C::kFactorsAt + group * C::kFactorBytes;
  }
  __device__ __forceinline__ uint4 four_of(int which, int b) const {
    return load_shared(factors() + which * C::kTokens * 4 + b * 64 + lane() % 4 * 16);
  }
  /// Begins to copy them.
  __device__ __forceinline__ void fetch_factors(const Tile& tile) const {
    if (thread >= C::kTokens) return;
    const int token = min(tile.token + static_cast<int>(thread), static_cast<int>(p.args.m) - 1);
    const uint32_t to = factors() + slot_of(static_cast<int>(thread)) * 4;
    cp_async_l1<4>(to, p.args.x_scale + token);
    if (p.args.x_zero != nullptr) cp_async_l1<4>(to + C::kTokens * 4, p.args.x_zero + token);
  }
  __device__ __forceinline__ void await_factors() const {
    cp_async_wait_all();
    sync();
  }

  /// Where the weights' scales of this thread's channels of a strip are.
  __device__ __forceinline__ void find_rows(const float* (&rows)[2], const Tile& strip) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int channel =
          min(strip.channel + first_channel() + 8 * h, static_cast<int>(p.args.n) - 1);
      rows[h] = p.args.w_scale + channel * p.args.groups;
    }
  }

  /// sums -= 16 * zero * w_sum of group g; sums are those of the blocks from `first` on.
  template <int kCount>
  __device__ __forceinline__ void subtract_zeros(int (&sums)[kCount], int first, int g,
                                                 const float* const (&rows)[2]) const {
    int w_sum[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      w_sum[h] = p.args.w_sum[rows[h] - p.args.w_scale + g] << kWidenShift;
    }
#pragma unroll
    for (int b = 0; b < kCount / kBlock; ++b) {
      const uint4 four = four_of(1, first + b);
      const uint32_t z[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        sums[b * kBlock + i] -= static_cast<int>(z[of_four(i)]) * w_sum[i / 2 % 2];
      }
    }
  }

  /// What takes 16 * acc to acc: exact unless the scale is below 2^-122.
  __device__ __forceinline__ static float unwiden(float s_w) {
    return s_w * (1.0f / (1 << kWidenShift));
  }
  /// (acc * s_x) * s_w of a block whose scales of tokens are `four`. Step by step: a chain would
  /// wait.
  __device__ __forceinline__ static void scale_block(float (&v)[kBlock], const int* sums,
                                                     const uint4& four, const float (&s_w)[2]) {
    const uint32_t s_x[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      v[i] = __fmul_rn(static_cast<float>(sums[i]), __uint_as_float(s_x[of_four(i)]));
    }
#pragma unroll
    for (int i = 0; i < kBlock; ++i) v[i] = __fmul_rn(v[i], s_w[i / 2 % 2]);
  }

  // -- Outputs of a strip, a block at a time: tokens 16 b to 16 b + 15. Element i is of channel
  // first_channel() + i / 2 % 2 * 8 of the strip and of token:

  __device__ __forceinline__ int token_of(int b, int i) const {
    return 2 * kBlock * b + i / 4 * 8 + lane() % 4 * 2 + i % 2;
  }
  __device__ __forceinline__ uint32_t box(int piece) const {
    return shared + C::kBoxesAt + (group * C::kPieces + piece) * kPieceBytes;
  }
  /// This lane's row of the four 8x8 matrices of its warp in a box: a token's 64 channels are 128
  /// bytes, in the 128-byte swizzle.
  __device__ __forceinline__ uint32_t box_row(int piece) const {
    const int row = lane() / 16 * 8 + lane() % 8;
    const int chunk = warp() * 2 + lane() / 8 % 2;
    return box(piece) + row * 128 + ((chunk ^ row % 8) << 4);
  }

  __device__ __forceinline__ void load_bias(float (&bias)[2], const Tile& strip) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int j = min(strip.channel + first_channel() + 8 * h, static_cast<int>(p.args.n) - 1);
      bias[h] = p.args.bias == nullptr ? 0.0f : load1(p.args.bias_dtype, p.args.bias, j);
    }
  }

  /// Begins to copy the residual, once the last tile's outputs have left the boxes.
  __device__ __forceinline__ void fetch_residual(const Tile& strip) const {
    if (!p.load_boxes || thread != 0) return;
    const uint32_t barrier = shared + C::kResidualAt + group * 8;
    tma_store_wait_read<0>();
    mbarrier_expect(barrier, C::kPieces * kPieceBytes);
#pragma unroll 1
    for (int i = 0; i < C::kPieces; ++i) {
      tma_load(box(i), &p.residual, strip.channel, strip.token + i * kPieceTokens, barrier);
    }
  }

  /// Adds bias and residual and rounds, to the box.
  __device__ __forceinline__ void finish_box(float (&v)[kBlock], int b,
                                             const float (&bias)[2]) const {
    const LinearInt4Args& args = p.args;
    if (args.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) v[i] = __fadd_rn(v[i], bias[i / 2 % 2]);
    }
    const uint32_t row = box_row(b);
    uint32_t words[kBlock / 2];  // two tokens each
    if (p.load_boxes) {
      ldmatrix_x4_trans(words, row);
#pragma unroll
      for (int i = 0; i < kBlock / 2; ++i) {
        const bool half = args.residual_dtype == DType::f16;
        const float low =
            half ? f16_to_float(static_cast<uint16_t>(words[i])) : __uint_as_float(words[i] << 16);
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
                                                  const Tile& strip) const {
    static_assert(kPieceBytes == kGroupThreads * kBlock * 2);
    float* mine = reinterpret_cast<float*>(shared_pointer(box(0))) + thread * 4;
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

  __device__ __forceinline__ void store(const float (&total)[kSums], const Tile& strip,
                                        uint32_t parity) {
    if (p.load_boxes) {
      wait(shared + C::kResidualAt + group * 8, parity);
    } else {
      if (thread == 0) tma_store_wait_read<0>();  // the boxes are free
      sync();
    }
    float bias[2];
    load_bias(bias, strip);
#pragma unroll
    for (int b = 0; b < C::kPieces; ++b) {
      pin(thread);  // what is worked out from it takes no registers before
      float v[kBlock];
#pragma unroll
      for (int i = 0; i < kBlock; ++i) v[i] = total[b * kBlock + i];
      if (p.boxes) {
        finish_box(v, b, bias);
      } else {
        finish_elements(v, b, strip);
      }
    }
    async_proxy_fence();
    sync();  // boxes are full, factors have been read
    if (thread == 0 && p.boxes) {
#pragma unroll 1
      for (int i = 0; i < C::kPieces; ++i) {
        tma_store(&p.out, strip.channel, strip.token + i * kPieceTokens, box(i));
      }
      tma_store_commit();
    }
  }
};

// ---- Many tokens --------------------------------------------------------------------------------

template <class C>
struct Strips : Worker<C> {
  using Base = Worker<C>;
  using Base::group, Base::p, Base::shared, Base::thread;
  static constexpr int kSums = C::kSums;
  static constexpr int kPart = kSums / 2;  // sums of half of the tokens
  static constexpr int kPartBlocks = kPart / kBlock;
  using Weights = uint32_t[C::kHalves][2][4];

  Ring<C::kStages> at{}, next{};  // the stage that is multiplied, and the next one
  int used = 0;                   // the stage that is released next
  uint4 s_x[C::kPieces];          // of the blocks of sums, if there are registers for them

  __device__ __forceinline__ void run() {
    uint32_t parity = 0;
    for_tiles<C>(p, [&](const Tile& tile) {
      const Tile strip{tile.channel + group * kGroupChannels, tile.token};
      float total[kSums];
      multiply_groups(total, strip);
      this->store(total, strip, parity);
      parity ^= 1;
    });
    if (thread == 0) tma_store_wait_read<0>();
    __syncwarp();
  }

  // -- A step: a stage, or half of it

  __device__ __forceinline__ void load_weights(Weights& a, int half) {
    if (half == 0) {
      at = next;
      next.next();
      this->await_stage(at.stage, at.parity);
    }
#pragma unroll
    for (int h = 0; h < C::kHalves; ++h) widen(a[h], this->weights(at.stage, half + h, group));
  }
  /// Starts to multiply with half of the tokens.
  template <int kNumber>
  __device__ __forceinline__ void start(int (&sums)[kPart], const Weights& a, int half, bool add) {
    const uint64_t tokens = this->tokens(at.stage, half) + kNumber * (C::kTokenBytes / 2 / 16);
    wgmma_fence();
#pragma unroll
    for (int h = 0; h < C::kHalves; ++h) {
      multiply(sums, a[h], tokens + h * 2 * kStepUnits, h > 0 || add);
    }
    wgmma_commit();
  }
  __device__ __forceinline__ void release() {
    this->release_stage(used);
    if (++used == C::kStages) used = 0;
  }

  // -- Groups

  static constexpr bool kKeepsScales = C::kTokens == 64 || C::kHalves == 1;
  __device__ __forceinline__ void load_scales() {
    this->await_factors();
#pragma unroll
    for (int b = 0; b < C::kPieces; ++b) s_x[b] = this->four_of(0, b);
  }
  __device__ __forceinline__ uint4 scales_of(int b) const {
    return kKeepsScales ? s_x[b] : this->four_of(0, b);
  }
  struct Scales {
    const float* rows[2];
    float next[2];  // of the next group
    float s_w[2];   // of this one
  };
  __device__ __forceinline__ void next_group(Scales& scales, int g) const {
    const int groups = static_cast<int>(p.args.groups);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      scales.s_w[h] = Base::unwiden(scales.next[h]);
      scales.next[h] = scales.rows[h][min(g + 1, groups - 1)];
    }
  }
  /// total += (acc * s_x) * s_w, of half of the tokens.
  template <int kNumber>
  __device__ __forceinline__ void add(float (&total)[kSums], int (&sums)[kPart],
                                      const Scales& scales, int g) const {
    constexpr int kFirst = kNumber * kPartBlocks;
    if (p.args.x_zero != nullptr) this->subtract_zeros(sums, kFirst, g, scales.rows);
#pragma unroll
    for (int b = 0; b < kPartBlocks; ++b) {
      float v[kBlock];
      this->scale_block(v, sums + b * kBlock, scales_of(kFirst + b), scales.s_w);
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        float& t = total[(kFirst + b) * kBlock + i];
        t = __fadd_rn(t, v[i]);
      }
    }
  }

  /// total = the sum over groups of (acc * s_x) * s_w.
  __device__ __forceinline__ void multiply_groups(float (&total)[kSums], const Tile& strip) {
    this->fetch_factors(strip);
    this->fetch_residual(strip);
    Scales scales;
    this->find_rows(scales.rows, strip);
    scales.next[0] = *scales.rows[0];
    scales.next[1] = *scales.rows[1];
#pragma unroll
    for (int i = 0; i < kSums; ++i) total[i] = 0.0f;
    if constexpr (C::kLong) {
      multiply_long_groups(total, scales);
    } else {
      multiply_short_groups(total, scales);
    }
  }

  __device__ __forceinline__ void multiply_long_groups(float (&total)[kSums], Scales& scales) {
    const int steps = p.group_steps * static_cast<int>(p.args.groups);
    int low[kPart], high[kPart], half = 0, done = 0, g = 0;
    Weights a;
#pragma unroll 1
    for (int s = 0; s < steps; ++s) {
      load_weights(a, half);
      start<0>(low, a, half, done > 0);
      start<1>(high, a, half, done > 0);
      if (s == 0) load_scales();
      wgmma_wait<0>();
      if (C::kHalves == 1) half ^= 1;
      if (half == 0 || s + 1 == steps) release();
      if (++done < p.group_steps) continue;
      done = 0;
      next_group(scales, g);
      add<0>(total, low, scales, g);
      add<1>(total, high, scales, g);
      ++g;
    }
  }

  /// Groups of one step. In pairs, whose weights are in different registers, since one's are still
  /// read when the other's are loaded.
  __device__ __forceinline__ void multiply_short_groups(float (&total)[kSums], Scales& scales) {
    constexpr int kOdd = C::kHalves == 1;  // the half of the stage of an odd group
    const int groups = static_cast<int>(p.args.groups);
    int low[kPart], high[kPart], g = 0;
    Weights even, odd;
    load_weights(even, 0);
    start<0>(low, even, 0, false);
    load_scales();
    const auto finish_low = [&](const Weights& a, int half) {
      start<1>(high, a, half, false);
      next_group(scales, g);
      wgmma_wait<1>();
      add<0>(total, low, scales, g);
    };
    const auto finish_high = [&](Weights& a, int half) {
      load_weights(a, half);
      start<0>(low, a, half, false);
      wgmma_wait<1>();
      if (half == 0) release();
      add<1>(total, high, scales, g);
      ++g;
    };
    const auto finish_last = [&] {
      wgmma_wait<0>();
      release();
      add<1>(total, high, scales, g);
    };
#pragma unroll 1
    while (g + 2 < groups) {
      finish_low(even, 0);
      finish_high(odd, kOdd);
      finish_low(odd, kOdd);
      finish_high(even, 0);
    }
    // Each path to its end: where paths with different wgmmas under way meet, ptxas serializes all.
    if (g + 1 < groups) {
      finish_low(even, 0);
      finish_high(odd, kOdd);
      finish_low(odd, kOdd);
      finish_last();
    } else {
      finish_low(even, 0);
      finish_last();
    }
  }
};

// ---- Few tokens ---------------------------------------------------------------------------------

template <class C>
struct Relay : Worker<C> {
  using Base = Worker<C>;
  using Base::group, Base::p, Base::shared, Base::thread;
  static constexpr int kSums = C::kSums;
  static constexpr int kGroups = C::kGroups;
  using Terms = float[kGroups][kSums];

  // What is worked out from the thread's number, once: a turn is short.
  uint32_t first_weights = 0;           // of the ring
  uint32_t totals = 0;                  // its part of the sum so far
  uint32_t my_turn = 0, next_turn = 0;  // barriers: the sum may be read
  uint32_t turn_parity = 0;

  /// A thread reads what the same one of the warpgroup before wrote: warps take turns.
  __device__ __forceinline__ uint32_t turn(int of) const {
    const int number = of % C::kWarpgroups * (kGroupThreads / kWarp) + this->warp();
    return shared + C::kTurnsAt + number * 8;
  }
  /// Once `terms` have been computed. The compiler would put that off until the turn has come, and
  /// so delay all later ones, if waiting did not depend on it.
  __device__ __forceinline__ void await_turn(const Terms& terms) {
    uint32_t bits = 0;
#pragma unroll
    for (int h = 0; h < kGroups; ++h) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) bits |= __float_as_uint(terms[h][i]);
    }
    wait(my_turn, turn_parity | (bits & (p.pair >> 1)));  // no bit: there are no pairs here
    turn_parity ^= 1;
  }

  __device__ __forceinline__ void run() {
    const int groups = static_cast<int>(p.args.groups);
    const int turns = (groups + kGroups - 1) / kGroups;
    int stages_before = 0, turns_before = 0;  // of this block's other tiles
    uint32_t parity = 0;                      // of this warpgroup's residuals
    first_weights = shared + C::kWeightsAt + this->warp() * kStripBytes + this->lane() * 16;
    totals = shared + C::kTotalsAt + thread * 16;
    my_turn = turn(group);
    next_turn = turn(group + 1);
    pin(first_weights);
    pin(totals);
    pin(my_turn);
    pin(next_turn);
    for_tiles<C>(p, [&](const Tile& tile) {
      this->sync();  // the last tile's factors have been read
      this->fetch_factors(tile);
      this->await_factors();
      const float* rows[2];
      this->find_rows(rows, tile);
      pin(rows[0]);
      pin(rows[1]);
      float next[kGroups][2] = {};  // scales
      const auto fetch_scales = [&](int g) {
#pragma unroll
        for (int h = 0; h < kGroups; ++h) {
          next[h][0] = __ldg(rows[0] + min(g + h, groups - 1));
          next[h][1] = __ldg(rows[1] + min(g + h, groups - 1));
        }
      };
      int t = (group - turns_before) & (C::kWarpgroups - 1);
      if (t < turns) fetch_scales(t * kGroups);
#pragma unroll 1
      for (; t < turns; t += C::kWarpgroups) {
        const int g = t * kGroups;
        const bool last = t == turns - 1, two = kGroups == 2 && g + 1 < groups;
        if (last) this->fetch_residual(tile);
        int sums[kGroups][kSums];
        multiply_groups(sums, stages_before, g, two);
        Terms terms;
#pragma unroll
        for (int h = 0; h < kGroups; ++h) {
          if (p.args.x_zero != nullptr) {
            this->subtract_zeros(sums[h], 0, min(g + h, groups - 1), rows);
          }
          const float s_w[2] = {Base::unwiden(next[h][0]), Base::unwiden(next[h][1])};
#pragma unroll
          for (int b = 0; b < kSums / kBlock; ++b) {
            float v[kBlock];
            this->scale_block(v, sums[h] + b * kBlock, this->four_of(0, b), s_w);
#pragma unroll
            for (int i = 0; i < kBlock; ++i) terms[h][b * kBlock + i] = v[i];
          }
        }
        if (turns_before + t > 0) await_turn(terms);
        float total[kSums];
        add(total, terms, t == 0, two);
        if (!last) hand_on(total);
        mbarrier_arrive(next_turn);  // by each thread: one for a warp is a race to racecheck
        fetch_scales(g + C::kWarpgroups * kGroups);  // not before: the loop would wait for them
        if (!last) continue;
        this->store(total, tile, parity);
        parity ^= 1;
      }
      stages_before += p.stages;
      turns_before += turns;
    });
    if (thread == 0) tma_store_wait_read<0>();
    __syncwarp();
  }

  // -- 16 * acc

  struct Step {
    int stage, half;
    uint32_t parity;
  };
  __device__ __forceinline__ static Step step(int stages_before, int i) {
    const auto count = static_cast<uint32_t>(stages_before + (C::kHalves == 2 ? i : i >> 1));
    return {static_cast<int>(count % C::kStages), C::kHalves == 2 ? 0 : i & 1,
            count / C::kStages & 1};
  }
  __device__ __forceinline__ void load(uint32_t (&a)[C::kHalves][2][4], const Step& s) const {
    this->await_stage(s.stage, s.parity);
#pragma unroll
    for (int h = 0; h < C::kHalves; ++h) {
      widen(a[h], load_shared(first_weights + s.stage * C::kWeightBytes +
                              (s.half + h) * kHalfStripBytes));
    }
  }
  __device__ __forceinline__ void start(int (&sums)[kSums], const uint32_t (&a)[C::kHalves][2][4],
                                        const Step& s, bool add) const {
    const uint32_t tokens = static_cast<uint32_t>(this->tokens(s.stage, s.half));
#pragma unroll
    for (int i = 0; i < C::kHalves * 2; ++i) {
      wgmma_s8(sums, a[i / 2][i % 2], with_low(tokens + i * kStepUnits), i > 0 || add);
    }
  }
  /// The descriptor of tokens whose low word this is.
  __device__ __forceinline__ static uint64_t with_low(uint32_t low) {
    return descriptor(0) >> 32 << 32 | low;
  }

  __device__ __forceinline__ void multiply_groups(int (&sums)[kGroups][kSums], int stages_before,
                                                  int g, bool two) const {
    const int begin = g * p.group_steps;
    if constexpr (kGroups == 2) {
      if (p.group_steps == 1) {
        const Step first = step(stages_before, begin);
        const Step second = step(stages_before, begin + (two ? 1 : 0));
        uint32_t a[2][C::kHalves][2][4];
        load(a[0], first);
        load(a[1], second);
        wgmma_fence();
        start(sums[0], a[0], first, false);
        start(sums[1], a[1], second, false);
        wgmma_commit();
        wgmma_wait<0>();
        this->release_stage(first.stage);
        if (C::kHalves == 2 && two) this->release_stage(second.stage);
        return;
      }
    }
    const int end = begin + (two ? 2 : 1) * p.group_steps;
#pragma unroll
    for (int h = 0; h < kGroups; ++h) {
      const int group_begin = begin + h * p.group_steps;
      multiply_group(sums[h], stages_before, group_begin, min(group_begin + p.group_steps, end),
                     end);
    }
  }
  /// sums = those of the steps from `begin` on before `group_end`; the turn's end before `end`.
  __device__ __forceinline__ void multiply_group(int (&sums)[kSums], int stages_before, int begin,
                                                 int group_end, int end) const {
#pragma unroll 1
    for (int i = begin; i < group_end; ++i) {
      const Step s = step(stages_before, i);
      uint32_t a[C::kHalves][2][4];
      load(a, s);
      wgmma_fence();
      start(sums, a, s, i > begin);
      wgmma_commit();
      wgmma_wait<0>();
      const bool whole = C::kHalves == 2 || s.half == 1;
      if (C::kSharesStages || whole || i + 1 == end) this->release_stage(s.stage);
      // Each half is released; the last one may be alone.
      if (C::kSharesStages && !whole && i + 1 == p.group_steps * p.args.groups) {
        this->release_stage(s.stage);
      }
    }
  }

  // -- The sum of all groups before

  __device__ __forceinline__ void add(float (&total)[kSums], const Terms& terms, bool first,
                                      bool two) const {
#pragma unroll
    for (int b = 0; b < kSums / 4; ++b) {
      uint4 four{};
      if (!first) four = load_shared(totals + b * kGroupThreads * 16);
      const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& t = total[b * 4 + i];
        t = __fadd_rn(__uint_as_float(words[i]), terms[0][b * 4 + i]);
        if (two) t = __fadd_rn(t, terms[kGroups - 1][b * 4 + i]);
      }
    }
  }
  __device__ __forceinline__ void hand_on(const float (&total)[kSums]) const {
#pragma unroll
    for (int b = 0; b < kSums / 4; ++b) {
      store_shared(totals + b * kGroupThreads * 16,
                   {__float_as_uint(total[4 * b]), __float_as_uint(total[4 * b + 1]),
                    __float_as_uint(total[4 * b + 2]), __float_as_uint(total[4 * b + 3])});
    }
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quarot::cuda::grouped
