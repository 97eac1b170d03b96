// The transform of rows of 2^p fp32 values by butterflies alone: with 4 bytes an element or more
// the CUDA cores keep up with memory, where the tensor cores of fwht.cuh multiply three summands.
//
// Layout. A thread has 32 elements: two times 4 neighbours and their likes in the two highest bits
// of the row's index. Five bits are lanes', the rest warps'. A warp's 1024 elements lie in shared
// memory, a thread's after each other: read across, they are a thread's of the lanes' bits, and
// written back, anyone's: then a thread takes two of the warps' bits, and shuffles do what is left.
// Rows of less than 1024 follow each other, as many as make 1024.
//
// Parallelisation. A block a row, of short ones several: small blocks, many a multiprocessor, so
// that some load while others compute.
//
// Bound: memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/device/fwht.cuh"
#include "kernels/cuda/device/fwht_sinks.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/sources.cuh"
#include "kernels/cuda/device/vec.cuh"

namespace quarot::cuda {

constexpr int kOwn = 32;                                 // elements of a thread
constexpr int kButterflyLog = 10;                        // log2 of a warp's elements
constexpr int kButterflyLeast = 5, kButterflyMost = 15;  // log2 of a row's
constexpr int kButterflyThreads = 128;                   // of a block, at least
constexpr int kLanePitch = (kOwn + 4) * 4;               // no bank conflicts along or across

struct ButterflyPlan : FwhtPlan {  // whose rows are of 1024 elements where they are shorter
  int lane_bits, warp_bits;        // of the index
  int log_rows;                    // of x's rows in one of these
  int64_t elements;
};

/// What a thread has in the end: chunks of 8, 32 chunks apart, of one row of the tile.
struct ButterflyResult {
  static constexpr int kBits = kButterflyLog, kInRow = 3, kItems = 4, kParts = 1;
  float v[kItems][kParts][kChunk];
  int row, first, items;

  static __device__ __forceinline__ constexpr int offset(int item, int) {
    return item * kWarp * kChunk;
  }
  __device__ __forceinline__ int at(int item, int part) const { return first + offset(item, part); }
  /// Of all kOwn elements.
  __device__ __forceinline__ float& operator[](int i) { return v[i / kChunk][0][i % kChunk]; }
};

/// Where fp32 numbers go to fp32 numbers a chunk's halves are 32 halves apart, so that lanes read
/// and write neighbouring 16 bytes. Which bits of the index those are does not matter.
template <class Source, class Sink>
constexpr bool kHalvesApart =
    std::is_same_v<Source, RowSource<DType::f32>> && std::is_same_v<Sink, StoreRows<DType::f32>>;
constexpr int kHalfStep = kWarp * kChunk / 2;
__device__ __forceinline__ int apart(int column) {  // of a chunk's first half
  return column - column % (kWarp * kChunk) / 2;
}

/// The bit `b` of a thread's elements.
__device__ __forceinline__ void butterfly_own(ButterflyResult& r, int b) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
    if ((i & b) == 0) butterfly(r[i], r[i | b]);
}
__device__ __forceinline__ uint4 four_of(ButterflyResult& r, int i) {
  return {__float_as_uint(r[i]), __float_as_uint(r[i + 1]), __float_as_uint(r[i + 2]),
          __float_as_uint(r[i + 3])};
}

// ---- Steps --------------------------------------------------------------------------------------

/// A thread's elements of row `here`, whose first chunk begins at `column`; `left` as in the
/// kernel.
template <class Sink, class Source>
__device__ __forceinline__ void load_own(ButterflyResult& r, const ButterflyPlan& p,
                                         const Source& source, int64_t here, int column, int left) {
  constexpr int kItems = ButterflyResult::kItems;
  constexpr int kTogether = std::min<int>(kItems, 128 / sizeof(typename Source::Raw));
  const int64_t row = here << p.log_rows;
#pragma unroll
  for (int first = 0; first < kItems; first += kTogether) {
    typename Source::Raw raw[kTogether] = {};
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int at = column + ((first + i) << (p.bits - 2));
      if constexpr (kHalvesApart<Source, Sink>) {
        const auto* from = reinterpret_cast<const uint4*>(source.row(row)) + apart(at) / 4;
        if (apart(at) < left) raw[i].words[0] = load_once(from);
        if (apart(at) + kHalfStep < left) raw[i].words[1] = load_once(from + kHalfStep / 4);
      } else {
        if (at < left) raw[i] = source.load(row, at);
      }
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) source.values(r.v[first + i][0], raw[i]);
  }
}

/// The lanes' bits: a warp's memory, read and written across.
__device__ __forceinline__ void butterfly_lanes(ButterflyResult& r, int lane_bits, uint32_t warp) {
  const uint32_t lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kOwn; i += 4) store_shared(warp + lane * kLanePitch + i * 4, four_of(r, i));
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kOwn; ++i) r[i] = load_shared_float(warp + lane * 4 + i * kLanePitch);
#pragma unroll
  for (int b = 0; b < 5; ++b)
    if (b < lane_bits) butterfly_own(r, 1 << b);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) store_shared_float(warp + lane * 4 + i * kLanePitch, r[i]);
}

/// The warps' bits, from a row's memory. Of the number of a chunk, c 2^(p.bits - 5) + w 32 + l, a
/// thread's bits are now the lowest of w, and those of c if w has less than two. Returns the number
/// of its first chunk.
__device__ __forceinline__ int butterfly_warps(ButterflyResult& r, const ButterflyPlan& p,
                                               uint32_t row, int thread) {
  const int lane = thread % kWarp, warp = thread / kWarp;
  const int own = min(p.warp_bits, 2), extra = p.warp_bits - own;  // a thread's, and lanes'
  const int l = (lane & ((kWarp >> extra) - 1)) | (warp & ((1 << extra) - 1)) << (5 - extra);
  const int w = lane >> (5 - extra) << own, c = warp >> extra << (2 - own);
#pragma unroll
  for (int i = 0; i < kOwn; i += 4) {
    const int item = i / kChunk;
    const int from_warp = w + (item & ((1 << own) - 1)), from_chunk = c + (item >> own);
    const uint4 x = load_shared(row + from_warp * kWarp * kLanePitch + l * kLanePitch +
                                from_chunk * kChunk * 4 + i % kChunk * 4);
    r[i] = __uint_as_float(x.x), r[i + 1] = __uint_as_float(x.y);
    r[i + 2] = __uint_as_float(x.z), r[i + 3] = __uint_as_float(x.w);
  }
  if (own > 0) butterfly_own(r, 8);
  if (own > 1) butterfly_own(r, 16);
#pragma unroll 1
  for (int b = 0; b < extra; ++b) {
    const int step = kWarp >> (b + 1);
    const float sign = lane & step ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      r[i] = __fmaf_rn(r[i], sign, __shfl_xor_sync(kAllLanes, r[i], step));
  }
  return (c << (p.bits - 5)) + w * kWarp + l;
}

// ---- The kernel ---------------------------------------------------------------------------------

template <class Source, class Sink>
__global__ void __launch_bounds__(1024, 1)
    fwht_butterfly_kernel(const __grid_constant__ ButterflyPlan p, const Source source,
                          const Sink sink) {
  unsigned char* shared = dynamic_shared();
  const int row_threads = p.n / kOwn;
  const int row = static_cast<int>(threadIdx.x) >> (p.bits - 5);
  const int thread = static_cast<int>(threadIdx.x) & (row_threads - 1);
  const int tile = blockIdx.x;
  const int64_t here = int64_t{tile} * p.side + row;
  // Elements from this row's first one on, if they are less than a row.
  const int left = static_cast<int>(min(p.elements - here * p.n, int64_t{p.n}));
  const uint32_t row_at = shared_address(shared) + row * row_threads * kLanePitch;
  sink.clear(p, shared + p.slots_at);
  start_next_grid();
  wait_for_previous_grid();

  ButterflyResult r;
  load_own<Sink>(r, p, source, here, thread * kChunk, left);
  butterfly_own(r, 1);
  butterfly_own(r, 2);
  if (p.log_rows <= 2) butterfly_own(r, 4);
  if (p.log_rows <= 1) butterfly_own(r, 8);
  if (p.log_rows == 0) butterfly_own(r, 16);
  butterfly_lanes(r, p.lane_bits, row_at + thread / kWarp * kWarp * kLanePitch);
  if (p.alone) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  const int column = butterfly_warps(r, p, row_at, thread) * kChunk;
  if constexpr (Sink::kScaled) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) r[i] *= p.scale;
  }

  if constexpr (kHalvesApart<Source, Sink>) {
    auto* to = reinterpret_cast<uint4*>(static_cast<float*>(sink.out) + here * p.n + apart(column));
#pragma unroll
    for (int i = 0; i < kOwn; i += 4) {
      const int offset = ButterflyResult::offset(i / kChunk, 0) + i / 4 % 2 * kHalfStep;
      if (apart(column) + offset < left) store_once(to + offset / 4, four_of(r, i));
    }
  } else {
    constexpr int kStep = ButterflyResult::offset(1, 0);
    r.row = row;
    r.first = row * p.n + column;
    r.items = min((left - column + kStep - 1) / kStep, ButterflyResult::kItems);
    sink.take(p, r, shared + p.slots_at, tile, 0);
  }
}

/// Returns false where the shape needs another kernel.
template <class Source, class Sink>
bool launch_fwht_butterfly(const HadamardMatrix& matrix, int64_t rows, int64_t n,
                           const Source& source, const Sink& sink, int slots, Stream stream) {
  int log_n = 0;
  if (matrix.factor_order > 1 || !can_transform(matrix, rows, n, log_n)) return false;
  if (log_n < kButterflyLeast || log_n > kButterflyMost) return false;
  // QuantizeRows merges 8 lanes that it takes for neighbours.
  if (log_n == kButterflyMost && slots > 1) return false;
  const bool dense = rows == 1 || source.is_dense(n);
  if (log_n < kButterflyLog && !(kHalvesApart<Source, Sink> && dense)) return false;
  ButterflyPlan p{};
  p.elements = rows * n;
  p.bits = std::max(log_n, kButterflyLog);
  p.log_rows = p.bits - log_n;
  p.n = 1 << p.bits;
  p.rows = ceil_div(p.elements, p.n);
  p.scale = matrix.scale;
  p.lane_bits = std::min(log_n - 2, 5);
  p.warp_bits = p.bits - kButterflyLog;
  p.alone = p.warp_bits == 0 && slots <= 1;
  const int threads = p.n / kOwn;
  p.side = std::max(1, kButterflyThreads / threads);
  p.threads = threads * p.side;
  p.tiles = static_cast<int>(ceil_div(p.rows, p.side));
  p.slots_at = p.threads * kLanePitch;
  p.shared_bytes = p.slots_at + align_up(2 * p.side * slots * Sink::kSlotBytes, 16);
  const auto kernel = &fwht_butterfly_kernel<Source, Sink>;
  prefer_shared_memory(kernel);
  launch_early(kernel, p.tiles, p.threads, p.shared_bytes, stream, p, source, sink);
  return true;
}

}  // namespace quarot::cuda
