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

constexpr int kWarps = 4;  // of a block
constexpr int kThreads = kWarps * kWarp;

/// How a call is divided, from its shapes alone.
struct Division {
  int splits;  // units of one cache head and row block
  int row_blocks;
  int cluster;  // blocks of a unit, which add up their results; more than one: batch is 1
};

/// Maximum and sum of a partial result.
struct Stats {
  float maximum, sum;
};

/// Dynamic shared memory: the warps' rings, later their results; then what the cluster's blocks
/// send, float[cluster][rows][dim / cluster] and Stats[cluster][rows].
template <class C>
constexpr int shared_bytes(const Division& d) {
  return C::kRingBytes + C::kRows * (C::kDim * 4 + d.cluster * static_cast<int>(sizeof(Stats)));
}

/// Blocks of a cluster for one sequence, or 1: it is too short or too long. Few blocks start
/// sooner, but cannot fill the time that memory takes.
inline int cluster_for(int64_t pairs, int64_t steps, int processors) {
  constexpr int kFew = 8, kMany = 16;
  constexpr int64_t kFewSteps = 4, kMostSteps = 8;  // of a block
  const int most = steps > kFew * kFewSteps ? kMany : kFew;
  int cluster = 1;
  while (cluster < most && cluster < steps && pairs * cluster * 2 <= processors) cluster *= 2;
  return steps <= cluster * kMostSteps ? cluster : 1;
}

/// Enough units to fill the SMs, if all sequences are equally long: the fewest that leave few idle
/// in the last wave.
template <class C>
Division divide(const AttentionArgs& a) {
  constexpr double kEnough = 0.9;
  constexpr int kMostWaves = 4;
  const DeviceLimits limits = device_limits();
  const int64_t row_blocks = ceil_div(a.seq * (a.heads / a.kv_heads), int64_t{C::kRows});
  const int64_t pairs = a.batch * a.kv_heads * row_blocks;
  const int64_t slots = int64_t{limits.processors} * C::kBlocks;
  const int64_t keys = std::min(a.capacity, a.seq - 1 + a.window + C::kBlockKeys - 1);
  const int64_t longest = ceil_div(keys, int64_t{C::kBlockKeys});
  if (a.batch == 1 && limits.starts_early) {
    const int cluster = cluster_for(pairs, longest, limits.processors);
    if (cluster > 1) return {1, static_cast<int>(row_blocks), cluster};
  }
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
  return {static_cast<int>(a.batch * (parts + (a.batch > 1 ? 1 : 0))), static_cast<int>(row_blocks),
          1};
}

// ---- On the device: the sequence and keys of a block -----------------------------------------

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
                                          int block_keys, const Find& find) {
  const int lane = threadIdx.x % kWarp, batch = static_cast<int>(a.batch);
  const auto blocks = [&](int b) { return b < batch ? span_of(a, b, block_keys).blocks : 0; };
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
                                        int block_keys, int unit) {
  Unit found{-1, 0, 0};
  for_units(a, division, block_keys, [&](int b, int first, int parts) {
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
