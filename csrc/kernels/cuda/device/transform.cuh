// The Hadamard transform of rows on tensor cores, for every kernel that contains one.
//
// Maths. A transform block of a row is a matrix X [order][segment], and out = F^T X (I (x) H) with
// F = H_K (x) H_2^q of that order and H = H_2^s on the columns, s <= 8. H acts in two steps of 16
// points on 256 neighbours, A Y B with constant 16 x 16 matrices A and B, in registers: the result
// of the first product is an operand of the second. Bits that are not transformed are identities
// in A and B. Then F^T X is a product whose columns are independent.
//
// Operands are what kMiddle says: 16 bits of the rows' type, rounded after each step, where the
// result is rounded to 16 bits too; or pairs of f16, 22 bits together, where the result is to be as
// good as fp32. f16 has few exponents: a block is multiplied by the power of two that takes its
// largest element to 2^6, so that 256-point sums fit.
//
// Layout. A tile is tile_blocks blocks, `stacked` above each other (small orders fill 16 rows),
// `side` side by side: [stacked * order, padded to 16][columns], 16 bits, one plane an operand.
// In a row of it the unit of 16 bytes 4 b + c holds, for t = 0 ... 3, columns 32 b + 8 t + c and the
// fourth after it, so that a lane of the product ends up with 8 neighbouring columns. Units are
// swizzled (unit_swizzle) against bank conflicts. Rows of padding are zeros.
//
// Parallelisation. A warp takes 256 neighbours at a time, a lane 8 of them, through A and B and
// writes them to the tile; after a barrier it multiplies 32 rows of F^T by 64 columns. Blocks are
// persistent and load their next tile during that product. Columns that do not fit come in parts,
// for each of which the rows are read again, from the L2.
//
// Bound: memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device/int4.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/vec.cuh"
#include "kernels/hadamard.h"

namespace quarot::cuda {

// ---- Plan ---------------------------------------------------------------------------------------

constexpr int kMaxTransformThreads = 512;
constexpr int kThreadChunks = 8;  // 64 elements a thread
constexpr int kWarpRows = 2 * kMmaRows;
constexpr int kWarpColumns = 64;
constexpr int kGroup = 256;  // neighbours that a warp transforms in registers
constexpr int kGroupBits = 8;
constexpr int kMaxOrder = 256;
constexpr int kLaneBytes = 3 * sizeof(uint4);  // of shared memory, for a Lane
/// A unit's elements are bits 2, 3 and 4 of a group, so that these must be columns.
constexpr int kUnitBits = 5;

/// How a launch computes its transforms. All sizes in elements unless they say otherwise.
struct TransformPlan {
  int64_t rows;
  int64_t tiles;
  int n;          // a row
  int tile_rows;  // rows of x
  int tile_blocks;
  int order, segment;
  int stacked, side;
  int depth;    // rows of the tile's matrix, whole mma tiles
  int columns;  // of the tile's matrix, whole warps
  int part_columns, parts;
  int groups;   // of 256 elements
  int items;    // warps that multiply
  bool simple;  // a tile is one part and one run of memory
  bool wide;            // a warp multiplies 16 rows of F^T by 128 columns, not 32 by 64
  int elements;         // of the loads
  bool guard;           // find the blocks' largest elements before the transform
  int row_step;         // elements between rows of the tile's matrix
  int row_slots;        // of the sink
  int segment_bits, block_bits, order_bits;  // of a group: column, block and row of X
  const int8_t* factor;
  int factor_order, log_sylvester;  // K, q
  float scale;
  int buffers;  // of tiles: with two, a barrier less
  int plane_bytes, buffer_bytes, factor_at, table_at, places_at, lanes_at, ranges_at, slots_at, shared_bytes, threads;
  FastDiv row_blocks, block_size, by_order, by_segment, block_groups, side_blocks, row_units, warp_tiles;
};

constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }

/// Bytes of a row of F's table: off a multiple of 128, against bank conflicts.
__host__ __device__ constexpr int table_pitch(int depth) { return depth * 2 + 16; }

/// Plans the transform of rows of n in blocks of matrix.size * inner, with `planes` operands an
/// element and slots_per_row * slot_bytes of shared memory for the sink; dense: rows follow each
/// other. Returns false where the
/// shape needs the simple kernel (any_transform.cuh).
inline bool plan_transform(TransformPlan& p, const HadamardMatrix& m, int64_t rows, int64_t n,
                           int64_t inner, bool has_columns, bool dense, int planes, bool scaled,
                           int64_t slots_per_row, int slot_bytes) {
  const DeviceLimits device = device_limits();
  int power = 0;
  while (m.factor_order << power < m.size) ++power;
  const int bits = !has_columns ? 0 : power < kGroupBits ? power : kGroupBits;
  const int64_t order = m.factor_order << (power - bits), segment = inner << bits;
  if (m.factor_order > 1 && m.factor_order % 4 != 0) return false;
  if (order > kMaxOrder || segment % kChunk != 0 || n > (int64_t{1} << 24) ||
      rows > (int64_t{1} << 30))
    return false;
  p.rows = rows;
  p.n = static_cast<int>(n);
  p.factor = m.factor;
  p.factor_order = static_cast<int>(m.factor_order);
  p.log_sylvester = power - bits;
  p.scale = m.scale;
  p.row_slots = static_cast<int>(slots_per_row);
  p.order = static_cast<int>(order);
  p.segment = static_cast<int>(segment);
  p.stacked = p.order <= kMmaRows / 2 && m.factor_order == 1 ? kMmaRows / p.order : 1;
  const bool one_side = p.order > 1 && p.stacked > 1;
  p.depth = round_up(p.stacked * p.order, kMmaRows);
  const int size = p.order * p.segment, row_blocks = p.n / size;

  // A group: as many rows of X as divide its order, blocks where these are too few.
  p.segment_bits = bits;
  p.block_bits = bits < kUnitBits ? kUnitBits - bits : 0;
  p.order_bits = 0;
  while (p.segment_bits + p.block_bits + p.order_bits < kGroupBits &&
         p.order % (2 << p.order_bits) == 0)
    ++p.order_bits;
  p.block_bits = kGroupBits - p.segment_bits - p.order_bits;
  if (!has_columns) p.block_bits = p.order_bits = 0;
  p.guard = scaled || p.stacked > 1 || p.block_bits > 0;

  // A tile a processor: all the threads it can have prepare.
  const bool few = rows <= device.processors;
  const int row_tiles = p.depth / kMmaRows;
  const int warp_rows = (row_tiles + 1) / 2;
  p.wide = row_tiles == 1;
  const int warp_columns = p.wide ? 2 * kWarpColumns : kWarpColumns;
  const auto fit = [&](int tile_rows, int parts) {
    p.tile_rows = tile_rows;
    p.tiles = static_cast<int>(ceil_div(rows, tile_rows));
    p.tile_blocks = tile_rows * row_blocks;
    p.side = round_up(static_cast<int>(ceil_div(p.tile_blocks, p.stacked)), 1 << p.block_bits);
    if (one_side && p.side > 1) return false;
    p.row_step = p.order == 1 ? p.side * p.segment : p.segment;
    p.columns = round_up(p.side * p.segment, warp_columns);
    p.part_columns = round_up(static_cast<int>(ceil_div(p.columns, parts)), warp_columns);
    p.parts = static_cast<int>(ceil_div(p.columns, p.part_columns));
    p.items = warp_rows * (p.part_columns / warp_columns);
    p.threads = few ? kMaxTransformThreads : p.items * kWarp;
    const int elements = p.stacked * p.side * size;
    p.elements = elements;
    p.groups = static_cast<int>(ceil_div(elements, kGroup));
    // Rows of whole 32 columns: the four lanes whose chunks share four units are neighbours.
    p.simple = p.parts == 1 && (tile_rows == 1 || dense) && (p.block_bits == 0 || p.order == 1) &&
               (has_columns || p.segment % 32 == 0);
    const int factor_bytes = round_up(p.factor_order * p.factor_order, 128);
    p.plane_bytes = p.depth * p.part_columns * 2;
    p.buffer_bytes = planes * p.plane_bytes;
    const int table_bytes = p.depth * table_pitch(p.depth) + 2 * kMmaRows;
    const int places_bytes = round_up(p.groups * 4, 16);
    const int ranges_bytes = round_up(2 * p.stacked * p.side * 4, 16);
    const int slots_bytes =
        round_up(2 * static_cast<int>(tile_rows * slots_per_row) * slot_bytes, 16);
    const int lanes_bytes = kWarp * kLaneBytes;
    const int others = factor_bytes + table_bytes + places_bytes + lanes_bytes + ranges_bytes + slots_bytes;
    const auto bytes = [&](int buffers) {
      return buffers * p.buffer_bytes + others;
    };
    const auto blocks = [&](int buffers) {
      const int by_shared =
          device.processor_shared_bytes / (bytes(buffers) + kReservedSharedBytes);
      const int by_registers = kMaxTransformThreads / p.threads;
      return by_shared < by_registers ? by_shared : by_registers;
    };
    p.buffers = p.simple && bytes(2) <= device.block_shared_bytes && blocks(2) >= blocks(1) ? 2 : 1;
    p.shared_bytes = bytes(p.buffers);
    p.factor_at = p.shared_bytes - others;
    p.table_at = p.factor_at + factor_bytes;
    p.places_at = p.table_at + table_bytes;
    p.lanes_at = p.places_at + places_bytes;
    p.ranges_at = p.lanes_at + lanes_bytes;
    p.slots_at = p.ranges_at + ranges_bytes;
    return p.items * kWarp <= kMaxTransformThreads && p.shared_bytes <= device.block_shared_bytes;
  };

  p.row_blocks = FastDiv(row_blocks);
  p.block_size = FastDiv(size);
  p.by_order = FastDiv(p.order);
  p.row_units = FastDiv(p.depth / 4);
  p.by_segment = FastDiv(p.segment);
  p.block_groups = FastDiv(p.order >> p.order_bits);

  // About 256 columns; fewer where that gives all processors work; at most what fits.
  int64_t tile_rows = int64_t{p.stacked} * (kGroup / p.segment) / row_blocks;
  const int64_t fair = ceil_div(rows, device.processors);
  if (tile_rows > fair) tile_rows = fair;
  if (tile_rows < 1) tile_rows = 1;
  for (; tile_rows > 1; tile_rows /= 2) {
    if (fit(static_cast<int>(tile_rows), 1)) break;
  }
  if (one_side) tile_rows = p.stacked / row_blocks > 1 ? p.stacked / row_blocks : 1;
  if (one_side && tile_rows > fair) tile_rows = fair;
  int parts = 1;
  while (!fit(static_cast<int>(tile_rows), parts)) {
    if (p.part_columns == warp_columns) return false;
    ++parts;
  }
  p.side_blocks = FastDiv(p.side);
  p.warp_tiles = FastDiv(p.part_columns / warp_columns);
  return true;
}

/// Blocks of a launch: as many as run at the same time.
inline int64_t persistent_blocks(const TransformPlan& p) {
  const DeviceLimits device = device_limits();
  int per_processor = device.processor_shared_bytes / (p.shared_bytes + kReservedSharedBytes);
  const int by_registers = kMaxTransformThreads / p.threads;
  if (per_processor > by_registers) per_processor = by_registers;
  if (per_processor < 1) per_processor = 1;
  const int64_t most = int64_t{per_processor} * device.processors;
  return p.tiles < most ? p.tiles : most;
}

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
  constexpr int kMost = kDtype == DType::f16 ? 15 : 100;  // as powers of two of the type
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

// ---- F's table: F [depth][depth] of the middle type, F = I (x) H_K (x) H_2^q ---------------------

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
      const int sign = p.by_order(k) != p.by_order(m) ? 0 : __popc(k & m & (p.order - 1)) & 1 ? -1 : 1;
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
__device__ __forceinline__ int unit_swizzle(int k, int c) {
  return (k & 7) ^ (c & 3);
}

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

  // ---- Where things are --------------------------------------------------------------------------

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
  __device__ __forceinline__ int* places() const { return reinterpret_cast<int*>(data + p.places_at); }
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
    if (threadIdx.x >= kWarp) return;
    const GroupSigns s = make_group_signs<Op::kFirst, Op::kMiddle>(p.segment_bits);
    const int bits = p.segment_bits + p.block_bits;
    const int at = unit_address(p, lane_unit() >> bits, lane_unit() & ((1 << bits) - 1));
    lanes()[0] = s.a;
    lanes()[kWarp] = {s.b[0].x, s.b[0].y, s.b[1].x, s.b[1].y};
    lanes()[2 * kWarp] = {s.minus, static_cast<uint32_t>(at & 0x70),
                          static_cast<uint32_t>(at & ~0x70), 0};
  }
  __device__ __forceinline__ Lane this_lane() const {
    const uint4 a = lanes()[0], b = lanes()[kWarp], c = lanes()[2 * kWarp];
    return {{a, {{b.x, b.y}, {b.z, b.w}}, c.x}, static_cast<int>(c.y), static_cast<int>(c.z)};
  }

  // ---- Steps -------------------------------------------------------------------------------------

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
  __device__ __forceinline__ int first_group() const { return threadIdx.x / kWarp; }
  __device__ __forceinline__ int warps() const { return blockDim.x / kWarp; }

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
        column_chunk[i] =
            kColumns ? 0 : place(position(g, lane_chunk())).y >> 3 & 3;  // of four, t
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

/// What a warp multiplied: 32 rows of F^T by 64 columns, or 16 by 128. Its lanes have chunks of 8
/// neighbours; chunk i is element offset(i) of the tile, in the order of memory, or nothing where
/// that is < 0.
struct Product {
  static constexpr int kNone = 1 << 30;
  float sum[2][8][4];  // of the two mma tiles of rows, or the two halves of the columns
  int first[2][2];     // element of row 0 and columns 0 and 32 of each
  int row[2];          // of the tile's matrix
  int row_step, rows, end;

  __device__ __forceinline__ int offset(int i) const {
    const int e = first[i / 4][i % 2] + (i / 2 % 2 ? row_step : 0);
    return e < end && row[i / 4] + i / 2 % 2 * 8 < rows ? e : -1;
  }
  __device__ __forceinline__ void values(float (&v)[kChunk], int i) const {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) v[j] = sum[i / 4][i % 2 * 4 + j % 4][i / 2 % 2 * 2 + j / 4];
  }
};

template <DType kMiddle, int kPlanes>
__device__ __forceinline__ void multiply(Product& product, const TransformPlan& p,
                                         const unsigned char* data, const unsigned char* table,
                                         int part, int blocks) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = p.warp_tiles(warp);
  const int tile = (warp - group * p.warp_tiles.divisor()) * (p.wide ? 2 : 1);
  const int pitch = p.part_columns * 2, row_tiles = p.depth / kMmaRows;
  auto& sum = product.sum;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int c = 0; c < 8; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[m][c][i] = 0.0f;

  const uint32_t a_at = shared_address(table + ((lane & 7) + lane / 16 * 8) * table_pitch(p.depth) +
                                       (group * kWarpRows + (lane & 8)) * 2);
  const auto b_from = [&](int at) {
    const int swizzle = unit_swizzle(lane, part * (p.part_columns / kWarpColumns) + at);
    return shared_address(data + lane % 16 * pitch) +
           static_cast<uint32_t>(at * kWarpColumns * 2 + ((lane / 16 ^ swizzle) << 4));
  };
  const uint32_t b_at = b_from(tile);
  const auto multiply_tile = [&](float (&to)[8][4], const uint32_t (&a)[4], uint32_t from) {
#pragma unroll
    for (int c = 0; c < 8; c += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, from ^ static_cast<uint32_t>(c << 4));
      mma<kMiddle>(to[c], {a[0], a[1], a[2], a[3]}, b[0], b[1]);
      mma<kMiddle>(to[c + 1], {a[0], a[1], a[2], a[3]}, b[2], b[3]);
    }
  };
  if (warp >= p.items) {
    product.end = 0;
    product.first[0][0] = product.first[0][1] = product.first[1][0] = product.first[1][1] = 0;
    return;
  }
  if (p.wide) {  // then row_tiles = 1
    const uint32_t b_next = b_from(tile + 1);
    uint32_t a[4];
    ldmatrix_x4_trans(a, a_at);
#pragma unroll
    for (int o = kPlanes - 1; o >= 0; --o) {  // the small ones first
      multiply_tile(sum[0], a, b_at + static_cast<uint32_t>(o * p.plane_bytes));
      multiply_tile(sum[1], a, b_next + static_cast<uint32_t>(o * p.plane_bytes));
    }
  } else {
#pragma unroll
    for (int o = kPlanes - 1; o >= 0; --o) {
      uint32_t from = b_at + static_cast<uint32_t>(o * p.plane_bytes), signs = a_at;
#pragma unroll 2
      for (int k = 0; k < row_tiles; ++k) {
        uint32_t a0[4], a1[4];  // the second may lie beyond the table: then its results are not used
        ldmatrix_x4_trans(a0, signs);
        ldmatrix_x4_trans(a1, signs + kMmaRows * 2);
#pragma unroll
        for (int c = 0; c < 8; c += 2) {
          uint32_t b[4];
          ldmatrix_x4_trans(b, from ^ static_cast<uint32_t>(c << 4));
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            mma<kMiddle>(sum[0][c + i], {a0[0], a0[1], a0[2], a0[3]}, b[2 * i], b[2 * i + 1]);
            mma<kMiddle>(sum[1][c + i], {a1[0], a1[1], a1[2], a1[3]}, b[2 * i], b[2 * i + 1]);
          }
        }
        from += static_cast<uint32_t>(kMmaDepth * pitch);
        signs += static_cast<uint32_t>(kMmaDepth * table_pitch(p.depth));
      }
    }
  }

  const int size = p.block_size.divisor();
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    product.row[m] = group * kWarpRows + (p.wide ? 0 : m * kMmaRows) + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = part * p.part_columns + (tile + (p.wide ? m : 0)) * kWarpColumns +
                         half * 32 + lane % 4 * kChunk;
      const int beside = p.by_segment(column);
      product.first[m][half] = beside < p.side ? beside * size + column - beside * p.segment +
                                                     product.row[m] * p.row_step
                                               : Product::kNone;
    }
  }
  product.row_step = 8 * p.row_step;
  product.rows = p.stacked * p.order;
  product.end = blocks * size;
}

// ---- The kernel ---------------------------------------------------------------------------------

/// What the sink needs of a tile: the bits of its blocks' largest elements.
template <DType kFirst, bool kScaled, bool kOnly>
struct TileScales {
  static constexpr bool kOne = kOnly;  // a tile is one block
  const int* ranges;
  /// What block `block` must be multiplied by; NaN if it is not finite.
  __device__ __forceinline__ float operator()(const TransformPlan& p, int block) const {
    if (kOne ? !kScaled : !p.guard) return 1.0f;
    const int bits = ranges[block];
    if (bits >= kInfinityBits) return __int_as_float(0x7fc00000);
    return kScaled ? power_of_two(-exponent_of<kFirst>(bits)) : 1.0f;
  }
};

/// Source: kDtype, kBytes; Raw, row, word, load_from, load, values, announce (sources.cuh). Sink:
/// kExact, kSlotBytes; passes(parts) over the parts; clear(plan, slots) before a tile; take(plan,
/// product, scales, slots, tile, pass).
template <class Source, class Sink, bool kColumns, bool kSimple, bool kOne>
__global__ void __launch_bounds__(kMaxTransformThreads, 1)
    transform_kernel(const __grid_constant__ TransformPlan p, const Source source,
                     const Sink sink) {
  using Op = Operands<Source, Sink::kExact, kColumns>;
  unsigned char* data = dynamic_shared();
  unsigned char* table = data + p.table_at;
  int* ranges = reinterpret_cast<int*>(data + p.ranges_at);
  unsigned char* slots = data + p.slots_at;
  const int slots_bytes = p.tile_rows * p.row_slots * Sink::kSlotBytes;
  const int range_count = p.stacked * p.side;
  const int step = static_cast<int>(gridDim.x);
  const Loader<Source, Op, kColumns, kSimple, kOne> load{p, source, data};

  int tile = blockIdx.x;
  load.stage(load.run_of(tile), 0, [&](int g) { return load.unit_of(g); });
  auto* factor = reinterpret_cast<int8_t*>(data + p.factor_at);
  stage_factor(p, factor);
  load.prepare();
  for (int i = threadIdx.x; i < 2 * range_count; i += blockDim.x) ranges[i] = 0;
  for (int o = 0; o < Op::kPlanes * p.buffers; ++o) {
    const int first = p.stacked * p.order * p.part_columns * 2;
    for (int i = first + threadIdx.x * 16; i < p.plane_bytes; i += blockDim.x * 16)
      *reinterpret_cast<uint4*>(data + o * p.plane_bytes + i) = {0, 0, 0, 0};
  }
  sink.clear(p, slots);
  cp_async_wait_all();
  __syncthreads();
  make_table<Op::kMiddle>(p, factor, table);

  for (int turn = 0; tile < p.tiles; tile += step, turn ^= 1) {
    int* range = ranges + turn * range_count;
    const int buffer = p.buffers == 2 ? turn * p.buffer_bytes : 0;
    const auto run = load.run_of(tile);
    const bool more = tile + step < p.tiles;
    const int passes = kSimple ? 1 : sink.passes(p.parts);
    for (int pass = 0; pass < passes; ++pass) {
      const int part = kSimple ? 0 : pass % p.parts;
      if (kSimple) cp_async_wait_all();  // a lane reads what it has loaded itself
      if ((kOne ? Op::kScaled : p.guard) && pass == 0) {
        load.measure(run, buffer, range);
        __syncthreads();
        for (int i = threadIdx.x; i < range_count; i += blockDim.x)
          ranges[(turn ^ 1) * range_count + i] = 0;
      }
      if (!kSimple) __syncthreads();  // all have multiplied the part before
      load.spread(run, buffer, part, range);
      __syncthreads();
      if (pass == 0) sink.clear(p, slots + (turn ^ 1) * slots_bytes);
      if (kSimple && more) {
        const auto next = load.run_of(tile + step);
        if (p.buffers == 2) {
          const Lane lane = load.this_lane();
          load.stage(next, p.buffer_bytes - buffer, [&](int g) { return load.unit_of(g, lane); });
        } else {
          load.announce(next);
        }
      }

      Product product;
      multiply<Op::kMiddle, Op::kPlanes>(product, p, data + buffer, table, part,
                                         run.rows * p.row_blocks.divisor());
      if (kSimple && p.buffers == 1 && more) {
        __syncthreads();
        const Lane lane = load.this_lane();
        load.stage(load.run_of(tile + step), 0, [&](int g) { return load.unit_of(g, lane); });
      }
      sink.take(p, product, TileScales<Op::kFirst, Op::kScaled, kOne>{range},
                slots + turn * slots_bytes, tile, pass);
    }
  }
}

/// Transforms rows of n in blocks of matrix.size * inner into `sink`, with slots_per_row slots of
/// shared memory a row; kColumns: inner = 1. Returns false where the shape needs the simple kernel.
template <bool kColumns, class Source, class Sink>
bool launch_transform(const HadamardMatrix& matrix, int64_t rows, int64_t n, int64_t inner,
                      const Source& source, const Sink& sink, int64_t slots_per_row,
                      Stream stream) {
  using Op = Operands<Source, Sink::kExact, kColumns>;
  TransformPlan p{};
  if (!plan_transform(p, matrix, rows, n, inner, kColumns, source.is_dense(n), Op::kPlanes, Op::kScaled, slots_per_row,
                      Sink::kSlotBytes))
    return false;
  launch(!p.simple            ? &transform_kernel<Source, Sink, kColumns, false, false>
         : p.stacked * p.side == 1 ? &transform_kernel<Source, Sink, kColumns, true, true>
                              : &transform_kernel<Source, Sink, kColumns, true, false>,
         persistent_blocks(p), p.threads, p.shared_bytes, stream, p, source, sink);
  return true;
}

}  // namespace quarot::cuda
