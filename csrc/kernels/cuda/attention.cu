// attention on CUDA for few queries a sequence (decode). Maths: kernels/attention.h; layouts:
// kernels/kv_cache.h; a warp's work: device/attention_step.cuh.
//
// attention_kernel: a block is some consecutive keys of one (sequence, cache head), its warps take
// them in turn; at the end it adds up its warps' results. All query rows of a block share what it
// reads; more rows are more blocks.
//
// Splits: the host fixes the number of blocks from shapes alone; each reads all lengths and finds
// its part of the keys, so that ragged sequences share the blocks by their length and a launch can
// be captured in a graph. combine_kernel adds a row's partial results in a fixed order.
//
// Bound: memory, the codes of the keys and values seen.
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels/attention.h"
#include "kernels/cuda/device/attention_step.cuh"
#include "kernels/cuda/device/launch.cuh"

namespace quarot::cuda {
namespace {

using namespace decode;

constexpr int kCombineWarps = 8;

// ---- Division of the work -----------------------------------------------------------------------

/// How a call is divided, from its shapes alone.
struct Division {
  int splits;  // units of one cache head and row block
  int row_blocks;
};

/// Enough units to fill the SMs, if all sequences are equally long: the fewest that leave few idle
/// in the last wave.
template <class C>
Division divide(const AttentionArgs& a) {
  constexpr double kEnough = 0.9;
  constexpr int kMostWaves = 4;
  const int64_t row_blocks = ceil_div(a.seq * (a.heads / a.kv_heads), int64_t{C::kRows});
  const int64_t pairs = a.batch * a.kv_heads * row_blocks;
  const int64_t slots = int64_t{device_limits().processors} * C::kBlocks;
  const int64_t longest = ceil_div(a.capacity, int64_t{C::kBlockKeys});
  int64_t parts = 1;
  double best = 0;
  for (int64_t n = 1; n <= longest && (n == 1 || n * pairs <= kMostWaves * slots); ++n) {
    const double used =
        static_cast<double>(n * pairs) / static_cast<double>(ceil_div(n * pairs, slots) * slots);
    if (used > best) {
      best = used;
      parts = n;
    }
    if (best >= kEnough) break;
  }
  // Rounding a sequence's parts up costs a unit each (for_units).
  return {static_cast<int>(a.batch * (parts + (a.batch > 1 ? 1 : 0))),
          static_cast<int>(row_blocks)};
}

/// A unit's sequence and its part there; sequence -1: nothing to do.
struct Unit {
  int sequence, split, splits;
};

/// Walks over the sequences, a warp together: sequence b gets parts(b) units, at first(b) of those
/// of its head. find(lane's b, first, parts) is called for 32 sequences at a time.
template <class Find>
__device__ __forceinline__ void for_units(const AttentionArgs& a, const Division& division,
                                          int block_keys, const Find& find) {
  const int lane = threadIdx.x % kWarp, batch = static_cast<int>(a.batch);
  const auto blocks = [&](int b) {
    if (b >= batch) return 0;
    const int length = min(max(a.lengths[b], 0), static_cast<int>(a.capacity));
    return (length + block_keys - 1) / block_keys;
  };
  int total = 0;
  for (int b = lane; b - lane < batch; b += kWarp) total += blocks(b);
  total = __reduce_add_sync(kAllLanes, total);
  // Rounding up costs less than a unit a sequence.
  const int shares = batch > 1 ? division.splits - batch : division.splits;
  const int each = max((total + shares - 1) / shares, 1);
  int first = 0;
  for (int b = lane; b - lane < batch; b += kWarp) {
    const int parts = (blocks(b) + each - 1) / each;
    int end = parts;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int before = __shfl_up_sync(kAllLanes, end, step);
      if (lane >= step) end += before;
    }
    find(b, first + end - parts, parts);
    first += __shfl_sync(kAllLanes, end, kWarp - 1);
  }
}

__device__ __forceinline__ Unit unit_of(const AttentionArgs& a, const Division& division,
                                        int block_keys, int unit) {
  Unit found{-1, 0, 0};
  for_units(a, division, block_keys, [&](int b, int first, int parts) {
    const bool mine = unit >= first && unit < first + parts;
    const unsigned who = __ballot_sync(kAllLanes, mine);
    if (who == 0) return;
    const int lane = __ffs(static_cast<int>(who)) - 1;
    found = {__shfl_sync(kAllLanes, b, lane), unit - __shfl_sync(kAllLanes, first, lane),
             __shfl_sync(kAllLanes, parts, lane)};
  });
  return found;
}

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

/// Maximum and sum of a partial result.
struct Stats {
  float maximum, sum;
};

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

/// Grid: row_blocks * kv_heads * splits.
template <class C>
__global__ void __launch_bounds__(kThreads, C::kBlocks)
    attention_kernel(const __grid_constant__ AttentionArgs a, Division division) {
  wait_for_previous_grid();
  start_next_grid();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int index = static_cast<int>(blockIdx.x) / division.splits;  // of head and row block
  const int kv_heads = static_cast<int>(a.kv_heads);
  const Unit unit =
      unit_of(a, division, C::kBlockKeys, static_cast<int>(blockIdx.x) - index * division.splits);
  if (unit.sequence < 0) return;
  const int group = static_cast<int>(a.heads) / kv_heads, block = index / kv_heads;
  const RowsOfBlock rows{unit.sequence, index - block * kv_heads, block * C::kRows, group,
                         min(static_cast<int>(a.seq) * group - block * C::kRows, C::kRows)};

  const int length = min(max(a.lengths[rows.b], 0), static_cast<int>(a.capacity));
  const int blocks = (length + C::kBlockKeys - 1) / C::kBlockKeys;
  const auto boundary = [&](int split) {
    return static_cast<int>(static_cast<unsigned>(blocks * split) /
                            static_cast<unsigned>(unit.splits)) *
           C::kBlockKeys;
  };
  const int begin = boundary(unit.split), end = min(boundary(unit.split + 1), length);
  const int64_t slots = (rows.b * kv_heads + rows.head) * a.capacity;
  unsigned char* const ring = dynamic_shared() + warp * C::kWarpBytes;
  int key = begin + warp * C::kKeys;
  Copier<C> copier(a, ring, slots, key, end);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copier.start();
  Queries<C> q;
  q.load(a, rows);
  Running<C> r;
  r.clear();
  const Places<C> places;
  // Keys below are seen by all rows.
  const int common =
      a.mask == nullptr ? min(length - static_cast<int>(a.seq) + rows.s(0) + 1, end) : 0;
  auto* params = reinterpret_cast<Param*>(ring + kStages * C::kStageBytes);
  for (int stage = 0; key < end; key += C::kBlockKeys) {
    cp_async_wait<kStages - 2>();
    __syncwarp();  // all lanes' copies are there, and all are done with the stage before
    copier.start();
    attend<C>(r, a, q, rows, places, ring + stage, params, key, length, key + C::kKeys <= common);
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
  const Partials partials = partials_of<C::kRows>(a, division);
#pragma unroll 4
  for (int i = threadIdx.x; i < rows.rows * C::kDim; i += kThreads) {
    const int row = i / C::kDim, dim = i % C::kDim;
    float maximum = kLowest, sum = 0.0f, total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, stats[w][row].maximum);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float factor = exp2_fast(stats[w][row].maximum - maximum);
      sum += stats[w][row].sum * factor;
      total += results[(w * C::kRows + row) * C::kOutStride + C::out_place(dim)] * factor;
    }
    if (unit.splits == 1) {
      store_out(a, rows.at(a, row) * C::kDim + dim, sum == 0.0f ? 0.0f : total / sum);
    } else {
      const int64_t at = int64_t{blockIdx.x} * C::kRows + row;
      partials.out[at * C::kDim + dim] = total;
      if (dim == 0) partials.stats[at] = {maximum, sum};
    }
  }
}

/// A block a row of out: adds its partial results, a warp every kCombineWarps-th, then the warps.
template <int kDim, int kRows>
__global__ void __launch_bounds__(kCombineWarps* kWarp)
    combine_kernel(const __grid_constant__ AttentionArgs a, Division division, int block_keys) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int heads = static_cast<int>(a.heads), kv_heads = static_cast<int>(a.kv_heads);
  const int group = heads / kv_heads;
  const int token = static_cast<int>(blockIdx.x) / heads;
  const int query_head = static_cast<int>(blockIdx.x) - token * heads;
  const int b = token / static_cast<int>(a.seq), s = token - b * static_cast<int>(a.seq);
  // Lengths are older than attention_kernel: no need to wait for it.
  int first = 0, parts = 0;
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
  constexpr int kAtOnce = 4;  // loads under way
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
  const Division division = divide<C>(a);
  launch_early(&attention_kernel<C>, int64_t{division.row_blocks} * a.kv_heads * division.splits,
               kThreads, C::kSharedBytes, stream, a, division);
  launch_early(&combine_kernel<C::kDim, C::kRows>, a.batch * a.seq * a.heads, kCombineWarps * kWarp,
               0, stream, a, division, C::kBlockKeys);
}

/// Calls body(Config) of the kernel for the given shape.
template <int kDim, class Body>
void with_config(int64_t rows, int bits, DType dtype, const Body& body) {
  const auto with_bits = [&](auto bits_constant) {
    constexpr int kBits = decltype(bits_constant)::value;
    if (dtype == DType::f32) return body(Config<kDim, kBits, 1, true>{});
    if (rows > kMmaColumns) return body(Config<kDim, kBits, 2, false>{});
    return body(Config<kDim, kBits, 1, false>{});
  };
  if (bits == 4) return with_bits(std::integral_constant<int, 4>{});
  with_bits(std::integral_constant<int, 8>{});
}

template <class Body>
void with_config(int64_t seq, int64_t heads, int64_t kv_heads, int64_t head_dim, int bits,
                 DType dtype, const Body& body) {
  const int64_t rows = seq * (heads / kv_heads);
  switch (head_dim) {
    case 64:
      return with_config<64>(rows, bits, dtype, body);
    case 96:
      return with_config<96>(rows, bits, dtype, body);
    case 128:
      return with_config<128>(rows, bits, dtype, body);
    case 256:
      return with_config<256>(rows, bits, dtype, body);
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
  with_config(a.seq, a.heads, a.kv_heads, a.head_dim, a.bits, a.dtype, [&](auto config) {
    using C = decltype(config);
    const Division d = divide<C>(a);
    floats = int64_t{d.row_blocks} * a.kv_heads * d.splits * C::kRows * (C::kDim + 2);
  });
  return floats;
}

void attention(const AttentionArgs& a, Stream stream) {
  with_config(a.seq, a.heads, a.kv_heads, a.head_dim, a.bits, a.dtype,
              [&](auto config) { launch_attention<decltype(config)>(a, stream); });
}

}  // namespace quarot::cuda
