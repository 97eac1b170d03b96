// rope_hadamard_kv_append on CUDA. Maths and layouts: kernels/kv_cache.h.
//
// head_kernel: head_dim = 16 L, a power of two, rotary = head_dim, transform of the whole head or
// none. A team of L lanes works on a token: it holds its cosines and sines in registers and goes
// from head to head (queries, keys, values), while the next kAhead ones are on their way into
// shared memory, to the threads that asked for them: no barrier. Lane l has dimensions 8 l ... 8 l
// + 7 of each half of a head, so that RoPE and all butterflies but log2 L stay in registers; the
// others are shuffles. Few tokens: the heads are split over several teams, in different blocks.
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
constexpr int kAhead = 3;          // heads in flight
constexpr int kBlocksWanted = 48;  // a multiprocessor, where there is enough to do
constexpr int64_t kLeastHeads = 12;
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

/// A head, x[2][8] of each of kLanes lanes, times H, unscaled, but for the halves' butterfly; all
/// lanes of a warp.
template <int kLanes>
__device__ __forceinline__ void transform_halves(float (&x)[2][kChunk], int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int bit = 1; bit < kChunk; bit *= 2) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if ((i & bit) != 0) continue;
        const float a = x[h][i], b = x[h][i | bit];
        x[h][i] = a + b;
        x[h][i | bit] = a - b;
      }
    }
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      const float sign = (lane & step) != 0 ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        x[h][i] = __fmaf_rn(x[h][i], sign, __shfl_xor_sync(kAllLanes, x[h][i], step));
      }
    }
  }
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

__device__ __forceinline__ void load_angles(float (&v)[kChunk], DType dtype, const void* data,
                                            int64_t i) {
  switch (dtype) {
    case DType::f32:
      to_floats<DType::f32>(v, load_chunk<DType::f32>(data, i));
      break;
    case DType::f16:
      to_floats<DType::f16>(v, load_chunk<DType::f16>(data, i));
      break;
    case DType::bf16:
      to_floats<DType::bf16>(v, load_chunk<DType::bf16>(data, i));
      break;
  }
}

struct HeadPlan {
  int tokens;
  int splits;  // of a token's heads
  int each;    // heads of a split
  FastDiv seq;
};

/// kLanes = head_dim / 16. Grid: splits of blocks of tokens, splits of the same tokens side by
/// side.
template <DType kDtype, int kLanes>
__global__ void __launch_bounds__(kThreads, 5)
    head_kernel(const __grid_constant__ KvAppendArgs a, const __grid_constant__ HeadPlan plan) {
  constexpr int kHeadDim = 16 * kLanes;
  // A thread's chunks, of two halves, are its own: [kAhead][words][kThreads].
  constexpr int kWords = sizeof(Chunk<kDtype>) / sizeof(uint4);
  __shared__ uint4 ring[kAhead][2 * kWords][kThreads];
  wait_for_previous_grid();
  start_next_grid();
  const int heads = static_cast<int>(a.heads), kv_heads = static_cast<int>(a.kv_heads);
  const int block = static_cast<int>(blockIdx.x) / plan.splits;
  const int begin = (static_cast<int>(blockIdx.x) - block * plan.splits) * plan.each;
  const int end = min(begin + plan.each, heads + 2 * kv_heads);
  // Teams beyond the last token work on it, and store nothing: all lanes of a warp shuffle
  // together.
  const int wanted = block * (kThreads / kLanes) + static_cast<int>(threadIdx.x) / kLanes;
  const int token = min(wanted, plan.tokens - 1);
  const bool active = wanted == token;
  const int b = plan.seq(token), s = token - b * plan.seq.divisor();
  const int lane = threadIdx.x % kLanes;
  const int first = lane * kChunk;

  const auto start_of = [&](const HeadVectors& x) {
    return static_cast<const char*>(x.data) +
           (b * x.batch_stride + s * x.seq_stride + first) * bytes_of(kDtype);
  };
  const char* from = nullptr;
  const auto load_next = [&](int head) {
    if (head < end) {
      const int values = heads + kv_heads;
      const int of_kind = head < heads ? 0 : head < values ? heads : values;
      const HeadVectors& x = head < heads ? a.q : head < values ? a.k : a.v;
      if (head == begin || head == of_kind) {
        from = start_of(x) + (head - of_kind) * x.head_stride * bytes_of(kDtype);
      } else {
        from += x.head_stride * bytes_of(kDtype);
      }
      uint4(&slot)[2 * kWords][kThreads] = ring[static_cast<unsigned>(head - begin) % kAhead];
#pragma unroll
      for (int w = 0; w < 2 * kWords; ++w) {
        cp_async_16(shared_address(&slot[w][threadIdx.x]),
                    from + (w / kWords * (kHeadDim / 2) * bytes_of(kDtype) + w % kWords * 16));
      }
    }
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load_next(begin + i);

  const int64_t position = int64_t{a.start[b]} + s;
  bool stored = active && position >= 0 && position < a.capacity;
  TokenPlace place{};
  if (stored) place = place_of(a.pages, kv_heads, a.capacity, b, position);
  stored = stored && place.first >= 0;
  char* q_out = static_cast<char*>(a.q_out) +
                ((int64_t{token} * heads + begin) * kHeadDim + first) * bytes_of(kDtype);
  // Dimensions p and q, half a head apart, become p m[0] + q m[1] and p m[2] + q m[3]: RoPE, and
  // with a transform its scale and the butterfly of the two.
  float m[4][kChunk];
  const bool transforms = a.matrix.size > 1;
  if (begin < heads + kv_heads) {
    const int64_t low = b * a.rotary_batch_stride + int64_t{s} * kHeadDim + first;
    const int64_t high = low + kHeadDim / 2;
    load_angles(m[0], a.rotary_dtype, a.cos, low);
    load_angles(m[1], a.rotary_dtype, a.sin, low);
    load_angles(m[2], a.rotary_dtype, a.sin, high);
    load_angles(m[3], a.rotary_dtype, a.cos, high);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float to_low[2] = {m[0][i], -m[1][i]}, to_high[2] = {m[2][i], m[3][i]};
      m[1][i] = to_low[1];
      if (!transforms) continue;
      m[0][i] = a.matrix.scale * (to_low[0] + to_high[0]);
      m[1][i] = a.matrix.scale * (to_low[1] + to_high[1]);
      m[2][i] = a.matrix.scale * (to_low[0] - to_high[0]);
      m[3][i] = a.matrix.scale * (to_low[1] - to_high[1]);
    }
  }

  // Works on heads [from, to) of a kind; `first_head` is the kind's first one.
  const auto run = [&](auto kind, int first_head, int from, int to) {
    constexpr Kind kKind = decltype(kind)::value;
    for (int head = from; head < to; ++head) {
      cp_async_wait<kAhead - 1>();
      Chunk<kDtype> raw[2];
#pragma unroll
      for (int w = 0; w < 2 * kWords; ++w) {
        raw[w / kWords].words[w % kWords] =
            ring[static_cast<unsigned>(head - begin) % kAhead][w][threadIdx.x];
      }
      float x[2][kChunk];
      to_floats<kDtype>(x[0], raw[0]);
      to_floats<kDtype>(x[1], raw[1]);
      load_next(head + kAhead);  // where this head was: its values are in registers
      if constexpr (kKind != Kind::value) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const float p = x[0][i], q = x[1][i];
          // Without a transform, rounded as kernels/kv_cache.h says.
          x[0][i] = transforms ? __fmaf_rn(p, m[0][i], q * m[1][i])
                               : __fadd_rn(__fmul_rn(p, m[0][i]), __fmul_rn(q, m[1][i]));
          x[1][i] = transforms ? __fmaf_rn(p, m[2][i], q * m[3][i])
                               : __fadd_rn(__fmul_rn(p, m[2][i]), __fmul_rn(q, m[3][i]));
        }
        if (transforms) transform_halves<kLanes>(x, lane);
      }
      if constexpr (kKind == Kind::query) {
        if (active) {
          store_chunk<kDtype>(q_out, 0, x[0]);
          store_chunk<kDtype>(q_out, kHeadDim / 2, x[1]);
        }
        q_out += kHeadDim * bytes_of(kDtype);
      } else {
        Range range;
        if constexpr (kKind == Kind::value && kDtype != DType::f32) {
          PairRange<kDtype> pairs;
          for (const Chunk<kDtype>& chunk : raw) pairs.add(chunk.words[0]);
          range = pairs.range(false);
        } else {
          range = merge(range_of(x[0], false), range_of(x[1], false));
        }
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2) {
          range = merge(range, {__shfl_xor_sync(kAllLanes, range.high, step),
                                __shfl_xor_sync(kAllLanes, range.low, step)});
        }
        const KvCache& cache = kKind == Kind::key ? a.k_cache : a.v_cache;
        const KvGrid grid = kv_grid(range, kKind == Kind::key ? a.k_clip : a.v_clip, a.bits);
        const int64_t slot = place.first + (head - first_head) * place.apart;
        if (!stored) continue;
        uint8_t* codes = cache.codes + slot * (kHeadDim * a.bits / 8);
        store_kv_codes(codes, first, a.bits, x[0], grid.grid);
        store_kv_codes(codes, first + kHeadDim / 2, a.bits, x[1], grid.grid);
        if (lane == 0) store_grid(cache, slot, grid);
      }
    }
  };
  const int keys = heads, values = heads + kv_heads;
  run(std::integral_constant<Kind, Kind::query>{}, 0, begin, min(end, keys));
  run(std::integral_constant<Kind, Kind::key>{}, keys, max(begin, keys), min(end, values));
  run(std::integral_constant<Kind, Kind::value>{}, values, max(begin, values), end);
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

template <DType kDtype, int kLanes>
void launch_heads(const KvAppendArgs& args, Stream stream) {
  const int64_t tokens = args.batch * args.seq, heads = args.heads + 2 * args.kv_heads;
  QUAROT_ASSERT(tokens < (int64_t{1} << 31), "rope_hadamard_kv_append: too many tokens");
  const int64_t blocks = ceil_div(tokens, kThreads / kLanes);
  // Enough blocks: a team works on kLeastHeads at least, since each loads the angles.
  const int64_t wanted = ceil_div(int64_t{kBlocksWanted} * device_limits().processors, blocks);
  const int64_t most = blocks > device_limits().processors ? heads / kLeastHeads : heads;
  const int64_t each = ceil_div(heads, std::max(int64_t{1}, std::min(wanted, most)));
  const int64_t splits = ceil_div(heads, each);
  const HeadPlan plan{static_cast<int>(tokens), static_cast<int>(splits), static_cast<int>(each),
                      FastDiv(static_cast<int>(args.seq))};
  launch_early(&head_kernel<kDtype, kLanes>, blocks * splits, kThreads, 0, stream, args, plan);
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
