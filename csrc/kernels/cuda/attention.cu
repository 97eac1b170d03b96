// attention on CUDA for few queries a sequence (decode). Maths: kernels/attention.h; layouts:
// kernels/kv_cache.h; a warp's work: device/attention_step.cuh.
//
// attention_kernel: a block is some consecutive keys of one (sequence, cache head), its warps take
// them in turn; at the end it adds up its warps' results. All query rows of a block share what it
// reads; more rows are more blocks.
//
// Splits (device/attention_plan.cuh): the host fixes the number of blocks from shapes alone; each
// reads all lengths and finds its part of the keys, so that ragged sequences share the blocks by
// their length. combine_kernel adds a row's partial results in a fixed order. One sequence that is
// not long takes a cluster a cache head instead: its blocks send each other their results, each
// adds up some dimensions, and there is no second kernel.
//
// Bound: memory, the codes of the keys and values seen.
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/device/attention_plan.cuh"
#include "kernels/cuda/device/attention_step.cuh"
#include "kernels/cuda/device/launch.cuh"

namespace quarot::cuda {
namespace {

using namespace decode;

constexpr int kCombineWarps = 8;

// ---- Device helpers -----------------------------------------------------------------------------

__device__ __forceinline__ void store_out(const AttentionArgs& a, int64_t i, float v) {
  switch (a.dtype) {
    case DType::f32:
      return store1<DType::f32>(a.out, i, v);
    case DType::f16:
      return store1<DType::f16>(a.out, i, v);
    case DType::bf16:
      return store1<DType::bf16>(a.out, i, v);
  }
}

/// A partial result's place: unit u of head h and row block k, row r.
struct Partials {
  float* out;    // [row_blocks, kv_heads, splits, rows, dim]
  Stats* stats;  // [row_blocks, kv_heads, splits, rows]
};
template <int kRows>
__device__ __forceinline__ Partials partials_of(const AttentionArgs& a, const Division& d) {
  const int64_t results = int64_t{d.row_blocks} * a.kv_heads * d.splits * kRows;
  return {a.workspace, reinterpret_cast<Stats*>(a.workspace + results * a.head_dim)};
}

// ---- Kernels ------------------------------------------------------------------------------------

/// Grid: row_blocks * kv_heads * splits * cluster.
template <class C>
__global__ void __launch_bounds__(kThreads, C::kBlocks)
    attention_kernel(const __grid_constant__ AttentionArgs a,
                     const __grid_constant__ Division division) {
  wait_for_previous_grid();
  start_next_grid();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int cluster = division.cluster;
  const int result = static_cast<int>(blockIdx.x) / cluster;
  const int rank = static_cast<int>(blockIdx.x) - result * cluster;
  const int index = result / division.splits;  // of head and row block
  const int kv_heads = static_cast<int>(a.kv_heads);
  Unit unit{0, result - index * division.splits, division.splits};
  if (a.batch > 1) {
    unit = unit_of(a, division, C::kBlockKeys, unit.split);
    if (unit.sequence < 0) return;
  }
  const int group = static_cast<int>(a.heads) / kv_heads, block = index / kv_heads;
  const RowsOfBlock rows{unit.sequence, index - block * kv_heads, block * C::kRows, group,
                         min(static_cast<int>(a.seq) * group - block * C::kRows, C::kRows)};

#if __CUDA_ARCH__ >= 900
  __shared__ uint64_t sent;  // barrier: all blocks' results are here
  if (cluster > 1) {
    if (threadIdx.x == 0) {
      mbarrier_init(shared_address(&sent), 1);
      mbarrier_init_fence();
      mbarrier_expect(shared_address(&sent),
                      rows.rows * static_cast<int>(C::kDim * 4 + cluster * sizeof(Stats)));
    }
    cluster_arrive_relaxed();  // whoever sends to this block knows that it runs
  }
#endif
  Queries<C> q;
  q.load(a, rows);

  const Span span = span_of(a, unit.sequence, C::kBlockKeys);
  const auto boundary = [&](int split) {
    return (span.first + static_cast<int>(static_cast<unsigned>(span.blocks * split) /
                                          static_cast<unsigned>(unit.splits * cluster))) *
           C::kBlockKeys;
  };
  const int split = unit.split * cluster + rank;
  const int begin = boundary(split), end = min(boundary(split + 1), span.length);
  unsigned char* const ring = dynamic_shared() + warp * C::kWarpBytes;
  int key = begin + warp * C::kKeys;
  Copier<C> copier(a, ring, unit.sequence, rows.head, key, end);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copier.start();
  q.convert(a);
  Running<C> r;
  r.clear();
  const Places<C> places;
  // Keys in [oldest, common) are seen by all rows.
  const int new_key = span.length - static_cast<int>(a.seq);  // of the first query
  const int common = a.mask == nullptr ? min(new_key + rows.s(0) + 1, end) : 0;
  const int oldest = new_key + rows.s(rows.rows - 1) + 1 - static_cast<int>(a.window);
  auto* params = reinterpret_cast<Param*>(ring + kStages * C::kStageBytes);
  for (int stage = 0; key < end; key += C::kBlockKeys) {
    cp_async_wait<kStages - 2>();
    __syncwarp();  // all lanes' copies are there, and all are done with the stage before
    copier.start();
    attend<C>(r, a, q, rows, places, ring + stage, params, key, span.length,
              key >= oldest && key + C::kKeys <= common);
    stage = stage + C::kStageBytes == kStages * C::kStageBytes ? 0 : stage + C::kStageBytes;
  }
  __syncthreads();  // the ring becomes the block's [warp][row][dim]

  auto* results = reinterpret_cast<float*>(dynamic_shared());
  __shared__ Stats stats[kWarps][C::kRows];
  const float value_unit = inverse_of_power(r.value_unit);
#pragma unroll
  for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int row = n * kMmaColumns + 2 * t + c;
      const float zeros = column_sum(r.zeros[n][c]), sum = column_sum(r.sum[n][c]);
      if (g == 0) stats[warp][row] = {r.maximum[n][c], sum};
#pragma unroll
      for (int i = 0; i < C::kDimTiles * 2; ++i) {
        const float unit_of_code = C::kBits == 4 && i % 2 == 1 ? C::kCodeUnit / 16 : C::kCodeUnit;
        const int place = C::out_place(dim_of<C>(i / 2, i % 2, g));
        results[(warp * C::kRows + row) * C::kOutStride + place] =
            fmaf(r.out[n][i / 2][i % 2 * 2 + c], unit_of_code, -zeros) * value_unit;
      }
    }
  }
  __syncthreads();
  // The cluster's blocks share the dimensions: rank, rank + cluster, ... are this one's.
  auto* received = reinterpret_cast<float*>(dynamic_shared() + C::kRingBytes);
  auto* their_stats = reinterpret_cast<Stats*>(received + C::kRows * C::kDim);
  const int share = C::kDim / cluster;
#if __CUDA_ARCH__ >= 900
  if (cluster > 1) cluster_wait();
#endif
  for (int row = warp; row < rows.rows; row += kWarps) {
    float maximum = kLowest, sum = 0.0f, total[C::kDim / kWarp] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, stats[w][row].maximum);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float factor = exp2_fast(stats[w][row].maximum - maximum);
      sum += stats[w][row].sum * factor;
#pragma unroll
      for (int i = 0; i < C::kDim / kWarp; ++i) {
        total[i] +=
            factor * results[(w * C::kRows + row) * C::kOutStride + C::out_place(i * kWarp + lane)];
      }
    }
    float* to = received + (rank * C::kRows + row) * share + lane / cluster;
    Stats* at = their_stats + rank * C::kRows + row;
    if (cluster == 1) {
#pragma unroll
      for (int i = 0; i < C::kDim / kWarp; ++i) to[i * kWarp] = total[i];
      if (lane == 0) *at = {maximum, sum};
      continue;
    }
#if __CUDA_ARCH__ >= 900
    const int owner = lane % cluster;
    const auto address_there = [&](const void* here) {
      return cluster_address(shared_address(here), owner);
    };
    const uint32_t barrier = address_there(&sent), there = address_there(to);
#pragma unroll
    for (int i = 0; i < C::kDim / kWarp; ++i)
      store_cluster_async(there + i * (kWarp / cluster) * 4, barrier, total[i]);
    if (lane < cluster) {
      store_cluster_async(address_there(&at->maximum), barrier, maximum);
      store_cluster_async(address_there(&at->sum), barrier, sum);
    }
#endif
  }
  __syncthreads();
#if __CUDA_ARCH__ >= 900
  while (cluster > 1 && !mbarrier_try_wait(shared_address(&sent), 0)) {
  }
#endif

  const Partials partials = partials_of<C::kRows>(a, division);
  for (int row = warp; row < rows.rows; row += kWarps) {
    for (int column = lane; column < share; column += kWarp) {
      float maximum = kLowest, sum = 0.0f, total = 0.0f;
#pragma unroll 8
      for (int k = 0; k < cluster; ++k)
        maximum = fmaxf(maximum, their_stats[k * C::kRows + row].maximum);
#pragma unroll 8
      for (int k = 0; k < cluster; ++k) {
        const float factor = exp2_fast(their_stats[k * C::kRows + row].maximum - maximum);
        sum += their_stats[k * C::kRows + row].sum * factor;
        total += received[(k * C::kRows + row) * share + column] * factor;
      }
      const int dim = column * cluster + rank;
      if (unit.splits == 1) {
        store_out(a, rows.at(a, row) * C::kDim + dim, sum == 0.0f ? 0.0f : total / sum);
        continue;
      }
      const int64_t at = int64_t{result} * C::kRows + row;
      partials.out[at * C::kDim + dim] = total;
      if (dim == 0) partials.stats[at] = {maximum, sum};
    }
  }
}

/// A block a row of out: adds its partial results, a warp every kCombineWarps-th, then the warps.
template <int kDim, int kRows>
__global__ void __launch_bounds__(kCombineWarps* kWarp)
    combine_kernel(const __grid_constant__ AttentionArgs a,
                   const __grid_constant__ Division division, int block_keys) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int heads = static_cast<int>(a.heads), kv_heads = static_cast<int>(a.kv_heads);
  const int group = heads / kv_heads;
  const int token = static_cast<int>(blockIdx.x) / heads;
  const int query_head = static_cast<int>(blockIdx.x) - token * heads;
  const int b = token / static_cast<int>(a.seq), s = token - b * static_cast<int>(a.seq);
  // Lengths are older than attention_kernel: no need to wait for it.
  int first = 0, parts = division.splits;
  if (a.batch > 1)
    for_units(a, division, block_keys, [&](int sequence, int begin, int count) {
      if (__ballot_sync(kAllLanes, sequence == b) == 0) return;
      first = __shfl_sync(kAllLanes, begin, b % kWarp);
      parts = __shfl_sync(kAllLanes, count, b % kWarp);
    });
  wait_for_previous_grid();
  if (parts == 1) return;  // written by attention_kernel

  const int row = s * group + query_head % group;
  const int64_t index = (int64_t{row / kRows} * kv_heads + query_head / group) * division.splits;
  const Partials partials = partials_of<kRows>(a, division);
  constexpr int kLaneDims = kDim / kWarp;
  constexpr int kAtOnce = 8;  // loads under way
  float total[kLaneDims] = {};
  float sum = 0.0f, maximum = kLowest;
  for (int begin = warp; begin < parts; begin += kAtOnce * kCombineWarps) {
    Stats stats[kAtOnce];
    float out[kAtOnce][kLaneDims];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int part = begin + k * kCombineWarps;
      stats[k] = {kLowest, 0.0f};
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) out[k][i] = 0.0f;
      if (part >= parts) continue;
      const int64_t at = (index + first + part) * kRows + row % kRows;
      stats[k] = partials.stats[at];
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) out[k][i] = partials.out[at * kDim + i * kWarp + lane];
    }
    float now = maximum;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) now = fmaxf(now, stats[k].maximum);
    const float old = exp2_fast(maximum - now);
    maximum = now;
    sum *= old;
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) total[i] *= old;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const float factor = exp2_fast(stats[k].maximum - now);
      sum += stats[k].sum * factor;
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) total[i] += out[k][i] * factor;
    }
  }
  __shared__ float totals[kCombineWarps][kDim];
  __shared__ Stats of_warp[kCombineWarps];
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) totals[warp][i * kWarp + lane] = total[i];
  if (lane == 0) of_warp[warp] = {maximum, sum};
  __syncthreads();
  const int dim = static_cast<int>(threadIdx.x);
  if (dim >= kDim) return;
  float value = 0.0f, all = 0.0f;
#pragma unroll
  for (int w = 0; w < kCombineWarps; ++w) maximum = fmaxf(maximum, of_warp[w].maximum);
#pragma unroll
  for (int w = 0; w < kCombineWarps; ++w) {
    const float factor = exp2_fast(of_warp[w].maximum - maximum);
    value += totals[w][dim] * factor;
    all += of_warp[w].sum * factor;
  }
  store_out(a, int64_t{blockIdx.x} * kDim + dim, all == 0.0f ? 0.0f : value / all);
}

// ---- Launch -------------------------------------------------------------------------------------

template <class C>
void launch_attention(const AttentionArgs& a, Stream stream) {
  const Division d = divide<C>(a);
  launch_clusters(&attention_kernel<C>, int64_t{d.row_blocks} * a.kv_heads * d.splits * d.cluster,
                  d.cluster, kThreads, shared_bytes<C>(d), stream, a, d);
  if (a.batch == 1 && d.splits == 1) return;
  launch_early(&combine_kernel<C::kDim, C::kRows>, a.batch * a.seq * a.heads, kCombineWarps * kWarp,
               0, stream, a, d, C::kBlockKeys);
}

/// Calls body(Config) of the kernel for the given shape.
template <int kDim, int kBits, bool kPaged, class Body>
void with_config(const AttentionArgs& a, const Body& body) {
  if (a.dtype == DType::f32) return body(Config<kDim, kBits, 1, true, kPaged>{});
  if (a.seq * (a.heads / a.kv_heads) > kMmaColumns)
    return body(Config<kDim, kBits, 2, false, kPaged>{});
  return body(Config<kDim, kBits, 1, false, kPaged>{});
}
template <int kDim, class Body>
void with_config(const AttentionArgs& a, const Body& body) {
  const bool paged = a.pages.table != nullptr;
  if (a.bits == 4)
    return paged ? with_config<kDim, 4, true>(a, body) : with_config<kDim, 4, false>(a, body);
  return paged ? with_config<kDim, 8, true>(a, body) : with_config<kDim, 8, false>(a, body);
}
template <class Body>
void with_config(const AttentionArgs& a, const Body& body) {
  switch (a.head_dim) {
    case 64:
      return with_config<64>(a, body);
    case 96:
      return with_config<96>(a, body);
    case 128:
      return with_config<128>(a, body);
    case 256:
      return with_config<256>(a, body);
    default:
      QUAROT_ASSERT(false, "attention: head_dim must be 64, 96, 128 or 256");
  }
}

}  // namespace

bool attention_has(int64_t head_dim) {
  return head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256;
}

int64_t attention_workspace(const AttentionArgs& a) {
  int64_t floats = 0;
  with_config(a, [&](auto config) {
    using C = decltype(config);
    const Division d = divide<C>(a);
    floats = int64_t{d.row_blocks} * a.kv_heads * d.splits * C::kRows * (C::kDim + 2);
  });
  return floats;
}

void attention(const AttentionArgs& a, Stream stream) {
  with_config(a, [&](auto config) { launch_attention<decltype(config)>(a, stream); });
}

}  // namespace quarot::cuda
