// The Hadamard transform of one row of fp32 in scratch memory, for every kernel that contains one.
// Only for *_isa.cpp files (see vec.h).
//
// A row holds n / (size * inner) blocks, a block is [K][2^p][inner]: out = row * (I (x) H_K (x)
// H_2^p (x) I_inner), unscaled. First 2^p: log2 butterfly stages with strides inner, 2*inner, ...;
// strides below 16 inside the registers. Then the factor: at most K * (K / 4 + 5) additions for
// each of the 2^p * inner columns. So n * (p + K / 4 + 5) additions a row; the order of additions
// is fixed by the stages, not by the vector width.
#pragma once

#include <cstdint>

#include "kernels/cpu/vec.h"
#include "kernels/hadamard.h"

namespace quarot::cpu::QUAROT_ISA {

// ---- Butterflies inside a vector ----

/// Lane i gets v[i] + v[i ^ kStride], or v[i ^ kStride] - v[i] where i & kStride.
template <int kStride>
QUAROT_INLINE NativeF32 butterfly(const NativeF32& v) {
  NativeI32 negative;  // a constant to the optimiser
  for (int i = 0; i < kRegisterBytes / 4; ++i) negative[i] = (i & kStride) != 0 ? INT32_MIN : 0;
  return swap_lanes<kStride>(v) + from_bits(bits(v) ^ negative);
}
template <int kStride, class Half>
QUAROT_INLINE Pair<Half> butterfly(const Pair<Half>& v) {
  if constexpr (kStride * 4 == sizeof(Half)) {
    return {v.lo + v.hi, v.lo - v.hi};
  } else {
    return {butterfly<kStride>(v.lo), butterfly<kStride>(v.hi)};
  }
}

/// The stages with strides 1 ... width / 2 of the sixteen lanes; width = 1, 2, 4, 8 or 16.
QUAROT_INLINE F32 butterflies(F32 v, int64_t width) {
  if (width > 1) v = butterfly<1>(v);
  if (width > 2) v = butterfly<2>(v);
  if (width > 4) v = butterfly<4>(v);
  if (width > 8) v = butterfly<8>(v);
  return v;
}

// ---- Stages between vectors ----

/// One butterfly stage over `count` floats in groups of 2 * stride.
inline void butterfly_stage(float* x, int64_t count, int64_t stride) {
  for (int64_t base = 0; base < count; base += 2 * stride) {
    float* a = x + base;
    float* b = a + stride;
    int64_t i = 0;
    for (; i + kLanes <= stride; i += kLanes) {
      const F32 u = load(a + i), v = load(b + i);
      store(a + i, u + v);
      store(b + i, u - v);
    }
    for (; i < stride; ++i) {  // a stride that is no multiple of 16: odd `inner`
      const float u = a[i], v = b[i];
      a[i] = u + v;
      b[i] = u - v;
    }
  }
}

/// Two stages in one pass over memory: strides `stride` and 2 * stride, a multiple of 16.
inline void butterfly_two_stages(float* x, int64_t count, int64_t stride) {
  for (int64_t base = 0; base < count; base += 4 * stride) {
    float* p = x + base;
    for (int64_t i = 0; i < stride; i += kLanes, p += kLanes) {
      const F32 a = load(p), b = load(p + stride);
      const F32 c = load(p + 2 * stride), d = load(p + 3 * stride);
      const F32 ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
      store(p, ab + cd);
      store(p + stride, a_b + c_d);
      store(p + 2 * stride, ab - cd);
      store(p + 3 * stride, a_b - c_d);
    }
  }
}

// ---- The factor ----
//
// Every output is a sum of +-x[b] over all rows b. Four rows have only 16 such sums, so these are
// made once, and an output takes one of them: a quarter of the additions. Eight of the sums are the
// others' negatives. A small factor, whose sums cost as much as their use, makes only eight, and an
// output takes one times a sign: the same bits, as that product is exact.

inline constexpr int64_t kGroupRows = 4;
inline constexpr int64_t kGroupSums = 1 << kGroupRows;
/// Factors up to this order make half of the sums; measured.
inline constexpr int64_t kMostHalfOrder = 64;
/// Vectors of columns side by side, which share the choice of a sum; other registers are too few.
inline constexpr int kBeside = kRegisterBytes == 64 ? 2 : 1;
inline constexpr int64_t kBesideLanes = kBeside * kLanes;
/// Groups whose sums are in memory at a time: 16 KB, half of a small L1.
inline constexpr int64_t kRunGroups = 16 / kBeside;
/// Outputs that are summed side by side, which hides the latency of an addition.
inline constexpr int kOutputs = kRegisterBytes == 64 ? 8 : 4;

/// Stores a vector as elements [at, min(at + 16, end)) of a row: what `put` is below.
struct InPlace {
  float* row;
  QUAROT_INLINE void operator()(int64_t at, int64_t end, const F32& value) const {
    store_upto<DType::f32>(row, at, end, value);
  }
};

/// sums [16, or its first 8]: entry i is +-x0 +- x1 +- x2 +- x3, minus where i has the row's bit.
/// Entries are kBesideLanes apart.
template <bool kHalf>
QUAROT_INLINE void group_sums(const F32& x0, const F32& x1, const F32& x2, const F32& x3,
                              float* sums) {
  const F32 low[kGroupRows] = {x0 + x1, x1 - x0, x0 - x1, -x0 - x1};
  const F32 high[kGroupRows] = {x2 + x3, x3 - x2, x2 - x3, -x2 - x3};
#pragma GCC unroll 16
  for (int i = 0; i < (kHalf ? kGroupSums / 2 : kGroupSums); ++i)
    store(sums + i * kBesideLanes, low[i % 4] + high[i / 4]);
}

/// total + sign * sum for a sign of +-1.
QUAROT_INLINE F32 add_signed(const F32& total, const F32& sum, float sign) {
#if defined(__FMA__)
  return fma(f32(sign), sum, total);
#else
  return total + f32(sign) * sum;
#endif
}

/// Puts N outputs, `stride` apart from `at` on: (base ? base[output] : 0) + sums of `groups`
/// groups. choice, sign: [groups, order] offsets into a group's sums, and their signs (kHalf only);
/// valid: columns.
template <int N, bool kHalf, class Put>
QUAROT_INLINE void factor_outputs(const Put& put, int64_t at, int64_t stride, int64_t valid,
                                  const float* base, const float* sums, const uint16_t* choice,
                                  const float* sign, int64_t order, int64_t groups) {
  F32 total[N][kBeside];
#pragma GCC unroll 8
  for (int o = 0; o < N; ++o) {
#pragma GCC unroll 2
    for (int v = 0; v < kBeside; ++v) {
      total[o][v] = base == nullptr ? f32(0) : load(base + o * kBesideLanes + v * kLanes);
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    int64_t chosen[N];
    if constexpr (N % 4 == 0) {  // four offsets a load: loads are what there is most of
#pragma GCC unroll 2
      for (int four = 0; four < N; four += 4) {
        uint64_t offsets;
        __builtin_memcpy(&offsets, choice + four, sizeof offsets);
#pragma GCC unroll 4
        for (int o = 0; o < 4; ++o) chosen[four + o] = offsets >> (16 * o) & 0xffff;
      }
    } else {
      for (int o = 0; o < N; ++o) chosen[o] = choice[o];
    }
#pragma GCC unroll 8
    for (int o = 0; o < N; ++o) {
#pragma GCC unroll 2
      for (int v = 0; v < kBeside; ++v) {
        const F32 sum = load(sums + chosen[o] + v * kLanes);
        total[o][v] = kHalf ? add_signed(total[o][v], sum, sign[o]) : total[o][v] + sum;
      }
    }
    sums += kGroupSums * kBesideLanes;
    choice += order;
    if constexpr (kHalf) sign += order;
  }
#pragma GCC unroll 8
  for (int o = 0; o < N; ++o) {
#pragma GCC unroll 2
    for (int v = 0; v < kBeside; ++v) {
      if (v * kLanes < valid) {
        put(at + o * stride + v * kLanes, at + o * stride + valid, total[o][v]);
      }
    }
  }
}

/// Puts, from `at` on, the sums over b of x[b][c] * sign[b][a] for a block [K][columns], K = order.
/// choice, sign: [ceil(K / 4), K], from factor_choices. sums: kRunGroups * 16 * kBesideLanes
/// floats; out: K * kBesideLanes.
template <bool kHalf, class Put>
[[gnu::noinline]] void apply_factor(const float* x, const Put& put, int64_t at, int64_t order,
                                    int64_t columns, const uint16_t* choice, const float* sign,
                                    float* sums, float* out) {
  const int64_t groups = ceil_div(order, kGroupRows);
  for (int64_t c = 0; c < columns; c += kBesideLanes) {
    for (int64_t first = 0; first < groups; first += kRunGroups) {
      const int64_t count = groups - first < kRunGroups ? groups - first : kRunGroups;
      for (int64_t g = 0; g < count; ++g) {
        for (int v = 0; v < kBeside; ++v) {
          const int64_t column = c + v * kLanes;
          const auto row = [&](int64_t i) __attribute__((always_inline)) {
            const int64_t b = (first + g) * kGroupRows + i;
            const bool there = b < order && column < columns;
            return there ? load_upto<DType::f32>(x + b * columns, column, columns) : f32(0);
          };
          group_sums<kHalf>(row(0), row(1), row(2), row(3),
                            sums + g * kGroupSums * kBesideLanes + v * kLanes);
        }
      }
      const auto outputs = [&]<int N>(int64_t a) __attribute__((always_inline)) {
        const float* base = first == 0 ? nullptr : out + a * kBesideLanes;
        const uint16_t* chosen = choice + first * order + a;
        const float* signs = sign + first * order + a;
        if (first + count == groups) {  // all of x is read: its columns may be written
          factor_outputs<N, kHalf>(put, at + a * columns + c, columns, columns - c, base, sums,
                                   chosen, signs, order, count);
        } else {
          factor_outputs<N, kHalf>(InPlace{out}, a * kBesideLanes, kBesideLanes, kBesideLanes, base,
                                   sums, chosen, signs, order, count);
        }
      };
      int64_t a = 0;
      for (; a + kOutputs <= order; a += kOutputs) outputs.template operator()<kOutputs>(a);
      for (; a + 4 <= order; a += 4) outputs.template operator()<4>(a);
      for (; a < order; ++a) outputs.template operator()<1>(a);
    }
  }
}

/// Which sum of each group each output takes: choice [ceil(K / 4), K]  <-  signs [K, K] of +-1.
/// With half of the sums the group's last row is never negative: `sign` [ceil(K / 4), K] says so.
inline void factor_choices(uint16_t* choice, float* sign, const int8_t* signs, int64_t order) {
  const int64_t groups = ceil_div(order, kGroupRows);
  for (int64_t g = 0; g < groups; ++g, choice += order, sign += order) {
    for (int64_t a = 0; a < order; ++a) {
      int64_t sum = 0;
      for (int64_t i = 0; i < kGroupRows && g * kGroupRows + i < order; ++i) {
        sum |= int64_t{signs[(g * kGroupRows + i) * order + a] < 0} << i;
      }
      const bool negate = order <= kMostHalfOrder && sum >= kGroupSums / 2;
      sign[a] = negate ? -1.0f : 1.0f;
      choice[a] = static_cast<uint16_t>((negate ? kGroupSums - 1 - sum : sum) * kBesideLanes);
    }
  }
}

// ---- A factor of circulants ----
//
// Williamson's matrices (172, 156) are 4 x 4 blocks, each a circulant of m = K / 4: the sign
// between input (s, i + d) and output (r, i) depends on r, s and d alone. So the sums of the four
// inputs (0 ... 3, j), eight of them up to their sign, are made once, and what output (r, i) takes
// from them lies, for all i, at the same distance from i: one look at a list serves kSteps outputs,
// whose running sums are in registers.

class Circulants {
 public:
  /// Whether this is for the matrix.
  static bool fit(const int8_t* signs, int64_t order) {
    const int64_t m = order / 4;
    if (order % 4 != 0 || m < kFewest) return false;
    for (int64_t b = 0; b < order; ++b) {
      const int8_t* row = signs + b * order;
      const int8_t* next = (b + 1) % m == 0 ? row + (1 - m) * order : row + order;
      for (int64_t a = 0; a < order; a += m) {
        if (next[a] != row[a + m - 1] || __builtin_memcmp(next + a + 1, row + a, m - 1) != 0) {
          return false;
        }
      }
    }
    return true;
  }

  Circulants(const int8_t* signs, int64_t order)
      : m_(order / 4),
        lists_(order == 0 ? 0 : ceil_div(m_, kSteps) * order / 2),
        sums_(order == 0 ? 0 : kSums * rows() * kLanes) {
    uint16_t* list = lists();
    for (int64_t first = 0; first < m_; first += kSteps) {
      for (int64_t r = 0; r < 4; ++r) {
        for (int pass = 0; pass < 2; ++pass) {
          for (int64_t d = 0; d < m_; ++d) {
            int sum = 0;
            const bool negative = signs[d * order + r * m_] < 0;
            if (negative != (pass == 1)) continue;
            for (int s = 1; s < 4; ++s) {
              const bool other = signs[(s * m_ + d) * order + r * m_] < 0;
              sum |= (other != negative ? 1 : 0) << (s - 1);
            }
            const int64_t at = (d + start(first)) % m_;
            *list++ = static_cast<uint16_t>((sum * rows() + at) * kLanes);
          }
          if (pass == 0) plus_[r] = list - lists() - (first / kSteps * 4 + r) * m_;
        }
      }
    }
  }

  /// As apply_factor.
  template <class Put>
  [[gnu::noinline]] void operator()(const float* x, const Put& put, int64_t at,
                                    int64_t columns) const {
    for (int64_t c = 0; c < columns; c += kLanes) {
      make_sums(x, c, columns);
      const uint16_t* list = lists();
      for (int64_t first = 0; first < m_; first += kSteps) {
        for (int64_t r = 0; r < 4; ++r, list += m_) {
          F32 total[kSteps];
#pragma GCC unroll 11
          for (int i = 0; i < kSteps; ++i) total[i] = f32(0);
          int64_t d = 0;
          for (; d < plus_[r]; ++d) {
            const float* from = sums_.data() + list[d];
#pragma GCC unroll 11
            for (int i = 0; i < kSteps; ++i) total[i] = total[i] + load(from + i * kLanes);
          }
          for (; d < m_; ++d) {
            const float* from = sums_.data() + list[d];
#pragma GCC unroll 11
            for (int i = 0; i < kSteps; ++i) total[i] = total[i] - load(from + i * kLanes);
          }
          int64_t to = at + (r * m_ + start(first)) * columns;
#pragma GCC unroll 11
          for (int i = 0; i < kSteps; ++i, to += columns) put(to + c, to + columns, total[i]);
        }
      }
    }
  }

 private:
  static constexpr int kSums = 8;
  /// Outputs side by side: enough chains of additions, and below AVX-512 what the registers hold.
  static constexpr int kSteps = kRegisterBytes == 64 ? 11 : kRegisterBytes == 32 ? 5 : 3;
  /// Rows of a circulant (Williamson's have 39 and 43). The same in every variant, as the order of
  /// additions depends on it.
  static constexpr int64_t kFewest = 22;
  static_assert(kSteps <= kFewest);

  uint16_t* lists() const { return reinterpret_cast<uint16_t*>(lists_.data()); }
  /// Sums of a kind: the first ones come again at the end.
  int64_t rows() const { return m_ + kSteps - 1; }
  /// The first output of the kSteps at `first`; the last ones overlap those before.
  int64_t start(int64_t first) const { return first + kSteps < m_ ? first : m_ - kSteps; }

  /// sums [8, rows] of columns [c, c + 16): entry i is x0 +- x1 +- x2 +- x3, minus where i has the
  /// bit of x1, x2, x3.
  void make_sums(const float* x, int64_t c, int64_t columns) const {
    float* sums = sums_.data();
    const int64_t kind = rows() * kLanes;
    for (int64_t j = 0; j < m_; ++j) {
      const auto row = [&](int64_t s) __attribute__((always_inline)) {
        return load_upto<DType::f32>(x + (s * m_ + j) * columns, c, columns);
      };
      const F32 x0 = row(0), x1 = row(1), x2 = row(2), x3 = row(3);
      const F32 low[2] = {x0 + x1, x0 - x1};
      const F32 high[4] = {x2 + x3, x3 - x2, x2 - x3, -x2 - x3};
#pragma GCC unroll 8
      for (int i = 0; i < kSums; ++i) {
        const F32 sum = low[i % 2] + high[i / 2];
        store(sums + i * kind + j * kLanes, sum);
        if (j < kSteps - 1) store(sums + i * kind + (m_ + j) * kLanes, sum);
      }
    }
  }

  int64_t m_;
  int64_t plus_[4];  // entries of a list of output r that are added; the others are subtracted
  Scratch lists_;    // [steps, 4, m] offsets of sums
  Scratch sums_;     // [8, rows, 16]
};

// ---- A row ----

/// A HadamardMatrix made ready for rows: make one a thread, apply it to many rows.
class Transform {
 public:
  explicit Transform(const HadamardMatrix& matrix)
      : order_(matrix.factor_order),
        power_(matrix.size / order_),
        circulant_(Circulants::fit(matrix.factor, order_)),
        circulants_(matrix.factor, circulant_ ? order_ : 0),
        grouped_(order_ > 1 && !circulant_ ? order_ : 0),
        choices_(ceil_div(grouped_, kGroupRows) * grouped_ / 2 + 1),
        signs_(ceil_div(grouped_, kGroupRows) * grouped_),
        sums_(grouped_ > 0 ? kRunGroups * kGroupSums * kBesideLanes : 0),
        out_(grouped_ * kBesideLanes) {
    factor_choices(choice(), signs_.data(), matrix.factor, grouped_);
  }

  /// Transforms x[0, n) in place; n is a multiple of size * inner. Reads up to 15 floats beyond n,
  /// as Scratch allows.
  void operator()(float* x, int64_t n, int64_t inner = 1) const {
    power(x, n, inner);
    if (order_ > 1) factor(x, n, inner, InPlace{x});
  }

  /// Whether there is a factor to apply after `power`.
  bool has_factor() const { return order_ > 1; }
  /// The entries that are transformed together before the factor.
  int64_t columns(int64_t inner = 1) const { return power_ * inner; }

  /// The part of 2^p alone; n is a multiple of columns(inner).
  [[gnu::noinline]] void power(float* x, int64_t n, int64_t inner = 1) const {
    const int64_t columns = power_ * inner;
    // Block by block, each of which stays in the L1 for all its stages.
    const int64_t width = inner > 1 ? 1 : power_ < kLanes ? power_ : kLanes;
    const int64_t stride = inner * width;
    if (width > 1 && columns <= kLanes) {
      for (int64_t i = 0; i < n; i += kLanes) store(x + i, butterflies(load(x + i), width));
    }
    for (int64_t block = 0; stride < columns && block < n; block += columns) {
      if (width > 1) {
        for (int64_t i = block; i < block + columns; i += kLanes) {
          store(x + i, butterflies(load(x + i), width));
        }
      }
      int64_t h = stride;
      if (h % kLanes == 0) {
        for (; h * 4 <= columns; h *= 4) butterfly_two_stages(x + block, columns, h);
      }
      for (; h < columns; h *= 2) butterfly_stage(x + block, columns, h);
    }
  }

  /// The factor alone, after `power`: puts the row's elements, in place or elsewhere.
  template <class Put>
  void factor(const float* x, int64_t n, int64_t inner, const Put& put) const {
    const int64_t width = columns(inner);
    for (int64_t block = 0; block < n; block += order_ * width) {
      if (circulant_) {
        circulants_(x + block, put, block, width);
      } else {
        const auto apply =
            order_ <= kMostHalfOrder ? apply_factor<true, Put> : apply_factor<false, Put>;
        apply(x + block, put, block, order_, width, choice(), signs_.data(), sums_.data(),
              out_.data());
      }
    }
  }

 private:
  uint16_t* choice() const { return reinterpret_cast<uint16_t*>(choices_.data()); }

  int64_t order_;
  int64_t power_;  // 2^p
  bool circulant_;
  Circulants circulants_;
  int64_t grouped_;  // the order of a factor that is not circulant
  Scratch choices_;
  Scratch signs_;
  Scratch sums_;
  Scratch out_;
};

}  // namespace quarot::cpu::QUAROT_ISA
