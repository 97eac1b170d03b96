// Where a transformed tile goes: memory, or the quantizer (kernels/quantize.h). For
// transform_kernel (transform.cuh), whose threads hand over their chunks; the quantizer's ranges
// and grids lie in shared memory, a slot a group.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device/int4.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/transform.cuh"

namespace quarot::cuda {

/// out [rows, n] of kDtype = scale * the transform.
template <DType kDtype>
struct StoreSink {
  void* out;

  static constexpr int kSlotBytes = 0;
  __device__ __forceinline__ int passes(int parts) const { return parts; }
  __device__ __forceinline__ void start(const TransformPlan&, int*) const {}
  __device__ __forceinline__ void take(const TransformPlan& p, ThreadChunks& t, int*, int64_t tile,
                                       int) const {
    const int64_t first = tile * p.tile_rows * p.n;
    const int end = rows_of_tile(p, tile) * p.row_chunks.divisor();
#pragma unroll
    for (int i = 0; i < kThreadChunks; ++i) {
      const int e = t.index(i);
      if (e < 0 || e >= end) continue;
#pragma unroll
      for (int j = 0; j < kChunk; ++j) t.v[i][j] *= p.scale;
      store_chunk<kDtype>(out, first + int64_t{e} * kChunk, t.v[i]);
    }
  }
  static __device__ __forceinline__ int rows_of_tile(const TransformPlan& p, int64_t tile) {
    return static_cast<int>(min(static_cast<int64_t>(p.tile_rows), p.rows - tile * p.tile_rows));
  }
};

/// The groups' ranges of the rows that a block works on, in shared memory, and the quantizer that
/// follows. Maxima do not depend on their order, so atomics keep the result deterministic.
struct Quantizer {
  QuantizedRows out;
  FastDiv group_chunks;  // chunks of a group

  /// Shared memory of one group: its range while it is collected, then its grid.
  struct Slot {
    int high, low;
    Grid grid;
  };

  __device__ __forceinline__ bool symmetric() const { return out.zero == nullptr; }

  __device__ __forceinline__ void clear(Slot* slots, int count) const {
    for (int s = threadIdx.x; s < count; s += blockDim.x) slots[s].high = slots[s].low = 0;
  }
  __device__ __forceinline__ void collect(Slot& slot, const Range& range) const {
    atomicMax(&slot.high, range.high);
    if (!symmetric()) atomicMax(&slot.low, range.low);
  }
  /// collect for a range that is in the same slot for all lanes of the warp.
  __device__ __forceinline__ void collect_warp(Slot& slot, Range range) const {
    range.high = warp_max(range.high);
    if (!symmetric()) range.low = warp_max(range.low);
    if (threadIdx.x % kWarp == 0) collect(slot, range);
  }
  /// Ranges -> grids of `count` groups, the first of which is group first_group of all rows; clears
  /// the ranges.
  __device__ __forceinline__ void finish(Slot* slots, int count, int64_t first_group,
                                         float factor) const {
    for (int s = threadIdx.x; s < count; s += blockDim.x) {
      Slot& slot = slots[s];
      Grid grid = make_grid({slot.high, slot.low}, factor, out.clip, out.bits, symmetric());
      out.scale[first_group + s] = grid.scale;
      if (!symmetric()) out.zero[first_group + s] = grid.shift;
      grid.inv *= factor;  // the values come without it
      slot = {0, 0, grid};
    }
  }
};

/// Quantizes scale * the transform.
struct QuantizeSink {
  Quantizer quantizer;

  static constexpr int kSlotBytes = sizeof(Quantizer::Slot);

  /// One part: one pass. Else a pass for the ranges and one for the codes, over all parts.
  __device__ __forceinline__ int passes(int parts) const { return parts == 1 ? 1 : 2 * parts; }

  __device__ __forceinline__ int slots_of_tile(const TransformPlan& p) const {
    return p.tile_rows * p.row_chunks.divisor() / quantizer.group_chunks.divisor();
  }
  __device__ __forceinline__ void start(const TransformPlan& p, int* slots) const {
    quantizer.clear(reinterpret_cast<Quantizer::Slot*>(slots), slots_of_tile(p));
  }

  __device__ __forceinline__ void take(const TransformPlan& p, ThreadChunks& t, int* memory,
                                       int64_t tile, int pass) const {
    auto* slots = reinterpret_cast<Quantizer::Slot*>(memory);
    const int count = slots_of_tile(p);
    const int64_t rows_left = p.rows - tile * p.tile_rows;
    const int rows = rows_left < p.tile_rows ? static_cast<int>(rows_left) : p.tile_rows;
    const int end = rows * p.row_chunks.divisor();
    if (p.scale < 0.0f) {
#pragma unroll
      for (int i = 0; i < kThreadChunks; ++i)
#pragma unroll
        for (int j = 0; j < kChunk; ++j) t.v[i][j] = -t.v[i][j];
    }

    if (pass < p.parts) {
      if (count == 1) {
        Range range;
#pragma unroll
        for (int i = 0; i < kThreadChunks; ++i) {
          range = merge(range,
                        range_of(t.v[i], quantizer.symmetric()));  // zeros where there is no chunk
        }
        quantizer.collect_warp(slots[0], range);
      } else {
#pragma unroll
        for (int i = 0; i < kThreadChunks; ++i) {
          const int e = t.index(i);
          if (e < 0) continue;
          quantizer.collect(slots[quantizer.group_chunks(e)],
                            range_of(t.v[i], quantizer.symmetric()));
        }
      }
    }
    if (pass == p.parts - 1) {
      __syncthreads();
      const int some = rows == p.tile_rows ? count : count / p.tile_rows * rows;
      const int64_t first_group = tile * count;
      quantizer.finish(slots, some, first_group, fabsf(p.scale));
      if (some < count) quantizer.clear(slots + some, count - some);
      __syncthreads();
    }
    if (p.parts == 1 || pass >= p.parts) {
      const int64_t first = tile * p.tile_rows * p.n;
#pragma unroll
      for (int i = 0; i < kThreadChunks; ++i) {
        const int e = t.index(i);
        if (e < 0 || e >= end) continue;
        store_codes<Rounding::fused>(quantizer.out, first + int64_t{e} * kChunk, t.v[i],
                                     slots[quantizer.group_chunks(e)].grid);
      }
    }
  }
};

}  // namespace quarot::cuda
