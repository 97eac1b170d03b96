// Clip search on CUDA. Maths: kernels/clip_search.h. A block a group of a row, its warps take the
// trials in turn and read the group from the L1 each time, the lanes take the columns. Every trial
// takes the power, whose logarithm and exponential run beside the other arithmetic. Bound by
// instructions, about ten a weight and trial.
#include <cuda_runtime.h>

#include "kernels/clip_search.h"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/vec.cuh"

namespace quarot::cuda {
namespace {

constexpr int kWarps = 8;

__device__ __forceinline__ float trial_scale(float amax, int trial) {
  const float scale = __fdiv_rn(__fmul_rn(clip_shrink(trial), amax), 7.0f);
  return scale < kClipScaleFloor ? 1.0f : scale;
}

template <DType kDtype>
__global__ void __launch_bounds__(kWarps* kWarp) clip_search_kernel(const ClipSearchArgs args) {
  const int64_t groups = args.w.n / args.group;
  const int64_t row = blockIdx.x / groups, first = blockIdx.x % groups * args.group;
  const int64_t begin = row * args.w.row_stride + first;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  int amax_bits = 0;  // bit patterns order |x|, NaN above infinity
  for (int64_t i = lane; i < args.group; i += kWarp) {
    amax_bits = max(amax_bits, __float_as_int(fabsf(load1<kDtype>(args.w.data, begin + i))));
  }
  amax_bits = warp_max(amax_bits);
  const float amax = __int_as_float(amax_bits);
  const float half_norm = args.norm / 2.0f;

  float least = INFINITY;
  int best = 0;
  for (int trial = warp; trial < kClipTrials; trial += kWarps) {
    const float inverse = __frcp_rn(trial_scale(amax, trial));
    float sum = 0.0f;
    for (int64_t i = lane; i < args.group; i += kWarp) {
      const float steps = __fmul_rn(load1<kDtype>(args.w.data, begin + i), inverse);
      const float difference = fminf(fmaxf(rintf(steps), -8.0f), 7.0f) - steps;
      float error = difference * difference;
      if (half_norm != 1.0f) error = exp2f(half_norm * log2f(error));
      if (args.importance != nullptr) error *= args.importance[first + i];
      sum += error;
    }
    const float error = warp_sum(sum) * powf(clip_shrink(trial), args.norm);
    if (error < least) {
      least = error;
      best = trial;
    }
  }

  __shared__ float least_of[kWarps];
  __shared__ int best_of[kWarps];
  if (lane == 0) {
    least_of[warp] = least;
    best_of[warp] = best;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int other = 1; other < kWarps; ++other) {
    const float error = least_of[other];
    if (error < least || (error == least && best_of[other] < best)) {
      least = error;
      best = best_of[other];
    }
  }
  args.scale[blockIdx.x] = isfinite(amax) ? trial_scale(amax, best) : NAN;
}

template <DType kDtype>
void launch_clip_search(const ClipSearchArgs& args, Stream stream) {
  launch(&clip_search_kernel<kDtype>, args.w.rows * (args.w.n / args.group), kWarps * kWarp, 0,
         stream, args);
}

}  // namespace

void clip_search(const ClipSearchArgs& args, Stream stream) {
  switch (args.w.dtype) {
    case DType::f32:
      return launch_clip_search<DType::f32>(args, stream);
    case DType::f16:
      return launch_clip_search<DType::f16>(args, stream);
    case DType::bf16:
      return launch_clip_search<DType::bf16>(args, stream);
  }
  QUAROT_ASSERT(false, "clip_search: no such dtype");
}

}  // namespace quarot::cuda
