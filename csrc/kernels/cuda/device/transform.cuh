// The general Hadamard transform of rows on tensor cores: rows of several blocks that share a
// scale, rows too long for one tile, positions apart from each other. fwht.cuh is faster where it
// can.
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
// In a row of it the unit of 16 bytes 4 b + c holds, for t = 0 ... 3, columns 32 b + 8 t + c and
// the fourth after it, so that a lane of the product ends up with 8 neighbouring columns. Units are
// swizzled (unit_swizzle) against bank conflicts. Rows of padding are zeros.
//
// Parallelisation. A warp takes 256 neighbours at a time, a lane 8 of them, through A and B and
// writes them to the tile; after a barrier it multiplies 32 rows of F^T by 64 columns. Blocks are
// persistent. Columns that do not fit come in parts,
// for each of which the rows are read again, from the L2.
//
// Bound: memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/transform_plan.cuh"
#include "kernels/cuda/device/transform_tile.cuh"
#include "kernels/cuda/device/vec.cuh"
#include "kernels/hadamard.h"

namespace quarot::cuda {

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
        uint32_t a0[4],
            a1[4];  // the second may lie beyond the table: then its results are not used
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
template <DType kFirst, bool kScaled>
struct TileScales {
  const int* ranges;
  /// What block `block` must be multiplied by; NaN if it is not finite.
  __device__ __forceinline__ float operator()(const TransformPlan& p, int block) const {
    if (!p.guard) return 1.0f;
    const int bits = ranges[block];
    if (bits >= kInfinityBits) return __int_as_float(0x7fc00000);
    return kScaled ? power_of_two(-exponent_of<kFirst>(bits)) : 1.0f;
  }
};

/// Source: kDtype; Raw, load(row, column), values (sources.cuh). Sink: kExact, kSlotBytes;
/// passes(parts) over the parts; clear(plan, slots) before a tile; take(plan, product, scales,
/// slots, tile, pass).
template <class Source, class Sink, bool kColumns>
__global__ void __launch_bounds__(kMaxTransformThreads, 1)
    transform_kernel(const __grid_constant__ TransformPlan p, const Source source,
                     const Sink sink) {
  using Op = Operands<Source, Sink::kExact, kColumns>;
  unsigned char* data = dynamic_shared();
  unsigned char* table = data + p.table_at;
  int* ranges = reinterpret_cast<int*>(data + p.ranges_at);
  unsigned char* slots = data + p.slots_at;
  const int slots_bytes = p.tile_rows * p.row_slots * Sink::kSlotBytes;
  stage_factor(p, reinterpret_cast<int8_t*>(data));  // the tile is not there yet
  const Loader<Source, Op, kColumns> load(p, source, data);

  int tile = blockIdx.x;
  cp_async_wait_all();
  __syncthreads();
  make_table<Op::kMiddle>(p, reinterpret_cast<const int8_t*>(data), table);
  __syncthreads();
  load.make_lanes();
  const int slots_of_ranges = p.stacked * p.side;
  for (int i = threadIdx.x; i < 2 * slots_of_ranges; i += blockDim.x) ranges[i] = 0;
  for (int o = 0; o < Op::kPlanes; ++o) {
    const int first = p.stacked * p.order * p.part_columns * 2;
    for (int i = first + threadIdx.x * 16; i < p.plane_bytes; i += blockDim.x * 16)
      *reinterpret_cast<uint4*>(data + o * p.plane_bytes + i) = {0, 0, 0, 0};
  }
  sink.clear(p, slots);
  __syncthreads();

  for (int turn = 0; tile < p.tiles; tile += static_cast<int>(gridDim.x), turn ^= 1) {
    int* range = ranges + turn * slots_of_ranges;
    const int passes = sink.passes(p.parts);
    for (int pass = 0; pass < passes; ++pass) {
      Held<Op::kDirect> held[kThreadChunks];
      if (p.guard && pass == 0) {
        for (int batch = 0; batch < p.batches; ++batch) {
          load.read(held, tile, batch);
          load.measure(held, batch, range);
        }
      }
      const int part = pass % p.parts;
      // All know the ranges and have multiplied what was in the tile's buffer before.
      __syncthreads();
      if (p.guard && pass == 0) {
        for (int i = threadIdx.x; i < slots_of_ranges; i += blockDim.x)
          ranges[(turn ^ 1) * slots_of_ranges + i] = 0;
      }
      for (int batch = 0; batch < p.batches; ++batch) {
        load.read(held, tile, batch);
        load.spread(held, batch, part, range);
      }
      __syncthreads();
      if (pass == 0) sink.clear(p, slots + (turn ^ 1) * slots_bytes);
      const int64_t rows_left = p.rows - int64_t{tile} * p.tile_rows;
      const int blocks = static_cast<int>(min(static_cast<int64_t>(p.tile_rows), rows_left)) *
                         p.row_blocks.divisor();
      Product product;
      multiply<Op::kMiddle, Op::kPlanes>(product, p, data, table, part, blocks);
      sink.take(p, product, TileScales<Op::kFirst, Op::kScaled>{range}, slots + turn * slots_bytes,
                tile, pass);
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
  if (!plan_transform(p, matrix, rows, n, inner, kColumns, source.is_dense(n), Op::kPlanes,
                      Op::kScaled, slots_per_row, Sink::kSlotBytes))
    return false;
  launch(&transform_kernel<Source, Sink, kColumns>, persistent_blocks(p), p.threads, p.shared_bytes,
         stream, p, source, sink);
  return true;
}

}  // namespace quarot::cuda
