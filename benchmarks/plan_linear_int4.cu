// Measures what sm90/linear_int4_prefill.cu plans with and prints it as that file's table, kCosts:
// nanoseconds of a stage of columns of a tile of 1, 2, 3 or 4 warpgroups' channels, of the rest of
// a tile, and of the exchange of sums. On a Hopper GPU:
//
//     nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a --expt-relaxed-constexpr -Icsrc \
//       benchmarks/plan_linear_int4.cu -o /tmp/plan && /tmp/plan
#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

#include "kernels/cuda/sm90/linear_int4_prefill.cu"

namespace quarot::cuda {
namespace {

constexpr int kLaunches = 50, kReplays = 15;
// Of columns. All weights together stay in the L2: those of a prompt are read by many tiles.
constexpr int kFewStages = 16, kManyStages = 32;
constexpr int kPair = 2, kTileColumnsOfTokens = 2;  // of token tiles, so that weights are shared

/// Device memory with random bytes.
template <class T>
T* random_bytes(int64_t bytes) {
  std::vector<uint32_t> host(bytes / 4);
  std::mt19937 next(1);
  std::generate(host.begin(), host.end(), [&] { return next() & 0x3f3f3f3fu; });  // scales: finite
  void* data = nullptr;
  QUAROT_CUDA_CHECK(cudaMalloc(&data, bytes));
  QUAROT_CUDA_CHECK(cudaMemcpy(data, host.data(), bytes, cudaMemcpyHostToDevice));
  return static_cast<T*>(data);
}

/// Nanoseconds of a call: the median of graphs of some.
template <class C>
double time_of(const LinearInt4Args& args, const Plan& plan, cudaStream_t stream) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  run<C>(args, plan, stream);
  QUAROT_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < kLaunches; ++i) run<C>(args, plan, stream);
  QUAROT_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  QUAROT_CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  QUAROT_CUDA_CHECK(cudaEventCreate(&begin));
  QUAROT_CUDA_CHECK(cudaEventCreate(&end));
  std::vector<float> times(kReplays);
  for (float& time : times) {
    QUAROT_CUDA_CHECK(cudaEventRecord(begin, stream));
    QUAROT_CUDA_CHECK(cudaGraphLaunch(exec, stream));
    QUAROT_CUDA_CHECK(cudaEventRecord(end, stream));
    QUAROT_CUDA_CHECK(cudaEventSynchronize(end));
    QUAROT_CUDA_CHECK(cudaEventElapsedTime(&time, begin, end));
  }
  std::sort(times.begin(), times.end());
  return times[kReplays / 2] * 1e6 / kLaunches;
}

template <class C>
void print_costs(LinearInt4Args args, cudaStream_t stream) {
  const int64_t clusters = active_clusters()[kPair], columns = clusters / kTileColumnsOfTokens;
  const int64_t tiles = columns * kTileColumnsOfTokens;
  const auto time = [&](int groups, int waves, int stages) {
    args.m = C::kTokens * kTileColumnsOfTokens * waves;
    args.n = columns * kPair * groups * kGroupChannels;
    args.k = stages * kColumns;
    const bool whole = groups == kConsumers;
    return time_of<C>(args,
                      {C::kTokens, kPair, kPair, whole ? tiles * waves : 0, whole ? 0 : tiles,
                       whole ? 0 : groups},
                      stream);
  };
  // Two waves less one: without the launch.
  const auto wave = [&](int stages) {
    return time(kConsumers, 2, stages) - time(kConsumers, 1, stages);
  };
  const double few = wave(kFewStages), many = wave(kManyStages);
  double stage[kConsumers];
  for (int groups = 1; groups <= kConsumers; ++groups) {
    const bool whole = groups == kConsumers;
    const double more =
        whole ? many - few : time(groups, 1, kManyStages) - time(groups, 1, kFewStages);
    stage[groups - 1] = more / (kManyStages - kFewStages);
  }
  const double tile = few - kFewStages * stage[kConsumers - 1];
  const double launch = time(kConsumers, 1, kFewStages) - few;
  args.m = C::kTokens * kTileColumnsOfTokens;
  args.n = columns * kChannels;
  args.k = kManyStages * kColumns;
  const double parted = time_of<C>(args, {C::kTokens, 2, 1, tiles}, stream);
  const double exchange = parted - launch - tile - kManyStages / 2 * stage[kConsumers - 1];
  printf("    {%d, {%.0f, %.0f, %.0f, %.0f}, %.0f, %.0f},\n", C::kTokens, stage[0], stage[1],
         stage[2], stage[3], tile, exchange);
}

void print_all_costs() {
  const int64_t channels = int64_t{device_limits().processors} * kChannels;
  const int64_t tokens = Config<128>::kTokens * kTileColumnsOfTokens * 2;
  const int64_t columns = kManyStages * kColumns;
  LinearInt4Args args{};
  args.x = random_bytes<int8_t>(tokens * columns);
  args.x_scale = random_bytes<float>(tokens * 4);
  args.w = random_bytes<uint8_t>(channels * columns / 2);
  args.w_scale = random_bytes<float>(channels * 4);
  args.out = random_bytes<uint8_t>(tokens * channels * 2);
  args.out_dtype = DType::bf16;
  args.groups = 1;
  cudaStream_t stream = nullptr;
  QUAROT_CUDA_CHECK(cudaStreamCreate(&stream));
  print_costs<Config<128>>(args, stream);
  print_costs<Config<96>>(args, stream);
  print_costs<Config<64>>(args, stream);
  print_costs<Config<32>>(args, stream);
}

}  // namespace
}  // namespace quarot::cuda

int main() { quarot::cuda::print_all_costs(); }
