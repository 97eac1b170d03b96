// Quantization of rows that need no transform: a row, or its norm, or a gated activation, in one
// pass. Maths: kernels/quantize.h and kernels/fused_quantize.h.
//
// Layout and parallelisation. A team of warps reads a row once and keeps it in registers, up to 8
// chunks of 8 elements a thread, neighbours in neighbouring threads:
//
//   1. the range (and the norm's sum of squares), over the team: shuffles and one barrier;
//   2. every thread makes the grid for itself, then codes from what it holds.
//
// A norm's inverse multiplies the range, so that step 1 finds both; with a weight also the grid's
// inverse, so that it costs no instruction an element. Groups of
// 2^k chunks, 4 to 32, find their ranges by shuffles alone; a thread makes the grid of one of them.
// A row that is longer than a team can hold is read again in each step, from the L2.
// Rows of one warp: kSmallTeams a block, no barrier.
//
// Bound: memory; with a norm and a weight the instructions, about 20 an element. Above 400 lines:
// rows held, read again and of one warp share the steps.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/device/int4.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/sources.cuh"

namespace quarot::cuda {

/// Warps of a block whose teams are single warps.
constexpr int kSmallTeams = 4;
/// Few rows: fewer than so many chunks a multiprocessor.
constexpr int kFewChunks = 1024;
/// Between these a grid's inverse times a norm's loses no bits.
constexpr float kLeastInverse = 0x1p-100f, kMostInverse = 0x1p120f;
/// Chunks of a group: powers of two from here to a warp.
constexpr int kLeastLanes = 4;

struct RowPlan {
  int64_t rows;
  int64_t chunks;  // of all rows; the last row may end early
  int row_chunks;
  int team;   // threads a row, whole warps
  int lanes;  // chunks that share a scale, 2^lane_bits; 0: the row does
  int lane_bits;
};

// ---- Readers: what a thread loads of a chunk, keeps, and makes of it ----------------------------

/// A thread loads kInFlight chunks before it uses them, and holds at most kHeld, of few rows about
/// kFewHeld. Raw{} and Held{} are zeros. kSplits: a row may be read as several.
template <class Source>
struct RowReader;

/// The range of values of fp32, collected.
struct FloatRange {
  float high = 0.0f, low = 0.0f;  // kSymmetric: max |v|, 0; else max(v, 0), max(-v, 0)

  template <bool kSymmetric>
  __device__ __forceinline__ void add(float v) {
    high = max_nan(high, kSymmetric ? fabsf(v) : v);
    if constexpr (!kSymmetric) low = max_nan(low, -v);
  }
  template <bool kSymmetric>
  __device__ __forceinline__ void add(const float (&v)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) add<kSymmetric>(v[i]);
  }
  // As range_of in int4.cuh: -0 would be the smallest integer, NaN has no sign.
  __device__ __forceinline__ Range range(bool) const {
    return {__float_as_int(high) & 0x7fffffff, __float_as_int(low) & 0x7fffffff};
  }
};

/// Kept as they came: half the registers of fp32, and two maxima an instruction.
template <DType kDtype>
struct RowReader<RowSource<kDtype>> {
  RowSource<kDtype> source;

  using Raw = Chunk<kDtype>;
  using Held = Chunk<kDtype>;
  using Seen = std::conditional_t<kDtype == DType::f32, FloatRange, PairRange<kDtype>>;
  static constexpr int kHeld = kDtype == DType::f32 ? 4 : 8, kInFlight = kHeld;
  static constexpr int kMaxTeam = 1024, kFewHeld = 4;
  static constexpr bool kNormalised = false, kWeighted = false, kSplits = true;
  static constexpr Rounding kRounding = Rounding::exact;

  __device__ __forceinline__ const void* row(int64_t r) const {
    return static_cast<const char*>(source.data) + r * source.row_stride * bytes_of(kDtype);
  }
  __device__ __forceinline__ Raw load(const void* row, int chunk) const {
    return load_chunk<kDtype>(row, chunk * kChunk);
  }
  __device__ __forceinline__ void hold(Held& held, const Raw& raw) const { held = raw; }
  /// The compiler would keep what step 1 makes of a chunk for step 2, in twice the registers.
  __device__ __forceinline__ void forget(Held& held) const {
#pragma unroll
    for (uint4& w : held.words) {
      forget_origin(w.x);
      forget_origin(w.y);
      forget_origin(w.z);
      forget_origin(w.w);
    }
  }
  __device__ __forceinline__ void values(float (&v)[kChunk], const Held& held) const {
    to_floats<kDtype>(v, held);
  }
  template <bool kSymmetric>
  __device__ __forceinline__ void see(Seen& seen, const Held& held) const {
    if constexpr (kDtype == DType::f32) {
      float v[kChunk];
      to_floats<kDtype>(v, held);
      seen.template add<kSymmetric>(v);
    } else {
      seen.add(held.words[0]);
    }
  }
};

/// Kept in fp32: computed once.
struct FloatHolder {
  struct Held {
    float v[kChunk];
  };
  using Seen = FloatRange;
  static constexpr bool kSplits = false;

  __device__ __forceinline__ void forget(Held&) const {}
  __device__ __forceinline__ void values(float (&v)[kChunk], const Held& held) const {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] = held.v[i];
  }
  template <bool kSymmetric>
  __device__ __forceinline__ void see(Seen& seen, const Held& held) const {
    seen.add<kSymmetric>(held.v);
  }
};

template <DType kDtype>
struct RowReader<GluSource<kDtype>> : FloatHolder {
  GluSource<kDtype> source;

  struct Raw {
    Chunk<kDtype> gate, up;
  };
  static constexpr int kHeld = 4, kInFlight = kDtype == DType::f32 ? 1 : 2;
  static constexpr int kMaxTeam = 1024, kFewHeld = 4;
  static constexpr bool kNormalised = false, kWeighted = false;
  static constexpr Rounding kRounding = Rounding::fused;

  explicit RowReader(const GluSource<kDtype>& s) : source(s) {}

  __device__ __forceinline__ const void* row(int64_t r) const {
    return static_cast<const char*>(source.data) + r * source.row_stride * bytes_of(kDtype);
  }
  __device__ __forceinline__ Raw load(const void* row, int chunk) const {
    return {load_chunk<kDtype>(row, chunk * kChunk),
            load_chunk<kDtype>(row, source.n + chunk * kChunk)};
  }
  __device__ __forceinline__ void hold(Held& held, const Raw& raw) const {
    float up[kChunk];
    to_floats<kDtype>(held.v, raw.gate);
    to_floats<kDtype>(up, raw.up);
    gate(held.v, up, source.activation);
  }
};

/// x / sqrt(mean(x^2) + eps), times a weight of type kWeight if kWeighted.
template <DType kDtype, bool kWeighted, DType kWeight>
struct RmsnormSource : RowSource<kDtype> {
  const void* weight;  // [n]
  float eps;

  __device__ __forceinline__ float inverse_norm(float squares, int n) const {
    return __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(squares, static_cast<float>(n)) + eps));
  }

  // For any_transform.cuh, which calls common with all threads of a block.
  __device__ float common(int64_t row, int n, float*) const {
    float squares = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const float v = RowSource<kDtype>::value(row, i, 0.0f);
      squares += v * v;
    }
    __shared__ float sums[kWarp];
    squares = warp_sum(squares);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = squares;
    __syncthreads();
    squares = 0.0f;
    for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) squares += sums[w];
    return inverse_norm(squares, n);
  }
  __device__ float value(int64_t row, int column, float inverse) const {
    const float v = RowSource<kDtype>::value(row, column, 0.0f) * inverse;
    return kWeighted ? v * load1<kWeight>(weight, column) : v;
  }
};

/// Without a weight: x is kept as it came, and multiplied by the norm's inverse in step 2. Many of
/// its values are the same, and may all lie between two codes: the roundings are the definition's.
template <DType kDtype, DType kWeight>
struct RowReader<RmsnormSource<kDtype, false, kWeight>> : RowReader<RowSource<kDtype>> {
  using Rows = RowReader<RowSource<kDtype>>;
  RmsnormSource<kDtype, false, kWeight> norm;

  static constexpr bool kNormalised = true, kSplits = false, kWeighted = false;

  explicit RowReader(const RmsnormSource<kDtype, false, kWeight>& s) : Rows{s}, norm(s) {}

  __device__ __forceinline__ void hold(typename Rows::Held& held, const typename Rows::Raw& raw,
                                       int, float, float& squares) const {
    held = raw;
    float v[kChunk];
    to_floats<kDtype>(v, held);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) squares += v[i] * v[i];
  }
};

/// With a weight: x * factor * weight is kept. The norm's inverse goes into the grid's, if it is
/// not the factor already.
template <DType kDtype, DType kWeight>
struct RowReader<RmsnormSource<kDtype, true, kWeight>> : FloatHolder {
  RmsnormSource<kDtype, true, kWeight> norm;

  using Raw = Chunk<kDtype>;
  static constexpr int kHeld = 4, kInFlight = kDtype == DType::f32 ? 1 : 4;
  static constexpr int kMaxTeam = 1024, kFewHeld = 2;
  static constexpr bool kNormalised = true, kWeighted = true;
  static constexpr Rounding kRounding = Rounding::fused;
  /// Between these a sum of squares, and what it is made of, neither overflows nor loses bits.
  static constexpr float kLeastSquares = 0x1p-100f, kMostSquares = 0x1p120f;

  explicit RowReader(const RmsnormSource<kDtype, true, kWeight>& s) : norm(s) {}

  __device__ __forceinline__ const void* row(int64_t r) const {
    return static_cast<const char*>(norm.data) + r * norm.row_stride * bytes_of(kDtype);
  }
  __device__ __forceinline__ Raw load(const void* row, int chunk) const {
    return load_chunk<kDtype>(row, chunk * kChunk);
  }
  /// The weight of chunk `chunk` is read for every row: through the L1.
  __device__ __forceinline__ void hold(Held& held, const Raw& raw, int chunk, float factor,
                                       float& squares) const {
    to_floats<kDtype>(held.v, raw);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) squares += held.v[i] * held.v[i];
    if (factor != 1.0f) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) held.v[i] *= factor;
    }
    float w[kChunk];
    to_floats<kWeight>(w, static_cast<const Chunk<kWeight>*>(norm.weight)[chunk]);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) held.v[i] *= w[i];
  }
};

// ---- Kernel -------------------------------------------------------------------------------------

/// What a row's threads find out together.
struct RowStats {
  int high, low;  // a Range
  float squares;
};

/// The stats of all threads of a team; the block is the team, or the team a warp. `memory`: a slot
/// a warp, not in use.
template <bool kSquares>
__device__ __forceinline__ RowStats reduce_team(RowStats s, int warps, bool symmetric,
                                                RowStats* memory) {
  const auto reduce_warp = [&] {
    s.high = warp_max(s.high);
    if (!symmetric) s.low = warp_max(s.low);
    if constexpr (kSquares) s.squares = warp_sum(s.squares);
  };
  reduce_warp();
  if (warps == 1) return s;
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) memory[threadIdx.x / kWarp] = s;
  __syncthreads();
  s = lane < warps ? memory[lane] : RowStats{};
  reduce_warp();
  return s;
}

/// kLong: rows that a team cannot hold. kGrouped: a scale a group, not a row.
template <class Source, bool kLong, bool kGrouped>
__global__ void __launch_bounds__(RowReader<Source>::kMaxTeam)
    quantize_rows_kernel(const __grid_constant__ RowPlan p,
                         const __grid_constant__ RowReader<Source> reader,
                         const __grid_constant__ QuantizedRows out) {
  using Reader = RowReader<Source>;
  using Held = typename Reader::Held;
  using Seen = typename Reader::Seen;
  constexpr int kHeld = kLong ? 1 : Reader::kHeld;
  __shared__ RowStats memory[2][Reader::kMaxTeam / kWarp];
  wait_for_previous_grid();
  start_next_grid();
  const int lane = threadIdx.x % kWarp, warps = p.team / kWarp;
  const bool small = warps == 1;
  const int member = small ? lane : static_cast<int>(threadIdx.x);
  const int64_t row =
      small ? int64_t{blockIdx.x} * kSmallTeams + threadIdx.x / kWarp : int64_t{blockIdx.x};
  if (row >= p.rows) return;  // whole teams
  const int64_t first = row * p.row_chunks;
  int chunks = p.row_chunks;
  if constexpr (kGrouped) chunks = static_cast<int>(min(int64_t{chunks}, p.chunks - first));
  const bool symmetric = out.zero == nullptr;
  const void* x = reader.row(row);
  forget_origin(x);  // else it is computed again for each load

  RowStats stats{};
  // Values are multiplied by `factor` when they are read, by `rest` in step 2.
  float factor = 1.0f, rest = 1.0f;
  Held held[kHeld];
  const auto read = [&](int start) {
    constexpr int kInFlight = Reader::kInFlight < kHeld ? Reader::kInFlight : kHeld;
#pragma unroll
    for (int begin = 0; begin < kHeld; begin += kInFlight) {
      typename Reader::Raw raw[kInFlight] = {};
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int chunk = start + (begin + i) * p.team;
        if (chunk < chunks) raw[i] = reader.load(x, chunk);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if ((begin + i) * p.team >= chunks) continue;  // no thread has it, nor looks at it
        if constexpr (Reader::kNormalised) {
          const int chunk = min(start + (begin + i) * p.team, chunks - 1);
          reader.hold(held[begin + i], raw[i], chunk, factor, stats.squares);
        } else {
          reader.hold(held[begin + i], raw[i]);
        }
      }
    }
  };
  // Calls body(start), start the first of the chunks that are held: all threads of a warp at once.
  const auto each_step = [&](const auto& body) {
    if constexpr (kLong) {
      for (int start = member; start - member < chunks; start += p.team) {
        read(start);
        body(start);
      }
    } else {
      body(member);
    }
  };
  // Calls body(std::bool_constant<symmetric>).
  const auto by_symmetry = [&](const auto& body) {
    symmetric ? body(std::true_type{}) : body(std::false_type{});
  };
  const auto find_range = [&] {
    by_symmetry([&](auto is_symmetric) {
      Seen seen;
      each_step([&](int) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
          if (i * p.team < chunks) reader.template see<is_symmetric.value>(seen, held[i]);
        }
      });
      const Range range = seen.range(is_symmetric.value);
      stats.high = range.high;
      stats.low = range.low;
    });
  };

  // 1. What the row has in common.
  if constexpr (!kLong) read(member);
  if constexpr (!kGrouped) {
    find_range();
  } else if constexpr (kLong && Reader::kNormalised) {
    each_step([](int) {});
  }
  if constexpr (Reader::kNormalised || !kGrouped) {
    stats = reduce_team<Reader::kNormalised>(stats, warps, symmetric, memory[0]);
  }
  if constexpr (Reader::kNormalised) {
    rest = reader.norm.inverse_norm(stats.squares, p.row_chunks * kChunk);
    if constexpr (Reader::kWeighted) {
      // All threads of a team agree.
      if (!(stats.squares > Reader::kLeastSquares && stats.squares < Reader::kMostSquares)) {
        factor = rest;
        rest = 1.0f;
        if constexpr (!kLong) read(member);
        if constexpr (!kGrouped) {
          find_range();
          stats = reduce_team<false>(stats, warps, symmetric, memory[1]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) reader.forget(held[i]);

  // 2. Grids and codes.
  QuantizedRows codes = out;
  codes.codes = static_cast<char*>(out.codes) + first * (out.packed ? kChunk / 2 : kChunk);
  forget_origin(codes.codes);
  const auto store = [&](int i, int chunk, Grid grid) {
    if (chunk >= chunks) return;
    float v[kChunk];
    reader.values(v, held[i]);
    if constexpr (Reader::kNormalised) {
      const float inv = grid.inv * rest;
      if (Reader::kWeighted && inv > kLeastInverse && inv < kMostInverse) {
        grid.inv = inv;
      } else {
#pragma unroll
        for (int j = 0; j < kChunk; ++j) v[j] = __fmul_rn(v[j], rest);
      }
    }
    store_run_codes<Reader::kRounding>(codes, chunk, v, grid);
  };
  const auto grid_of = [&](const Range& range, int64_t group, bool writes) {
    const Grid grid = make_grid(range, rest, out.clip, out.bits, symmetric);
    if (writes) {
      out.scale[group] = grid.scale;
      if (!symmetric) out.zero[group] = grid.shift;
    }
    return grid;
  };
  if constexpr (!kGrouped) {
    const Grid grid = grid_of({stats.high, stats.low}, row, member == 0);
    each_step([&](int start) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (i * p.team < chunks) store(i, start + i * p.team, grid);
      }
    });
  } else {
    // A group's lanes hold kBatch chunks of different groups each: lane i makes the i-th grid.
    constexpr int kBatch = kHeld < kLeastLanes ? kHeld : kLeastLanes;
    const int index = lane & (p.lanes - 1);
    each_step([&](int start) {
#pragma unroll
      for (int begin = 0; begin < kHeld; begin += kBatch) {
        Range ranges[kBatch], mine;
        by_symmetry([&](auto is_symmetric) {
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            Seen seen;
            reader.template see<is_symmetric.value>(seen, held[begin + i]);
            ranges[i] = seen.range(is_symmetric.value);
          }
          for (int step = 1; step < p.lanes; step *= 2) {
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
              Range& r = ranges[i];
              r.high = max(r.high, __shfl_xor_sync(kAllLanes, r.high, step));
              if (!is_symmetric.value) {
                r.low = max(r.low, __shfl_xor_sync(kAllLanes, r.low, step));
              }
            }
          }
        });
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (index == i) mine = ranges[i];
        }
        const int chunk = start + (begin + index) * p.team;
        const Grid grid =
            grid_of(mine, (first + chunk) >> p.lane_bits, index < kBatch && chunk < chunks);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int from = lane - index + i;
          const Grid theirs{0.0f, __shfl_sync(kAllLanes, grid.inv, from),
                            __shfl_sync(kAllLanes, grid.shift, from),
                            __shfl_sync(kAllLanes, grid.top, from)};
          store(begin + i, start + (begin + i) * p.team, theirs);
        }
      }
    });
  }
}

// ---- Launch -------------------------------------------------------------------------------------

inline bool groups_are_lanes(int64_t group) {
  const int64_t lanes = group / kChunk;
  return group % kChunk == 0 && lanes >= kLeastLanes && lanes <= kWarp &&
         (lanes & (lanes - 1)) == 0;
}

/// Whether launch_rows takes such rows: whole chunks that share a scale in groups of lanes, or all.
inline bool rows_fit(int64_t n, const QuantizedRows& out) {
  return n > 0 && n % kChunk == 0 && out.clip >= kLeastClip &&
         (out.group == n || groups_are_lanes(out.group));
}

/// Whether transform_kernel takes these groups.
inline bool groups_are_whole(const QuantizedRows& out) {
  return out.group > 0 && out.group % kChunk == 0 && out.clip >= kLeastClip;
}

/// Quantizes rows whose chunks are aligned and rows_fit.
template <class Source>
void launch_rows(const Source& source, int64_t rows, int64_t n, const QuantizedRows& out,
                 Stream stream) {
  using Reader = RowReader<Source>;
  RowPlan p{};
  p.rows = rows;
  p.row_chunks = static_cast<int>(n / kChunk);
  p.chunks = rows * p.row_chunks;
  const auto set_lanes = [&] {
    p.lanes = static_cast<int>(out.group / kChunk);
    while ((1 << p.lane_bits) < p.lanes) ++p.lane_bits;
  };
  if (out.group < n) set_lanes();
  Reader reader{source};
  if constexpr (Reader::kSplits) {
    // Groups that lie one after the other: rows of another length, as many as a warp holds.
    if (groups_are_lanes(out.group) && source.row_stride == n) {
      p.row_chunks = Reader::kHeld * kWarp;
      p.rows = ceil_div(p.chunks, int64_t{p.row_chunks});
      set_lanes();
      reader.source.row_stride = p.row_chunks * kChunk;
    }
  }
  // Few rows: fewer chunks a thread, so that each has less to do.
  const bool few = p.chunks < int64_t{device_limits().processors} * kFewChunks;
  const int64_t least = ceil_div(p.row_chunks, Reader::kMaxTeam);
  const int64_t each = std::max(int64_t{few ? Reader::kFewHeld : Reader::kHeld}, least);
  const bool is_long = each > Reader::kHeld;
  p.team = is_long ? Reader::kMaxTeam
                   : static_cast<int>(ceil_div(ceil_div(p.row_chunks, each), kWarp)) * kWarp;
  const int teams = p.team == kWarp ? kSmallTeams : 1;
  const auto kernel = p.lanes == 0 ? (is_long ? &quantize_rows_kernel<Source, true, false>
                                              : &quantize_rows_kernel<Source, false, false>)
                                   : (is_long ? &quantize_rows_kernel<Source, true, true>
                                              : &quantize_rows_kernel<Source, false, true>);
  launch_early(kernel, ceil_div(p.rows, teams), teams * p.team, 0, stream, p, reader, out);
}

constexpr HadamardMatrix kNoTransform{1, 1, nullptr, 1.0f};

}  // namespace quarot::cuda
