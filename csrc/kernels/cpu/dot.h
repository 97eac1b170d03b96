// Dot products of bytes in lanes of 32 bits: lane i of the sum grows by the four products of the
// bytes of lane i, u unsigned and s signed, exactly. Only for *_isa.cpp files (see vec.h).
//
// AVX-512 VNNI does it in one instruction (vpdpbusd). Others multiply and add pairs into int16
// (pmaddubsw) and add those for kDotRun steps before they widen: with u <= 15 a pair is at most
// 2 * 15 * 128 = 3840 and eight of them 30720, below 2^15.
#pragma once

#include <cstdint>

#include "kernels/cpu/vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace quarot::cpu::QUAROT_ISA {

/// Largest unsigned byte of a DotSum, and the steps after which it must be asked to widen.
inline constexpr int kDotMaxUnsigned = 15;
inline constexpr int kDotRun = 8;
static_assert(kDotRun * 2 * kDotMaxUnsigned * 128 < 1 << 15);

#if defined(__AVX512VNNI__)
inline constexpr bool kDotWidens = false;
#else
inline constexpr bool kDotWidens = true;
#endif

/// A step in the form in which it is added: int32 with VNNI, else pairs of int16.
QUAROT_INLINE NativeI32 dot_step(NativeI32 sum, NativeI32 u, NativeI32 s) {
#if defined(__AVX512VNNI__)
  return (NativeI32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)s);
#elif defined(__AVX2__)
  return (NativeI32)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)u, (__m256i)s));
#elif defined(__SSSE3__)
  return (NativeI32)_mm_add_epi16((__m128i)sum, _mm_maddubs_epi16((__m128i)u, (__m128i)s));
#else
  using I16 = Native<int16_t, kRegisterBytes>::type;
  const I16 u16 = (I16)u, s16 = (I16)s;
  const I16 even = (u16 & 255) * ((s16 << 8) >> 8);
  const I16 odd = ((u16 >> 8) & 255) * (s16 >> 8);
  return (NativeI32)((I16)sum + even + odd);
#endif
}
/// int32 from what up to kDotRun steps left.
QUAROT_INLINE NativeI32 dot_widen(NativeI32 sum) {
#if defined(__AVX512VNNI__)
  return sum;
#elif defined(__AVX2__)
  return (NativeI32)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1));
#elif defined(__SSE2__)
  return (NativeI32)_mm_madd_epi16((__m128i)sum, _mm_set1_epi16(1));
#else
  return ((sum << 16) >> 16) + (sum >> 16);
#endif
}
template <class V>
QUAROT_INLINE Pair<V> dot_step(const Pair<V>& sum, const Pair<V>& u, const Pair<V>& s) {
  return {dot_step(sum.lo, u.lo, s.lo), dot_step(sum.hi, u.hi, s.hi)};
}
template <class V>
QUAROT_INLINE Pair<V> dot_widen(const Pair<V>& sum) {
  return {dot_widen(sum.lo), dot_widen(sum.hi)};
}

/// A sum of steps: add() up to kDotRun times, then widen(), and so on; total() at the end. kChains
/// independent sums hide the latency of the instruction, where there is one for all.
template <int kChains>
class DotSum {
 public:
  template <int kStep>
  QUAROT_INLINE void add(const I32& u, const I32& s) {
    I32& to = kDotWidens ? part_[0] : part_[kStep % kChains];
    to = dot_step(to, u, s);
  }
  QUAROT_INLINE void widen() {
    if constexpr (kDotWidens) {
      total_ = total_ + dot_widen(part_[0]);
      part_[0] = i32(0);
    }
  }
  QUAROT_INLINE I32 total() const {
    if constexpr (kDotWidens) return total_;
    I32 sum = part_[0];
#pragma GCC unroll 8
    for (int i = 1; i < kChains; ++i) sum = sum + part_[i];
    return sum;
  }
  QUAROT_INLINE void clear() {
    total_ = i32(0);
#pragma GCC unroll 8
    for (int i = 0; i < (kDotWidens ? 1 : kChains); ++i) part_[i] = i32(0);
  }

 private:
  I32 total_;
  I32 part_[kDotWidens ? 1 : kChains];
};

/// The four bytes at p in all lanes.
QUAROT_INLINE I32 broadcast4(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  return i32(four);
}

/// Sum of x[0, count), count % 4 = 0.
QUAROT_INLINE int32_t sum_bytes(const int8_t* x, int64_t count) {
  I32 sum = i32(0);
  int64_t i = 0;
  constexpr int64_t kBytes = kLanes * 4;
  for (; i + kBytes <= count; i += kBytes) {
    sum = sum + dot_widen(dot_step(i32(0), i32(0x01010101), load_as<I32>(x + i)));
  }
  int32_t total = reduce_add(sum);
  for (; i < count; ++i) total += x[i];
  return total;
}

}  // namespace quarot::cpu::QUAROT_ISA
