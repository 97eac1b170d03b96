// The Hadamard transform of one row of fp32 in scratch memory, for every kernel that contains one.
// Only for *_isa.cpp files (see vec.h).
//
// A row holds n / (size * inner) blocks, a block is [K][2^p][inner]: out = row * (I (x) H_K (x)
// H_2^p (x) I_inner), unscaled. First 2^p: log2 butterfly stages with strides inner, 2*inner, ...;
// strides below 16 inside the registers. Then the factor: K * K additions for each of the 2^p *
// inner columns. So n * (p + K) additions a row; the order of additions is fixed by the stages, not
// by the vector width, and the CUDA kernel adds in the same order.
#pragma once

#include <cstdint>

#include "kernels/cpu/vec.h"
#include "kernels/hadamard.h"

namespace quarot::cpu::QUAROT_ISA {

// ---- Butterflies inside a vector ----

/// Lane i gets v[i] + v[i ^ kStride], or v[i ^ kStride] - v[i] where i & kStride.
template <int kStride>
QUAROT_INLINE NativeF32 butterfly(const NativeF32& v) {
  constexpr int lanes = kRegisterBytes / 4;
  static_assert(kStride < lanes);
  // The vectors below are constants to the optimiser.
  NativeI32 partner, negative;
  for (int i = 0; i < lanes; ++i) {
    partner[i] = i ^ kStride;
    negative[i] = (i & kStride) != 0 ? INT32_MIN : 0;
  }
#if defined(__clang__)
  NativeF32 swapped;
  for (int i = 0; i < lanes; ++i) swapped[i] = v[i ^ kStride];
#else
  const NativeF32 swapped = __builtin_shuffle(v, partner);
#endif
  return swapped + from_bits(bits(v) ^ negative);
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

/// Terms of a factor's sum that are added one after the other; then the sums of such runs are.
/// Halves the error of long sums (K = 172) against one run.
inline constexpr int64_t kFactorRun = 16;

/// Sums over b of column_block[b] * signs[b][a .. a + kOutputs), written to rows a .. of x[..][c ..
/// c + 16).
template <int kOutputs>
inline void factor_outputs(float* x, int64_t order, int64_t columns, int64_t a, int64_t c,
                           const float* signs, const float* column_block) {
  F32 total[kOutputs];
#pragma GCC unroll 4
  for (int o = 0; o < kOutputs; ++o) total[o] = f32(0.0f);
  for (int64_t first = 0; first < order; first += kFactorRun) {
    const int64_t last = first + kFactorRun < order ? first + kFactorRun : order;
    F32 run[kOutputs];
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) run[o] = f32(0.0f);
    for (int64_t b = first; b < last; ++b) {
      const F32 v = load(column_block + b * kLanes);
      const float* sign = signs + b * order + a;
#pragma GCC unroll 4
      for (int o = 0; o < kOutputs; ++o) run[o] = run[o] + v * f32(sign[o]);
    }
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) total[o] = total[o] + run[o];
  }
#pragma GCC unroll 4
  for (int o = 0; o < kOutputs; ++o)
    store_upto<DType::f32>(x + (a + o) * columns, c, columns, total[o]);
}

/// x[a][c] <- sum over b of x[b][c] * signs[b][a] for a block [K][columns].
/// signs: [K][K] of +-1.0f. column_block: K * 16 floats.
inline void apply_factor(float* x, int64_t order, int64_t columns, const float* signs,
                         float* column_block) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    for (int64_t b = 0; b < order; ++b) {
      store(column_block + b * kLanes, load_upto<DType::f32>(x + b * columns, c, columns));
    }
    int64_t a = 0;
    for (; a + 4 <= order; a += 4) factor_outputs<4>(x, order, columns, a, c, signs, column_block);
    for (; a < order; ++a) factor_outputs<1>(x, order, columns, a, c, signs, column_block);
  }
}

// ---- A row ----

/// A HadamardMatrix made ready for rows: make one a thread, apply it to many rows.
class Transform {
 public:
  explicit Transform(const HadamardMatrix& matrix)
      : size_(matrix.size),
        order_(matrix.factor_order),
        signs_(order_ * order_),
        column_block_(order_ * kLanes) {
    for (int64_t i = 0; order_ > 1 && i < order_ * order_; ++i) {
      signs_.data()[i] = static_cast<float>(matrix.factor[i]);
    }
  }

  /// Transforms x[0, n) in place; n is a multiple of size * inner. Reads up to 15 floats beyond n,
  /// as Scratch allows.
  [[gnu::noinline]] void operator()(float* x, int64_t n, int64_t inner = 1) const {
    const int64_t power = size_ / order_;
    const int64_t columns = power * inner;
    int64_t stride = inner;
    if (inner == 1 && power > 1) {
      const int64_t width = power < kLanes ? power : kLanes;
      for (int64_t i = 0; i < n; i += kLanes) store(x + i, butterflies(load(x + i), width));
      stride = width;
    }
    for (int64_t block = 0; stride < columns && block < n; block += columns) {
      int64_t h = stride;
      if (h % kLanes == 0) {
        for (; h * 4 <= columns; h *= 4) butterfly_two_stages(x + block, columns, h);
      }
      for (; h < columns; h *= 2) butterfly_stage(x + block, columns, h);
    }
    if (order_ == 1) return;
    for (int64_t block = 0; block < n; block += order_ * columns) {
      apply_factor(x + block, order_, columns, signs_.data(), column_block_.data());
    }
  }

 private:
  int64_t size_;
  int64_t order_;
  Scratch signs_;
  Scratch column_block_;
};

}  // namespace quarot::cpu::QUAROT_ISA
