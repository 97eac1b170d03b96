// linear_int4 for many tokens on sm_90a: the kernel, and how it is launched. Maths:
// kernels/linear_int4.h; design, layout and bound: linear_int4_prefill.cuh.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

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
    for (int g = 0; g < kConsumers; ++g) mbarrier_init(shared + C::kResidualAt + g * 8, 1);
    mbarrier_init_fence();
  }
  cluster_arrive();
  start_next_grid();
  if (threadIdx.x == kConsumers * kGroupThreads) prefetch<C>(p);
  wait_for_previous_grid();
  cluster_wait();
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads;
  if (group == kConsumers) {
    registers_release<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kGroupThreads) fill_ring<C>(p, shared);
    __syncwarp();
    for (int i = 0; i < (has_parted(p) ? 2 : 0); ++i) {  // exchange
      cluster_arrive();
      cluster_wait();
    }
  } else {
    registers_take<kConsumerRegisters>();
    Consumer<C>{p, shared, group, threadIdx.x % kGroupThreads, rank_of(p), {}}.run();
  }
  if (p.pair > 1) {  // the neighbour may still copy to this block, or arrive here
    cluster_arrive();
    cluster_wait();
  }
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

/// A launch of clusters.
template <class C>
class Grid {
 public:
  static constexpr auto kernel = &linear_int4_prefill_kernel<C>;

  Grid(int64_t clusters, int cluster) {
    allow_shared(reinterpret_cast<const void*>(kernel), C::kSharedBytes);
    attributes_[0].id = cudaLaunchAttributeClusterDimension;
    attributes_[0].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    attributes_[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes_[1].val.programmaticStreamSerializationAllowed = 1;
    config_.gridDim = dim3(static_cast<unsigned>(clusters * cluster));
    config_.blockDim = dim3(kThreads);
    config_.dynamicSmemBytes = C::kSharedBytes;
    config_.attrs = attributes_;
    config_.numAttrs = 2;
  }
  const cudaLaunchConfig_t* config(Stream stream) {
    config_.stream = static_cast<cudaStream_t>(stream);
    return &config_;
  }

 private:
  cudaLaunchAttribute attributes_[2] = {};
  cudaLaunchConfig_t config_{};
};

/// Clusters of so many blocks that run at a time, a block a processor. Not all of them fit: the
/// processors of a cluster are of one GPC. Asked for when a thread comes to another device.
int64_t active_clusters(int cluster) {
  thread_local int64_t known[kMaxCluster + 1] = {};
  thread_local int of = -1;
  if (const int device = device_limits().device; device != of) {
    for (int i = 1; i <= kMaxCluster; ++i) {
      int clusters = 0;
      Grid<Config<128, false>> grid(1, i);
      QUAROT_CUDA_CHECK(
          cudaOccupancyMaxActiveClusters(&clusters, grid.kernel, grid.config(nullptr)));
      known[i] = clusters;
    }
    of = device;
  }
  return known[cluster];
}

/// How the work is cut.
struct Plan {
  int tokens;   // of a tile
  int cluster;  // blocks
  int pair;     // of them share activations in whole tiles: neighbours
  int64_t whole_tiles, parted_tiles;
};

template <class C>
void run(const LinearInt4Args& args, const Plan& plan, Stream stream) {
  Params p{};
  p.args = args;
  p.stages = static_cast<int>(ceil_div(args.k, kColumns));
  p.cluster = plan.cluster;
  p.pair = plan.pair;
  p.whole_tiles = static_cast<int>(plan.whole_tiles);
  p.parted_tiles = static_cast<int>(plan.parted_tiles);
  p.channel_tiles = static_cast<int>(ceil_div(args.n, kChannels * plan.pair));
  p.token_tiles = static_cast<int>(ceil_div(args.m, C::kTokens));
  p.set_tiles = FastDiv(kTokenTiles * p.channel_tiles);
  p.last_tokens = FastDiv(p.token_tiles % kTokenTiles == 0 ? 1 : p.token_tiles % kTokenTiles);
  const bool boxes = args.out_dtype != DType::f32 && args.n % 8 == 0 && aligned16(args.out);
  const bool load_boxes = boxes && args.residual != nullptr && args.residual_dtype != DType::f32 &&
                          aligned16(args.residual);
  p.boxes = boxes && (load_boxes || args.residual == nullptr);
  p.load_boxes = load_boxes;
  p.x = tensor_map(args.x, CU_TENSOR_MAP_DATA_TYPE_UINT8, args.m, args.k, args.k,
                   C::kTokens / plan.pair, kColumns, CU_TENSOR_MAP_SWIZZLE_128B);
  const int64_t strip_bytes = ceil_div(args.k, 64) * kHalfStripBytes;
  p.w = tensor_map(args.w, CU_TENSOR_MAP_DATA_TYPE_INT32, ceil_div(args.n, kStrip), strip_bytes / 4,
                   strip_bytes, kChannels / kStrip, kStripBytes / 4, CU_TENSOR_MAP_SWIZZLE_NONE);
  if (p.boxes) {
    p.out = tensor_map(args.out, CU_TENSOR_MAP_DATA_TYPE_UINT16, args.m, args.n, args.n * 2,
                       kPieceTokens, kGroupChannels, CU_TENSOR_MAP_SWIZZLE_128B);
  }
  if (p.load_boxes) {
    p.residual = tensor_map(args.residual, CU_TENSOR_MAP_DATA_TYPE_UINT16, args.m, args.n,
                            args.n * 2, kPieceTokens, kGroupChannels, CU_TENSOR_MAP_SWIZZLE_128B);
  }
  const int64_t most = device_limits().processors / plan.cluster;
  const int64_t whole = std::min(plan.whole_tiles, most);
  Grid<C> grid(std::max(whole, plan.parted_tiles), plan.cluster);
  QUAROT_CUDA_CHECK(cudaLaunchKernelEx(grid.config(stream), grid.kernel, p));
}

/// The plan of the fewest cycles: waves of tiles times what the kernel was measured to take on an
/// H200, for a stage of columns, for the rest of a tile, and for the exchange of sums.
Plan plan_of(const LinearInt4Args& args) {
  struct Cost {
    int tokens;
    int64_t stage, tile, exchange;
  };
  constexpr Cost kCosts[] = {
      {128, 1080, 3500, 4500}, {96, 840, 3000, 4000}, {64, 620, 2700, 3500}, {32, 440, 2300, 3000}};
  const int64_t stages = ceil_div(args.k, kColumns), channel_tiles = ceil_div(args.n, kChannels);
  const int pair = channel_tiles % 2 == 0 ? 2 : 1;  // no empty column of tiles
  const bool grouped = args.groups > 1;             // the order of the groups counts: no parts
  Plan best{};
  int64_t fewest = 0;
  const auto consider = [&](int64_t cycles, const Plan& plan) {
    if (fewest > 0 && cycles >= fewest) return;
    fewest = cycles;
    best = plan;
  };
  for (const Cost& cost : kCosts) {
    if (grouped && cost.tokens != kGroupedTokens) continue;
    const int64_t tiles = channel_tiles * ceil_div(args.m, cost.tokens);
    const int64_t wave = pair * active_clusters(pair), tile = stages * cost.stage + cost.tile;
    const auto parted = [&](int parts) {
      return ceil_div(stages, parts) * cost.stage + cost.tile + cost.exchange;
    };
    consider(ceil_div(tiles, wave) * tile, {cost.tokens, pair, pair, tiles / pair, 0});
    if (grouped) continue;
    const int64_t rest = tiles % wave;
    if (pair == 2 && tiles > wave && 0 < rest && rest <= wave / 2 && stages >= 2) {
      consider(tiles / wave * tile + parted(2), {cost.tokens, 2, 2, (tiles - rest) / 2, rest});
    }
    for (int parts = 2; parts <= kMaxCluster && parts <= stages; ++parts) {
      consider(ceil_div(tiles, active_clusters(parts)) * parted(parts),
               {cost.tokens, parts, 1, 0, tiles});
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
  const Plan plan = plan_of(args);
  if (args.groups > 1) return run<Config<kGroupedTokens, true>>(args, plan, stream);
  switch (plan.tokens) {
    case 32:
      return run<Config<32, false>>(args, plan, stream);
    case 64:
      return run<Config<64, false>>(args, plan, stream);
    case 96:
      return run<Config<96, false>>(args, plan, stream);
    default:
      return run<Config<128, false>>(args, plan, stream);
  }
}

}  // namespace quarot::cuda
