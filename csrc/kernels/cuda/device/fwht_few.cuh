// The transform of fwht.cuh for few rows, where latency counts: a row a cluster of blocks (sm_90).
//
// Maths as there: X [order][segment]. A block takes `width` neighbouring columns of X: their
// butterflies in fp32, a thread 8 columns, the rest by shuffles; then F^T by tensor cores, as three
// bf16 summands of each fp32 number, which are exact. What is left are the bits of the segment that
// number the blocks: the blocks share the rows of F^T X, all send each its own, and it finishes
// them.
//
// Layout. A block's shared memory: signs of F as operand A, planes [3][order][width] of bf16, and
// what it is sent, [block][rows][width] of fp32.
//
// Bound: latency, of instructions too, which nobody has fetched lately: on one multiprocessor
// fwht_kernel takes 7.5 us for a gated row of 14336, and 11 or more when its code has left the
// caches; this 3.4 and 4.6. Whatever does not depend on the rows is done before the kernels before
// this one are waited for, the reading of F too: it is a constant, no kernel that starts others
// early writes it. Blocks wait once for each other, before they send (the receiver must have
// begun), then for data alone: asynchronous stores count on the receiver's barrier.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/device/fwht_sinks.cuh"

namespace quarot::cuda {

constexpr int kFewBlocks = 8;  // of a cluster, the most that every device can place
constexpr int kFewBlockBits = 3;
constexpr int kFewPlanes = 3;
constexpr int kFewThreads = 512;
constexpr int kFewDepth = 2 * kMmaDepth;  // rows of X in a step of the product
/// Where rows are powers of two the other kernels are as fast for shorter ones, and for more than
/// kFewRows of 16-bit elements or of the least length.
constexpr int kFewRows = 4, kFewLeast = 8192;

struct FewPlan : FwhtPlan {  // whose bands are of 16 rows of F^T here
  int width, width_bits;     // columns of a block
  int tasks;                 // of warps: a band times 8 columns
  int block_rows;            // rows of F^T X that a block finishes
  int finishing_warps;       // that have some of them
  FastDiv by_block_rows;
};

/// What a thread finishes: pairs of neighbouring columns, `width` apart.
struct FewResult {
  float v[kFewBlocks][2];
  int64_t first;  // element of all rows
  bool some;
};

/// In every block: barriers of what it is sent, and the ranges of all of the cluster's warps.
struct FewShared {
  uint64_t received, ranged;
  int2 ranges[kFewBlocks * kFewThreads / kWarp];
};

// ---- Steps --------------------------------------------------------------------------------------

/// Bit of F^T's sign table that belongs to word w of the operand A of product i; the sign of the
/// pair's second number is 16 higher.
constexpr int few_sign_place(int i, int w) { return 4 * i + w; }

/// Signs of F^T as operands A of two products, one after the other in depth: word
/// [band][step][lane]. A thread makes those of four neighbouring rows of F^T at once, a byte each,
/// and reads each sign of F once. The order is even, so that pairs end together; of what is made of
/// the bytes, multiply_few looks at no bits but those of few_sign_place.
__device__ __forceinline__ void make_few_signs(const FewPlan& p, uint32_t* table) {
  static_assert(kMmaRows == 16 && kFewDepth == 32);
  with_signs(p, [&](auto signs_at) {
    for (int e = threadIdx.x; e < p.bands * p.steps * 8; e += blockDim.x) {
      const int tile = e >> 1, line = p.by_bands(tile), band = tile - line * p.bands;
      const int step = line >> 2, pair = line & 3, quad = e & 1;
      const int m = band * kMmaRows + quad * 4, k = step * kFewDepth + pair * 2;
      uint32_t even = 0, odd = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = m + i % 2 * 8, from = k + i / 2 * 8;
        if (row >= p.order || from >= p.order) continue;
        even |= signs_at(from, row) >> (7 - i) & 0x01010101u << i;
        odd |= signs_at(from + 1, row) >> (7 - i) & 0x01010101u << i;
      }
      uint32_t* to = table + (band * p.steps + step) * kWarp + quad * 16 + pair;
#pragma unroll
      for (int g = 0; g < 4; ++g) to[4 * g] = __byte_perm(even, odd, g | (4 + g) << 8);
    }
  });
}

/// This block's columns of a row of x, transformed, as three planes.
template <class Source>
__device__ __forceinline__ void make_planes(const FewPlan& p, const Source& source, int row,
                                            int rank, uint32_t planes) {
  const int chunks = p.width / kChunk, unit = static_cast<int>(threadIdx.x);
  const int k = unit >> (p.width_bits - 3), column = unit & (chunks - 1);
  const bool some = k < p.order;
  float v[kChunk] = {};
  if (some) {
    const auto raw = source.load(row, (k << p.bits) + rank * p.width + column * kChunk);
    source.values(v, raw);
  }
#pragma unroll
  for (int b = 1; b < kChunk; b *= 2)
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if ((i & b) == 0) butterfly(v[i], v[i | b]);
#pragma unroll 1
  for (int b = 1; b < chunks; b *= 2) {
    const float sign = column & b ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      v[i] = __fmaf_rn(v[i], sign, __shfl_xor_sync(kAllLanes, v[i], b));
  }
  if (!some) return;
  const uint32_t at = planes + static_cast<uint32_t>(k * p.raw_pitch + column * kChunk * 2);
#pragma unroll
  for (int o = 0; o < kFewPlanes; ++o) store_shared(at + o * p.plane_bytes, take_bf16(v));
}

/// The lane's part of a band of F^T times 8 columns of the planes: of row lane / 4, and of the one
/// 8 below it, columns lane % 4 * 2 and the next.
__device__ __forceinline__ void multiply_few(float (&sum)[4], const FewPlan& p,
                                             const uint32_t* signs, uint32_t at) {
  float acc[kFewPlanes][2][4] = {};
#pragma unroll 2
  for (int step = 0; step < p.steps; ++step, signs += kWarp, at += kFewDepth * p.raw_pitch) {
    uint4 a[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto word = [&](int w) {
        return (*signs << (15 - few_sign_place(i, w)) & 0x80008000u) |
               sign_bits<DType::bf16>(1) * 0x10001u;
      };
      a[i] = {word(0), word(1), word(2), word(3)};
    }
#pragma unroll
    for (int o = 0; o < kFewPlanes; ++o) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, at + static_cast<uint32_t>(o * p.plane_bytes));
      mma<DType::bf16>(acc[o][0], a[0], b[0], b[1]);
      mma<DType::bf16>(acc[o][1], a[1], b[2], b[3]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // small ones first
    sum[i] = acc[2][0][i] + acc[2][1][i];
    sum[i] += acc[1][0][i] + acc[1][1][i];
    sum[i] += acc[0][0][i] + acc[0][1][i];
  }
}

/// out [rows, n] of kDtype = scale * the transform.
template <DType kDtype>
__device__ __forceinline__ void finish_few(const StoreRows<kDtype>& sink, const FewPlan& p,
                                           const FewResult& r, FewShared&, int, int) {
  if (!r.some) return;
#pragma unroll
  for (int b = 0; b < kFewBlocks; ++b) {
    const int64_t i = (r.first + b * p.width) / 2;
    const float x = r.v[b][0] * p.scale, y = r.v[b][1] * p.scale;
    if constexpr (kDtype == DType::f32) {
      static_cast<float2*>(sink.out)[i] = {x, y};
    } else {
      static_cast<uint32_t*>(sink.out)[i] = pack2<kDtype>(x, y);
    }
  }
}

/// Quantizes scale * the transform, a scale a row.
__device__ __forceinline__ void finish_few(const QuantizeRows& sink, const FewPlan& p,
                                           const FewResult& r, FewShared& shared, int row,
                                           int rank) {
  const QuantizedRows& out = sink.out;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = p.finishing_warps;
  Range range;
#pragma unroll
  for (int b = 0; b < kFewBlocks; b += 4) {
    const float v[kChunk] = {r.v[b][0],     r.v[b][1],     r.v[b + 1][0], r.v[b + 1][1],
                             r.v[b + 2][0], r.v[b + 2][1], r.v[b + 3][0], r.v[b + 3][1]};
    range = merge(range, range_of(v, sink.symmetric()));
  }
  if (!r.some) range = {};
  range = {warp_max(range.high), warp_max(range.low)};
  if (lane < kFewBlocks && warp < warps) {
    const auto there = [&](const void* here) {
      return cluster_address(shared_address(here), static_cast<uint32_t>(lane));
    };
    store_cluster_async(there(&shared.ranges[rank * warps + warp]), there(&shared.ranged),
                        float2{__int_as_float(range.high), __int_as_float(range.low)});
  }
  while (!mbarrier_try_wait(shared_address(&shared.ranged), 0)) {
  }
#pragma unroll 1
  for (int i = lane; i < kFewBlocks * warps; i += kWarp)
    range = merge(range, {shared.ranges[i].x, shared.ranges[i].y});
  range = {warp_max(range.high), warp_max(range.low)};
  const Grid grid = sink.grid_of(p, range);
  if (rank == 0 && threadIdx.x == 0) sink.put(grid, row);
  if (!r.some) return;
  const int half = 1 << (out.bits - 1);
#pragma unroll
  for (int b = 0; b < kFewBlocks; ++b) {
    const int64_t i = (r.first + b * p.width) / 2;
    const int x = code_of<Rounding::fused>(r.v[b][0], grid, half) - half;
    const int y = code_of<Rounding::fused>(r.v[b][1], grid, half) - half;
    if (out.packed) {
      static_cast<uint8_t*>(out.codes)[i] = static_cast<uint8_t>((x & 15) | y << 4);
    } else {
      static_cast<uint16_t*>(out.codes)[i] = static_cast<uint16_t>((x & 255) | y << 8);
    }
  }
}

// ---- The kernel ---------------------------------------------------------------------------------

/// Two blocks a multiprocessor: those of the next kernel come while this one runs.
template <class Source, class Sink>
__global__ void __launch_bounds__(kFewThreads, 2)
    fwht_few_kernel(const __grid_constant__ FewPlan p, const Source source, const Sink sink) {
#if __CUDA_ARCH__ >= 900
  __shared__ FewShared common;
  unsigned char* shared = dynamic_shared();
  auto* table = reinterpret_cast<uint32_t*>(shared);
  const uint32_t planes = shared_address(shared + p.raw_at);
  const uint32_t sent = shared_address(shared + p.exchange_at);
  const uint32_t received = shared_address(&common.received);
  const uint32_t ranged = shared_address(&common.ranged);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int rank = static_cast<int>(cluster_rank());
  const int row = static_cast<int>(blockIdx.x) / kFewBlocks;
  const int first_row = rank * p.block_rows;
  const int rows = min(max(p.order - first_row, 0), p.block_rows);

  start_next_grid();
  if (threadIdx.x == 0) {
    mbarrier_init(received, 1);
    mbarrier_init(ranged, 1);
    mbarrier_init_fence();
    mbarrier_expect(received, static_cast<uint32_t>(kFewBlocks * rows * p.width * 4));
    mbarrier_expect(ranged, static_cast<uint32_t>(kFewBlocks * p.finishing_warps * sizeof(int2)));
  }
  for (int o = 0; o < kFewPlanes; ++o)  // rows beyond the order, up to whole steps
    for (int at = p.order * p.raw_pitch + threadIdx.x * 16; at < p.plane_bytes;
         at += blockDim.x * 16)
      store_shared(planes + static_cast<uint32_t>(o * p.plane_bytes + at), {});
  make_few_signs(p, table);
  cluster_arrive();
  wait_for_previous_grid();

  make_planes(p, source, row, rank, planes);
  __syncthreads();
  cluster_wait();
#pragma unroll 1
  for (int task = warp; task < p.tasks; task += blockDim.x / kWarp) {
    const int band = task >> (p.width_bits - 3), columns = task * kMmaColumns & (p.width - 1);
    float v[4];
    multiply_few(v, p, table + band * p.steps * kWarp + lane,
                 planes + static_cast<uint32_t>(lane * p.raw_pitch + columns * 2));
    // A lane and its neighbour have the same two rows: one sends the first, one the second.
    const int h = lane & 1, m = band * kMmaRows + lane / 4 + h * kMmaRows / 2;
    const float x = __shfl_xor_sync(kAllLanes, h ? v[0] : v[2], 1);
    const float y = __shfl_xor_sync(kAllLanes, h ? v[1] : v[3], 1);
    if (m < p.order) {
      const int owner = p.by_block_rows(m), line = first_row + m - owner * p.block_rows;
      const int to = (line * p.width + columns + (lane & 2) * 2) * 4;
      store_cluster_async(cluster_address(sent + static_cast<uint32_t>(to), owner),
                          cluster_address(received, owner),
                          h ? float4{x, y, v[2], v[3]} : float4{v[0], v[1], x, y});
    }
  }

  FewResult result;
  const int line = static_cast<int>(threadIdx.x) >> (p.width_bits - 1);
  const int pair = static_cast<int>(threadIdx.x) & (p.width / 2 - 1);
  result.some = line < rows;
  result.first = int64_t{row} * p.n + ((first_row + line) << p.bits) + 2 * pair;
  while (!mbarrier_try_wait(received, 0)) {
  }
  const auto* from = reinterpret_cast<const float2*>(shared + p.exchange_at) +
                     ((result.some ? line : 0) << (p.width_bits - 1)) + pair;
#pragma unroll
  for (int b = 0; b < kFewBlocks; ++b, from += p.block_rows << (p.width_bits - 1)) {
    result.v[b][0] = from->x;
    result.v[b][1] = from->y;
  }
#pragma unroll
  for (int s = 1; s < kFewBlocks; s *= 2)
#pragma unroll
    for (int b = 0; b < kFewBlocks; ++b)
      if ((b & s) == 0) {
        butterfly(result.v[b][0], result.v[b | s][0]);
        butterfly(result.v[b][1], result.v[b | s][1]);
      }
  finish_few(sink, p, result, common, row, rank);
#endif
}

// ---- Launch -------------------------------------------------------------------------------------

/// The least order of at least a tensor core's tile that leaves blocks whole chunks.
inline bool plan_few(FewPlan& p, const FwhtRequest& r) {
  for (int bits = r.log_n; bits >= kFewBlockBits + 3; --bits) {
    if (!plan_matrix(p, r, bits, 1) || p.order < kMmaRows) continue;
    p.steps = static_cast<int>(ceil_div(p.order, kFewDepth));
    p.width_bits = bits - kFewBlockBits;
    p.width = 1 << p.width_bits;
    p.tasks = p.bands * p.width / kMmaColumns;
    p.block_rows = static_cast<int>(ceil_div(p.order, kFewBlocks));
    p.by_block_rows = FastDiv(p.block_rows);
    const int units = p.order * p.width / kChunk, finishers = p.block_rows * p.width / 2;
    p.finishing_warps = align_up(finishers, kWarp) / kWarp;
    p.threads =
        align_up(std::max({units, finishers, std::min(p.tasks * kWarp, kFewThreads)}), kWarp);
    if (p.threads > kFewThreads || p.width / kChunk > kWarp) return false;
    p.raw_at = p.bands * p.steps * kWarp * 4;
    p.raw_pitch = (p.width / kChunk | 1) * 16;  // odd: no bank conflicts
    p.plane_bytes = p.steps * kFewDepth * p.raw_pitch;
    p.exchange_at = p.raw_at + kFewPlanes * p.plane_bytes;
    p.shared_bytes = p.exchange_at + kFewBlocks * p.block_rows * p.width * 4;
    return true;
  }
  return false;
}

/// Returns false where the shape needs another kernel, or another one is faster.
template <class Source, class Sink>
bool launch_fwht_few(const HadamardMatrix& matrix, int64_t rows, int64_t n, const Source& source,
                     const Sink& sink, int slots, Stream stream) {
  const DeviceLimits device = device_limits();
  if (!device.starts_early || rows * kFewBlocks > device.processors || slots > 1) return false;
  if (matrix.factor_order == 1 && n < kFewLeast) return false;
  const bool as_fast = Operand<Source>::kDirect || n == kFewLeast;  // the other kernels
  if (matrix.factor_order == 1 && as_fast && rows > kFewRows) return false;
  int log_n = 0;
  FewPlan p{};
  if (!can_transform(matrix, rows, n, log_n) ||
      !plan_few(p, {matrix, rows, n, false, 1, slots, 0, log_n}))
    return false;
  launch_clusters(&fwht_few_kernel<Source, Sink>, rows * kFewBlocks, kFewBlocks, p.threads,
                  p.shared_bytes, stream, p, source, sink);
  return true;
}

}  // namespace quarot::cuda
