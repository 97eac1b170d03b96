// The first half of transform_kernel: a tile's elements come from memory, are measured, and go into
// the tile with their columns transformed. Maths and layout are in transform.cuh. Above 400 lines:
// operands, loads and steps share the lanes' layout.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device/int4.cuh"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/transform_plan.cuh"
#include "kernels/cuda/device/vec.cuh"

namespace quarot::cuda {

// ---- Operands -----------------------------------------------------------------------------------

/// Which operands a kernel uses. kExact: nothing is rounded to 16 bits.
template <class Source, bool kExact, bool kColumns>
struct Operands {
  static constexpr bool kDirect = Source::kDtype != DType::f32;  // as they are in memory
  static constexpr bool kPairs = !kDirect || (kExact && kColumns);
  static constexpr int kPlanes = kPairs ? 2 : 1;
  static constexpr DType kFirst = kDirect ? Source::kDtype : DType::f16;
  static constexpr DType kMiddle = kPairs ? DType::f16 : Source::kDtype;
  static constexpr bool kScaled = kMiddle == DType::f16 && (kColumns || !kDirect);
};

/// log2 of the factor that takes a block's largest element, given by its bits, below 2^7; 0 if it
/// is not finite.
constexpr int kTargetExponent = 6;
template <DType kDtype>
__device__ __forceinline__ int exponent_of(int bits) {
  constexpr int kMost = kDtype == DType::f16 ? 15 : 126;  // as powers of two of the type
  return bits >= kInfinityBits ? 0 : min(kTargetExponent + 127 - (bits >> 23), kMost);
}
__device__ __forceinline__ float power_of_two(int exponent) {
  return __int_as_float((exponent + 127) << 23);
}

/// 16 x 16 floats of a warp, in the layout of two results D side by side.
struct Square {
  float v[2][4];
};
template <DType kDtype>
__device__ __forceinline__ uint4 to_fragment(const Square& x) {  // A
  return {pack2<kDtype>(x.v[0][0], x.v[0][1]), pack2<kDtype>(x.v[0][2], x.v[0][3]),
          pack2<kDtype>(x.v[1][0], x.v[1][1]), pack2<kDtype>(x.v[1][2], x.v[1][3])};
}

/// Rounds x to fragments, one a plane: their sum is x, to 22 bits if there are two. The rest that
/// the second one takes is x - first * I, which a tensor core computes exactly. minus: the nonzero
/// word of the fragments of -I.
template <DType kDtype, int kPlanes>
__device__ __forceinline__ void to_planes(uint4 (&fragment)[kPlanes], Square x, uint32_t minus) {
  fragment[0] = to_fragment<kDtype>(x);
  if constexpr (kPlanes == 2) {
    mma<kDtype>(x.v[0], fragment[0], minus, 0);
    mma<kDtype>(x.v[1], fragment[0], 0, minus);
    fragment[1] = to_fragment<kDtype>(x);
  }
}

/// Adds a step's sums of the small operands to those of the large ones. Tensor cores cut what they
/// add to: sums of large operands of about one size are exact alone, and this rounds to nearest,
/// where all in one sum would make the result smaller by half a unit a step.
__device__ __forceinline__ void add(Square& x, const Square& small) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int c = 0; c < 4; ++c) x.v[i][c] += small.v[i][c];
}

/// The constant matrices of the two 16-point steps as fragments. Index bits of the steps, lowest
/// first, are bits of the group: A's rows 5 0 1 3, its columns 0 3 5 1; B's rows 4 6 7 2, its
/// columns 2 6 7 4.
struct GroupSigns {
  uint4 a;
  uint2 b[2];  // columns 0-7 and 8-15
  uint32_t minus;
};

/// The four bits of `index` to the bits of a group that `to` names, a nibble each.
__device__ __forceinline__ int spread_bits(int index, int to) {
  int x = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) x |= (index >> i & 1) << (to >> 4 * i & 15);
  return x;
}

template <DType kFirst, DType kMiddle>
__device__ __forceinline__ GroupSigns make_group_signs(int segment_bits) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int mask = (1 << segment_bits) - 1;
  const auto sign = [&](int x, int y) {
    if (((x ^ y) & ~mask) != 0) return 0;
    return __popc(x & y & mask) & 1 ? -1 : 1;
  };
  const auto pair_a = [&](int row, int column) {
    const int i = spread_bits(row, 0x3105);
    return sign_bits<kFirst>(sign(i, spread_bits(column, 0x1530))) |
           sign_bits<kFirst>(sign(i, spread_bits(column + 1, 0x1530))) << 16;
  };
  const auto pair_b = [&](int row, int column) {
    const int j = spread_bits(column, 0x4762);
    return sign_bits<kMiddle>(sign(spread_bits(row, 0x2764), j)) |
           sign_bits<kMiddle>(sign(spread_bits(row + 1, 0x2764), j)) << 16;
  };
  GroupSigns s;
  s.a = {pair_a(g, 2 * t), pair_a(g + 8, 2 * t), pair_a(g, 2 * t + 8), pair_a(g + 8, 2 * t + 8)};
  s.b[0] = {pair_b(2 * t, g), pair_b(2 * t + 8, g)};
  s.b[1] = {pair_b(2 * t, g + 8), pair_b(2 * t + 8, g + 8)};
  s.minus = (2 * t == g ? sign_bits<kMiddle>(-1) : 0) |
            (2 * t + 1 == g ? sign_bits<kMiddle>(-1) << 16 : 0);
  return s;
}

// ---- F = I (x) H_K (x) H_2^q in shared memory: [depth][depth] of the middle type ----------------

/// Four signs, a byte each, as 16-bit numbers.
template <DType kDtype>
__device__ __forceinline__ uint2 expand_signs(uint32_t bytes) {
  constexpr uint32_t kOnes = sign_bits<kDtype>(1) * 0x10001u;
  return {(__byte_perm(bytes, 0, 0x1404) & 0x80008000u) | kOnes,
          (__byte_perm(bytes, 0, 0x3424) & 0x80008000u) | kOnes};
}

/// The factor's signs, copied to `staged` [K, K] without waiting for one after the other.
__device__ __forceinline__ void stage_factor(const TransformPlan& p, int8_t* staged) {
  const int count = p.factor_order > 1 ? p.factor_order * p.factor_order : 0;
  if (reinterpret_cast<uintptr_t>(p.factor) % 16 == 0 && count % 16 == 0) {
    for (int i = threadIdx.x * 16; i < count; i += blockDim.x * 16)
      cp_async_16(shared_address(staged + i), p.factor + i);
  } else {
    for (int i = threadIdx.x; i < count; i += blockDim.x) staged[i] = p.factor[i];
  }
}

template <DType kDtype>
__device__ __forceinline__ void make_table(const TransformPlan& p, const int8_t* staged,
                                           unsigned char* table) {
  const int q = p.log_sylvester, low = (1 << q) - 1;
  const int units = p.depth * p.row_units.divisor();
  const auto fill = [&](auto signs_at) {
#pragma unroll 4
    for (int i = threadIdx.x; i < units; i += blockDim.x) {
      const int k = p.row_units(i), m = (i - k * p.row_units.divisor()) * 4;
      uint2 words{0, 0};
      if (k < p.order && m < p.order) words = expand_signs<kDtype>(signs_at(k, m));
      *reinterpret_cast<uint2*>(table + k * table_pitch(p.depth) + m * 2) = words;
    }
  };
  /// The signs of H_2^q in four columns from m, a multiple of 4.
  const auto sylvester = [&](int k, int m) {
    const int y = k & low;
    return (y & 1 ? 0x80008000u : 0) ^ (y & 2 ? 0x80800000u : 0) ^
           (__popc(y & m) & 1 ? 0x80808080u : 0);
  };
  if (p.stacked > 1) {  // small Sylvester matrices
    for (int i = threadIdx.x; i < p.depth * p.depth; i += blockDim.x) {
      const int k = i / kMmaRows, m = i % kMmaRows;  // the depth is 16
      const int sign = p.by_order(k) != p.by_order(m)      ? 0
                       : __popc(k & m & (p.order - 1)) & 1 ? -1
                                                           : 1;
      *reinterpret_cast<uint16_t*>(table + k * table_pitch(p.depth) + m * 2) =
          static_cast<uint16_t>(sign_bits<kDtype>(sign));
    }
  } else if (p.factor_order == 1) {
    fill(sylvester);
  } else if (q == 0) {
    fill([&](int k, int m) {
      return *reinterpret_cast<const uint32_t*>(staged + k * p.factor_order + m);
    });
  } else {
    fill([&](int k, int m) {
      const int8_t* from = staged + (k >> q) * p.factor_order + (m >> q);
      const uint32_t first = static_cast<uint8_t>(from[0]);
      const uint32_t signs = q == 1 ? first * 0x0101u | static_cast<uint8_t>(from[1]) * 0x01010000u
                                    : first * 0x01010101u;
      return signs ^ sylvester(k, m);
    });
  }
}

// ---- The tile in shared memory ------------------------------------------------------------------

/// What is xored to the low three bits of a unit's number in row k, in the columns [64 c, 64 c +
/// 64).
__device__ __forceinline__ int unit_swizzle(int k, int c) { return (k & 7) ^ (c & 3); }

/// Byte address, in a plane, of the unit of row k in which columns begin like `column`: bits 0, 1
/// and 5 up count.
__device__ __forceinline__ int unit_address(const TransformPlan& p, int k, int column) {
  const int unit = column >> 5 << 2 | (column & 3);
  return k * p.part_columns * 2 + ((unit ^ unit_swizzle(k, column >> 6)) << 4);
}

/// Where elements lie: a block of the tile, and a row and a column of its X.
struct Position {
  int block, row, column;
};

// ---- Steps --------------------------------------------------------------------------------------

/// A chunk as it waits in registers: words of 16-bit elements, or floats.
template <bool kDirect>
struct Held {
  uint32_t w[4];
};
template <>
struct Held<false> {
  float v[kChunk];
};

/// Loads, measures and spreads a thread's chunks of a tile: one of each of its groups of 256
/// neighbours; without columns, any chunk.
template <class Source, class Op, bool kColumns>
struct Loader {
  using Chunk8 = Held<Op::kDirect>;
  static constexpr int kInputs = Op::kDirect ? 1 : Op::kPlanes;

  const TransformPlan& p;
  const Source& source;
  unsigned char* data;

  __device__ __forceinline__ Loader(const TransformPlan& plan, const Source& from,
                                    unsigned char* shared)
      : p(plan), source(from), data(shared) {}

  /// What a lane needs to transform its part of a group. It waits in shared memory: registers are
  /// short while a warp multiplies.
  struct Lane {
    GroupSigns signs;
    int unit;    // the first element of its unit in the group
    int offset;  // the address of that
    int bits;    // to be xored to the address
  };
  __device__ __forceinline__ uint4* lanes() const {
    return reinterpret_cast<uint4*>(data + p.lanes_at) + threadIdx.x % kWarp;
  }
  __device__ __forceinline__ void make_lanes() const {
    if (threadIdx.x >= kWarp) return;
    const int l = threadIdx.x;
    Lane lane;
    lane.signs = make_group_signs<Op::kFirst, Op::kMiddle>(p.segment_bits);
    // Lane (g, t): bits 4 6 7 of its chunk are g, bits 3 5 are t. Of its unit, 5 0 1 and 6 7.
    const int row_bit = p.segment_bits + p.block_bits;
    lane.unit = (l >> 2 & 1) << 5 | l >> 3 | (l & 3) << 6;
    const int at = unit_address(p, lane.unit >> row_bit, lane.unit & ((1 << row_bit) - 1));
    lane.bits = at & 0x70;
    lane.offset = at - lane.bits;
    const GroupSigns& s = lane.signs;
    lanes()[0] = s.a;
    lanes()[kWarp] = {s.b[0].x, s.b[0].y, s.b[1].x, s.b[1].y};
    lanes()[2 * kWarp] = {s.minus, static_cast<uint32_t>(lane.unit),
                          static_cast<uint32_t>(lane.offset), static_cast<uint32_t>(lane.bits)};
  }
  __device__ __forceinline__ Lane this_lane() const {
    const uint4 a = lanes()[0], b = lanes()[kWarp], c = lanes()[2 * kWarp];
    return {{a, {{b.x, b.y}, {b.z, b.w}}, c.x},
            static_cast<int>(c.y),
            static_cast<int>(c.z),
            static_cast<int>(c.w)};
  }
  /// The lane's chunk in a group: its first element.
  __device__ __forceinline__ int lane_chunk() const {
    const int l = threadIdx.x % kWarp;
    return kColumns ? (l & 1) << 3 | (l >> 1 & 1) << 5 | (l >> 2 & 1) << 4 | (l >> 3) << 6
                    : l * kChunk;
  }
  __device__ __forceinline__ int index(int batch, int i) const {
    const int lanes = kColumns ? blockDim.x / kWarp : blockDim.x;
    const int lane = kColumns ? threadIdx.x / kWarp : threadIdx.x;
    return (batch * kThreadChunks + i) * lanes + lane;
  }
  /// Of element `at` of group g; without columns, of chunk g.
  __device__ __forceinline__ Position position(int g, int at) const {
    const int blocks = p.block_groups(g);
    const int rest = g - blocks * p.block_groups.divisor();
    if constexpr (kColumns) {
      return {(blocks << p.block_bits) + (at >> p.segment_bits & ((1 << p.block_bits) - 1)),
              (rest << p.order_bits) + (at >> (p.segment_bits + p.block_bits)),
              at & ((1 << p.segment_bits) - 1)};
    } else {
      const int row = p.by_segment(rest * kChunk);
      return {blocks, row, rest * kChunk - row * p.segment};
    }
  }
  /// Row and column of the tile's matrix.
  __device__ __forceinline__ int2 place(const Position& at) const {
    const int above = p.stacked > 1 ? p.side_blocks(at.block) : 0;
    return {above * p.order + at.row, (at.block - above * p.side) * p.segment + at.column};
  }
  __device__ __forceinline__ int place_of(int g) const {
    const int2 at = place(position(g, 0));
    return unit_address(p, at.x, at.y);
  }
  /// A tile's rows.
  struct Run {
    int64_t first;
    int rows;
  };
  __device__ __forceinline__ Run run_of(int tile) const {
    const int64_t first = int64_t{tile} * p.tile_rows, left = p.rows - first;
    const int rows = left < 0 ? 0 : static_cast<int>(min(left, int64_t{p.tile_rows}));
    return {first, rows};
  }
  /// Loads chunk i of a batch, zeros where there is none.
  __device__ __forceinline__ void fetch(typename Source::Raw& raw, const Run& run, int batch,
                                        int i) const {
    if (i / 2 * 2 >= p.thread_chunks) return;
    raw = {};
    const int g = index(batch, i);
    const Position at = position(g, kColumns ? lane_chunk() : 0);
    const int row = p.row_blocks(at.block);
    if (g < p.groups && row < run.rows) {
      raw = source.load(run.first + row,
                        (at.block - row * p.row_blocks.divisor()) * p.block_size.divisor() +
                            at.row * p.segment + at.column);
    }
  }
  /// Loads and holds a batch, kInFlight chunks at a time.
  __device__ __forceinline__ void read(Chunk8 (&held)[kThreadChunks], int tile, int batch) const {
    constexpr int kInFlight = 4;
    const Run run = run_of(tile);
    typename Source::Raw raw[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) fetch(raw[i], run, batch, i);
#pragma unroll
    for (int i = 0; i < kThreadChunks; ++i) {
      hold(held[i], raw[i % kInFlight]);
      if (i + kInFlight < kThreadChunks) fetch(raw[i % kInFlight], run, batch, i + kInFlight);
    }
  }
  __device__ __forceinline__ void hold(Chunk8& held, const typename Source::Raw& raw) const {
    if constexpr (Op::kDirect) {
      const uint4 w = raw.words[0];
      held.w[0] = w.x, held.w[1] = w.y, held.w[2] = w.z, held.w[3] = w.w;
    } else {
      source.values(held.v, raw);
    }
  }

  /// Bits of the largest magnitude, or of a NaN.
  __device__ __forceinline__ int largest(const Chunk8& held) const {
    if constexpr (Op::kDirect) {
      const uint32_t a = max_pairs<Op::kFirst>(held.w[0] & 0x7fff7fffu, held.w[1] & 0x7fff7fffu);
      const uint32_t b = max_pairs<Op::kFirst>(held.w[2] & 0x7fff7fffu, held.w[3] & 0x7fff7fffu);
      const uint32_t c = max_pairs<Op::kFirst>(a, b);
      return __float_as_int(max_nan(to_float<Op::kFirst>(c), to_float<Op::kFirst>(c >> 16))) &
             0x7fffffff;
    } else {
      float most = 0.0f;
#pragma unroll
      for (int j = 0; j < kChunk; ++j) most = max_nan(most, fabsf(held.v[j]));
      return __float_as_int(most) & 0x7fffffff;
    }
  }
  __device__ __forceinline__ int block_of(int batch, int i) const {
    return position(index(batch, i), kColumns ? lane_chunk() : 0).block;
  }
  __device__ __forceinline__ bool has_chunk(int batch, int i) const {
    return index(batch, i) < p.groups;
  }
  __device__ __forceinline__ void measure(const Chunk8 (&held)[kThreadChunks], int batch,
                                          int* ranges) const {
#pragma unroll
    for (int i = 0; i < kThreadChunks; ++i) {
      if (i / 2 * 2 < p.thread_chunks && has_chunk(batch, i))
        atomicMax(ranges + block_of(batch, i), largest(held[i]));
    }
  }

  /// The chunk's values as operands B of the first step, in the order of Square's words.
  __device__ __forceinline__ void inputs(uint4 (&in)[kInputs], const Chunk8& held, int e, bool dead,
                                         uint32_t minus) const {
    if constexpr (Op::kDirect) {
      uint32_t w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        w[j] = Op::kScaled ? scale_pair<Op::kFirst>(held.w[j], e) : held.w[j];
        if (dead) w[j] = 0;
      }
      in[0] = {w[0], w[2], w[1], w[3]};
    } else {
      const float factor = power_of_two(e);
      float v[kChunk];
#pragma unroll
      for (int j = 0; j < kChunk; ++j) v[j] = dead ? 0.0f : held.v[j] * factor;
      const Square square{{{v[0], v[1], v[4], v[5]}, {v[2], v[3], v[6], v[7]}}};
      to_planes<Op::kMiddle>(in, square, minus);
    }
  }

  /// Transforms the columns of a thread's chunks and writes those of `part` to the tile.
  __device__ __forceinline__ void spread(const Chunk8 (&held)[kThreadChunks], int batch, int part,
                                         const int* ranges) const {
    const int first_column = part * p.part_columns;
    const Lane lane = this_lane();
    const GroupSigns& signs = lane.signs;
    int e = 0;
#pragma unroll
    for (int i = 0; i < kThreadChunks; ++i) {
      if (i % 2 == 0 && i >= p.thread_chunks) break;
      const int g = index(batch, i);
      bool dead = false;  // must not reach other blocks
      if (p.guard) {
        const int range = has_chunk(batch, i) ? ranges[block_of(batch, i)] : 0;
        dead = range >= kInfinityBits;
        if (Op::kScaled) e = exponent_of<Op::kFirst>(range);
      }
      if constexpr (kColumns) {
        uint4 in[kInputs];
        inputs(in, held[i], e, dead, signs.minus);
        Square x{};
        mma<Op::kFirst>(x.v[0], signs.a, in[0].x, in[0].z);
        mma<Op::kFirst>(x.v[1], signs.a, in[0].y, in[0].w);
        if constexpr (kInputs > 1) {
          Square small{};
          mma<Op::kFirst>(small.v[0], signs.a, in[1].x, in[1].z);
          mma<Op::kFirst>(small.v[1], signs.a, in[1].y, in[1].w);
          add(x, small);
        }
        uint4 word[Op::kPlanes];
        to_planes<Op::kMiddle>(word, x, signs.minus);
        x = {};
        mma<Op::kMiddle>(x.v[0], word[0], signs.b[0].x, signs.b[0].y);
        mma<Op::kMiddle>(x.v[1], word[0], signs.b[1].x, signs.b[1].y);
        if constexpr (Op::kPlanes > 1) {
          Square small{};
          mma<Op::kMiddle>(small.v[0], word[1], signs.b[0].x, signs.b[0].y);
          mma<Op::kMiddle>(small.v[1], word[1], signs.b[1].x, signs.b[1].y);
          add(x, small);
        }
        to_planes<Op::kMiddle>(word, x, signs.minus);
        const int2 at = this->place(position(g, lane.unit));
        const int to = (place_of(g) ^ lane.bits) + lane.offset - first_column * 2;
        if (has_chunk(batch, i) && at.y >= first_column && at.y < first_column + p.part_columns) {
#pragma unroll
          for (int o = 0; o < Op::kPlanes; ++o)
            *reinterpret_cast<uint4*>(data + o * p.plane_bytes + to) = word[o];
        }
      } else {
        uint4 in[kInputs];
        inputs(in, held[i], e, dead, signs.minus);
        const int2 at = this->place(position(g, 0));
        const int column = at.y - first_column;
        if (g >= p.groups || column < 0 || column >= p.part_columns) continue;
        const int first = unit_address(p, at.x, at.y) - first_column * 2 + (column >> 3 & 3) * 4;
#pragma unroll
        for (int o = 0; o < kInputs; ++o) {
          unsigned char* to = data + o * p.plane_bytes;
          const uint4 w = in[o];  // elements 0 1, 4 5, 2 3, 6 7
          store_word(to, first, __byte_perm(w.x, w.y, 0x5410));
          store_word(to, first ^ 0x10, __byte_perm(w.x, w.y, 0x7632));
          store_word(to, first ^ 0x20, __byte_perm(w.z, w.w, 0x5410));
          store_word(to, first ^ 0x30, __byte_perm(w.z, w.w, 0x7632));
        }
      }
    }
  }
  static __device__ __forceinline__ void store_word(unsigned char* to, int at, uint32_t word) {
    *reinterpret_cast<uint32_t*>(to + at) = word;
  }
};

}  // namespace quarot::cuda
