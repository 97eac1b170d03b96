// The device side of linear_int4 for many tokens on sm_90a: int8 wgmma. Maths:
// kernels/linear_int4.h. One file, though long: producer, multiplication and outputs share the
// layout of shared memory and of registers.
//
// Products are out^T[channels, tokens] = w[channels, k] * x[tokens, k]^T: int4 weights are operand
// A of wgmma, which may come from registers, so they are widened there and nowhere else. A lane's
// 16 bytes of the prepacked layout, uint8 [ceil(n / 16), ceil(k / 64), 32 lanes, 16], are the words
// a0..a3 of its A fragment: the low nibbles for the first 32 columns, the high nibbles for the next
// 32. A shift and a mask make of them 16 times the codes as int8; sums are 16 * acc, exact while
// k < 2^17.
//
// A block makes tiles of kChannels output channels x kTokens tokens: two warpgroups multiply, 64
// channels each; a thread of a third one fills a ring of stages of kColumns columns with the tensor
// copy engine, activations in the 128-byte swizzle that wgmma reads.
//
//     cluster of `pair` = 2 blocks: neighbouring channels; each copies half of the activations, to
//                       both: 16 instead of 24 KB a stage from L2
//     cluster of `split` blocks: parts of k, where there are fewer tiles than processors; the sums,
//                       which are exact, are exchanged through shared memory, a piece of tokens
//                       each
//
// While one warpgroup turns its sums into outputs, the other one has the tensor cores for itself:
// the second starts kLag stages late, and the ring lets them stay apart. Outputs are transposed
// through shared memory and stored by the copy engine where rows are aligned.
//
// Grouped scales: the sums of a group are converted and added up in fp32 while the other warpgroup
// multiplies.
//
// Bound: the int8 tensor cores, then the power limit; with grouped scales, the conversions.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "kernels/cuda/device/ptx.cuh"
#include "kernels/cuda/device/vec.cuh"
#include "kernels/linear_int4.h"

namespace quarot::cuda::prefill {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kConsumers = 2;       // warpgroups that multiply
constexpr int kThreads = (kConsumers + 1) * kGroupThreads;
// setmaxnreg: 240 * 256 + 24 * 128 threads have the 64 K registers of an SM.
constexpr int kConsumerRegisters = 240;
constexpr int kProducerRegisters = 24;

constexpr int kGroupChannels = 64;  // of a warpgroup: wgmma's rows
constexpr int kChannels = kConsumers * kGroupChannels;
constexpr int kTokens = 128;
constexpr int kColumns = 128;       // of a stage: a row of the 128-byte swizzle
constexpr int kSums = kTokens / 2;  // of a thread

// The weight layout: strips of 16 channels, 512 bytes for 64 columns.
constexpr int kStrip = 16;
constexpr int kHalfStripBytes = 512;
constexpr int kStripBytes = 2 * kHalfStripBytes;  // of a stage

// Outputs of a warpgroup leave in pieces; a box of the copy engine is one.
constexpr int kPieceTokens = 32;
constexpr int kPieces = kTokens / kPieceTokens;
constexpr int kPieceSums = kSums / kPieces;
constexpr int kPieceBytes = kPieceTokens * kGroupChannels * 2;

// Shared memory, from a multiple of the swizzle's 1024 bytes.
constexpr int kStages = 7;
constexpr int kTokenBytes = kTokens * kColumns;
constexpr int kWeightBytes = kChannels / kStrip * kStripBytes;
constexpr int kSwizzleBytes = 1024;
constexpr int kWeightsAt = kStages * kTokenBytes;
constexpr int kPiecesAt = kWeightsAt + kStages * kWeightBytes;
constexpr int kScalesAt = kPiecesAt + kConsumers * kPieces * kPieceBytes;
constexpr int kZerosAt = kScalesAt + kConsumers * kTokens * 4;
constexpr int kFullAt = kZerosAt + kConsumers * kTokens * 4;
constexpr int kEmptyAt = kFullAt + kStages * 8;
constexpr int kSharedBytes = kSwizzleBytes + kEmptyAt + kStages * 8;

// Barriers of the block: 0 is __syncthreads.
constexpr int kGroupBarrier = 1;  // and 2: of a warpgroup
constexpr int kStartBarrier = 3;  // lets the second warpgroup begin

/// sums are 16 * acc.
constexpr int kWidenShift = 4;
/// Stages that the second warpgroup starts behind the first.
constexpr int kLag = 3;
/// Token tiles that are worked on together, so that their activations and the weights meet in L2.
constexpr int kTokenTiles = 16;
/// The residual is fetched this many stages before the end of a tile.
constexpr int kFetchStages = 3;

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
template <class Body>
__device__ __forceinline__ void for_tiles(const Params& p, int neighbour, const Body& body) {
  const int blocks = p.pair * p.split;
  const int tiles = p.channel_tiles * p.token_tiles;
  for (int t = blockIdx.x / blocks; t < tiles; t += gridDim.x / blocks) {
    const int set = p.set_tiles(t);
    const int rest = t - set * p.set_tiles.divisor();
    const bool whole = (set + 1) * kTokenTiles <= p.token_tiles;
    const int channel = whole ? rest / kTokenTiles : p.last_tokens(rest);
    const int token = rest - channel * (whole ? kTokenTiles : p.last_tokens.divisor());
    body(Tile{(channel * p.pair + neighbour) * kChannels, (set * kTokenTiles + token) * kTokens});
  }
}

// ---- Producer -----------------------------------------------------------------------------------

__device__ __forceinline__ void fill_ring(const Params& p, uint32_t shared) {
  const Place me = place(p);
  const int tokens = kTokens / p.pair;  // that this block copies
  const int first_token = me.neighbour * tokens;
  const auto blocks = static_cast<uint16_t>(((1 << p.pair) - 1) << (me.part * p.pair));
  Ring ring;
  for_tiles(p, me.neighbour, [&](const Tile& tile) {
    for (int s = me.first; s < me.last; ++s) {
      const uint32_t full = shared + kFullAt + ring.stage * 8;
      wait(shared + kEmptyAt + ring.stage * 8, ring.parity ^ 1);
      mbarrier_expect(full, kTokenBytes + kWeightBytes);
      tma_load(shared + kWeightsAt + ring.stage * kWeightBytes, &p.w, s * (kStripBytes / 4),
               tile.channel / kStrip, full);
      tma_load_multicast(shared + ring.stage * kTokenBytes + first_token * kColumns, &p.x,
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

/// The A fragments of two steps of 32 columns, times 16.
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

/// sums (+)= 64 columns, from this thread's words of the weight layout.
__device__ __forceinline__ void multiply(int (&sums)[kSums], uint32_t (&a)[2][4], const uint4& w,
                                         uint64_t x, bool add) {
  widen(a, w);
  wgmma_fence();
  wgmma_s8(sums, a[0], x, add);
  wgmma_s8(sums, a[1], x + kStepUnits, true);
  wgmma_commit();
}

/// What a thread knows of its two channels, first and first + 8.
struct Channels {
  int first;
  float scale[2], bias[2];
  int sum[2];
};

template <bool kGrouped>
struct Consumer {
  using Sum = std::conditional_t<kGrouped, float, int>;

  const Params& p;
  uint32_t shared;  // the block's
  Place me;
  int group;        // the warpgroup
  uint32_t thread;  // in the warpgroup
  float* scales;    // shared [kTokens] of this warpgroup
  int* zeros;       // likewise
  Ring ring;

  __device__ __forceinline__ int warp() const { return static_cast<int>(thread) / kWarp; }
  __device__ __forceinline__ int lane() const { return static_cast<int>(thread) % kWarp; }
  __device__ __forceinline__ void sync() const {
    barrier_sync(kGroupBarrier + group, kGroupThreads);
  }

  __device__ __forceinline__ Channels load_channels(const Tile& tile) const {
    const LinearInt4Args& args = p.args;
    Channels c{};
    c.first = tile.channel + group * kGroupChannels + warp() * kStrip + lane() / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t j = min(int64_t{c.first} + 8 * h, args.n - 1);
      if constexpr (!kGrouped) {
        c.scale[h] = args.w_scale[j];
        if (args.x_zero != nullptr) c.sum[h] = args.w_sum[j];
      }
      if (args.bias != nullptr) c.bias[h] = load1(args.bias_dtype, args.bias, j);
    }
    return c;
  }

  // -- Multiply

  __device__ __forceinline__ void await_stage() const {
    wait(shared + kFullAt + ring.stage * 8, ring.parity);
  }
  /// This thread's weights of half of the stage.
  __device__ __forceinline__ uint4 weights(int half) const {
    return load_shared(shared + kWeightsAt + ring.stage * kWeightBytes +
                       (group * 4 + warp()) * kStripBytes + half * kHalfStripBytes + lane() * 16);
  }
  __device__ __forceinline__ uint64_t tokens() const {
    return descriptor(shared + ring.stage * kTokenBytes);
  }
  /// This warp needs the stage no more, nor does any block that copies to it have to wait for it.
  __device__ __forceinline__ void release(int stage) const {
    if (lane() < p.pair) {
      mbarrier_arrive(cluster_address(shared + kEmptyAt + stage * 8, me.part * p.pair + lane()));
    }
  }

  __device__ __forceinline__ static void start_second() {
    barrier_arrive(kStartBarrier, kConsumers * kGroupThreads);
  }

  /// sums = 16 * acc of this block's part of k. lead: starts the second warpgroup. late() is called
  /// some stages before the end.
  template <class Late>
  __device__ __forceinline__ void multiply_tile(int (&sums)[kSums], bool lead, const Late& late) {
    uint4 w[2];
    uint32_t a[2][4], b[2][4];
    const auto read_weights = [&] {
      await_stage();
      w[0] = weights(0);
      w[1] = weights(1);
    };
    read_weights();
    const auto multiply_stages = [&](int first, int last) {
      for (int s = first; s < last; ++s) {
        const int stage = ring.stage;
        const uint64_t x = tokens();
        multiply(sums, a, w[0], x, s > me.first);
        wgmma_wait<1>();
        if (s > me.first) release(stage == 0 ? kStages - 1 : stage - 1);
        multiply(sums, b, w[1], x + 2 * kStepUnits, true);
        ring.next();
        if (s + 1 < me.last) read_weights();
        if (lead && s == me.first + kLag) start_second();
        wgmma_wait<1>();
      }
    };
    const int fetch = max(me.first, me.last - kFetchStages);
    multiply_stages(me.first, fetch);
    late();
    multiply_stages(fetch, me.last);
    wgmma_wait<0>();
    release(ring.stage == 0 ? kStages - 1 : ring.stage - 1);
    if (lead && me.last - me.first <= kLag) start_second();
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
      const int4 four = four_tokens(zeros, b / kBlock);
      const int z[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        sums[b + i] -= (z[i / 4 * 2 + i % 2] << kWidenShift) * w_sum[i / 2 % 2];
      }
    }
  }

  /// total = the sum over groups of (acc * s_x) * s_w.
  __device__ __forceinline__ void multiply_groups(float (&total)[kSums], const Channels& c) {
    const LinearInt4Args& args = p.args;
    const int halves = static_cast<int>(args.k / 64);
    const int group_halves = halves / static_cast<int>(args.groups);
    int sums[kSums];
    float4 scale[kSums / kBlock];
#pragma unroll
    for (int b = 0; b < kSums / kBlock; ++b) scale[b] = four_tokens(scales, b);
#pragma unroll
    for (int i = 0; i < kSums; ++i) total[i] = 0.0f;
    const int groups = static_cast<int>(args.groups), last_row = static_cast<int>(args.n) - 1;
    const int row[2] = {min(c.first, last_row) * groups, min(c.first + 8, last_row) * groups};
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
        const float4 four = scale[first / kBlock];
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
    const auto multiply_half = [&](uint32_t (&a)[2][4], int half) {
      const uint4 w = weights(half);
      multiply(sums, a, w, tokens() + half * 2 * kStepUnits, done > 0);
      if (++done < group_halves) return;
      wgmma_wait<0>();
      done = 0;
      convert();
    };
    for (int s = me.first; s < me.last; ++s) {
      uint32_t a[2][4], b[2][4];
      await_stage();
      multiply_half(a, 0);
      if (2 * s + 1 < halves) multiply_half(b, 1);
      wgmma_wait<0>();
      release(ring.stage);
      ring.next();
    }
  }

  // -- Parts of k: piece i of a tile is finished by part i % split. The others send it their sums,
  // into its ring, which is free by then: for each piece and sender 16 bytes a thread, then the
  // next 16.

  static constexpr int kVectors = kPieceSums / 4;
  static constexpr int kVectorBytes = kConsumers * kGroupThreads * 16;
  static_assert(kPieces * kVectors * kVectorBytes <= kPiecesAt);

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
    for (int i = 0; i < kPieces; ++i) {
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
    for (int i = 0; i < kPieces; ++i) {
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
        const int4 four = four_tokens(zeros, b);
        const int z[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < kBlock; ++i) acc[i] -= z[i / 4 * 2 + i % 2] * c.sum[i / 2 % 2];
      }
      const float4 four = four_tokens(scales, b);
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

  /// The residual's bits; of elements outside, those of some other one.
  __device__ __forceinline__ void fetch_residual(uint32_t (&bits)[kBlock], int b, const Tile& tile,
                                                 const Channels& c) const {
    const int m = static_cast<int>(p.args.m), n = static_cast<int>(p.args.n);
    const auto fetch = [&](const auto* data) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const int64_t row = min(tile.token + token_of(b, i), m - 1);
        bits[i] = data[row * n + min(c.first + i / 2 % 2 * 8, n - 1)];
      }
    };
    if (p.args.residual_dtype == DType::f32) {
      fetch(static_cast<const uint32_t*>(p.args.residual));
    } else {
      fetch(static_cast<const uint16_t*>(p.args.residual));
    }
  }
  __device__ __forceinline__ void add_residual(float (&v)[kBlock],
                                               const uint32_t (&bits)[kBlock]) const {
    const auto add = [&](const auto& to_float) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) v[i] = __fadd_rn(v[i], to_float(bits[i]));
    };
    switch (p.args.residual_dtype) {
      case DType::f32:
        return add([](uint32_t u) { return __uint_as_float(u); });
      case DType::f16:
        return add([](uint32_t u) { return f16_to_float(static_cast<uint16_t>(u)); });
      case DType::bf16:
        return add([](uint32_t u) { return bf16_low(u); });
    }
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
    return shared + kPiecesAt + (group * kPieces + piece) * kPieceBytes;
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

  __device__ __forceinline__ void make_tile(const Tile& tile, bool lead) {
    const LinearInt4Args& args = p.args;
    const Channels c = load_channels(tile);
    const int64_t token = min(int64_t{tile.token} + thread, args.m - 1);
    // A group's sums are converted as they are, 16 * acc; exact unless the scale is below 2^-122.
    const float scale = args.x_scale[token] * (kGrouped ? 1.0f / (1 << kWidenShift) : 1.0f);
    const int zero = args.x_zero == nullptr ? 0 : args.x_zero[token];
    const auto share_tokens = [&] {
      scales[slot_of(static_cast<int>(thread))] = scale;
      zeros[slot_of(static_cast<int>(thread))] = zero;
      if (thread == 0) tma_store_wait_read<0>();  // the boxes are free
      sync();
    };
    Sum sums[kSums];
    uint32_t residual[kSums / kBlock][kBlock];
    if constexpr (kGrouped) {
      share_tokens();
      multiply_groups(sums, c);
    } else {
      multiply_tile(sums, lead, [&] {
#pragma unroll
        for (int b = 0; b < kSums / kBlock; ++b) {
          if (args.residual != nullptr) fetch_residual(residual[b], b, tile, c);
        }
      });
      pin(thread);  // what is worked out from it takes no registers before
      if (p.split > 1) exchange(sums);
      share_tokens();
    }
#pragma unroll
    for (int b = 0; b < kSums / kBlock; ++b) {
      if (!owns(b * kBlock / kPieceSums)) continue;
      if constexpr (kGrouped) pin(thread);
      float v[kBlock];
      scale_block(v, sums + b * kBlock, b, c);
      if (args.residual != nullptr) {
        if constexpr (kGrouped) fetch_residual(residual[b], b, tile, c);
        add_residual(v, residual[b]);
      }
      store_block(v, b, tile, c);
    }
    async_proxy_fence();
    sync();  // boxes are full, scales and zeros have been read
    if (thread == 0 && p.store_boxes) {
      for (int piece = 0; piece < kPieces; ++piece) {
        if (!owns(piece)) continue;
        tma_store(&p.out, tile.channel + group * kGroupChannels, tile.token + piece * kPieceTokens,
                  box(piece));
      }
      tma_store_commit();
    }
  }

  __device__ __forceinline__ void run() {
    bool lead = !kGrouped && group == 0;
    if (!kGrouped && group == 1) barrier_sync(kStartBarrier, kConsumers * kGroupThreads);
    for_tiles(p, me.neighbour, [&](const Tile& tile) {
      make_tile(tile, lead);
      lead = false;
    });
    if (thread == 0) tma_store_wait_read<0>();
    __syncwarp();
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quarot::cuda::prefill
