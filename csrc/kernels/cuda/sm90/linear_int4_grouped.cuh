// The device side of linear_int4 with scales of groups of columns on sm_90a: int8 wgmma. Maths:
// kernels/linear_int4.h; fragments and widening: linear_int4_prefill.cuh.
//
// A group's sums are converted, scaled twice and added up in fp32: four instructions for what the
// tensor cores make of 64 columns in half a cycle's share. So the fewer instructions count:
//
//     conversion  The bits of s = 16 acc + offset, where offset is a power of 2 so large that
//                 s >= 0, read as a float (a denormal one) are s * 2^-149. So one FFMA,
//                     s * 2^-149 * p + q,   p = x_scale * 2^127,  q = -offset * 2^-149 * p,
//                 is acc * x_scale * 2^-18, rounded once, as the definition asks: q is exact. With
//                 x_scale's exponent set to 0, and put back, with the 2^18, into the outputs,
//                 nothing overflows: a power of 2 commutes with each rounding.
//     offset      A product of two constant tiles, 2^20 for each 64 columns: the tensor cores have
//                 the time. With zero points, sums begin with offset - 16 x_zero w_sum.
//
// Many tokens (Tiles): a block makes tiles of 256 channels x 64 tokens, each of two warpgroups 128
// channels, so that a token's p and q stay in registers; while one converts, the other multiplies.
//
// Few tokens (Relay): a block makes tiles of 64 channels x 16, 32 or 64 tokens; four warpgroups
// take turns along the columns, a few groups each. Each scales its groups' sums in registers, then
// waits for the sum of all groups before, adds its own in ascending order, and hands the sum on
// through shared memory.
//
// A thread of a further warpgroup fills a ring of stages of 128 columns with the tensor copy engine.
//
// Bound: many tokens, instructions issued: 192 a group of 64 x 64 outputs and warp, besides widening;
// few, memory.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "kernels/cuda/device/ptx.cuh"
#include "kernels/cuda/device/vec.cuh"
#include "kernels/cuda/sm90/linear_int4_prefill.cuh"
#include "kernels/linear_int4.h"

#ifndef RSTAGES
#define RSTAGES 16
#endif
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
constexpr int kConstantBytes = 128;  // of a constant tile: 8 rows of 16 bytes, for all rows

/// The layout of shared memory, from a multiple of the swizzle's 1024 bytes, and the sizes.
template <int kTokens_, int kStrips_, int kWarpgroups_, int kHalves_, int kStages_, int kRegisters_>
struct Layout {
  static constexpr int kTokens = kTokens_;
  static constexpr int kStrips = kStrips_;          // of 64 channels, of a tile
  static constexpr int kWarpgroups = kWarpgroups_;  // that multiply
  static constexpr int kHalves = kHalves_;          // halves of stages that a group is a multiple of
  static constexpr int kStages = kStages_;
  static constexpr int kRegisters = kRegisters_;  // setmaxnreg
  static constexpr int kChannels = kStrips * kGroupChannels;
  static constexpr int kSums = kTokens / 2;  // of a thread, of a strip
  static constexpr int kPieces = kTokens / kPieceTokens;
  static constexpr int kThreads = (kWarpgroups + 1) * kGroupThreads;

  static constexpr int kTokenBytes = kTokens * kColumns;
  static constexpr int kWeightBytes = kChannels / kStrip * kStripBytes;
  static constexpr int kBoxes = kStrips > kWarpgroups ? kStrips : kWarpgroups;
  static constexpr int kWeightsAt = kStages * kTokenBytes;
  static constexpr int kBoxesAt = kWeightsAt + kStages * kWeightBytes;
  static constexpr int kFactorsAt = kBoxesAt + kBoxes * kPieces * kPieceBytes;
  static constexpr int kFactorBytes = 4 * kTokens * 4;  // p, q, power, zero: of a warpgroup
  static constexpr int kConstantsAt = kFactorsAt + kWarpgroups * kFactorBytes;
  static constexpr int kScalesAt = kConstantsAt + 2 * kConstantBytes;
};

/// Many tokens. kByTensor: the tensor cores add the offset; no zero points then.
#ifndef ORDER
#define ORDER 1
#endif
template <int kHalves, bool kByTensor_, bool kPlain_ = false>
struct TilesConfig : Layout<64, 4, 2, kHalves, 7, 240> {
  using Base = Layout<64, 4, 2, kHalves, 7, 240>;
  static constexpr bool kByTensor = kByTensor_;
  static constexpr bool kPlain = kPlain_;
  static constexpr int kStripsEach = 2;   // of a warpgroup
  static constexpr int kEmptyArrivals = 2 * kGroupThreads / kWarp;  // a block of the cluster
  static constexpr int kScaleGroups = 4;  // whose weight scales are fetched together
  static constexpr int kScaleBytes = kScaleGroups * kGroupThreads * 4;  // one of two buffers
  static constexpr int kSumsAt = Base::kScalesAt + 2 * 2 * kScaleBytes;
  static constexpr int kFullAt = kSumsAt + (kByTensor ? 0 : 2 * 2 * kScaleBytes);
  static constexpr int kEmptyAt = kFullAt + Base::kStages * 8;
  static constexpr int kSharedBytes = kSwizzleBytes + kEmptyAt + Base::kStages * 8;
  static_assert(kSharedBytes <= 227 * 1024);
};

/// Few tokens. A turn has kTurnGroups groups, whole stages.
template <int kTokens, int kHalves, int kTurnGroups_>
struct RelayConfig : Layout<kTokens, 1, 4, kHalves, kTokens == 64 ? 8 : RSTAGES, 112> {
  using Base = Layout<kTokens, 1, 4, kHalves, kTokens == 64 ? 8 : RSTAGES, 112>;
  static constexpr bool kByTensor = false;
  static constexpr bool kPlain = false;
  static constexpr int kTurnGroups = kTurnGroups_;
  static constexpr int kEmptyArrivals = kGroupThreads / kWarp;
  static constexpr int kTotalsAt = Base::kScalesAt;
  static constexpr int kFullAt = kTotalsAt + Base::kSums * kGroupThreads * 4;
  static constexpr int kEmptyAt = kFullAt + Base::kStages * 8;
  static constexpr int kSharedBytes = kSwizzleBytes + kEmptyAt + Base::kStages * 8;
  static_assert(kTurnGroups * kHalves % 2 == 0);
  static_assert(kSharedBytes <= 227 * 1024);
};

struct Params {
  LinearInt4Args args;
  CUtensorMap x;      // int8 [m, k]
  CUtensorMap w;      // 4-byte words [strips, bytes of a strip / 4]
  CUtensorMap out;    // 16-bit [m, n], if stored by the copy engine
  int channel_tiles;  // of a cluster
  int token_tiles;
  FastDiv set_tiles;    // tiles of kTokenTiles token tiles
  FastDiv last_tokens;  // token tiles of the last set
  int pair;             // blocks of a cluster: neighbouring channels, the same tokens
  int stages;           // of k
  bool store_boxes;
};

#ifdef PROBE
__device__ long long g_probe[4][8];
#define LAP(i) do { const long long now_ = clock64(); if (thread == 0 && blockIdx.x == 0) g_probe[group][i] += now_ - lap_; lap_ = now_; } while (0)
#define LAP0 long long lap_ = clock64()
#else
#define LAP(i)
#define LAP0
#endif
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

using prefill::descriptor;
using prefill::kStepUnits;
using prefill::multiply;
using prefill::Ring;
using prefill::shared_pointer;
using prefill::Tile;
using prefill::wait;
using prefill::widen;

/// Calls body(tile) for each tile of this block; the order of prefill::for_tiles.
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
      if (p.pair == 1) {
        tma_load(shared + ring.stage * C::kTokenBytes, &p.x, s * kColumns, tile.token, full);
      } else tma_load_multicast(shared + ring.stage * C::kTokenBytes + first_token * kColumns, &p.x,
                         s * kColumns, tile.token + first_token, full, blocks);
      ring.next();
    }
  });
}

/// Writes the constant tiles whose product is 2^20 for each 32 columns, as uint8.
template <class C>
__device__ __forceinline__ void write_constants(uint32_t shared) {
  // Of each 4 columns 3 * 192 * 192 + 160 * 128 = 2^17.
  constexpr uint32_t kLeft = 0xa0c0c0c0u, kRight = 0x80c0c0c0u;
  auto* words = reinterpret_cast<uint32_t*>(shared_pointer(shared + C::kConstantsAt));
  for (int i = 0; i < kConstantBytes / 4; ++i) {
    words[i] = kLeft;
    words[i + kConstantBytes / 4] = kRight;
  }
  async_proxy_fence();
}
constexpr int kHalfOffsetBits = 20;

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
  /// Of a thread's channels, this one and 8 more.
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

  // A warpgroup's factors of tokens lie so that the four that belong to a block of sums are 16
  // bytes: token 16 b + 8 j + 2 t + e at 16 b + 4 t + 2 j + e.
  __device__ __forceinline__ static int slot_of(int token) {
    return (token & ~15) | (token >> 1 & 3) << 2 | (token >> 3 & 1) << 1 | (token & 1);
  }
  /// Of the four, the one of element i of a block.
  __device__ __forceinline__ static constexpr int of_four(int i) { return i / 4 * 2 + i % 2; }
  enum Factor { kP, kQ, kPower, kZero };
  __device__ __forceinline__ float* factors(Factor f) const {
    return reinterpret_cast<float*>(
               shared_pointer(shared + C::kFactorsAt + group * C::kFactorBytes)) +
           f * C::kTokens;
  }
  __device__ __forceinline__ void load_factors(float (&of)[4], Factor f, int b) const {
    const float4 four = *reinterpret_cast<const float4*>(factors(f) + b * 16 + lane() % 4 * 4);
    of[0] = four.x;
    of[1] = four.y;
    of[2] = four.z;
    of[3] = four.w;
  }

  /// Works out the factors of a tile's tokens; `offset` is that of a group's sums.
  __device__ __forceinline__ void share_tokens(const Tile& tile, float offset) const {
    const int in_tile = static_cast<int>(thread) % C::kTokens;
    const int token = min(tile.token + in_tile, static_cast<int>(p.args.m) - 1);
    const float scale = p.args.x_scale[token];
    const uint32_t bits = __float_as_uint(scale);
    const int exponent = static_cast<int>(bits >> 23 & 0xff);
    const bool normal = exponent > 0 && exponent < 0xff;
    // Of 0, denormal numbers, infinity and NaN, all of it in x.
    const float x = normal ? __uint_as_float((bits & 0x807fffffu) | 0x3f800000u) : scale;
    const int power = (normal ? exponent : 127) + 18;
    const int slot = slot_of(in_tile);
    factors(kP)[slot] = C::kPlain ? scale * 0.0625f : x * 0x1p127f;
    // In the other order of two: the operands of an FFMA then come from both banks of registers.
    factors(kQ)[slot ^ 1] = -x * (offset * 0x1p-22f);
    factors(kPower)[slot] = C::kPlain ? 1.0f : __uint_as_float(static_cast<uint32_t>(min(power, 0xfe)) << 23);
    const int zero = p.args.x_zero == nullptr ? 0 : p.args.x_zero[token];
    factors(kZero)[slot] = __int_as_float(zero * -(1 << kWidenShift));
    sync();
  }

  /// acc * s_x * s_w, but for a power of 2, of element i of a block.
  __device__ __forceinline__ static float scaled(int sum, const float (&xp)[4],
                                                 const float (&xq)[4], const float (&s_w)[2],
                                                 int i) {
    if (C::kPlain) {
      return __fmul_rn(__fmul_rn(static_cast<float>(sum), xp[of_four(i)]), s_w[i / 2 % 2]);
    }
    const float v = __fmaf_rn(__int_as_float(sum), xp[of_four(i)], xq[of_four(i) ^ 1]);
    return __fmul_rn(v, s_w[i / 2 % 2]);
  }

  /// sums = offset - 16 * zero * w_sum.
  __device__ __forceinline__ void begin(int (&sums)[kSums], int offset, const int (&w_sum)[2]) const {
#pragma unroll
    for (int b = 0; b < kSums / kBlock; ++b) {
      float zero[4];
      load_factors(zero, kZero, b);
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        sums[b * kBlock + i] = offset + __float_as_int(zero[of_four(i)]) * w_sum[i / 2 % 2];
      }
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) forget_origin(sums[i]);
  }

  // -- Outputs of a strip, a block at a time: tokens 16 b to 16 b + 15. Element i is of channel
  // first_channel() + i / 2 % 2 * 8 of the strip and of token:

  __device__ __forceinline__ int token_of(int b, int i) const {
    return 2 * kBlock * b + i / 4 * 8 + lane() % 4 * 2 + i % 2;
  }
  /// Where a strip of a tile begins.
  __device__ __forceinline__ static Tile strip_of(const Tile& tile, int strip) {
    return {tile.channel + strip * kGroupChannels, tile.token};
  }

  __device__ __forceinline__ void load_bias(float (&bias)[2], const Tile& strip) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int j = min(strip.channel + first_channel() + 8 * h, static_cast<int>(p.args.n) - 1);
      bias[h] = p.args.bias == nullptr ? 0.0f : load1(p.args.bias_dtype, p.args.bias, j);
    }
  }

  template <DType kDtype>
  __device__ __forceinline__ void add_residual(float (&v)[kBlock], int b, const Tile& strip) const {
    const int m = static_cast<int>(p.args.m), n = static_cast<int>(p.args.n);
    const int first = strip.channel + first_channel();
    float r[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {  // outside, some other element
      const int64_t row = min(strip.token + token_of(b, i), m - 1);
      r[i] = load1<kDtype>(p.args.residual, row * n + min(first + i / 2 % 2 * 8, n - 1));
    }
#pragma unroll
    for (int i = 0; i < kBlock; ++i) v[i] = __fadd_rn(v[i], r[i]);
  }

  /// Stores elements one by one: any n, any type as wide as Bits.
  template <class Bits>
  __device__ __forceinline__ void store_elements(const Bits (&bits)[kBlock], int b,
                                                 const Tile& strip) const {
    const int m = static_cast<int>(p.args.m), n = static_cast<int>(p.args.n);
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const int row = strip.token + token_of(b, i);
      const int channel = strip.channel + first_channel() + i / 2 % 2 * 8;
      if (row < m && channel < n) {
        static_cast<Bits*>(p.args.out)[int64_t{row} * n + channel] = bits[i];
      }
    }
  }

  __device__ __forceinline__ uint32_t box(int number, int piece) const {
    return shared + C::kBoxesAt + (number * C::kPieces + piece) * kPieceBytes;
  }

  /// Bias, residual, rounding; to memory, or to the box.
  __device__ __forceinline__ void store_block(float (&v)[kBlock], int b, const Tile& strip,
                                              const float (&bias)[2], int box_number) const {
    const LinearInt4Args& args = p.args;
    float power[4];
    load_factors(power, kPower, b);
#pragma unroll
    for (int i = 0; i < kBlock; ++i) v[i] = __fmul_rn(v[i], power[of_four(i)]);
    if (args.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) v[i] = __fadd_rn(v[i], bias[i / 2 % 2]);
    }
    if (args.residual != nullptr) {
      switch (args.residual_dtype) {
        case DType::f32:
          add_residual<DType::f32>(v, b, strip);
          break;
        case DType::f16:
          add_residual<DType::f16>(v, b, strip);
          break;
        case DType::bf16:
          add_residual<DType::bf16>(v, b, strip);
          break;
      }
    }
    if (args.out_dtype == DType::f32) return store_elements(v, b, strip);
    uint32_t words[kBlock / 2];  // two tokens each
    if (args.out_dtype == DType::f16) {
#pragma unroll
      for (int i = 0; i < kBlock / 2; ++i) words[i] = pack_f16x2(v[2 * i], v[2 * i + 1]);
    } else {
#pragma unroll
      for (int i = 0; i < kBlock / 2; ++i) words[i] = pack_bf16x2(v[2 * i], v[2 * i + 1]);
    }
    if (p.store_boxes) {
      // A token's 64 channels are 128 bytes of the box, in the 128-byte swizzle.
      const int row = lane() / 16 * 8 + lane() % 8;
      const int chunk = warp() * 2 + lane() / 8 % 2;
      stmatrix_x4_trans(box(box_number, b) + row * 128 + ((chunk ^ row % 8) << 4), words[0],
                        words[1], words[2], words[3]);
      return;
    }
    uint16_t halves[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      halves[i] = static_cast<uint16_t>(words[i / 2] >> i % 2 * 16);
    }
    store_elements(halves, b, strip);
  }

  /// This warpgroup's boxes are free.
  __device__ __forceinline__ void await_boxes() const {
    if (thread == 0) tma_store_wait_read<0>();
    sync();
  }
  /// Sends a full box; by one thread, which commits.
  __device__ __forceinline__ void send_box(const Tile& strip, int box_number) const {
#pragma unroll 1
    for (int piece = 0; piece < C::kPieces; ++piece) {
      tma_store(&p.out, strip.channel, strip.token + piece * kPieceTokens, box(box_number, piece));
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

  Ring<C::kStages> ring;

  __device__ __forceinline__ int first_strip() const { return group * kStripsEach; }

  /// Weight scales, or sums of codes, of kScaleGroups groups of this warpgroup's channels, [channel]
  /// [group]; two buffers.
  __device__ __forceinline__ uint32_t fetched(int at) const {
    return shared + at + group * 2 * C::kScaleBytes;
  }
  __device__ __forceinline__ void fetch(int at, const void* row, int first) const {
    const int groups = static_cast<int>(p.args.groups);
    if (first >= groups) return;
    const auto* from = static_cast<const float*>(row);
    const uint32_t to =
        fetched(at) + (first & C::kScaleGroups) * (C::kScaleBytes / C::kScaleGroups) + thread * 16;
    if (groups % 4 == 0) {
      cp_async_l1<16>(to, from + first);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) cp_async_l1<4>(to + i * 4, from + min(first + i, groups - 1));
    }
  }

  __device__ __forceinline__ void run() {
    if (ORDER && group == 1) barrier_arrive(kTurnBarrier, 2 * kGroupThreads);
    for_tiles<C>(p, [&](const Tile& tile) { make_tile(tile); });
    if (ORDER && group == 0) barrier_sync(kTurnBarrier, 2 * kGroupThreads);
    if (thread == 0) tma_store_wait_read<0>();
    __syncwarp();
  }

  __device__ __forceinline__ void make_tile(const Tile& tile) {
    const LinearInt4Args& args = p.args;
    const int groups = static_cast<int>(args.groups);
    const int halves = static_cast<int>(args.k) / kHalfColumns, group_halves = halves / groups;
    this->share_tokens(tile, static_cast<float>(
                                 C::kByTensor ? group_halves << kHalfOffsetBits : kAnyOffset));
    float total[kStripsEach][kSums];
    multiply_groups(total, tile, group_halves, halves);
    this->await_boxes();
#pragma unroll
    for (int r = 0; r < kStripsEach; ++r) {
      const Tile strip = Base::strip_of(tile, first_strip() + r);
      float bias[2];
      this->load_bias(bias, strip);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        pin(thread);  // what is worked out from it takes no registers before
        float v[kBlock];
#pragma unroll
        for (int i = 0; i < kBlock; ++i) v[i] = total[r][b * kBlock + i];
        this->store_block(v, b, strip, bias, first_strip() + r);
      }
    }
    async_proxy_fence();
    this->sync();  // boxes are full, factors have been read
    if (thread == 0 && p.store_boxes) {
#pragma unroll 1
      for (int r = first_strip(); r < first_strip() + kStripsEach; ++r) {
        this->send_box(Base::strip_of(tile, r), r);
      }
      tma_store_commit();
    }
  }

  /// total = the sum over groups.
  __device__ __forceinline__ void multiply_groups(float (&total)[kStripsEach][kSums],
                                                  const Tile& tile, int group_halves, int halves) {
    const LinearInt4Args& args = p.args;
    const int channel = min(tile.channel + first_strip() * kGroupChannels + static_cast<int>(thread),
                            static_cast<int>(args.n) - 1);
    const float* scale_row = args.w_scale + channel * args.groups;
    const int32_t* sum_row = args.w_sum + channel * args.groups;
    const auto fetch_groups = [&](int first) {
      fetch(C::kScalesAt, scale_row, first);
      if (!C::kByTensor && args.x_zero != nullptr) fetch(C::kSumsAt, sum_row, first);
    };
    fetch_groups(0);
    float xp[kBlocks][4], xq[kBlocks][4];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      this->load_factors(xp[b], Base::kP, b);
      this->load_factors(xq[b], Base::kQ, b);
    }
    int sums[kStripsEach][kSums];
#pragma unroll
    for (int r = 0; r < kStripsEach; ++r) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) total[r][i] = 0.0f;
    }
    int of = 0;  // the group
    const bool never = p.pair == 0;  // a constant makes the compiler move sums about
    const uint64_t left = (shared + C::kConstantsAt) >> 4 & 0x3fff;
    const uint64_t right = left + (kConstantBytes >> 4);

    /// What was fetched of group `of`, of this thread's channels.
    const auto of_group = [&](int at, auto (&data)[kStripsEach][2]) {
      using Word = std::remove_reference_t<decltype(data[0][0])>;
      const auto* from = reinterpret_cast<const Word*>(
          shared_pointer(fetched(at) + (of & C::kScaleGroups) * (C::kScaleBytes / C::kScaleGroups) +
                         (of & (C::kScaleGroups - 1)) * 4 + this->first_channel() * 16));
#pragma unroll
      for (int r = 0; r < kStripsEach; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) data[r][h] = from[(r * kGroupChannels + h * 8) * 4];
      }
    };
    const auto await_groups = [&] {
      if ((of & (C::kScaleGroups - 1)) != 0) return;
      cp_async_wait_all();
      this->sync();
      fetch_groups(of + C::kScaleGroups);
    };
    uint32_t a[C::kHalves][kStripsEach][2][4];
    const auto widen_half = [&](int slot, int half) {
#pragma unroll
      for (int r = 0; r < kStripsEach; ++r) {
        widen(a[slot][r], this->weights(ring.stage, half, first_strip() + r));
      }
    };
    const auto start_half = [&](int slot, int half, bool add) {
      if (!C::kByTensor && !C::kPlain && !add) {
        int w_sum[kStripsEach][2] = {};
        if (args.x_zero != nullptr) {
          await_groups();
          of_group(C::kSumsAt, w_sum);
        }
#pragma unroll
        for (int r = 0; r < kStripsEach; ++r) this->begin(sums[r], kAnyOffset, w_sum[r]);
      }
      wgmma_fence();
#pragma unroll
      for (int r = 0; r < kStripsEach; ++r) {
        if (C::kByTensor) wgmma_u8(sums[r], left, right, add);
        multiply(sums[r], a[slot][r], this->tokens(ring.stage, half), C::kPlain ? add : true);
      }
      wgmma_commit();
    };
    const auto await_turn = [&] {
      if (ORDER) barrier_sync(kTurnBarrier + group, 2 * kGroupThreads);
    };
    const auto end_turn = [&] {
      if (ORDER) barrier_arrive(kTurnBarrier + (group ^ 1), 2 * kGroupThreads);
    };
    float s_w[kStripsEach][2];
    const auto load_scales = [&] {
      if (C::kByTensor || args.x_zero == nullptr) await_groups();
      of_group(C::kScalesAt, s_w);
      ++of;
    };
    const auto convert = [&] {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        float v[kStripsEach][kBlock];
#pragma unroll
        for (int r = 0; r < kStripsEach; ++r) {
#pragma unroll
          for (int i = 0; i < kBlock; ++i) {
            v[r][i] = Base::scaled(sums[r][b * kBlock + i], xp[b], xq[b], s_w[r], i);
          }
        }
#pragma unroll
        for (int r = 0; r < kStripsEach; ++r) {
#pragma unroll
          for (int i = 0; i < kBlock; ++i) {
            total[r][b * kBlock + i] = __fadd_rn(total[r][b * kBlock + i], v[r][i]);
          }
        }
      }
    };
    const auto next_stage = [&] {
      this->release_stage(ring.stage);
      ring.next();
    };
    if constexpr (C::kHalves == 1) {  // a group is half a stage
      for (int s = 0; s < p.stages; ++s) {
        const auto half_stage = [&](int half, bool last) {
          widen_half(0, half);
          await_turn();
          start_half(0, half, (C::kByTensor || C::kPlain) && never);
          if (ORDER == 1) end_turn();
          load_scales();
          wgmma_wait<0>();
          if (ORDER == 2) end_turn();
          if (last) next_stage();
          convert();
        };
        this->await_stage(ring.stage, ring.parity);
        half_stage(0, 2 * s + 1 == halves);
        if (2 * s + 1 == halves) break;
        half_stage(1, true);
      }
    } else {
      int done = 0;
      for (int s = 0; s < p.stages; ++s) {
        this->await_stage(ring.stage, ring.parity);
        widen_half(0, 0);
        widen_half(C::kHalves - 1, 1);
        await_turn();
        start_half(0, 0, done > 0);
        start_half(C::kHalves - 1, 1, true);
        if (ORDER == 1) end_turn();
        done += 2;
        if (done == group_halves) load_scales();
        wgmma_wait<0>();
        if (ORDER == 2) end_turn();
        next_stage();
        if (done < group_halves) continue;
        done = 0;
        convert();
      }
    }
  }

  /// Barriers: warpgroup w may multiply.
  static constexpr int kTurnBarrier = prefill::kGroupBarrier + C::kWarpgroups;
  static constexpr int kAnyOffset = 1 << 23;
};

// ---- Few tokens ---------------------------------------------------------------------------------

template <class C>
struct Relay : Worker<C> {
  using Base = Worker<C>;
  using Base::group, Base::p, Base::shared, Base::thread;
  static constexpr int kSums = C::kSums;
  static constexpr int kTurnGroups = C::kTurnGroups;
  static constexpr int kOffset = 1 << 23;
  /// Barriers: warpgroup w may read the sum.
  static constexpr int kTurnBarrier = prefill::kGroupBarrier + C::kWarpgroups;

  /// The sum so far: for each four sums of a thread 16 bytes a thread.
  __device__ __forceinline__ uint4* totals(int b) const {
    return reinterpret_cast<uint4*>(shared_pointer(shared + C::kTotalsAt)) +
           b * (kBlock / 4) * kGroupThreads + thread;
  }

  __device__ __forceinline__ void run() {
    const LinearInt4Args& args = p.args;
    const int groups = static_cast<int>(args.groups), last_row = static_cast<int>(args.n) - 1;
    const int turns = static_cast<int>(ceil_div(groups, kTurnGroups));
    int stages_before = 0, turns_before = 0;  // of this block's other tiles
    for_tiles<C>(p, [&](const Tile& tile) {
      this->sync();  // the last tile's factors have been read
      this->share_tokens(tile, static_cast<float>(kOffset));
      int64_t row[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        row[h] = min(tile.channel + this->first_channel() + 8 * h, last_row) * args.groups;
      }
      float s_w[kTurnGroups][2];
      const auto load_scales = [&](int turn) {
#pragma unroll
        for (int r = 0; r < kTurnGroups; ++r) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            s_w[r][h] = args.w_scale[row[h] + min(turn * kTurnGroups + r, groups - 1)];
          }
        }
      };
      int turn = (group - turns_before) & (C::kWarpgroups - 1);
      load_scales(turn);
      for (; turn < turns; turn += C::kWarpgroups) {
        float term[kTurnGroups][kSums];
#pragma unroll
        for (int r = 0; r < kTurnGroups; ++r) {
          if (turn * kTurnGroups + r < groups) {
            scale_group(term[r], turn * kTurnGroups + r, stages_before, row, s_w[r]);
          }
        }
        load_scales(turn + C::kWarpgroups);
        add_in_turn(term, tile, turn, turns, turns_before + turn == 0);
      }
      stages_before += p.stages;
      turns_before += turns;
    });
    // The last turn was handed on, too.
    if (turns_before > 0 && (turns_before & (C::kWarpgroups - 1)) == group) await_turn();
    if (thread == 0) tma_store_wait_read<0>();
    __syncwarp();
  }

  /// term = the group's sums, scaled.
  __device__ __forceinline__ void scale_group(float (&term)[kSums], int g, int stages_before,
                                              const int64_t (&row)[2], const float (&s_w)[2]) const {
    const LinearInt4Args& args = p.args;
    const int halves = static_cast<int>(args.k) / kHalfColumns;
    const int group_halves = halves / static_cast<int>(args.groups);
    int w_sum[2] = {};
    if (args.x_zero != nullptr) {
      w_sum[0] = args.w_sum[row[0] + g];
      w_sum[1] = args.w_sum[row[1] + g];
    }
    LAP0;
    int sums[kSums];
    this->begin(sums, kOffset, w_sum);
    LAP(0);
    for (int i = g * group_halves; i < (g + 1) * group_halves; i += C::kHalves) {
      const int count = stages_before + i / 2, half = C::kHalves == 2 ? 0 : i % 2;
      const int stage = count & (C::kStages - 1);
      if (half == 0) this->await_stage(stage, count / C::kStages & 1);
      LAP(1);
      uint32_t a[C::kHalves][2][4];
#pragma unroll
      for (int h = 0; h < C::kHalves; ++h) widen(a[h], this->weights(stage, half + h, 0));
      wgmma_fence();
#pragma unroll
      for (int h = 0; h < C::kHalves; ++h) {
        multiply(sums, a[h], this->tokens(stage, half + h), true);
      }
      wgmma_commit();
      LAP(2);
      wgmma_wait<0>();
      LAP(3);
      if (C::kHalves == 2 || half == 1 || i + 1 == halves) this->release_stage(stage);
    }
#pragma unroll
    for (int b = 0; b < kSums / kBlock; ++b) {
      float xp[4], xq[4];
      this->load_factors(xp, Base::kP, b);
      this->load_factors(xq, Base::kQ, b);
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        term[b * kBlock + i] = Base::scaled(sums[b * kBlock + i], xp, xq, s_w, i);
      }
    }
#ifdef PROBE
#pragma unroll
    for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(term[i]));
#endif
    LAP(4);
  }

  __device__ __forceinline__ void await_turn() const {
    barrier_sync(kTurnBarrier + group, 2 * kGroupThreads);
  }
  __device__ __forceinline__ void end_turn() const {
    barrier_arrive(kTurnBarrier + (group + 1) % C::kWarpgroups, 2 * kGroupThreads);
  }

  /// Adds the terms to the sum of all groups before, and hands it on or stores it.
  __device__ __forceinline__ void add_in_turn(const float (&term)[kTurnGroups][kSums],
                                              const Tile& tile, int turn, int turns,
                                              bool first_of_all) const {
    const int groups = static_cast<int>(p.args.groups);
    const bool last = turn == turns - 1;
    float bias[2];
    if (last) {
      this->load_bias(bias, tile);
      this->await_boxes();
    }
    LAP0;
    if (!first_of_all) await_turn();
    LAP(5);
#pragma unroll
    for (int b = 0; b < kSums / kBlock; ++b) {
      float v[kBlock] = {};
      if (turn > 0) {
        const uint4 low = totals(b)[0], high = totals(b)[kGroupThreads];
        const uint32_t words[kBlock] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < kBlock; ++i) v[i] = __uint_as_float(words[i]);
      }
#pragma unroll
      for (int r = 0; r < kTurnGroups; ++r) {
        if (turn * kTurnGroups + r >= groups) continue;
#pragma unroll
        for (int i = 0; i < kBlock; ++i) v[i] = __fadd_rn(v[i], term[r][b * kBlock + i]);
      }
      if (last) {
        this->store_block(v, b, tile, bias, group);
        continue;
      }
      uint32_t words[kBlock];
#pragma unroll
      for (int i = 0; i < kBlock; ++i) words[i] = __float_as_uint(v[i]);
      totals(b)[0] = {words[0], words[1], words[2], words[3]};
      totals(b)[kGroupThreads] = {words[4], words[5], words[6], words[7]};
    }
    end_turn();
    LAP(6);
    if (!last) return;
    async_proxy_fence();
    this->sync();  // the boxes are full
    if (thread == 0 && p.store_boxes) {
      this->send_box(tile, group);
      tma_store_commit();
    }
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quarot::cuda::grouped
