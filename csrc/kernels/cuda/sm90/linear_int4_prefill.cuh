// The device side of linear_int4 for many tokens on sm_90a: int8 wgmma. Maths:
// kernels/linear_int4.h; which tiles are whose: linear_int4_prefill_tiles.cuh. Above 400 lines:
// multiplication and outputs share a layout of registers.
//
// Products are out^T[channels, tokens] = w[channels, k] * x[tokens, k]^T: int4 weights are operand
// A of wgmma, which may come from registers, so they are widened there and nowhere else. A lane's
// 16 bytes of the prepacked layout, uint8 [ceil(n / 16), ceil(k / 64), 32 lanes, 16], are the words
// a0..a3 of its A fragment: the low nibbles for the first 32 columns, the high nibbles for the next
// 32. A shift and a mask make of them 16 times the codes as int8; sums are 16 * acc, exact while
// k < 2^17.
//
// A block makes tiles of 256 output channels x 128, 96, 64 or 32 tokens: four warpgroups multiply,
// 64 channels each; a thread of a fifth one fills a ring of stages of 128 columns with the tensor
// copy engine, activations in the 128-byte swizzle that wgmma reads. With four, there is always one
// that keeps the tensor cores busy while others widen, convert or store. Outputs of 16 bits are
// transposed through boxes in shared memory and stored by the copy engine, which has brought the
// residual there, a piece every few stages; others are stored one by one.
//
//     whole tiles    in clusters of `pair` = 2 blocks: neighbouring channels; each copies half of
//                    the activations, to both
//     narrow tiles   the last wave, if it would leave processors idle: tiles of 64, 128 or 192
//                    channels; the other warpgroups have nothing to do
//     parted tiles   where there are fewer tiles than processors: each block of the cluster has a
//                    part of k; the sums, which are exact, are exchanged through the rings, and
//                    each block finishes some pieces
//
// One scale a channel; scales of groups have kernels of their own (linear_int4_grouped.cuh).
//
// Bound: the int8 tensor cores, at the clock that the power limit leaves; for few tokens, the
// weights' way from memory. ncu (benchmarks/profile_linear_int4.py), H200, 2048 tokens, 28672 x
// 4096: 302 us at 1.67 GHz, the tensor cores busy in 88 % of the active cycles, L2 42 %, memory
// 12 % of their peaks.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "kernels/cuda/device/linear_int4.cuh"
#include "kernels/cuda/device/ptx.cuh"
#include "kernels/cuda/device/vec.cuh"
#include "kernels/cuda/sm90/linear_int4_prefill_tiles.cuh"
#include "kernels/linear_int4.h"

namespace quarot::cuda::prefill {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- Producer -----------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void fill_ring(const Params& p, uint32_t shared) {
  const int tokens = C::kTokens / p.pair;  // of a copy
  const int rank = rank_of(p);
  const auto blocks = static_cast<uint16_t>((1 << p.pair) - 1);
  Ring<C::kStages> ring;
  for_tiles<C>(p, [&](const Tile& tile) {
    for (int s = tile.first; s < tile.last; ++s) {
      const uint32_t full = shared + C::kFullAt + ring.stage * 8;
      const uint32_t x = shared + ring.stage * C::kTokenBytes;
      wait(shared + C::kEmptyAt + ring.stage * 8, ring.parity ^ 1);
      mbarrier_expect(full, C::kTokenBytes + p.copied_groups * kGroupWeightBytes);
      tma_load(shared + C::kWeightsAt + ring.stage * kWeightBytes, &p.w, s * (kStripBytes / 4),
               tile.channel / kStrip, full);
      if (p.parted) {
        for (int i = 0; i < C::kTokens; i += tokens) {
          tma_load(x + i * kColumns, &p.x, s * kColumns, tile.token + i, full);
        }
      } else {
        tma_load_multicast(x + rank * tokens * kColumns, &p.x, s * kColumns,
                           tile.token + rank * tokens, full, blocks);
      }
      ring.next();
    }
  });
}

/// Asks for the tensor maps and the first weights. These depend on no kernel before this one, or if
/// they do, are mended in the L2.
template <class C>
__device__ __forceinline__ void prefetch(const Params& p) {
  for (const CUtensorMap* map : {&p.w, &p.x, &p.out}) tensor_map_prefetch(map);
  bool first = true;
  for_tiles<C>(p, [&](const Tile& tile) {
    if (!first) return;
    first = false;
    for (int s = tile.first; s < min(tile.last, tile.first + kPrefetchStages); ++s) {
      tma_prefetch_l2(&p.w, s * (kStripBytes / 4), tile.channel / kStrip);
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
  static constexpr int kSums = C::kSums;

  const Params& p;
  uint32_t shared;  // the block's
  int group;        // the warpgroup
  uint32_t thread;  // in the warpgroup
  int rank;         // of the block in the cluster
  Ring<C::kStages> ring;

  /// Shared [kTokens] of this warpgroup.
  __device__ __forceinline__ float* scales() const {
    return reinterpret_cast<float*>(shared_pointer(shared + C::kScalesAt)) + group * C::kTokens;
  }
  __device__ __forceinline__ int* zeros() const {
    return reinterpret_cast<int*>(shared_pointer(shared + C::kZerosAt)) + group * C::kTokens;
  }
  __device__ __forceinline__ int warp() const { return static_cast<int>(thread / kWarp); }
  __device__ __forceinline__ int lane() const { return static_cast<int>(thread % kWarp); }
  __device__ __forceinline__ void sync() const {
    barrier_sync(kGroupBarrier + group, kGroupThreads);
  }
  __device__ __forceinline__ float* channel_scales() const {
    return reinterpret_cast<float*>(shared_pointer(shared + C::kChannelScalesAt)) +
           group * kGroupChannels;
  }
  __device__ __forceinline__ int* channel_sums() const {
    return reinterpret_cast<int*>(shared_pointer(shared + C::kChannelSumsAt)) +
           group * kGroupChannels;
  }
  __device__ __forceinline__ int first_channel(const Tile& tile) const {
    return tile.channel + group * kGroupChannels + warp() * kStrip + lane() / 4;
  }

  template <bool kPlain>
  __device__ __forceinline__ Channels load_channels(const Tile& tile) const {
    const LinearInt4Args& args = p.args;
    Channels c{};
    c.first = first_channel(tile);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int in_group = warp() * kStrip + lane() / 4 + 8 * h;
      c.scale[h] = channel_scales()[in_group];
      if (kPlain) {
        c.scale[h] *= 1.0f / (1 << kWidenShift);
        continue;
      }
      if (args.x_zero != nullptr) c.sum[h] = channel_sums()[in_group];
      const int j = min(c.first + 8 * h, static_cast<int>(args.n) - 1);
      if (args.bias != nullptr) c.bias[h] = load1(args.bias_dtype, args.bias, j);
    }
    return c;
  }

  // -- Multiply

  __device__ __forceinline__ void await_stage() const {
    wait(shared + C::kFullAt + ring.stage * 8, ring.parity);
  }
  /// Where this thread's weights of the ring's first stage are.
  __device__ __forceinline__ uint32_t first_weights() const {
    return shared + C::kWeightsAt + (group * 4 + warp()) * kStripBytes + lane() * 16;
  }
  /// Those of half of the stage.
  __device__ __forceinline__ uint4 weights(uint32_t first, int half) const {
    return load_shared(first + ring.stage * kWeightBytes + half * kHalfStripBytes);
  }
  __device__ __forceinline__ uint64_t tokens() const {
    return descriptor(shared + ring.stage * C::kTokenBytes);
  }
  /// The ring's barriers that this lane, below `pair`, arrives at for its warp: of each block that
  /// copies to this one.
  __device__ __forceinline__ uint32_t empty_barriers() const {
    return cluster_address(shared + C::kEmptyAt, p.parted ? rank : min(lane(), p.pair - 1));
  }
  /// This warp needs the stage no more.
  __device__ __forceinline__ void release_stage(uint32_t empty) {
    if (lane() < p.pair) mbarrier_arrive(empty + ring.stage * 8);
    ring.next();
  }

  /// sums = 16 * acc of this block's part of k. With a residual there is a pause for each piece of
  /// it: asked for all at once it would hold up the ring.
  __device__ __forceinline__ void multiply_tile(int (&sums)[kSums], const Tile& tile) {
    const int stages = tile.last - tile.first;
    const uint32_t empty = empty_barriers(), mine = first_weights();
    const int pause = p.load_boxes ? max(1, stages / (C::kPieces + 1)) : stages;
    int piece = 0;
    for (int end = tile.first, s = end; s < tile.last;) {
      end = min(end + pause, tile.last);
      for (; s < end; ++s) {
        await_stage();
        uint32_t a[2][4], b[2][4];
        widen(a, weights(mine, 0));
        widen(b, weights(mine, 1));
        wgmma_fence();
        multiply(sums, a, tokens(), s > tile.first);
        multiply(sums, b, tokens() + 2 * kStepUnits, true);
        wgmma_commit();
        wgmma_wait<0>();
        release_stage(empty);
      }
      if (p.load_boxes) {
        const int next = s < tile.last ? min(piece + 1, C::kPieces) : C::kPieces;
        fetch_residual(tile, piece, next);
        piece = next;
      }
    }
  }

  /// Without channels in a tile.
  __device__ __forceinline__ void skip_tile(const Tile& tile) {
    const uint32_t empty = empty_barriers();
    for (int s = tile.first; s < tile.last; ++s) {
      await_stage();
      release_stage(empty);
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

  // -- Parts of k: each piece of a tile is finished by one of them. The others send it their sums,
  // into its ring, which is free by then: for each piece and sender 16 bytes a thread, then the
  // next 16. Every warpgroup has pieces of its own to finish, if there are enough.

  static constexpr int kVectors = kPieceSums / 4;
  static constexpr int kVectorBytes = kGroupThreads * 16;

  __device__ __forceinline__ int number(int piece) const { return group * C::kPieces + piece; }
  __device__ __forceinline__ int owner(int piece) const {
    return number(piece) - p.parts(number(piece)) * p.parts.divisor();
  }
  /// A bit for each piece that this block finishes.
  __device__ __forceinline__ uint32_t owned_pieces() const {
    if (!p.parted) return ~0u;
    uint32_t owned = 0;
#pragma unroll 1
    for (int i = 0; i < C::kPieces; ++i) {
      owned |= static_cast<uint32_t>(owner(i) == rank) << i;
    }
    return owned;
  }
  /// Where part `to` keeps what part `from` sends it.
  __device__ __forceinline__ uint32_t sent(int piece, int from, int to) const {
    const int slot = p.parts(number(piece)) * (p.cluster - 1) + from - (from > to);
    return shared + slot * kPieceSumBytes + thread * 16;
  }
  __device__ __forceinline__ void exchange(int (&sums)[kSums]) const {
    cluster_arrive_relaxed();
    cluster_wait();  // all rings are free
    const uint32_t arrived = shared + C::kSentAt + group * 8;
    if (thread == 0) {
      const int mine = __popc(owned_pieces() & ((1u << C::kPieces) - 1));
      mbarrier_expect(arrived, mine * (p.cluster - 1) * kPieceSumBytes);
    }
#pragma unroll
    for (int i = 0; i < C::kPieces; ++i) {
      const int to = owner(i);
      if (to == rank) continue;
      const uint32_t at = cluster_address(sent(i, rank, to), to);
      const uint32_t barrier = cluster_address(arrived, to);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int* s = sums + i * kPieceSums + v * 4;
        store_cluster_async(at + v * kVectorBytes, barrier, int4{s[0], s[1], s[2], s[3]});
      }
    }
    wait(arrived, 0);  // a block has one tile
#pragma unroll
    for (int i = 0; i < C::kPieces; ++i) {
      if (owner(i) != rank) continue;
#pragma unroll 1
      for (int from = 0; from < p.cluster; ++from) {
        if (from == rank) continue;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const uint4 r = load_shared(sent(i, from, rank) + v * kVectorBytes);
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

  /// The outputs but for the residual. kPlain: without zeros and bias; c.scale is of sums then.
  template <bool kPlain>
  __device__ __forceinline__ void scale_block(float (&v)[kBlock], const int* sums, int b,
                                              const Channels& c) const {
    const LinearInt4Args& args = p.args;
    int acc[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) acc[i] = kPlain ? sums[i] : sums[i] >> kWidenShift;
    if (!kPlain && args.x_zero != nullptr) {
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
    if (!kPlain && args.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) v[i] = __fadd_rn(v[i], c.bias[i / 2 % 2]);
    }
  }

  __device__ __forceinline__ uint32_t box(int piece) const {
    return shared + C::kPiecesAt + (group * C::kPieces + piece) * kPieceBytes;
  }
  /// This lane's row of the four 8x8 matrices of its warp in a box: a token's 64 channels are 128
  /// bytes, in the 128-byte swizzle.
  __device__ __forceinline__ uint32_t box_row(int piece) const {
    const int row = lane() / 16 * 8 + lane() % 8;
    const int chunk = warp() * 2 + lane() / 8 % 2;
    return box(piece) + row * 128 + ((chunk ^ row % 8) << 4);
  }

  /// Begins to copy pieces [first, end) of the residual to the boxes, once the last tile's outputs
  /// have left them.
  __device__ __forceinline__ void fetch_residual(const Tile& tile, int first, int end) const {
    if (thread != 0) return;
    const uint32_t barrier = shared + C::kResidualAt + group * 8;
    const uint32_t owned = owned_pieces();
    if (first == 0) {
      tma_store_wait_read<0>();
      mbarrier_expect(barrier, __popc(owned & ((1u << C::kPieces) - 1)) * kPieceBytes);
    }
#pragma unroll 1
    for (int i = first; i < end; ++i) {
      if ((owned >> i & 1) == 0) continue;
      tma_load(box(i), &p.residual, tile.channel + group * kGroupChannels,
               tile.token + i * kPieceTokens, barrier);
    }
  }
  __device__ __forceinline__ void add_fetched(float (&v)[kBlock], uint32_t row) const {
    uint32_t words[kBlock / 2];  // two tokens each
    ldmatrix_x4_trans(words, row);
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) {
      const float2 r =
          p.args.residual_dtype == DType::f16
              ? float2{f16_to_float(static_cast<uint16_t>(words[i])),
                       f16_to_float(static_cast<uint16_t>(words[i] >> 16))}
              : float2{__uint_as_float(words[i] << 16), __uint_as_float(words[i] & 0xffff0000u)};
      v[2 * i] = __fadd_rn(v[2 * i], r.x);
      v[2 * i + 1] = __fadd_rn(v[2 * i + 1], r.y);
    }
  }

  /// Outputs of 16 bits, to the boxes. No warpgroup multiplies meanwhile, so that the usual case,
  /// kPlain (no zero points, no bias), has its own code: it scales 16 * acc as it is and leaves the
  /// factor to the channels' scales: the same bits, but for scales below 2^-122 and outputs above
  /// 2^124.
  template <bool kPlain>
  __device__ __forceinline__ void finish_boxes(const int (&sums)[kSums], uint32_t owned,
                                               const Tile& tile) {
    const Channels c = load_channels<kPlain>(tile);
    const uint32_t row = box_row(0);
#pragma unroll
    for (int b = 0; b < C::kPieces; ++b) {
      if ((owned >> b & 1) == 0) continue;
      float v[kBlock];
      scale_block<kPlain>(v, sums + b * kBlock, b, c);
      if (p.load_boxes) add_fetched(v, row + b * kPieceBytes);
      uint32_t words[kBlock / 2];  // two tokens each
#pragma unroll
      for (int i = 0; i < kBlock / 2; ++i) {
        words[i] = p.args.out_dtype == DType::f16 ? pack_f16x2(v[2 * i], v[2 * i + 1])
                                                  : pack_bf16x2(v[2 * i], v[2 * i + 1]);
      }
      stmatrix_x4_trans(row + b * kPieceBytes, words[0], words[1], words[2], words[3]);
    }
  }
  /// Outputs of any type, any n: one by one. A loop takes the sums from shared memory, half of each
  /// block of them at a time: as straight code this would fill the instruction cache.
  __device__ __forceinline__ void finish_elements(const int (&sums)[kSums], uint32_t owned,
                                                  const Tile& tile) const {
    const LinearInt4Args& args = p.args;
    int* mine = reinterpret_cast<int*>(shared_pointer(box(0))) + thread * 4;
    constexpr int kStride = kGroupThreads * 4;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int b = 0; b < C::kPieces; ++b) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          mine[b * kStride + i] = half == 0 ? sums[b * kBlock + i] : sums[b * kBlock + 4 + i];
        }
      }
#pragma unroll 1
      for (int j = 0; j < C::kPieces * 4; ++j) {
        const int b = j / 4, i = half * 4 + j % 4;
        const int64_t token = tile.token + token_of(b, i);
        const int64_t channel = first_channel(tile) + i / 2 % 2 * 8;
        if ((owned >> b & 1) == 0 || token >= args.m || channel >= args.n) continue;
        const int sum = mine[b * kStride + j % 4];
        int acc = sum >> kWidenShift;
        if (args.x_zero != nullptr) acc -= args.x_zero[token] * args.w_sum[channel];
        finish(args, token, channel, scaled(acc, args.x_scale[token], args.w_scale[channel]));
      }
    }
  }

  // -- All of it

  /// Begins to copy what a tile's outputs are scaled with.
  __device__ __forceinline__ void fetch_scales(const Tile& tile) const {
    const LinearInt4Args& args = p.args;
    for (int i = static_cast<int>(thread); i < C::kTokens; i += kGroupThreads) {
      const int token = min(tile.token + i, static_cast<int>(args.m) - 1);
      cp_async_l1<4>(shared_address(scales() + slot_of(i)), args.x_scale + token);
      if (args.x_zero != nullptr) {
        cp_async_l1<4>(shared_address(zeros() + slot_of(i)), args.x_zero + token);
      }
    }
    if (thread < kGroupChannels) {
      const int i = static_cast<int>(thread);
      const int channel =
          min(tile.channel + group * kGroupChannels + i, static_cast<int>(args.n) - 1);
      cp_async_l1<4>(shared_address(channel_scales() + i), args.w_scale + channel);
      if (args.x_zero != nullptr) {
        cp_async_l1<4>(shared_address(channel_sums() + i), args.w_sum + channel);
      }
    }
  }
  __device__ __forceinline__ void await_scales() const {
    cp_async_wait_all();
    if (thread == 0) tma_store_wait_read<0>();  // the boxes are free
    sync();
  }

  __device__ __forceinline__ void make_tile(const Tile& tile, uint32_t parity) {
    fetch_scales(tile);
    int sums[kSums];
    multiply_tile(sums, tile);
    pin(thread);  // what is worked out from it takes no registers before
    if (p.parted) exchange(sums);
    await_scales();
    const uint32_t owned = owned_pieces();
    if (!p.boxes) return finish_elements(sums, owned, tile);
    if (p.load_boxes) wait(shared + C::kResidualAt + group * 8, parity);
    if (p.args.x_zero == nullptr && p.args.bias == nullptr) {
      finish_boxes<true>(sums, owned, tile);
    } else {
      finish_boxes<false>(sums, owned, tile);
    }
    async_proxy_fence();
    sync();  // boxes are full, scales and zeros have been read
    if (thread == 0) {
#pragma unroll 1
      for (int i = 0; i < C::kPieces; ++i) {
        if ((owned >> i & 1) == 0) continue;
        tma_store(&p.out, tile.channel + group * kGroupChannels, tile.token + i * kPieceTokens,
                  box(i));
      }
      tma_store_commit();
    }
  }

  __device__ __forceinline__ void run() {
    uint32_t parity = 0;
    for_tiles<C>(p, [&](const Tile& tile) {
      if (group < tile.groups) {
        make_tile(tile, parity);
      } else {
        skip_tile(tile);
      }
      parity ^= 1;
    });
    if (thread == 0) tma_store_wait_read<0>();
    __syncwarp();
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quarot::cuda::prefill
