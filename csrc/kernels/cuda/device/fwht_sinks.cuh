// Where a transformed tile goes: memory, or the quantizer (kernels/quantize.h).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device/fwht.cuh"
#include "kernels/cuda/device/int4.cuh"
#include "kernels/cuda/device/reduce.cuh"

namespace quarot::cuda {

/// out [rows, n] of kDtype = scale * the transform.
template <DType kDtype>
struct StoreRows {
  void* out;

  static constexpr int kSlotBytes = 0;
  static constexpr bool kScaled = true;  // wants the values scaled
  __device__ __forceinline__ void clear(const FwhtPlan&, unsigned char*) const {}
  template <class R>
  __device__ __forceinline__ void take(const FwhtPlan& p, R& result, unsigned char*, int tile,
                                       int) const {
    const int64_t first = int64_t{tile} * p.side * p.n + result.first;
#pragma unroll
    for (int r = 0; r < R::kItems; ++r) {
      if (r >= result.items) continue;
#pragma unroll
      for (int c = 0; c < R::kParts; ++c)
        store_chunk<kDtype>(out, first + R::offset(r, c), result.v[r][c]);
    }
  }
};

/// Quantizes scale * the transform. Maxima do not depend on their order, so atomics keep the result
/// deterministic.
struct QuantizeRows {
  QuantizedRows out;
  FastDiv group_chunks;
  int row_groups;

  /// Of a group: its range while it is collected; then, of its grid, inv's bits, and shift + 2^15
  /// and, above it, top.
  struct Slot {
    int high, low;
    __device__ __forceinline__ void set(const Grid& grid) {
      high = __float_as_int(grid.inv);
      low = grid.top << 16 | (grid.shift + (1 << 15));
    }
    __device__ __forceinline__ Grid grid() const {
      return {0.0f, __int_as_float(high), (low & 0xffff) - (1 << 15), low >> 16};
    }
  };
  static constexpr int kSlotBytes = sizeof(Slot);
  static constexpr bool kScaled = false;

  __device__ __forceinline__ bool symmetric() const { return out.zero == nullptr; }
  __device__ __forceinline__ void clear(const FwhtPlan& p, unsigned char* memory) const {
    auto* slots = reinterpret_cast<Slot*>(memory);
    for (int s = threadIdx.x; s < 2 * p.side * row_groups; s += blockDim.x)
      slots[s].high = slots[s].low = 0;
  }
  __device__ __forceinline__ void collect(Slot& slot, const Range& range) const {
    atomicMax(&slot.high, range.high);
    if (!symmetric()) atomicMax(&slot.low, range.low);
  }
  // Never conditional: ptxas 13.0 was seen to make a reduction depend on another lane's predicate.
  static __device__ __forceinline__ void merge_lanes(Range& range, int step) {
    range = merge(range, {__shfl_xor_sync(kAllLanes, range.high, step),
                          __shfl_xor_sync(kAllLanes, range.low, step)});
  }
  /// Of all lanes that have the same row.
  template <int kBits>
  __device__ __forceinline__ void merge_row(Range& range) const {
    if constexpr (kBits >= 6) {
      range = {warp_max(range.high), warp_max(range.low)};
    } else {
      merge_lanes(range, 8);
      merge_lanes(range, 16);
#pragma unroll
      for (int b = 1; b < 1 << (kBits - 3); b *= 2) merge_lanes(range, b);
    }
  }
  __device__ __forceinline__ Grid grid_of(const FwhtPlan& p, Range range) const {
    if (p.scale < 0.0f && !symmetric()) range = {range.low, range.high};
    Grid grid = make_grid(range, fabsf(p.scale), out.clip, out.bits, symmetric());
    grid.inv *= p.scale;
    return grid;
  }
  __device__ __forceinline__ void put(const Grid& grid, int64_t group) const {
    out.scale[group] = grid.scale;
    if (!symmetric()) out.zero[group] = grid.shift;
  }
  template <bool kSymmetric, class R>
  static __device__ __forceinline__ Range range_of_all(const R& result) {
    float high = 0.0f, low = 0.0f;
#pragma unroll
    for (int r = 0; r < R::kItems; ++r) {
      if (r >= result.items) continue;
#pragma unroll
      for (int c = 0; c < R::kParts; ++c)
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const float v = result.v[r][c][i];
          high = max_nan(high, kSymmetric ? fabsf(v) : v);
          if (!kSymmetric) low = max_nan(low, -v);
        }
    }
    return {__float_as_int(high) & 0x7fffffff, __float_as_int(low) & 0x7fffffff};
  }

  /// Writes the codes of a result whose first element is number `first` of all rows. One branch for
  /// all of them, and addresses a constant apart.
  template <int kCodeBits, class R, class GridAt>
  __device__ __forceinline__ void put_codes(const R& result, int64_t first, GridAt grid_at) const {
    const int half = 1 << (out.bits - 1);
    char* const to = static_cast<char*>(out.codes) + (first >> (kCodeBits == 8 ? 0 : 1));
#pragma unroll
    for (int r = 0; r < R::kItems; ++r) {
      if (r >= result.items) continue;
#pragma unroll
      for (int c = 0; c < R::kParts; ++c) {
        uint32_t words[kChunk * kCodeBits / 32];
        make_codes<kCodeBits, Rounding::fused>(words, result.v[r][c], grid_at(r, c), half);
        store_words_once(to + R::offset(r, c) * kCodeBits / 8, 0, words);
      }
    }
  }
  template <class R, class GridAt>
  __device__ __forceinline__ void put_all(const R& result, int64_t first, GridAt grid_at) const {
    if (out.packed) {
      put_codes<4>(result, first, grid_at);
    } else {
      put_codes<8>(result, first, grid_at);
    }
  }

  template <class R>
  __device__ __forceinline__ void take(const FwhtPlan& p, R& result, unsigned char* memory,
                                       int tile, int turn) const {
    const int count = p.side * row_groups;
    auto* slots = reinterpret_cast<Slot*>(memory) + turn * count;
    auto* others = reinterpret_cast<Slot*>(memory) + (turn ^ 1) * count;
    const int64_t first_row = int64_t{tile} * p.side;
    const int64_t first = first_row * p.n + result.first;
    const int lane = threadIdx.x % kWarp;
    const auto clear_others = [&] {
      for (int s = threadIdx.x; s < count; s += blockDim.x) others[s].high = others[s].low = 0;
    };
    if (row_groups > 1) {
      clear_others();
      const bool together = group_chunks.divisor() % 8 == 0 && R::kBits >= 6;
#pragma unroll
      for (int r = 0; r < R::kItems; ++r)
#pragma unroll
        for (int c = 0; c < R::kParts; ++c) {
          Range range = range_of(result.v[r][c], symmetric());
          if (together) {
            merge_lanes(range, 1);
            merge_lanes(range, 2);
            merge_lanes(range, 4);
          }
          if (r < result.items && (!together || lane % 8 == 0))
            collect(slots[group_chunks(result.at(r, c) / kChunk)], range);
        }
      __syncthreads();
      const int64_t left = (p.rows - first_row) * row_groups;
      for (int s = threadIdx.x; s < count; s += blockDim.x) {
        const Grid grid = grid_of(p, {slots[s].high, slots[s].low});
        if (s < left) put(grid, first_row * row_groups + s);
        slots[s].set(grid);
      }
      __syncthreads();
    } else {
      Range range = symmetric() ? range_of_all<true>(result) : range_of_all<false>(result);
      merge_row<R::kBits>(range);
      const bool leads = result.items > 0 && lane / 8 == 0 && (lane & ((1 << R::kInRow) - 1)) == 0;
      if (!p.alone) {
        clear_others();
        if (leads) collect(slots[result.row], range);
        __syncthreads();
        range = {slots[result.row].high, slots[result.row].low};
      }
      const Grid grid = grid_of(p, range);
      if (leads && (p.alone || result.first == result.row * p.n)) put(grid, first_row + result.row);
      return put_all(result, first, [&](int, int) { return grid; });
    }
    put_all(result, first,
            [&](int r, int c) { return slots[group_chunks(result.at(r, c) / kChunk)].grid(); });
  }
};

}  // namespace quarot::cuda
