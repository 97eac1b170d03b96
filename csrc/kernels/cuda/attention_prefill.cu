// What torch's attention needs for many queries over the quantized cache: 16- or 32-bit keys and
// values, a mask where is_causal cannot say who sees what, and zeros for queries that see nothing.
// Layouts: kernels/attention.h, kernels/kv_cache.h.
//
// dequantize_kv_kernel: a thread takes 8 elements of a vector, keys in one half of the grid, values
// in the other. visible_kernel: a block takes a query's row. Bound: memory, mostly what is written.
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/vec.cuh"

namespace quarot::cuda {
namespace {

constexpr int kThreads = 256;

// ---- Keys and values ----------------------------------------------------------------------------

/// `half`: blocks that take keys.
template <DType kDtype, int kBits>
__global__ void __launch_bounds__(kThreads)
    dequantize_kv_kernel(const __grid_constant__ DequantizeKvArgs a, unsigned half, FastDiv chunks,
                         FastDiv tokens, FastDiv kv_heads) {
  const bool value = blockIdx.x >= half;
  const int i = static_cast<int>((value ? blockIdx.x - half : blockIdx.x) * kThreads + threadIdx.x);
  const int vector = chunks(i), chunk = i - vector * chunks.divisor();
  const int pair = tokens(vector), token = vector - pair * tokens.divisor();
  if (pair >= a.pairs) return;
  const int cache_pair = static_cast<int>(a.first) + pair;

  float v[kChunk] = {};
  if (a.lengths == nullptr || token < a.lengths[kv_heads(cache_pair)]) {
    const int64_t slot = cache_pair * a.capacity + token;
    const KvCacheView& cache = value ? a.v : a.k;
    const float v_scale = f16_to_float(a.v.scale[slot]);
    const float poison = v_scale - v_scale;  // 0, or NaN where it is not finite
    const float own = f16_to_float(cache.scale[slot]);
    const float scale = !value ? own + poison : poison == 0.0f ? own : 0.0f;
    const float zero = static_cast<float>(cache.zero[slot]);
    constexpr int kWords = kBits / 4;  // of a chunk
    const auto* words =
        reinterpret_cast<const uint32_t*>(cache.codes) + (slot * chunks.divisor() + chunk) * kWords;
    uint32_t codes[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) codes[w] = words[w];
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      const uint32_t code = codes[e * kBits / 32] >> (e * kBits % 32) & ((1u << kBits) - 1);
      v[e] = (static_cast<float>(code) - zero) * scale;
    }
  }
  store_chunk<kDtype>(value ? a.values : a.keys, int64_t{i} * kChunk, v);
}

template <DType kDtype>
void launch_dequantize(const DequantizeKvArgs& a, Stream stream) {
  const auto chunks = static_cast<int>(a.head_dim / kChunk);
  const int64_t count = a.pairs * a.tokens * chunks;
  QUAROT_ASSERT(count < (int64_t{1} << 31) - kThreads,
                "dequantize_kv: too many tokens for one call");
  const int64_t half = ceil_div(count, int64_t{kThreads});
  launch(a.bits == 4 ? &dequantize_kv_kernel<kDtype, 4> : &dequantize_kv_kernel<kDtype, 8>,
         2 * half, kThreads, 0, stream, a, static_cast<unsigned>(half), FastDiv(chunks),
         FastDiv(static_cast<int>(a.tokens)), FastDiv(static_cast<int>(a.kv_heads)));
}

// ---- Masks --------------------------------------------------------------------------------------

/// Grid: batch * heads * seq.
__global__ void __launch_bounds__(kThreads) visible_kernel(const __grid_constant__ VisibleArgs a) {
  const int64_t row = blockIdx.x;
  const int64_t s = row % a.seq, h = row / a.seq % a.heads, b = row / a.seq / a.heads;
  const int64_t length = a.lengths == nullptr ? a.length : a.lengths[b];
  const int64_t last = length + a.offset + s;
  const bool* mask = a.mask == nullptr ? nullptr
                                       : a.mask + b * a.mask_batch_stride + h * a.mask_head_stride +
                                             s * a.mask_seq_stride;
  bool any = false;
  for (int64_t j = threadIdx.x; j < a.keys; j += kThreads) {
    const bool visible = j <= last && (mask == nullptr || mask[j]);
    a.visible[row * a.keys + j] = visible;
    any = any || visible;
  }
  any = __syncthreads_or(any);
  if (threadIdx.x == 0) a.any[row] = any;
}

/// Grid: batch * seq * heads.
template <DType kDtype>
__global__ void __launch_bounds__(kWarp)
    zero_unseen_kernel(const __grid_constant__ ZeroUnseenArgs a) {
  const int64_t row = blockIdx.x;
  const int64_t h = row % a.heads, s = row / a.heads % a.seq, b = row / a.heads / a.seq;
  if (a.any[(b * a.mask_heads + h % a.mask_heads) * a.seq + s]) return;
  const int64_t at = b * a.batch_stride + s * a.seq_stride + h * a.head_stride;
  for (int64_t i = threadIdx.x; i < a.head_dim; i += kWarp) store1<kDtype>(a.out, at + i, 0.0f);
}

}  // namespace

void dequantize_kv(const DequantizeKvArgs& args, Stream stream) {
  switch (args.dtype) {
    case DType::f32:
      return launch_dequantize<DType::f32>(args, stream);
    case DType::f16:
      return launch_dequantize<DType::f16>(args, stream);
    case DType::bf16:
      return launch_dequantize<DType::bf16>(args, stream);
  }
  QUAROT_ASSERT(false, "dequantize_kv: no such dtype");
}

void visible_keys(const VisibleArgs& args, Stream stream) {
  launch(&visible_kernel, args.batch * args.heads * args.seq, kThreads, 0, stream, args);
}

void zero_unseen(const ZeroUnseenArgs& args, Stream stream) {
  const auto kernel = args.dtype == DType::f32   ? &zero_unseen_kernel<DType::f32>
                      : args.dtype == DType::f16 ? &zero_unseen_kernel<DType::f16>
                                                 : &zero_unseen_kernel<DType::bf16>;
  launch(kernel, args.batch * args.seq * args.heads, kWarp, 0, stream, args);
}

}  // namespace quarot::cuda
