// The simple kernel for shapes that transform.cuh and rows.cuh do not take: addresses that are not
// 16-byte aligned, rows, segments or groups that are no multiple of 8.
//
// Maths: the transform as in kernels/hadamard.h, butterflies first, then the factor; fp32.
//
// Layout: a row and as much to spare in shared memory, which limits the row's length.
//
// Parallelisation: a block a row, one element at a time.
//
// Bound: the instructions, and the shared memory's latency between log2 n barriers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels/cuda/device/int4.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/hadamard.h"

namespace quarot::cuda {

constexpr int kAnyThreads = 256;

struct AnyShape {
  int64_t rows;
  int n;             // of a transformed row
  int inner;         // distance of neighbours in a transform
  int order, power;  // K, 2^p
  const int8_t* factor;
  float scale;
};

/// row[0, n) transformed in place, spare [n]; ends with a barrier. Unscaled.
__device__ inline void transform_any(float* row, float* spare, const AnyShape& s) {
  for (int stride = s.inner; stride < s.inner * s.power; stride *= 2) {
    for (int pair = threadIdx.x; pair < s.n / 2; pair += blockDim.x) {
      const int low = pair % stride, i = (pair - low) * 2 + low;
      const float a = row[i], b = row[i + stride];
      row[i] = a + b;
      row[i + stride] = a - b;
    }
    __syncthreads();
  }
  if (s.order == 1) return;
  const int segment = s.power * s.inner;
  for (int i = threadIdx.x; i < s.n; i += blockDim.x) {
    const int column = i % segment, a = i / segment % s.order, block = i / segment / s.order;
    const float* x = row + block * segment * s.order + column;
    float sum = 0.0f;
    for (int b = 0; b < s.order; ++b) {
      const float v = x[b * segment];
      sum += s.factor[b * s.order + a] < 0 ? -v : v;
    }
    spare[i] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < s.n; i += blockDim.x) row[i] = spare[i];
  __syncthreads();
}

/// Source: common(row, n, spare [n]), called by all threads; value(row, column, common). Sink:
/// put(row, x [n], spare [n], n).
template <class Source, class Sink>
__global__ void __launch_bounds__(kAnyThreads)
    any_kernel(const AnyShape s, const Source source, const Sink sink) {
  auto* x = reinterpret_cast<float*>(dynamic_shared());
  float* spare = x + s.n;
  for (int64_t row = blockIdx.x; row < s.rows; row += gridDim.x) {
    const float common = source.common(row, s.n, spare);
    for (int i = threadIdx.x; i < s.n; i += blockDim.x) x[i] = source.value(row, i, common);
    __syncthreads();
    transform_any(x, spare, s);
    if (s.scale != 1.0f) {
      for (int i = threadIdx.x; i < s.n; i += blockDim.x) x[i] = __fmul_rn(x[i], s.scale);
      __syncthreads();
    }
    sink.put(row, x, reinterpret_cast<int8_t*>(spare), s.n);
    __syncthreads();
  }
}

template <DType kDtype>
struct AnyStore {
  void* out;
  __device__ void put(int64_t row, const float* x, int8_t*, int n) const {
    for (int i = threadIdx.x; i < n; i += blockDim.x) store1<kDtype>(out, row * n + i, x[i]);
  }
};

/// A warp a group; codes go through shared memory, since a byte of packed codes may belong to two
/// groups.
struct AnyQuantize {
  QuantizedRows out;
  __device__ void put(int64_t row, const float* x, int8_t* codes, int n) const {
    const int lane = threadIdx.x % kWarp;
    const bool symmetric = out.zero == nullptr;
    const int group = static_cast<int>(out.group);
    const int groups = n > 0 ? n / group : 1;  // no columns: the scale of zeros
    for (int g = threadIdx.x / kWarp; g < groups; g += blockDim.x / kWarp) {
      Range range;
      for (int i = lane; i < group; i += kWarp) {
        const float v[kChunk] = {x[g * group + i]};
        range = merge(range, range_of(v, symmetric));
      }
      range = {warp_max(range.high), warp_max(range.low)};
      const int half = 1 << (out.bits - 1);
      const Grid grid = make_grid(range, 1.0f, out.clip, out.bits, symmetric);
      if (lane == 0) {
        out.scale[row * groups + g] = grid.scale;
        if (!symmetric) out.zero[row * groups + g] = grid.shift;
      }
      for (int i = lane; i < group; i += kWarp) {
        codes[g * group + i] =
            static_cast<int8_t>(code_of<Rounding::any>(x[g * group + i], grid, half) - half);
      }
    }
    __syncthreads();
    if (out.packed) {
      for (int i = threadIdx.x; i < n / 2; i += blockDim.x) {
        static_cast<uint8_t*>(out.codes)[row * (n / 2) + i] =
            static_cast<uint8_t>((codes[2 * i] & 15) | (codes[2 * i + 1] & 15) << 4);
      }
    } else {
      for (int i = threadIdx.x; i < n; i += blockDim.x)
        static_cast<int8_t*>(out.codes)[row * n + i] = codes[i];
    }
  }
};

template <class Source, class Sink>
void launch_any(const HadamardMatrix& m, int64_t rows, int64_t n, int64_t inner,
                const Source& source, const Sink& sink, Stream stream, const char* op) {
  const DeviceLimits device = device_limits();
  const int64_t bytes = 2 * n * static_cast<int64_t>(sizeof(float));
  if (bytes > device.block_shared_bytes) {  // the caller's: without file and line
    throw std::runtime_error(std::string("quarot::") + op + ": rows of " + std::to_string(n) +
                             " columns must begin at multiples of 16 bytes, and their number, the" +
                             " transform's blocks and the groups be multiples of 8");
  }
  const AnyShape s{rows,
                   static_cast<int>(n),
                   static_cast<int>(inner),
                   static_cast<int>(m.factor_order),
                   static_cast<int>(m.size / m.factor_order),
                   m.factor,
                   m.scale};
  const int64_t most = int64_t{8} * device.processors;
  launch(&any_kernel<Source, Sink>, rows < most ? rows : most, kAnyThreads, static_cast<int>(bytes),
         stream, s, source, sink);
}

}  // namespace quarot::cuda
