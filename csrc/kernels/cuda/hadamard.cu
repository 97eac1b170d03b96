// hadamard on CUDA: out = scale * x * (I (x) H (x) I). A transform block is a row of its own, so
// that rows of several blocks need no more memory.
//
// Rows of up to 512 elements of 16 bits, a power of two: short_kernel, where a warp needs neither
// shared memory nor other warps. A lane's 16 bytes are 8 neighbours, bits 0 to 2 of the index. Bits
// 0, 1 and, lanes 4 g + t, t are the depth of a product with H_16, which is exact; bit 2 and
// the bits of a lane's several loads are butterflies; g's lowest bit is the lowest column, so that
// it comes back as a pair of columns, and one more butterfly. The rest of g numbers rows. A swap
// between lanes makes 16 bytes of the result.
//
// All others: device/rows_transform.cuh; what that does not take: device/transform.cuh,
// device/any_transform.cuh.
//
// Bound: memory, each element read and written once.
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/device/any_transform.cuh"
#include "kernels/cuda/device/fwht_sinks.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/rows_transform.cuh"
#include "kernels/cuda/device/sinks.cuh"
#include "kernels/cuda/device/sources.cuh"
#include "kernels/cuda/device/transform.cuh"
#include "kernels/hadamard.h"

namespace quarot::cuda {
namespace {

// ---- Short rows ---------------------------------------------------------------------------------

constexpr int kShortThreads = 256;    // of a block
constexpr int kFewShortThreads = 64;  // where the blocks would not be one a multiprocessor

/// Chunks that a lane loads, of one or several rows.
constexpr int short_loads(int bits) { return bits > 8 ? 1 << (bits - 6) : 4; }

/// out = scale * H x, of rows of 2^kBits, one after the other, `chunks` chunks in all.
template <DType kDtype, int kBits>
__global__ void __launch_bounds__(kShortThreads)
    short_kernel(void* out, const void* x, int64_t chunks, float scale) {
  constexpr int kRow = kBits > 6 ? 1 << (kBits - 6) : 1;  // chunks of a lane in a row
  constexpr int kLoads = short_loads(kBits);
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const bool odd = g % 2 != 0;
  // Of this warp's chunks, that of load j; low numbers 8 neighbours, high 4 rows.
  const auto chunk = [](int j, int low, int high) {
    return low + j % kRow * 8 + (high + j / kRow * 4) * 8 * kRow;
  };
  uint32_t sign[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t even = (w / 2 & g) ^ __popc(t & g >> 1);
    sign[w] = sign_bits<kDtype>(1) * 0x10001u | (even & 1) << 15 | ((even ^ w) & 1) << 31;
  }
  const uint4 a{sign[0], sign[1], sign[2], sign[3]};
  const int64_t first = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x - lane) * kLoads;
  start_next_grid();
  wait_for_previous_grid();

  uint4 raw[kLoads];
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    const int64_t i = first + chunk(j, t + g % 2 * 4, g / 2);
    raw[j] = i < chunks ? load_once(static_cast<const uint4*>(x) + i) : uint4{};
  }
  float v[kLoads][2][4];
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    mma_first<kDtype>(v[j][0], a, raw[j].x, raw[j].y);
    mma_first<kDtype>(v[j][1], a, raw[j].z, raw[j].w);
#pragma unroll
    for (int c = 0; c < 4; ++c) butterfly(v[j][0][c], v[j][1][c]);
    if constexpr (kBits > 5) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        butterfly(v[j][h][0], v[j][h][1]);
        butterfly(v[j][h][2], v[j][h][3]);
      }
    }
  }
#pragma unroll
  for (int b = 1; b < kRow; b *= 2)
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
#pragma unroll
      for (int c = 0; c < 8; ++c)
        if ((j & b) == 0) butterfly(v[j][c / 4][c % 4], v[j | b][c / 4][c % 4]);

#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    uint32_t words[4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto& d = v[j][h];
      const uint32_t low = pack2<kDtype>(d[0] * scale, d[2] * scale);
      const uint32_t high = pack2<kDtype>(d[1] * scale, d[3] * scale);
      const uint32_t kept = odd ? high : low;
      const uint32_t got = __shfl_xor_sync(kAllLanes, odd ? low : high, 4);
      words[2 * h] = odd ? got : kept;
      words[2 * h + 1] = odd ? kept : got;
    }
    const int64_t i = first + chunk(j, g / 2 + g % 2 * 4, t);
    if (i < chunks)
      store_once(static_cast<uint4*>(out) + i, {words[0], words[1], words[2], words[3]});
  }
}

/// Returns false where rows are not short.
template <DType kDtype>
bool launch_short(const HadamardArgs& a, Stream stream) {
  if constexpr (kDtype == DType::f32) {
    return false;
  } else {
    const int64_t n = a.x.n, chunks = a.x.rows * n / kChunk;
    if (a.matrix.size != n || a.matrix.factor_order > 1) return false;
    if (a.x.rows > 1 && a.x.row_stride != n) return false;
    const auto go = [&](auto bits) {
      constexpr int kBits = decltype(bits)::value;
      const int64_t units = ceil_div(chunks, short_loads(kBits));
      const bool few = units < int64_t{kShortThreads} * device_limits().processors;
      const int threads = few ? kFewShortThreads : kShortThreads;
      launch_early(&short_kernel<kDtype, kBits>, ceil_div(units, threads), threads, 0, stream,
                   a.out, a.x.data, chunks, a.matrix.scale);
      return true;
    };
    switch (n) {
      case 32:
        return go(std::integral_constant<int, 5>{});
      case 64:
        return go(std::integral_constant<int, 6>{});
      case 128:
        return go(std::integral_constant<int, 7>{});
      case 256:
        return go(std::integral_constant<int, 8>{});
      case 512:
        return go(std::integral_constant<int, 9>{});
      default:
        return false;
    }
  }
}

template <DType kDtype>
void hadamard_of(const HadamardArgs& args, Stream stream) {
  const RowSource<kDtype> source{args.x.data, args.x.row_stride};
  const bool aligned =
      chunks_are_aligned(args.x) && reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
  if (aligned && launch_short<kDtype>(args, stream)) return;
  if (aligned && launch_rows_transform(args.matrix, args.x.rows, args.x.n, source,
                                       StoreRows<kDtype>{args.out}, 0, stream))
    return;
  if (aligned && launch_transform<true>(args.matrix, args.x.rows, args.x.n, 1, source,
                                        StoreSink<kDtype>{args.out}, 0, stream))
    return;
  launch_any(args.matrix, args.x.rows, args.x.n, 1, source, AnyStore<kDtype>{args.out}, stream,
             "hadamard");
}

}  // namespace

void hadamard(const HadamardArgs& args, Stream stream) {
  QUAROT_ASSERT(args.matrix.size >= 1 && args.x.n % args.matrix.size == 0,
                "hadamard: size must divide the row");
  if (args.x.rows == 0 || args.x.n == 0) return;
  HadamardArgs a = args;
  if (a.x.row_stride == a.x.n || a.x.rows == 1) {  // dense: blocks follow each other
    a.x.rows *= a.x.n / a.matrix.size;
    a.x.n = a.x.row_stride = a.matrix.size;
  }
  switch (a.x.dtype) {
    case DType::f32:
      return hadamard_of<DType::f32>(a, stream);
    case DType::f16:
      return hadamard_of<DType::f16>(a, stream);
    case DType::bf16:
      return hadamard_of<DType::bf16>(a, stream);
  }
  QUAROT_ASSERT(false, "hadamard: no such dtype");
}

}  // namespace quarot::cuda
