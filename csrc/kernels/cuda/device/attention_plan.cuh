// How the decode attention (cuda/attention.cu) divides a call: on the host from shapes alone, so
// that a launch can be captured in a graph; on the device by the lengths. C: a decode::Config.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/device/attention_config.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/reduce.cuh"

namespace quarot::cuda::decode {

// ---- On the host --------------------------------------------------------------------------------

/// How a call is divided, from its shapes alone.
struct Division {
  int splits;  // units of one cache head and row block
  int row_blocks;
  bool clusters;  // one a head attends instead if the text is_for_cluster
};

/// Bytes of a block's parts of its rows (attention_parts.cuh), which stand where the rings were,
/// and of those that its cluster sends it.
template <class C>
constexpr int kOwnBytes = C::kRows * kWarps * (C::kDim * 4 + static_cast<int>(sizeof(Stats)));
template <class C>
constexpr int kSentRowBytes = C::kDim * 4 + C::kCluster * static_cast<int>(sizeof(Stats));
template <class C>
constexpr int kSentAt =
    kOwnBytes<C> > kWarps* C::kWarpBytes ? kOwnBytes<C> : kWarps * C::kWarpBytes;
template <class C>
constexpr int kSharedBytes = kSentAt<C> + (C::kCluster > 1 ? C::kRows * kSentRowBytes<C> : 0);

/// The longest text that one cluster a head attends to, and the largest cache for Config::Short.
constexpr int kClusterKeys = 16384, kShortKeys = 4096;

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
  const bool clusters = C::kHasClusters && a.batch == 1 && limits.starts_early;
  if (clusters && keys <= kClusterKeys) return {1, static_cast<int>(row_blocks), true};
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
          clusters && parts > 1};
}

// ---- On the device: the rows, sequence and keys of a block --------------------------------------

/// The row of query row r of the block, in q and out.
struct RowsOfBlock {
  int64_t b;
  int head, first, group, rows;
  __device__ __forceinline__ int s(int r) const { return (first + r) / group; }
  __device__ __forceinline__ int query_head(int r) const {
    return head * group + (first + r) % group;
  }
  __device__ __forceinline__ int64_t at(const AttentionArgs& a, int r) const {
    return (b * a.seq + s(r)) * a.heads + query_head(r);
  }
};

/// The keys of a sequence that its queries see, in blocks: those of the first one's window, to its
/// length.
struct Span {
  int first, blocks, length;
};
__device__ __forceinline__ Span span_of(const AttentionArgs& a, int length, int block_keys) {
  length = min(max(length, 0), static_cast<int>(a.capacity));
  const int begin = max(length - static_cast<int>(a.seq) + 1 - static_cast<int>(a.window), 0);
  const int first = begin / block_keys;
  return {first, (length + block_keys - 1) / block_keys - first, length};
}

__device__ __forceinline__ bool is_for_cluster(const AttentionArgs& a, int length) {
  return span_of(a, length, 1).blocks <= kClusterKeys;
}

/// A unit's sequence and its part there; sequence -1: nothing to do.
struct Unit {
  int sequence, split, splits;
};

/// The keys [begin, end) of a block, in a sequence of a length.
struct Keys {
  int begin, end, length;
};
template <class C>
__device__ __forceinline__ Keys keys_of(const AttentionArgs& a, int length, const Unit& unit,
                                        int rank) {
  const Span span = span_of(a, length, C::kBlockKeys);
  const auto boundary = [&](int split) {
    return (span.first + static_cast<int>(static_cast<unsigned>(span.blocks * split) /
                                          static_cast<unsigned>(unit.splits * C::kCluster))) *
           C::kBlockKeys;
  };
  const int split = unit.split * C::kCluster + rank;
  return {boundary(split), min(boundary(split + 1), span.length), span.length};
}

/// Walks over the sequences, a warp together: sequence b gets parts(b) units, at first(b) of those
/// of its head. find(lane's b, first, parts) is called for 32 sequences at a time.
template <class Find>
__device__ __forceinline__ void for_units(const AttentionArgs& a, const Division& division,
                                          int block_keys, const Find& find) {
  const int lane = threadIdx.x % kWarp, batch = static_cast<int>(a.batch);
  const auto blocks = [&](int b) {
    return b < batch ? span_of(a, a.lengths[b], block_keys).blocks : 0;
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
