// The transform of fwht.cuh for few rows, where latency counts: a row a cluster of blocks, one tile
// a block, on sm_90.
//
// Maths as there. A block multiplies some columns of X, and finishes some rows of F^T X: they are
// exchanged through the cluster's shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device/fwht.cuh"

namespace quarot::cuda {

template <class Source, int kBits, class Sink>
__global__ void __launch_bounds__(kFewThreads)
    fwht_few_kernel(const __grid_constant__ FwhtPlan p, const Source source, const Sink sink) {
#if __CUDA_ARCH__ >= 900
  constexpr DType kDtype = Operand<Source>::kDtype;
  constexpr int kPlanes = Operand<Source>::kPlanes, kInputs = Operand<Source>::kInputs;
  using R = Result<kBits, 1>;
  unsigned char* shared = dynamic_shared();
  auto* table = reinterpret_cast<uint32_t*>(shared + p.table_at);
  auto* bits = reinterpret_cast<uint32_t*>(shared + p.exchange_at);
  auto* slots = shared + p.slots_at;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = p.by_bands(warp), band = warp - group * p.bands;
  const int blocks = p.cluster, rank = blocks > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int tile = static_cast<int>(blockIdx.x) / blocks;
  const uint32_t raw = shared_address(shared + p.raw_at), zeros = raw - kZeroBytes;

  for (int i = threadIdx.x * 4; i < kZeroBytes; i += blockDim.x * 4)
    *reinterpret_cast<uint32_t*>(shared + p.raw_at - kZeroBytes + i) = 0;
  sink.clear(p, slots);
  if (p.factor_order == 1) {
    make_bits(p, bits);
    __syncthreads();
    make_sign_table<1>(p, bits, table);
  }
  const int line_units = p.groups * (kGroupColumns / kChunk), units = p.order * line_units;
  const auto place = [&](int unit, int line) {
    return raw +
           static_cast<uint32_t>(line * p.raw_pitch + (unit - line * line_units) * kChunk * 2);
  };
  start_next_grid();
  wait_for_previous_grid();
  for (int u = threadIdx.x; u < units; u += blockDim.x) {
    const int line = u / line_units;
    const char* from =
        source.row(tile) +
        ((line << (kBits - 3)) + rank * line_units + (u - line * line_units)) * Source::kUnitBytes;
#pragma unroll
    for (int i = 0; i < kInputs; ++i)
      cp_async_16(place(u, line) + static_cast<uint32_t>(i * p.plane_bytes),
                  from + source.input_offset(i));
  }
  if (p.factor_order > 1) {
    make_bits(p, bits);
    __syncthreads();
    make_sign_table<1>(p, bits, table);
  }
  cp_async_wait_all();
  if constexpr (kPlanes > 1) {
#pragma unroll 1
    for (int u = threadIdx.x; u < units; u += blockDim.x) {
      const uint32_t at = place(u, u / line_units);
      float v[kChunk];
      uint4 in[kInputs];
#pragma unroll
      for (int i = 0; i < kInputs; ++i) in[i] = load_shared(at + i * p.plane_bytes);
      source.values(v, in);
#pragma unroll
      for (int o = 0; o < kPlanes; ++o) store_shared(at + o * p.plane_bytes, take_bf16(v));
    }
  }
  __syncthreads();
  if (blocks > 1) cluster_arrive();  // nobody reads the signs' bits now: the others may write there

  float acc[1][8][4];
  multiply_planes<kDtype, kPlanes, 1>(
      acc, p, table + band * p.steps * kWarp + lane,
      raw + static_cast<uint32_t>(lane % 16 * p.raw_pitch +
                                  (group * kGroupColumns + lane / 16 * kChunk) * 2),
      zeros + lane / 16 * 16);
  first_butterflies<kBits, 1>(acc);
  if (blocks > 1) cluster_wait();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int m = band * 16 + lane / 4 + h * 8;
    if (m >= p.order) continue;
    const int owner = p.by_rows(m);
    const uint32_t at =
        shared_address(shared + p.exchange_at) +
        static_cast<uint32_t>((m - owner * p.block_rows) * p.pitch +
                              (rank * p.groups + group) * kPaddedGroup + lane % 4 * 2) *
            4;
    const uint32_t to = blocks > 1 ? cluster_address(at, owner) : 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const auto offset = static_cast<uint32_t>((j * 8 + j / 4 * 4) * 4);
      const float2 pair{acc[0][j][2 * h], acc[0][j][2 * h + 1]};
      if (blocks > 1) {
        store_cluster_pair(to + offset, pair);
      } else {
        *reinterpret_cast<float2*>(shared + (at - shared_address(shared)) + offset) = pair;
      }
    }
  }
  if (blocks > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }

  R result;
  const int m = warp * R::kItems * 4 + lane / 8, u = lane % 8;
  const int here = p.order - rank * p.block_rows;
  const int rows = here < p.block_rows ? here : p.block_rows;
  const int items = m < rows ? (rows - m + 3) / 4 : 0;
  result.row = 0;
  result.first = ((rank * p.block_rows + m) << kBits) + u * kChunk;
  result.items = items;
  const float* line = reinterpret_cast<const float*>(shared + p.exchange_at) +
                      (items > 0 ? m * p.pitch : 0) + u * kChunk + u / 4 * 4;
  read_lines(result, line, items, p.pitch);
  last_butterflies<Sink::kScaled>(result, p.scale);
  sink.template take<true>(p, result, slots, tile, 0);
#endif
}

/// Transforms few rows into `sink`. Returns false where fwht_kernel is as good or the device has no
/// clusters.
template <class Source, class Sink>
bool launch_fwht_few(const HadamardMatrix& matrix, int64_t rows, int64_t n, const Source& source,
                     const Sink& sink, int slots, Stream stream) {
  int log_n = 0;
  FwhtPlan p{};
  if (!can_transform(matrix, rows, n, log_n)) return false;
  if (!plan_few(p,
                {matrix, rows, n, true, Operand<Source>::kAreas, slots, Sink::kSlotBytes, log_n}))
    return false;
  const auto go = [&](auto kernel) {
    launch_cluster_early(kernel, rows * p.cluster, p.threads, p.shared_bytes, p.cluster, stream, p,
                         source, sink);
    return true;
  };
  switch (p.bits) {
    case 6:
      return go(&fwht_few_kernel<Source, 6, Sink>);
    case 7:
      return go(&fwht_few_kernel<Source, 7, Sink>);
    case 8:
      return go(&fwht_few_kernel<Source, 8, Sink>);
    default:
      return false;
  }
}

/// fwht_few_kernel or fwht_kernel; false where neither takes the shape. Rows that are operands as
/// they are need no cluster: to launch one costs more than it saves.
template <class Source, class Sink>
bool launch_transform_rows(const HadamardMatrix& matrix, int64_t rows, int64_t n,
                           const Source& source, const Sink& sink, int slots, Stream stream) {
  if constexpr (!Operand<Source>::kDirect) {
    if (launch_fwht_few(matrix, rows, n, source, sink, slots, stream)) return true;
  }
  return launch_fwht(matrix, rows, n, source, sink, slots, stream);
}

}  // namespace quarot::cuda
