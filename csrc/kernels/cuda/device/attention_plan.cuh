// How the decode attention (cuda/attention.cu) divides a call: on the host from shapes alone, so
// that a launch can be captured in a graph; on the device by the lengths. C: a decode::Config.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/reduce.cuh"

namespace quarot::cuda::decode {

// ---- On the host --------------------------------------------------------------------------------

constexpr int kManyStages = 4;

/// How a call is divided, from its shapes alone.
struct Division {
  int splits;  // units of one cache head and row block
  int row_blocks;
  int cluster;     // blocks of a unit, which add up their results; more than one: batch is 1
  int warps;       // of a block
  int stages;      // of a warp's ring, 2 or kManyStages
  int block_keys;  // of one step of all warps
  int ring_bytes;  // of all stages
};

/// Maximum and sum of a partial result.
struct Stats {
  float maximum, sum;
};

/// Dynamic shared memory: the warps' rings, later their results; then what a cluster's other blocks
/// send, float[cluster][rows][dim / cluster] and Stats[cluster][rows].
template <class C>
constexpr int shared_bytes(const Division& d) {
  return d.warps * C::shared_bytes(d.stages) +
         C::kRows * (C::kDim * 4 + d.cluster * static_cast<int>(sizeof(Stats)));
}

template <class C>
Division make_division(const AttentionArgs& a, int64_t splits, int cluster, int warps, int stages) {
  const int64_t row_blocks = ceil_div(a.seq * (a.heads / a.kv_heads), int64_t{C::kRows});
  return {static_cast<int>(splits), static_cast<int>(row_blocks), cluster, warps, stages,
          warps * C::kKeys,         stages * C::kStageBytes};
}

/// One sequence, not long: clusters of few blocks, each with all of its keys under way at once, and
/// no second kernel; cluster 1 where that does not fit.
template <class C>
Division divide_one(const AttentionArgs& a, const DeviceLimits& limits, int64_t keys) {
  constexpr int kMostBlocks = 8;  // of a cluster, on every device
  constexpr int kWarps = 8;
  constexpr int64_t kMostSteps = 8;  // of a warp
  Division d = make_division<C>(a, 1, 1, kWarps, kManyStages);
  if (shared_bytes<C>(d) > limits.block_shared_bytes) d = make_division<C>(a, 1, 1, kWarps, 2);
  const int64_t steps = ceil_div(keys, int64_t{d.block_keys});
  while (d.cluster < kMostBlocks && d.cluster < steps &&
         a.kv_heads * d.row_blocks * d.cluster * 2 <= limits.processors)
    d.cluster *= 2;
  if (steps > d.cluster * kMostSteps) d.cluster = 1;
  return d;
}

/// Enough units to fill the SMs, if all sequences are equally long: the fewest that leave few idle
/// in the last wave.
template <class C>
Division divide(const AttentionArgs& a) {
  constexpr double kEnough = 0.9;
  constexpr int kMostWaves = 4;
  constexpr int kWarps = 4;
  const DeviceLimits limits = device_limits();
  Division d = make_division<C>(a, 1, 1, kWarps, 2);
  const int64_t keys = std::min(a.capacity, a.seq - 1 + a.window + d.block_keys - 1);
  if (a.batch == 1 && limits.starts_early) {
    const Division one = divide_one<C>(a, limits, keys);
    if (one.cluster > 1) return one;
  }
  const int64_t pairs = a.batch * a.kv_heads * d.row_blocks;
  const int64_t slots = int64_t{limits.processors} * (C::kSmWarps / kWarps);
  const int64_t longest = ceil_div(keys, int64_t{d.block_keys});
  int64_t parts = 1;
  double best = 0;
  for (int64_t n = 1; n <= longest && (n == 1 || n * pairs <= kMostWaves * slots); ++n) {
    const double used =
        static_cast<double>(n * pairs) / static_cast<double>(ceil_div(n * pairs, slots) * slots);
    if (used > best) {
      best = used;
      parts = n;
    }
    if (best >= kEnough) break;
  }
  // Rounding a sequence's parts up costs a unit each (for_units).
  d.splits = static_cast<int>(a.batch * (parts + (a.batch > 1 ? 1 : 0)));
  return d;
}

// ---- On the device: the sequence and keys of a block
// ----------------------------------------------

/// The keys of a sequence that its queries see, in blocks: those of the first one's window, to its
/// length.
struct Span {
  int first, blocks, length;
};
__device__ __forceinline__ Span span_of(const AttentionArgs& a, int b, int block_keys) {
  const int length = min(max(a.lengths[b], 0), static_cast<int>(a.capacity));
  const int begin = max(length - static_cast<int>(a.seq) + 1 - static_cast<int>(a.window), 0);
  const int first = begin / block_keys;
  return {first, (length + block_keys - 1) / block_keys - first, length};
}

/// A unit's sequence and its part there; sequence -1: nothing to do.
struct Unit {
  int sequence, split, splits;
};

/// Walks over the sequences, a warp together: sequence b gets parts(b) units, at first(b) of those
/// of its head. find(lane's b, first, parts) is called for 32 sequences at a time.
template <class Find>
__device__ __forceinline__ void for_units(const AttentionArgs& a, const Division& division,
                                          const Find& find) {
  const int lane = threadIdx.x % kWarp, batch = static_cast<int>(a.batch);
  const auto blocks = [&](int b) {
    return b < batch ? span_of(a, b, division.block_keys).blocks : 0;
  };
  int total = 0;
  for (int b = lane; b - lane < batch; b += kWarp) total += blocks(b);
  total = __reduce_add_sync(kAllLanes, total);
  // Rounding up costs less than a unit a sequence.
  const int shares = batch > 1 ? division.splits - batch : division.splits;
  const int each = max((total + shares - 1) / shares, 1);
  int first = 0;
  for (int b = lane; b - lane < batch; b += kWarp) {
    const int parts = (blocks(b) + each - 1) / each;
    int end = parts;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int before = __shfl_up_sync(kAllLanes, end, step);
      if (lane >= step) end += before;
    }
    find(b, first + end - parts, parts);
    first += __shfl_sync(kAllLanes, end, kWarp - 1);
  }
}

__device__ __forceinline__ Unit unit_of(const AttentionArgs& a, const Division& division,
                                        int unit) {
  Unit found{-1, 0, 0};
  for_units(a, division, [&](int b, int first, int parts) {
    const bool mine = unit >= first && unit < first + parts;
    const unsigned who = __ballot_sync(kAllLanes, mine);
    if (who == 0) return;
    const int lane = __ffs(static_cast<int>(who)) - 1;
    found = {__shfl_sync(kAllLanes, b, lane), unit - __shfl_sync(kAllLanes, first, lane),
             __shfl_sync(kAllLanes, parts, lane)};
  });
  return found;
}

}  // namespace quarot::cuda::decode
