// Hadamard transform on CUDA, the simple kernel: out = scale * x * (I (x) H_K (x) H_2^p), fp32
// inside.
//
// Layout: a transform block [K][2^p] lies in shared memory as it lies in memory. Butterfly stages
// with strides 1, 2, ..., 2^(p-1), a barrier after each; then each thread sums the K terms of its
// outputs, in runs of kFactorRun as cpu/transform.h does, so that both devices give the same bits.
// Parallelisation: one thread block a tile of whole transform blocks (many small ones, or one large
// one). A block beyond the shared memory takes two kernels: the first does the stages within chunks
// of 2^q contiguous elements and leaves fp32 in the workspace, the second does the other stages and
// the factor on tiles [size / 2^q][kTileColumns]. Bound: shared memory, p passes of 8 bytes an
// element; memory bandwidth is out of its reach.
#include <cuda_runtime.h>

#include "kernels/cuda/device/vec.cuh"
#include "kernels/error.h"
#include "kernels/hadamard.h"

namespace quarot::cuda {
namespace {

// ---- Config ----

/// Elements of a tile of small transform blocks: 16 KiB of fp32, a few tiles a multiprocessor.
constexpr int64_t kTileElements = 4096;
/// Elements a thread handles in each pass, at most 1024 threads.
constexpr int64_t kElementsPerThread = 8;
constexpr int kMaxThreads = 1024;
/// Terms added one after the other; the same constant and meaning as in cpu/transform.h.
constexpr int kFactorRun = 16;
/// The two-kernel path: elements of a chunk at most, columns of a tile, threads.
constexpr int64_t kMaxChunk = 4096;
constexpr int64_t kTileColumns = 32;
constexpr int kColumnThreads = 256;
/// Dynamic shared memory that needs no opt-in.
constexpr int64_t kDefaultSharedBytes = 48 * 1024;
// The second kernel's tile holds max(K, K * 2^p / kMaxChunk) rows; the op's K bounds the first, n
// <= 65536 the second.
static_assert(kMaxFactorOrder * kTileColumns * 4 <= kDefaultSharedBytes);

struct Shape {
  int64_t rows, n, row_stride;
  int64_t size;        // K * power
  int64_t power;       // 2^p
  int64_t chunk;       // 2^q <= power
  int64_t per_tile;    // transform blocks a tile
  int64_t row_blocks;  // transform blocks a row
};

// ---- Device helpers ----

/// Butterfly stages with strides first, 2 * first, ..., last / 2 over tile[0, count), all powers of
/// two. Ends with a barrier.
__device__ void butterfly_stages(float* tile, int64_t count, int64_t first, int64_t last) {
  for (int64_t stride = first; stride < last; stride *= 2) {
    for (int64_t pair = threadIdx.x; pair < count / 2; pair += blockDim.x) {
      const int64_t offset = pair & (stride - 1);
      const int64_t i = 2 * (pair - offset) + offset;
      const float a = tile[i], b = tile[i + stride];
      tile[i] = a + b;
      tile[i + stride] = a - b;
    }
    __syncthreads();
  }
}

/// Sum over b of column[b * stride] * factor[b][a].
__device__ float factor_sum(const float* column, int64_t stride, const int8_t* factor, int order,
                            int a) {
  float total = 0.0f;
  for (int first = 0; first < order; first += kFactorRun) {
    const int last = min(first + kFactorRun, order);
    float run = 0.0f;
    for (int b = first; b < last; ++b) {
      run += column[b * stride] * static_cast<float>(factor[b * order + a]);
    }
    total += run;
  }
  return total;
}

// ---- Kernels ----

/// Whole transform blocks in shared memory. Grid: tiles of per_tile blocks.
template <class T>
__global__ void hadamard_kernel(T* __restrict__ out, const T* __restrict__ x, Shape s,
                                const int8_t* __restrict__ factor, int order, float scale) {
  extern __shared__ float tile[];  // [per_tile][size]
  const int64_t first_block = blockIdx.x * s.per_tile;
  const int64_t blocks = min(s.per_tile, s.rows * s.row_blocks - first_block);
  const int64_t count = blocks * s.size;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    const int64_t block = first_block + i / s.size;
    const int64_t row = block / s.row_blocks;
    const int64_t column = (block - row * s.row_blocks) * s.size + i % s.size;
    tile[i] = to_float(x[row * s.row_stride + column]);
  }
  __syncthreads();
  butterfly_stages(tile, count, 1, s.power);
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    float y = tile[i];
    if (order > 1) {
      const int64_t block = i / s.size;
      const int a = static_cast<int>((i - block * s.size) / s.power);
      y = factor_sum(tile + block * s.size + (i & (s.power - 1)), s.power, factor, order, a);
    }
    // The output is contiguous, so blocks follow each other there.
    out[first_block * s.size + i] = from_float<T>(y * scale);
  }
}

/// First of two: the stages below `chunk`. Grid: the chunks of all rows. workspace [rows, n].
template <class T>
__global__ void chunk_kernel(float* __restrict__ workspace, const T* __restrict__ x, Shape s) {
  extern __shared__ float tile[];  // [chunk]
  const int64_t row_chunks = s.n / s.chunk;
  const int64_t row = blockIdx.x / row_chunks;
  const int64_t column = (blockIdx.x - row * row_chunks) * s.chunk;
  for (int64_t i = threadIdx.x; i < s.chunk; i += blockDim.x) {
    tile[i] = to_float(x[row * s.row_stride + column + i]);
  }
  __syncthreads();
  butterfly_stages(tile, s.chunk, 1, s.chunk);
  for (int64_t i = threadIdx.x; i < s.chunk; i += blockDim.x) {
    workspace[row * s.n + column + i] = tile[i];
  }
}

/// Second of two: a transform block seen as [size / chunk][chunk]; the stages and the factor across
/// its rows, for `columns` of its columns. Grid: (chunk / columns, transform blocks).
template <class T>
__global__ void column_kernel(T* __restrict__ out, const float* __restrict__ workspace, Shape s,
                              int64_t columns, const int8_t* __restrict__ factor, int order,
                              float scale) {
  extern __shared__ float tile[];  // [size / chunk][columns]
  const int64_t base = blockIdx.y * s.size + blockIdx.x * columns;
  const int64_t count = s.size / s.chunk * columns;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    tile[i] = workspace[base + i / columns * s.chunk + i % columns];
  }
  __syncthreads();
  const int64_t segment = s.power / s.chunk * columns;  // a factor row's part of the tile
  butterfly_stages(tile, count, columns, segment);
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    const float y = order > 1 ? factor_sum(tile + i % segment, segment, factor, order,
                                           static_cast<int>(i / segment))
                              : tile[i];
    out[base + i / columns * s.chunk + i % columns] = from_float<T>(y * scale);
  }
}

// ---- Launchers ----

int64_t shared_capacity() {
  int device = 0, bytes = 0;
  QUAROT_CUDA_CHECK(cudaGetDevice(&device));
  QUAROT_CUDA_CHECK(
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

int threads_for(int64_t elements) {
  const int64_t warps = ceil_div(ceil_div(elements, kElementsPerThread), 32);
  return static_cast<int>(warps * 32 < kMaxThreads ? warps * 32 : kMaxThreads);
}

template <class T>
void launch_whole(const HadamardArgs& args, const Shape& s, cudaStream_t stream) {
  const int64_t tile = s.per_tile * s.size;
  const auto bytes = static_cast<size_t>(tile) * sizeof(float);
  if (static_cast<int64_t>(bytes) > kDefaultSharedBytes) {
    QUAROT_CUDA_CHECK(cudaFuncSetAttribute(
        hadamard_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  }
  const auto grid = static_cast<unsigned>(ceil_div(s.rows * s.row_blocks, s.per_tile));
  hadamard_kernel<T><<<grid, threads_for(tile), bytes, stream>>>(
      static_cast<T*>(args.out), static_cast<const T*>(args.x.data), s, args.matrix.factor,
      static_cast<int>(args.matrix.factor_order), args.matrix.scale);
  QUAROT_CUDA_CHECK(cudaGetLastError());
}

template <class T>
void launch_split(const HadamardArgs& args, const Shape& s, cudaStream_t stream) {
  QUAROT_ASSERT(args.workspace != nullptr, "hadamard: this size needs a workspace");
  const auto chunks = static_cast<unsigned>(s.rows * (s.n / s.chunk));
  chunk_kernel<T>
      <<<chunks, threads_for(s.chunk), static_cast<size_t>(s.chunk) * sizeof(float), stream>>>(
          args.workspace, static_cast<const T*>(args.x.data), s);
  QUAROT_CUDA_CHECK(cudaGetLastError());

  const int64_t columns = s.chunk < kTileColumns ? s.chunk : kTileColumns;
  const auto bytes = static_cast<size_t>(s.size / s.chunk * columns) * sizeof(float);
  QUAROT_ASSERT(static_cast<int64_t>(bytes) <= kDefaultSharedBytes,
                "hadamard: the size is too large");
  const int64_t blocks = s.rows * s.row_blocks;
  constexpr int64_t kMaxGridY = 65535;
  for (int64_t first = 0; first < blocks; first += kMaxGridY) {
    const int64_t some = blocks - first < kMaxGridY ? blocks - first : kMaxGridY;
    const dim3 grid(static_cast<unsigned>(s.chunk / columns), static_cast<unsigned>(some));
    column_kernel<T><<<grid, kColumnThreads, bytes, stream>>>(
        static_cast<T*>(args.out) + first * s.size, args.workspace + first * s.size, s, columns,
        args.matrix.factor, static_cast<int>(args.matrix.factor_order), args.matrix.scale);
    QUAROT_CUDA_CHECK(cudaGetLastError());
  }
}

template <class T>
void launch(const HadamardArgs& args, cudaStream_t stream) {
  const HadamardMatrix& m = args.matrix;
  const int64_t power = m.size / m.factor_order;
  Shape s{};
  s.rows = args.x.rows;
  s.n = args.x.n;
  s.row_stride = args.x.row_stride;
  s.size = m.size;
  s.power = power;
  s.chunk = power < kMaxChunk ? power : kMaxChunk;
  s.per_tile = m.size < kTileElements ? kTileElements / m.size : 1;
  s.row_blocks = args.x.n / m.size;
  if (hadamard_needs_workspace(m)) {
    launch_split<T>(args, s, stream);
  } else {
    launch_whole<T>(args, s, stream);
  }
}

}  // namespace

bool hadamard_needs_workspace(const HadamardMatrix& matrix) {
  return matrix.size * static_cast<int64_t>(sizeof(float)) > shared_capacity();
}

// ---- Dispatch ----

void hadamard(const HadamardArgs& args, Stream stream) {
  QUAROT_ASSERT(args.matrix.size >= 1 && args.x.n % args.matrix.size == 0,
                "hadamard: the size must divide the row");
  if (args.x.rows == 0 || args.x.n == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (args.x.dtype) {
    case DType::f32:
      return launch<float>(args, s);
    case DType::f16:
      return launch<__half>(args, s);
    case DType::bf16:
      return launch<__nv_bfloat16>(args, s);
  }
  QUAROT_ASSERT(false, "hadamard: no such dtype");
}

}  // namespace quarot::cuda
