// attention on CUDA for few queries a sequence (decode). Maths: kernels/attention.h; layouts:
// kernels/kv_cache.h; a warp's work: device/attention_step.cuh.
//
// attention_kernel: a block is some consecutive keys of one (sequence, cache head), its warps take
// them in turn; at the end it adds up its warps' results. All query rows of a block share what it
// reads; more rows are more blocks.
//
// Splits (device/attention_plan.cuh): the host fixes the number of blocks from shapes alone; each
// reads all lengths and finds its part of the keys, so that ragged sequences share the blocks by
// their length. combine_kernel adds a row's partial results in a fixed order.
//
// One sequence whose text is not long takes a cluster a cache head instead: its blocks send each
// other their results, each adds up some dimensions, and there is no second kernel. That kernel is
// an instance of its own: with cluster instructions in it, though not run, batches took 14 %
// longer. Where only the device knows whether the text is long, the kernel for splits leaves a
// short one to the clusters, which combine its results else.
//
// Bound: memory, the codes of the keys and values seen.
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/device/attention_config.cuh"
#include "kernels/cuda/device/attention_copy.cuh"
#include "kernels/cuda/device/attention_parts.cuh"
#include "kernels/cuda/device/attention_plan.cuh"
#include "kernels/cuda/device/attention_queries.cuh"
#include "kernels/cuda/device/attention_step.cuh"
#include "kernels/cuda/device/launch.cuh"

namespace quarot::cuda {
namespace {

using namespace decode;

constexpr int kCombineWarps = 8;

// ---- Device helpers -----------------------------------------------------------------------------

/// out[i, i + 4) = v / sum, or 0 if that is 0: the query sees nothing.
__device__ __forceinline__ void store_out(const AttentionArgs& a, int64_t i, const float4& v,
                                          float sum) {
  if (a.dtype == DType::f32) {
    const float by = sum == 0.0f ? INFINITY : sum;
    static_cast<float4*>(a.out)[i / 4] = {v.x / by, v.y / by, v.z / by, v.w / by};
    return;
  }
  const float factor = sum == 0.0f ? 0.0f : reciprocal_fast(sum);
  const bool half = a.dtype == DType::f16;
  const auto pack = [&](float x, float y) {
    return half ? pack_f16x2(x * factor, y * factor) : pack_bf16x2(x * factor, y * factor);
  };
  static_cast<uint2*>(a.out)[i / 4] = {pack(v.x, v.y), pack(v.z, v.w)};
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

/// Adds the partial results of a row of out, `parts` from the head's first-th on; a block together,
/// a warp every kCount-th of them.
template <int kDim, int kRows, int kCount>
__device__ __forceinline__ void combine(const AttentionArgs& a, const Division& division, int b,
                                        int s, int query_head, int first, int parts) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int kv_heads = static_cast<int>(a.kv_heads), group = static_cast<int>(a.heads) / kv_heads;
  const int row = s * group + query_head % group;
  const int head = row / kRows * kv_heads + query_head / group;  // of all row blocks' heads
  const int64_t index = int64_t{head} * division.splits + first;
  const Partials partials = partials_of<kRows>(a, division);
  constexpr int kLaneDims = kDim / kWarp;
  constexpr int kAtOnce = 8;  // loads under way
  float total[kLaneDims] = {};
  float sum = 0.0f, maximum = kLowest;
  for (int begin = warp; begin < parts; begin += kAtOnce * kCount) {
    Stats stats[kAtOnce];
    float out[kAtOnce][kLaneDims];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int part = begin + k * kCount;
      stats[k] = {kLowest, 0.0f};
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) out[k][i] = 0.0f;
      if (part >= parts) continue;
      const int64_t at = (index + part) * kRows + row % kRows;
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
  __shared__ float totals[kCount][kDim];
  __shared__ Stats of_warp[kCount];
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) totals[warp][i * kWarp + lane] = total[i];
  if (lane == 0) of_warp[warp] = {maximum, sum};
  __syncthreads();
  float all = 0.0f, factor[kCount];
#pragma unroll
  for (int w = 0; w < kCount; ++w) maximum = fmaxf(maximum, of_warp[w].maximum);
#pragma unroll
  for (int w = 0; w < kCount; ++w) {
    factor[w] = exp2_fast(of_warp[w].maximum - maximum);
    all += of_warp[w].sum * factor[w];
  }
  const int64_t to = ((int64_t{b} * a.seq + s) * a.heads + query_head) * kDim;
  for (int dim = static_cast<int>(threadIdx.x); dim < kDim; dim += kCount * kWarp) {
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < kCount; ++w) value += totals[w][dim] * factor[w];
    store1(a.dtype, a.out, to + dim, all == 0.0f ? 0.0f : value / all);
  }
}

// ---- Kernels ------------------------------------------------------------------------------------

/// Grid: row_blocks * kv_heads * splits; or in clusters, row_blocks * kv_heads * kCluster.
template <class C>
__global__ void __launch_bounds__(kThreads, C::kBlocks)
    attention_kernel(const __grid_constant__ AttentionArgs a,
                     const __grid_constant__ Division division) {
  const int warp = threadIdx.x / kWarp;
  const int result = static_cast<int>(blockIdx.x) / C::kCluster;
  const int rank = static_cast<int>(blockIdx.x) % C::kCluster;
  const int splits = C::kCluster == 1 ? division.splits : 1;
  const int index = result / splits;  // of head and row block
  const int kv_heads = static_cast<int>(a.kv_heads);
  const int group = static_cast<int>(a.heads) / kv_heads, block = index / kv_heads;
  RowsOfBlock rows{0, index - block * kv_heads, block * C::kRows, group,
                   min(static_cast<int>(a.seq) * group - block * C::kRows, C::kRows)};
  Unit unit{0, result - index * splits, splits};
  unsigned char* const ring = dynamic_shared() + warp * C::kWarpBytes;
  Parts<C> parts(rank);
  parts.open();

  if constexpr (C::kCluster == 1) {
    wait_for_previous_grid();
    start_next_grid();
    if (a.batch > 1) {
      unit = unit_of(a, division, C::kBlockKeys, unit.split);
      if (unit.sequence < 0) return;
      rows.b = unit.sequence;
    } else if (division.clusters && is_for_cluster(a, a.lengths[0])) {
      return;  // the kernel after this one attends
    }
  }
  Copier<C> copier(a, ring, unit.sequence, rows.head);
  const int* const length_at = a.lengths + unit.sequence;
  const int length = __ldcg(length_at);
  Keys keys = keys_of<C>(a, length, unit, rank);
  if constexpr (C::kCluster > 1) {  // all is made ready for a length that may be out of date
    prefetch<C>(a, rows, keys);
    wait_for_previous_grid();
    start_next_grid();
  }
  Queries<C> q;
  q.load(a, rows);
  const auto start = [&] {
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i)
      copier.start(keys.begin + warp * C::kKeys + i * C::kBlockKeys, keys.end, i * C::kStageBytes);
  };
  start();
  const int now = C::kCluster > 1 ? __ldcg(length_at) : length;
  q.convert(a);
  if (C::kCluster > 1 && !C::kShort && division.splits > 1 && !is_for_cluster(a, now)) {
    cp_async_wait<0>();
    const int seq = static_cast<int>(a.seq), heads = static_cast<int>(a.heads);
    for (int row = static_cast<int>(blockIdx.x); row < seq * heads; row += gridDim.x) {
      combine<C::kDim, C::kRows, kWarps>(a, division, 0, row / heads, row % heads, 0,
                                         division.splits);
      __syncthreads();
    }
    return;
  }
  if (now != length) {  // rare
    cp_async_wait<0>();
    __syncwarp();
    keys = keys_of<C>(a, now, unit, rank);
    start();
  }
  int key = keys.begin + warp * C::kKeys;
  Running<C> r;
  r.clear();
  const Places<C> places;
  auto* params = reinterpret_cast<Param*>(ring + kStages * C::kStageBytes);
  constexpr int kLastStage = (kStages - 1) * C::kStageBytes;
  for (int stage = 0; key < keys.end; key += C::kBlockKeys) {
    cp_async_wait<kStages - 2>();
    __syncwarp();  // all lanes' copies are there, and all are done with the stage before
    copier.start(key + (kStages - 1) * C::kBlockKeys, keys.end,
                 stage == 0 ? kLastStage : stage - C::kStageBytes);
    // By the first query and the last one of the sequence.
    const bool all_seen = a.mask == nullptr &&
                          key + C::kKeys <= keys.length - static_cast<int>(a.seq) + 1 &&
                          key >= keys.length - static_cast<int>(a.window);
    attend<C>(r, a, q, rows, places, ring + stage, params, key, keys.length, all_seen);
    stage = stage == kLastStage ? 0 : stage + C::kStageBytes;
  }

  parts.take(r, rows.rows);
  const Partials partials = partials_of<C::kRows>(a, division);
  for (int row = warp; row < rows.rows; row += kWarps) {
    parts.add(row, [&](int dim, const float4& total, const Stats& stats) {
      if (unit.splits == 1) return store_out(a, rows.at(a, row) * C::kDim + dim, total, stats.sum);
      const int64_t to = int64_t{result} * C::kRows + row;
      *reinterpret_cast<float4*>(partials.out + to * C::kDim + dim) = total;
      if (dim == 0) partials.stats[to] = stats;
    });
  }
}

/// Grid: rows of out.
template <int kDim, int kRows>
__global__ void __launch_bounds__(kCombineWarps* kWarp)
    combine_kernel(const __grid_constant__ AttentionArgs a,
                   const __grid_constant__ Division division, int block_keys) {
  const int heads = static_cast<int>(a.heads), seq = static_cast<int>(a.seq);
  const int token = static_cast<int>(blockIdx.x) / heads, b = token / seq;
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

  combine<kDim, kRows, kCombineWarps>(a, division, b, token - b * seq,
                                      static_cast<int>(blockIdx.x) - token * heads, first, parts);
}

// ---- Launch -------------------------------------------------------------------------------------

template <class C>
void launch_attention(const AttentionArgs& a, Stream stream) {
  const Division d = divide<C>(a);
  const int64_t units = int64_t{d.row_blocks} * a.kv_heads;
  if (!d.clusters || d.splits > 1)
    launch_early(&attention_kernel<C>, units * d.splits, kThreads, kSharedBytes<C>, stream, a, d);
  if constexpr (C::kHasClusters) {
    const auto launch = [&](auto config) {
      using Clustered = decltype(config);
      launch_clusters(&attention_kernel<Clustered>, units * kMostBlocks, kMostBlocks, kThreads,
                      kSharedBytes<Clustered>, stream, a, d);
    };
    if (d.clusters) {
      if (a.capacity <= kShortKeys) return launch(typename C::Short{});
      return launch(typename C::Clustered{});
    }
  }
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
