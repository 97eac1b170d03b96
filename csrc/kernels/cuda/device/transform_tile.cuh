// The first half of transform_kernel: a tile's elements come from memory, are measured, and go into
// the tile with their columns transformed. Maths and layout are in transform.cuh.
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

/// The constant matrices of the two 16-point steps as fragments, and -I.
struct GroupSigns {
  uint4 a;
  uint2 b[2];      // columns 0-7 and 8-15
  uint32_t minus;  // the nonzero word of -I's
};
/// The bits of a group, a nibble each, that the index bits of the steps are, lowest first.
constexpr int kRowsOfA = 0x3105, kColumnsOfA = 0x1530, kRowsOfB = 0x2764, kColumnsOfB = 0x4762;

/// The four bits of `index` to the bits of a group that `to` names, a nibble each.
__device__ __forceinline__ int spread_bits(int index, int to) {
  int x = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) x |= (index >> i & 1) << (to >> 4 * i & 15);
  return x;
}

/// Elements (x, y) and (x, y + 1) of a step's matrix: H_2's on bits below segment_bits, else I's.
template <DType kDtype>
__device__ __forceinline__ uint32_t sign_pair(int segment_bits, int x, int x_bits, int y,
                                              int y_bits) {
  const auto sign = [&](int a, int b) {
    if ((a ^ b) >> segment_bits != 0) return 0;
    return __popc(a & b & ((1 << segment_bits) - 1)) & 1 ? -1 : 1;
  };
  const int a = spread_bits(x, x_bits);
  return sign_bits<kDtype>(sign(a, spread_bits(y, y_bits))) |
         sign_bits<kDtype>(sign(a, spread_bits(y + 1, y_bits))) << 16;
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

/// What a lane needs to transform its part of a group. It waits in shared memory: registers are
/// short while a warp multiplies.
struct Lane {
  GroupSigns signs;
  int bits, offset;  // of the address of its unit: xored and added to that of the group's first
};

/// A lane's 8 values: words of 16-bit elements, or floats.
template <bool kDirect>
struct alignas(16) Values {
  uint32_t w[4];
};
template <>
struct alignas(16) Values<false> {
  float v[kChunk];
};

/// Brings, measures and spreads a tile's elements, 256 neighbours a warp and step: a group, or,
/// without columns, 32 chunks. kSimple: a chunk waits in the place where its lane's result will
/// be. kOne: one block a tile.
template <class Source, class Op, bool kColumns, bool kSimple, bool kOne>
struct Loader {
  using Raw = typename Source::Raw;
  using Values8 = Values<Op::kDirect>;
  static constexpr int kInputs = Op::kDirect ? 1 : Op::kPlanes;
  static constexpr int kWords = sizeof(Raw) / sizeof(uint4);
  /// Chunks wait as they are in memory; else as the floats that `measure` makes of them.
  static constexpr bool kStaged = kSimple && kWords <= Op::kPlanes;

  const TransformPlan& p;
  const Source& source;
  unsigned char* data;

  // ---- Where things are ------------------------------------------------------------------------

  __device__ __forceinline__ int first_group() const { return threadIdx.x / kWarp; }
  __device__ __forceinline__ int warps() const { return blockDim.x / kWarp; }
  __device__ __forceinline__ int lane_chunk() const {  // bits 3 5 of a group are t, 4 6 7 are g
    const int l = threadIdx.x % kWarp;
    return kColumns ? (l & 1) << 3 | (l >> 1 & 1) << 5 | (l >> 2 & 1) << 4 | (l >> 3) << 6
                    : l * kChunk;
  }
  __device__ __forceinline__ int lane_unit() const {  // bits 5 0 1 are g, 6 7 are t
    const int l = threadIdx.x % kWarp;
    return (l >> 2 & 1) << 5 | l >> 3 | (l & 3) << 6;
  }
  /// Of element `at` of group g.
  __device__ __forceinline__ Position position(int g, int at) const {
    if constexpr (kColumns) {
      const int blocks = p.block_groups(g), rest = g - blocks * p.block_groups.divisor();
      return {(blocks << p.block_bits) + (at >> p.segment_bits & ((1 << p.block_bits) - 1)),
              (rest << p.order_bits) + (at >> (p.segment_bits + p.block_bits)),
              at & ((1 << p.segment_bits) - 1)};
    } else {
      at += g * kGroup;
      const int block = kOne ? 0 : p.block_size(at);
      const int rest = at - block * p.block_size.divisor(), row = p.by_segment(rest);
      return {block, row, rest - row * p.segment};
    }
  }
  /// Row and column of the tile's matrix.
  __device__ __forceinline__ int2 place(const Position& at) const {
    const int above = p.stacked > 1 ? p.side_blocks(at.block) : 0;
    return {above * p.order + at.row, (at.block - above * p.side) * p.segment + at.column};
  }
  /// Address of the lane's unit of group g.
  __device__ __forceinline__ int unit_of(int g) const {
    const int2 at = place(position(g, kColumns ? lane_unit() : lane_chunk()));
    return unit_address(p, at.x, kColumns ? at.y : (at.y & ~31) | (at.y >> 3 & 3));
  }
  __device__ __forceinline__ int* places() const {
    return reinterpret_cast<int*>(data + p.places_at);
  }
  __device__ __forceinline__ int unit_of(int g, const Lane& lane) const {
    if constexpr (kColumns) return (places()[g] ^ lane.bits) + lane.offset;
    return unit_of(g);
  }
  __device__ __forceinline__ uint4* lanes() const {
    return reinterpret_cast<uint4*>(data + p.lanes_at) + threadIdx.x % kWarp;
  }
  /// Fills places and lanes.
  __device__ __forceinline__ void prepare() const {
    if constexpr (kColumns && kSimple) {
      for (int g = threadIdx.x; g < p.groups; g += blockDim.x) {
        const int2 at = place(position(g, 0));
        places()[g] = unit_address(p, at.x, at.y);
      }
    }
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    for (int j = first_group(); j < 9; j += warps()) {  // words of the fragments, and the rest
      uint32_t* to = reinterpret_cast<uint32_t*>(lanes() + j / 4 * kWarp) + j % 4;
      if (j < 4) {
        *to = sign_pair<Op::kFirst>(p.segment_bits, g + j % 2 * 8, kRowsOfA, 2 * t + j / 2 * 8,
                                    kColumnsOfA);
      } else if (j < 8) {
        *to = sign_pair<Op::kMiddle>(p.segment_bits, g + j / 2 % 2 * 8, kColumnsOfB,
                                     2 * t + j % 2 * 8, kRowsOfB);
      } else {
        const int bits = p.segment_bits + p.block_bits;
        const int at = unit_address(p, lane_unit() >> bits, lane_unit() & ((1 << bits) - 1));
        const uint32_t minus = (2 * t == g ? sign_bits<Op::kMiddle>(-1) : 0) |
                               (2 * t + 1 == g ? sign_bits<Op::kMiddle>(-1) << 16 : 0);
        lanes()[2 * kWarp] = {minus, static_cast<uint32_t>(at & 0x70),
                              static_cast<uint32_t>(at & ~0x70), 0};
      }
    }
  }
  __device__ __forceinline__ Lane this_lane() const {
    const uint4 a = lanes()[0], b = lanes()[kWarp], c = lanes()[2 * kWarp];
    return {{a, {{b.x, b.y}, {b.z, b.w}}, c.x}, static_cast<int>(c.y), static_cast<int>(c.z)};
  }

  // ---- Steps -----------------------------------------------------------------------------------

  /// A tile's rows.
  struct Run {
    int64_t first;
    int rows;
    const char* data;
  };
  __device__ __forceinline__ Run run_of(int tile) const {
    const int64_t first = int64_t{tile} * p.tile_rows;
    return {first, static_cast<int>(min(p.rows - first, int64_t{p.tile_rows})), source.row(first)};
  }
  /// Starts to load a tile to where its chunks wait; zeros where there are none. unit(g): unit_of.
  template <class Unit>
  __device__ __forceinline__ void stage(const Run& run, int buffer, const Unit& unit) const {
    if constexpr (kStaged) {
      const int end = run.rows * p.n;
#pragma unroll 2
      for (int g = first_group(); g < p.groups; g += warps()) {
        const int at = g * kGroup + lane_chunk();
        if (at >= p.elements) continue;
        const uint32_t to = shared_address(data + buffer + unit(g));
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          cp_async_16_or_zeros(to + static_cast<uint32_t>(w * p.plane_bytes),
                               source.word(run.data, at < end ? at : 0, w), at < end);
        }
      }
    }
  }
  /// Asks the L2 for a tile.
  __device__ __forceinline__ void announce(const Run& run) const {
    constexpr int kLine = 128 / Source::kBytes;  // a lane a line of 128 bytes
    if constexpr (kSimple) {
      for (int at = static_cast<int>(threadIdx.x) * kLine; at < run.rows * p.n;
           at += static_cast<int>(blockDim.x) * kLine) {
        source.announce(run.data, at);
      }
    }
  }
  /// The lane's chunk of group g from memory, zeros where there is none.
  __device__ __forceinline__ void load(Raw& raw, const Run& run, int g) const {
    raw = {};
    if constexpr (kSimple) {
      const int at = g * kGroup + lane_chunk();
      if (at < run.rows * p.n) raw = source.load_from(run.data, at);
    } else {
      if (g * kGroup + lane_chunk() >= p.elements) return;
      const Position at = position(g, lane_chunk());
      const int row = p.row_blocks(at.block);
      if (row >= run.rows) return;
      raw = source.load(run.first + row,
                        (at.block - row * p.row_blocks.divisor()) * p.block_size.divisor() +
                            at.row * p.segment + at.column);
    }
  }
  template <class T>
  __device__ __forceinline__ void take_waiting(T& to, int at) const {
    auto* words = reinterpret_cast<uint4*>(&to);
#pragma unroll
    for (int w = 0; w < static_cast<int>(sizeof(T) / sizeof(uint4)); ++w)
      words[w] = *reinterpret_cast<const uint4*>(data + at + w * p.plane_bytes);
  }
  __device__ __forceinline__ void convert(Values8& to, const Raw& raw) const {
    if constexpr (Op::kDirect) {
      const uint4 w = raw.words[0];
      to.w[0] = w.x, to.w[1] = w.y, to.w[2] = w.z, to.w[3] = w.w;
    } else {
      source.values(to.v, raw);
    }
  }

  /// Bits of the largest magnitude, or of a NaN.
  __device__ __forceinline__ int largest(const Values8& x) const {
    if constexpr (Op::kDirect) {
      const uint32_t a = max_pairs<Op::kFirst>(x.w[0] & 0x7fff7fffu, x.w[1] & 0x7fff7fffu);
      const uint32_t b = max_pairs<Op::kFirst>(x.w[2] & 0x7fff7fffu, x.w[3] & 0x7fff7fffu);
      const uint32_t c = max_pairs<Op::kFirst>(a, b);
      return __float_as_int(max_nan(to_float<Op::kFirst>(c), to_float<Op::kFirst>(c >> 16))) &
             0x7fffffff;
    } else {
      float most = 0.0f;
#pragma unroll
      for (int j = 0; j < kChunk; ++j) most = max_nan(most, fabsf(x.v[j]));
      return __float_as_int(most) & 0x7fffffff;
    }
  }
  __device__ __forceinline__ int block_of(int g) const {
    return kSimple ? p.block_size(g * kGroup + lane_chunk()) : position(g, lane_chunk()).block;
  }
  /// Finds the largest elements of the blocks; values that are not direct then wait as floats.
  __device__ __forceinline__ void measure(const Run& run, int buffer, int* ranges) const {
    const Lane lane = this_lane();
    int most = 0;
#pragma unroll 2
    for (int g = first_group(); g < p.groups; g += warps()) {
      if (!kColumns && g * kGroup + lane_chunk() >= p.elements) continue;
      const int at = kSimple ? buffer + unit_of(g, lane) : 0;
      Raw raw;
      if constexpr (kStaged) {
        take_waiting(raw, at);
      } else {
        load(raw, run, g);
      }
      Values8 x;
      convert(x, raw);
      if constexpr (kSimple && !Op::kDirect) {
        *reinterpret_cast<float4*>(data + at) = {x.v[0], x.v[1], x.v[2], x.v[3]};
        *reinterpret_cast<float4*>(data + at + p.plane_bytes) = {x.v[4], x.v[5], x.v[6], x.v[7]};
      }
      const int bits = largest(x);
      if constexpr (kOne) {
        most = max(most, bits);
      } else if (Op::kScaled || bits >= kInfinityBits) {
        atomicMax(ranges + block_of(g), bits);
      }
    }
    if constexpr (kOne) {
      most = __reduce_max_sync(0xffffffffu, most);
      if (threadIdx.x % kWarp == 0) atomicMax(ranges, most);
    }
  }

  /// Values as operands B of the first step, in the order of Square's words. Those of a block that
  /// is not finite must not reach others.
  __device__ __forceinline__ void to_inputs(uint4 (&in)[kInputs], const Values8& x, int range,
                                            uint32_t minus) const {
    const bool dead = !kOne && range >= kInfinityBits;
    const int e = Op::kScaled ? exponent_of<Op::kFirst>(range) : 0;
    if constexpr (Op::kDirect) {
      uint32_t w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        w[j] = Op::kScaled ? scale_pair<Op::kFirst>(x.w[j], e) : x.w[j];
        if (dead) w[j] = 0;
      }
      in[0] = {w[0], w[2], w[1], w[3]};
    } else {
      const float factor = power_of_two(e);
      float v[kChunk];
#pragma unroll
      for (int j = 0; j < kChunk; ++j) v[j] = dead ? 0.0f : x.v[j] * factor;
      const Square square{{{v[0], v[1], v[4], v[5]}, {v[2], v[3], v[6], v[7]}}};
      to_planes<Op::kMiddle>(in, square, minus);
    }
  }
  /// The two 16-point steps.
  __device__ __forceinline__ void transform(uint4 (&word)[Op::kPlanes], const uint4 (&in)[kInputs],
                                            const GroupSigns& signs) const {
    Square x{};
#pragma unroll
    for (int o = kInputs - 1; o >= 0; --o) {  // the small ones first
      mma<Op::kFirst>(x.v[0], signs.a, in[o].x, in[o].z);
      mma<Op::kFirst>(x.v[1], signs.a, in[o].y, in[o].w);
    }
    to_planes<Op::kMiddle>(word, x, signs.minus);
    x = {};
#pragma unroll
    for (int o = Op::kPlanes - 1; o >= 0; --o) {
      mma<Op::kMiddle>(x.v[0], word[o], signs.b[0].x, signs.b[0].y);
      mma<Op::kMiddle>(x.v[1], word[o], signs.b[1].x, signs.b[1].y);
    }
    to_planes<Op::kMiddle>(word, x, signs.minus);
  }

  /// Transforms the columns and writes those of `part` to the tile.
  __device__ __forceinline__ void spread(const Run& run, int buffer, int part,
                                         const int* ranges) const {
    constexpr int kTogether = 2;  // groups: they hide each other's latency
    const Lane lane = this_lane();
    const int first_column = part * p.part_columns;
    const int common = kOne && Op::kScaled ? ranges[0] : 0;
#pragma unroll 1
    for (int first = first_group(); first < p.groups; first += kTogether * warps()) {
      Values8 x[kTogether];
      int to[kTogether], range[kTogether], column_chunk[kTogether];
      bool mine[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int g = min(first + i * warps(), p.groups - 1);  // the last one again, but not stored
        mine[i] = first + i * warps() < p.groups && g * kGroup + lane_chunk() < p.elements;
        column_chunk[i] = kColumns ? 0 : place(position(g, lane_chunk())).y >> 3 & 3;  // of four, t
        if constexpr (kSimple) {
          to[i] = buffer + unit_of(g, lane);
          if (mine[i]) take_waiting(x[i], to[i]);
        } else {
          to[i] = unit_of(g) - first_column * 2;
          const int column = place(position(g, kColumns ? lane_unit() : lane_chunk())).y;
          Raw raw;
          load(raw, run, g);
          convert(x[i], raw);
          mine[i] = mine[i] && column >= first_column && column < first_column + p.part_columns;
        }
        range[i] = kOne || !p.guard ? common : mine[i] || !kSimple ? ranges[block_of(g)] : 0;
      }
      uint4 in[kTogether][kInputs], word[kTogether][Op::kPlanes];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) to_inputs(in[i], x[i], range[i], lane.signs.minus);
      if constexpr (kColumns) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) transform(word[i], in[i], lane.signs);
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if (!mine[i]) continue;
#pragma unroll
          for (int o = 0; o < Op::kPlanes; ++o)
            *reinterpret_cast<uint4*>(data + to[i] + o * p.plane_bytes) = word[i][o];
        }
      } else {
        __syncwarp();  // four lanes' chunks wait in each other's units
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if (!mine[i]) continue;
          const int t = column_chunk[i];
          const int unit = to[i] ^ t << 4;  // the first of the four
#pragma unroll
          for (int o = 0; o < kInputs; ++o)
            store_words(data + o * p.plane_bytes, unit, t, in[i][o]);
        }
      }
    }
  }
  /// Writes elements (0 1), (4 5), (2 3), (6 7) to word t of the four units from `unit`.
  static __device__ __forceinline__ void store_words(unsigned char* to, int unit, int t,
                                                     const uint4& w) {
    const uint32_t words[4] = {__byte_perm(w.x, w.y, 0x5410), __byte_perm(w.x, w.y, 0x7632),
                               __byte_perm(w.z, w.w, 0x5410), __byte_perm(w.z, w.w, 0x7632)};
#pragma unroll
    for (int c = 0; c < 4; ++c)
      *reinterpret_cast<uint32_t*>(to + (unit ^ c << 4) + t * 4) = words[c];
  }
};

}  // namespace quarot::cuda
