// How the decode attention (cuda/attention.cu) adds up what its warps have found: a part of a row
// is kDim values, relative to its maximum, and Stats. A block adds its warps' parts. A cluster's
// blocks share the dimensions: each sends the one of rank k its sums for [k, k + 1) * kShare and
// their Stats, and that one adds these.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/device/attention_config.cuh"
#include "kernels/cuda/device/attention_plan.cuh"
#include "kernels/cuda/device/attention_step.cuh"

namespace quarot::cuda::decode {

/// Adds a row's parts, a warp together; calls finish(dim, four sums from there on, Stats) for kDim
/// / kRanks dimensions: values[kEach][kRanks][kDim / kRanks] and stats[kEach][kRanks].
template <int kDim, int kEach, int kRanks, class Finish>
__device__ __forceinline__ void add_parts(const float* values, const Stats* stats,
                                          const Finish& finish) {
  constexpr int kShare = kDim / kRanks;
  constexpr int kLanes = kDim / 4 < kWarp ? kDim / 4 : kWarp;  // that have something
  constexpr int kTurns = kDim / 4 / kLanes;
  static_assert(kShare % 4 == 0);
  const int lane = min(static_cast<int>(threadIdx.x % kWarp), kLanes - 1);
  float4 total[kTurns];
  Stats sum[kTurns], parts[kTurns][kEach];
  float maximum = kLowest;
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int rank = (i * kLanes + lane) * 4 / kShare;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      parts[i][e] = stats[e * kRanks + rank];
      maximum = fmaxf(maximum, parts[i][e].maximum);
    }
  }
  if constexpr (kRanks > 1) {
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2)
      maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, step));
  }
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    total[i] = {0.0f, 0.0f, 0.0f, 0.0f};
    sum[i] = {maximum, 0.0f};
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const float factor = exp2_fast(parts[i][e].maximum - maximum);
      const float4 v =
          *reinterpret_cast<const float4*>(values + e * kDim + (i * kLanes + lane) * 4);
      sum[i].sum += parts[i][e].sum * factor;
      total[i].x += v.x * factor;
      total[i].y += v.y * factor;
      total[i].z += v.z * factor;
      total[i].w += v.w * factor;
    }
  }
  if constexpr (kRanks > 1) {
#pragma unroll
    for (int i = 1; i < kTurns; ++i) {
      sum[0].sum += sum[i].sum;
      total[0].x += total[i].x;
      total[0].y += total[i].y;
      total[0].z += total[i].z;
      total[0].w += total[i].w;
    }
    // Lanes kShare / 4 apart have the same dimensions, of other ranks.
#pragma unroll
    for (int apart = kLanes / 2; apart * 4 >= kShare; apart /= 2) {
      sum[0].sum += __shfl_down_sync(kAllLanes, sum[0].sum, apart);
      total[0].x += __shfl_down_sync(kAllLanes, total[0].x, apart);
      total[0].y += __shfl_down_sync(kAllLanes, total[0].y, apart);
      total[0].z += __shfl_down_sync(kAllLanes, total[0].z, apart);
      total[0].w += __shfl_down_sync(kAllLanes, total[0].w, apart);
    }
  }
  if (threadIdx.x % kWarp >= kLanes) return;
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int dim = (i * kLanes + lane) * 4;
    if (dim < kShare) finish(dim, total[i], sum[i]);
  }
}

template <class C>
class Parts {
 public:
  __device__ __forceinline__ explicit Parts(int rank) : rank_(rank) {
    values_ = reinterpret_cast<float*>(dynamic_shared());
    stats_ = reinterpret_cast<Stats*>(values_ + C::kRows * kWarps * C::kDim);
    sent_ = reinterpret_cast<float*>(dynamic_shared() + kSentAt<C>);
    sent_stats_ = reinterpret_cast<Stats*>(sent_ + C::kRows * C::kDim);
  }

  /// First: tells the cluster that this block runs and can be sent its rows.
  __device__ __forceinline__ void open() {
#if __CUDA_ARCH__ >= 900
    if constexpr (C::kCluster > 1) {
      if (threadIdx.x == 0) {
        mbarrier_init(barrier(), 1);
        mbarrier_init_fence();
      }
      cluster_arrive_relaxed();
    }
#endif
  }

  /// Takes the warps' parts of all rows; a cluster's blocks send each other their sums. The rings
  /// are no longer used.
  __device__ __forceinline__ void take(const Running<C>& r, int rows) {
    static_assert(C::kDimTiles % 2 == 0 && (C::kUnitTiles == 2 || C::kValueVector % 2 == 0),
                  "a lane's dimensions of two tiles follow each other");
    __syncthreads();
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const float even = C::kCodeUnit * inverse_of_power(r.value_unit);
    const float odd = C::kBits == 4 ? even / 16 : even;
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int row = n * kMmaColumns + 2 * t + c;
        const float zeros = column_sum(r.zeros[n][c]) * inverse_of_power(r.value_unit);
        const Stats stats{r.maximum[n][c], column_sum(r.sum[n][c])};
        if (row >= rows) continue;
        if (g == 0) stats_[row * kWarps + warp] = stats;
        float* to = values_ + (row * kWarps + warp) * C::kDim;
#pragma unroll
        for (int i = 0; i < C::kDimTiles; i += 2) {
          const float4 v{fmaf(r.out[n][i][c], even, -zeros), fmaf(r.out[n][i][2 + c], odd, -zeros),
                         fmaf(r.out[n][i + 1][c], even, -zeros),
                         fmaf(r.out[n][i + 1][2 + c], odd, -zeros)};
          *reinterpret_cast<float4*>(to + dim_of<C>(i, 0, g)) = v;
        }
      }
    }
    __syncthreads();
#if __CUDA_ARCH__ >= 900
    if constexpr (C::kCluster > 1) {
      if (threadIdx.x == 0) mbarrier_expect(barrier(), rows * kSentRowBytes<C>);
      cluster_wait();
      for (int row = warp; row < rows; row += kWarps) add_own(row, Send{*this, row});
      while (!mbarrier_try_wait(barrier(), 0)) {
      }
    }
#endif
  }

  /// Adds a row's parts; calls finish(dim, four sums from there on, Stats) for this block's share.
  template <class Finish>
  __device__ __forceinline__ void add(int row, const Finish& finish) const {
    if constexpr (C::kCluster == 1) {
      add_own(row, finish);
    } else {
      add_parts<C::kDim, 1, C::kCluster>(sent_ + row * C::kDim, sent_stats_ + row * C::kCluster,
                                         [&](int dim, const float4& total, const Stats& stats) {
                                           finish(rank_ * kShare + dim, total, stats);
                                         });
    }
  }

 private:
  static constexpr int kShare = C::kDim / C::kCluster;

  template <class Finish>
  __device__ __forceinline__ void add_own(int row, const Finish& finish) const {
    add_parts<C::kDim, kWarps, 1>(values_ + row * kWarps * C::kDim, stats_ + row * kWarps, finish);
  }

#if __CUDA_ARCH__ >= 900
  /// Sends sums to the block whose share they are.
  struct Send {
    const Parts& parts;
    int row;
    __device__ __forceinline__ void operator()(int dim, const float4& v, const Stats& stats) const {
      const int owner = dim / kShare, place = row * C::kCluster + parts.rank_;
      const auto there = [&](const void* here) {
        return cluster_address(shared_address(here), owner);
      };
      const uint32_t arrived = cluster_address(barrier(), owner);
      store_cluster_async(there(parts.sent_ + place * kShare + dim % kShare), arrived, v);
      if (dim % kShare == 0) {
        store_cluster_async(there(parts.sent_stats_ + place), arrived,
                            float2{stats.maximum, stats.sum});
      }
    }
  };
#endif
  __device__ __forceinline__ static uint32_t barrier() {
    __shared__ uint64_t sent;  // all that the cluster's blocks send this one is here
    return shared_address(&sent);
  }

  float *values_, *sent_;       // [row][warp][dim], [row][rank][kShare]
  Stats *stats_, *sent_stats_;  // [row][warp], [row][rank]
  int rank_;
};

}  // namespace quarot::cuda::decode
