// linear_int4 with scales of groups of columns on sm_90a: the kernels, and how they are launched.
// Maths: kernels/linear_int4.h; design, layout and bound: linear_int4_grouped.cuh.
#include "kernels/cuda/sm90/linear_int4_grouped.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/ptx.cuh"
#include "kernels/cuda/sm90/linear_int4_grouped.cuh"
#include "kernels/cuda/sm90/tensor_map.cuh"

namespace quarot::cuda {
namespace {

using namespace grouped;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <class C>
__device__ __forceinline__ void work(const Params& p, uint32_t shared, int group, uint32_t thread) {
  if constexpr (C::kStrips > 1) {
    Tiles<C>{{p, shared, group, thread}, {}}.run();
  } else {
    Relay<C>{{p, shared, group, thread}}.run();
  }
}
#endif

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    linear_int4_grouped_kernel(const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const uint32_t shared =
      (shared_address(dynamic_shared()) + kSwizzleBytes - 1) & ~(kSwizzleBytes - 1);
  if (threadIdx.x == 0) {
    for (int s = 0; s < C::kStages; ++s) {
      mbarrier_init(shared + C::kFullAt + s * 8, 1);
      mbarrier_init(shared + C::kEmptyAt + s * 8, p.pair * C::kEmptyArrivals);
    }
    if (C::kByTensor) write_constants<C>(shared);
    mbarrier_init_fence();
  }
  start_next_grid();
  wait_for_previous_grid();
  cluster_arrive();
  cluster_wait();
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads;
  if (group == C::kWarpgroups) {
    registers_release<prefill::kProducerRegisters>();
    if (threadIdx.x == C::kWarpgroups * kGroupThreads) fill_ring<C>(p, shared);
    __syncwarp();
  } else {
    registers_take<C::kRegisters>();
    work<C>(p, shared, group, threadIdx.x % kGroupThreads);
  }
  // Another block may still copy to this one, or arrive here.
  cluster_arrive();
  cluster_wait();
#else
  __trap();
#endif
}

// ---- Launch -------------------------------------------------------------------------------------

/// 16 * |acc| and the offset fit a float's 24 bits.
constexpr int64_t kMaxGroup = 512, kMaxGroupWithZeros = 256;
/// Coordinates of tiles are ints, with room for the last tile.
constexpr int64_t kMaxRows = int64_t{1} << 30;

/// Whether the current device runs this file's sm_90a code.
bool is_compiled_for_device() {
  if (compute_major() != 9) return false;
  static const bool compiled = [] {
    cudaFuncAttributes attributes{};
    const cudaError_t status =
        cudaFuncGetAttributes(&attributes, &linear_int4_grouped_kernel<TilesConfig<1, true>>);
    if (status != cudaSuccess) cudaGetLastError();
    return status == cudaSuccess && attributes.binaryVersion == 90 && attributes.ptxVersion == 90;
  }();
  return compiled;
}

template <class C>
void run(const LinearInt4Args& args, Stream stream) {
  const int64_t channel_tiles = ceil_div(args.n, C::kChannels);
  Params p{};
  p.args = args;
  p.pair = C::kStrips > 1 && channel_tiles % 2 == 0 ? 2 : 1;
  p.stages = static_cast<int>(ceil_div(args.k, kColumns));
  p.channel_tiles = static_cast<int>(channel_tiles / p.pair);
  p.token_tiles = static_cast<int>(ceil_div(args.m, C::kTokens));
  p.set_tiles = FastDiv(kTokenTiles * p.channel_tiles);
  p.last_tokens = FastDiv(p.token_tiles % kTokenTiles == 0 ? 1 : p.token_tiles % kTokenTiles);
  p.store_boxes = args.out_dtype != DType::f32 && args.n % 8 == 0 && aligned16(args.out);
  p.x = tensor_map(args.x, CU_TENSOR_MAP_DATA_TYPE_UINT8, args.m, args.k, args.k,
                   C::kTokens / p.pair, kColumns, CU_TENSOR_MAP_SWIZZLE_128B);
  const int64_t strip_bytes = ceil_div(args.k, kHalfColumns) * kHalfStripBytes;
  p.w = tensor_map(args.w, CU_TENSOR_MAP_DATA_TYPE_INT32, ceil_div(args.n, kStrip), strip_bytes / 4,
                   strip_bytes, C::kChannels / kStrip, kStripBytes / 4, CU_TENSOR_MAP_SWIZZLE_NONE);
  if (p.store_boxes) {
    p.out = tensor_map(args.out, CU_TENSOR_MAP_DATA_TYPE_UINT16, args.m, args.n, args.n * 2,
                       kPieceTokens, kGroupChannels, CU_TENSOR_MAP_SWIZZLE_128B);
  }
  const int64_t tiles = int64_t{p.channel_tiles} * p.token_tiles;
  const int64_t most = device_limits().processors / p.pair;
  const auto kernel = &linear_int4_grouped_kernel<C>;
  QUAROT_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes));
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(p.pair), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((tiles < most ? tiles : most) * p.pair));
  config.blockDim = dim3(C::kThreads);
  config.dynamicSmemBytes = C::kSharedBytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = 2;
  QUAROT_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, p));
}

}  // namespace

bool linear_int4_grouped_fits(const LinearInt4Args& args) {
  const int64_t group = args.k / args.groups;
  const int64_t most = args.x_zero == nullptr ? kMaxGroup : kMaxGroupWithZeros;
  return args.groups > 1 && args.m >= 1 && args.n >= 1 && args.m < kMaxRows && args.n < kMaxRows &&
         group % kHalfColumns == 0 && group <= most && aligned16(args.x) && aligned16(args.w) &&
         is_compiled_for_device();
}

void linear_int4_grouped(const LinearInt4Args& args, Stream stream) {
  run<TilesConfig<1, true>>(args, stream);
}

}  // namespace quarot::cuda
