// How the decode attention (cuda/attention.cu) adds up what its warps have found. A warp's part of
// a row is kDim values, relative to its maximum, and Stats. A cluster's blocks share the
// dimensions: each warp sends the block of rank k its values of dimensions [k, k + 1) * kShare and
// its Stats, and that one adds them up. A block alone is a cluster of one. There they stand as
//   float values[row][warp][rank][kShare], Stats stats[row][warp][rank].
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/device/attention_config.cuh"
#include "kernels/cuda/device/attention_plan.cuh"
#include "kernels/cuda/device/attention_step.cuh"

namespace quarot::cuda::decode {

template <class C, int kBlocks>
class Parts {
 public:
  __device__ __forceinline__ explicit Parts(int rank) : rank_(rank) {
    values_ =
        reinterpret_cast<float*>(dynamic_shared() + (kBlocks == 1 ? 0 : kWarps * C::kWarpBytes));
    stats_ = reinterpret_cast<Stats*>(values_ + C::kRows * kWarps * C::kDim);
  }

  /// First: tells the cluster that this block runs and can be sent so many rows.
  __device__ __forceinline__ void expect(int rows) {
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks > 1) {
      if (threadIdx.x == 0) {
        mbarrier_init(barrier(), 1);
        mbarrier_init_fence();
        mbarrier_expect(barrier(), rows * sent_row_bytes<C>(kBlocks));
      }
      cluster_arrive_relaxed();
    }
#endif
  }

  /// Sends all rows, and waits for those sent to this block. The rings are no longer used.
  __device__ __forceinline__ void send(const Running<C>& r, int rows) {
    if constexpr (kBlocks == 1) {
      __syncthreads();
    } else {
#if __CUDA_ARCH__ >= 900
      cluster_wait();
#endif
    }
    static_assert(C::kDimTiles % 2 == 0 && (C::kUnitTiles == 2 || C::kValueVector % 2 == 0),
                  "a lane's dimensions of two tiles follow each other");
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
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
#pragma unroll
        for (int i = 0; i < C::kDimTiles; i += 2) {
          const float4 v{fmaf(r.out[n][i][c], even, -zeros), fmaf(r.out[n][i][2 + c], odd, -zeros),
                         fmaf(r.out[n][i + 1][c], even, -zeros),
                         fmaf(r.out[n][i + 1][2 + c], odd, -zeros)};
          send(row, dim_of<C>(i, 0, g), v, stats);
        }
      }
    }
    if constexpr (kBlocks == 1) {
      __syncthreads();
    } else {
#if __CUDA_ARCH__ >= 900
      while (!mbarrier_try_wait(barrier(), 0)) {
      }
#endif
    }
  }

  /// Adds a row's parts, a warp together; calls finish(dim, four sums from there on, Stats) for
  /// those of this block.
  template <class Finish>
  __device__ __forceinline__ void add(int row, const Finish& finish) const {
    constexpr int kLanes = C::kDim / 4 < kWarp ? C::kDim / 4 : kWarp;  // that have something
    constexpr int kTurns = C::kDim / 4 / kLanes;
    const int lane = min(static_cast<int>(threadIdx.x % kWarp), kLanes - 1);
    float4 total[kTurns];
    Stats sum[kTurns], parts[kTurns][kWarps];
    float maximum = kLowest;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int rank = (i * kLanes + lane) * 4 / kShare;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        parts[i][w] = stats_[(row * kWarps + w) * kBlocks + rank];
        maximum = fmaxf(maximum, parts[i][w].maximum);
      }
    }
    if constexpr (kBlocks > 1) {
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2)
        maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, step));
    }
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      total[i] = {0.0f, 0.0f, 0.0f, 0.0f};
      sum[i] = {maximum, 0.0f};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float factor = exp2_fast(parts[i][w].maximum - maximum);
        const float4 v = *reinterpret_cast<const float4*>(values_ + (row * kWarps + w) * C::kDim +
                                                          (i * kLanes + lane) * 4);
        sum[i].sum += parts[i][w].sum * factor;
        total[i].x += v.x * factor;
        total[i].y += v.y * factor;
        total[i].z += v.z * factor;
        total[i].w += v.w * factor;
      }
    }
    if constexpr (kBlocks > 1) {
#pragma unroll
      for (int i = 1; i < kTurns; ++i) {
        sum[0].sum += sum[i].sum;
        total[0].x += total[i].x;
        total[0].y += total[i].y;
        total[0].z += total[i].z;
        total[0].w += total[i].w;
      }
      // Lanes kShare / 4 apart have the same dimensions, from other blocks.
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
      if (dim < kShare) finish(rank_ * kShare + dim, total[i], sum[i]);
    }
  }

 private:
  static constexpr int kShare = C::kDim / kBlocks;
  static_assert(kShare % 4 == 0);

  __device__ __forceinline__ void send(int row, int dim, const float4& v, const Stats& stats) {
    const int warp = threadIdx.x / kWarp, owner = dim / kShare;
    const int part = (row * kWarps + warp) * kBlocks + rank_;
    auto* to = reinterpret_cast<float4*>(values_ + part * kShare + dim % kShare);
    const bool first = dim % kShare == 0;
    if constexpr (kBlocks == 1) {
      *to = v;
      if (first) stats_[part] = stats;
    } else {
#if __CUDA_ARCH__ >= 900
      const auto there = [&](uint32_t here) { return cluster_address(here, owner); };
      store_cluster_async(there(shared_address(to)), there(barrier()), v);
      if (first) {
        store_cluster_async(there(shared_address(stats_ + part)), there(barrier()),
                            float2{stats.maximum, stats.sum});
      }
#endif
    }
  }
  __device__ __forceinline__ static uint32_t barrier() {
    __shared__ uint64_t sent;  // all that the cluster's warps send this block is here
    return shared_address(&sent);
  }

  float* values_;
  Stats* stats_;
  int rank_;
};

}  // namespace quarot::cuda::decode
