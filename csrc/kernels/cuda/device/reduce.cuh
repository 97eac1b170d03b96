// Reductions over a warp. Every lane gets the result; the order is fixed.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/device/vec.cuh"

namespace quarot::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}
__device__ __forceinline__ int warp_max(int v) { return __reduce_max_sync(kAllLanes, v); }

}  // namespace quarot::cuda
