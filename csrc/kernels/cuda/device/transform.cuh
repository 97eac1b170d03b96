// The Hadamard transform of rows on tensor cores, for every kernel that contains one. It is longer
// than other files because plan, load, product, exchange and butterflies share one layout.
//
// Maths. A transform block of a row is a matrix X [order][segment]: order = K * 2^q rows, segment =
// 2^s * inner columns, and out = F^T X (I (x) H_2^s (x) I_inner) with F = H_K (x) H_2^q. F^T X is a
// matrix product with +-1, exact in its products; the s bits left are butterflies of additions in
// fp32. q is the smallest one that leaves s <= 9.
//
// Layout. A tile is tile_rows rows, all their blocks side by side: [order][columns], columns =
// tile_rows * n / order. In shared memory:
//
// * in [kOperands][order, padded to 16][pitch16]: 16-bit operands, the input itself or three bf16
//   that add up to an fp32 exactly. Padded rows are zeros. Read by ldmatrix; the pitch is 16 bytes
//   off a multiple of 128: no conflicts.
// * out [order][pitch32]: fp32, columns swizzled (out_column). It may lie over `in`.
// * signs [row tiles of F^T][column tiles][32 lanes]: fragments A.
//
// Parallelisation. A warp multiplies 32 rows of F^T by 64 columns: 64 sums a thread, on which it
// does the butterflies of column bits 0, 3, 4, 5. After the exchange through `out` a thread holds
// up to 8 chunks of 8 columns, does bits 1, 2 and 6 to 8 (or all bits, where inner > 1), and hands
// them to the sink, in the order of memory. Blocks are persistent: they go through tiles and load
// the next one while they finish this one, where shared memory allows.
//
// A row too large for the shared memory is computed in parts, one after the other: some rows of
// F^T, or one of its blocks; and if three operands an element are too many, they too come one after
// the other. Such rows are read several times, from the L2.
//
// Bound: memory. n = 4096, 16 bits: a multiprocessor has about 29 instruction slots for an element,
// needs about 15.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/vec.cuh"
#include "kernels/hadamard.h"

namespace quarot::cuda {

// ---- Plan ---------------------------------------------------------------------------------------

constexpr int kMaxTransformThreads = 512;
constexpr int kTransformRegisters = 65536 / kMaxTransformThreads;  // a thread, by __launch_bounds__
constexpr int kThreadChunks = 8;                                   // 64 floats a thread
constexpr int kWarpRows = 2 * kMmaRows;                            // of F^T, that a warp multiplies
constexpr int kWarpColumns = 64;
/// Bits of H_2^s: 0 ... 5 in a warp's 64 columns and in a chunk, and 3 between a thread's chunks.
constexpr int kColumnBits = 6;
constexpr int kStridedBits = 3;
/// Rows of F: more would not fit beside the data in shared memory.
constexpr int kMaxOrder = 192;
/// Columns of a tile of short rows, so that a block has work for several warps.
constexpr int kTileColumns = 256;

/// How a launch computes its transforms. All sizes in elements unless they say otherwise.
struct TransformPlan {
  int64_t rows;
  int64_t tiles;
  int n;  // a row
  int tile_rows;
  int order;           // of F
  int row_tiles;       // of F^T, 16 rows each
  int columns;         // of a tile
  int column_tiles;    // of a warp's columns
  int group_tiles;     // row tiles a warp multiplies: 2, or 1 where only that fits
  int parts;           // of a tile, one after the other
  int part_groups;     // groups a part
  bool part_is_block;  // a part is a block of the row and all rows of F^T; else some rows of F^T
  int operand_loads;   // 1: all operands are in `in` at once; else they come one after the other
  bool reload;         // `in` is loaded anew for each part
  int pitch16, pitch32;
  int factor_order, log_sylvester;  // K, q
  const int8_t* factor;
  int column_bits;   // s where inner = 1, else 0
  int strided_bits;  // bits between a thread's chunks
  float scale;
  bool overlay;  // `out` lies over `in`; else the next tile is loaded early
  int in_at, out_at, slots_at, shared_bytes, threads;
  // Chunks of n, of order * segment, of segment, of a strided bit's distance.
  FastDiv row_chunks, block_chunks, segment_chunks, stride_chunks;
};

inline int round_up(int x, int to) { return (x + to - 1) / to * to; }

/// Plans the transform of rows of n in blocks of matrix.size * inner, with `operands` operands of
/// 16 bits an element and slots_per_row * slot_bytes of shared memory for the sink. Returns false
/// where the shape needs the simple kernel (any_transform.cuh).
inline bool plan_transform(TransformPlan& p, const HadamardMatrix& m, int64_t rows, int64_t n,
                           int64_t inner, int operands, int64_t slots_per_row, int slot_bytes) {
  const DeviceLimits device = device_limits();
  int power = 0;
  while (m.factor_order << power < m.size) ++power;
  p.rows = rows;
  p.n = static_cast<int>(n);
  p.factor_order = static_cast<int>(m.factor_order);
  p.factor = m.factor;
  p.scale = m.scale;

  // Bits that stay in the columns: all that do not fit F, at least a chunk's 3, at most what
  // butterflies can do.
  int bits = inner == 1 ? (power < 3 ? power : 3) : 0;
  const int most = inner == 1 ? kColumnBits + kStridedBits : kStridedBits;
  while (bits < power && bits < most && (m.factor_order << (power - bits)) > kWarpRows) ++bits;
  p.log_sylvester = power - bits;
  p.order = static_cast<int>(m.factor_order << p.log_sylvester);
  const int64_t segment = inner << bits;
  if (p.order > kMaxOrder || segment % kChunk != 0) return false;
  if (inner > 1 && bits > 0 && inner % kChunk != 0) return false;
  p.column_bits = inner == 1 ? bits : 0;
  p.strided_bits = inner > 1 ? bits : bits > kColumnBits ? bits - kColumnBits : 0;
  const int stride = inner > 1 && bits > 0 ? static_cast<int>(inner) : kWarpColumns;

  p.row_tiles = static_cast<int>(ceil_div(p.order, kMmaRows));
  p.row_chunks = FastDiv(p.n / kChunk);
  p.segment_chunks = FastDiv(static_cast<int>(segment / kChunk));
  p.block_chunks = FastDiv(static_cast<int>(segment / kChunk) * p.order);
  p.stride_chunks = FastDiv(stride / kChunk);

  /// Lays out tiles of `columns` columns with operands_at_once operands; whether they fit.
  const auto fit = [&](int tile_rows, int columns, int parts, int operands_at_once) {
    p.tile_rows = tile_rows;
    p.tiles = ceil_div(rows, tile_rows);
    p.columns = columns;
    p.column_tiles = static_cast<int>(ceil_div(columns, kWarpColumns));
    p.pitch16 = p.pitch32 = p.column_tiles * kWarpColumns + kChunk;
    p.group_tiles = parts < p.row_tiles ? 2 : 1;
    const int groups = static_cast<int>(ceil_div(p.row_tiles, p.group_tiles));
    p.part_groups = p.part_is_block ? groups : static_cast<int>(ceil_div(groups, parts));
    p.parts = p.part_is_block ? parts : static_cast<int>(ceil_div(groups, p.part_groups));
    const int part_rows = p.part_groups * p.group_tiles * kMmaRows;
    const int part_order = part_rows < p.order ? part_rows : p.order;
    const int items = p.part_groups * p.column_tiles;
    p.threads = items * kWarp < kMaxTransformThreads ? items * kWarp : kMaxTransformThreads;
    const bool one_item = items * kWarp == p.threads;
    if (part_order * columns / kChunk > p.threads * kThreadChunks || (p.reload && !one_item))
      return false;

    const int signs_bytes = p.row_tiles * p.row_tiles * kWarp * static_cast<int>(sizeof(uint4));
    const int in_bytes = operands_at_once * p.row_tiles * kMmaRows * p.pitch16 * 2;
    const int out_bytes = part_order * p.pitch32 * 4;
    const int slots_bytes = round_up(static_cast<int>(tile_rows * slots_per_row) * slot_bytes, 16);
    const int apart = signs_bytes + in_bytes + out_bytes + slots_bytes;
    const int overlaid = signs_bytes + (in_bytes > out_bytes ? in_bytes : out_bytes) + slots_bytes;
    const auto blocks = [&](int bytes) {
      return device.processor_shared_bytes / (bytes + kReservedSharedBytes);
    };
    // Apart, the next tile is loaded early; overlaid, more blocks hide each other's loads: two of
    // them do.
    const bool may_overlay = one_item && (p.parts == 1 || p.reload);
    p.overlay = may_overlay && (p.reload || apart > device.block_shared_bytes ||
                                (blocks(apart) < 2 && blocks(overlaid) >= 2));
    p.shared_bytes = p.overlay ? overlaid : apart;
    p.in_at = signs_bytes;
    p.out_at = p.overlay ? signs_bytes : signs_bytes + in_bytes;
    p.slots_at = p.shared_bytes - slots_bytes;
    return p.shared_bytes <= device.block_shared_bytes;
  };

  // Whole tiles at once; or, of one row that is one block, some rows of F^T at a time.
  const int row_columns = static_cast<int>(n / p.order);
  int tile_rows = kTileColumns / row_columns;
  const int64_t fair =
      ceil_div(rows, device.processors);  // rows a tile, so that all processors work
  if (tile_rows > fair) tile_rows = static_cast<int>(fair);
  if (p.order > kWarpRows * 2 && tile_rows < 2)
    tile_rows = 2;  // two rows share the reads of a large F
  if (tile_rows > rows) tile_rows = static_cast<int>(rows);
  if (tile_rows < 1) tile_rows = 1;
  p.part_is_block = p.reload = false;
  p.operand_loads = 1;
  for (; tile_rows > 1; tile_rows /= 2) {
    if (fit(tile_rows, tile_rows * row_columns, 1, operands)) return true;
  }
  const int most_parts = row_columns == segment ? p.row_tiles : 1;
  for (int parts = 1; parts <= most_parts; ++parts) {
    if (fit(1, row_columns, parts, operands)) return true;
  }

  // Rows that have to be read several times.
  p.reload = true;
  p.part_is_block = row_columns != segment;
  const int blocks = static_cast<int>(row_columns / segment);
  for (p.operand_loads = 1; p.operand_loads <= operands; p.operand_loads += operands - 1) {
    for (int parts = blocks; parts <= (p.part_is_block ? blocks : p.row_tiles); ++parts) {
      if (fit(1, static_cast<int>(segment), parts, operands / p.operand_loads)) return true;
    }
    if (operands == 1) break;
  }
  return false;
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

// ---- Where a chunk lies -------------------------------------------------------------------------

/// Row and first column, in a tile's matrix, of chunk e of the tile, counted in the order of
/// memory.
struct Position {
  int row, column;
};
__device__ __forceinline__ Position position_of(const TransformPlan& p, int e) {
  const int block = p.block_chunks(e);
  const int rest = e - block * p.block_chunks.divisor();
  const int row = p.segment_chunks(rest);
  return {row,
          (block * p.segment_chunks.divisor() + rest - row * p.segment_chunks.divisor()) * kChunk};
}

/// The swizzle of `out`: eight lanes that read 16 bytes each, 32 bytes apart, then meet all banks.
__device__ __forceinline__ int out_column(int column) { return column ^ ((column >> 3) & 4); }

// ---- Fragments of F^T ---------------------------------------------------------------------------

/// F^T[row][column], 0 beyond its order.
__device__ __forceinline__ int sign_at(const TransformPlan& p, int row, int column) {
  if (row >= p.order || column >= p.order) return 0;
  const int mask = (1 << p.log_sylvester) - 1;
  int sign = __popc(row & column & mask) & 1 ? -1 : 1;
  if (p.factor_order > 1) {
    sign *= p.factor[(column >> p.log_sylvester) * p.factor_order + (row >> p.log_sylvester)];
  }
  return sign;
}

template <DType kOperand>
__device__ void make_signs(const TransformPlan& p, uint4* signs) {
  const int fragments = p.row_tiles * p.row_tiles * kWarp;
  for (int i = threadIdx.x; i < fragments; i += blockDim.x) {
    const int lane = i % kWarp, tile = i / kWarp;
    const int row = tile / p.row_tiles * kMmaRows + lane / 4;
    const int column = tile % p.row_tiles * kMmaDepth + lane % 4 * 2;
    const auto pair = [&](int r, int c) {
      return sign_bits<kOperand>(sign_at(p, r, c)) | sign_bits<kOperand>(sign_at(p, r, c + 1))
                                                         << 16;
    };
    signs[i] = {pair(row, column), pair(row + 8, column), pair(row, column + 8),
                pair(row + 8, column + 8)};
  }
}

// ---- Steps --------------------------------------------------------------------------------------

/// Zeros in the rows of `in` beyond the order.
__device__ __forceinline__ void clear_padding(const TransformPlan& p, uint16_t* in, int operands) {
  const int rows = p.row_tiles * kMmaRows - p.order, width = p.pitch16 / kChunk;
  if (rows == 0) return;
  for (int o = 0; o < operands; ++o) {
    auto* first = reinterpret_cast<uint4*>(in + (o * p.row_tiles * kMmaRows + p.order) * p.pitch16);
    for (int i = threadIdx.x; i < rows * width; i += blockDim.x) first[i] = {0, 0, 0, 0};
  }
}

/// Loads tile `tile` into `in`: all of it, or one block (block >= 0); all operands, or one (operand
/// >= 0).
template <class Source>
__device__ __forceinline__ void load_tile(const TransformPlan& p, const Source& source,
                                          int64_t tile, uint16_t* in, int block = -1,
                                          int operand = -1) {
  const int64_t first_row = tile * p.tile_rows;
  const int rows = static_cast<int>(min(static_cast<int64_t>(p.tile_rows), p.rows - first_row));
  const int chunks = block < 0 ? rows * p.row_chunks.divisor() : p.block_chunks.divisor();
  const int first_column = block < 0 ? 0 : block * p.block_chunks.divisor() * kChunk;
  const int distance = p.row_tiles * kMmaRows * p.pitch16;
  const auto target = [&](int e) {
    const Position at = position_of(p, e);
    return in + at.row * p.pitch16 + at.column;
  };
  if constexpr (Source::kOperands == 1) {
    for (int e = threadIdx.x; e < chunks; e += blockDim.x) {
      const int row = p.row_chunks(e);
      const int column = (e - row * p.row_chunks.divisor()) * kChunk + first_column;
      cp_async_16(shared_address(target(e)), source.address(first_row + row, column));
    }
    clear_padding(p, in, 1);
  } else {
    constexpr int kInFlight = Source::kInFlight < 4 ? Source::kInFlight : 4;
    for (int first = threadIdx.x; first < chunks;
         first += kInFlight * static_cast<int>(blockDim.x)) {
      typename Source::Raw raw[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int e = first + i * static_cast<int>(blockDim.x);
        if (e >= chunks) continue;
        const int row = p.row_chunks(e);
        raw[i] = source.load(first_row + row,
                             (e - row * p.row_chunks.divisor()) * kChunk + first_column);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int e = first + i * static_cast<int>(blockDim.x);
        if (e >= chunks) continue;
        float v[kChunk];
        source.values(v, raw[i]);
        uint16_t* to = target(e);
        // v = bf16 + bf16 + bf16, exactly: 24 bits are three times 8.
#pragma unroll
        for (int o = 0; o < Source::kOperands; ++o) {
          uint32_t w[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            w[j] = pack_bf16x2(v[2 * j], v[2 * j + 1]);
            v[2 * j] -= bf16_low(w[j]);
            v[2 * j + 1] -= bf16_high(w[j]);
          }
          if (operand < 0 || operand == o) {
            *reinterpret_cast<uint4*>(to) = {w[0], w[1], w[2], w[3]};
            to += distance;
          }
        }
      }
    }
    clear_padding(p, in, operand < 0 ? Source::kOperands : 1);
  }
}

__device__ __forceinline__ void clear_sums(float (&sum)[2][8][4]) {
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int c = 0; c < 8; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[m][c][i] = 0.0f;
}

/// sum[row tile][columns of 8][fragment] += two row tiles of F^T times 64 columns of `in`.
///
/// Tensor cores truncate the sums that they carry. For 16-bit inputs that is below the rounding of
/// the result; three operands an element are to be as good as fp32 (kFold): their products are
/// summed from zero in each step of 16 rows, and the steps' sums are added with rounding.
template <DType kOperand, int kOperands, bool kFold>
__device__ __forceinline__ void multiply(float (&sum)[2][8][4], const TransformPlan& p,
                                         const uint4* signs, const uint16_t* in, int group,
                                         int column_tile) {
  static_assert(kFold || kOperands == 1);
  const int lane = threadIdx.x % kWarp;
  const int row_tile = group * p.group_tiles;
  const bool two = p.group_tiles == 2 && row_tile + 1 < p.row_tiles;
  const uint4* a = signs + row_tile * p.row_tiles * kWarp + lane;
  // The address of the row that this lane gives to ldmatrix: depths 0-7 and 8-15 of 8 columns, then
  // of the next 8.
  const uint32_t row = shared_address(in + lane % 16 * p.pitch16 + column_tile * kWarpColumns +
                                      lane / 16 * kMmaColumns);
  const uint32_t operand_bytes = static_cast<uint32_t>(p.row_tiles * kMmaRows * p.pitch16) * 2;
  for (int depth = 0; depth < p.row_tiles; ++depth) {
    const uint4 a0 = a[depth * kWarp];
    const uint4 a1 = two ? a[(p.row_tiles + depth) * kWarp] : uint4{0, 0, 0, 0};
    const uint32_t from = row + static_cast<uint32_t>(depth * kMmaDepth * p.pitch16) * 2;
#pragma unroll
    for (int c = 0; c < 8; c += 2) {
      float step[2][2][4] = {};
#pragma unroll
      for (int o = kOperands - 1; o >= 0; --o) {  // the small ones first
        uint32_t b[4];
        ldmatrix_x4_trans(b, from + static_cast<uint32_t>(o) * operand_bytes +
                                 static_cast<uint32_t>(c) * kMmaColumns * 2);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma<kOperand>(kFold ? step[0][i] : sum[0][c + i], a0, b[2 * i], b[2 * i + 1]);
          if (two) mma<kOperand>(kFold ? step[1][i] : sum[1][c + i], a1, b[2 * i], b[2 * i + 1]);
        }
      }
      if constexpr (kFold) {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[m][c + i][e] += step[m][i][e];
      }
    }
  }
}

/// The butterflies to do, as in TransformPlan.
struct StageBits {
  int column, strided;
};
constexpr int kAnyBits = -1;
/// Those of H_2^s where inner = 1.
__host__ __device__ constexpr StageBits stage_bits(int column_bits) {
  return {column_bits, column_bits > kColumnBits ? column_bits - kColumnBits : 0};
}

__device__ __forceinline__ void butterfly(float& a, float& b) {
  const float t = a;
  a = t + b;
  b = t - b;
}

/// Column bits 0, 3, 4, 5 of a warp's 64 columns: a lane has columns 8 c + 2 t and the next.
__device__ __forceinline__ void butterflies_in_sums(float (&sum)[2][8][4], int column_bits) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    if (column_bits > 0) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        butterfly(sum[m][c][0], sum[m][c][1]);
        butterfly(sum[m][c][2], sum[m][c][3]);
      }
    }
#pragma unroll
    for (int bit = 0; bit < 3; ++bit) {
      if (column_bits > 3 + bit) {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          if ((c >> bit & 1) != 0) continue;
#pragma unroll
          for (int i = 0; i < 4; ++i) butterfly(sum[m][c][i], sum[m][c | 1 << bit][i]);
        }
      }
    }
  }
}

/// Writes a warp's sums into `out`, whose first row is row first_row of F^T X.
__device__ __forceinline__ void put_sums(const TransformPlan& p, float* out,
                                         const float (&sum)[2][8][4], int group, int column_tile,
                                         int first_row) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = (group * p.group_tiles + m) * kMmaRows + half * 8 + lane / 4;
      if (row >= p.order || m >= p.group_tiles) continue;
      float* to = out + (row - first_row) * p.pitch32;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const int column = column_tile * kWarpColumns + c * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(to + out_column(column)) = {sum[m][c][2 * half],
                                                               sum[m][c][2 * half + 1]};
      }
    }
  }
}

/// A thread's chunks after the transform: chunk i is chunk index(i) of the tile, or nothing (then
/// zeros) where that is < 0.
struct ThreadChunks {
  float v[kThreadChunks][kChunk];
  uint32_t indices[kThreadChunks /
                   2];  // 16 bits each: registers are short, and a tile has at most 2^16 elements

  __device__ __forceinline__ int index(int i) const {
    return static_cast<int16_t>(indices[i / 2] >> (i % 2 * 16));
  }
  __device__ __forceinline__ void set_index(int i, int e) {
    const uint32_t bits = static_cast<uint32_t>(e) & 0xffffu;
    indices[i / 2] = i % 2 == 0 ? bits : indices[i / 2] | bits << 16;
  }
};

/// Reads this thread's chunks of a part, which has `chunks` of them, and does the butterflies that
/// are left. The part starts at chunk first_chunk of the tile. Chunks that a strided bit joins are
/// neighbours in a thread: a unit of 2^strided_bits.
__device__ __forceinline__ void take_chunks(ThreadChunks& t, const TransformPlan& p,
                                            const StageBits& bits, const float* out, int chunks,
                                            int first_chunk) {
  const int mask = (1 << bits.strided) - 1;
  const int units = chunks >> bits.strided;
  const int stride = p.stride_chunks.divisor();
  int e = -1;
  Position at{0, 0};
#pragma unroll
  for (int i = 0; i < kThreadChunks; ++i) {
    if ((i & mask) == 0) {
      const int unit =
          static_cast<int>(threadIdx.x) + (i >> bits.strided) * static_cast<int>(blockDim.x);
      const int major = p.stride_chunks(unit);
      e = unit < units ? (major << bits.strided) * stride + unit - major * stride : -1;
      if (e >= 0) at = position_of(p, e);
    } else {
      e = e < 0 ? -1 : e + stride;
      at.column += stride * kChunk;
    }
    t.set_index(i, e < 0 ? -1 : e + first_chunk);
    if (e >= 0) {
      const float* from = out + at.row * p.pitch32;
      const float4 a = *reinterpret_cast<const float4*>(from + out_column(at.column));
      const float4 b = *reinterpret_cast<const float4*>(from + out_column(at.column + 4));
      t.v[i][0] = a.x, t.v[i][1] = a.y, t.v[i][2] = a.z, t.v[i][3] = a.w;
      t.v[i][4] = b.x, t.v[i][5] = b.y, t.v[i][6] = b.z, t.v[i][7] = b.w;
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) t.v[i][j] = 0.0f;
    }
    if (bits.column > 1) {
      butterfly(t.v[i][0], t.v[i][2]);
      butterfly(t.v[i][1], t.v[i][3]);
      butterfly(t.v[i][4], t.v[i][6]);
      butterfly(t.v[i][5], t.v[i][7]);
    }
    if (bits.column > 2) {
#pragma unroll
      for (int j = 0; j < 4; ++j) butterfly(t.v[i][j], t.v[i][j + 4]);
    }
  }
#pragma unroll
  for (int bit = 0; bit < kStridedBits; ++bit) {
    if (bits.strided > bit) {
#pragma unroll
      for (int i = 0; i < kThreadChunks; ++i) {
        if ((i >> bit & 1) != 0) continue;
#pragma unroll
        for (int j = 0; j < kChunk; ++j) butterfly(t.v[i][j], t.v[i | 1 << bit][j]);
      }
    }
  }
}

/// One part of a tile that does not fit: loads what it needs, operand by operand, and multiplies.
/// Every warp has at most one item. Starts and ends anywhere between barriers; `out` is complete
/// after the next one.
template <class Source>
__device__ __forceinline__ void reload_and_multiply(const TransformPlan& p, const Source& source,
                                                    const uint4* signs, uint16_t* in, float* out,
                                                    int64_t tile, int part, int first_group) {
  const int item = threadIdx.x / kWarp;
  const int group = first_group + item / p.column_tiles, column_tile = item % p.column_tiles;
  const bool active = group * p.group_tiles < p.row_tiles;
  float sum[2][8][4];
  clear_sums(sum);
  for (int load = 0; load < p.operand_loads; ++load) {
    __syncthreads();
    const int operand =
        p.operand_loads == 1 ? -1 : p.operand_loads - 1 - load;  // the small ones first
    load_tile(p, source, tile, in, p.part_is_block ? part : -1, operand);
    cp_async_wait_all();
    __syncthreads();
    if (!active) continue;
    constexpr bool kFold = Source::kOperands > 1;
    if (p.operand_loads == 1) {
      multiply<Source::kOperand, Source::kOperands, kFold>(sum, p, signs, in, group, column_tile);
    } else {
      multiply<Source::kOperand, 1, kFold>(sum, p, signs, in, group, column_tile);
    }
  }
  butterflies_in_sums(sum, p.column_bits);
  if (p.overlay) __syncthreads();
  if (active) put_sums(p, out, sum, group, column_tile, first_group * p.group_tiles * kMmaRows);
}

// ---- The kernel ---------------------------------------------------------------------------------

/// kBits = p.column_bits, or kAnyBits: stages behind a branch cost as many moves as additions.
/// kReload = p.reload. Source: kOperand, kOperands; address(row, column) where kOperands == 1, else
/// Raw, load, values (load_tile). Sink: passes(parts) over the parts; start(plan, slots);
/// take(plan, chunks, slots, tile, pass).
template <class Source, class Sink, int kBits, bool kReload>
__global__ void __launch_bounds__(kMaxTransformThreads)
    transform_kernel(const __grid_constant__ TransformPlan p, const Source source,
                     const Sink sink) {
  const StageBits bits =
      kBits == kAnyBits ? StageBits{p.column_bits, p.strided_bits} : stage_bits(kBits);
  unsigned char* shared = dynamic_shared();
  auto* signs = reinterpret_cast<uint4*>(shared);
  auto* in = reinterpret_cast<uint16_t*>(shared + p.in_at);
  auto* out = reinterpret_cast<float*>(shared + p.out_at);
  auto* slots = reinterpret_cast<int*>(shared + p.slots_at);
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int items = p.part_groups * p.column_tiles;
  const int part_rows = p.part_groups * p.group_tiles * kMmaRows;

  int64_t tile = blockIdx.x;
  if (!kReload) load_tile(p, source, tile, in);
  make_signs<Source::kOperand>(p, signs);
  sink.start(p, slots);

  for (; tile < p.tiles; tile += gridDim.x) {
    const int passes = sink.passes(p.parts);
    for (int pass = 0; pass < passes; ++pass) {
      const int part = pass % p.parts;
      const int first_group = p.part_is_block ? 0 : part * p.part_groups;
      const int first_row = first_group * p.group_tiles * kMmaRows;
      if constexpr (kReload) {
        reload_and_multiply(p, source, signs, in, out, tile, part, first_group);
      } else {
        if (pass == 0) cp_async_wait_all();
        __syncthreads();  // `in` is there, and all have taken the chunks of the part before
        for (int item = warp; item < items; item += warps) {
          const int group = first_group + item / p.column_tiles,
                    column_tile = item % p.column_tiles;
          if (group * p.group_tiles >= p.row_tiles) break;
          float sum[2][8][4];
          clear_sums(sum);
          multiply<Source::kOperand, Source::kOperands, (Source::kOperands > 1)>(
              sum, p, signs, in, group, column_tile);
          butterflies_in_sums(sum, bits.column);
          if (p.overlay) __syncthreads();  // then every warp has one item
          put_sums(p, out, sum, group, column_tile, first_row);
        }
      }
      __syncthreads();
      const bool more = !kReload && pass == passes - 1 && tile + gridDim.x < p.tiles;
      if (more && !p.overlay) load_tile(p, source, tile + gridDim.x, in);

      const int rows = min(part_rows, p.order - first_row);
      const int chunks = p.part_is_block ? p.block_chunks.divisor()
                         : p.parts > 1   ? rows * p.segment_chunks.divisor()
                                         : p.columns / kChunk * p.order;
      const int first_chunk = p.part_is_block ? part * p.block_chunks.divisor()
                                              : first_row * p.segment_chunks.divisor();
      ThreadChunks t;
      take_chunks(t, p, bits, out, chunks, first_chunk);
      sink.take(p, t, slots, tile, pass);
      if (more && p.overlay) {
        __syncthreads();
        load_tile(p, source, tile + gridDim.x, in);
      }
    }
  }
}

/// Runs a planned transform.
template <class Source, class Sink>
void launch_transform(const TransformPlan& p, const Source& source, const Sink& sink,
                      Stream stream) {
  const auto run = [&](auto kernel) {
    launch(kernel, persistent_blocks(p), p.threads, p.shared_bytes, stream, p, source, sink);
  };
  if (p.reload) return run(&transform_kernel<Source, Sink, kAnyBits, true>);
  if (p.strided_bits == stage_bits(p.column_bits).strided) {
    switch (p.column_bits) {
      case 0:
        return run(&transform_kernel<Source, Sink, 0, false>);
      case 3:
        return run(&transform_kernel<Source, Sink, 3, false>);
      case 4:
        return run(&transform_kernel<Source, Sink, 4, false>);
      case 5:
        return run(&transform_kernel<Source, Sink, 5, false>);
      case 6:
        return run(&transform_kernel<Source, Sink, 6, false>);
      case 7:
        return run(&transform_kernel<Source, Sink, 7, false>);
      case 8:
        return run(&transform_kernel<Source, Sink, 8, false>);
      case 9:
        return run(&transform_kernel<Source, Sink, 9, false>);
      default:
        break;
    }
  }
  run(&transform_kernel<Source, Sink, kAnyBits, false>);
}

}  // namespace quarot::cuda
