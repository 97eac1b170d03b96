// rope_hadamard_kv_append on CUDA. Maths and layouts: kernels/kv_cache.h.
//
// head_kernel: head_dim = 64, 128 or 256, rotary = head_dim, transform of the whole head or none. A
// warp works on two heads of eight tokens: the 16 rows of tensor-core tiles, lane 4 g + t having
// both heads of token g, dimensions 32 c + 8 t ... 32 c + 8 t + 7 of each half, for all c. RoPE and
// the halves' butterfly are one 2x2 matrix a pair of dimensions; the block makes its eight tokens'
// matrices once, in shared memory, and its warps go from pair of heads to pair (queries, keys,
// values), loading the next one while they work on this one. Butterflies over c stay in registers.
// The other 32 points are products with a matrix of signs, whose fragments are all the same but for
// their own sign, so that they take two registers; the other operand is a sum of two numbers of
// bf16 (16 bits, of 16-bit heads) or three (24 bits, of fp32). Few tokens: the heads are split over
// several blocks.
//
// any_head_kernel: all other shapes; a warp a head, in shared memory. (One file, if a long one: the
// two share the quantizer and the layouts.)
//
// Bound: memory; a decode step is a few kilobytes, bound by the launch.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/device/int4.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/vec.cuh"
#include "kernels/kv_cache.h"

namespace quarot::cuda {
namespace {

// ---- Config -------------------------------------------------------------------------------------

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTokens = 8;             // a block
constexpr int kBlocksWanted = 4;       // a multiprocessor, where there is enough to do
constexpr float kScaleMin = 0x1p-14f;  // the smallest normal fp16
constexpr float kScaleMax = 65504.0f;  // the largest
constexpr uint16_t kNaN16 = 0x7e00;

// ---- Device helpers -----------------------------------------------------------------------------

enum class Kind { query, key, value };

/// The grid of a head whose range is given; its codes have no sign, and `shift` is the zero point.
struct KvGrid {
  Grid grid;
  uint16_t scale16;
};
__device__ __forceinline__ KvGrid kv_grid(const Range& range, float clip, int bits) {
  if (range.high >= kInfinityBits || range.low >= kInfinityBits)
    return {{0.0f, 0.0f, 0, 0}, kNaN16};
  const float hi = __fmul_rn(clip, __int_as_float(range.high)),
              lo = -__fmul_rn(clip, __int_as_float(range.low));
  const float top = static_cast<float>((1 << bits) - 1);
  const float ratio = divide_by_steps(__fsub_rn(hi, lo), top);
  const auto scale16 =
      static_cast<uint16_t>(pack_f16x2(fminf(fmaxf(ratio, kScaleMin), kScaleMax), 0.0f));
  const float scale = f16_to_float(scale16);
  const float inv = __frcp_rn(scale);
  const float zero = fminf(rintf(__fmul_rn(-lo, inv)), top);
  return {{scale, inv, static_cast<int>(zero), (1 << bits) - 1}, scale16};
}

__device__ __forceinline__ void store_grid(const KvCache& cache, int64_t slot, const KvGrid& g) {
  cache.scale[slot] = g.scale16;
  cache.zero[slot] = static_cast<uint8_t>(g.grid.shift);
}

/// The tensor-core part of a transform: two rows' eight dimensions of each lane of four times a 32
/// x 32 matrix. Bits 0-2 of a dimension are those of the index in x, bits 3 and 4 the lane's. In a
/// product (device/mma.cuh) index bits 0 and 1 are a pair and an upper half of A's columns, bit 2
/// tells two steps apart; of the result bit 0 is a pair, bits 1 and 2 tell four products apart.
/// `signs`: the lane's pair of B for the lanes' bits and bit 0.
template <int kParts>
__device__ __forceinline__ void transform_32(float (&low)[kChunk], float (&high)[kChunk],
                                             uint32_t signs) {
  const uint32_t minus = signs ^ 0x80008000u;
  uint4 a[kParts][2];
  const auto split = [&](float (&x)[kChunk], int i, int part) {  // takes the part off x
    const uint32_t pair = pack_bf16x2(x[i], x[i + 1]);
    if (part + 1 < kParts) {
      x[i] = __fsub_rn(x[i], bf16_low(pair));
      x[i + 1] = __fsub_rn(x[i + 1], bf16_high(pair));
    }
    return pair;
  };
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      a[part][k] = {split(low, 4 * k, part), split(high, 4 * k, part), split(low, 4 * k + 2, part),
                    split(high, 4 * k + 2, part)};
    }
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    float d[4] = {};
#pragma unroll
    for (int part = kParts - 1; part >= 0; --part) {  // the smallest first
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const bool flips = k * (n / 2) % 2 != 0;
        mma_bf16(d, a[part][k], flips ? minus : signs, flips != (n % 2 != 0) ? minus : signs);
      }
    }
    low[2 * n] = d[0];
    low[2 * n + 1] = d[1];
    high[2 * n] = d[2];
    high[2 * n + 1] = d[3];
  }
}
/// The signs of transform_32: rows 2 t and 2 t + 1 of column g.
__device__ __forceinline__ uint32_t transform_signs(int g, int t) {
  const uint32_t odd = __popc(t & (g >> 1)) & 1;
  return 0x3f803f80u ^ odd * 0x80008000u ^ static_cast<uint32_t>(g & 1) << 31;
}

__device__ __forceinline__ void store_kv_codes(uint8_t* codes, int64_t i, int bits,
                                               const float (&v)[kChunk], const Grid& grid) {
  if (bits == 4) {
    reinterpret_cast<uint32_t*>(codes)[i / kChunk] = code_word<4, Rounding::any>(v, grid, 0);
  } else {
    reinterpret_cast<uint2*>(codes)[i / kChunk] = {code_word<8, Rounding::any>(v, grid, 0),
                                                   code_word<8, Rounding::any>(v + 4, grid, 0)};
  }
}

// ---- Kernels ------------------------------------------------------------------------------------

struct HeadPlan {
  int tokens;
  int splits;  // of a token's pairs of heads
  int each;    // pairs of a split
  int query_pairs, key_pairs;
  FastDiv seq;
};

/// Of kThreads, a multiprocessor: what the registers allow.
template <DType kDtype, int kChunks>
constexpr int kHeadBlocks = bytes_of(kDtype) == 4 ? (kChunks == 1 ? 3 : 2)
                            : kChunks == 4        ? 2
                            : kChunks == 2        ? 3
                                                  : 4;

/// head_dim = 64 kChunks. Grid: splits of blocks of tokens, splits of the same tokens side by side.
template <DType kDtype, int kChunks>
__global__ void __launch_bounds__(kThreads, kHeadBlocks<kDtype, kChunks>)
    head_kernel(const __grid_constant__ KvAppendArgs a, const __grid_constant__ HeadPlan plan) {
  constexpr int kHalf = 32 * kChunks, kHeadDim = 2 * kHalf;
  // Of a token's matrices; 16 bytes more, so that neighbouring tokens' lanes read other banks.
  constexpr int kStride = 4 * kHalf + 4;
  __shared__ float4 matrices[kTokens * kStride / 4];
  wait_for_previous_grid();
  start_next_grid();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int block = static_cast<int>(blockIdx.x) / plan.splits;
  const int begin = (static_cast<int>(blockIdx.x) - block * plan.splits) * plan.each;
  const int values = plan.query_pairs + plan.key_pairs;
  const int end = min(begin + plan.each, values + plan.key_pairs);
  // Lanes beyond the last token work on it, and store nothing: products take all lanes of a warp.
  const auto token_of = [&](int i) { return min(block * kTokens + i, plan.tokens - 1); };
  const int token = token_of(g);
  const bool active = block * kTokens + g == token;
  const int b = plan.seq(token), s = token - b * plan.seq.divisor();

  const auto kind_of = [&](int pair) {
    return pair < plan.query_pairs ? Kind::query : pair < values ? Kind::key : Kind::value;
  };
  const auto first_head = [&](int pair) {
    return 2 * (pair - (pair < plan.query_pairs ? 0 : pair < values ? plan.query_pairs : values));
  };
  const auto count_of = [&](Kind kind) {
    return static_cast<int>(kind == Kind::query ? a.heads : a.kv_heads);
  };
  Chunk<kDtype> raw[2][2][kChunks];  // of two heads, two halves
  const auto load = [&](int pair) {
    const Kind kind = kind_of(pair);
    const HeadVectors& x = kind == Kind::query ? a.q : kind == Kind::key ? a.k : a.v;
    const int last = count_of(kind) - 1;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t head = min(first_head(pair) + r, last);
      const char* from = static_cast<const char*>(x.data) + (b * x.batch_stride + s * x.seq_stride +
                                                             head * x.head_stride + t * kChunk) *
                                                                bytes_of(kDtype);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        raw[r][0][c] = load_chunk<kDtype>(from, 32 * c);
        raw[r][1][c] = load_chunk<kDtype>(from, kHalf + 32 * c);
      }
    }
  };
  if (begin + warp < end) load(begin + warp);

  // Dimensions p and q, half a head apart, become p m[0] + q m[1] and p m[2] + q m[3]: RoPE, and
  // with a transform its scale and the butterfly of the two.
  const bool transforms = a.matrix.size > 1;
  if (begin < values) {
    auto* m = reinterpret_cast<float*>(matrices);
    for (int i = threadIdx.x; i < kTokens * kHalf; i += kThreads) {
      const int of = token_of(i / kHalf), batch = plan.seq(of);
      const int64_t low = batch * a.rotary_batch_stride +
                          int64_t{of - batch * plan.seq.divisor()} * kHeadDim + i % kHalf;
      const auto angle = [&](const void* table, int64_t j) {
        return load1(a.rotary_dtype, table, j);
      };
      const float to_low[2] = {angle(a.cos, low), -angle(a.sin, low)};
      const float to_high[2] = {angle(a.sin, low + kHalf), angle(a.cos, low + kHalf)};
      float* to = m + i / kHalf * kStride + i % kHalf;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        to[j * kHalf] = transforms ? a.matrix.scale * (to_low[j] + to_high[j]) : to_low[j];
        to[(2 + j) * kHalf] = transforms ? a.matrix.scale * (to_low[j] - to_high[j]) : to_high[j];
      }
    }
  }
  __syncthreads();
  const uint32_t signs = transform_signs(g, t);
  const int64_t position = int64_t{a.start[b]} + s;
  bool stored = active && position >= 0 && position < a.capacity;
  TokenPlace place{};
  if (stored) place = place_of(a.pages, a.kv_heads, a.capacity, b, position);
  stored = stored && place.first >= 0;

  for (int pair = begin + warp; pair < end; pair += kWarps) {
    const Kind kind = kind_of(pair);
    float x[2][2][kChunks][kChunk];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        to_floats<kDtype>(x[r][0][c], raw[r][0][c]);
        to_floats<kDtype>(x[r][1][c], raw[r][1][c]);
      }
      if (kind == Kind::value) continue;
#pragma unroll
      for (int half = 0; half < kChunk; half += 4) {
        float m[4][4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float4 v = matrices[(g * kStride + j * kHalf + 32 * c + t * kChunk + half) / 4];
          m[j][0] = v.x;
          m[j][1] = v.y;
          m[j][2] = v.z;
          m[j][3] = v.w;
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& low = x[r][0][c][half + i];
            float& high = x[r][1][c][half + i];
            const float p = low, q = high;
            // Without a transform, rounded as kernels/kv_cache.h says.
            low = transforms ? __fmaf_rn(p, m[0][i], q * m[1][i])
                             : __fadd_rn(__fmul_rn(p, m[0][i]), __fmul_rn(q, m[1][i]));
            high = transforms ? __fmaf_rn(p, m[2][i], q * m[3][i])
                              : __fadd_rn(__fmul_rn(p, m[2][i]), __fmul_rn(q, m[3][i]));
          }
        }
      }
    }
    if (pair + kWarps < end) load(pair + kWarps);
    if (transforms && kind != Kind::value) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int step = 1; step < kChunks; step *= 2) {
#pragma unroll
          for (int c = 0; c < kChunks; ++c) {
            if ((c & step) != 0) continue;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
#pragma unroll
              for (int i = 0; i < kChunk; ++i) {
                float& low = x[r][half][c][i];
                float& high = x[r][half][c | step][i];
                const float p = low, q = high;
                low = p + q;
                high = p - q;
              }
            }
          }
        }
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          transform_32<kDtype == DType::f32 ? 3 : 2>(x[0][half][c], x[1][half][c], signs);
        }
      }
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int head = first_head(pair) + r;
      const bool exists = head < count_of(kind);
      if (kind == Kind::query) {
        if (!active || !exists) continue;
        char* to = static_cast<char*>(a.q_out) +
                   ((token * a.heads + head) * kHeadDim + t * kChunk) * bytes_of(kDtype);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          store_chunk<kDtype>(to, 32 * c, x[r][0][c]);
          store_chunk<kDtype>(to, kHalf + 32 * c, x[r][1][c]);
        }
        continue;
      }
      Range range;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        range = merge(range, merge(range_of(x[r][0][c], false), range_of(x[r][1][c], false)));
      }
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        range = merge(range, {__shfl_xor_sync(kAllLanes, range.high, step),
                              __shfl_xor_sync(kAllLanes, range.low, step)});
      }
      if (!stored || !exists) continue;
      const KvCache& cache = kind == Kind::key ? a.k_cache : a.v_cache;
      const KvGrid grid = kv_grid(range, kind == Kind::key ? a.k_clip : a.v_clip, a.bits);
      const int64_t slot = place.first + head * place.apart;
      uint8_t* codes = cache.codes + slot * (kHeadDim * a.bits / 8);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        store_kv_codes(codes, 32 * c + t * kChunk, a.bits, x[r][0][c], grid.grid);
        store_kv_codes(codes, kHalf + 32 * c + t * kChunk, a.bits, x[r][1][c], grid.grid);
      }
      if (t == 0) store_grid(cache, slot, grid);
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
  const int vector = static_cast<int>(item - token * vectors);
  const int heads = static_cast<int>(a.heads), kv_heads = static_cast<int>(a.kv_heads);
  const Kind kind = vector < heads              ? Kind::query
                    : vector < heads + kv_heads ? Kind::key
                                                : Kind::value;
  const HeadVectors& from = kind == Kind::query ? a.q : kind == Kind::key ? a.k : a.v;
  const int head = vector - (kind == Kind::query ? 0
                             : kind == Kind::key ? heads
                                                 : heads + kv_heads);
  const int64_t input = b * from.batch_stride + s * from.seq_stride + head * from.head_stride;
  for (int i = lane; i < n; i += kWarp) x[i] = load1<kDtype>(from.data, input + i);
  __syncwarp();

  if (kind != Kind::value) {
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

  if (kind == Kind::query) {
    const int64_t to = (token * heads + head) * n;
    for (int i = lane; i < n; i += kWarp) store1<kDtype>(a.q_out, to + i, x[i]);
    return;
  }
  const int64_t position = a.start[b] + s;
  if (position < 0 || position >= a.capacity) return;
  const TokenPlace place = place_of(a.pages, kv_heads, a.capacity, b, position);
  if (place.first < 0) return;
  const int64_t slot = place.first + head * place.apart;
  Range range;
  for (int i = lane * kChunk; i < n; i += kWarp * kChunk) {
    const float v[kChunk] = {x[i],     x[i + 1], x[i + 2], x[i + 3],
                             x[i + 4], x[i + 5], x[i + 6], x[i + 7]};
    range = merge(range, range_of(v, false));
  }
  range = {warp_max(range.high), warp_max(range.low)};
  const KvCache& cache = kind == Kind::key ? a.k_cache : a.v_cache;
  const KvGrid grid = kv_grid(range, kind == Kind::key ? a.k_clip : a.v_clip, a.bits);
  uint8_t* codes = cache.codes + slot * (n * a.bits / 8);
  for (int i = lane * kChunk; i < n; i += kWarp * kChunk) {
    const float v[kChunk] = {x[i],     x[i + 1], x[i + 2], x[i + 3],
                             x[i + 4], x[i + 5], x[i + 6], x[i + 7]};
    store_kv_codes(codes, i, a.bits, v, grid.grid);
  }
  if (lane == 0) store_grid(cache, slot, grid);
}

// ---- Launchers ----------------------------------------------------------------------------------

bool is_aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

bool is_aligned(const HeadVectors& x, int64_t element) {
  return is_aligned(x.data, 16) && (x.batch_stride * element) % 16 == 0 &&
         (x.seq_stride * element) % 16 == 0 && (x.head_stride * element) % 16 == 0;
}

template <DType kDtype, int kChunks>
void launch_heads(const KvAppendArgs& args, Stream stream) {
  const int64_t tokens = args.batch * args.seq;
  QUAROT_ASSERT(tokens < (int64_t{1} << 31), "rope_hadamard_kv_append: too many tokens");
  const int64_t query_pairs = ceil_div(args.heads, 2), key_pairs = ceil_div(args.kv_heads, 2);
  const int64_t pairs = query_pairs + 2 * key_pairs;
  // Enough blocks, if there are pairs for all their warps.
  const int64_t blocks = ceil_div(tokens, kTokens);
  const int64_t wanted = ceil_div(int64_t{kBlocksWanted} * device_limits().processors, blocks);
  const int64_t most = ceil_div(pairs, kWarps);
  const int64_t each = ceil_div(most, std::min(wanted, most)) * kWarps;
  const int64_t splits = ceil_div(pairs, each);
  const HeadPlan plan{static_cast<int>(tokens),    static_cast<int>(splits),
                      static_cast<int>(each),      static_cast<int>(query_pairs),
                      static_cast<int>(key_pairs), FastDiv(static_cast<int>(args.seq))};
  launch_early(&head_kernel<kDtype, kChunks>, blocks * splits, kThreads, 0, stream, args, plan);
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
      case 64:
        return launch_heads<kDtype, 1>(args, stream);
      case 128:
        return launch_heads<kDtype, 2>(args, stream);
      case 256:
        return launch_heads<kDtype, 4>(args, stream);
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
