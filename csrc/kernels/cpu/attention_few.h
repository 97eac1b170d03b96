// Attention of few query rows (decode) to keys and values as integers, straight from their codes.
// Only for attention_isa.cpp.
//
// A row of numbers becomes integers of three signed bytes, the largest just below 2^23 (as exact as
// sums in fp32): the query once, the weights of a tile each time. What is summed then are products
// of bytes and nibbles, four in a lane and exact (dot.h), so in any order:
//
//   scores  lanes are 16 keys; a step takes a 32-bit word of each, transposed in registers
//   values  lanes are dimensions; a step takes the bytes of four keys, interleaved in registers
//
// A word or byte of codes is two planes of nibbles: the even and the odd dimensions of 4 bits, or
// the low and high halves of 8. Zeros are subtracted from the sums: from scores exactly, times the
// sum of the query. From outputs half of the codes' range is, exactly; half - zero is added once at
// the end, as all dimensions have it in common.
//
// Bound by the products: a row takes three steps for 64 codes, which take two more to become
// nibbles and one to change places.
#pragma once

#include <cstdint>

#include "kernels/cpu/dot.h"
#include "kernels/cpu/vec.h"

namespace quarot::cpu::QUAROT_ISA {

/// Rows up to which this is used. The same in every variant, because the other way rounds
/// otherwise; that way, what is dequantized serves more rows.
inline constexpr int64_t kFewRows = 8;
/// Rows side by side, with three sums each in registers.
inline constexpr int kFewBeside = kRegisterBytes == 64 ? 4 : kRegisterBytes == 32 ? 2 : 1;

// ---- Numbers of three bytes ----

inline constexpr int kDigits = 3;
/// Bytes of four numbers: one word of each digit and one more.
inline constexpr int64_t kFourDigits = 16;
inline constexpr float kLargestDigits = 0x7f0000;

/// The nearest integer, ties to even, of |a| < 2^23: twice what rint_i32 can do.
QUAROT_INLINE I32 to_integer(const F32& a) {
  const I32 sign = bits(a) >> 31;
  const I32 magnitude =
      bits(from_bits(bits(a) & i32(0x7fffffff)) + f32(0x1p23f)) - bits(f32(0x1p23f));
  return (magnitude ^ sign) - sign;
}
/// Integers of at most kLargestDigits: bytes 0 to 2 of each lane become the digits, in [-128, 127],
/// of base 256.
QUAROT_INLINE I32 digits(const I32& integer) {
  const I32 half = i32(0x808080);
  return (integer + half) ^ half;
}
/// The integer whose digits are `low`, `middle` and `high`, where these are sums of digits.
QUAROT_INLINE F32 from_digits(const F32& low, const F32& middle, const F32& high) {
  return (high * f32(256.0f * 256.0f) + middle * f32(256.0f)) + low;
}

/// 16 keys (or values) of one head.
struct Group {
  const uint8_t* codes;  // [16, words] of 32 bits
  int32_t zero[kLanes];
  float scale[kLanes];
};

/// What belongs to all digits of a row: their unit, and the sum of each digit.
struct FewRow {
  float unit;
  float sums[kDigits];
};

/// The same, of a row whose largest number is `largest`; sum: of add_digits.
QUAROT_INLINE FewRow few_row(float largest, const I32& sum) {
  F32 sums = to_f32(sum);
  sums = sums + swap_lanes<8>(sums);
  sums = sums + swap_lanes<4>(sums);
  float lane[kLanes];
  store(lane, sums);
  // NaN where the largest is not finite.
  return {largest * (1 / kLargestDigits) + (largest - largest), {lane[0], lane[1], lane[2]}};
}
/// sum + the digits of `four`, digit i in the lanes i, i + 4, ...
QUAROT_INLINE I32 add_digits(const I32& sum, const I32& four) {
  return sum + dot_widen(dot_step(i32(0), i32(0x01010101), four));
}

/// Keys and values of kWords words of kBits codes; tiles of kTileKeys.
template <int kBits, int kWords, int64_t kTileKeys>
struct Few {
  static constexpr bool kFew = true;
  static constexpr int kPlanes = 2;
  static constexpr int kHalf = 1 << (kBits - 1);
  static constexpr int64_t kRowBytes = kWords * 4;  // of a key
  static constexpr int64_t kDim = kWords * 32 / kBits;
  static_assert(kWords == 8 || kWords % kLanes == 0);

  /// Nibbles of plane `plane`.
  static QUAROT_INLINE I32 nibbles(const I32& word, int plane) {
    return (plane == 0 ? word : word >> 4) & i32(0x0f0f0f0f);
  }

  // ---- Scores ----

  /// Planes of a query: with 8 bits both are the same.
  static constexpr int kQueryPlanes = kBits == 4 ? 2 : 1;
  static constexpr int64_t kQueryPlane = kWords * kFourDigits;
  static constexpr int64_t kQueryBytes = kQueryPlanes * kQueryPlane;

  /// few [kQueryPlanes, kWords, 4, 4 bytes] and its description  <-  x [kDim].
  static void arrange(int8_t* few, FewRow& query, const float* x) {
    float planes[kDim];
    I32 largest = i32(0);
    for (int64_t i = 0; i < kDim; i += kLanes) {
      largest = max(largest, bits(load(x + i)) & i32(0x7fffffff));
    }
    for (int64_t i = 0; i < kDim / kQueryPlanes; ++i) {
      for (int p = 0; p < kQueryPlanes; ++p) {
        planes[p * (kDim / kQueryPlanes) + i] = x[kQueryPlanes * i + p];
      }
    }
    const float most = __builtin_bit_cast(float, reduce_max(largest));
    const float safe = most < kLeast ? kLeast : most;
    I32 sum = i32(0);
    for (int64_t i = 0; i < kDim; i += kLanes) {
      const I32 integer = to_integer(load(planes + i) * f32(kLargestDigits / safe));
      const I32 four = transpose_bytes(digits(integer));
      sum = add_digits(sum, four);
      store_as(few + i * 4, four);
    }
    query = few_row(safe, sum);
  }

  /// words [kWords, 16 keys].
  static QUAROT_INLINE void transpose(int32_t* words, const uint8_t* codes) {
    constexpr int kVectors = kWords < kLanes ? kWords : kLanes;
#pragma GCC unroll 2
    for (int64_t part = 0; part < kWords; part += kVectors) {
      I32 v[kVectors];
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i) {
        if constexpr (kWords < kLanes) {
          load_halves(v[i], codes + i * kRowBytes, codes + (i + 8) * kRowBytes);
        } else {
          v[i] = load_as<I32>(codes + i * kRowBytes + part * 4);
        }
      }
      exchange_all<1>(v);
      exchange_all<2>(v);
      exchange_all<4>(v);
      if constexpr (kVectors == 16) exchange_all<8>(v);
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i) store(words + (part + i) * kLanes, v[i]);
    }
  }

  /// scores [R, 16] (rows `stride` apart)  <-  queries [R] times the group's keys, whose words are
  /// transposed.
  template <int R>
  static QUAROT_INLINE void scores(float* scores, int64_t stride, const int8_t* few,
                                   const FewRow* queries, const int32_t* words,
                                   const Group& group) {
    I32 total[R][kDigits];
#pragma GCC unroll 2
    for (int plane = 0; plane < kPlanes; ++plane) {
      const int8_t* q = few + (kQueryPlanes == 2 ? plane * kQueryPlane : 0);
      I32 sum[R][kDigits];
      dots<R, kWords>(sum, plane, words, q, kQueryBytes);
      add_plane<R>(total, sum, plane);
    }
    const F32 zero = to_f32(load(group.zero)), scale = load(group.scale);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      F32 less_zero[kDigits];
#pragma GCC unroll 3
      for (int d = 0; d < kDigits; ++d) {
        less_zero[d] = to_f32(total[r][d]) - zero * f32(queries[r].sums[d]);
      }
      const F32 sum = from_digits(less_zero[0], less_zero[1], less_zero[2]);
      // A scale that is not finite makes NaN of the score, also where the sum is zero or infinite.
      store(scores + r * stride, sum * (scale * f32(queries[r].unit)) + (scale - scale));
    }
  }

  /// sum [R, digits]  <-  nibbles of kCount vectors times the fours at `fours`, whose rows are
  /// row_bytes apart.
  template <int R, int64_t kCount>
  static QUAROT_INLINE void dots(I32 (&sum)[R][kDigits], int plane, const int32_t* vectors,
                                 const int8_t* fours, int64_t row_bytes) {
    static_assert(kCount % kDotRun == 0);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int d = 0; d < kDigits; ++d) sum[r][d] = i32(0);
    }
    for (int64_t first = 0; first < kCount; first += kDotRun) {
      I32 part[R][kDigits];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
        for (int d = 0; d < kDigits; ++d) part[r][d] = kDotWidens ? i32(0) : sum[r][d];
      }
#pragma GCC unroll 2
      for (int64_t i = first; i < first + kDotRun; ++i) {
        const I32 u = nibbles(load(vectors + i * kLanes), plane);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
          for (int d = 0; d < kDigits; ++d) {
            part[r][d] = dot_step(part[r][d], u,
                                  broadcast4(fours + r * row_bytes + i * kFourDigits + d * 4));
          }
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
        for (int d = 0; d < kDigits; ++d) {
          sum[r][d] = kDotWidens ? sum[r][d] + dot_widen(part[r][d]) : part[r][d];
        }
      }
    }
  }
  /// total = sum of the planes: the second one counts 16 times with 8 bits.
  template <int R>
  static QUAROT_INLINE void add_plane(I32 (&total)[R][kDigits], const I32 (&sum)[R][kDigits],
                                      int plane) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int d = 0; d < kDigits; ++d) {
        if (plane == 0) {
          total[r][d] = sum[r][d];
        } else {
          total[r][d] = total[r][d] + (kBits == 8 ? sum[r][d] << 4 : sum[r][d]);
        }
      }
    }
  }

  // ---- Values ----

  static constexpr int64_t kQuads = kTileKeys / 4;
  static constexpr int64_t kGroupQuads = kLanes / 4;
  /// Vectors of a quad: a lane has a byte of each of four values.
  static constexpr int64_t kVectors = kWords * 4 / kLanes;
  static constexpr int64_t kWeightBytes = kQuads * kFourDigits;

  /// Quads of group `at` of a tile's bytes [kVectors, kQuads, 16].
  static QUAROT_INLINE void interleave_quads(int32_t* bytes, int64_t at, const uint8_t* codes) {
    // Where a vector has two keys, it is two quads at once.
    constexpr bool kTwoKeys = kWords < kLanes;
    for (int64_t quad = 0; quad < (kTwoKeys ? 2 : kGroupQuads); ++quad) {
      for (int64_t part = 0; part < kWords; part += kLanes) {
        I32 v[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const uint8_t* key = codes + (quad * 4 + i) * kRowBytes + part * 4;
          if constexpr (kTwoKeys) {
            load_halves(v[i], key, key + 8 * kRowBytes);
          } else {
            v[i] = load_as<I32>(key);
          }
        }
        interleave<1>(v[0], v[1]);
        interleave<1>(v[2], v[3]);
        interleave<2>(v[0], v[2]);
        interleave<2>(v[1], v[3]);
        // Now v[0], v[2], v[1], v[3] have words 0 to 3 of each four.
        const auto to = [&](int64_t vector, int64_t q) __attribute__((always_inline)) {
          return bytes + (vector * kQuads + at * kGroupQuads + q) * kLanes;
        };
        if constexpr (kTwoKeys) {
          exchange<8>(v[0], v[2]);
          exchange<8>(v[1], v[3]);
          store(to(0, quad), v[0]);
          store(to(0, quad + 2), v[2]);
          store(to(1, quad), v[1]);
          store(to(1, quad + 2), v[3]);
        } else {
          store(to(part / 4, quad), v[0]);
          store(to(part / 4 + 1, quad), v[2]);
          store(to(part / 4 + 2, quad), v[1]);
          store(to(part / 4 + 3, quad), v[3]);
        }
      }
    }
  }
  /// The dimension of a lane of an output vector; with 8 bits plane 0 has all.
  static constexpr int64_t dimension(int plane, int64_t vector, int64_t lane) {
    const int64_t in_word = kWords < kLanes ? lane % 8 : lane;
    const int64_t in_four =
        kWords < kLanes ? vector * 2 + lane / 8 : vector % 4;  // which word of a four
    const int64_t word = (kWords < kLanes ? 0 : vector / 4 * kLanes) + in_word / 4 * 4 + in_four;
    return kBits == 4 ? word * 8 + lane % 4 * 2 + plane : word * 4 + lane % 4;
  }
  static constexpr int kOutPlanes = kBits == 4 ? 2 : 1;

  /// x [kDim] <- few [kOutPlanes, kVectors, 16].
  static void restore(float* x, const float* few) {
    for (int plane = 0; plane < kOutPlanes; ++plane) {
      for (int64_t v = 0; v < kVectors; ++v) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          x[dimension(plane, v, lane)] = *few++;
        }
      }
    }
  }

  /// few [kQuads, 4, 4 bytes] and its description  <-  weights [kTileKeys] times the groups'
  /// scales, none negative. common [16] <- factor * common + the same times half - zero: the
  /// outputs' codes are less half of their range, so that little cancels in the end.
  static QUAROT_INLINE void arrange_weights(int8_t* few, FewRow& row, float* common, float factor,
                                            const float* weights, const Group* groups) {
    F32 scaled[kTileKeys / kLanes];
    F32 most = f32(kLeast);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kTileKeys / kLanes; ++i) {
      scaled[i] = load(weights + i * kLanes) * load(groups[i].scale);
      most = max(scaled[i], most);
    }
    const float largest = reduce_max(most);
    const F32 inverse = f32(kLargestDigits / largest);
    I32 sum = i32(0);
    F32 rest = f32(0);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kTileKeys / kLanes; ++i) {
      const I32 integer = to_integer(scaled[i] * inverse);
      const I32 four = transpose_bytes(digits(integer));
      sum = add_digits(sum, four);
      rest = rest + to_f32(integer) * to_f32(i32(kHalf) - load(groups[i].zero));
      store_as(few + i * kLanes * 4, four);
    }
    row = few_row(largest, sum);
    store(common, load(common) * f32(factor) + rest * f32(row.unit));
  }

  /// out [R, kDim] = factor [R] * out + weights [R, kWeightBytes] times the values.
  template <int R>
  static QUAROT_INLINE void add_values(float* out, const float* factor, const FewRow* rows,
                                       const int8_t* weights, const int32_t* bytes) {
    for (int64_t v = 0; v < kVectors; ++v) {
      I32 total[R][kDigits];
#pragma GCC unroll 2
      for (int plane = 0; plane < kPlanes; ++plane) {
        I32 sum[R][kDigits];
        dots<R, kQuads>(sum, plane, bytes + v * kQuads * kLanes, weights, kWeightBytes);
        add_plane<R>(total, sum, kBits == 4 ? 0 : plane);
        if (kBits == 8 && plane == 0) continue;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          float* to = out + r * kDim + ((kBits == 4 ? plane * kVectors : 0) + v) * kLanes;
          F32 less_half[kDigits];
#pragma GCC unroll 3
          for (int d = 0; d < kDigits; ++d) {
            less_half[d] = to_f32(total[r][d]) - f32(kHalf * rows[r].sums[d]);
          }
          const F32 sums = from_digits(less_half[0], less_half[1], less_half[2]);
          store(to, load(to) * f32(factor[r]) + sums * f32(rows[r].unit));
        }
      }
    }
  }

  /// What a task keeps beside scores and outputs.
  struct State {
    int8_t query[kFewRows * kQueryBytes];
    FewRow queries[kFewRows];
    int32_t words[kWords * kLanes];             // of 16 keys, transposed
    int32_t bytes[kVectors * kQuads * kLanes];  // of a tile of values, interleaved
    int8_t weights[kFewRows * kWeightBytes];
    FewRow rows[kFewRows];            // of the weights
    float common[kFewRows * kLanes];  // sums of weight * (half - zero), for all outputs
  };

 private:
  /// Where all numbers are less, the unit stays that of this one: its inverse would overflow.
  static constexpr float kLeast = 0x1p-100f;
};

}  // namespace quarot::cpu::QUAROT_ISA
