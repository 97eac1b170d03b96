// The Hadamard transform of one row of fp32 in scratch memory, for every kernel that contains one.
// Only for *_isa.cpp files (see vec.h).
//
// A row holds n / (size * inner) blocks, a block is [K][2^p][inner]: out = row * (I (x) H_K (x)
// H_2^p (x) I_inner), unscaled. First 2^p: log2 butterfly stages with strides inner, 2*inner, ...;
// strides below 16 inside the registers. Then the factor: K * (K / 4 + 5) additions for each of the
// 2^p * inner columns. So n * (p + K / 4 + 5) additions a row; the order of additions is fixed by
// the stages, not by the vector width.
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
// made once, and an output takes one of them: a quarter of the additions.

inline constexpr int64_t kGroupRows = 4;
inline constexpr int64_t kGroupSums = 1 << kGroupRows;
/// Vectors of columns side by side, which share the choice of a sum; other registers are too few.
inline constexpr int kBeside = kRegisterBytes == 64 ? 2 : 1;
inline constexpr int64_t kBesideLanes = kBeside * kLanes;
/// Groups whose sums are in memory at a time: 16 KB, half of a small L1.
inline constexpr int64_t kRunGroups = 16 / kBeside;
/// Outputs that are summed side by side, which hides the latency of an addition.
inline constexpr int kOutputs = kRegisterBytes == 64 ? 8 : 4;

/// sums [16]: entry i is +-x0 +- x1 +- x2 +- x3, minus where i has the row's bit. Entries are
/// kBesideLanes apart.
QUAROT_INLINE void group_sums(const F32& x0, const F32& x1, const F32& x2, const F32& x3,
                              float* sums) {
  const F32 low[kGroupRows] = {x0 + x1, x1 - x0, x0 - x1, -x0 - x1};
  const F32 high[kGroupRows] = {x2 + x3, x3 - x2, x2 - x3, -x2 - x3};
#pragma GCC unroll 16
  for (int i = 0; i < kGroupSums; ++i) store(sums + i * kBesideLanes, low[i % 4] + high[i / 4]);
}

/// x[a ... a + N)[c ...] = (base ? base[a ...] : 0) + sums of `groups` groups; choice:
/// [groups, order] offsets into a group's sums; valid: columns.
template <int N>
QUAROT_INLINE void factor_outputs(float* x, int64_t stride, int64_t valid, const float* base,
                                  const float* sums, const uint16_t* choice, int64_t order,
                                  int64_t groups) {
  F32 total[N][kBeside];
#pragma GCC unroll 8
  for (int o = 0; o < N; ++o) {
#pragma GCC unroll 2
    for (int v = 0; v < kBeside; ++v) {
      total[o][v] = base == nullptr ? f32(0) : load(base + o * kBesideLanes + v * kLanes);
    }
  }
  for (int64_t g = 0; g < groups; ++g, sums += kGroupSums * kBesideLanes, choice += order) {
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
        total[o][v] = total[o][v] + load(sums + chosen[o] + v * kLanes);
      }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < N; ++o) {
#pragma GCC unroll 2
    for (int v = 0; v < kBeside; ++v) {
      if (v * kLanes < valid) {
        store_upto<DType::f32>(x + o * stride, v * kLanes, valid, total[o][v]);
      }
    }
  }
}

/// x[a][c] <- sum over b of x[b][c] * sign[b][a] for a block [K][columns], K = order.
/// choice: [ceil(K / 4), K], from factor_choices. sums: kRunGroups * 16 * kBesideLanes floats; out:
/// K * kBesideLanes.
[[gnu::noinline]] inline void apply_factor(float* x, int64_t order, int64_t columns,
                                           const uint16_t* choice, float* sums, float* out) {
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
          group_sums(row(0), row(1), row(2), row(3),
                     sums + g * kGroupSums * kBesideLanes + v * kLanes);
        }
      }
      // The last run has read all of x, and may write there.
      const bool last = first + count == groups;
      float* to = last ? x + c : out;
      const int64_t stride = last ? columns : kBesideLanes;
      const int64_t valid = last ? columns - c : kBesideLanes;
      const uint16_t* chosen = choice + first * order;
      const auto outputs = [&]<int N>(int64_t a) __attribute__((always_inline)) {
        factor_outputs<N>(to + a * stride, stride, valid,
                          first == 0 ? nullptr : out + a * kBesideLanes, sums, chosen + a, order,
                          count);
      };
      int64_t a = 0;
      for (; a + kOutputs <= order; a += kOutputs) outputs.template operator()<kOutputs>(a);
      for (; a + 4 <= order; a += 4) outputs.template operator()<4>(a);
      for (; a < order; ++a) outputs.template operator()<1>(a);
    }
  }
}

/// Which sum of each group each output takes: choice [ceil(K / 4), K]  <-  signs [K, K] of +-1.
inline void factor_choices(uint16_t* choice, const int8_t* signs, int64_t order) {
  const int64_t groups = ceil_div(order, kGroupRows);
  for (int64_t g = 0; g < groups; ++g, choice += order) {
    for (int64_t a = 0; a < order; ++a) choice[a] = 0;
    for (int64_t i = 0; i < kGroupRows && g * kGroupRows + i < order; ++i) {
      const int8_t* row = signs + (g * kGroupRows + i) * order;
      const int negative = kBesideLanes << i;
      for (int64_t a = 0; a < order; ++a) {
        choice[a] = static_cast<uint16_t>(choice[a] + (row[a] < 0 ? negative : 0));
      }
    }
  }
}

// ---- A row ----

/// A HadamardMatrix made ready for rows: make one a thread, apply it to many rows.
class Transform {
 public:
  explicit Transform(const HadamardMatrix& matrix)
      : size_(matrix.size),
        order_(matrix.factor_order),
        choices_(order_ > 1 ? ceil_div(order_, kGroupRows) * order_ / 2 + 1 : 0),
        sums_(order_ > 1 ? kRunGroups * kGroupSums * kBesideLanes : 0),
        out_(order_ > 1 ? order_ * kBesideLanes : 0) {
    if (order_ > 1) factor_choices(choice(), matrix.factor, order_);
  }

  /// Transforms x[0, n) in place; n is a multiple of size * inner. Reads up to 15 floats beyond n,
  /// as Scratch allows.
  [[gnu::noinline]] void operator()(float* x, int64_t n, int64_t inner = 1) const {
    const int64_t power = size_ / order_;
    const int64_t columns = power * inner;
    // Block by block, each of which stays in the L1 for all its stages.
    const int64_t width = inner > 1 ? 1 : power < kLanes ? power : kLanes;
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
    if (order_ == 1) return;
    for (int64_t block = 0; block < n; block += order_ * columns) {
      apply_factor(x + block, order_, columns, choice(), sums_.data(), out_.data());
    }
  }

 private:
  uint16_t* choice() const { return reinterpret_cast<uint16_t*>(choices_.data()); }

  int64_t size_;
  int64_t order_;
  Scratch choices_;
  Scratch sums_;
  Scratch out_;
};

}  // namespace quarot::cpu::QUAROT_ISA
