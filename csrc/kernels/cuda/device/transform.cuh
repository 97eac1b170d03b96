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
constexpr int kLaneBytes = 3 * sizeof(uint4);  // of shared memory, for Loader::Lane
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
  int groups, batches;  // of the loads: groups of 256, or chunks; batches of them a thread's chunks
  int items;            // warps that multiply
  int thread_chunks;    // of a batch; even: two at a time hide each other's latency
  bool simple;          // a tile is one batch, one part and one run of memory
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
  int plane_bytes, buffer_bytes, table_at, places_at, lanes_at, ranges_at, slots_at, shared_bytes, threads;
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
    p.groups = elements / (has_columns ? kGroup : kChunk);
    const int lanes = has_columns ? p.threads / kWarp : p.threads;
    p.batches = static_cast<int>(ceil_div(p.groups, kThreadChunks * lanes));
    p.thread_chunks =
        p.batches == 1 ? round_up(static_cast<int>(ceil_div(p.groups, lanes)), 2) : kThreadChunks;
    p.simple = p.batches == 1 && p.parts == 1 && (tile_rows == 1 || dense) &&
               (p.block_bits == 0 || p.order == 1);
    p.plane_bytes = p.depth * p.part_columns * 2;
    const int factor_bytes = round_up(p.factor_order * p.factor_order, 128);
    p.buffer_bytes = planes * p.plane_bytes;
    const int table_bytes = p.depth * table_pitch(p.depth) + 2 * kMmaRows;
    const int places_bytes = has_columns ? kThreadChunks * lanes * 4 : 0;
    const int ranges_bytes = round_up(2 * p.stacked * p.side * 4, 16);
    const int slots_bytes =
        round_up(2 * static_cast<int>(tile_rows * slots_per_row) * slot_bytes, 16);
    const int lanes_bytes = kWarp * kLaneBytes;
    const int others = table_bytes + places_bytes + lanes_bytes + ranges_bytes + slots_bytes;
    const auto bytes = [&](int buffers) {
      const int tiles = buffers * p.buffer_bytes;
      return (tiles < factor_bytes ? factor_bytes : tiles) + others;
    };
    const auto blocks = [&](int buffers) {
      const int by_shared =
          device.processor_shared_bytes / (bytes(buffers) + kReservedSharedBytes);
      const int by_registers = kMaxTransformThreads / p.threads;
      return by_shared < by_registers ? by_shared : by_registers;
    };
    p.buffers = p.simple && bytes(2) <= device.block_shared_bytes && blocks(2) >= blocks(1) ? 2 : 1;
    p.shared_bytes = bytes(p.buffers);
    p.table_at = p.shared_bytes - others;
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
  p.block_groups = FastDiv(has_columns ? p.order >> p.order_bits : size / kChunk);

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
template <class Source, class Op, bool kColumns, bool kSimple, bool kOne>
struct Loader {
  using Chunk8 = Held<Op::kDirect>;
  static constexpr int kInputs = Op::kDirect ? 1 : Op::kPlanes;

  const TransformPlan& p;
  const Source& source;
  unsigned char* data;
  int* places;  // [warp][chunk] the address of the group's first unit

  __device__ __forceinline__ Loader(const TransformPlan& plan, const Source& from,
                                    unsigned char* shared)
      : p(plan), source(from), data(shared), places(reinterpret_cast<int*>(shared + p.places_at)) {}

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
    return {above * p.order + at.row,
            (at.block - above * p.side) * p.segment + at.column};
  }
  __device__ __forceinline__ int place_of(int g) const {
    const int2 at = place(position(g, 0));
    return unit_address(p, at.x, at.y);
  }
  /// Fills `places`.
  __device__ __forceinline__ void make_places() const {
    const int warps = blockDim.x / kWarp;
    for (int i = threadIdx.x; i < kThreadChunks * warps; i += blockDim.x) {
      places[i] = place_of(i % kThreadChunks * warps + i / kThreadChunks);
    }
  }

  __device__ __forceinline__ int chunk_at(int i) const {
    return static_cast<int>(threadIdx.x / kWarp) * kGroup + lane_chunk() + i * static_cast<int>(blockDim.x) * kChunk;
  }
  /// A tile's rows.
  struct Run {
    int64_t first;
    int rows;
    const char* data;
  };
  __device__ __forceinline__ Run run_of(int tile) const {
    const int64_t first = int64_t{tile} * p.tile_rows, left = p.rows - first;
    const int rows = left < 0 ? 0 : static_cast<int>(min(left, int64_t{p.tile_rows}));
    return {first, rows, source.row(first)};
  }
  /// Loads chunk i of a batch, zeros where there is none.
  __device__ __forceinline__ void fetch(typename Source::Raw& raw, const Run& run, int batch,
                                        int i) const {
    if (i / 2 * 2 >= p.thread_chunks) return;
    if (!kOne) raw = {};  // else no other block meets what is not there
    if constexpr (kSimple) {
      if (chunk_at(i) < run.rows * p.n) raw = source.load_from(run.data, chunk_at(i));
    } else {
      const int g = index(batch, i);
      const Position at = position(g, kColumns ? lane_chunk() : 0);
      const int row = p.row_blocks(at.block);
      if (g < p.groups && row < run.rows) {
        raw = source.load(run.first + row, (at.block - row * p.row_blocks.divisor()) *
                                                   p.block_size.divisor() +
                                               at.row * p.segment + at.column);
      }
    }
  }
  /// Loads and holds a batch, kInFlight chunks at a time.
  __device__ __forceinline__ void read(Chunk8 (&held)[kThreadChunks], int tile,
                                       int batch) const {
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
  /// Asks the L2 for a tile.
  __device__ __forceinline__ void announce(int tile) const {
    if constexpr (kSimple) {
      const Run run = run_of(tile);
      constexpr int kLine = 128 / Source::kBytes;  // a lane a line of 128 bytes
      for (int at = static_cast<int>(threadIdx.x) * kLine; at < run.rows * p.n;
           at += static_cast<int>(blockDim.x) * kLine) {
        source.announce(run.data, at);
      }
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
    if constexpr (kSimple) return p.block_size(chunk_at(i));
    return position(index(batch, i), kColumns ? lane_chunk() : 0).block;
  }
  __device__ __forceinline__ bool has_chunk(int batch, int i) const {
    return kSimple ? chunk_at(i) < p.elements : index(batch, i) < p.groups;
  }
  __device__ __forceinline__ void measure(const Chunk8 (&held)[kThreadChunks], int batch,
                                          int* ranges) const {
    int most = 0;
#pragma unroll
    for (int i = 0; i < kThreadChunks; ++i) {
      if (i / 2 * 2 >= p.thread_chunks) continue;
      const int bits = largest(held[i]);
      if constexpr (kOne) {
        most = has_chunk(batch, i) ? max(most, bits) : most;
      } else if (has_chunk(batch, i)) {
        atomicMax(ranges + block_of(batch, i), bits);
      }
    }
    if constexpr (kOne) {
      most = __reduce_max_sync(0xffffffffu, most);
      if (threadIdx.x % kWarp == 0) atomicMax(ranges, most);
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
                                         const int* ranges, int buffer) const {
    const int first_column = part * p.part_columns;
    const Lane lane = this_lane();
    const GroupSigns& signs = lane.signs;
    int e = 0;
    if (kOne && Op::kScaled) {
      e = exponent_of<Op::kFirst>(ranges[0]);
      keep(e);
    }
    int place[kThreadChunks];
    if constexpr (kSimple && kColumns) {
      const auto* from = reinterpret_cast<const int4*>(places) + threadIdx.x / kWarp * 2;
      const int4 low = from[0], high = from[1];
      place[0] = low.x, place[1] = low.y, place[2] = low.z, place[3] = low.w;
      place[4] = high.x, place[5] = high.y, place[6] = high.z, place[7] = high.w;
    }
#pragma unroll
    for (int i = 0; i < kThreadChunks; ++i) {
      if (i % 2 == 0 && i >= p.thread_chunks) break;
      const int g = index(batch, i);
      bool dead = false;  // must not reach other blocks
      if (!kOne && p.guard) {
        const int range = has_chunk(batch, i) ? ranges[block_of(batch, i)] : 0;
        dead = range >= kInfinityBits;
        if (Op::kScaled) e = exponent_of<Op::kFirst>(range);
      }
      if constexpr (kColumns) {
        uint4 in[kInputs];
        inputs(in, held[i], e, dead, signs.minus);
        Square x{};
#pragma unroll
        for (int o = kInputs - 1; o >= 0; --o) {  // the small ones first
          mma<Op::kFirst>(x.v[0], signs.a, in[o].x, in[o].z);
          mma<Op::kFirst>(x.v[1], signs.a, in[o].y, in[o].w);
        }
        uint4 word[Op::kPlanes];
        to_planes<Op::kMiddle>(word, x, signs.minus);
        x = {};
#pragma unroll
        for (int o = Op::kPlanes - 1; o >= 0; --o) {
          mma<Op::kMiddle>(x.v[0], word[o], signs.b[0].x, signs.b[0].y);
          mma<Op::kMiddle>(x.v[1], word[o], signs.b[1].x, signs.b[1].y);
        }
        to_planes<Op::kMiddle>(word, x, signs.minus);
        bool mine = has_chunk(batch, i);
        int to = ((kSimple ? place[i] : place_of(g)) ^ lane.bits) + lane.offset + buffer;
        if constexpr (!kSimple) {
          const int2 at = this->place(position(g, lane.unit));
          mine = mine && at.y >= first_column && at.y < first_column + p.part_columns;
          to -= first_column * 2;
        }
        if (mine) {
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
        const int first =
            buffer + unit_address(p, at.x, at.y) - first_column * 2 + (column >> 3 & 3) * 4;
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

/// Source: kDtype; Raw, load(row, column), values (sources.cuh). Sink: kExact, kSlotBytes;
/// passes(parts) over the parts; clear(plan, slots) before a tile; take(plan, product, scales,
/// slots, tile, pass).
template <class Source, class Sink, bool kColumns, bool kSimple, bool kOne>
__global__ void __launch_bounds__(kMaxTransformThreads, 1)
    transform_kernel(const __grid_constant__ TransformPlan p, const Source source,
                     const Sink sink) {
  using Op = Operands<Source, Sink::kExact, kColumns>;
  constexpr bool kEarly = kSimple && Op::kDirect;  // else registers are too few
  unsigned char* data = dynamic_shared();
  unsigned char* table = data + p.table_at;
  int* ranges = reinterpret_cast<int*>(data + p.ranges_at);
  unsigned char* slots = data + p.slots_at;
  const int slots_bytes = p.tile_rows * p.row_slots * Sink::kSlotBytes;
  stage_factor(p, reinterpret_cast<int8_t*>(data));  // the tile is not there yet
  const Loader<Source, Op, kColumns, kSimple, kOne> load(p, source, data);

  int tile = blockIdx.x;
  typename Source::Raw raw[kThreadChunks];  // of the next tile, kEarly
  if constexpr (kEarly) {
    const auto run = load.run_of(tile);
#pragma unroll
    for (int i = 0; i < kThreadChunks; ++i) load.fetch(raw[i], run, 0, i);
  }
  cp_async_wait_all();
  __syncthreads();
  make_table<Op::kMiddle>(p, reinterpret_cast<const int8_t*>(data), table);
  __syncthreads();
  load.make_lanes();
  if constexpr (kColumns && kSimple) load.make_places();
  const int slots_of_ranges = p.stacked * p.side;
  for (int i = threadIdx.x; i < 2 * slots_of_ranges; i += blockDim.x) ranges[i] = 0;
  for (int o = 0; o < Op::kPlanes * p.buffers; ++o) {
    const int first = p.stacked * p.order * p.part_columns * 2;
    for (int i = first + threadIdx.x * 16; i < p.plane_bytes; i += blockDim.x * 16)
      *reinterpret_cast<uint4*>(data + o * p.plane_bytes + i) = {0, 0, 0, 0};
  }
  sink.clear(p, slots);
  __syncthreads();

  for (int turn = 0; tile < p.tiles; tile += static_cast<int>(gridDim.x), turn ^= 1) {
    int* range = ranges + turn * slots_of_ranges;
    const int passes = kSimple ? 1 : sink.passes(p.parts);
    for (int pass = 0; pass < passes; ++pass) {
      Held<Op::kDirect> held[kThreadChunks];
      const auto read = [&](int batch) {
        if constexpr (kEarly) {
#pragma unroll
          for (int i = 0; i < kThreadChunks; ++i) load.hold(held[i], raw[i]);
        } else {
          load.read(held, tile, batch);
        }
      };
      const int batches = kSimple ? 1 : p.batches;
      if (kSimple) read(0);
      if ((kOne ? Op::kScaled : p.guard) && pass == 0) {
        for (int batch = 0; batch < batches; ++batch) {
          if (!kSimple) read(batch);
          load.measure(held, batch, range);
        }
      }
      const int part = kSimple ? 0 : pass % p.parts;
      // All know the ranges and have multiplied what was in the tile's buffer before.
      if (p.guard || p.buffers == 1) __syncthreads();
      if (p.guard && pass == 0) {
        for (int i = threadIdx.x; i < slots_of_ranges; i += blockDim.x)
          ranges[(turn ^ 1) * slots_of_ranges + i] = 0;
      }
      const int buffer = p.buffers == 2 ? turn * p.buffer_bytes : 0;
      for (int batch = 0; batch < batches; ++batch) {
        if (!kSimple) read(batch);
        load.spread(held, batch, part, range, buffer);
      }
      if (kEarly && tile + static_cast<int>(gridDim.x) < p.tiles) {
        const auto next = load.run_of(tile + static_cast<int>(gridDim.x));
#pragma unroll
        for (int i = 0; i < kThreadChunks; ++i) load.fetch(raw[i], next, 0, i);
      }
      __syncthreads();
      if (pass == 0) sink.clear(p, slots + (turn ^ 1) * slots_bytes);
      if (!kEarly && tile + static_cast<int>(gridDim.x) < p.tiles) load.announce(tile + static_cast<int>(gridDim.x));

      const int64_t rows_left = p.rows - int64_t{tile} * p.tile_rows;
      const int blocks = static_cast<int>(min(static_cast<int64_t>(p.tile_rows), rows_left)) *
                         p.row_blocks.divisor();
      Product product;
      multiply<Op::kMiddle, Op::kPlanes>(product, p, data + buffer, table, part, blocks);
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
