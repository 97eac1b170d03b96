// Quantization of rows that need no transform: a row, or its norm, or a gated activation, in one
// pass. Maths: kernels/quantize.h and kernels/fused_quantize.h.
//
// Layout and parallelisation. A team of threads holds a row in registers, kThreadChunks chunks of 8
// a thread: it finds the range of each group, makes the grids in shared memory, and writes the
// codes. A row longer than that is read once for each of these steps, from the L2. Short rows:
// several teams a block. Few rows: fewer chunks a thread, so that more threads wait for memory at
// once.
//
// Bound: memory; about 10 instructions an element.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/sinks.cuh"
#include "kernels/cuda/device/sources.cuh"

namespace quarot::cuda {

constexpr int kMaxRowThreads = 512;
/// Threads of a block of short rows.
constexpr int kRowBlockThreads = 128;

struct RowPlan {
  int64_t rows;
  int n;
  int team;         // threads a row, whole warps
  int team_chunks;  // chunks a thread and step, at most kThreadChunks
  int steps;
  int groups;  // a row
};

/// x / sqrt(mean(x^2) + eps) * weight.
template <DType kDtype>
struct RmsnormSource : RowSource<kDtype> {
  const void* weight;  // [n] or null
  DType weight_dtype;
  float eps;

  static constexpr bool kNormalised = true;
  static constexpr int kInFlight = 4;  // 8 would spill

  __device__ __forceinline__ float inverse_norm(float squares, int n) const {
    return __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(squares, static_cast<float>(n)) + eps));
  }
  __device__ __forceinline__ void normalise(float (&v)[kChunk], int column, float inverse) const {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] *= inverse;
    if (weight == nullptr) return;
    float w[kChunk];
    switch (weight_dtype) {
      case DType::f32:
        to_floats<DType::f32>(w, load_chunk<DType::f32>(weight, column));
        break;
      case DType::f16:
        to_floats<DType::f16>(w, load_chunk<DType::f16>(weight, column));
        break;
      case DType::bf16:
        to_floats<DType::bf16>(w, load_chunk<DType::bf16>(weight, column));
        break;
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] *= w[i];
  }

  __device__ float common(int64_t row, int n, float* spare) const {
    float squares = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const float v = RowSource<kDtype>::value(row, i, 0.0f);
      squares += v * v;
    }
    __shared__ float sums[kMaxRowThreads / kWarp];
    squares = warp_sum(squares);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = squares;
    __syncthreads();
    squares = 0.0f;
    for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) squares += sums[w];
    return inverse_norm(squares, n);
  }
  __device__ float value(int64_t row, int column, float inverse) const {
    const float v = RowSource<kDtype>::value(row, column, 0.0f) * inverse;
    return weight == nullptr ? v : v * load1(weight_dtype, weight, column);
  }
};

template <class Source>
__global__ void __launch_bounds__(kMaxRowThreads)
    quantize_rows_kernel(const RowPlan p, const Source source, const Quantizer quantizer) {
  __shared__ float sums[kMaxRowThreads / kWarp];
  auto* slots = reinterpret_cast<Quantizer::Slot*>(dynamic_shared());
  const int teams = blockDim.x / p.team;
  const int team = threadIdx.x / p.team, member = threadIdx.x - team * p.team;
  const int64_t first_row = int64_t{blockIdx.x} * teams;
  const int64_t row = first_row + team;
  const int rows = static_cast<int>(min(static_cast<int64_t>(teams), p.rows - first_row));
  const int chunks = team < rows ? p.n / kChunk : 0;
  const bool symmetric = quantizer.symmetric();

  float v[kThreadChunks][kChunk];
  const auto chunk_of = [&](int step, int i) {
    return (step * p.team_chunks + i) * p.team + member;
  };
  const auto fetch = [&](int step) {
#pragma unroll
    for (int first = 0; first < kThreadChunks; first += Source::kInFlight) {
      typename Source::Raw raw[Source::kInFlight];
#pragma unroll
      for (int i = 0; i < Source::kInFlight; ++i) {
        const int chunk = chunk_of(step, first + i);
        if (first + i < p.team_chunks && chunk < chunks) raw[i] = source.load(row, chunk * kChunk);
      }
#pragma unroll
      for (int i = 0; i < Source::kInFlight; ++i) {
        if (first + i < p.team_chunks && chunk_of(step, first + i) < chunks) {
          source.values(v[first + i], raw[i]);
        } else {
#pragma unroll
          for (int j = 0; j < kChunk; ++j) v[first + i][j] = 0.0f;
        }
      }
    }
  };

  fetch(0);
  quantizer.clear(slots, teams * p.groups);

  float inverse = 1.0f;
  if constexpr (Source::kNormalised) {
    float squares = 0.0f;
    for (int step = 0; step < p.steps; ++step) {
      if (step > 0) fetch(step);
#pragma unroll
      for (int i = 0; i < kThreadChunks; ++i)
#pragma unroll
        for (int j = 0; j < kChunk; ++j) squares += v[i][j] * v[i][j];
    }
    if (p.steps > 1) fetch(0);
    squares = warp_sum(squares);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = squares;
    __syncthreads();
    squares = 0.0f;
    const int warps = p.team / kWarp;
    for (int w = 0; w < warps; ++w) squares += sums[team * warps + w];
    inverse = source.inverse_norm(squares, p.n);
  } else {
    __syncthreads();
  }
  const auto normalise = [&](int step) {
    if constexpr (Source::kNormalised) {
#pragma unroll
      for (int i = 0; i < kThreadChunks; ++i) {
        const int chunk = chunk_of(step, i);
        if (i < p.team_chunks && chunk < chunks) source.normalise(v[i], chunk * kChunk, inverse);
      }
    }
  };

  for (int step = 0; step < p.steps; ++step) {
    if (step > 0) fetch(step);
    normalise(step);
    if (p.groups == 1) {
      Range range;
#pragma unroll
      for (int i = 0; i < kThreadChunks; ++i) range = merge(range, range_of(v[i], symmetric));
      quantizer.collect_warp(slots[team], range);
    } else {
#pragma unroll
      for (int i = 0; i < kThreadChunks; ++i) {
        const int chunk = chunk_of(step, i);
        if (i >= p.team_chunks || chunk >= chunks) continue;
        quantizer.collect(slots[team * p.groups + quantizer.group_chunks(chunk)],
                          range_of(v[i], symmetric));
      }
    }
  }
  __syncthreads();
  quantizer.finish(slots, rows * p.groups, first_row * p.groups, 1.0f);
  __syncthreads();
  for (int step = 0; step < p.steps; ++step) {
    if (p.steps > 1) {
      fetch(step);
      normalise(step);
    }
#pragma unroll
    for (int i = 0; i < kThreadChunks; ++i) {
      const int chunk = chunk_of(step, i);
      if (i >= p.team_chunks || chunk >= chunks) continue;
      store_codes(quantizer.out, row * p.n + int64_t{chunk} * kChunk, v[i],
                  slots[team * p.groups + quantizer.group_chunks(chunk)].grid);
    }
  }
}

/// Quantizes rows whose chunks are aligned, in groups of whole chunks.
template <class Source>
void launch_rows(const Source& source, int64_t rows, int64_t n, const QuantizedRows& out,
                 Stream stream) {
  const DeviceLimits device = device_limits();
  RowPlan p{};
  p.rows = rows;
  p.n = static_cast<int>(n);
  p.groups = static_cast<int>(n / out.group);
  const int chunks = p.n / kChunk;
  // Enough rows: a thread holds all it can. Few rows: as many threads as there are chunks.
  const bool few =
      rows * ceil_div(chunks, kThreadChunks) < int64_t{device.processors} * kMaxRowThreads;
  const int wanted =
      static_cast<int>(ceil_div(few ? chunks : ceil_div(chunks, kThreadChunks), kWarp)) * kWarp;
  p.team = wanted < kMaxRowThreads ? wanted : kMaxRowThreads;
  const int each = static_cast<int>(ceil_div(chunks, p.team));
  p.team_chunks = each < kThreadChunks ? each : kThreadChunks;
  p.steps = static_cast<int>(ceil_div(chunks, int64_t{p.team} * p.team_chunks));
  int teams = kRowBlockThreads / p.team;
  if (teams < 1) teams = 1;
  const int bytes = teams * p.groups * static_cast<int>(sizeof(Quantizer::Slot));
  QUAROT_ASSERT(bytes <= device.block_shared_bytes - 1024, "quantize: too many groups in a row");
  const Quantizer quantizer{out, FastDiv(static_cast<int>(out.group / kChunk))};
  launch(&quantize_rows_kernel<Source>, ceil_div(rows, teams), teams * p.team, bytes, stream, p,
         source, quantizer);
}

/// Whether launch_rows and transform_kernel take these groups.
inline bool groups_are_whole(const QuantizedRows& out) {
  return out.group > 0 && out.group % kChunk == 0;
}

constexpr HadamardMatrix kNoTransform{1, 1, nullptr, 1.0f};

}  // namespace quarot::cuda
