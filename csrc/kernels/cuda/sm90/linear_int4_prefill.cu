// linear_int4 for many tokens on sm_90a: the kernel, and how it is launched. Maths:
// kernels/linear_int4.h; design, layout and bound: linear_int4_prefill.cuh.
#include <cuda.h>
#include <cuda_runtime.h>

#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/ptx.cuh"
#include "kernels/cuda/sm90/linear_int4_prefill.cuh"
#include "kernels/cuda/sm90/linear_int4_prefill.h"
#include "kernels/cuda/sm90/tensor_map.cuh"

namespace quarot::cuda {
namespace {

using namespace prefill;

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    linear_int4_prefill_kernel(const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const uint32_t shared =
      (shared_address(dynamic_shared()) + kSwizzleBytes - 1) & ~(kSwizzleBytes - 1);
  if (threadIdx.x == 0) {
    for (int s = 0; s < C::kStages; ++s) {
      mbarrier_init(shared + C::kFullAt + s * 8, 1);
      mbarrier_init(shared + C::kEmptyAt + s * 8, p.pair * kConsumers * kGroupThreads / kWarp);
    }
    mbarrier_init_fence();
  }
  cluster_arrive();
  cluster_wait();
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads;
  if (group == kConsumers) {
    registers_release<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kGroupThreads) fill_ring<C>(p, shared);
    __syncwarp();
    for (int i = 0; i < (p.split > 1 ? 2 : 0); ++i) {  // exchange
      cluster_arrive();
      cluster_wait();
    }
  } else {
    registers_take<kConsumerRegisters>();
    Consumer<C>{p, shared, place(p), group, threadIdx.x % kGroupThreads, {}}.run();
  }
  // Another block may still copy to this one, or arrive here.
  cluster_arrive();
  cluster_wait();
#else
  __trap();
#endif
}

// ---- Launch -------------------------------------------------------------------------------------

/// 16 * |acc| stays below 2^31.
constexpr int64_t kMaxK = int64_t{1} << 17;
/// Coordinates of tiles are ints, with room for the last tile.
constexpr int64_t kMaxRows = int64_t{1} << 30;
/// A group has whole halves of stages.
constexpr int kGroupMultiple = kColumns / 2;
constexpr int kGroupedTokens = 64;

/// Whether the current device runs this file's sm_90a code.
bool is_compiled_for_device() {
  if (compute_major() != 9) return false;
  static const bool compiled = [] {
    cudaFuncAttributes attributes{};
    const cudaError_t status =
        cudaFuncGetAttributes(&attributes, &linear_int4_prefill_kernel<Config<128, false>>);
    if (status != cudaSuccess) cudaGetLastError();
    return status == cudaSuccess && attributes.binaryVersion == 90 && attributes.ptxVersion == 90;
  }();
  return compiled;
}

/// Blocks of a cluster.
struct Cluster {
  int pair, split;
};

template <class C>
void run(const LinearInt4Args& args, Cluster cluster, Stream stream) {
  const auto [pair, split] = cluster;
  Params p{};
  p.args = args;
  p.pair = pair;
  p.split = split;
  p.channel_tiles = static_cast<int>(ceil_div(args.n, kChannels * pair));
  p.token_tiles = static_cast<int>(ceil_div(args.m, C::kTokens));
  p.set_tiles = FastDiv(kTokenTiles * p.channel_tiles);
  p.last_tokens = FastDiv(p.token_tiles % kTokenTiles == 0 ? 1 : p.token_tiles % kTokenTiles);
  p.store_boxes = args.out_dtype != DType::f32 && args.n % 8 == 0 && aligned16(args.out);
  p.x = tensor_map(args.x, CU_TENSOR_MAP_DATA_TYPE_UINT8, args.m, args.k, args.k, C::kTokens / pair,
                   kColumns, CU_TENSOR_MAP_SWIZZLE_128B);
  const int64_t strip_bytes = ceil_div(args.k, 64) * kHalfStripBytes;
  p.w = tensor_map(args.w, CU_TENSOR_MAP_DATA_TYPE_INT32, ceil_div(args.n, kStrip), strip_bytes / 4,
                   strip_bytes, kChannels / kStrip, kStripBytes / 4, CU_TENSOR_MAP_SWIZZLE_NONE);
  if (p.store_boxes) {
    p.out = tensor_map(args.out, CU_TENSOR_MAP_DATA_TYPE_UINT16, args.m, args.n, args.n * 2,
                       kPieceTokens, kGroupChannels, CU_TENSOR_MAP_SWIZZLE_128B);
  }
  const int blocks = pair * split;
  const int64_t tiles = int64_t{p.channel_tiles} * p.token_tiles;
  // A ring that has received sums is not filled again: parts of k have one tile.
  const int64_t most = split > 1 ? tiles : device_limits().processors / pair;
  const auto kernel = &linear_int4_prefill_kernel<C>;
  QUAROT_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes));
  cudaLaunchAttribute dimension{};
  dimension.id = cudaLaunchAttributeClusterDimension;
  dimension.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((tiles < most ? tiles : most) * blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = C::kSharedBytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &dimension;
  config.numAttrs = 1;
  QUAROT_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, p));
}

/// How the work is cut.
struct Plan {
  int tokens;  // of a tile
  Cluster cluster;
};

/// The plan of the fewest cycles: waves of tiles times what the kernel was measured to take on an
/// H200, for a stage of columns, for the rest of a tile, and for the exchange of sums.
Plan plan_of(const LinearInt4Args& args, int processors) {
  struct Cost {
    int tokens;
    int64_t stage, tile, exchange;
  };
  constexpr Cost kCosts[] = {{128, 1080, 3900, 4000}, {64, 620, 3000, 3000}};
  const int64_t stages = ceil_div(args.k, kColumns), channel_tiles = ceil_div(args.n, kChannels);
  const bool grouped = args.groups > 1;  // the order of the groups counts: no parts
  Plan best{};
  int64_t fewest = 0;
  for (const Cost& cost : kCosts) {
    if (grouped && cost.tokens != kGroupedTokens) continue;
    for (int split = 1; split <= (grouped ? 1 : 2); ++split) {
      const int64_t tiles = channel_tiles * ceil_div(args.m, cost.tokens);
      const int64_t cycles =
          ceil_div(tiles * split, processors) *
          (ceil_div(stages, split) * cost.stage + cost.tile + (split - 1) * cost.exchange);
      if (fewest > 0 && cycles >= fewest) continue;
      fewest = cycles;
      // Pairs must not add an empty column of tiles.
      best = {cost.tokens, {split == 1 && channel_tiles % 2 == 0 ? 2 : 1, split}};
    }
  }
  return best;
}

}  // namespace

bool linear_int4_prefill_fits(const LinearInt4Args& args) {
  const int64_t group = args.k / args.groups;
  const bool shape = args.m >= 1 && args.n >= 1 && args.m < kMaxRows && args.n < kMaxRows &&
                     args.k < kMaxK && (args.groups == 1 || group % kGroupMultiple == 0);
  return shape && aligned16(args.x) && aligned16(args.w) && is_compiled_for_device();
}

void linear_int4_prefill(const LinearInt4Args& args, Stream stream) {
  const Plan plan = plan_of(args, device_limits().processors);
  if (args.groups > 1) return run<Config<kGroupedTokens, true>>(args, plan.cluster, stream);
  if (plan.tokens == 64) return run<Config<64, false>>(args, plan.cluster, stream);
  run<Config<128, false>>(args, plan.cluster, stream);
}

}  // namespace quarot::cuda
