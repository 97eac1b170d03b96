// rope_hadamard_kv_append on CUDA. Maths and layouts: kernels/kv_cache.h.
//
// head_kernel: head_dim = 16 L, a power of two, rotary = head_dim, transform of the whole head or
// none. L lanes hold a head; lane l has dimensions 8 l ... 8 l + 7 of each half, so that RoPE and
// all butterflies but log2 L stay in registers; the others are shuffles. A block holds a token's
// cosines and sines in registers and walks over its heads: queries, keys, values. Few tokens:
// several blocks a token.
//
// any_head_kernel: all other shapes; a warp a head, in shared memory.
//
// Bound: memory; a decode step is a few kilobytes, bound by the launch.
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device/int4.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/vec.cuh"
#include "kernels/kv_cache.h"

namespace quarot::cuda {
namespace {

// ---- Config -------------------------------------------------------------------------------------

constexpr int kThreads = 128;
constexpr float kScaleMin = 0x1p-14f;  // the smallest normal fp16
constexpr float kScaleMax = 65504.0f;  // the largest
constexpr uint16_t kNaN16 = 0x7e00;

// ---- Device helpers -----------------------------------------------------------------------------

/// Which vector a group of lanes works on: a query, a key or a value head.
struct Head {
  int64_t input;   // first element
  int64_t output;  // first element of q_out, or the slot in a cache; -1: out of the cache
  int kind;        // 0 query, 1 key, 2 value
};

__device__ __forceinline__ Head head_of(const KvAppendArgs& a, int64_t b, int64_t s, int vector) {
  const int heads = static_cast<int>(a.heads), kv_heads = static_cast<int>(a.kv_heads);
  const auto at = [&](const HeadVectors& x, int h) {
    return b * x.batch_stride + s * x.seq_stride + h * x.head_stride;
  };
  if (vector < heads) return {at(a.q, vector), ((b * a.seq + s) * heads + vector) * a.head_dim, 0};
  const bool key = vector < heads + kv_heads;
  const int h = vector - heads - (key ? 0 : kv_heads);
  const int64_t position = a.start[b] + s;
  const int64_t slot =
      position < 0 || position >= a.capacity ? -1 : (b * kv_heads + h) * a.capacity + position;
  return {at(key ? a.k : a.v, h), slot, key ? 1 : 2};
}

__device__ __forceinline__ const void* data_of(const KvAppendArgs& a, int kind) {
  return kind == 0 ? a.q.data : kind == 1 ? a.k.data : a.v.data;
}

/// The grid of a head whose range is given: codes = clamp(rint(x * inv), low, high) + shift, shift
/// the zero point.
struct KvGrid {
  Grid grid;
  uint16_t scale16;
};
__device__ __forceinline__ KvGrid kv_grid(const Range& range, float clip, int bits) {
  if (range.high >= kInfinityBits || range.low >= kInfinityBits)
    return {{0.0f, 0.0f, 0.0f, 0.0f, 0}, kNaN16};
  const float hi = __fmul_rn(clip, __int_as_float(range.high)),
              lo = -__fmul_rn(clip, __int_as_float(range.low));
  const float top = static_cast<float>((1 << bits) - 1);
  const float ratio = __fdiv_rn(__fsub_rn(hi, lo), top);
  const auto scale16 =
      static_cast<uint16_t>(pack_f16x2(fminf(fmaxf(ratio, kScaleMin), kScaleMax), 0.0f));
  const float scale = f16_to_float(scale16);
  const float inv = __fdiv_rn(1.0f, scale);
  const float zero = fminf(rintf(__fmul_rn(-lo, inv)), top);
  return {{scale, inv, -zero, top - zero, static_cast<int>(zero)}, scale16};
}

__device__ __forceinline__ void store_grid(const KvCache& cache, int64_t slot, const KvGrid& g) {
  cache.scale[slot] = g.scale16;
  cache.zero[slot] = static_cast<uint8_t>(g.grid.shift);
}

__device__ __forceinline__ void load_angles(float (&v)[kChunk], DType dtype, const void* data,
                                            int64_t i) {
  switch (dtype) {
    case DType::f32:
      return to_floats<DType::f32>(v, load_chunk<DType::f32>(data, i));
    case DType::f16:
      return to_floats<DType::f16>(v, load_chunk<DType::f16>(data, i));
    case DType::bf16:
      return to_floats<DType::bf16>(v, load_chunk<DType::bf16>(data, i));
  }
}

/// H_2 on 8 values' three index bits.
__device__ __forceinline__ void butterflies8(float (&v)[kChunk]) {
#pragma unroll
  for (int bit = 1; bit < kChunk; bit *= 2) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if ((i & bit) != 0) continue;
      const float a = v[i], b = v[i | bit];
      v[i] = a + b;
      v[i | bit] = a - b;
    }
  }
}

__device__ __forceinline__ void store_kv_codes(uint8_t* codes, int64_t i, int bits,
                                               const float (&v)[kChunk], const Grid& grid) {
  uint32_t c[kChunk];
#pragma unroll
  for (int e = 0; e < kChunk; ++e) c[e] = code_bits(v[e], grid);
  const uint2 bytes{pack_bytes(c[0], c[1], c[2], c[3]), pack_bytes(c[4], c[5], c[6], c[7])};
  if (bits == 4) {
    reinterpret_cast<uint32_t*>(codes)[i / kChunk] = pack_nibbles(bytes);
  } else {
    reinterpret_cast<uint2*>(codes)[i / kChunk] = bytes;
  }
}

// ---- Kernels ------------------------------------------------------------------------------------

/// Grid: tokens * splits. kLanes = head_dim / 16.
template <DType kDtype, int kLanes>
__global__ void __launch_bounds__(kThreads)
    head_kernel(const __grid_constant__ KvAppendArgs a, int splits) {
  constexpr int kHeadDim = 16 * kLanes;
  constexpr int kGroups = kThreads / kLanes;
  const int64_t token = blockIdx.x / static_cast<unsigned>(splits);
  const int split = static_cast<int>(blockIdx.x - token * splits);
  const int64_t b = token / a.seq, s = token - b * a.seq;
  const int lane = threadIdx.x % kLanes;
  const int vectors = static_cast<int>(a.heads + 2 * a.kv_heads);
  const int first = lane * kChunk, second = kHeadDim / 2 + first;

  float cos[2][kChunk], sin[2][kChunk];
  const int64_t angles = b * a.rotary_batch_stride + s * a.rotary;
  load_angles(cos[0], a.rotary_dtype, a.cos, angles + first);
  load_angles(cos[1], a.rotary_dtype, a.cos, angles + second);
  load_angles(sin[0], a.rotary_dtype, a.sin, angles + first);
  load_angles(sin[1], a.rotary_dtype, a.sin, angles + second);

  // All lanes of a warp stay in the loop: they shuffle together.
  for (int round = split * kGroups; round < vectors; round += splits * kGroups) {
    const int vector = round + static_cast<int>(threadIdx.x) / kLanes;
    const bool active = vector < vectors;
    const Head head = head_of(a, b, s, active ? vector : vectors - 1);
    const void* data = data_of(a, head.kind);
    float x[2][kChunk];
    to_floats<kDtype>(x[0], load_chunk<kDtype>(data, head.input + first));
    to_floats<kDtype>(x[1], load_chunk<kDtype>(data, head.input + second));
    if (head.kind != 2) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float p = x[0][i], q = x[1][i];
        x[0][i] = __fsub_rn(__fmul_rn(p, cos[0][i]), __fmul_rn(q, sin[0][i]));
        x[1][i] = __fadd_rn(__fmul_rn(q, cos[1][i]), __fmul_rn(p, sin[1][i]));
      }
    }
    if (a.matrix.size > 1) {
      float y[2][kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        y[0][i] = x[0][i] + x[1][i];
        y[1][i] = x[0][i] - x[1][i];
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        butterflies8(y[h]);
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2) {
          const float sign = (lane & step) != 0 ? -1.0f : 1.0f;
#pragma unroll
          for (int i = 0; i < kChunk; ++i) {
            y[h][i] = __fmaf_rn(y[h][i], sign, __shfl_xor_sync(kAllLanes, y[h][i], step));
          }
        }
        if (head.kind != 2) {  // values pass as they are
#pragma unroll
          for (int i = 0; i < kChunk; ++i) x[h][i] = y[h][i] * a.matrix.scale;
        }
      }
    }
    Range range = merge(range_of(x[0], false), range_of(x[1], false));
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      range = merge(range, {__shfl_xor_sync(kAllLanes, range.high, step),
                            __shfl_xor_sync(kAllLanes, range.low, step)});
    }
    if (!active) continue;
    if (head.kind == 0) {
      store_chunk<kDtype>(a.q_out, head.output + first, x[0]);
      store_chunk<kDtype>(a.q_out, head.output + second, x[1]);
    } else if (head.output >= 0) {
      const KvCache& cache = head.kind == 1 ? a.k_cache : a.v_cache;
      const KvGrid grid = kv_grid(range, head.kind == 1 ? a.k_clip : a.v_clip, a.bits);
      uint8_t* codes = cache.codes + head.output * (kHeadDim * a.bits / 8);
      store_kv_codes(codes, first, a.bits, x[0], grid.grid);
      store_kv_codes(codes, second, a.bits, x[1], grid.grid);
      if (lane == 0) store_grid(cache, head.output, grid);
    }
  }
}

/// Any shape: a warp a head. Grid: ceil(batch * seq * vectors / warps).
template <DType kDtype>
__global__ void __launch_bounds__(kThreads)
    any_head_kernel(const __grid_constant__ KvAppendArgs a) {
  __shared__ float memory[kThreads / kWarp][2][kMaxHeadDim];
  float* x = memory[threadIdx.x / kWarp][0];
  float* spare = memory[threadIdx.x / kWarp][1];
  const int lane = threadIdx.x % kWarp;
  const int vectors = static_cast<int>(a.heads + 2 * a.kv_heads), n = static_cast<int>(a.head_dim);
  const int64_t item = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t token = item / vectors;
  if (token >= a.batch * a.seq) return;  // whole warps
  const int64_t b = token / a.seq, s = token - b * a.seq;
  const Head head = head_of(a, b, s, static_cast<int>(item - token * vectors));
  const void* data = data_of(a, head.kind);
  for (int i = lane; i < n; i += kWarp) x[i] = load1<kDtype>(data, head.input + i);
  __syncwarp();

  if (head.kind != 2) {
    const int half = static_cast<int>(a.rotary / 2);
    const int64_t angles = b * a.rotary_batch_stride + s * a.rotary;
    for (int i = lane; i < half; i += kWarp) {
      const auto angle = [&](const void* table, int j) {
        return load1(a.rotary_dtype, table, angles + j);
      };
      const float p = x[i], q = x[i + half];
      x[i] = __fsub_rn(__fmul_rn(p, angle(a.cos, i)), __fmul_rn(q, angle(a.sin, i)));
      x[i + half] =
          __fadd_rn(__fmul_rn(q, angle(a.cos, i + half)), __fmul_rn(p, angle(a.sin, i + half)));
    }
    __syncwarp();
    const int order = static_cast<int>(a.matrix.factor_order);
    const int power = static_cast<int>(a.matrix.size) / order;
    for (int stride = 1; stride < power; stride *= 2) {
      for (int pair = lane; pair < n / 2; pair += kWarp) {
        const int low = pair % stride, i = (pair - low) * 2 + low;
        const float p = x[i], q = x[i + stride];
        x[i] = p + q;
        x[i + stride] = p - q;
      }
      __syncwarp();
    }
    if (order > 1) {
      for (int i = lane; i < n; i += kWarp) {
        const int column = i % power, row = i / power % order, block = i / power / order;
        float sum = 0.0f;
        for (int c = 0; c < order; ++c) {
          const float v = x[(block * order + c) * power + column];
          sum += a.matrix.factor[c * order + row] < 0 ? -v : v;
        }
        spare[i] = sum;
      }
      __syncwarp();
      for (int i = lane; i < n; i += kWarp) x[i] = spare[i];
      __syncwarp();
    }
    if (a.matrix.size > 1) {
      for (int i = lane; i < n; i += kWarp) x[i] *= a.matrix.scale;
      __syncwarp();
    }
  }

  if (head.kind == 0) {
    for (int i = lane; i < n; i += kWarp) store1<kDtype>(a.q_out, head.output + i, x[i]);
    return;
  }
  if (head.output < 0) return;
  Range range;
  for (int i = lane * kChunk; i < n; i += kWarp * kChunk) {
    const float v[kChunk] = {x[i],     x[i + 1], x[i + 2], x[i + 3],
                             x[i + 4], x[i + 5], x[i + 6], x[i + 7]};
    range = merge(range, range_of(v, false));
  }
  range = {warp_max(range.high), warp_max(range.low)};
  const KvCache& cache = head.kind == 1 ? a.k_cache : a.v_cache;
  const KvGrid grid = kv_grid(range, head.kind == 1 ? a.k_clip : a.v_clip, a.bits);
  uint8_t* codes = cache.codes + head.output * (n * a.bits / 8);
  for (int i = lane * kChunk; i < n; i += kWarp * kChunk) {
    const float v[kChunk] = {x[i],     x[i + 1], x[i + 2], x[i + 3],
                             x[i + 4], x[i + 5], x[i + 6], x[i + 7]};
    store_kv_codes(codes, i, a.bits, v, grid.grid);
  }
  if (lane == 0) store_grid(cache, head.output, grid);
}

// ---- Launchers ----------------------------------------------------------------------------------

bool is_aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

bool is_aligned(const HeadVectors& x, int64_t element) {
  return is_aligned(x.data, 16) && (x.batch_stride * element) % 16 == 0 &&
         (x.seq_stride * element) % 16 == 0 && (x.head_stride * element) % 16 == 0;
}

template <DType kDtype, int kLanes>
void launch_heads(const KvAppendArgs& args, Stream stream) {
  const int64_t tokens = args.batch * args.seq;
  const int64_t rounds = ceil_div((args.heads + 2 * args.kv_heads) * kLanes, kThreads);
  const int64_t wanted = ceil_div(int64_t{4} * device_limits().processors, tokens);
  const int splits = static_cast<int>(wanted < rounds ? wanted : rounds);
  launch(&head_kernel<kDtype, kLanes>, tokens * splits, kThreads, 0, stream, args, splits);
}

template <DType kDtype>
void append(const KvAppendArgs& args, Stream stream) {
  const int64_t element = bytes_of(kDtype), angle = bytes_of(args.rotary_dtype);
  const bool aligned = is_aligned(args.q, element) && is_aligned(args.k, element) &&
                       is_aligned(args.v, element) && is_aligned(args.q_out, 16) &&
                       is_aligned(args.cos, 16) && is_aligned(args.sin, 16) &&
                       (args.rotary_batch_stride * angle) % 16 == 0;
  const bool whole =
      args.matrix.size == 1 || (args.matrix.size == args.head_dim && args.matrix.factor_order == 1);
  if (aligned && whole && args.rotary == args.head_dim) {
    switch (args.head_dim) {
      case 32:
        return launch_heads<kDtype, 2>(args, stream);
      case 64:
        return launch_heads<kDtype, 4>(args, stream);
      case 128:
        return launch_heads<kDtype, 8>(args, stream);
      case 256:
        return launch_heads<kDtype, 16>(args, stream);
      default:
        break;
    }
  }
  const int64_t heads = args.batch * args.seq * (args.heads + 2 * args.kv_heads);
  launch(&any_head_kernel<kDtype>, ceil_div(heads, kThreads / kWarp), kThreads, 0, stream, args);
}

}  // namespace

void rope_hadamard_kv_append(const KvAppendArgs& args, Stream stream) {
  QUAROT_ASSERT(args.bits == 4 || args.bits == 8, "rope_hadamard_kv_append: bits must be 4 or 8");
  QUAROT_ASSERT(args.head_dim % kHeadDimMultiple == 0 && args.head_dim <= kMaxHeadDim,
                "rope_hadamard_kv_append: head_dim must be a multiple of 8, at most 256");
  if (args.batch * args.seq == 0) return;
  QUAROT_ASSERT(is_aligned(args.k_cache.codes, 8) && is_aligned(args.v_cache.codes, 8),
                "rope_hadamard_kv_append: k_codes and v_codes must be 8-byte aligned");
  switch (args.dtype) {
    case DType::f32:
      return append<DType::f32>(args, stream);
    case DType::f16:
      return append<DType::f16>(args, stream);
    case DType::bf16:
      return append<DType::bf16>(args, stream);
  }
  QUAROT_ASSERT(false, "rope_hadamard_kv_append: no such dtype");
}

}  // namespace quarot::cuda
