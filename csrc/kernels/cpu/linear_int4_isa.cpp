// linear_int4 on the CPU: int8 x int4 -> int32 four columns at a time (dot.h), then the fp32
// epilogue. Maths: linear_int4.h, weight layout: the same, under cpu::. The weights are u = code +
// 8 there, so a sum of a row's products is 8 times the sum of the row's codes too large.
//
// Up to kPackedRows rows (decode): a task is a range of blocks of 16 channels. A block's weights go
// from memory to registers and never back: a shift and two masks make of 64 bytes the codes of 8
// columns. The bound is memory: n * k / 2 bytes.
//
// More rows: a task is a block of at most 128 rows times a chunk of at most 8 x 16 channels. It
// walks the columns in segments of at most 1024, which end where a weight group ends:
//
//   copy the segment of its rows                    128 x 1 KB, L2; apart enough for the L1's sets
//   for each block of 16 channels:
//     unpack the segment's weights to bytes         1024 x 16 = 16 KB, L1; once for all rows
//     for each kRows rows: kRows x 16 int32 in registers += the segment
//     where a group ends: scale
//
// The bound is the multiplier: 64 multiply-adds a vpdpbusd. The variant amx has a multiplier of 16
// x 16 x 64 (tdpbsud), to which the unpacked weights are a tile as they are: its tasks take two
// blocks of channels and 32 rows at a time, 4 tiles of sums, and read x where it lies.
//
// Sums are exact and each output is scaled by itself, so the blocking never shows in a result.
// Above 300 lines: both directions of the layout stand beside the loops that read it.
#include "kernels/cpu/any_dtype.h"
#include "kernels/cpu/dot.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/vec.h"
#include "kernels/linear_int4.h"

namespace quarot::cpu::QUAROT_ISA {
namespace {

static_assert(kLanes == kLinearInt4Channels);

// Rows whose sums stay in registers beside weights and x: 12 of 32 (AVX-512), 6 x 2 of 16 (AVX2), 2
// x 4 of 16 (SSE).
constexpr int kRows = kRegisterBytes == 64 ? 12 : kRegisterBytes == 32 ? 6 : 2;
// Up to so many rows unpack in registers: beyond, unpacking once through L1 is faster.
constexpr int kPackedRows = kRegisterBytes == 64 ? 4 : 2;
constexpr int64_t kBlockRows = 128;
constexpr int64_t kSegment = 1024;
constexpr int64_t kRowStride = kSegment + 64;  // of copied rows: no two in the same set of the L1
constexpr int64_t kChunkBlocks = 8;
constexpr int64_t kColumns = kLinearInt4Columns;
// Of 16 channels x 8 columns, packed; and of 16 channels x 4 columns, unpacked.
constexpr int64_t kBlockBytes = kLinearInt4Channels * kLinearInt4WordBytes;
constexpr int64_t kStepBytes = kLanes * 4;
constexpr int64_t kStepColumns = 4;
constexpr int kWordSteps = 2;
constexpr int kRunWords = kDotRun / kWordSteps;
/// How far ahead of the weights in use memory is asked for; measured, as is reading two blocks.
constexpr int64_t kPrefetch = 2048;
/// What the unsigned codes have on top of the signed ones.
constexpr int32_t kOffset = kLinearInt4Offset;
static_assert(kOffset + 7 <= kDotMaxUnsigned);

/// Columns 0 .. 3 of the words' eight, and columns 4 .. 7.
QUAROT_INLINE I32 low_codes(const I32& word) { return word & i32(0x0f0f0f0f); }
QUAROT_INLINE I32 high_codes(const I32& word) { return (word >> 4) & i32(0x0f0f0f0f); }

// ---- Rows x 16 channels -------------------------------------------------------------------------

template <int kWord, int B, int R, class Sum>
QUAROT_INLINE void add_word(Sum (&sum)[B][R], const uint8_t* w, int64_t w_stride, const int8_t* x,
                            int64_t x_stride) {
  x += kWord * kColumns;
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b) {
    __builtin_prefetch(w + b * w_stride + kWord * kBlockBytes + kPrefetch);
    const I32 word = load_as<I32>(w + b * w_stride + kWord * kBlockBytes);
    const I32 low = low_codes(word), high = high_codes(word);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      sum[b][r].template add<2 * kWord>(low, broadcast4(x + r * x_stride));
      sum[b][r].template add<2 * kWord + 1>(high, broadcast4(x + r * x_stride + kStepColumns));
    }
  }
}

/// acc [B, R]  <-  x [R, columns], rows x_stride apart, times packed weights w [B, columns / 8, 64]
/// bytes, blocks w_stride apart.
template <int B, int R>
QUAROT_INLINE void multiply_packed(I32 (&acc)[B][R], const int8_t* x, int64_t x_stride,
                                   const uint8_t* w, int64_t w_stride, int64_t columns) {
  static_assert(kRunWords == 4);
  DotSum<(8 / (R * B) > 1 ? 8 / (R * B) : 1)> sum[B][R];
  const auto each = [&](const auto& f) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) f(b, r);
    }
  };
  each([&](int b, int r) __attribute__((always_inline)) { sum[b][r].clear(); });
  int64_t words = columns / kColumns;
  for (; words >= kRunWords; words -= kRunWords) {
    add_word<0>(sum, w, w_stride, x, x_stride);
    add_word<1>(sum, w, w_stride, x, x_stride);
    add_word<2>(sum, w, w_stride, x, x_stride);
    add_word<3>(sum, w, w_stride, x, x_stride);
    each([&](int b, int r) __attribute__((always_inline)) { sum[b][r].widen(); });
    w += kRunWords * kBlockBytes;
    x += kRunWords * kColumns;
  }
  for (; words > 0; --words) {
    add_word<0>(sum, w, w_stride, x, x_stride);
    each([&](int b, int r) __attribute__((always_inline)) { sum[b][r].widen(); });
    w += kBlockBytes;
    x += kColumns;
  }
  each([&](int b, int r) __attribute__((always_inline)) { acc[b][r] = sum[b][r].total(); });
}

/// acc [R, 16] += x [R, columns] (rows kRowStride apart) * unpacked weights w [columns / 4, 64].
template <int R>
QUAROT_INLINE void accumulate_rows(int32_t* acc, const int8_t* x, const uint8_t* w,
                                   int64_t columns) {
  DotSum<1> sum[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) sum[r].clear();
  for (int64_t steps = columns / kStepColumns; steps > 0;) {
    const int64_t run = steps < kDotRun ? steps : kDotRun;
    for (int64_t i = 0; i < run; ++i, w += kStepBytes, x += kStepColumns) {
      const I32 codes = load_as<I32>(w);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) sum[r].template add<0>(codes, broadcast4(x + r * kRowStride));
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) sum[r].widen();
    steps -= run;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) store(acc + r * kLanes, load(acc + r * kLanes) + sum[r].total());
}

/// acc [rows, 16] += the segment, in parts of R rows or one less, as equal as can be: R is
/// ceil(rows / ceil(rows / kRows)).
template <int R>
void accumulate(int32_t* acc, const int8_t* x, int64_t rows, const uint8_t* w, int64_t columns) {
  const int64_t parts = ceil_div(rows, kRows);
  if constexpr (R > 1) {
    if (ceil_div(rows, parts) < R) return accumulate<R - 1>(acc, x, rows, w, columns);
  }
  const int64_t shorter = parts * R - rows;
  for (int64_t part = 0; part < parts; ++part) {
    if (R == 1 || part < parts - shorter) {
      accumulate_rows<R>(acc, x, w, columns);
      acc += R * kLanes;
      x += R * kRowStride;
    } else if constexpr (R > 1) {
      accumulate_rows<R - 1>(acc, x, w, columns);
      acc += (R - 1) * kLanes;
      x += (R - 1) * kRowStride;
    }
  }
}

/// unpacked [columns / 4, 64]  <-  w [columns / 8, 64].
void unpack(uint8_t* unpacked, const uint8_t* w, int64_t columns) {
  for (int64_t i = 0; i < columns / kColumns; ++i, w += kBlockBytes, unpacked += 2 * kStepBytes) {
    const I32 word = load_as<I32>(w);
    store_as(unpacked, low_codes(word));
    store_as(unpacked + kStepBytes, high_codes(word));
  }
}

// ---- Epilogue -----------------------------------------------------------------------------------

/// Scales of a group for the 16 channels from `channel` on, and their sums where x has zero points.
struct GroupOfChannels {
  F32 scale;
  I32 sum;
};
QUAROT_INLINE GroupOfChannels load_group(const LinearInt4Args& a, int64_t channel, int64_t group) {
  const int64_t valid = a.n - channel < kLanes ? a.n - channel : kLanes;
  float scales[kLanes] = {};
  int32_t sums[kLanes] = {};
  if (a.groups == 1 && valid == kLanes && a.x_zero == nullptr) {
    return {load(a.w_scale + channel), i32(0)};
  }
  for (int64_t c = 0; c < valid; ++c) {
    const int64_t at = (channel + c) * a.groups + group;
    scales[c] = a.w_scale[at];
    if (a.x_zero != nullptr) sums[c] = a.w_sum[at];
  }
  return {load(scales), load(sums)};
}

/// The group's part of y of a row, from its sums of products; x_sum: the sum of the row's codes.
QUAROT_INLINE F32 scaled(const LinearInt4Args& a, int64_t row, const I32& acc, int32_t x_sum,
                         const GroupOfChannels& channels) {
  I32 sum = acc - i32(kOffset * x_sum);
  if (a.x_zero != nullptr) sum = sum - i32(a.x_zero[row]) * channels.sum;
  return (to_f32(sum) * f32(a.x_scale[row])) * channels.scale;
}

/// out [row, channel ...] = y (+ bias) (+ residual), rounded once.
QUAROT_INLINE void finish(const LinearInt4Args& a, int64_t row, int64_t channel, F32 y) {
  const int64_t at = row * a.n + channel;
  const int64_t end = a.n - channel < kLanes ? at + a.n - channel : at + kLanes;
  if (a.bias != nullptr) y = y + load_any(a.bias_dtype, a.bias, channel, a.n);
  if (a.residual != nullptr) y = y + load_any(a.residual_dtype, a.residual, at, end);
  store_any(a.out_dtype, a.out, at, end, y);
}

// ---- Few rows -----------------------------------------------------------------------------------

/// All R = m rows of B blocks of 16 channels.
template <int R, int B>
QUAROT_INLINE void run_blocks(const LinearInt4Args& a, const int32_t* x_sums, int64_t block) {
  const int64_t width = a.k / a.groups, w_stride = a.k / kColumns * kBlockBytes;
  const auto* w = static_cast<const uint8_t*>(a.w) + block * w_stride;
  F32 y[B][R];
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) y[b][r] = f32(0);
  }
  for (int64_t group = 0; group < a.groups; ++group) {
    I32 acc[B][R];
    multiply_packed(acc, a.x + group * width, a.k, w + group * width / kColumns * kBlockBytes,
                    w_stride, width);
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      const GroupOfChannels channels = load_group(a, (block + b) * kLanes, group);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const F32 part = scaled(a, r, acc[b][r], x_sums[r * a.groups + group], channels);
        y[b][r] = group == 0 ? part : y[b][r] + part;
      }
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) finish(a, r, (block + b) * kLanes, y[b][r]);
  }
}

template <int R>
void run_packed(const LinearInt4Args& a, const int32_t* x_sums, const Executor& executor) {
  if constexpr (R > 1) {
    if (a.m < R) return run_packed<R - 1>(a, x_sums, executor);
  }
  parallel_rows(executor, ceil_div(a.n, kLanes), a.k, [&](int64_t begin, int64_t end) {
    constexpr int kStreams = R == 1 ? 2 : 1;
    int64_t block = begin;
    for (; block + kStreams <= end; block += kStreams) run_blocks<R, kStreams>(a, x_sums, block);
    for (; block < end; ++block) run_blocks<R, 1>(a, x_sums, block);
  });
}

// ---- Many rows ----------------------------------------------------------------------------------

/// The part of the output that a task makes.
struct Tile {
  int64_t row, rows, block, blocks;  // of 16 channels
};

/// Calls task(tile, scratch) for tiles that cover the output; `scratch_bytes` are a thread's.
template <class Task>
QUAROT_INLINE void for_each_tile(const LinearInt4Args& a, int64_t scratch_bytes,
                                 const Executor& executor, const Task& task) {
  const int64_t row_blocks = ceil_div(a.m, kBlockRows);
  const int64_t blocks = ceil_div(a.n, kLanes);
  // At least four tasks a thread where there are blocks enough, so that the threads end together.
  int64_t chunk = row_blocks * blocks / (4 * executor.threads);
  chunk = chunk < 1 ? 1 : chunk > kChunkBlocks ? kChunkBlocks : chunk;
  const int64_t tasks = ceil_div(blocks, chunk) * row_blocks;
  const int64_t work = ceil_div(a.m, row_blocks) * chunk * a.k / 4;
  // Consecutive tasks share their weights: those are read from memory once.
  parallel_rows(executor, tasks, work, [&](int64_t begin, int64_t end) {
    const Scratch scratch(scratch_bytes / 4);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = t % row_blocks * kBlockRows, block = t / row_blocks * chunk;
      const int64_t rows = a.m - row < kBlockRows ? a.m - row : kBlockRows;
      task(Tile{row, rows, block, blocks - block < chunk ? blocks - block : chunk}, scratch.data());
    }
  });
}

/// Whether `end_plain` does what `end_group` would for a block of 16 channels.
bool is_plain(const LinearInt4Args& a, int64_t block) {
  return a.groups == 1 && a.x_zero == nullptr && a.bias == nullptr && a.n >= (block + 1) * kLanes &&
         a.out_dtype == DType::bf16 && (a.residual == nullptr || a.residual_dtype == DType::bf16);
}

/// What is usual without the questions, which would take longer than the products of a short row.
template <bool kResidual>
void end_plain(const LinearInt4Args& a, const Tile& tile, int64_t block, const int32_t* acc,
               const int32_t* x_sums) {
  const F32 scale = load(a.w_scale + block * kLanes);
  for (int64_t r = tile.row; r < tile.row + tile.rows; ++r, acc += kLanes) {
    const int64_t at = r * a.n + block * kLanes;
    F32 y = (to_f32(load(acc) - i32(kOffset * x_sums[r])) * f32(a.x_scale[r])) * scale;
    if (kResidual) y = y + load<DType::bf16>(a.residual, at);
    store<DType::bf16>(a.out, at, y);
  }
}

/// Scales the sums acc [rows, 16] of a group, adds them to y [rows, 16] (which holds the groups
/// before), and writes the output after the last one.
void end_group(const LinearInt4Args& a, const Tile& tile, int64_t block, int64_t group,
               const int32_t* acc, float* y, const int32_t* x_sums) {
  if (is_plain(a, block)) {
    return a.residual == nullptr ? end_plain<false>(a, tile, block, acc, x_sums)
                                 : end_plain<true>(a, tile, block, acc, x_sums);
  }
  const GroupOfChannels channels = load_group(a, block * kLanes, group);
  for (int64_t r = tile.row; r < tile.row + tile.rows; ++r, acc += kLanes, y += kLanes) {
    F32 value = scaled(a, r, load(acc), x_sums[r * a.groups + group], channels);
    if (group > 0) value = load(y) + value;
    if (group + 1 == a.groups) {
      finish(a, r, block * kLanes, value);
    } else {
      store(y, value);
    }
  }
}

constexpr int64_t kSumsBytes = kBlockRows * kLanes * 4;  // of a block's acc or y
constexpr int64_t kUnpackedBytes = kSegment * kLanes;

#if defined(__AMX_INT8__)

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileColumns = 64;

/// Has what was written before, at p too, in memory: GCC 12's intrinsics do not say what they read.
QUAROT_INLINE void before_tiles_read(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

/// Eight tiles, of which 0, 1 (and 2, 3) are sums, 4, 5 rows of x, 6, 7 weights.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  /// For two tiles of `first` and `second` rows.
  TileConfig(int64_t first, int64_t second) {
    for (int i = 0; i < 8; ++i) {
      const int64_t of_x = i % 2 == 0 ? first : second;
      rows[i] = static_cast<uint8_t>(i < 6 ? of_x : kTileRows);
      row_bytes[i] = of_x == 0 && i < 6 ? 0 : 64;
    }
  }
};

/// acc [2, rows, 16] (blocks kBlockRows apart) = (add ? acc : 0) + x [rows, columns] (a.k apart) *
/// w [2, columns / 4, 64]. columns % 64 = 0.
template <bool kSecond>
QUAROT_INLINE void accumulate_tiles(int32_t* acc, const int8_t* x, int64_t x_stride,
                                    const uint8_t* w, int64_t columns, bool add) {
  int32_t* below = acc + kTileRows * kLanes;
  constexpr int64_t kNext = kBlockRows * kLanes;
  if (add) {
    _tile_loadd(0, acc, 64);
    _tile_loadd(2, acc + kNext, 64);
    if (kSecond) _tile_loadd(1, below, 64);
    if (kSecond) _tile_loadd(3, below + kNext, 64);
  } else {
    _tile_zero(0);
    _tile_zero(2);
    if (kSecond) _tile_zero(1);
    if (kSecond) _tile_zero(3);
  }
  for (int64_t c = 0; c < columns; c += kTileColumns) {
    _tile_loadd(4, x + c, x_stride);
    _tile_loadd(6, w + c * kLanes, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, w + kUnpackedBytes + c * kLanes, 64);
    _tile_dpbsud(2, 4, 7);
    if (kSecond) {
      _tile_loadd(5, x + kTileRows * x_stride + c, x_stride);
      _tile_dpbsud(1, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, acc, 64);
  _tile_stored(2, acc + kNext, 64);
  if (kSecond) _tile_stored(1, below, 64);
  if (kSecond) _tile_stored(3, below + kNext, 64);
}

void run_tile(const LinearInt4Args& a, const Tile& tile, const int32_t* x_sums, float* scratch) {
  auto* acc = reinterpret_cast<int32_t*>(scratch);               // [2, kBlockRows, 16]
  float* y = scratch + 2 * kSumsBytes / 4;                       // the same
  auto* w = reinterpret_cast<uint8_t*>(y + 2 * kSumsBytes / 4);  // [2, kSegment / 4, 64]
  const int64_t width = a.k / a.groups;
  for (int64_t b = 0; b < tile.blocks; b += 2) {
    const int64_t blocks = tile.blocks - b < 2 ? 1 : 2;  // of an odd one the sums are not used
    for (int64_t begin = 0, end; begin < a.k; begin = end) {
      const int64_t group = begin / width;
      const int64_t group_end = (group + 1) * width;
      end = begin + kSegment < group_end ? begin + kSegment : group_end;
      for (int64_t i = 0; i < blocks; ++i) {
        unpack(w + i * kUnpackedBytes,
               static_cast<const uint8_t*>(a.w) +
                   ((tile.block + b + i) * a.k + begin) / kColumns * kBlockBytes,
               end - begin);
      }
      for (int64_t r = 0; r < tile.rows; r += 2 * kTileRows) {
        const int64_t left = tile.rows - r;
        const int64_t first = left < kTileRows ? left : kTileRows;
        const int64_t second = left < 2 * kTileRows ? left - first : kTileRows;
        const TileConfig config(first, second);
        before_tiles_read(&config);
        _tile_loadconfig(&config);
        const int8_t* x = a.x + (tile.row + r) * a.k + begin;
        if (second > 0) {
          accumulate_tiles<true>(acc + r * kLanes, x, a.k, w, end - begin, begin > group * width);
        } else {
          accumulate_tiles<false>(acc + r * kLanes, x, a.k, w, end - begin, begin > group * width);
        }
      }
      if (end < group_end) continue;
      for (int64_t i = 0; i < blocks; ++i) {
        end_group(a, tile, tile.block + b + i, group, acc + i * kSumsBytes / 4,
                  y + i * kSumsBytes / 4, x_sums);
      }
    }
  }
  _tile_release();
}

constexpr int64_t kScratchBytes = 4 * kSumsBytes + 2 * kUnpackedBytes;
bool fits_tiles(const LinearInt4Args& a) { return a.k / a.groups % kTileColumns == 0; }

#endif

void run_rows(const LinearInt4Args& a, const Tile& tile, const int32_t* x_sums, float* scratch) {
  auto* acc = reinterpret_cast<int32_t*>(scratch);     // [kChunkBlocks, kBlockRows, 16]
  float* y = scratch + kChunkBlocks * kSumsBytes / 4;  // the same
  auto* w = reinterpret_cast<uint8_t*>(y + kChunkBlocks * kSumsBytes / 4);  // [kSegment / 4, 64]
  auto* x = reinterpret_cast<int8_t*>(w + kUnpackedBytes);  // [kBlockRows, kRowStride]
  const int64_t width = a.k / a.groups;
  for (int64_t begin = 0, end; begin < a.k; begin = end) {
    const int64_t group = begin / width;
    const int64_t group_end = (group + 1) * width;
    end = begin + kSegment < group_end ? begin + kSegment : group_end;
    for (int64_t r = 0; r < tile.rows; ++r) {
      __builtin_memcpy(x + r * kRowStride, a.x + (tile.row + r) * a.k + begin,
                       static_cast<size_t>(end - begin));
    }
    for (int64_t b = 0; b < tile.blocks; ++b) {
      const int64_t block = tile.block + b;
      int32_t* sums = acc + b * kSumsBytes / 4;
      if (begin == group * width) {
        __builtin_memset(sums, 0, static_cast<size_t>(tile.rows * kLanes) * sizeof(int32_t));
      }
      unpack(w, static_cast<const uint8_t*>(a.w) + (block * a.k + begin) / kColumns * kBlockBytes,
             end - begin);
      accumulate<kRows>(sums, x, tile.rows, w, end - begin);
      if (end == group_end) end_group(a, tile, block, group, sums, y + b * kSumsBytes / 4, x_sums);
    }
  }
}

constexpr int64_t kRowsScratchBytes =
    2 * kChunkBlocks * kSumsBytes + kUnpackedBytes + kBlockRows * kRowStride;

}  // namespace

// ---- Entry points -------------------------------------------------------------------------------

void linear_int4(const LinearInt4Args& a, const Executor& executor) {
  if (a.m == 0 || a.n == 0) return;
  const Scratch sums(a.m * a.groups);
  auto* x_sums = reinterpret_cast<int32_t*>(sums.data());  // [m, groups]
  const int64_t width = a.k / a.groups;
  parallel_rows(executor, a.m, a.k / 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * a.groups; i < end * a.groups; ++i) {
      x_sums[i] = sum_bytes(a.x + i * width, width);
    }
  });
  if (a.m <= kPackedRows) return run_packed<kPackedRows>(a, x_sums, executor);
#if defined(__AMX_INT8__)
  if (fits_tiles(a)) {
    return for_each_tile(a, kScratchBytes, executor,
                         [&](const Tile& tile, float* scratch) __attribute__((always_inline)) {
                           run_tile(a, tile, x_sums, scratch);
                         });
  }
#endif
  for_each_tile(a, kRowsScratchBytes, executor,
                [&](const Tile& tile, float* scratch)
                    __attribute__((always_inline)) { run_rows(a, tile, x_sums, scratch); });
}

// Both directions move the nibbles of a 32-bit word; canonical: nibble c holds column c. Ours:
// nibble 2b column b, nibble 2b + 1 column 4 + b, with the sign bit flipped, which adds 8.

/// Nibbles 0 1 2 3 4 5 6 7 of the result are nibbles 0 4 1 5 2 6 3 7 of the word.
QUAROT_INLINE uint32_t interleave(uint32_t word) {
  uint64_t x = (word & 0xffffu) | static_cast<uint64_t>(word >> 16) << 32;  // two halves, ...
  x = (x | x << 8) & 0x00ff00ff00ff00ffu;                                   // each spread, ...
  x = (x | x << 4) & 0x0f0f0f0f0f0f0f0fu;
  return static_cast<uint32_t>(x) | static_cast<uint32_t>(x >> 32) << 4;  // and merged
}
/// The inverse.
QUAROT_INLINE uint32_t separate(uint32_t word) {
  uint64_t x = (word & 0x0f0f0f0fu) | static_cast<uint64_t>(word >> 4 & 0x0f0f0f0fu) << 32;
  x = (x | x >> 4) & 0x00ff00ff00ff00ffu;
  x = (x | x >> 8) & 0x0000ffff0000ffffu;
  return static_cast<uint32_t>(x) | static_cast<uint32_t>(x >> 32) << 16;
}
constexpr uint32_t kSigns = 0x88888888u;

void prepack_int4(uint8_t* dst, const uint8_t* src, int64_t n, int64_t k,
                  const Executor& executor) {
  const int64_t words = k / kColumns;
  parallel_rows(executor, ceil_div(n, kLanes), words * kLanes, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t i = 0; i < words; ++i) {
        for (int64_t c = 0; c < kLanes; ++c) {
          uint32_t word = kSigns;
          const int64_t channel = block * kLanes + c;
          if (channel < n)
            __builtin_memcpy(&word, src + (channel * words + i) * kLinearInt4WordBytes, 4);
          word = interleave(word ^ kSigns);
          __builtin_memcpy(dst + (block * words + i) * kBlockBytes + c * kLinearInt4WordBytes,
                           &word, 4);
        }
      }
    }
  });
}

void unprepack_int4(uint8_t* dst, const uint8_t* src, int64_t n, int64_t k,
                    const Executor& executor) {
  const int64_t words = k / kColumns;
  parallel_rows(executor, n, words, [&](int64_t begin, int64_t end) {
    for (int64_t channel = begin; channel < end; ++channel) {
      const uint8_t* block = src + channel / kLanes * words * kBlockBytes;
      for (int64_t i = 0; i < words; ++i) {
        uint32_t word;
        __builtin_memcpy(&word, block + i * kBlockBytes + channel % kLanes * kLinearInt4WordBytes,
                         4);
        word = separate(word) ^ kSigns;
        __builtin_memcpy(dst + (channel * words + i) * kLinearInt4WordBytes, &word, 4);
      }
    }
  });
}

}  // namespace quarot::cpu::QUAROT_ISA
