// linear_int4 on the CPU: int8 x int4 -> int32 in pairs of columns (pmaddwd: a lane of 32 bits
// multiplies two pairs of int16 and adds both products; nothing saturates), then the fp32 epilogue.
// Maths: linear_int4.h, weight layout: the same, under cpu::.
//
// A task is a block of at most 60 rows times a chunk of at most 8 x 16 channels. It walks the
// columns in segments of at most 512, which end where a weight group ends:
//
//   widen the segment of its rows to int16          60 x 512 x 2 B = 60 KB, L2
//   for each block of 16 channels:
//     unpack the segment's weights to int16         512 x 16 x 2 B = 16 KB, L1; once for all rows
//     for each 6 rows: 6 x 16 int32 in registers += the segment
//     where a group ends: scale
//
// Up to 2 rows (decode) read the packed weights straight into registers: two shifts a pair of
// columns, and the bound is memory: n * k / 2 bytes.
// Otherwise the bound is the multiplier: 16 multiply-adds a pmaddwd and add of an AVX2 register.
// Sums are exact and each output is scaled by itself, so the blocking never shows in a result.
// Above 300 lines: both directions of the layout stand beside the loop that reads it.
#include "kernels/cpu/any_dtype.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/vec.h"
#include "kernels/linear_int4.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace quarot::cpu::QUAROT_ISA {
namespace {

static_assert(kLanes == kLinearInt4Channels);

// Rows whose sums stay in registers: 6 x 2 of 16 (AVX2) beside weights and x, 2 x 4 of 16 (SSE).
constexpr int kRows = kRegisterBytes == 16 ? 2 : 6;
// Up to so many rows unpack in registers: beyond, unpacking once through L1 is faster.
constexpr int kPackedRows = 2;
constexpr int64_t kBlockRows = 60;  // whole kRows in every variant
constexpr int64_t kSegment = 512;
constexpr int64_t kChunkBlocks = 8;
constexpr int64_t kColumns = kLinearInt4Columns;
constexpr int64_t kPairs = kColumns / 2;
// Of 16 channels x 8 columns.
constexpr int64_t kBlockBytes = kLinearInt4Channels * kLinearInt4WordBytes;

// ---- Pairs of int16 in lanes of 32 bits ---------------------------------------------------------

/// Low half times low half plus high half times high half, as int16 -> int32.
QUAROT_INLINE NativeI32 multiply_add(NativeI32 a, NativeI32 b) {
#if defined(__AVX512BW__)
  return (NativeI32)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (NativeI32)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (NativeI32)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}
template <class V>
QUAROT_INLINE Pair<V> multiply_add(const Pair<V>& a, const Pair<V>& b) {
  return {multiply_add(a.lo, b.lo), multiply_add(a.hi, b.hi)};
}

/// Nibble `kIndex` of both halves of each lane, sign-extended: the codes of columns 2 kIndex, 2
/// kIndex + 1.
template <int kIndex>
QUAROT_INLINE NativeI32 code_pair(NativeI32 word) {
  using NativeI16 = Native<int16_t, kRegisterBytes>::type;
  return (NativeI32)(((NativeI16)word << (12 - 4 * kIndex)) >> 12);
}
template <int kIndex, class V>
QUAROT_INLINE Pair<V> code_pair(const Pair<V>& word) {
  return {code_pair<kIndex>(word.lo), code_pair<kIndex>(word.hi)};
}

/// Columns 2p and 2p + 1 of a row, in all lanes.
QUAROT_INLINE I32 column_pair(const int16_t* x, int64_t p) {
  int32_t pair;
  __builtin_memcpy(&pair, x + 2 * p, sizeof pair);
  return i32(pair);
}

// ---- One segment of columns: R rows x 16 channels -----------------------------------------------

/// acc [R, 16] += x [R, columns] (rows kSegment apart) * unpacked weights w [columns / 2, 16]
/// pairs.
template <int R>
QUAROT_INLINE void accumulate_unpacked(int32_t* acc, const int16_t* x, const void* w,
                                       int64_t columns) {
  const int32_t* pairs = static_cast<const int32_t*>(w);
  I32 sum[R];
  for (int r = 0; r < R; ++r) sum[r] = load(acc + r * kLanes);
  for (int64_t p = 0; p < columns / 2; ++p) {
    const I32 codes = load(pairs + p * kLanes);
    for (int r = 0; r < R; ++r) {
      sum[r] = sum[r] + multiply_add(codes, column_pair(x + r * kSegment, p));
    }
  }
  for (int r = 0; r < R; ++r) store(acc + r * kLanes, sum[r]);
}

template <int kIndex, int R>
QUAROT_INLINE void accumulate_code(I32 (&sum)[R], const I32& word, const int16_t* x, int64_t p) {
  const I32 codes = code_pair<kIndex>(word);
  for (int r = 0; r < R; ++r) {
    sum[r] = sum[r] + multiply_add(codes, column_pair(x + r * kSegment, p + kIndex));
  }
}

/// The same from packed weights w [columns / 8, 64] bytes.
template <int R>
QUAROT_INLINE void accumulate_packed(int32_t* acc, const int16_t* x, const void* w,
                                     int64_t columns) {
  const uint8_t* words = static_cast<const uint8_t*>(w);
  I32 sum[R];
  for (int r = 0; r < R; ++r) sum[r] = load(acc + r * kLanes);
  for (int64_t i = 0; i < columns / kColumns; ++i) {
    const I32 word = load_as<I32>(words + i * kBlockBytes);
    accumulate_code<0>(sum, word, x, i * kPairs);
    accumulate_code<1>(sum, word, x, i * kPairs);
    accumulate_code<2>(sum, word, x, i * kPairs);
    accumulate_code<3>(sum, word, x, i * kPairs);
  }
  for (int r = 0; r < R; ++r) store(acc + r * kLanes, sum[r]);
}

/// acc [rows, 16] += the segment, R rows at a time, then the rest with fewer.
template <int R, bool kPacked>
void accumulate(int32_t* acc, const int16_t* x, int64_t rows, const void* w, int64_t columns) {
  for (; rows >= R; rows -= R, acc += R * kLanes, x += R * kSegment) {
    if constexpr (kPacked) {
      accumulate_packed<R>(acc, x, w, columns);
    } else {
      accumulate_unpacked<R>(acc, x, w, columns);
    }
  }
  if constexpr (R > 1) {
    if (rows > 0) accumulate<R - 1, kPacked>(acc, x, rows, w, columns);
  }
}

/// pairs [columns / 2, 16] of int16 pairs  <-  w [columns / 8, 64] bytes.
void unpack(int32_t* pairs, const uint8_t* w, int64_t columns) {
  for (int64_t i = 0; i < columns / kColumns; ++i, pairs += kPairs * kLanes) {
    const I32 word = load_as<I32>(w + i * kBlockBytes);
    store(pairs, code_pair<0>(word));
    store(pairs + kLanes, code_pair<1>(word));
    store(pairs + 2 * kLanes, code_pair<2>(word));
    store(pairs + 3 * kLanes, code_pair<3>(word));
  }
}

/// dst [rows, columns], rows kSegment apart  <-  src [rows, columns], rows `stride` apart. columns
/// % 8 = 0.
void widen(int16_t* dst, const int8_t* src, int64_t stride, int64_t rows, int64_t columns) {
  typedef int8_t I8x8 __attribute__((vector_size(8)));
  typedef int16_t I16x8 __attribute__((vector_size(16)));
  for (int64_t r = 0; r < rows; ++r, dst += kSegment, src += stride) {
    for (int64_t c = 0; c < columns; c += kColumns) {
      store_as(dst + c, __builtin_convertvector(load_as<I8x8>(src + c), I16x8));
    }
  }
}

// ---- Epilogue -----------------------------------------------------------------------------------

/// What a task works on: rows [row, row + rows) and channels [channel, channel + 16).
struct Tile {
  int64_t row, rows, channel;
};

/// y [rows, 16] (+)= (acc * s_x) * s_w of one group; the first group assigns. acc becomes zero.
void scale_group(float* y, int32_t* acc, const LinearInt4Args& a, const Tile& tile, int64_t group) {
  const int64_t valid = a.n - tile.channel < kLanes ? a.n - tile.channel : kLanes;
  float scales[kLanes] = {};
  int32_t sums[kLanes] = {};
  for (int64_t c = 0; c < valid; ++c) {
    const int64_t at = (tile.channel + c) * a.groups + group;
    scales[c] = a.w_scale[at];
    if (a.x_zero != nullptr) sums[c] = a.w_sum[at];
  }
  const F32 w_scale = load(scales);
  const I32 w_sum = load(sums);
  for (int64_t r = 0; r < tile.rows; ++r) {
    I32 sum = load(acc + r * kLanes);
    if (a.x_zero != nullptr) sum = sum - i32(a.x_zero[tile.row + r]) * w_sum;
    const F32 term = (to_f32(sum) * f32(a.x_scale[tile.row + r])) * w_scale;
    store(y + r * kLanes, group == 0 ? term : load(y + r * kLanes) + term);
    store(acc + r * kLanes, i32(0));
  }
}

/// out = y (+ bias) (+ residual), rounded once.
void finish(const float* y, const LinearInt4Args& a, const Tile& tile) {
  const int64_t valid = a.n - tile.channel < kLanes ? a.n - tile.channel : kLanes;
  const F32 bias = a.bias == nullptr ? f32(0) : load_any(a.bias_dtype, a.bias, tile.channel, a.n);
  for (int64_t r = 0; r < tile.rows; ++r) {
    F32 value = load(y + r * kLanes);
    const int64_t at = (tile.row + r) * a.n + tile.channel;
    if (a.bias != nullptr) value = value + bias;
    if (a.residual != nullptr)
      value = value + load_any(a.residual_dtype, a.residual, at, at + valid);
    store_any(a.out_dtype, a.out, at, at + valid, value);
  }
}

// ---- A task -------------------------------------------------------------------------------------

/// A thread's memory; each part is [channel blocks of the chunk,] rows, ....
struct Buffers {
  int32_t* acc;  // [kChunkBlocks, kBlockRows, 16], zero between groups
  float* y;      // [kChunkBlocks, kBlockRows, 16]
  int16_t* x;    // [kBlockRows, kSegment]
  int32_t* w;    // [kSegment / 2, 16] pairs of int16
};

void run_task(const LinearInt4Args& a, const Buffers& buffers, int64_t row, int64_t rows,
              int64_t first_block, int64_t blocks) {
  const auto* weights = static_cast<const uint8_t*>(a.w);
  const int64_t group_size = a.k / a.groups;
  for (int64_t begin = 0, end; begin < a.k; begin = end) {
    const int64_t group = begin / group_size;
    const int64_t group_end = (group + 1) * group_size;
    end = begin + kSegment < group_end ? begin + kSegment : group_end;
    widen(buffers.x, a.x + row * a.k + begin, a.k, rows, end - begin);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t block = first_block + b;
      int32_t* acc = buffers.acc + b * kBlockRows * kLanes;
      float* y = buffers.y + b * kBlockRows * kLanes;
      const uint8_t* w = weights + (block * a.k + begin) / kColumns * kBlockBytes;
      if (rows <= kPackedRows) {
        accumulate<kPackedRows, true>(acc, buffers.x, rows, w, end - begin);
      } else {
        unpack(buffers.w, w, end - begin);
        accumulate<kRows, false>(acc, buffers.x, rows, buffers.w, end - begin);
      }
      const Tile tile{row, rows, block * kLanes};
      if (end == group_end) scale_group(y, acc, a, tile, group);
      if (end == a.k) finish(y, a, tile);
    }
  }
}

}  // namespace

// ---- Entry points -------------------------------------------------------------------------------

void linear_int4(const LinearInt4Args& a, const Executor& executor) {
  if (a.m == 0 || a.n == 0) return;
  const int64_t row_blocks = ceil_div(a.m, kBlockRows);
  const int64_t blocks = ceil_div(a.n, kLanes);
  // At least four tasks a thread where there are blocks enough, so that the threads end together.
  int64_t chunk = row_blocks * blocks / (4 * executor.threads);
  chunk = chunk < 1 ? 1 : chunk > kChunkBlocks ? kChunkBlocks : chunk;
  const int64_t tasks = ceil_div(blocks, chunk) * row_blocks;
  const int64_t work =
      (a.m < kBlockRows ? a.m : kBlockRows) * chunk * a.k;  // vectors of 16 multiply-adds
  // Consecutive tasks share their weights: those are read from memory once.
  parallel_rows(executor, tasks, work, [&](int64_t begin, int64_t end) {
    const Scratch acc(kChunkBlocks * kBlockRows * kLanes), y(kChunkBlocks * kBlockRows * kLanes);
    const Scratch x(kBlockRows * kSegment / 2), w(kSegment / 2 * kLanes);
    const Buffers buffers{reinterpret_cast<int32_t*>(acc.data()), y.data(),
                          reinterpret_cast<int16_t*>(x.data()),
                          reinterpret_cast<int32_t*>(w.data())};
    __builtin_memset(buffers.acc, 0,
                     static_cast<size_t>(kChunkBlocks * kBlockRows * kLanes) * sizeof(int32_t));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task % row_blocks * kBlockRows;
      const int64_t block = task / row_blocks * chunk;
      const int64_t rows = a.m - row < kBlockRows ? a.m - row : kBlockRows;
      run_task(a, buffers, row, rows, block, blocks - block < chunk ? blocks - block : chunk);
    }
  });
}

// Both directions move the nibbles of a 32-bit word; canonical: byte s holds column 2s low and 2s +
// 1 high.

void prepack_int4(uint8_t* dst, const uint8_t* src, int64_t n, int64_t k,
                  const Executor& executor) {
  const int64_t words = k / kColumns;
  parallel_rows(executor, ceil_div(n, kLanes), words * kLanes, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t i = 0; i < words; ++i) {
        for (int64_t c = 0; c < kLanes; ++c) {
          uint32_t word = 0;
          const int64_t channel = block * kLanes + c;
          if (channel < n)
            __builtin_memcpy(&word, src + (channel * words + i) * kLinearInt4WordBytes, 4);
          uint32_t even = word & 0x0f0f0f0fu, odd = (word >> 4) & 0x0f0f0f0fu;
          even = (even | even >> 4) & 0x00ff00ffu;
          odd = (odd | odd >> 4) & 0x00ff00ffu;
          word = ((even | even >> 8) & 0xffffu) | (odd | odd >> 8) << 16;
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
        uint32_t even = word & 0xffffu, odd = word >> 16;
        even = (even | even << 8) & 0x00ff00ffu;
        odd = (odd | odd << 8) & 0x00ff00ffu;
        even = (even | even << 4) & 0x0f0f0f0fu;
        odd = (odd | odd << 4) & 0x0f0f0f0fu;
        word = even | odd << 4;
        __builtin_memcpy(dst + (channel * words + i) * kLinearInt4WordBytes, &word, 4);
      }
    }
  });
}

}  // namespace quarot::cpu::QUAROT_ISA
