// head_hadamard_quantize on CUDA. Maths: kernels/fused_quantize.h and kernels/quantize.h.
//
// A row is a matrix x [heads, head_dim]; its transform H^T x takes no more than heads products an
// element, so that all of H goes to the tensor cores as a matrix of signs: tiles of 16 x 16 heads.
// 16-bit x is an operand as it is, and fp32 x is the sum of three of bf16 (8 + 8 + 8 bits), so that
// every product is exact, and the sums are fp32.
//
// Layout. H^T is the A operand, its fragments in shared memory, made once a block. x is B, straight
// from memory: a lane of column g = lane / 4 of a fragment and of rows 2 t, 2 t + 1, 2 t + 8, 2 t +
// 9, t = lane % 4, loads kColumns neighbouring columns of these heads: column kColumns g + i of x
// is column g of fragment i. Of the products the lane then has, over all i, the 2 kColumns
// neighbouring columns from 2 kColumns t on, of heads g and g + 8 of each tile: codes to store at
// once.
//
// Parallelisation. A block works on a row at a time, a warp on all heads of 8 kColumns columns.
// When the products are made, the next row is on its way into the same registers. The ranges of a
// row's groups are collected in shared memory; maxima do not depend on their order.
//
// Bound: memory; about 7 instructions an element of 16 bits.
//
// More than 128 heads: device/transform.cuh, ending in QuantizeSink; no transform: device/rows.cuh;
// what these do not take (odd addresses, lengths, groups): device/any_transform.cuh.
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "kernels/cuda/device/any_transform.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/rows.cuh"
#include "kernels/cuda/device/sinks.cuh"
#include "kernels/cuda/device/sources.cuh"
#include "kernels/cuda/device/transform.cuh"
#include "kernels/fused_quantize.h"

namespace quarot::cuda {
namespace {

// ---- Config -------------------------------------------------------------------------------------

constexpr int kTile = 16;
constexpr int kMaxTiles = 8;
constexpr int kMaxWarps = 8;

template <DType kType, int kCount>
struct HeadShape {
  static constexpr DType kDtype = kType;
  static constexpr int kTiles = kCount;  // of H, each way
  static constexpr int kSureHeads = kTiles <= 4 ? (kTiles - 1) * kTile : (kTiles - 2) * kTile;
  /// Columns that a lane loads: as many as the registers allow, since few warps with much to do
  /// came out ahead of many.
  static constexpr int kColumns = kDtype == DType::f32 || kTiles > 4 ? 4 : 8;
  static constexpr int kWords = kColumns * bytes_of(kDtype) / 4;
  static constexpr int kRun = 2 * kColumns;  // columns that a lane quantizes
  static constexpr int kWarpColumns = 8 * kColumns;
  static constexpr DType kOperand = kDtype == DType::f16 ? DType::f16 : DType::bf16;
  static constexpr int kParts = kDtype == DType::f32 ? 3 : 1;  // operands that sum up to x
  /// What is loaded and the sums: two blocks if the rest of a half of the registers is enough.
  static constexpr int kRegisters = kTiles * 4 * (kWords + kColumns);
  static constexpr int kBlocks =
      kRegisters + 8 * kParts <= 104 ? 2 : 1;  // of kMaxWarps, a multiprocessor
};

struct HeadPlan {
  const char* x;
  int64_t row_bytes;  // from row to row
  int64_t rows;
  int heads, head_dim;
  int groups;          // of a row
  FastDiv group_runs;  // runs of a group
  FastDiv size;        // of the transform, in heads
  int order, log_power;
  const int8_t* factor;
  float scale;
};

struct RangeSlot {
  int high, low;
};

// ---- Device helpers -----------------------------------------------------------------------------

/// Element (to, from) of H^T as bits of kOperand, 0 beyond the heads and outside the blocks.
/// Without branches: several elements' factors are loaded at once.
template <DType kOperand, bool kFactor, bool kBlocks>
__device__ __forceinline__ uint32_t sign_of(const HeadPlan& p, int to, int from) {
  bool inside = to < p.heads && from < p.heads;
  to = min(to, p.heads - 1);
  from = min(from, p.heads - 1);
  if constexpr (kBlocks) {
    const int block = p.size(to), first = block * p.size.divisor();
    inside = inside && block == p.size(from);
    to -= first;
    from = inside ? from - first : 0;
  }
  uint32_t negative = __popc(to & from & ((1 << p.log_power) - 1)) & 1;
  if constexpr (kFactor) {
    negative ^= p.factor[(from >> p.log_power) * p.order + (to >> p.log_power)] < 0;
  }
  return inside ? sign_bits<kOperand>(1) | negative << 15 : 0;
}

/// Fragment words of the signs: tile (m, k) at [(m * kTiles + k) * kWarp + lane].
template <class Shape, bool kFactor, bool kBlocks>
__device__ __forceinline__ void make_signs(const HeadPlan& p, uint4* signs, int g, int t) {
  const int first = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (int tile = first; tile < Shape::kTiles * Shape::kTiles; tile += warps) {
    const int to = tile / Shape::kTiles * kTile + g, from = tile % Shape::kTiles * kTile + 2 * t;
    const auto pair = [&](int row, int column) {
      return sign_of<Shape::kOperand, kFactor, kBlocks>(p, row, column) |
             sign_of<Shape::kOperand, kFactor, kBlocks>(p, row, column + 1) << 16;
    };
    signs[tile * kWarp + threadIdx.x % kWarp] = {pair(to, from), pair(to + 8, from),
                                                 pair(to, from + 8), pair(to + 8, from + 8)};
  }
}

template <int kWords>
__device__ __forceinline__ void load_words(uint32_t (&words)[kWords], const char* from) {
  static_assert(kWords == 2 || kWords % 4 == 0);
  if constexpr (kWords == 2) {
    const uint2 v = load_once(reinterpret_cast<const uint2*>(from));
    words[0] = v.x;
    words[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 v = load_once(reinterpret_cast<const uint4*>(from) + i / 4);
      words[i] = v.x;
      words[i + 1] = v.y;
      words[i + 2] = v.z;
      words[i + 3] = v.w;
    }
  }
}

/// Operand `part` of element `column` of two rows as a pair; the smallest part of fp32 comes first.
template <class Shape>
__device__ __forceinline__ uint32_t operand(const uint32_t (&low)[Shape::kWords],
                                            const uint32_t (&high)[Shape::kWords], int column,
                                            int part) {
  if constexpr (Shape::kDtype == DType::f32) {
    const auto cut = [part](uint32_t bits) {  // part 2: the highest 8 bits of x; 1: the next ones
      for (int p = 2; p > part; --p) {
        const float x = __uint_as_float(bits);
        bits = __float_as_uint(__fsub_rn(x, __uint_as_float(bits & 0xffff0000u)));
      }
      return bits;
    };
    return __byte_perm(cut(low[column]), cut(high[column]), 0x7632);
  } else {
    return __byte_perm(low[column / 2], high[column / 2], column % 2 == 0 ? 0x5410 : 0x7632);
  }
}

// ---- Kernel -------------------------------------------------------------------------------------

/// kGrouped: a scale a group, not a row.
template <class Shape, bool kGrouped>
__global__ void __launch_bounds__(kMaxWarps* kWarp, Shape::kBlocks)
    head_kernel(const __grid_constant__ HeadPlan p, const __grid_constant__ QuantizedRows out) {
  constexpr int kTiles = Shape::kTiles, kColumns = Shape::kColumns, kRun = Shape::kRun;
  auto* signs = reinterpret_cast<uint4*>(dynamic_shared());
  // Ranges of groups, then their grids; or two rows' ranges of warps.
  auto* slots = reinterpret_cast<RangeSlot*>(signs + kTiles * kTiles * kWarp);
  auto* grids = reinterpret_cast<Grid*>(slots + p.groups + p.groups % 2);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int loaded = warp * Shape::kWarpColumns + g * kColumns;
  const int column = warp * Shape::kWarpColumns + t * kRun;
  const bool symmetric = out.zero == nullptr;
  wait_for_previous_grid();
  start_next_grid();

  uint32_t raw[kTiles][4][Shape::kWords] = {};
  const int64_t head_bytes = int64_t{p.head_dim} * bytes_of(Shape::kDtype);
  const char* const lane_x = p.x + 2 * t * head_bytes + loaded * bytes_of(Shape::kDtype);
  const auto load = [&](int64_t row) {
    if (loaded >= p.head_dim) return;
    const char* from = lane_x + row * p.row_bytes;
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int head = k * kTile + r % 2 + r / 2 * 8;  // and 2 t
        if ((k + 1) * kTile <= Shape::kSureHeads || head + 2 * t < p.heads) {
          load_words(raw[k][r], from + head * head_bytes);
        }
      }
    }
  };
  int64_t row = blockIdx.x;
  load(row);
  if (p.size.divisor() < p.heads) {
    p.order > 1 ? make_signs<Shape, true, true>(p, signs, g, t)
                : make_signs<Shape, false, true>(p, signs, g, t);
  } else {
    p.order > 1 ? make_signs<Shape, true, false>(p, signs, g, t)
                : make_signs<Shape, false, false>(p, signs, g, t);
  }
  if constexpr (kGrouped) {
    for (int i = threadIdx.x; i < p.groups; i += blockDim.x) slots[i] = {0, 0};
  }
  __syncthreads();

  const int warps = blockDim.x / kWarp;
  const bool has_columns = column < p.head_dim;
  const int lane_run = (g * p.head_dim + column) / kRun, run_stride = 8 * p.head_dim / kRun;
  RangeSlot* own = slots;
  for (bool odd = false; row < p.rows; row += gridDim.x, odd = !odd) {
    if constexpr (!kGrouped) own = slots + (odd ? warps : 0);

    float sums[kTiles][kColumns][4] = {};
#pragma unroll
    for (int part = 0; part < Shape::kParts; ++part) {
#pragma unroll
      for (int k = 0; k < kTiles; ++k) {
        uint32_t b[kColumns][2];
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          b[i][0] = operand<Shape>(raw[k][0], raw[k][1], i, part + 3 - Shape::kParts);
          b[i][1] = operand<Shape>(raw[k][2], raw[k][3], i, part + 3 - Shape::kParts);
        }
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          const uint4 a = signs[(m * kTiles + k) * kWarp + lane];
#pragma unroll
          for (int i = 0; i < kColumns; ++i) {
            mma<Shape::kOperand>(sums[m][i], a, b[i][0], b[i][1]);
          }
        }
      }
    }
    if (row + gridDim.x < p.rows) load(row + gridDim.x);

    // Calls body(v, run) for the runs that this lane has of its heads, `run` of all of the row's.
    const auto each_run = [&](const auto& body) {
      if (!has_columns) return;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int head = m * kTile + 8 * half;  // and g
          if (head + 8 > Shape::kSureHeads && head + g >= p.heads) continue;
          float v[kRun];
#pragma unroll
          for (int j = 0; j < kRun; ++j) v[j] = sums[m][j % kColumns][2 * half + j / kColumns];
          body(v, lane_run + (2 * m + half) * run_stride);
        }
      }
    };
    const auto find_ranges = [&](auto is_symmetric) {
      FloatRange all;
      each_run([&](const float (&v)[kRun], int run) {
        FloatRange one;
        FloatRange& seen = kGrouped ? one : all;
#pragma unroll
        for (int j = 0; j < kRun; ++j) seen.template add<is_symmetric.value>(v[j]);
        if (!kGrouped) return;
        const Range range = one.range(symmetric);
        RangeSlot& slot = own[p.group_runs(run)];
        atomicMax(&slot.high, range.high);
        if (!is_symmetric.value) atomicMax(&slot.low, range.low);
      });
      if (kGrouped) return;
      Range range = all.range(symmetric);
      range.high = warp_max(range.high);
      if (!is_symmetric.value) range.low = warp_max(range.low);
      if (lane == 0) own[warp] = {range.high, range.low};
    };
    symmetric ? find_ranges(std::true_type{}) : find_ranges(std::false_type{});
    __syncthreads();

    const auto grid_of = [&](Range range, int group, bool writes) {
      if (p.scale < 0.0f && !symmetric) range = {range.low, range.high};
      Grid grid = make_grid(range, fabsf(p.scale), out.clip, out.bits, symmetric);
      if (writes) {
        out.scale[row * p.groups + group] = grid.scale;
        if (!symmetric) out.zero[row * p.groups + group] = grid.shift;
      }
      grid.inv *= p.scale;  // the sums come without it
      return grid;
    };
    Grid grid{};
    if constexpr (kGrouped) {
      for (int i = threadIdx.x; i < p.groups; i += blockDim.x) {
        grids[i] = grid_of({own[i].high, own[i].low}, i, true);
        own[i] = {0, 0};
      }
      __syncthreads();
    } else {
      Range range{own[0].high, own[0].low};
      for (int i = 1; i < warps; ++i) range = merge(range, {own[i].high, own[i].low});
      grid = grid_of(range, 0, threadIdx.x == 0);
    }
    const int64_t first = row * p.heads * p.head_dim;
    const auto store = [&](auto is_packed) {
      QuantizedRows codes = out;
      codes.packed = is_packed.value;
      codes.codes = static_cast<char*>(out.codes) + (is_packed.value ? first / 2 : first);
      each_run([&](const float (&v)[kRun], int run) {
        if (kGrouped) grid = grids[p.group_runs(run)];
        store_run_codes<Rounding::fused>(codes, run, v, grid);
      });
    };
    out.packed ? store(std::true_type{}) : store(std::false_type{});
  }
}

// ---- Launch -------------------------------------------------------------------------------------

template <class Shape>
bool launch_heads(HeadPlan p, const QuantizedRows& out, Stream stream) {
  const int warps = static_cast<int>(ceil_div(p.head_dim, Shape::kWarpColumns));
  const bool whole =
      p.head_dim % Shape::kRun == 0 && (p.groups == 1 || out.group % Shape::kRun == 0);
  if (warps > kMaxWarps || !whole) return false;
  const int64_t blocks =
      int64_t{device_limits().processors} * std::max(1, Shape::kBlocks * kMaxWarps / warps);
  const bool grouped = p.groups > 1;
  p.group_runs = FastDiv(static_cast<int>(out.group / Shape::kRun));
  const int slot_bytes = grouped
                             ? (p.groups + 1) * static_cast<int>(sizeof(RangeSlot) + sizeof(Grid))
                             : 2 * warps * static_cast<int>(sizeof(RangeSlot));
  const int shared =
      Shape::kTiles * Shape::kTiles * kWarp * static_cast<int>(sizeof(uint4)) + slot_bytes;
  launch_early(grouped ? &head_kernel<Shape, true> : &head_kernel<Shape, false>,
               std::min(p.rows, blocks), warps * kWarp, shared, stream, p, out);
  return true;
}

/// False: another kernel's work.
template <DType kDtype>
bool launch_heads(const HeadHadamardQuantizeArgs& args, Stream stream) {
  const Rows& x = args.x;
  const QuantizedRows& out = args.out;
  const HadamardMatrix& h = args.matrix;
  const int64_t heads = x.n / args.head_dim;
  // The zeros outside the blocks of H would spread a value that is not finite over other groups.
  if (heads > kMaxTiles * kTile || (h.size != heads && out.group != x.n)) return false;
  int log_power = 0;
  while (h.factor_order << log_power < h.size) ++log_power;
  const HeadPlan p{static_cast<const char*>(x.data),
                   x.row_stride * bytes_of(kDtype),
                   x.rows,
                   static_cast<int>(heads),
                   static_cast<int>(args.head_dim),
                   static_cast<int>(x.n / out.group),
                   FastDiv(),
                   FastDiv(static_cast<int>(h.size)),
                   static_cast<int>(h.factor_order),
                   log_power,
                   h.factor,
                   h.scale};
  switch (ceil_div(heads, kTile)) {
    case 1:
      return launch_heads<HeadShape<kDtype, 1>>(p, out, stream);
    case 2:
      return launch_heads<HeadShape<kDtype, 2>>(p, out, stream);
    case 3:
      return launch_heads<HeadShape<kDtype, 3>>(p, out, stream);
    case 4:
      return launch_heads<HeadShape<kDtype, 4>>(p, out, stream);
    default:
      break;
  }
  if constexpr (kDtype != DType::f32) {
    if (heads <= 6 * kTile) return launch_heads<HeadShape<kDtype, 6>>(p, out, stream);
    return launch_heads<HeadShape<kDtype, kMaxTiles>>(p, out, stream);
  }
  return false;  // fp32 would not fit the registers
}

template <DType kDtype>
void quantize_heads(const HeadHadamardQuantizeArgs& args, Stream stream) {
  const Rows& x = args.x;
  const QuantizedRows& out = args.out;
  const RowSource<kDtype> source{x.data, x.row_stride};
  if (x.rows == 0) return;
  if (chunks_are_aligned(x) && x.n > 0 && groups_are_whole(out)) {
    if (args.matrix.size == 1 && args.matrix.scale == 1.0f && rows_fit(x.n, out)) {
      return launch_rows(source, x.rows, x.n, out, stream);
    }
    if (launch_heads<kDtype>(args, stream)) return;
    const QuantizeSink sink{{out, FastDiv(static_cast<int>(out.group / kChunk))}};
    if (launch_transform<false>(args.matrix, x.rows, x.n, args.head_dim, source, sink,
                                x.n / out.group, stream)) {
      return;
    }
  }
  launch_any(args.matrix, x.rows, x.n, args.head_dim, source, AnyQuantize{out}, stream,
             "head_hadamard_quantize");
}

}  // namespace

void head_hadamard_quantize(const HeadHadamardQuantizeArgs& args, Stream stream) {
  switch (args.x.dtype) {
    case DType::f32:
      return quantize_heads<DType::f32>(args, stream);
    case DType::f16:
      return quantize_heads<DType::f16>(args, stream);
    case DType::bf16:
      return quantize_heads<DType::bf16>(args, stream);
  }
  QUAROT_ASSERT(false, "head_hadamard_quantize: no such dtype");
}

}  // namespace quarot::cuda
