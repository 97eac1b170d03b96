// Attention of few query rows (decode) to 16 keys, straight from the codes: nothing is transposed
// and no key or value is written out. Only for attention_isa.cpp.
//
// A code takes some instructions on its way to fp32 (two with AVX-512), and one a row after that.
// So the lanes are the words of 32 bits in which the codes lie: lane j of a vector and its nibble
// (byte) i are dimension kPerWord * j + i of a key. Queries and outputs are kept in that order,
// [kPerWord][words], and vectors of 16 words are cut out of the cache as they are:
//
//   8 words a key (64 dimensions of 4 bits): vector v holds keys v and v + 8; there are 8
//   16 or 32 words: one or two vectors a key
//
// Scores: the lanes of a key are added in a tree that merges two vectors at each level (stride 1,
// 2, 4, 8) and ends with the 16 scores in the lanes of one vector. A key's scale multiplies its
// score, a value's its weight. What is multiplied are codes less half of their range, whatever the
// zero: the rest, half - zero, is the same for all dimensions of a key and enters once, times the
// sum of the query, or times the weight into what all dimensions of the output have in common.
#pragma once

#include <cstdint>

#include "kernels/cpu/vec.h"

namespace quarot::cpu::QUAROT_ISA {

/// Rows up to which this is faster than dequantizing for all rows; the same in every variant,
/// because the order of additions is its own.
inline constexpr int64_t kFewRows = 8;

/// 16 keys (or values) of one head.
struct Group {
  const uint8_t* codes;  // [16, words] of 32 bits
  int32_t zero[kLanes];
  float scale[kLanes];
};

/// How words of kBits codes lie in vectors; kWords of them are a key.
template <int kBits, int kWords>
struct Few {
  static constexpr bool kFew = true;
  static constexpr int kPerWord = 32 / kBits;
  static constexpr int64_t kRowBytes = kWords * 4;                      // of a key
  static constexpr int64_t kWidth = kWords < kLanes ? kLanes : kWords;  // of a row of q or out
  static constexpr int64_t kRow = kPerWord * kWidth;                    // floats of q or out
  static constexpr int64_t kVectors = kWords < kLanes ? kWords : kLanes;
  static constexpr int64_t kParts = kWidth / kLanes;  // vectors of a key
  static constexpr bool kTwoKeys = kWords < kLanes;
  static_assert(kWords == 8 || kWords % kLanes == 0);

  /// Part `part` of vector v.
  static QUAROT_INLINE I32 words(const Group& group, int64_t v, int64_t part) {
    const uint8_t* at = group.codes + v * kWords * 4;
    if constexpr (kTwoKeys) {
      I32 both;
      load_halves(both, at, at + 8 * kWords * 4);
      return both;
    } else {
      return load_as<I32>(at + part * kLanes * 4);
    }
  }
  /// x [16 keys] in the lanes of vector v; spread: room for 16 vectors, filled by `spread_keys`.
  template <class Scalar>
  static QUAROT_INLINE auto of_keys(const Scalar* x, const Scalar* spread, int64_t v) {
    if constexpr (kTwoKeys) return load(spread + v * kLanes);
    if constexpr (sizeof(Scalar) == 4 && !kTwoKeys)
      return Fill<decltype(load(x)), Scalar>::of(x[v]);
  }
  template <class Scalar>
  static QUAROT_INLINE void spread_keys(Scalar* spread, const Scalar* x) {
    if constexpr (kTwoKeys) {
      for (int64_t v = 0; v < kVectors; ++v) {
        for (int64_t lane = 0; lane < 8; ++lane) spread[v * kLanes + lane] = x[v];
        for (int64_t lane = 8; lane < 16; ++lane) spread[v * kLanes + lane] = x[v + 8];
      }
    }
  }
  static constexpr int32_t kHalf = 1 << (kBits - 1);
  static QUAROT_INLINE F32 codes(const I32& word, int i) {
    const I32 moved = word >> (i * kBits);
    if constexpr (kBits == 4) return centred_nibbles(moved);
    return to_f32((moved & i32(2 * kHalf - 1)) - i32(kHalf));
  }
  /// half - zero of the 16 keys.
  static QUAROT_INLINE F32 rest(const Group& group) {
    return to_f32(i32(kHalf) - load(group.zero));
  }

  /// few [kRow] <- x [head_dim].
  static void arrange(float* few, const float* x) {
    for (int i = 0; i < kPerWord; ++i) {
      for (int64_t j = 0; j < kWidth; ++j) {
        few[i * kWidth + j] = x[kPerWord * (j % kWords) + i];
      }
    }
  }
  /// x [head_dim] <- few [kRow], of which the halves are added where a vector has two keys.
  static void restore(float* x, const float* few) {
    for (int i = 0; i < kPerWord; ++i) {
      for (int64_t j = 0; j < kWords; ++j) {
        const float* from = few + i * kWidth + j;
        x[kPerWord * j + i] = kTwoKeys ? from[0] + from[8] : from[0];
      }
    }
  }

  /// scores [R, 16] (rows `stride` apart)  <-  q [R, kRow], whose sums are q_sums [R], times the
  /// group's keys.
  template <int R>
  static QUAROT_INLINE void scores(float* scores, int64_t stride, const float* q,
                                   const float* q_sums, const Group& group) {
    float sums[R][kVectors * kLanes];
    for (int64_t v = 0; v < kVectors; ++v) {
      F32 sum[R];
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) sum[r] = f32(0);
#pragma GCC unroll 2
      for (int64_t part = 0; part < kParts; ++part) {
        const I32 word = words(group, v, part);
#pragma GCC unroll 8
        for (int i = 0; i < kPerWord; ++i) {
          const F32 code = codes(word, i);
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r) {
            sum[r] = fma(code, load(q + r * kRow + i * kWidth + part * kLanes), sum[r]);
          }
        }
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) store(sums[r] + v * kLanes, sum[r]);
    }
    const F32 scale = load(group.scale);
    for (int r = 0; r < R; ++r) {
      merge<1>(sums[r], kVectors);
      merge<2>(sums[r], kVectors / 2);
      merge<4>(sums[r], kVectors / 4);
      if (!kTwoKeys) merge<8>(sums[r], kVectors / 8);
      const F32 product = fma(rest(group), f32(q_sums[r]), load(sums[r]));
      // A scale that is not finite makes NaN of the score, also where the sum is zero or infinite.
      store(scores + r * stride, product * scale + (scale - scale));
    }
  }
  template <int kStride>
  static QUAROT_INLINE void merge(float* vectors, int64_t count) {
    for (int64_t v = 0; v < count / 2; ++v) {
      const float* from = vectors + 2 * v * kLanes;
      store(vectors + v * kLanes, add_pairs<kStride>(load(from), load(from + kLanes)));
    }
  }

  /// out [R, kRow] = (factor ? factor [R] * out : out) + weights [R, 16] (rows `stride` apart)
  /// times the group's values; common [R, 16], whose sum belongs to each output, likewise.
  template <int R>
  static QUAROT_INLINE void add_values(float* out, float* common, const float* factor,
                                       const float* weights, int64_t stride, const Group& group) {
    float scaled[R][kLanes], spread[R][kTwoKeys ? kVectors * kLanes : 1];
    for (int r = 0; r < R; ++r) {
      const F32 weight = load(weights + r * stride) * load(group.scale);
      store(scaled[r], weight);
      spread_keys(spread[r], scaled[r]);
      const F32 older = load(common + r * kLanes);
      store(common + r * kLanes,
            fma(weight, rest(group), factor == nullptr ? older : older * f32(factor[r])));
    }
    for (int i = 0; i < kPerWord; ++i) {
      for (int64_t part = 0; part < kParts; ++part) {
        F32 sum[R];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) sum[r] = f32(0);
        for (int64_t v = 0; v < kVectors; ++v) {
          const F32 code = codes(words(group, v, part), i);
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r) sum[r] = fma(code, of_keys(scaled[r], spread[r], v), sum[r]);
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          float* to = out + r * kRow + i * kWidth + part * kLanes;
          const F32 older = factor == nullptr ? load(to) : load(to) * f32(factor[r]);
          store(to, older + sum[r]);
        }
      }
    }
  }
};

}  // namespace quarot::cpu::QUAROT_ISA
