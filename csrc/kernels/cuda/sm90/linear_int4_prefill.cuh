// The device side of linear_int4 for many tokens on sm_90a: int8 wgmma. Maths:
// kernels/linear_int4.h. One file, though long: producer, multiplication and outputs share a layout
// of shared memory and of registers.
//
// Products are out^T[channels, tokens] = w[channels, k] * x[tokens, k]^T: int4 weights are operand
// A of wgmma, which may come from registers, so they are widened there and nowhere else. A lane's
// 16 bytes of the prepacked layout, uint8 [ceil(n / 16), ceil(k / 64), 32 lanes, 16], are the words
// a0..a3 of its A fragment: the low nibbles for the first 32 columns, the high nibbles for the next
// 32. A shift and a mask make of them 16 times the codes as int8; sums are 16 * acc, exact while
// k < 2^17.
//
// A block makes tiles of 256 output channels x 128 or 64 tokens: four warpgroups multiply, 64
// channels each; a thread of a fifth one fills a ring of stages of 128 columns with the tensor copy
// engine, activations in the 128-byte swizzle that wgmma reads. With four, there is always one that
// keeps the tensor cores busy while others widen, convert or store. Outputs are transposed through
// shared memory and stored by the copy engine where rows are aligned.
//
//     cluster of `pair` = 2 blocks: neighbouring channels; each copies half of the activations, to
//                       both
//     cluster of `split` blocks: parts of k, where there are fewer tiles than processors; the sums,
//                       which are exact, are exchanged through shared memory, a piece of tokens
//                       each
//
// Grouped scales: the sums of a group are converted and added up in fp32 at its end; 64 tokens,
// since a thread holds both kinds of sums.
//
// Bound: the int8 tensor cores, at the clock that the power limit leaves; with grouped scales, the
// conversions.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <type_traits>

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
constexpr int kWeightBytes = kChannels / kStrip * kStripBytes;

// Outputs of a warpgroup leave in pieces; a box of the copy engine is one.
constexpr int kPieceTokens = 32;
constexpr int kPieceSums = kPieceTokens / 2;
constexpr int kPieceBytes = kPieceTokens * kGroupChannels * 2;

constexpr int kSwizzleBytes = 1024;

/// What depends on the tokens of a tile.
template <int kTokens_, bool kGrouped_>
struct Config {
  static constexpr int kTokens = kTokens_;
  static constexpr bool kGrouped = kGrouped_;
  static constexpr int kSums = kTokens / 2;  // of a thread
  static constexpr int kPieces = kTokens / kPieceTokens;

  // Shared memory, from a multiple of the swizzle's 1024 bytes.
  static constexpr int kStages = kTokens == 128 ? 4 : 7;  // what fits
  static constexpr int kTokenBytes = kTokens * kColumns;
  static constexpr int kWeightsAt = kStages * kTokenBytes;
  static constexpr int kPiecesAt = kWeightsAt + kStages * kWeightBytes;
  static constexpr int kScalesAt = kPiecesAt + kConsumers * kPieces * kPieceBytes;
  static constexpr int kZerosAt = kScalesAt + kConsumers * kTokens * 4;
  static constexpr int kFullAt = kZerosAt + kConsumers * kTokens * 4;
  static constexpr int kEmptyAt = kFullAt + kStages * 8;
  static constexpr int kSharedBytes = kSwizzleBytes + kEmptyAt + kStages * 8;
};

/// The first of the warpgroups' barriers; 0 is __syncthreads.
constexpr int kGroupBarrier = 1;

/// sums are 16 * acc.
constexpr int kWidenShift = 4;
/// Token tiles that are worked on together, so that their activations and the weights meet in L2.
constexpr int kTokenTiles = 16;

struct Params {
  LinearInt4Args args;
  CUtensorMap x;      // int8 [m, k]
  CUtensorMap w;      // 4-byte words [strips, bytes of a strip / 4]
  CUtensorMap out;    // 16-bit [m, n], if stored by the copy engine
  int channel_tiles;  // of a cluster
  int token_tiles;
  FastDiv set_tiles;    // tiles of kTokenTiles token tiles
  FastDiv last_tokens;  // token tiles of the last set
  int pair, split;      // blocks of a cluster; a power of 2 each
  bool store_boxes;
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

/// A block's place in its cluster, and the stages [first, last) of its part of k.
struct Place {
  int neighbour, part;
  int first, last;
};
__device__ __forceinline__ Place place(const Params& p) {
  const int rank = static_cast<int>(cluster_rank());
  const int part = rank / p.pair;
  const int stages = static_cast<int>(ceil_div(p.args.k, kColumns));
  return {rank % p.pair, part, stages * part / p.split, stages * (part + 1) / p.split};
}

/// Where a tile begins.
struct Tile {
  int channel, token;
};

/// Calls body(tile) for each tile of this block: in sets of kTokenTiles token tiles, these for one
/// channel tile after the other.
template <class C, class Body>
__device__ __forceinline__ void for_tiles(const Params& p, int neighbour, const Body& body) {
  const int blocks = p.pair * p.split;
  const int tiles = p.channel_tiles * p.token_tiles;
  for (int t = blockIdx.x / blocks; t < tiles; t += gridDim.x / blocks) {
    const int set = p.set_tiles(t);
    const int rest = t - set * p.set_tiles.divisor();
    const bool whole = (set + 1) * kTokenTiles <= p.token_tiles;
    const int channel = whole ? rest / kTokenTiles : p.last_tokens(rest);
    const int token = rest - channel * (whole ? kTokenTiles : p.last_tokens.divisor());
    body(
        Tile{(channel * p.pair + neighbour) * kChannels, (set * kTokenTiles + token) * C::kTokens});
  }
}

// ---- Producer -----------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void fill_ring(const Params& p, uint32_t shared) {
  const Place me = place(p);
  const int tokens = C::kTokens / p.pair;  // that this block copies
  const int first_token = me.neighbour * tokens;
  const auto blocks = static_cast<uint16_t>(((1 << p.pair) - 1) << (me.part * p.pair));
  Ring<C::kStages> ring;
  for_tiles<C>(p, me.neighbour, [&](const Tile& tile) {
    for (int s = me.first; s < me.last; ++s) {
      const uint32_t full = shared + C::kFullAt + ring.stage * 8;
      wait(shared + C::kEmptyAt + ring.stage * 8, ring.parity ^ 1);
      mbarrier_expect(full, C::kTokenBytes + kWeightBytes);
      tma_load(shared + C::kWeightsAt + ring.stage * kWeightBytes, &p.w, s * (kStripBytes / 4),
               tile.channel / kStrip, full);
      tma_load_multicast(shared + ring.stage * C::kTokenBytes + first_token * kColumns, &p.x,
                         s * kColumns, tile.token + first_token, full, blocks);
      ring.next();
    }
  });
}

// ---- Consumers ----------------------------------------------------------------------------------

/// wgmma's descriptor of rows of kColumns bytes in the 128-byte swizzle.
__device__ __forceinline__ uint64_t descriptor(uint32_t shared) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kRows8 = uint64_t{8 * kColumns >> 4} << 32;  // from 8 rows to the next 8
  constexpr uint64_t kUnused = uint64_t{1} << 16;
  return kSwizzle128 | kRows8 | kUnused | (shared >> 4 & 0x3fff);
}
/// From one step of 32 columns to the next, in the descriptor's units of 16 bytes.
constexpr int kStepUnits = 2;

/// The A fragments of two steps of 32 columns, times 16, from the words of the weight layout.
__device__ __forceinline__ void widen(uint32_t (&a)[2][4], const uint4& w) {
  const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[0][i] = words[i] << kWidenShift & 0xf0f0f0f0u;
    a[1][i] = words[i] & 0xf0f0f0f0u;
    pin(a[0][i]);
    pin(a[1][i]);
  }
}

/// sums (+)= 64 columns.
template <int kSums>
__device__ __forceinline__ void multiply(int (&sums)[kSums], const uint32_t (&a)[2][4], uint64_t x,
                                         bool add) {
  wgmma_s8(sums, a[0], x, add);
  wgmma_s8(sums, a[1], x + kStepUnits, true);
}

/// The inverse of shared_address.
__device__ __forceinline__ unsigned char* shared_pointer(uint32_t shared) {
  return dynamic_shared() + (shared - shared_address(dynamic_shared()));
}

/// What a thread knows of its two channels, first and first + 8.
struct Channels {
  int first;
  float scale[2], bias[2];
  int sum[2];
};

template <class C>
struct Consumer {
  static constexpr bool kGrouped = C::kGrouped;
  static constexpr int kSums = C::kSums;
  using Sum = std::conditional_t<kGrouped, float, int>;

  const Params& p;
  uint32_t shared;  // the block's
  Place me;
  int group;        // the warpgroup
  uint32_t thread;  // in the warpgroup
  Ring<C::kStages> ring;

  /// Shared [kTokens] of this warpgroup.
  __device__ __forceinline__ float* scales() const {
    return reinterpret_cast<float*>(shared_pointer(shared + C::kScalesAt)) + group * C::kTokens;
  }
  __device__ __forceinline__ int* zeros() const {
    return reinterpret_cast<int*>(shared_pointer(shared + C::kZerosAt)) + group * C::kTokens;
  }
  __device__ __forceinline__ int warp() const { return static_cast<int>(thread) / kWarp; }
  __device__ __forceinline__ int lane() const { return static_cast<int>(thread) % kWarp; }
  __device__ __forceinline__ void sync() const {
    barrier_sync(kGroupBarrier + group, kGroupThreads);
  }
  __device__ __forceinline__ int first_channel(const Tile& tile) const {
    return tile.channel + group * kGroupChannels + warp() * kStrip + lane() / 4;
  }

  __device__ __forceinline__ Channels load_channels(const Tile& tile) const {
    const LinearInt4Args& args = p.args;
    Channels c{};
    c.first = first_channel(tile);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int j = min(c.first + 8 * h, static_cast<int>(args.n) - 1);
      if (!kGrouped) c.scale[h] = args.w_scale[j];
      if (!kGrouped && args.x_zero != nullptr) c.sum[h] = args.w_sum[j];
      if (args.bias != nullptr) c.bias[h] = load1(args.bias_dtype, args.bias, j);
    }
    return c;
  }

  // -- Multiply

  __device__ __forceinline__ void await_stage() const {
    wait(shared + C::kFullAt + ring.stage * 8, ring.parity);
  }
  /// This thread's weights of half of the stage.
  __device__ __forceinline__ uint4 weights(int half) const {
    return load_shared(shared + C::kWeightsAt + ring.stage * kWeightBytes +
                       (group * 4 + warp()) * kStripBytes + half * kHalfStripBytes + lane() * 16);
  }
  __device__ __forceinline__ uint64_t tokens() const {
    return descriptor(shared + ring.stage * C::kTokenBytes);
  }
  /// This warp needs the stage no more, nor does any block that copies to it have to wait for it.
  __device__ __forceinline__ void release_stage() {
    if (lane() < p.pair) {
      mbarrier_arrive(
          cluster_address(shared + C::kEmptyAt + ring.stage * 8, me.part * p.pair + lane()));
    }
    ring.next();
  }

  /// sums = 16 * acc of this block's part of k.
  __device__ __forceinline__ void multiply_tile(int (&sums)[kSums]) {
    for (int s = me.first; s < me.last; ++s) {
      await_stage();
      uint32_t a[2][4], b[2][4];
      widen(a, weights(0));
      widen(b, weights(1));
      wgmma_fence();
      multiply(sums, a, tokens(), s > me.first);
      multiply(sums, b, tokens() + 2 * kStepUnits, true);
      wgmma_commit();
      wgmma_wait<0>();
      release_stage();
    }
  }

  // Scales and zeros of a warpgroup's tokens lie so that the four that belong to a thread's block
  // of kBlock sums are 16 bytes: token 16 b + 8 j + 2 t + e at 16 b + 4 t + 2 j + e.
  static constexpr int kBlock = 8;
  __device__ __forceinline__ static int slot_of(int token) {
    return (token & ~15) | (token >> 1 & 3) << 2 | (token >> 3 & 1) << 1 | (token & 1);
  }
  /// Of block b of sums: element i is of token i / 4 * 2 + i % 2 of the four.
  __device__ __forceinline__ float4 four_tokens(const float* data, int b) const {
    return *reinterpret_cast<const float4*>(data + b * 16 + lane() % 4 * 4);
  }
  __device__ __forceinline__ int4 four_tokens(const int* data, int b) const {
    return *reinterpret_cast<const int4*>(data + b * 16 + lane() % 4 * 4);
  }

  /// sums -= 16 * zero * w_sum.
  __device__ __forceinline__ void subtract_zeros(int (&sums)[kSums], const int (&w_sum)[2]) const {
#pragma unroll
    for (int b = 0; b < kSums; b += kBlock) {
      const int4 four = four_tokens(zeros(), b / kBlock);
      const int z[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        sums[b + i] -= (z[i / 4 * 2 + i % 2] << kWidenShift) * w_sum[i / 2 % 2];
      }
    }
  }

  /// total = the sum over groups of (acc * s_x) * s_w.
  __device__ __forceinline__ void multiply_groups(float (&total)[kSums], const Tile& tile) {
    const LinearInt4Args& args = p.args;
    const int halves = static_cast<int>(args.k / 64);
    const int group_halves = halves / static_cast<int>(args.groups);
    int sums[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) total[i] = 0.0f;
    const int groups = static_cast<int>(args.groups), last_row = static_cast<int>(args.n) - 1;
    const int channel = first_channel(tile);
    const int row[2] = {min(channel, last_row) * groups, min(channel + 8, last_row) * groups};
    int of = 0, done = 0;  // the group, and its halves so far
    float next[2] = {args.w_scale[row[0]], args.w_scale[row[1]]};
    const auto convert = [&] {
      const float s_w[2] = {next[0], next[1]};
      int w_sum[2] = {};
      if (args.x_zero != nullptr) {
        w_sum[0] = args.w_sum[row[0] + of];
        w_sum[1] = args.w_sum[row[1] + of];
      }
      if (++of < groups) {
        next[0] = args.w_scale[row[0] + of];
        next[1] = args.w_scale[row[1] + of];
      }
      if (args.x_zero != nullptr) subtract_zeros(sums, w_sum);
      // Step by step for a block of sums: the compiler keeps this order, and a chain would wait.
#pragma unroll
      for (int first = 0; first < kSums; first += kBlock) {
        const float4 four = four_tokens(scales(), first / kBlock);
        const float s_x[4] = {four.x, four.y, four.z, four.w};
        float v[kBlock];
#pragma unroll
        for (int i = 0; i < kBlock; ++i) v[i] = static_cast<float>(sums[first + i]);
#pragma unroll
        for (int i = 0; i < kBlock; ++i) v[i] = __fmul_rn(v[i], s_x[i / 4 * 2 + i % 2]);
#pragma unroll
        for (int i = 0; i < kBlock; ++i) v[i] = __fmul_rn(v[i], s_w[i / 2 % 2]);
#pragma unroll
        for (int i = 0; i < kBlock; ++i) total[first + i] = __fadd_rn(total[first + i], v[i]);
      }
    };
    const auto multiply_half = [&](int half) {
      uint32_t a[2][4];
      widen(a, weights(half));
      wgmma_fence();
      multiply(sums, a, tokens() + half * 2 * kStepUnits, done > 0);
      wgmma_commit();
      wgmma_wait<0>();
      if (++done < group_halves) return;
      done = 0;
      convert();
    };
    for (int s = me.first; s < me.last; ++s) {
      await_stage();
      multiply_half(0);
      if (2 * s + 1 < halves) multiply_half(1);
      release_stage();
    }
  }

  // -- Parts of k: piece i of a tile is finished by part i % split. The others send it their sums,
  // into its ring, which is free by then: for each piece and sender 16 bytes a thread, then the
  // next 16.

  static constexpr int kVectors = kPieceSums / 4;
  static constexpr int kVectorBytes = kConsumers * kGroupThreads * 16;
  static_assert(C::kPieces * kVectors * kVectorBytes <= C::kPiecesAt);

  __device__ __forceinline__ bool owns(int piece) const {
    return (piece & (p.split - 1)) == me.part;
  }
  __device__ __forceinline__ uint32_t sent(int piece, int sender) const {
    const int slot = (piece & -p.split) + sender;
    return shared + slot * kVectors * kVectorBytes + threadIdx.x * 16;
  }
  __device__ __forceinline__ void exchange(int (&sums)[kSums]) const {
    cluster_arrive();
    cluster_wait();  // all rings are free
#pragma unroll
    for (int i = 0; i < C::kPieces; ++i) {
      if (owns(i)) continue;
      const int owner = (i & (p.split - 1)) * p.pair + me.neighbour;
      const uint32_t to = cluster_address(sent(i, me.part), owner);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int* s = sums + i * kPieceSums + v * 4;
        store_cluster(to + v * kVectorBytes, {s[0], s[1], s[2], s[3]});
      }
    }
    cluster_arrive();
    cluster_wait();
#pragma unroll
    for (int i = 0; i < C::kPieces; ++i) {
      for (int from = 0; from < p.split; ++from) {
        if (!owns(i) || from == me.part) continue;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const uint4 r = load_shared(sent(i, from) + v * kVectorBytes);
          int* s = sums + i * kPieceSums + v * 4;
          s[0] += static_cast<int>(r.x);
          s[1] += static_cast<int>(r.y);
          s[2] += static_cast<int>(r.z);
          s[3] += static_cast<int>(r.w);
        }
      }
    }
  }

  // -- Outputs, a block of kBlock sums at a time: tokens 16 b to 16 b + 15. Element i is of channel
  // first + i / 2 % 2 * 8 and of token:

  __device__ __forceinline__ int token_of(int b, int i) const {
    return 2 * kBlock * b + i / 4 * 8 + lane() % 4 * 2 + i % 2;
  }

  /// The outputs but for the residual.
  __device__ __forceinline__ void scale_block(float (&v)[kBlock], const Sum* sums, int b,
                                              const Channels& c) const {
    const LinearInt4Args& args = p.args;
    if constexpr (kGrouped) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) v[i] = sums[i];
    } else {
      int acc[kBlock];
#pragma unroll
      for (int i = 0; i < kBlock; ++i) acc[i] = sums[i] >> kWidenShift;
      if (args.x_zero != nullptr) {
        const int4 four = four_tokens(zeros(), b);
        const int z[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < kBlock; ++i) acc[i] -= z[i / 4 * 2 + i % 2] * c.sum[i / 2 % 2];
      }
      const float4 four = four_tokens(scales(), b);
      const float s_x[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        v[i] = __fmul_rn(__fmul_rn(static_cast<float>(acc[i]), s_x[i / 4 * 2 + i % 2]),
                         c.scale[i / 2 % 2]);
      }
    }
    if (args.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) v[i] = __fadd_rn(v[i], c.bias[i / 2 % 2]);
    }
  }

  template <DType kDtype>
  __device__ __forceinline__ void add_residual(float (&v)[kBlock], int b, const Tile& tile,
                                               const Channels& c) const {
    const int m = static_cast<int>(p.args.m), n = static_cast<int>(p.args.n);
    float r[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {  // outside, some other element
      const int64_t row = min(tile.token + token_of(b, i), m - 1);
      r[i] = load1<kDtype>(p.args.residual, row * n + min(c.first + i / 2 % 2 * 8, n - 1));
    }
#pragma unroll
    for (int i = 0; i < kBlock; ++i) v[i] = __fadd_rn(v[i], r[i]);
  }

  /// Stores elements one by one: any n, any type as wide as Bits.
  template <class Bits>
  __device__ __forceinline__ void store_elements(const Bits (&bits)[kBlock], int b,
                                                 const Tile& tile, const Channels& c) const {
    const int m = static_cast<int>(p.args.m), n = static_cast<int>(p.args.n);
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const int row = tile.token + token_of(b, i), channel = c.first + i / 2 % 2 * 8;
      if (row < m && channel < n) {
        static_cast<Bits*>(p.args.out)[int64_t{row} * n + channel] = bits[i];
      }
    }
  }

  __device__ __forceinline__ uint32_t box(int piece) const {
    return shared + C::kPiecesAt + (group * C::kPieces + piece) * kPieceBytes;
  }

  __device__ __forceinline__ void store_block(const float (&v)[kBlock], int b, const Tile& tile,
                                              const Channels& c) const {
    if (p.args.out_dtype == DType::f32) return store_elements(v, b, tile, c);
    uint32_t words[kBlock / 2];  // two tokens each
    if (p.args.out_dtype == DType::f16) {
#pragma unroll
      for (int i = 0; i < kBlock / 2; ++i) words[i] = pack_f16x2(v[2 * i], v[2 * i + 1]);
    } else {
#pragma unroll
      for (int i = 0; i < kBlock / 2; ++i) words[i] = pack_bf16x2(v[2 * i], v[2 * i + 1]);
    }
    if (p.store_boxes) {
      // A token's 64 channels are 128 bytes of the box, in the 128-byte swizzle.
      const int row = b % 2 * 16 + lane() / 16 * 8 + lane() % 8;
      const int chunk = warp() * 2 + lane() / 8 % 2;
      stmatrix_x4_trans(box(b / 2) + row * 128 + ((chunk ^ row % 8) << 4), words[0], words[1],
                        words[2], words[3]);
      return;
    }
    uint16_t halves[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      halves[i] = static_cast<uint16_t>(words[i / 2] >> i % 2 * 16);
    }
    store_elements(halves, b, tile, c);
  }

  // -- All of it

  __device__ __forceinline__ void make_tile(const Tile& tile) {
    const LinearInt4Args& args = p.args;
    const int in_tile = static_cast<int>(thread) % C::kTokens;
    const int token = min(tile.token + in_tile, static_cast<int>(args.m) - 1);
    // A group's sums are converted as they are, 16 * acc; exact unless the scale is below 2^-122.
    const float scale = args.x_scale[token] * (kGrouped ? 1.0f / (1 << kWidenShift) : 1.0f);
    const auto share_tokens = [&] {
      scales()[slot_of(in_tile)] = scale;
      if (args.x_zero != nullptr) zeros()[slot_of(in_tile)] = args.x_zero[token];
      if (thread == 0) tma_store_wait_read<0>();  // the boxes are free
      sync();
    };
    Sum sums[kSums];
    if constexpr (kGrouped) {
      share_tokens();
      multiply_groups(sums, tile);
    } else {
      multiply_tile(sums);
      pin(thread);  // what is worked out from it takes no registers before
      if (p.split > 1) exchange(sums);
    }
    const Channels c = load_channels(tile);
    if constexpr (!kGrouped) share_tokens();
#pragma unroll
    for (int b = 0; b < kSums / kBlock; ++b) {
      if (!owns(b / 2)) continue;
      pin(thread);
      float v[kBlock];
      scale_block(v, sums + b * kBlock, b, c);
      if (args.residual != nullptr) {
        switch (args.residual_dtype) {
          case DType::f32:
            add_residual<DType::f32>(v, b, tile, c);
            break;
          case DType::f16:
            add_residual<DType::f16>(v, b, tile, c);
            break;
          case DType::bf16:
            add_residual<DType::bf16>(v, b, tile, c);
            break;
        }
      }
      store_block(v, b, tile, c);
    }
    async_proxy_fence();
    sync();  // boxes are full, scales and zeros have been read
    if (thread == 0 && p.store_boxes) {
      for (int piece = 0; piece < C::kPieces; ++piece) {
        if (!owns(piece)) continue;
        tma_store(&p.out, tile.channel + group * kGroupChannels, tile.token + piece * kPieceTokens,
                  box(piece));
      }
      tma_store_commit();
    }
  }

  __device__ __forceinline__ void run() {
    for_tiles<C>(p, me.neighbour, [&](const Tile& tile) { make_tile(tile); });
    if (thread == 0) tma_store_wait_read<0>();
    __syncwarp();
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quarot::cuda::prefill
