// Sixteen virtual lanes: F32 and I32 hold 16 values whatever the registers' width, so every ISA
// variant does the same 16-lane arithmetic in the same order and gives the same bits (with
// -ffp-contract=off).
//
// Built on GCC's vector extensions, which g++ and clang++ lower by -march. F32 is one 64-byte
// vector on AVX-512, a pair of halves on AVX2, a pair of pairs on SSE (GCC keeps vectors wider than
// a register in memory, pairs in registers).
//
// Only for *_isa.cpp files and headers they include. Everything here is in the variant's own
// namespace: nothing compiled for AVX-512 may be picked by the linker for a lesser processor. For
// the same reason those files use no templates or inline functions of the standard library. What
// takes or returns vectors is always inlined, because how they are passed depends on the flags; a
// function of pointers that does a row's work need not be, and should not where many kernels share
// it.
//
// Loads and stores are unaligned. Tails use the same lanes: load_upto fills with zeros.
//
// Above 300 lines: one type, and what follows from its widths in one place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "kernels/types.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define QUAROT_INLINE inline __attribute__((always_inline))

namespace quarot::cpu::QUAROT_ISA {

/// Lanes of every vector type here.
inline constexpr int64_t kLanes = 16;
/// The bits of infinity; a larger |x| pattern is a NaN.
inline constexpr int32_t kInfinityBits = 0x7f800000;

// ---- Representation ----

#if defined(__AVX512F__)
inline constexpr int kRegisterBytes = 64;
#elif defined(__AVX__)
inline constexpr int kRegisterBytes = 32;
#else
inline constexpr int kRegisterBytes = 16;
#endif

/// The same operation on two halves; `lo` holds the lower lanes.
template <class Half>
struct Pair {
  Half lo, hi;
};

template <class Scalar, int kBytes>
struct Native {
  typedef Scalar type __attribute__((vector_size(kBytes)));
};

template <class Scalar, int kBytes>
struct Wide {
  using type = Pair<typename Wide<Scalar, kBytes / 2>::type>;
};
template <class Scalar>
struct Wide<Scalar, kRegisterBytes> {
  using type = typename Native<Scalar, kRegisterBytes>::type;
};

using NativeF32 = Native<float, kRegisterBytes>::type;
using NativeI32 = Native<int32_t, kRegisterBytes>::type;
using F32 = Wide<float, 64>::type;    // 16 floats
using I32 = Wide<int32_t, 64>::type;  // 16 int32
static_assert(sizeof(F32) == 64 && sizeof(I32) == 64);

#define QUAROT_PAIR_OPERATOR(op)                                          \
  template <class V>                                                      \
  QUAROT_INLINE Pair<V> operator op(const Pair<V>& a, const Pair<V>& b) { \
    return {a.lo op b.lo, a.hi op b.hi};                                  \
  }
QUAROT_PAIR_OPERATOR(+)
QUAROT_PAIR_OPERATOR(-)
QUAROT_PAIR_OPERATOR(*)
QUAROT_PAIR_OPERATOR(/)
QUAROT_PAIR_OPERATOR(&)
QUAROT_PAIR_OPERATOR(|)
QUAROT_PAIR_OPERATOR(^)
#undef QUAROT_PAIR_OPERATOR

template <class V>
QUAROT_INLINE Pair<V> operator-(const Pair<V>& a) {
  return {-a.lo, -a.hi};
}
template <class V>
QUAROT_INLINE Pair<V> operator~(const Pair<V>& a) {
  return {~a.lo, ~a.hi};
}
template <class V>
QUAROT_INLINE Pair<V> operator<<(const Pair<V>& a, int bits) {
  return {a.lo << bits, a.hi << bits};
}
/// Arithmetic shift.
template <class V>
QUAROT_INLINE Pair<V> operator>>(const Pair<V>& a, int bits) {
  return {a.lo >> bits, a.hi >> bits};
}

// ---- Element-wise functions, first on registers, then on pairs ----

QUAROT_INLINE NativeI32 bits(NativeF32 a) { return (NativeI32)a; }
QUAROT_INLINE NativeF32 from_bits(NativeI32 a) { return (NativeF32)a; }
QUAROT_INLINE NativeF32 to_f32(NativeI32 a) { return __builtin_convertvector(a, NativeF32); }
QUAROT_INLINE NativeI32 greater(NativeF32 a, NativeF32 b) { return (NativeI32)(a > b); }
QUAROT_INLINE NativeI32 greater(NativeI32 a, NativeI32 b) { return a > b; }
QUAROT_INLINE NativeI32 equal(NativeF32 a, NativeF32 b) { return (NativeI32)(a == b); }
// The second forms, which GCC 12 makes two AVX-512 instructions of where b is a constant, say what
// the first do with NaN: b. maskz: as in `load` below.
#if defined(__AVX512F__)
QUAROT_INLINE NativeF32 max(NativeF32 a, NativeF32 b) { return _mm512_maskz_max_ps(0xffff, a, b); }
QUAROT_INLINE NativeF32 min(NativeF32 a, NativeF32 b) { return _mm512_maskz_min_ps(0xffff, a, b); }
#else
QUAROT_INLINE NativeF32 max(NativeF32 a, NativeF32 b) { return a > b ? a : b; }
QUAROT_INLINE NativeF32 min(NativeF32 a, NativeF32 b) { return a < b ? a : b; }
#endif
QUAROT_INLINE NativeI32 max(NativeI32 a, NativeI32 b) { return a > b ? a : b; }
QUAROT_INLINE NativeI32 min(NativeI32 a, NativeI32 b) { return a < b ? a : b; }

/// The bit pattern of each lane.
template <class V>
QUAROT_INLINE auto bits(const Pair<V>& a) -> Pair<decltype(bits(a.lo))> {
  return {bits(a.lo), bits(a.hi)};
}
template <class V>
QUAROT_INLINE auto from_bits(const Pair<V>& a) -> Pair<decltype(from_bits(a.lo))> {
  return {from_bits(a.lo), from_bits(a.hi)};
}
/// Converts, rounding to nearest even where |a| > 2^24.
template <class V>
QUAROT_INLINE auto to_f32(const Pair<V>& a) -> Pair<decltype(to_f32(a.lo))> {
  return {to_f32(a.lo), to_f32(a.hi)};
}
/// All ones in lanes where a > b, else zero (also where a or b is NaN).
template <class V>
QUAROT_INLINE auto greater(const Pair<V>& a, const Pair<V>& b)
    -> Pair<decltype(greater(a.lo, b.lo))> {
  return {greater(a.lo, b.lo), greater(a.hi, b.hi)};
}
template <class V>
QUAROT_INLINE auto equal(const Pair<V>& a, const Pair<V>& b) -> Pair<decltype(equal(a.lo, b.lo))> {
  return {equal(a.lo, b.lo), equal(a.hi, b.hi)};
}
/// a > b ? a : b, hence b where either is NaN.
template <class V>
QUAROT_INLINE Pair<V> max(const Pair<V>& a, const Pair<V>& b) {
  return {max(a.lo, b.lo), max(a.hi, b.hi)};
}
/// a < b ? a : b, hence b where either is NaN.
template <class V>
QUAROT_INLINE Pair<V> min(const Pair<V>& a, const Pair<V>& b) {
  return {min(a.lo, b.lo), min(a.hi, b.hi)};
}

/// a * b + c, rounded once. Elsewhere than here nothing is contracted. Without the instruction each
/// lane is a call: correct, and slow on processors of before 2013.
QUAROT_INLINE NativeF32 fma(NativeF32 a, NativeF32 b, NativeF32 c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  for (int i = 0; i < kRegisterBytes / 4; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}
template <class V>
QUAROT_INLINE Pair<V> fma(const Pair<V>& a, const Pair<V>& b, const Pair<V>& c) {
  return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)};
}

// ---- Broadcast, fp32 and int32 memory ----

// Pairs go half by half: GCC 12 copies them as a whole through memory in 16-byte pieces, and the
// wide load of what narrow stores just wrote stalls.
template <class V>
struct Memory {
  static QUAROT_INLINE V load(const void* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static QUAROT_INLINE void store(void* p, const V& v) { __builtin_memcpy(p, &v, sizeof v); }
};
template <class Half>
struct Memory<Pair<Half>> {
  static QUAROT_INLINE Pair<Half> load(const void* p) {
    return {Memory<Half>::load(p), Memory<Half>::load(static_cast<const char*>(p) + sizeof(Half))};
  }
  static QUAROT_INLINE void store(void* p, const Pair<Half>& v) {
    Memory<Half>::store(p, v.lo);
    Memory<Half>::store(static_cast<char*>(p) + sizeof(Half), v.hi);
  }
};
template <class V>
QUAROT_INLINE V load_as(const void* p) {
  return Memory<V>::load(p);
}
template <class V>
QUAROT_INLINE void store_as(void* p, const V& v) {
  Memory<V>::store(p, v);
}

template <class V, class Scalar>
struct Fill {
  static QUAROT_INLINE V of(Scalar s) { return s - V{}; }  // -0.0f - 0.0f is -0.0f
};
template <class Half, class Scalar>
struct Fill<Pair<Half>, Scalar> {
  static QUAROT_INLINE Pair<Half> of(Scalar s) {
    return {Fill<Half, Scalar>::of(s), Fill<Half, Scalar>::of(s)};
  }
};
QUAROT_INLINE F32 f32(float s) { return Fill<F32, float>::of(s); }
QUAROT_INLINE I32 i32(int32_t s) { return Fill<I32, int32_t>::of(s); }

QUAROT_INLINE F32 load(const float* p) { return load_as<F32>(p); }
QUAROT_INLINE I32 load(const int32_t* p) { return load_as<I32>(p); }
QUAROT_INLINE void store(float* p, const F32& v) { store_as(p, v); }
QUAROT_INLINE void store(int32_t* p, const I32& v) { store_as(p, v); }

// ---- Selection and rounding ----

/// yes where the mask (of `greater`, `equal`) is set, else no.
QUAROT_INLINE I32 select(const I32& mask, const I32& yes, const I32& no) {
  return (yes & mask) | (no & ~mask);
}
QUAROT_INLINE F32 select(const I32& mask, const F32& yes, const F32& no) {
  return from_bits(select(mask, bits(yes), bits(no)));
}
QUAROT_INLINE F32 abs(const F32& a) { return from_bits(bits(a) & i32(0x7fffffff)); }

/// 1.5 * 2^23: adding it to |a| <= 2^22 rounds a to an integer, to nearest even, in the low
/// mantissa bits.
inline constexpr float kRound = 12582912.0f;

/// Rounds to the nearest integer, ties to even; exact for |a| <= 2^22.
QUAROT_INLINE I32 rint_i32(const F32& a) { return bits(a + f32(kRound)) - bits(f32(kRound)); }
QUAROT_INLINE F32 rint(const F32& a) { return (a + f32(kRound)) - f32(kRound); }

// ---- Narrow integers in memory ----

// In two steps: GCC 12 splits a conversion between types of 1 and 4 bytes into scalars.
typedef int8_t I8x16 __attribute__((vector_size(16)));
typedef uint8_t U8x16 __attribute__((vector_size(16)));
typedef int16_t I16x16 __attribute__((vector_size(32)));
typedef uint16_t U16x16 __attribute__((vector_size(32)));
typedef int32_t I32x16 __attribute__((vector_size(64)));

QUAROT_INLINE I32 load_i8(const int8_t* p) {
  const auto wide = __builtin_convertvector(load_as<I8x16>(p), I16x16);
  const I32x16 wider = __builtin_convertvector(wide, I32x16);
  return load_as<I32>(&wider);
}
QUAROT_INLINE I32 load_u8(const uint8_t* p) {
  const auto wide = __builtin_convertvector(load_as<U8x16>(p), U16x16);
  const I32x16 wider = __builtin_convertvector(wide, I32x16);
  return load_as<I32>(&wider);
}
QUAROT_INLINE I32 load_u16(const uint16_t* p) {
  const I32x16 wide = __builtin_convertvector(load_as<U16x16>(p), I32x16);
  return load_as<I32>(&wide);
}
/// Stores the low 8 bits of each lane.
QUAROT_INLINE void store_i8(int8_t* p, const I32& v) {
#if defined(__AVX512F__)
  store_as(p, _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v));
#else
  const auto half = __builtin_convertvector(load_as<I32x16>(&v), I16x16);
  store_as(p, __builtin_convertvector(half, I8x16));
#endif
}
/// Stores the low 16 bits of each lane.
QUAROT_INLINE void store_i16(uint16_t* p, const I32& v) {
#if defined(__AVX512F__)
  store_as(p, _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v));
#else
  store_as(p, __builtin_convertvector(load_as<I32x16>(&v), U16x16));
#endif
}
/// Stores the low nibbles of 16 lanes as 8 bytes, the even lane in the low nibble.
QUAROT_INLINE void store_i4(uint8_t* p, const I32& v) {
  int8_t codes[kLanes];
  store_i8(codes, v & i32(15));
  // Each 16-bit pair low | high << 8 becomes the byte low | high << 4.
  typedef uint16_t U16x8 __attribute__((vector_size(16)));
  typedef uint8_t U8x8 __attribute__((vector_size(8)));
  const U16x8 pairs = load_as<U16x8>(codes);
  store_as(p, __builtin_convertvector(pairs | (pairs >> 4), U8x8));
}
/// Loads 8 bytes as 16 unsigned nibbles, the low nibble first.
QUAROT_INLINE I32 load_u4(const uint8_t* p) {
  typedef uint8_t U8x8 __attribute__((vector_size(8)));
  typedef uint16_t U16x8 __attribute__((vector_size(16)));
  const U16x8 byte = __builtin_convertvector(load_as<U8x8>(p), U16x8);
  const U16x8 spread = (byte | (byte << 4)) & 0x0f0f;
  return load_u8(reinterpret_cast<const uint8_t*>(&spread));
}
/// Loads 8 bytes as 16 two's complement nibbles in [-8, 7], the low nibble first.
QUAROT_INLINE I32 load_i4(const uint8_t* p) { return (load_u4(p) ^ i32(8)) - i32(8); }

// ---- fp16 and bf16 ----

/// bf16 bits in the low half of each lane -> fp32, exact.
QUAROT_INLINE F32 bf16_to_f32(const I32& h) { return from_bits(h << 16); }

/// fp32 -> bf16 bits in the upper half of each lane, to nearest even; NaN becomes 0x7fc0. What is
/// below is not zero.
QUAROT_INLINE I32 upper_bf16(const F32& a) {
  const I32 u = bits(a);
  return select(equal(a, a), u + i32(0x7fff) + ((u >> 16) & i32(1)), i32(0x7fc00000));
}
/// The same in the lower half, signed: what is above is no part of it.
QUAROT_INLINE I32 f32_to_bf16(const F32& a) { return upper_bf16(a) >> 16; }

/// fp16 bits in the low half of each lane -> fp32, exact (subnormals and infinities too).
QUAROT_INLINE F32 f16_to_f32(const I32& h) {
  const I32 sign = (h & i32(0x8000)) << 16;
  const I32 magnitude = h & i32(0x7fff);
  const I32 normal = (magnitude << 13) + i32((127 - 15) << 23);
  const I32 subnormal = bits(to_f32(magnitude) * f32(0x1p-24f));
  // Infinity keeps its mantissa, NaN becomes quiet, as vcvtph2ps does.
  const I32 special =
      (magnitude << 13) | i32(0x7f800000) | (greater(magnitude, i32(0x7c00)) & i32(0x00400000));
  const I32 finite = select(greater(i32(0x0400), magnitude), subnormal, normal);
  return from_bits(sign | select(greater(magnitude, i32(0x7bff)), special, finite));
}

/// fp32 -> fp16 bits, to nearest even; overflow becomes infinity, NaN becomes quiet.
QUAROT_INLINE I32 f32_to_f16(const F32& a) {
  const I32 u = bits(a) & i32(0x7fffffff);
  const I32 sign = (bits(a) >> 16) & i32(0x8000);
  const I32 normal = (u - i32((127 - 15) << 23) + i32(0x0fff) + ((u >> 13) & i32(1))) >> 13;
  // Below 2^-14 an fp16 is a multiple of 2^-24, which is the last place of a float in [0.5, 1).
  const I32 subnormal = bits(from_bits(u) + f32(0.5f)) - bits(f32(0.5f));
  const I32 finite = select(greater(i32(0x38800000), u), subnormal, normal);
  const I32 nan = i32(0x7e00) | ((u >> 13) & i32(0x03ff));
  const I32 special = select(greater(u, i32(0x7f800000)), nan, i32(0x7c00));
  return sign | select(greater(u, i32(0x477fffff)), special, finite);
}

/// Element i .. i + 15 of an array of `dtype`, as fp32.
template <DType kDtype>
QUAROT_INLINE F32 load(const void* data, int64_t i) {
  if constexpr (kDtype == DType::f32) {
    return load(static_cast<const float*>(data) + i);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(data) + i;
    if constexpr (kDtype == DType::bf16) return bf16_to_f32(load_u16(p));
#if defined(__AVX512F__)
    // maskz: GCC 12 warns about an uninitialised operand inside the plain form.
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
#else
    return f16_to_f32(load_u16(p));
#endif
  }
}

/// Rounds once to `dtype`, to nearest even.
template <DType kDtype>
QUAROT_INLINE void store(void* data, int64_t i, const F32& v) {
  if constexpr (kDtype == DType::f32) {
    store(static_cast<float*>(data) + i, v);
  } else {
    uint16_t* p = static_cast<uint16_t*>(data) + i;
    if constexpr (kDtype == DType::bf16) {
      store_i16(p, f32_to_bf16(v));
    } else {
#if defined(__AVX512F__)
      store_as(p, _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
      store_as(p, _mm256_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT));
      store_as(p + 8, _mm256_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT));
#else
      store_i16(p, f32_to_f16(v));
#endif
    }
  }
}

template <DType kDtype>
inline constexpr int64_t kBytes = kDtype == DType::f32 ? 4 : 2;

/// Elements [i, min(i + 16, n)); the other lanes are +0. A tail goes through a buffer, and only the
/// address depends on it: a vector that comes from two branches would go through memory each time.
template <DType kDtype>
QUAROT_INLINE F32 load_upto(const void* data, int64_t i, int64_t n) {
  alignas(64) char buffer[64];
  const char* p = static_cast<const char*>(data) + i * kBytes<kDtype>;
  if (n - i < kLanes) [[unlikely]] {
    __builtin_memset(buffer, 0, sizeof buffer);
    __builtin_memcpy(buffer, p, static_cast<size_t>((n - i) * kBytes<kDtype>));
    p = buffer;
  }
  return load<kDtype>(p, 0);
}
/// Stores elements [i, min(i + 16, n)).
template <DType kDtype>
QUAROT_INLINE void store_upto(void* data, int64_t i, int64_t n, const F32& v) {
  alignas(64) char buffer[64];
  char* p = static_cast<char*>(data) + i * kBytes<kDtype>;
  const bool tail = n - i < kLanes;
  store<kDtype>(tail ? buffer : p, 0, v);
  if (tail) [[unlikely]] {
    __builtin_memcpy(p, buffer, static_cast<size_t>((n - i) * kBytes<kDtype>));
  }
}

// ---- Lanes that change places ----

/// Lane i of the result is lane i ^ kStride.
template <int kStride>
QUAROT_INLINE NativeF32 swap_lanes(const NativeF32& v) {
  constexpr int lanes = kRegisterBytes / 4;
  static_assert(kStride < lanes);
#if defined(__clang__)
  NativeF32 swapped;
  for (int i = 0; i < lanes; ++i) swapped[i] = v[i ^ kStride];
  return swapped;
#else
  NativeI32 partner;  // a constant to the optimiser
  for (int i = 0; i < lanes; ++i) partner[i] = i ^ kStride;
  return __builtin_shuffle(v, partner);
#endif
}
template <int kStride, class Half>
QUAROT_INLINE Pair<Half> swap_lanes(const Pair<Half>& v) {
  if constexpr (kStride * 4 == sizeof(Half)) {
    return {v.hi, v.lo};
  } else {
    return {swap_lanes<kStride>(v.lo), swap_lanes<kStride>(v.hi)};
  }
}

/// One step of a transposition: a's lanes with i & kStride change places with b's without.
template <int kStride>
QUAROT_INLINE void exchange(NativeI32& a, NativeI32& b) {
  constexpr int lanes = kRegisterBytes / 4;
  static_assert(kStride < lanes);
#if defined(__clang__)
  const NativeI32 from_a = a, from_b = b;
  for (int i = 0; i < lanes; ++i) {
    a[i] = (i & kStride) != 0 ? from_b[i - kStride] : from_a[i];
    b[i] = (i & kStride) != 0 ? from_b[i] : from_a[i + kStride];
  }
#else
  NativeI32 low, high;  // constants to the optimiser; b's lanes follow a's
  for (int i = 0; i < lanes; ++i) {
    low[i] = (i & kStride) != 0 ? lanes + i - kStride : i;
    high[i] = (i & kStride) != 0 ? lanes + i : i + kStride;
  }
  const NativeI32 old = a;
  a = __builtin_shuffle(old, b, low);
  b = __builtin_shuffle(old, b, high);
#endif
}
template <int kStride, class Half>
QUAROT_INLINE void exchange(Pair<Half>& a, Pair<Half>& b) {
  if constexpr (kStride * 4 == sizeof(Half)) {
    const Half high = a.hi;
    a.hi = b.lo;
    b.lo = high;
  } else {
    exchange<kStride>(a.lo, b.lo);
    exchange<kStride>(a.hi, b.hi);
  }
}

/// The step of all vectors whose index lacks kStride with those that have it.
template <int kStride, int kCount>
QUAROT_INLINE void exchange_all(I32 (&v)[kCount]) {
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    if ((i & kStride) == 0) exchange<kStride>(v[i], v[i + kStride]);
  }
}
/// Lane j of vector i changes places with lane i of vector j.
QUAROT_INLINE void transpose(I32 (&v)[kLanes]) {
  exchange_all<1>(v);
  exchange_all<2>(v);
  exchange_all<4>(v);
  exchange_all<8>(v);
}

// ---- Bytes that change places, within each 16 of them ----

/// Pieces of kBytes of a and b in turn: a gets the lower eight bytes of both, b the upper.
template <int kBytes>
QUAROT_INLINE void interleave(NativeI32& a, NativeI32& b) {
  using Bytes = Native<int8_t, kRegisterBytes>::type;
  const Bytes from_a = (Bytes)a, from_b = (Bytes)b;
  Bytes low, high;
  for (int i = 0; i < kRegisterBytes; ++i) {
    const int from = i / 16 * 16 + i % 16 / (2 * kBytes) * kBytes + i % kBytes;
    const bool of_b = i / kBytes % 2 == 1;
#if defined(__clang__)
    low[i] = of_b ? from_b[from] : from_a[from];
    high[i] = of_b ? from_b[from + 8] : from_a[from + 8];
#else  // indices, constants to the optimiser; b's bytes follow a's
    low[i] = static_cast<int8_t>(from + (of_b ? kRegisterBytes : 0));
    high[i] = static_cast<int8_t>(from + (of_b ? kRegisterBytes : 0) + 8);
#endif
  }
#if !defined(__clang__)
  low = __builtin_shuffle(from_a, from_b, low);
  high = __builtin_shuffle(from_a, from_b, high);
#endif
  a = (NativeI32)low;
  b = (NativeI32)high;
}
template <int kBytes, class Half>
QUAROT_INLINE void interleave(Pair<Half>& a, Pair<Half>& b) {
  interleave<kBytes>(a.lo, b.lo);
  interleave<kBytes>(a.hi, b.hi);
}

/// Of each four lanes: lane i gets byte i of all four.
QUAROT_INLINE NativeI32 transpose_bytes(NativeI32 v) {
  using Bytes = Native<int8_t, kRegisterBytes>::type;
  const Bytes from = (Bytes)v;
  Bytes to;
  for (int i = 0; i < kRegisterBytes; ++i) {
    const int at = i / 16 * 16 + i % 4 * 4 + i / 4 % 4;
#if defined(__clang__)
    to[i] = from[at];
#else
    to[i] = static_cast<int8_t>(at);
#endif
  }
#if !defined(__clang__)
  to = __builtin_shuffle(from, to);
#endif
  return (NativeI32)to;
}
template <class Half>
QUAROT_INLINE Pair<Half> transpose_bytes(const Pair<Half>& v) {
  return {transpose_bytes(v.lo), transpose_bytes(v.hi)};
}

/// 32 bytes at p, then 32 at q, as 8 and 8 lanes.
template <class Half>
QUAROT_INLINE void load_halves(Pair<Half>& v, const void* p, const void* q) {
  v = {load_as<Half>(p), load_as<Half>(q)};
}
#if defined(__AVX512F__)
QUAROT_INLINE void load_halves(NativeI32& v, const void* p, const void* q) {
  // maskz: as in `load` above.
  v = (NativeI32)_mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(load_as<__m256i>(p)),
                                          load_as<__m256i>(q), 1);
}
#endif

// ---- Reductions over the lanes, in one fixed order: halves, quarters, ... ----

/// Sum of the 16 lanes.
QUAROT_INLINE float reduce_add(const F32& v) {
  F32 sum = v + swap_lanes<8>(v);
  sum = sum + swap_lanes<4>(sum);
  sum = sum + swap_lanes<2>(sum);
  sum = sum + swap_lanes<1>(sum);
  float lane[kLanes];
  store(lane, sum);
  return lane[0];
}
QUAROT_INLINE int32_t reduce_add(const I32& v) {
  int32_t lane[kLanes];
  store(lane, v);
  int32_t sum = 0;
  for (int64_t i = 0; i < kLanes; ++i) sum += lane[i];
  return sum;
}
/// Of lanes none of which is NaN.
QUAROT_INLINE float reduce_max(const F32& v) {
  F32 best = max(v, swap_lanes<8>(v));
  best = max(best, swap_lanes<4>(best));
  best = max(best, swap_lanes<2>(best));
  best = max(best, swap_lanes<1>(best));
  float lane[kLanes];
  store(lane, best);
  return lane[0];
}
QUAROT_INLINE float reduce_min(const F32& v) { return -reduce_max(-v); }
QUAROT_INLINE int32_t reduce_max(const I32& v) {
  I32 best = max(v, bits(swap_lanes<8>(from_bits(v))));
  best = max(best, bits(swap_lanes<4>(from_bits(best))));
  best = max(best, bits(swap_lanes<2>(from_bits(best))));
  best = max(best, bits(swap_lanes<1>(from_bits(best))));
  int32_t lane[kLanes];
  store(lane, best);
  return lane[0];
}

// ---- Transcendental functions ----

/// p * 2^n of an integer n in [-150, 129], rounded once; p in [1/2, 2].
QUAROT_INLINE F32 scale_by_power(const F32& p, const F32& n) {
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(0xffff, p, n);  // maskz: as in `load` above
#else
  // In two factors: n reaches beyond a float's exponent. The first product is exact.
  const I32 k = rint_i32(n), half = k >> 1;
  return (p * from_bits((half + i32(127)) << 23)) * from_bits((k - half + i32(127)) << 23);
#endif
}

/// e^a, within 2 ulp (correct infinities, zeros, NaN and gradual underflow). Cody-Waite reduction
/// to |r| <= ln(2)/2, then the Taylor series to r^7, whose remainder is below 2^-27.
QUAROT_INLINE F32 exp(const F32& a) {
  // Beyond these bounds the result is 0 or infinity anyway. In this order NaN passes.
  const F32 x = min(f32(89.0f), max(f32(-104.0f), a));
  const F32 n = fma(x, f32(0x1.715476p+0f), f32(kRound)) - f32(kRound);
  // ln 2 = hi + lo
  const F32 r = fma(n, f32(-0x1.7f7d1cp-20f), fma(n, f32(-0x1.62e4p-1f), x));
  F32 p = f32(1.0f / 5040.0f);
  p = fma(p, r, f32(1.0f / 720.0f));
  p = fma(p, r, f32(1.0f / 120.0f));
  p = fma(p, r, f32(1.0f / 24.0f));
  p = fma(p, r, f32(1.0f / 6.0f));
  p = fma(p, r, f32(0.5f));
  p = fma(p, r * r, r) + f32(1.0f);
  return scale_by_power(p, n);
}

/// ln a of a positive normal number, within 2 ulp of max(|ln a|, 1): a = 2^k m with m in
/// [sqrt(1/2), sqrt(2)), ln m = 2 artanh(s) with s = (m - 1) / (m + 1), a series in s^2 < 0.03.
QUAROT_INLINE F32 log(const F32& a) {
  const I32 k = (bits(a) - i32(0x3f3504f3)) >> 23;  // the bits of sqrt(1/2)
  const F32 m = from_bits(bits(a) - (k << 23));
  const F32 s = (m - f32(1.0f)) / (m + f32(1.0f));
  const F32 z = s * s;
  F32 p = f32(2.0f / 9.0f);
  p = p * z + f32(2.0f / 7.0f);
  p = p * z + f32(2.0f / 5.0f);
  p = p * z + f32(2.0f / 3.0f);
  p = p * z + f32(2.0f);
  return to_f32(k) * f32(0x1.62e430p-1f) + s * p;
}

/// erf(a), within 3 ulp. |a| < 1: a * P(a^2); else 1 - e^(-a^2) * Q(1 / (1 + |a| / 2)). P and Q
/// interpolate erf(a) / a and erfc(a) e^(a^2) at Chebyshev nodes of [0, 1] and of the range of |a|
/// in [1, 4.2]; erf is 1 beyond.
QUAROT_INLINE F32 erf(const F32& a) {
  const F32 x = min(abs(a), f32(4.2f));
  const F32 square = x * x;
  F32 p = f32(7.8758751e-05f);
  p = p * square + f32(-0.00080168643f);
  p = p * square + f32(0.00518908742f);
  p = p * square + f32(-0.026854212f);
  p = p * square + f32(0.112835947f);
  p = p * square + f32(-0.376126267f);
  p = p * square + f32(1.12837917f);
  const F32 t = f32(1.0f) / (f32(1.0f) + f32(0.5f) * x);
  F32 q = f32(0.119894503f);
  q = q * t + f32(-0.473083064f);
  q = q * t + f32(0.566008215f);
  q = q * t + f32(-0.105786551f);
  q = q * t + f32(0.348818719f);
  q = q * t + f32(0.259408958f);
  q = q * t + f32(0.284954021f);
  q = q * t + f32(-0.000156763733f);
  const F32 large = f32(1.0f) - q * exp(-square);
  const F32 magnitude = select(greater(f32(1.0f), x), x * p, large);
  const F32 result = from_bits(bits(magnitude) | (bits(a) & i32(INT32_MIN)));
  return select(equal(a, a), result, a);
}

// ---- Scratch memory ----

/// A 64-byte aligned, uninitialised array of floats, with room for one vector beyond `count`; null
/// where count is 0.
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    if (count == 0) return;
    data_ = static_cast<float*>(::operator new(static_cast<size_t>(count + kLanes) * sizeof(float),
                                               static_cast<std::align_val_t>(64)));
  }
  ~Scratch() { ::operator delete(data_, static_cast<std::align_val_t>(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  float* data_ = nullptr;
};

}  // namespace quarot::cpu::QUAROT_ISA
