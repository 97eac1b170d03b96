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

  static constexpr bool kExact = kDtype == DType::f32;
  static constexpr int kSlotBytes = 0;
  __device__ __forceinline__ int passes(int parts) const { return parts; }
  __device__ __forceinline__ void clear(const TransformPlan&, unsigned char*) const {}
  template <class Scales>
  __device__ __forceinline__ void take(const TransformPlan& p, const Product& product,
                                       const Scales& scales, unsigned char*, int tile, int) const {
    const int64_t first = int64_t{tile} * p.tile_rows * p.n;
#pragma unroll
    for (int i = 0; i < kThreadChunks; ++i) {
      const int e = product.offset(i);
      if (e < 0) continue;
      const float scale = p.scale * scales(p, p.block_size(e));
      float v[kChunk];
      product.values(v, i);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) v[j] *= scale;
      store_chunk<kDtype>(out, first + e, v);
    }
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

  static constexpr bool kExact = true;
  static constexpr int kSlotBytes = sizeof(Quantizer::Slot);

  /// One part: one pass. Else a pass for the ranges and one for the codes, over all parts.
  __device__ __forceinline__ int passes(int parts) const { return parts == 1 ? 1 : 2 * parts; }
  __device__ __forceinline__ void clear(const TransformPlan& p, unsigned char* slots) const {
    quantizer.clear(reinterpret_cast<Quantizer::Slot*>(slots), p.tile_rows * p.row_slots);
  }

  template <class Scales>
  __device__ __forceinline__ void take(const TransformPlan& p, const Product& product,
                                       const Scales& scales, unsigned char* memory, int tile,
                                       int pass) const {
    auto* slots = reinterpret_cast<Quantizer::Slot*>(memory);
    const int count = p.tile_rows * p.row_slots;
    const bool symmetric = quantizer.symmetric();
    const auto scale_of = [&](int e) { return scales(p, p.block_size(e)); };

    if (pass < p.parts) {
      Range all;
#pragma unroll
      for (int i = 0; i < kThreadChunks; ++i) {
        const int e = product.offset(i);
        Range range;
        if (e >= 0) {
          float v[kChunk];
          product.values(v, i);
          range = scaled(range_of(v, symmetric), scale_of(e));
        }
        if (count == 1) {
          all = merge(all, range);
        } else if (e >= 0) {
          collect(p, slots[quantizer.group_chunks(e / kChunk)], range);
        }
      }
      if (count == 1) {
        all = {warp_max(all.high), warp_max(all.low)};
        if (threadIdx.x % kWarp == 0) collect(p, slots[0], all);
      }
    }
    Grid only;
    if (pass == p.parts - 1) __syncthreads();
    if (count == 1) {  // each thread makes the grid: faster than to wait for one of them
      only = make_grid({slots[0].high, slots[0].low}, fabsf(p.scale), quantizer.out.clip,
                       quantizer.out.bits, symmetric);
      only.inv *= fabsf(p.scale);
      if (threadIdx.x == 0 && pass == p.parts - 1) {
        quantizer.out.scale[tile] = only.scale;
        if (!symmetric) quantizer.out.zero[tile] = only.shift;
      }
    } else if (pass == p.parts - 1) {
      const int64_t rows_left = p.rows - int64_t{tile} * p.tile_rows;
      const int some = rows_left < p.tile_rows ? static_cast<int>(rows_left) * p.row_slots : count;
      quantizer.finish(slots, some, int64_t{tile} * count, fabsf(p.scale));
      if (some < count) quantizer.clear(slots + some, count - some);
      __syncthreads();
    }
    if (p.parts == 1 || pass >= p.parts) {
      const int64_t first = int64_t{tile} * p.tile_rows * p.n;
      const float sign = p.scale < 0.0f ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < kThreadChunks; ++i) {
        const int e = product.offset(i);
        if (e < 0) continue;
        Grid grid = count > 1 ? slots[quantizer.group_chunks(e / kChunk)].grid : only;
        grid.inv *= sign * scale_of(e);
        float v[kChunk];
        product.values(v, i);
        store_codes<Rounding::fused>(quantizer.out, first + e, v, grid);
      }
    }
  }

 private:
  static __device__ __forceinline__ Range scaled(const Range& range, float factor) {
    return {__float_as_int(__int_as_float(range.high) * factor) & 0x7fffffff,
            __float_as_int(__int_as_float(range.low) * factor) & 0x7fffffff};
  }
  /// The transform's scale may be negative.
  __device__ __forceinline__ void collect(const TransformPlan& p, Quantizer::Slot& slot,
                                          Range range) const {
    if (p.scale < 0.0f && !quantizer.symmetric()) range = {range.low, range.high};
    quantizer.collect(slot, range);
  }
};

}  // namespace quarot::cuda
