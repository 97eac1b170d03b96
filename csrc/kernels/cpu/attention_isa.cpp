// Attention over the quantized cache on the CPU. Maths: attention.h; layouts: kv_cache.h.
//
// A task is one sequence, one cache head, and a block of at most 64 query rows: row = (query s,
// head of the group), so that all heads which share a cache head share its dequantized keys. It
// walks the keys it may see in tiles of 64 (blocks of a paged cache are whole 16 keys):
//
//   K [head_dim][64]       <- keys, fp32, transposed: 32-bit words of 16 keys side by side, then
//                             the 8 nibbles (4 bytes) of each word
//   scores [64 rows][64]   <- Q K, lanes are keys
//   online softmax         running maximum m, sum l and factor exp(m_old - m_new) of each row
//   V [64][head_dim]       <- values, fp32
//   out [64 rows][head_dim] <- factor * out + P V, lanes are dimensions
//
// (code - zero) * scale is exact in fp32, so dequantizing costs no accuracy. Prefill: tasks are
// blocks of rows; the bound is the multiply-adds, 2 * rows * keys * head_dim. Decode (one block):
// tasks are also splits of the keys, each writes its unnormalised result, and a second pass
// combines them in ascending order; the bound is dequantizing, or, of few rows, the products of
// attention_few.h.
//
// What a row may not see has the score -inf, hence the weight 0. A key or value whose scale is not
// finite makes NaN of the rows that see it, and of no other: such a value counts as 0, and NaN is
// added to its key's score.
//
// Up to kFewRows rows (decode) skip the fp32 keys and values: attention_few.h.
//
// Above 300 lines: the four steps share one tile, and its layout is the file's subject.
#include "kernels/attention.h"
#include "kernels/cpu/any_dtype.h"
#include "kernels/cpu/attention_few.h"
#include "kernels/cpu/attention_split.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/vec.h"

namespace quarot::cpu::QUAROT_ISA {
namespace {

constexpr int64_t kRows = kAttentionRows;
constexpr int64_t kKeys = kAttentionKeys;
constexpr float kInfinity = __builtin_inff();
constexpr float kLowest = -0x1.fffffep127f;  // below any score, and finite: kLowest - kLowest is 0
// Rows in registers.
constexpr int kBlock = kRegisterBytes == 16 ? 2 : 6;
// Vectors of columns in registers: AVX-512 has twice the registers, and needs as many sums.
constexpr int kColumns = kRegisterBytes == 64 ? 2 : 1;

/// Where the keys of a tile stand: slot [i] has key 16 i, the next ones follow it.
struct Slots {
  int64_t of[kKeys / kLanes];
};
static_assert(kPageMultiple % kLanes == 0);

/// A thread's memory. dim is head_dim rounded up to whole vectors.
struct Tile {
  int64_t dim;
  float* q;        // [kRows, dim] scaled queries
  float* k;        // [dim, kKeys]
  float* v;        // [kKeys, dim]
  float* scores;   // [kRows, kKeys], then the weights
  float* out;      // [kRows, dim] unnormalised
  float* maximum;  // [kRows]
  float* sum;      // [kRows]
  float* factor;   // [kRows] what the older part of `out` is multiplied by
  float* poison;   // [kKeys] 0, or NaN where the value's scale is not finite
};

// ---- Product of two tiles -----------------------------------------------------------------------

/// Terms of a product that are added one after the other; longer sums are sums of such parts. In
/// one chain of 256 the rounding errors were 7 times those of torch.
constexpr int64_t kChain = 16;

/// out [R, 16 C] = (factor ? factor [R] * out : 0) + a [R, depth] * b [depth, 16 C]; depth >= 1.
template <int R, int C>
QUAROT_INLINE void product(float* out, int64_t out_stride, const float* factor, const float* a,
                           int64_t a_stride, const float* b, int64_t b_stride, int64_t depth) {
  for (int64_t first = 0; first < depth; first += kChain) {
    const int64_t end = first + kChain < depth ? first + kChain : depth;
    F32 sum[R][C];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) sum[r][c] = f32(0);
    }
    for (int64_t i = first; i < end; ++i) {
      F32 columns[C];
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) columns[c] = load(b + i * b_stride + c * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const F32 row = f32(a[r * a_stride + i]);
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) sum[r][c] = fma(row, columns[c], sum[r][c]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        float* to = out + r * out_stride + c * kLanes;
        if (first > 0) {
          sum[r][c] = load(to) + sum[r][c];
        } else if (factor != nullptr) {
          sum[r][c] = load(to) * f32(factor[r]) + sum[r][c];
        }
        store(to, sum[r][c]);
      }
    }
  }
}

/// The same for any number of rows and `columns`, a multiple of 16.
template <int R>
void product_rows(float* out, int64_t out_stride, const float* factor, const float* a,
                  int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, int64_t rows,
                  int64_t columns) {
  int64_t r = 0;
  for (; r + R <= rows; r += R) {
    const float* f = factor == nullptr ? nullptr : factor + r;
    int64_t c = 0;
    for (; c + kColumns * kLanes <= columns; c += kColumns * kLanes) {
      product<R, kColumns>(out + r * out_stride + c, out_stride, f, a + r * a_stride, a_stride,
                           b + c, b_stride, depth);
    }
    for (; kColumns > 1 && c < columns; c += kLanes) {
      product<R, 1>(out + r * out_stride + c, out_stride, f, a + r * a_stride, a_stride, b + c,
                    b_stride, depth);
    }
  }
  if constexpr (R > 1) {
    if (r < rows) {
      product_rows<R - 1>(out + r * out_stride, out_stride,
                          factor == nullptr ? nullptr : factor + r, a + r * a_stride, a_stride, b,
                          b_stride, depth, rows - r, columns);
    }
  }
}

// ---- Dequantize ---------------------------------------------------------------------------------

/// scale and zero of slots [slot, slot + count), count <= 16; the other lanes are 0.
QUAROT_INLINE void load_grid(const KvCacheView& cache, int64_t slot, int64_t count, F32& scale,
                             I32& zero) {
  uint8_t tail[kLanes] = {};
  const uint8_t* zeros = cache.zero + slot;
  if (count < kLanes) [[unlikely]] {
    __builtin_memcpy(tail, zeros, static_cast<size_t>(count));
    zeros = tail;
  }
  zero = load_u8(zeros);
  scale = load_upto<DType::f16>(cache.scale, slot, slot + count);
}

/// Makes zeros of scales [16] that are not finite; returns NaN in their lanes, 0 in the others.
QUAROT_INLINE F32 defuse(float* scales) {
  const F32 scale = load(scales);
  const F32 difference = scale - scale;
  store(scales, select(equal(difference, difference), scale, f32(0)));
  return difference;
}

/// k [dim, kKeys]  <-  the first `count` slots, count <= kKeys; columns beyond are 0.
template <int kBits>
void dequantize_keys(const KvCacheView& cache, const Slots& slots, int64_t count, int64_t head_dim,
                     float* k) {
  constexpr int kPerWord = 32 / kBits;
  const int64_t row_bytes = head_dim * kBits / 8;
  for (int64_t first = 0; first < kKeys; first += kLanes) {
    const int64_t left = count - first;
    const int64_t valid = left < 0 ? 0 : left < kLanes ? left : kLanes;
    F32 scale;
    I32 zero;
    const int64_t slot = slots.of[first / kLanes];
    load_grid(cache, slot, valid, scale, zero);
    int32_t words[kMaxHeadDim / kPerWord * kLanes];  // [word, key]
    const uint8_t* codes = cache.codes + slot * row_bytes;
    for (int64_t w = 0; w < head_dim / kPerWord; ++w) {
      for (int64_t key = 0; key < kLanes; ++key) {
        int32_t word = 0;
        if (key < valid) __builtin_memcpy(&word, codes + key * row_bytes + w * 4, sizeof word);
        words[w * kLanes + key] = word;
      }
    }
    for (int64_t w = 0; w < head_dim / kPerWord; ++w) {
      const I32 word = load(words + w * kLanes);
      for (int i = 0; i < kPerWord; ++i) {
        const I32 code = (word >> (i * kBits)) & i32((1 << kBits) - 1);
        store(k + (w * kPerWord + i) * kKeys + first, to_f32(code - zero) * scale);
      }
    }
  }
}

/// v [kKeys, dim] and poison [kKeys]  <-  the first `count` slots, count <= kKeys; rows beyond are
/// 0.
template <int kBits>
void dequantize_values(const KvCacheView& cache, const Slots& slots, int64_t count,
                       int64_t head_dim, const Tile& t) {
  const int64_t row_bytes = head_dim * kBits / 8;
  constexpr int64_t kStep = kLanes * kBits / 8;  // bytes of a vector
  for (int64_t first = 0; first < kKeys; first += kLanes) {
    const int64_t left = count - first;
    const int64_t valid = left < 0 ? 0 : left < kLanes ? left : kLanes;
    const int64_t slot = slots.of[first / kLanes];
    F32 scale;
    I32 zero;
    load_grid(cache, slot, valid, scale, zero);
    float scales[kLanes];
    int32_t zeros[kLanes];
    store(scales, scale);
    store(t.poison + first, defuse(scales));
    store(zeros, zero);
    for (int64_t key = 0; key < kLanes; ++key) {
      float* row = t.v + (first + key) * t.dim;
      const uint8_t* codes = cache.codes + (slot + key) * row_bytes;
      for (int64_t i = 0; i < t.dim; i += kLanes, codes += kStep) {
        F32 value = f32(0);
        if (key < valid) {
          uint8_t tail[kLanes] = {};
          const uint8_t* from = codes;
          if (head_dim - i < kLanes) {
            __builtin_memcpy(tail, codes, static_cast<size_t>((head_dim - i) * kBits / 8));
            from = tail;
          }
          const I32 code = kBits == 4 ? load_u4(from) : load_u8(from);
          value = to_f32(code - i32(zeros[key])) * f32(scales[key]);
        }
        store(row + i, value);
      }
    }
  }
}

// ---- Softmax ------------------------------------------------------------------------------------

/// Lane numbers 0 ... 15.
QUAROT_INLINE I32 lane_numbers() {
  constexpr int32_t numbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(numbers);
}

/// All ones where mask[c, c + 16) is true, zero where it is false or beyond `count`.
QUAROT_INLINE I32 load_mask(const bool* mask, int64_t c, int64_t count) {
  uint8_t tail[kLanes] = {};
  const auto* from = reinterpret_cast<const uint8_t*>(mask + c);
  if (count - c < kLanes) {
    if (count > c) __builtin_memcpy(tail, from, static_cast<size_t>(count - c));
    from = tail;
  }
  return greater(load_u8(from), i32(0));
}

/// Hides what row r of scores of `count` keys may not see; updates its maximum, and leaves the
/// logarithm of its factor. The row may see the keys in [from, seen), each in [0, kKeys], where
/// mask (null: all) is true.
QUAROT_INLINE void hide_and_find_maximum(const Tile& t, int64_t r, int64_t count, int64_t from,
                                         int64_t seen, const bool* mask) {
  float* scores = t.scores + r * kKeys;
  F32 maxima = f32(t.maximum[r]);
  const bool all = from == 0 && seen == kKeys && mask == nullptr;
  for (int64_t c = 0; all && c < kKeys; c += kLanes) {
    const F32 score = load(scores + c) + load(t.poison + c);
    store(scores + c, score);
    maxima = max(score, maxima);
  }
  for (int64_t c = 0; !all && c < kKeys; c += kLanes) {
    const I32 visible_below = greater(i32(static_cast<int32_t>(seen - c)), lane_numbers());
    I32 visible = visible_below & greater(lane_numbers(), i32(static_cast<int32_t>(from - c - 1)));
    if (mask != nullptr) visible = visible & load_mask(mask, c, count);
    const F32 score = select(visible, load(scores + c) + load(t.poison + c), f32(-kInfinity));
    store(scores + c, score);
    maxima = max(score, maxima);  // a NaN is passed over here, and comes out of exp below
  }
  const float maximum = reduce_max(maxima);
  t.factor[r] = t.maximum[r] - maximum;
  t.maximum[r] = maximum;
}

/// Turns the row's scores into weights exp(score - maximum); updates its sum.
QUAROT_INLINE void weigh_row(const Tile& t, int64_t r) {
  float* scores = t.scores + r * kKeys;
  F32 sum = f32(0);
  for (int64_t c = 0; c < kKeys; c += kLanes) {
    const F32 weight = exp(load(scores + c) - f32(t.maximum[r]));
    store(scores + c, weight);
    sum = sum + weight;
  }
  t.sum[r] = t.sum[r] * t.factor[r] + reduce_add(sum);
}

// ---- A task -------------------------------------------------------------------------------------

/// Query rows [first, first + rows) of sequence b and cache head `head`: row = s * group + (head in
/// the group).
struct Block {
  int64_t b, head, first, rows, group;
  int64_t s(int64_t r) const { return (first + r) / group; }
  int64_t query_head(int64_t r) const { return head * group + (first + r) % group; }
};

/// Offset in q and out of row r.
QUAROT_INLINE int64_t row_offset(const AttentionArgs& a, const Block& block, int64_t r) {
  return ((block.b * a.seq + block.s(r)) * a.heads + block.query_head(r)) * a.head_dim;
}

// ---- Few rows -----------------------------------------------------------------------------------

/// 16 keys (values) from `slot` on, of which the first `valid` are there; the others have scale 0.
/// copy: kLanes * row_bytes.
QUAROT_INLINE void load_group(Group& group, const KvCacheView& cache, int64_t slot, int64_t valid,
                              int64_t row_bytes, uint8_t* copy) {
  F32 scale;
  I32 zero;
  load_grid(cache, slot, valid, scale, zero);
  store(group.zero, zero);
  store(group.scale, scale);
  group.codes = cache.codes + slot * row_bytes;
  if (valid == kLanes) return;
  __builtin_memset(copy, 0, static_cast<size_t>(kLanes * row_bytes));
  __builtin_memcpy(copy, group.codes, static_cast<size_t>(valid * row_bytes));
  group.codes = copy;
}

/// Scores of rows [row, row + rows) and the keys from `first` of the tile on.
template <class Few, int R>
void few_scores(const Tile& t, const typename Few::State& few, int64_t first, int64_t row,
                int64_t rows, const Group& group) {
  for (; rows >= R; row += R, rows -= R) {
    Few::template scores<R>(t.scores + row * kKeys + first, kKeys,
                            few.query + row * Few::kQueryBytes, few.queries + row, few.words,
                            group);
  }
  if constexpr (R > 1) {
    if (rows > 0) few_scores<Few, R - 1>(t, few, first, row, rows, group);
  }
}
/// Adds the weighted values of a tile to the outputs, which are in t.v.
template <class Few, int R>
void few_values(const Tile& t, const typename Few::State& few, int64_t row, int64_t rows) {
  for (; rows >= R; row += R, rows -= R) {
    Few::template add_values<R>(t.v + row * Few::kDim, t.factor + row, few.rows + row,
                                few.weights + row * Few::kWeightBytes, few.bytes);
  }
  if constexpr (R > 1) {
    if (rows > 0) few_values<Few, R - 1>(t, few, row, rows);
  }
}

/// Stands for Few where rows are many or a head's words do not fill vectors.
struct Many {
  static constexpr bool kFew = false;
  static constexpr int64_t kRowBytes = 1;
  struct State {};
};

/// Attends to keys [begin, end), a multiple of kKeys or the last one: leaves out, maximum and sum
/// in the tile.
template <class Few>
void attend(const AttentionArgs& a, const Block& block, const Tile& t, int64_t begin, int64_t end) {
  const int64_t length = a.lengths[block.b];
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t at = row_offset(a, block, r);
    for (int64_t i = 0; i < t.dim; i += kLanes) {
      store(t.q + r * t.dim + i, load_any(a.dtype, a.q, at + i, at + a.head_dim) * f32(a.scale));
      store(t.out + r * t.dim + i, f32(0));
    }
    t.maximum[r] = kLowest;
    t.sum[r] = 0;
  }
  typename Few::State few;
  if constexpr (Few::kFew) {
    for (int64_t r = 0; r < block.rows; ++r) {
      Few::arrange(few.query + r * Few::kQueryBytes, few.queries[r], t.q + r * t.dim);
      store(few.common + r * kLanes, f32(0));
    }
    for (int64_t i = 0; i < block.rows * Few::kDim; i += kLanes) store(t.v + i, f32(0));
  }
  // Keys that row r may see, by causality alone.
  const auto seen = [&](int64_t r)
                        __attribute__((always_inline)) { return length - a.seq + block.s(r) + 1; };
  const int64_t last = seen(block.rows - 1);
  end = end < last ? end : last;
  const int64_t outside = (seen(0) - a.window - begin) / kKeys * kKeys;  // of the window
  if (outside > 0) begin += outside;
  uint8_t copy[kLanes * Few::kRowBytes];  // of the last keys or values
  for (int64_t key = begin; key < end; key += kKeys) {
    const int64_t count = end - key < kKeys ? end - key : kKeys;
    Slots slots{};
    for (int64_t i = 0; i < count; i += kLanes) {
      const TokenPlace place = place_of(a.pages, a.kv_heads, a.capacity, block.b, key + i);
      // Of a tile's keys those before every window may be in no block: any will do for them.
      slots.of[i / kLanes] = place.first < 0 ? 0 : place.first + block.head * place.apart;
    }
    Group values[kKeys / kLanes];
    if constexpr (Few::kFew) {
      for (int64_t first = 0; first < kKeys; first += kLanes) {
        const int64_t slot = slots.of[first / kLanes], left = count - first;
        const int64_t valid = left < 0 ? 0 : left < kLanes ? left : kLanes;
        Group keys;
        load_group(keys, a.k, slot, valid, Few::kRowBytes, copy);
        Few::transpose(few.words, keys.codes);
        few_scores<Few, kFewBeside>(t, few, first, 0, block.rows, keys);
        Group& group = values[first / kLanes];
        load_group(group, a.v, slot, valid, Few::kRowBytes, copy);
        Few::interleave_quads(few.bytes, first / kLanes, group.codes);
        store(t.poison + first, defuse(group.scale));
      }
    } else {
      if (a.bits == 4) {
        dequantize_keys<4>(a.k, slots, count, a.head_dim, t.k);
        dequantize_values<4>(a.v, slots, count, a.head_dim, t);
      } else {
        dequantize_keys<8>(a.k, slots, count, a.head_dim, t.k);
        dequantize_values<8>(a.v, slots, count, a.head_dim, t);
      }
      product_rows<kBlock>(t.scores, kKeys, nullptr, t.q, t.dim, t.k, kKeys, a.head_dim, block.rows,
                           kKeys);
    }
    for (int64_t r = 0; r < block.rows; ++r) {
      const bool* mask = a.mask == nullptr ? nullptr
                                           : a.mask + block.b * a.mask_batch_stride +
                                                 block.query_head(r) * a.mask_head_stride +
                                                 block.s(r) * a.mask_seq_stride + key;
      const auto within = [](int64_t at) __attribute__((always_inline)) {
        return at < 0 ? 0 : at < kKeys ? at : kKeys;
      };
      const int64_t visible = seen(r) - key;
      hide_and_find_maximum(t, r, count, within(visible - a.window), within(visible), mask);
    }
    // All rows at once: a row's factor alone would cost as much as a quarter of its weights.
    for (int64_t r = 0; r < block.rows; r += kLanes) store(t.factor + r, exp(load(t.factor + r)));
    for (int64_t r = 0; r < block.rows; ++r) weigh_row(t, r);
    if constexpr (Few::kFew) {
      for (int64_t r = 0; r < block.rows; ++r) {
        Few::arrange_weights(few.weights + r * Few::kWeightBytes, few.rows[r],
                             few.common + r * kLanes, t.factor[r], t.scores + r * kKeys, values);
      }
      few_values<Few, kFewBeside>(t, few, 0, block.rows);
    } else {
      product_rows<kBlock>(t.out, t.dim, t.factor, t.scores, kKeys, t.v, t.dim, kKeys, block.rows,
                           t.dim);
    }
  }
  if constexpr (Few::kFew) {
    for (int64_t r = 0; r < block.rows; ++r) {
      float* out = t.out + r * t.dim;
      Few::restore(out, t.v + r * Few::kDim);
      const F32 common = f32(reduce_add(load(few.common + r * kLanes)));
      for (int64_t i = 0; i < t.dim; i += kLanes) store(out + i, load(out + i) + common);
    }
  }
}

/// Attends the way that suits the rows and the layout of a head.
void attend_any(const AttentionArgs& a, const Block& block, const Tile& t, int64_t begin,
                int64_t end) {
  const int64_t words = block.rows <= kFewRows ? a.head_dim * a.bits / 32 : 0;
  if (a.bits == 4) {
    if (words == 8) return attend<Few<4, 8, kKeys>>(a, block, t, begin, end);
    if (words == 16) return attend<Few<4, 16, kKeys>>(a, block, t, begin, end);
    if (words == 32) return attend<Few<4, 32, kKeys>>(a, block, t, begin, end);
  } else {
    if (words == 8) return attend<Few<8, 8, kKeys>>(a, block, t, begin, end);
    if (words == 16) return attend<Few<8, 16, kKeys>>(a, block, t, begin, end);
    if (words == 32) return attend<Few<8, 32, kKeys>>(a, block, t, begin, end);
  }
  attend<Many>(a, block, t, begin, end);
}

/// out = unnormalised / sum, or 0 where nothing was seen; rounded once.
QUAROT_INLINE void write_row(const AttentionArgs& a, int64_t at, const float* unnormalised,
                             float sum) {
  for (int64_t i = 0; i < a.head_dim; i += kLanes) {
    const F32 value =
        sum == 0 ? f32(0) : load_upto<DType::f32>(unnormalised, i, a.head_dim) / f32(sum);
    store_any(a.dtype, a.out, at + i, at + a.head_dim, value);
  }
}

/// Partial result [head_dim + 2] of the row at `offset` in out, split `part`.
QUAROT_INLINE float* partial_of(const AttentionArgs& a, const AttentionSplit& split, int64_t offset,
                                int64_t part) {
  return a.workspace + (offset / a.head_dim * split.splits + part) * attention_partial(a.head_dim);
}

/// Adds the partial results of a row in ascending order of its splits. out: head_dim floats.
void combine_row(const AttentionArgs& a, const AttentionSplit& split, int64_t row, float* out) {
  const int64_t n = a.head_dim;
  float maximum = kLowest;
  for (int64_t part = 0; part < split.splits; ++part) {
    const float m = partial_of(a, split, row * n, part)[n];
    maximum = m > maximum ? m : maximum;
  }
  float sum = 0;
  for (int64_t part = 0; part < split.splits; ++part) {
    const float* partial = partial_of(a, split, row * n, part);
    float factor[kLanes];
    store(factor, exp(f32(partial[n] - maximum)));
    sum = sum + partial[n + 1] * factor[0];
    for (int64_t i = 0; i < n; i += kLanes) {
      const F32 older = part == 0 ? f32(0) : load(out + i);
      store(out + i, older + load_upto<DType::f32>(partial, i, n) * f32(factor[0]));
    }
  }
  write_row(a, row * n, out, sum);
}

void run_task(const AttentionArgs& a, const AttentionSplit& split, const Tile& t, int64_t task) {
  const int64_t group = a.heads / a.kv_heads, rows = a.seq * group;
  const int64_t parts = split.query_blocks * split.splits;  // one of them is 1
  const int64_t pair = task / parts, part = task % parts;
  const bool whole = split.splits == 1;
  // Later queries see more keys: blocks from both ends in turn give each thread its share.
  const int64_t turn = part % 2 == 0 ? part / 2 : split.query_blocks - 1 - part / 2;
  const int64_t first = whole ? turn * kRows : 0;
  const int64_t count = rows - first < kRows ? rows - first : kRows;
  const Block block{pair / a.kv_heads, pair % a.kv_heads, first, count, group};
  const int64_t key = attention_begin(a, a.lengths[block.b]) + (whole ? 0 : part * split.keys);
  attend_any(a, block, t, key, key + split.keys);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t at = row_offset(a, block, r);
    if (whole) {
      write_row(a, at, t.out + r * t.dim, t.sum[r]);
      continue;
    }
    float* partial = partial_of(a, split, at, part);
    __builtin_memcpy(partial, t.out + r * t.dim, static_cast<size_t>(a.head_dim) * sizeof(float));
    partial[a.head_dim] = t.maximum[r];
    partial[a.head_dim + 1] = t.sum[r];
  }
}

}  // namespace

void attention(const AttentionArgs& a, const AttentionSplit& split, const Executor& executor) {
  if (a.seq == 0) return;
  const int64_t rows = a.seq * (a.heads / a.kv_heads);
  const int64_t dim = ceil_div(a.head_dim, kLanes) * kLanes;
  const int64_t tasks = a.batch * a.kv_heads * split.query_blocks * split.splits;
  const int64_t work = (rows < kRows ? rows : kRows) * split.keys * dim;
  parallel_rows(executor, tasks, work, [&](int64_t begin, int64_t end) {
    const int64_t most = rows < kRows ? rows : kRows;
    const Scratch q(most * dim), k(dim * kKeys), v(kKeys * dim), scores(most * kKeys);
    const Scratch out(most * dim), maximum(kRows), sum(kRows), factor(kRows), poison(kKeys);
    const Tile tile{dim,        q.data(),       k.data(),   v.data(),      scores.data(),
                    out.data(), maximum.data(), sum.data(), factor.data(), poison.data()};
    for (int64_t task = begin; task < end; ++task) run_task(a, split, tile, task);
  });
  if (split.splits == 1) return;
  const int64_t results = a.batch * a.seq * a.heads;
  parallel_rows(executor, results, split.splits * dim, [&](int64_t begin, int64_t end) {
    const Scratch out(dim);
    for (int64_t row = begin; row < end; ++row) combine_row(a, split, row, out.data());
  });
}

}  // namespace quarot::cpu::QUAROT_ISA
