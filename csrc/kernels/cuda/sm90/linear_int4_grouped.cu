// linear_int4 with scales of groups of columns on sm_90a: the kernels, and how they are launched.
// Maths: kernels/linear_int4.h; design, layout and bound: linear_int4_grouped.cuh.
#include <cuda.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/ptx.cuh"
#include "kernels/cuda/sm90/linear_int4_grouped.cuh"
#include "kernels/cuda/sm90/linear_int4_grouped.h"
#include "kernels/cuda/sm90/tensor_map.cuh"

namespace quarot::cuda {
namespace {

using namespace grouped;

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    linear_int4_grouped_kernel(const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  // Through a reduction: so the compiler knows that all lanes have the same, and keeps it.
  const uint32_t shared = __reduce_or_sync(
      ~0u, (shared_address(dynamic_shared()) + kSwizzleBytes - 1) & ~(kSwizzleBytes - 1));
  if (threadIdx.x == 0) {
    for (int s = 0; s < C::kStages; ++s) {
      mbarrier_init(shared + C::kFullAt + s * 8, 1);
      mbarrier_init(shared + C::kEmptyAt + s * 8, p.pair * C::kEmptyArrivals);
    }
    for (int g = 0; g < C::kWarpgroups; ++g) mbarrier_init(shared + C::kResidualAt + g * 8, 1);
    if constexpr (C::kStrips == 1) {
      for (int i = C::kTurnsAt; i < C::kTotalsAt; i += 8) mbarrier_init(shared + i, kWarp);
    }
    mbarrier_init_fence();
  }
  start_next_grid();
  wait_for_previous_grid();
  cluster_arrive();
  cluster_wait();
  const int group = static_cast<int>(__reduce_or_sync(~0u, threadIdx.x / kGroupThreads));
  if (group == C::kWarpgroups) {
    registers_release<prefill::kProducerRegisters>();
    if (threadIdx.x == C::kWarpgroups * kGroupThreads) fill_ring<C>(p, shared);
    __syncwarp();
  } else {
    registers_take<C::kRegisters>();
    using Kind = std::conditional_t<(C::kStrips > 1), Strips<C>, Relay<C>>;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const uint32_t empty = cluster_address(shared + C::kEmptyAt, min(lane, p.pair - 1));
    Kind{{p, shared, group, threadIdx.x % kGroupThreads, empty}}.run();
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

/// Whether the current device runs this file's sm_90a code.
bool is_compiled_for_device() {
  if (compute_major() != 9) return false;
  static const bool compiled = [] {
    cudaFuncAttributes attributes{};
    const cudaError_t status =
        cudaFuncGetAttributes(&attributes, &linear_int4_grouped_kernel<RelayConfig<16, 1>>);
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
  p.group_steps = static_cast<int>(args.k / args.groups / (C::kHalves * kHalfColumns));
  p.channel_tiles = static_cast<int>(channel_tiles / p.pair);
  p.token_tiles = static_cast<int>(ceil_div(args.m, C::kTokens));
  p.set_tiles = FastDiv(kTokenTiles * p.channel_tiles);
  p.last_tokens = FastDiv(p.token_tiles % kTokenTiles == 0 ? 1 : p.token_tiles % kTokenTiles);
  const bool boxes = args.out_dtype != DType::f32 && args.n % 8 == 0 && aligned16(args.out);
  p.load_boxes = boxes && args.residual != nullptr && args.residual_dtype != DType::f32 &&
                 aligned16(args.residual);
  p.boxes = boxes && (p.load_boxes || args.residual == nullptr);
  p.x = tensor_map(args.x, CU_TENSOR_MAP_DATA_TYPE_UINT8, args.m, args.k, args.k,
                   C::kTokens / p.pair, kColumns, CU_TENSOR_MAP_SWIZZLE_128B);
  const int64_t strip_bytes = ceil_div(args.k, kHalfColumns) * kHalfStripBytes;
  p.w = tensor_map(args.w, CU_TENSOR_MAP_DATA_TYPE_INT32, ceil_div(args.n, kStrip), strip_bytes / 4,
                   strip_bytes, C::kChannels / kStrip, kStripBytes / 4, CU_TENSOR_MAP_SWIZZLE_NONE);
  const auto box_map = [&](const void* data) {
    return tensor_map(data, CU_TENSOR_MAP_DATA_TYPE_UINT16, args.m, args.n, args.n * 2,
                      kPieceTokens, kGroupChannels, CU_TENSOR_MAP_SWIZZLE_128B);
  };
  if (p.boxes) p.out = box_map(args.out);
  if (p.load_boxes) p.residual = box_map(args.residual);
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

using Launch = void (*)(const LinearInt4Args&, Stream);

/// How a kernel is launched, and what it was measured to take on an H200, in cycles: for a stage of
/// columns in one group and in two, and for the rest of a tile.
struct Choice {
  int tokens, channels;  // of a tile
  int64_t stage[2], tile;
  Launch whole, halves, other;  // groups of whole stages or of one, of half of one, others
};
template <int kTokens>
constexpr Choice relay(int64_t one, int64_t two) {
  return {kTokens,
          kGroupChannels,
          {one, two},
          1000,
          &run<RelayConfig<kTokens, 2>>,
          &run<RelayConfig<kTokens, 1>>,
          &run<RelayConfig<kTokens, 1>>};
}
template <int kTokens>
constexpr Choice strips(int64_t one, int64_t two) {
  return {kTokens,
          2 * kGroupChannels,
          {one, two},
          3700,
          &run<StripsConfig<kTokens, 2, false>>,
          &run<StripsConfig<kTokens, 1, false>>,
          &run<StripsConfig<kTokens, 1, true>>};
}
constexpr Choice kChoices[] = {
    relay<16>(331, 391),   relay<32>(378, 525),     relay<64>(560, 1035),
    strips<64>(748, 1235), strips<128>(1240, 1737),
};

/// The choice of the fewest cycles: waves of tiles times what each takes.
const Choice& choice_of(const LinearInt4Args& args, int64_t group) {
  const bool halves = group < kColumns;
  const int64_t processors = device_limits().processors, stages = ceil_div(args.k, kColumns);
  const Choice* best = nullptr;
  int64_t fewest = 0;
  for (const Choice& c : kChoices) {
    if (c.channels == kGroupChannels && group > kRelayColumns) continue;
    const int64_t tiles = ceil_div(args.m, c.tokens) * ceil_div(args.n, c.channels);
    const int64_t cycles = ceil_div(tiles, processors) * (stages * c.stage[halves] + c.tile);
    if (best != nullptr && cycles >= fewest) continue;
    best = &c;
    fewest = cycles;
  }
  return *best;
}

}  // namespace

bool linear_int4_grouped_fits(const LinearInt4Args& args) {
  return args.groups > 1 && args.m >= 1 && args.n >= 1 && args.m < kMaxRows && args.n < kMaxRows &&
         args.k < kMaxK && args.k / args.groups % kHalfColumns == 0 && aligned16(args.x) &&
         aligned16(args.w) && is_compiled_for_device();
}

void linear_int4_grouped(const LinearInt4Args& args, Stream stream) {
  const int64_t group = args.k / args.groups;
  const Choice& c = choice_of(args, group);
  const bool whole = group == kColumns || (c.channels == kGroupChannels && group % kColumns == 0);
  (whole ? c.whole : group == kHalfColumns ? c.halves : c.other)(args, stream);
}

}  // namespace quarot::cuda
