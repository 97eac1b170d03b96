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
    for (int g = 0; g < kConsumers; ++g) {
      mbarrier_init(shared + C::kResidualAt + g * 8, 1);
      mbarrier_init(shared + C::kSentAt + g * 8, 1);
    }
    mbarrier_init_fence();
  }
  cluster_arrive_relaxed();
  start_next_grid();
  if (threadIdx.x == kConsumers * kGroupThreads) prefetch<C>(p);
  wait_for_previous_grid();
  cluster_wait();
  // Of the warp, so that what depends on it stays in uniform registers.
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
  if (group == kConsumers) {
    registers_release<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kGroupThreads) fill_ring<C>(p, shared);
    __syncwarp();
    if (p.parted) {  // exchange
      cluster_arrive_relaxed();
      cluster_wait();
    }
  } else {
    registers_take<kConsumerRegisters>();
    Consumer<C>{p, shared, group, threadIdx.x % kGroupThreads, rank_of(p), {}}.run();
  }
  if (p.pair > 1) {  // the neighbour may still copy to this block, or arrive here
    cluster_arrive_relaxed();
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

/// Whether the current device runs this file's sm_90a code.
bool is_compiled_for_device() {
  if (compute_major() != 9) return false;
  static const bool compiled = [] {
    cudaFuncAttributes attributes{};
    const cudaError_t status =
        cudaFuncGetAttributes(&attributes, &linear_int4_prefill_kernel<Config<128>>);
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

/// [i]: clusters of i blocks that run at a time, a block a processor. Not all of them fit: the
/// processors of a cluster are of one GPC. Asked for when a thread comes to another device.
const int64_t* active_clusters() {
  thread_local int64_t known[kMaxCluster + 1] = {};
  thread_local int of = -1;
  if (const int device = device_limits().device; device != of) {
    for (int i = 1; i <= kMaxCluster; ++i) {
      int clusters = 0;
      Grid<Config<128>> grid(1, i);
      QUAROT_CUDA_CHECK(
          cudaOccupancyMaxActiveClusters(&clusters, grid.kernel, grid.config(nullptr)));
      known[i] = clusters;
    }
    of = device;
  }
  return known;
}

/// How the work is cut.
struct Plan {
  int tokens;   // of a tile
  int cluster;  // blocks
  int pair;     // of them share activations: neighbours; 1: the blocks share the columns
  int64_t whole_tiles;
  int64_t narrow_tiles = 0;
  int narrow_groups = 0;
};

template <class C>
void run(const LinearInt4Args& args, const Plan& plan, Stream stream) {
  Params p{};
  p.args = args;
  p.stages = static_cast<int>(ceil_div(args.k, kColumns));
  p.cluster = plan.cluster;
  p.pair = plan.pair;
  p.whole_tiles = static_cast<int>(plan.whole_tiles);
  p.parted = plan.cluster > plan.pair;
  p.parts = FastDiv(plan.cluster);
  p.channel_tiles = static_cast<int>(ceil_div(args.n, kChannels * plan.pair));
  p.token_tiles = static_cast<int>(ceil_div(args.m, C::kTokens));
  p.set_tiles = FastDiv(kTokenTiles * p.channel_tiles);
  p.last_tokens = FastDiv(p.token_tiles % kTokenTiles == 0 ? 1 : p.token_tiles % kTokenTiles);
  p.narrow_tiles = static_cast<int>(plan.narrow_tiles);
  p.narrow_groups = plan.narrow_groups;
  p.copied_groups = plan.whole_tiles > 0 ? kConsumers : plan.narrow_groups;
  p.narrow_channel = p.whole_tiles / p.token_tiles * plan.pair * kChannels;
  p.narrow_tokens = FastDiv(p.token_tiles);
  const bool boxes = args.out_dtype != DType::f32 && args.n % 8 == 0 && aligned16(args.out);
  const bool load_boxes = boxes && args.residual != nullptr && args.residual_dtype != DType::f32 &&
                          aligned16(args.residual);
  p.boxes = boxes && (load_boxes || args.residual == nullptr);
  p.load_boxes = load_boxes;
  p.x = tensor_map(args.x, CU_TENSOR_MAP_DATA_TYPE_UINT8, args.m, args.k, args.k,
                   C::kTokens / plan.pair, kColumns, CU_TENSOR_MAP_SWIZZLE_128B);
  const int64_t strip_bytes = ceil_div(args.k, 64) * kHalfStripBytes;
  p.w = tensor_map(args.w, CU_TENSOR_MAP_DATA_TYPE_INT32, ceil_div(args.n, kStrip), strip_bytes / 4,
                   strip_bytes, p.copied_groups * kGroupChannels / kStrip, kStripBytes / 4,
                   CU_TENSOR_MAP_SWIZZLE_NONE);
  if (p.boxes) {
    p.out = tensor_map(args.out, CU_TENSOR_MAP_DATA_TYPE_UINT16, args.m, args.n, args.n * 2,
                       kPieceTokens, kGroupChannels, CU_TENSOR_MAP_SWIZZLE_128B);
  }
  if (p.load_boxes) {
    p.residual = tensor_map(args.residual, CU_TENSOR_MAP_DATA_TYPE_UINT16, args.m, args.n,
                            args.n * 2, kPieceTokens, kGroupChannels, CU_TENSOR_MAP_SWIZZLE_128B);
  }
  const int64_t most = device_limits().processors / plan.cluster;
  const int64_t whole = p.parted ? plan.whole_tiles : std::min(plan.whole_tiles, most);
  Grid<C> grid(std::max(whole, plan.narrow_tiles), plan.cluster);
  QUAROT_CUDA_CHECK(cudaLaunchKernelEx(grid.config(stream), grid.kernel, p));
}

/// Nanoseconds, measured on an H200 by benchmarks/plan_linear_int4.cu: of a stage of columns of a
/// tile of 1, 2, 3 or all 4 warpgroups' channels, of the rest of a tile, and of the exchange of
/// sums between two blocks, where each sends half of them.
struct Cost {
  int tokens;
  int64_t stage[kConsumers];
  int64_t tile, exchange;
};
constexpr Cost kCosts[] = {
    {128, {290, 375, 440, 580}, 2898, 3865},
    {96, {262, 333, 396, 456}, 2381, 2684},
    {64, {227, 269, 317, 382}, 1870, 2056},
    {32, {204, 234, 265, 340}, 790, 1304},
};

/// The plan of the least time.
Plan plan_of(const LinearInt4Args& args) {
  const int64_t stages = ceil_div(args.k, kColumns), channel_tiles = ceil_div(args.n, kChannels);
  const int pair = channel_tiles % 2 == 0 ? 2 : 1;  // no empty column of tiles
  const int64_t* const active = active_clusters();
  const int64_t clusters = active[pair];
  Plan best{};
  int64_t least = 0;
  const auto consider = [&](int64_t time, const Plan& plan) {
    if (least > 0 && time >= least) return;
    least = time;
    best = plan;
  };
  for (const Cost& cost : kCosts) {
    const auto wave = [&](int groups, int64_t stages) {
      return stages * cost.stage[groups - 1] + cost.tile;
    };
    const int64_t token_tiles = ceil_div(args.m, cost.tokens), columns = channel_tiles / pair;
    const int64_t tiles = columns * token_tiles;
    const int64_t whole_wave = wave(kConsumers, stages);
    consider(ceil_div(tiles, clusters) * whole_wave, {cost.tokens, pair, pair, tiles});
    // Narrow tiles for the columns that are left after the last full wave.
    const int64_t waves = tiles / clusters, whole_columns = waves * clusters / token_tiles;
    const int64_t rest = args.n - whole_columns * pair * kChannels;
    for (int groups = 1; groups < kConsumers && token_tiles <= kTokenTiles; ++groups) {
      const int64_t narrow = ceil_div(rest, groups * kGroupChannels * pair) * token_tiles;
      if (rest <= 0 || narrow > clusters) continue;
      consider(waves * whole_wave + wave(groups, stages),
               {cost.tokens, pair, pair, whole_columns * token_tiles, narrow, groups});
    }
    for (int parts = 2; parts <= kMaxCluster && parts <= stages; ++parts) {
      const int64_t exchange = cost.exchange * 2 * (parts - 1) / parts;
      consider(ceil_div(tiles * pair, active[parts]) *
                   (wave(kConsumers, ceil_div(stages, parts)) + exchange),
               {cost.tokens, parts, 1, tiles * pair});
    }
  }
  return best;
}

}  // namespace

bool linear_int4_prefill_fits(const LinearInt4Args& args) {
  const bool shape = args.groups == 1 && args.m >= 1 && args.n >= 1 && args.m < kMaxRows &&
                     args.n < kMaxRows && args.k < kMaxK;
  return shape && aligned16(args.x) && aligned16(args.w) && is_compiled_for_device();
}

void linear_int4_prefill(const LinearInt4Args& args, Stream stream) {
  const Plan plan = plan_of(args);
  switch (plan.tokens) {
    case 32:
      return run<Config<32>>(args, plan, stream);
    case 64:
      return run<Config<64>>(args, plan, stream);
    case 96:
      return run<Config<96>>(args, plan, stream);
    default:
      return run<Config<128>>(args, plan, stream);
  }
}

}  // namespace quarot::cuda
