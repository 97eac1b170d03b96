// How a launch of transform_kernel cuts its rows into tiles, and where a tile lies in shared
// memory. What the names mean is in transform.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/vec.cuh"
#include "kernels/hadamard.h"

namespace quarot::cuda {

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
  int tiles;
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
  bool wide;            // a warp multiplies 16 rows of F^T by 128 columns, not 32 by 64
  bool guard;           // find the blocks' largest elements before the transform
  int row_step;         // elements between rows of the tile's matrix
  int row_slots;        // of the sink
  int segment_bits, block_bits, order_bits;  // of a group: column, block and row of X
  const int8_t* factor;
  int factor_order, log_sylvester;  // K, q
  float scale;
  int plane_bytes, table_at, lanes_at, ranges_at, slots_at, shared_bytes, threads;
  FastDiv row_blocks, block_size, by_order, by_segment, block_groups, side_blocks, row_units,
      warp_tiles;
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
    p.groups = elements / (has_columns ? kGroup : kChunk);
    const int lanes = has_columns ? p.threads / kWarp : p.threads;
    p.batches = static_cast<int>(ceil_div(p.groups, kThreadChunks * lanes));
    p.thread_chunks =
        p.batches == 1 ? round_up(static_cast<int>(ceil_div(p.groups, lanes)), 2) : kThreadChunks;
    p.plane_bytes = p.depth * p.part_columns * 2;
    const int factor_bytes = round_up(p.factor_order * p.factor_order, 128);
    const int table_bytes = p.depth * table_pitch(p.depth) + 2 * kMmaRows;
    const int ranges_bytes = round_up(2 * p.stacked * p.side * 4, 16);
    const int slots_bytes =
        round_up(2 * static_cast<int>(tile_rows * slots_per_row) * slot_bytes, 16);
    const int lanes_bytes = kWarp * kLaneBytes;
    const int others = table_bytes + lanes_bytes + ranges_bytes + slots_bytes;
    const int tile_bytes = planes * p.plane_bytes;
    p.shared_bytes = (tile_bytes < factor_bytes ? factor_bytes : tile_bytes) + others;
    p.table_at = p.shared_bytes - others;
    p.lanes_at = p.table_at + table_bytes;
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
  // Rows apart are one run of memory only one by one.
  if (tile_rows < 1 || (!dense && p.stacked == 1 && p.block_bits == 0)) tile_rows = 1;
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

}  // namespace quarot::cuda
