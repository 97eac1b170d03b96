// linear_int4 on CUDA: which kernel runs, and the weight layout. Maths and layout:
// kernels/linear_int4.h; the kernels: device/linear_int4_mma.cuh,
// sm90/linear_int4_prefill.cu and, for scales of groups, sm90/linear_int4_grouped.cu.
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/linear_int4.cuh"
#include "kernels/cuda/device/linear_int4_mma.cuh"
#include "kernels/cuda/sm90/linear_int4_grouped.h"
#include "kernels/cuda/sm90/linear_int4_prefill.h"
#include "kernels/linear_int4.h"

namespace quarot::cuda {
namespace {

// ---- Weight layout ------------------------------------------------------------------------------

constexpr int kPackThreads = 256;

/// The inverse of spread (device/linear_int4_mma.cuh): the low nibbles of four bytes in one half
/// word; the high nibbles are zeros.
__device__ __forceinline__ uint32_t gather(uint32_t bytes) {
  const uint32_t pairs = (bytes | (bytes >> 4)) & 0x00ff00ffu;
  return (pairs | (pairs >> 8)) & 0xffffu;
}

/// A thread a word of the layout.
__global__ void __launch_bounds__(kPackThreads)
    prepack_kernel(uint32_t* dst, const uint8_t* src, int64_t n, int64_t k, int64_t k_tiles,
                   int64_t words) {
  const int64_t i = int64_t{blockIdx.x} * kPackThreads + threadIdx.x;
  if (i >= words) return;
  const int word = static_cast<int>(i % 4), lane = static_cast<int>(i / 4 % kWarp);
  const int64_t tile = i / (4 * kWarp);
  const int64_t row = tile / k_tiles * kTileRows + lane / 4 + 8 * (word % 2);
  const int64_t column = tile % k_tiles * kTileColumns + word / 2 * 16 + lane % 4 * 4;
  uint32_t halves[2] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t c = column + h * kStepColumns;
    if (row >= n || c >= k) continue;
    const uint8_t* p = src + (row * k + c) / kInt4PerByte;
    halves[h] = spread(p[0] | (uint32_t{p[1]} << 8));
  }
  dst[i] = halves[0] | (halves[1] << 4);
}

/// A thread 4 codes of a row.
__global__ void __launch_bounds__(kPackThreads)
    unprepack_kernel(uint8_t* dst, const uint32_t* src, int64_t n, int64_t k, int64_t k_tiles) {
  const int64_t i = int64_t{blockIdx.x} * kPackThreads + threadIdx.x;
  if (i >= n * k / 4) return;
  const int64_t row = i / (k / 4), c = i % (k / 4) * 4;
  const int column = static_cast<int>(c % kTileColumns), r = static_cast<int>(row % kTileRows);
  const int lane = r % 8 * 4 + column % 16 / 4, word = column % kStepColumns / 16 * 2 + r / 8;
  const int64_t tile = row / kTileRows * k_tiles + c / kTileColumns;
  const uint32_t bytes = src[(tile * kWarp + lane) * 4 + word] >> (column / kStepColumns * 4);
  const uint32_t pair = gather(bytes & 0x0f0f0f0fu);
  dst[i * 2] = static_cast<uint8_t>(pair);
  dst[i * 2 + 1] = static_cast<uint8_t>(pair >> 8);
}

// ---- Dispatch -----------------------------------------------------------------------------------

/// A kernel, and the most tokens and output channels that it is picked for.
struct Choice {
  int64_t tokens, channels;
  int64_t (*shared_bytes)(const LinearInt4Args&);
  void (*launch)(const LinearInt4Args&, Stream);
};
template <class C, bool kGrouped = false, bool kPacked = false>
constexpr Choice choice(int64_t tokens, int64_t channels) {
  return {tokens, channels, &mma_shared_bytes<C, kGrouped>, &launch_mma<C, kGrouped, kPacked>};
}
constexpr int64_t kAny = int64_t{1} << 62;

/// From so many tokens sm_90a's kernel for many tokens is the faster one.
constexpr int64_t kPrefillTokens = 17;
/// The same of its kernels for scales of groups: from the first with more channels than
/// kFewGroupedChannels, from the second with any.
constexpr int64_t kGroupedTokens = 9, kManyGroupedTokens = 17, kFewGroupedChannels = 4096;
/// And with fewer tokens, if all of them together have more groups: these fill kGroupedTiles'
/// shared memory.
constexpr int64_t kManyGroups = 1024;

// Measured on an H200 (benchmarks/bench_linear_int4.py). Few channels: small blocks, so that all
// processors have some. 6336 and 29568 are 48 and 224 channels for each of 132 processors: 6144 x
// 4096 and 28672 x 4096 take 4.4 and 14.7 us in a decode step, instead of 6.2 and 17.2.
constexpr Choice kPerChannel[] = {
    choice<MmaConfig<2, 1, 1, 8, 2, 4, 2>>(8, 4096),
    choice<MmaConfig<4, 1, 1, 16, 1, 4, 1>>(8, 5120),
    choice<MmaConfig<3, 1, 1, 16, 1, 4, 1>>(8, 6336),
    choice<MmaConfig<4, 1, 1, 16, 1, 4, 1>>(8, 8192),
    choice<MmaConfig<2, 1, 1, 8, 1, 4, 4>>(8, 16384),
    choice<MmaConfig<4, 1, 1, 4, 1, 4, 4>>(8, 28000),
    choice<MmaConfig<7, 1, 2, 4, 1, 4, 1>>(8, 29568),
    choice<MmaConfig<2, 1, 1, 8, 1, 4, 4>>(8, kAny),
    choice<MmaConfig<2, 2, 1, 8, 1, 4, 3>>(16, 4096),
    choice<MmaConfig<4, 2, 1, 8, 1, 4, 2>>(16, 8192),
    choice<MmaConfig<3, 2, 2, 4, 1, 4, 2>>(16, 12288),
    choice<MmaConfig<4, 2, 2, 4, 1, 4, 2>>(16, 20480),
    choice<MmaConfig<3, 2, 2, 4, 1, 4, 2>>(16, 24576),
    choice<MmaConfig<4, 2, 2, 4, 1, 4, 2>>(16, kAny),
    choice<MmaConfig<4, 4, 2, 4, 1, 4, 2>>(32, kAny),
    choice<MmaConfig<4, 8, 4, 1, 1, 4, 2>>(kAny, kAny),
};
// Groups of whole tiles, several warps along the columns: if shared memory holds all groups.
constexpr Choice kGroupedTiles[] = {
    choice<MmaConfig<2, 1, 1, 8, 1, 4, 3>, true>(8, 16384),
    choice<MmaConfig<2, 2, 1, 8, 1, 4, 2>, true>(16, 16384),
    choice<MmaConfig<2, 1, 1, 8, 1, 4, 3>, true>(16, 4096),
    choice<MmaConfig<1, 1, 1, 16, 1, 4, 2>, true>(16, 8192),
};
constexpr Choice kGrouped[] = {
    choice<MmaConfig<1, 1, 4, 1, 4, 4, 4>, true>(8, kAny),
    choice<MmaConfig<1, 2, 4, 1, 4, 4, 4>, true>(16, 16384),
    choice<MmaConfig<2, 2, 4, 1, 2, 4, 3>, true>(16, kAny),
    choice<MmaConfig<2, 8, 4, 1, 1, 4, 2>, true>(kAny, kAny),
};
// Packed activations: not measured, no such GPU was at hand.
constexpr Choice kPackedPerChannel[] = {
    choice<MmaConfig<2, 1, 1, 8, 2, 4, 2>, false, true>(8, kAny),
    choice<MmaConfig<4, 2, 1, 8, 1, 4, 2>, false, true>(16, kAny),
    choice<MmaConfig<4, 8, 4, 1, 1, 4, 2>, false, true>(kAny, kAny),
};
constexpr Choice kPackedGrouped[] = {
    choice<MmaConfig<1, 1, 4, 1, 4, 4, 4>, true, true>(8, kAny),
    choice<MmaConfig<2, 8, 4, 1, 1, 4, 2>, true, true>(kAny, kAny),
};

/// Runs the table's first kernel that fits; false if none does.
template <int kCount>
bool run_first(const Choice (&table)[kCount], const LinearInt4Args& args, Stream stream) {
  const int64_t limit = device_limits().block_shared_bytes;
  for (const Choice& c : table) {
    if (args.m <= c.tokens && args.n <= c.channels && c.shared_bytes(args) <= limit) {
      c.launch(args, stream);
      return true;
    }
  }
  return false;
}

bool run(const LinearInt4Args& args, Stream stream) {
  const bool grouped = args.groups > 1;
  if (args.x_packed) {
    return grouped ? run_first(kPackedGrouped, args, stream)
                   : run_first(kPackedPerChannel, args, stream);
  }
  if (!grouped) return run_first(kPerChannel, args, stream);
  const bool fits = linear_int4_grouped_fits(args);
  const bool tiles = args.k / args.groups % kTileColumns == 0 && args.m < kManyGroupedTokens;
  const bool many = args.m * args.groups > kManyGroups ||
                    (args.m >= kGroupedTokens && args.n > kFewGroupedChannels);
  if (tiles && !(fits && many) && run_first(kGroupedTiles, args, stream)) return true;
  if (fits && (many || args.m >= kGroupedTokens)) {
    linear_int4_grouped(args, stream);
    return true;
  }
  return run_first(kGrouped, args, stream);
}

}  // namespace

void prepack_int4(uint8_t* dst, const uint8_t* src, int64_t n, int64_t k, Stream stream) {
  const int64_t k_tiles = ceil_div(k, kTileColumns);
  const int64_t words = ceil_div(n, kTileRows) * k_tiles * kTileBytes / 4;
  launch(&prepack_kernel, ceil_div(words, kPackThreads), kPackThreads, 0, stream,
         reinterpret_cast<uint32_t*>(dst), src, n, k, k_tiles, words);
}

void unprepack_int4(uint8_t* dst, const uint8_t* src, int64_t n, int64_t k, Stream stream) {
  launch(&unprepack_kernel, ceil_div(n * k / 4, kPackThreads), kPackThreads, 0, stream, dst,
         reinterpret_cast<const uint32_t*>(src), n, k, ceil_div(k, kTileColumns));
}

bool linear_int4_reads_packed() { return compute_major() == 8; }

void linear_int4(const LinearInt4Args& args, Stream stream) {
  QUAROT_ASSERT(args.k > 0 && args.k % kLinearInt4KMultiple == 0 && args.k <= kLinearInt4KMax,
                "linear_int4: k must be a multiple of 32, at most 131040");
  QUAROT_ASSERT(args.groups > 0 && args.k % args.groups == 0 &&
                    args.k / args.groups % kLinearInt4GroupMultiple == 0,
                "linear_int4: groups must divide k into multiples of 32 columns");
  QUAROT_ASSERT(!args.x_packed || args.groups == 1 || args.k / args.groups % kTileColumns == 0,
                "linear_int4: with packed x, groups must be multiples of 64 columns");
  QUAROT_ASSERT(args.x_zero == nullptr || args.w_sum != nullptr, "linear_int4: x_zero needs w_sum");
  if (args.m == 0) return;
  if (!args.x_packed && args.m >= kPrefillTokens && linear_int4_prefill_fits(args)) {
    return linear_int4_prefill(args, stream);
  }
  QUAROT_ASSERT(run(args, stream), "linear_int4: no kernel fits this device's shared memory");
}

}  // namespace quarot::cuda
