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
// x 16 x 64 (tdpbssd), to which the unpacked weights are a tile as they are. Rows of k bytes are
// not, to the caches: all of x is copied first, tile by tile, which takes m * k bytes. A task is
// two blocks of channels and up to 512 rows, 32 at a time, 4 tiles of sums, which are scaled while
// they are in the L1.
//
// Sums are exact and each output is scaled by itself, so the blocking never shows in a result.
// Above 300 lines: both directions of the layout stand beside the loops that read it.
#include "kernels/cpu/any_dtype.h"
#include "kernels/cpu/dot.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/vec.h"
#include "kernels/linear_int4.h"
#if defined(__AMX_INT8__)
#include "kernels/cpu/tiles.h"
#endif

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
/// before), and writes the output after the last one. Rows of acc and y are `stride` apart; x_sums
/// is null where the codes of the weights were signed.
void end_group(const LinearInt4Args& a, const Tile& tile, int64_t block, int64_t group,
               const int32_t* acc, float* y, int64_t stride, const int32_t* x_sums) {
  const GroupOfChannels channels = load_group(a, block * kLanes, group);
  for (int64_t r = tile.row; r < tile.row + tile.rows; ++r, acc += stride, y += stride) {
    const int32_t x_sum = x_sums == nullptr ? 0 : x_sums[r * a.groups + group];
    F32 value = scaled(a, r, load(acc), x_sum, channels);
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

constexpr int64_t kTileColumns = kTileBytes;
constexpr int64_t kPairRows = kPair;  // of the sums: two by two tiles
constexpr int64_t kPairChannels = kPair;
/// The segment's weights and 32 rows of it are 16 KB each: they share the L1. 20 KB still fit where
/// that makes one segment, whose sums need not come back.
constexpr int64_t kTileSegment = 512, kWholeSegment = 640;
/// A task's rows stay in the L2 while the tasks beside it read them; at least so many, as the
/// weights are unpacked once a task.
constexpr int64_t kTaskBytes = int64_t{1} << 20;
constexpr int64_t kLeastTaskRows = 128;
constexpr int64_t kTaskRows = 512;  // at most

bool fits_tiles(const LinearInt4Args& a) { return a.k / a.groups % kTileColumns == 0; }

/// tiles [k / 64, 16, 64]  <-  rows [row, row + 16) of x, zeros beyond m.
void copy_rows(int8_t* tiles, const LinearInt4Args& a, int64_t row) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    for (int64_t c = 0; c < a.k; c += kTileColumns) {
      I32 codes = i32(0);
      if (row + r < a.m) codes = load_as<I32>(a.x + (row + r) * a.k + c);
      store_as(tiles + c * kTileRows + r * kTileColumns, codes);
    }
  }
}

/// The bytes less kOffset.
QUAROT_INLINE void store_signed(uint8_t* p, const I32& codes) {
  typedef int8_t I8x64 __attribute__((vector_size(64)));
  store_as(p, load_as<I8x64>(&codes) - static_cast<int8_t>(kOffset));
}

/// tiles [columns / 64, 2, 16, 64], of them block `which`  <-  w [columns / 8, 64], signed.
void unpack_tiles(uint8_t* tiles, int64_t which, const uint8_t* w, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kTileColumns) {
    uint8_t* tile = tiles + (c / kTileColumns * 2 + which) * kTile;
#pragma GCC unroll 8
    for (int64_t i = 0; i < kTileColumns / kColumns; ++i, w += kBlockBytes) {
      const I32 word = load_as<I32>(w);
      store_signed(tile + 2 * i * kStepBytes, low_codes(word));
      store_signed(tile + (2 * i + 1) * kStepBytes, high_codes(word));
    }
  }
}

typedef uint16_t U16x32 __attribute__((vector_size(64)));
/// Each lane's lower half as 16 lanes, then its upper half; and the inverse.
QUAROT_INLINE U16x32 halves_apart(const U16x32& v) {
  constexpr U16x32 from = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                           1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  return __builtin_shuffle(v, from);
}
QUAROT_INLINE U16x32 halves_together(const U16x32& v) {
  constexpr U16x32 from = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return __builtin_shuffle(v, from);
}

/// `end_plain` for two blocks at once: acc [rows, 32] of signed codes.
template <bool kResidual>
void end_plain_pair(const LinearInt4Args& a, const Tile& tile, const int32_t* acc) {
  const int64_t channel = tile.block * kLanes;
  const F32 scale0 = load(a.w_scale + channel), scale1 = load(a.w_scale + channel + kLanes);
  for (int64_t r = tile.row; r < tile.row + tile.rows; ++r, acc += kPairChannels) {
    const F32 x_scale = f32(a.x_scale[r]);
    const int64_t at = (r * a.n + channel) * 2;
    F32 y0 = (to_f32(load(acc)) * x_scale) * scale0;
    F32 y1 = (to_f32(load(acc + kLanes)) * x_scale) * scale1;
    if (kResidual) {
      const U16x32 both =
          halves_together(load_as<U16x32>(static_cast<const char*>(a.residual) + at));
      y0 = y0 + bf16_to_f32(load_as<I32>(&both));
      y1 = y1 + from_bits(load_as<I32>(&both) & i32(-0x10000));
    }
    const I32 both = (f32_to_bf16(y0) & i32(0xffff)) | (upper_bf16(y1) & i32(-0x10000));
    store_as(static_cast<char*>(a.out) + at, halves_apart(load_as<U16x32>(&both)));
  }
}

/// x: all rows in tiles [ceil(m / 16), k / 64].
void run_tile(const LinearInt4Args& a, const Tile& tile, const int8_t* x, float* scratch) {
  auto* acc = reinterpret_cast<int32_t*>(scratch);                      // [kTaskRows, 32]
  float* y = scratch + kTaskRows * kPairChannels;                       // the same
  auto* w = reinterpret_cast<uint8_t*>(y + kTaskRows * kPairChannels);  // [kWholeSegment / 64, 2]
  const int64_t width = a.k / a.groups;
  const bool plain = tile.blocks == 2 && is_plain(a, tile.block) && is_plain(a, tile.block + 1);
  for (int64_t begin = 0, end; begin < a.k; begin = end) {
    const int64_t group = begin / width, group_end = (group + 1) * width;
    // Segments of a group as equal as can be.
    const int64_t columns = group_end - begin, tiles = columns / kTileColumns;
    const int64_t parts = columns <= kWholeSegment ? 1 : ceil_div(columns, kTileSegment);
    end = begin + ceil_div(tiles, parts) * kTileColumns;
    for (int64_t i = 0; i < tile.blocks; ++i) {
      unpack_tiles(w, i,
                   static_cast<const uint8_t*>(a.w) +
                       ((tile.block + i) * a.k + begin) / kColumns * kBlockBytes,
                   end - begin);
    }
    before_tiles_read(w);
    for (int64_t r = 0; r < tile.rows; r += kPairRows) {
      const int64_t left = tile.rows - r, rows = left < kPairRows ? left : kPairRows;
      const bool first = begin == group * width, last = end == group_end;
      // Sums of one segment are done with at once.
      int32_t* sums = acc + (first && last ? 0 : r * kPairChannels);
      const int8_t* from = x + (tile.row + r) * a.k + begin * kTileRows;
      if (rows > kTileRows) {
        multiply_tiles<int8_t, true>(sums, from, a.k * kTileRows, w, end - begin, !first);
      } else {
        multiply_tiles<int8_t, false>(sums, from, 0, w, end - begin, !first);
      }
      if (!last) continue;
      const Tile part{tile.row + r, rows, tile.block, tile.blocks};
      if (plain) {
        a.residual == nullptr ? end_plain_pair<false>(a, part, sums)
                              : end_plain_pair<true>(a, part, sums);
        continue;
      }
      for (int64_t i = 0; i < tile.blocks; ++i) {
        end_group(a, part, tile.block + i, group, sums + i * kLanes,
                  y + r * kPairChannels + i * kLanes, kPairChannels, nullptr);
      }
    }
  }
}

constexpr int64_t kTilesScratch =  // floats
    2 * kTaskRows * kPairChannels + kWholeSegment * kPairChannels / 4;

void run_tiles(const LinearInt4Args& a, const Executor& executor) {
  const Scratch copy(ceil_div(a.m, kTileRows) * kTileRows * a.k / 4);
  auto* x = reinterpret_cast<int8_t*>(copy.data());
  parallel_rows(executor, ceil_div(a.m, kTileRows), kTileRows * a.k / 16,
                [&](int64_t begin, int64_t end) {
                  for (int64_t i = begin; i < end; ++i) {
                    copy_rows(x + i * kTileRows * a.k, a, i * kTileRows);
                  }
                });
  int64_t most = kTaskBytes / a.k / kPairRows * kPairRows;
  most = most < kLeastTaskRows ? kLeastTaskRows : most > kTaskRows ? kTaskRows : most;
  const int64_t blocks = ceil_div(a.n, kLanes), pairs = ceil_div(blocks, 2);
  const int64_t work = (a.m < most ? a.m : most) * a.k / 2;
  parallel_rows(executor, ceil_div(a.m, most) * pairs, work, [&](int64_t begin, int64_t end) {
    const Scratch scratch(kTilesScratch);
    const UseTiles tiles;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = t / pairs * most, block = t % pairs * 2;
      const Tile tile{row, a.m - row < most ? a.m - row : most, block, blocks - block < 2 ? 1 : 2};
      run_tile(a, tile, x, scratch.data());
    }
  });
}

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
      if (end < group_end) continue;
      if (is_plain(a, block)) {
        a.residual == nullptr ? end_plain<false>(a, tile, block, sums, x_sums)
                              : end_plain<true>(a, tile, block, sums, x_sums);
      } else {
        end_group(a, tile, block, group, sums, y + b * kSumsBytes / 4, kLanes, x_sums);
      }
    }
  }
}

constexpr int64_t kRowsScratch =  // floats
    (2 * kChunkBlocks * kSumsBytes + kUnpackedBytes + kBlockRows * kRowStride) / 4;

void run_row_blocks(const LinearInt4Args& a, const int32_t* x_sums, const Executor& executor) {
  const int64_t row_blocks = ceil_div(a.m, kBlockRows);
  const int64_t blocks = ceil_div(a.n, kLanes);
  // At least four tasks a thread where there are blocks enough, so that the threads end together.
  int64_t chunk = row_blocks * blocks / (4 * executor.threads);
  chunk = chunk < 1 ? 1 : chunk > kChunkBlocks ? kChunkBlocks : chunk;
  const int64_t tasks = ceil_div(blocks, chunk) * row_blocks;
  const int64_t work = ceil_div(a.m, row_blocks) * chunk * a.k / 4;
  // Consecutive tasks share their weights: those are read from memory once.
  parallel_rows(executor, tasks, work, [&](int64_t begin, int64_t end) {
    const Scratch scratch(kRowsScratch);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = t % row_blocks * kBlockRows, block = t / row_blocks * chunk;
      const int64_t rows = a.m - row < kBlockRows ? a.m - row : kBlockRows;
      const Tile tile{row, rows, block, blocks - block < chunk ? blocks - block : chunk};
      run_rows(a, tile, x_sums, scratch.data());
    }
  });
}

}  // namespace

// ---- Entry points -------------------------------------------------------------------------------

void linear_int4(const LinearInt4Args& a, const Executor& executor) {
  if (a.m == 0 || a.n == 0) return;
#if defined(__AMX_INT8__)
  if (a.m > kPackedRows && fits_tiles(a)) return run_tiles(a, executor);
#endif
  const Scratch sums(a.m * a.groups);
  auto* x_sums = reinterpret_cast<int32_t*>(sums.data());  // [m, groups]
  const int64_t width = a.k / a.groups;
  parallel_rows(executor, a.m, a.k / 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * a.groups; i < end * a.groups; ++i) {
      x_sums[i] = sum_bytes(a.x + i * width, width);
    }
  });
  if (a.m <= kPackedRows) return run_packed<kPackedRows>(a, x_sums, executor);
  run_row_blocks(a, x_sums, executor);
}

// Both directions move the nibbles of a 32-bit word; canonical: nibble c holds column c. Ours:
// nibble 2b column b, nibble 2b + 1 column 4 + b, with the sign bit flipped, which adds 8.

/// Nibbles 0 1 2 3 4 5 6 7 of the result are nibbles 0 4 1 5 2 6 3 7 of the word.
QUAROT_INLINE uint32_t interleave_nibbles(uint32_t word) {
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
          word = interleave_nibbles(word ^ kSigns);
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
