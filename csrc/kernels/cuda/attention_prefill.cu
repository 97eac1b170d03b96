// What torch's attention needs for many queries over the quantized cache: 16- or 32-bit keys and
// values, a mask where is_causal cannot say who sees what, and then zeros for queries that see
// nothing and NaN for those that see a broken token: torch adds masks, so that a NaN key, masked,
// is still NaN.
// Layouts: kernels/attention.h, kernels/kv_cache.h.
//
// dequantize_kv_kernel: a thread takes 8 elements of a key and of a value. visible_kernel: a block
// takes a query's row; mend_kernel: a warp one of an output. Bound: memory, mostly what is written.
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/vec.cuh"

namespace quarot::cuda {
namespace {

constexpr int kThreads = 256;

// ---- Keys and values ----------------------------------------------------------------------------

/// Chunk `chunk` of a slot's codes, dequantized.
template <int kBits>
__device__ __forceinline__ void dequantize_chunk(float (&v)[kChunk], const KvCacheView& cache,
                                                 int64_t slot, int64_t chunk, float scale) {
  constexpr int kWords = kBits / 4;  // of a chunk
  const auto* words = reinterpret_cast<const uint32_t*>(cache.codes) + chunk * kWords;
  const float zero = static_cast<float>(cache.zero[slot]);
  uint32_t codes[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) codes[w] = words[w];
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    const uint32_t code = codes[e * kBits / 32] >> (e * kBits % 32) & ((1u << kBits) - 1);
    v[e] = (static_cast<float>(code) - zero) * scale;
  }
}

/// A thread: a chunk of a token's key and of its value.
template <DType kDtype, int kBits>
__global__ void __launch_bounds__(kThreads)
    dequantize_kv_kernel(const __grid_constant__ DequantizeKvArgs a, FastDiv chunks, FastDiv tokens,
                         FastDiv kv_heads) {
  wait_for_previous_grid();
  start_next_grid();
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  const int vector = chunks(i), chunk = i - vector * chunks.divisor();
  const int pair = tokens(vector), token = vector - pair * tokens.divisor();
  if (pair >= a.pairs) return;
  const int cache_pair = static_cast<int>(a.first) + pair;
  const int b = kv_heads(cache_pair), head = cache_pair - b * kv_heads.divisor();
  const int64_t length = a.lengths == nullptr ? a.length : a.lengths[b];
  const int64_t at = max(length + a.start, int64_t{0}) + token;

  float key[kChunk] = {}, value[kChunk] = {};
  bool broken = false;
  if (at < min(length, a.capacity)) {
    const TokenPlace place = place_of(a.pages, a.kv_heads, a.capacity, b, at);
    broken = place.first < 0;
    if (!broken) {
      const int64_t slot = place.first + head * place.apart;
      const int64_t from = slot * chunks.divisor() + chunk;
      const float k_scale = f16_to_float(a.k.scale[slot]), v_scale = f16_to_float(a.v.scale[slot]);
      dequantize_chunk<kBits>(key, a.k, slot, from, k_scale);
      dequantize_chunk<kBits>(value, a.v, slot, from, v_scale);
      broken = !(fabsf(k_scale) < INFINITY && fabsf(v_scale) < INFINITY);
    }
  }
  if (broken) {
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      key[e] = a.broken == nullptr ? NAN : 0.0f;
      value[e] = 0.0f;
    }
  }
  store_chunk<kDtype>(a.keys, int64_t{i} * kChunk, key);
  store_chunk<kDtype>(a.values, int64_t{i} * kChunk, value);
  if (a.broken == nullptr || chunk != 0) return;
  a.broken[vector] = broken;
  if (broken) a.any_broken[pair] = 1;
}

template <DType kDtype>
void launch_dequantize(const DequantizeKvArgs& a, Stream stream) {
  const auto chunks = static_cast<int>(a.head_dim / kChunk);
  const int64_t count = a.pairs * a.tokens * chunks;
  QUAROT_ASSERT(count < (int64_t{1} << 31) - kThreads,
                "dequantize_kv: too many tokens for one call");
  launch_early(a.bits == 4 ? &dequantize_kv_kernel<kDtype, 4> : &dequantize_kv_kernel<kDtype, 8>,
               ceil_div(count, int64_t{kThreads}), kThreads, 0, stream, a, FastDiv(chunks),
               FastDiv(static_cast<int>(a.tokens)), FastDiv(static_cast<int>(a.kv_heads)));
}

// ---- Masks --------------------------------------------------------------------------------------

/// Grid: batch * heads * seq.
__global__ void __launch_bounds__(kThreads) visible_kernel(const __grid_constant__ VisibleArgs a) {
  const int64_t row = blockIdx.x;
  const int64_t s = row % a.seq, h = row / a.seq % a.heads, b = row / a.seq / a.heads;
  const int64_t length = a.lengths == nullptr ? a.length : a.lengths[b];
  const int64_t first = max(length + a.start, int64_t{0}), last = length + a.offset + s - first;
  const bool* mask = a.mask == nullptr ? nullptr
                                       : a.mask + b * a.mask_batch_stride + h * a.mask_head_stride +
                                             s * a.mask_seq_stride;
  bool any = false;
  for (int64_t j = threadIdx.x; j < a.keys; j += kThreads) {
    const bool visible = j <= last && j > last - a.window &&
                         (mask == nullptr || (first + j < a.mask_keys && mask[first + j]));
    a.visible[row * a.keys + j] = visible;
    any = any || visible;
  }
  any = __syncthreads_or(any);
  if (threadIdx.x == 0) a.any[row] = any;
}

/// Grid: batch * seq * heads.
template <DType kDtype>
__global__ void __launch_bounds__(kWarp) mend_kernel(const __grid_constant__ MendArgs a) {
  const int64_t row = blockIdx.x;
  const int64_t h = row % a.heads, s = row / a.heads % a.seq, b = row / a.heads / a.seq;
  const int64_t seen_row = (b * a.mask_heads + h % a.mask_heads) * a.seq + s;
  const int64_t pair = b * a.heads + h;
  float value = 0.0f;
  if (a.any[seen_row]) {
    if (a.any_broken[pair] == 0) return;
    bool broken = false;
    for (int64_t j = threadIdx.x; j < a.keys; j += kWarp) {
      broken = broken || (a.visible[seen_row * a.keys + j] && a.broken[pair * a.keys + j]);
    }
    if (!__any_sync(kAllLanes, broken)) return;
    value = NAN;
  }
  const int64_t at = b * a.batch_stride + s * a.seq_stride + h * a.head_stride;
  for (int64_t i = threadIdx.x; i < a.head_dim; i += kWarp) store1<kDtype>(a.out, at + i, value);
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

void mend_rows(const MendArgs& args, Stream stream) {
  const auto kernel = args.dtype == DType::f32   ? &mend_kernel<DType::f32>
                      : args.dtype == DType::f16 ? &mend_kernel<DType::f16>
                                                 : &mend_kernel<DType::bf16>;
  launch(kernel, args.batch * args.seq * args.heads, kWarp, 0, stream, args);
}

}  // namespace quarot::cuda
