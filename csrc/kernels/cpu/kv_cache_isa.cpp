// rope_hadamard_kv_append on the CPU. Maths and layouts: kv_cache.h. Threads share the tokens; for
// a token the cosines and sines are converted once, then each head's vector is rotated, transformed
// and quantized in scratch memory. The bound is memory at prefill; at decode the whole call is some
// thousand elements.
#include "kernels/cpu/any_dtype.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/transform.h"
#include "kernels/cpu/vec.h"
#include "kernels/kv_cache.h"

namespace quarot::cpu::QUAROT_ISA {
namespace {

constexpr float kScaleMin = 0x1p-14f;  // the smallest normal fp16
constexpr float kScaleMax = 65504.0f;  // the largest
constexpr uint16_t kNaN16 = 0x7e00;

/// x [n] (with room for 16 more lanes, set to zero)  <-  data[i, i + n)
QUAROT_INLINE void load_vector(float* x, DType dtype, const void* data, int64_t i, int64_t n) {
  for (int64_t c = 0; c < n; c += kLanes) store(x + c, load_any(dtype, data, i + c, i + n));
}

/// RoPE in place: pairs (i, i + rotary / 2) of x turn by the angles whose cosines and sines are
/// given.
QUAROT_INLINE void rope(float* x, const float* cos, const float* sin, int64_t rotary) {
  constexpr auto f = DType::f32;
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const F32 a = load_upto<f>(x, i, half), b = load_upto<f>(x + half, i, half);
    const F32 first = a * load_upto<f>(cos, i, half) - b * load_upto<f>(sin, i, half);
    const F32 second =
        b * load_upto<f>(cos + half, i, half) + a * load_upto<f>(sin + half, i, half);
    store_upto<f>(x, i, half, first);
    store_upto<f>(x + half, i, half, second);
  }
}

/// Quantizes x [n] (zeros up to a whole number of lanes) into slot `slot` of the cache.
QUAROT_INLINE void quantize_into(const KvCache& cache, int64_t slot, const float* x, int64_t n,
                                 int bits_per_code, float clip) {
  const int32_t top = (1 << bits_per_code) - 1;
  F32 low = f32(0), high = f32(0);
  I32 magnitude = i32(0);  // of the bit patterns: infinity and NaN are the largest
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 v = load(x + i);
    low = min(v, low);
    high = max(v, high);
    magnitude = max(bits(abs(v)), magnitude);
  }
  const bool finite = reduce_max(magnitude) < kInfinityBits;
  const float lo = clip * reduce_min(low), hi = clip * reduce_max(high);
  float ratio = (hi - lo) / static_cast<float>(top);
  ratio = ratio > kScaleMin ? ratio : kScaleMin;
  ratio = ratio < kScaleMax ? ratio : kScaleMax;
  uint16_t scale[kLanes];
  store<DType::f16>(scale, 0, f32(ratio));
  float rounded[kLanes];
  store(rounded, load<DType::f16>(scale, 0));
  const float inv = 1.0f / rounded[0];
  float zero = (-lo * inv + kRound) - kRound;
  zero = zero < static_cast<float>(top) ? zero : static_cast<float>(top);

  cache.scale[slot] = finite ? scale[0] : kNaN16;
  cache.zero[slot] = finite ? static_cast<uint8_t>(zero) : 0;
  uint8_t* codes = cache.codes + slot * (n * bits_per_code / 8);
  if (!finite) {
    __builtin_memset(codes, 0, static_cast<size_t>(n * bits_per_code / 8));
    return;
  }
  // Far outside of the codes and well inside of what rint_i32 can do.
  constexpr float kBound = 65536.0f;
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 ratios = min(max(load(x + i) * f32(inv), f32(-kBound)), f32(kBound));
    const I32 code = min(max(rint_i32(ratios) + i32(static_cast<int32_t>(zero)), i32(0)), i32(top));
    uint8_t tail[kLanes];
    uint8_t* to = codes + i * bits_per_code / 8;
    uint8_t* out = n - i < kLanes ? tail : to;
    if (bits_per_code == 4) {
      store_i4(out, code);
    } else {
      store_i8(reinterpret_cast<int8_t*>(out), code);
    }
    if (out == tail) [[unlikely]] {
      __builtin_memcpy(to, tail, static_cast<size_t>((n - i) * bits_per_code / 8));
    }
  }
}

/// Tokens [begin, end) of batch * seq.
void append(const KvAppendArgs& a, int64_t begin, int64_t end) {
  const int64_t n = a.head_dim;
  const Scratch x(n + kLanes), cos(a.rotary + kLanes), sin(a.rotary + kLanes);
  const Transform transform(a.matrix);
  const auto rotate = [&](const HeadVectors& from, int64_t at) __attribute__((always_inline)) {
    load_vector(x.data(), a.dtype, from.data, at, n);
    rope(x.data(), cos.data(), sin.data(), a.rotary);
    if (a.matrix.size == 1) return;
    transform(x.data(), n);
    for (int64_t i = 0; i < n; i += kLanes)
      store(x.data() + i, load(x.data() + i) * f32(a.matrix.scale));
  };
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / a.seq, s = token % a.seq;
    const int64_t angles = b * a.rotary_batch_stride + s * a.rotary;
    load_vector(cos.data(), a.rotary_dtype, a.cos, angles, a.rotary);
    load_vector(sin.data(), a.rotary_dtype, a.sin, angles, a.rotary);
    const auto at = [&](const HeadVectors& from, int64_t head) __attribute__((always_inline)) {
      return b * from.batch_stride + s * from.seq_stride + head * from.head_stride;
    };
    for (int64_t h = 0; h < a.heads; ++h) {
      rotate(a.q, at(a.q, h));
      const int64_t out = (token * a.heads + h) * n;
      for (int64_t i = 0; i < n; i += kLanes)
        store_any(a.dtype, a.q_out, out + i, out + n, load(x.data() + i));
    }
    const TokenPlace place = place_of(a.pages, a.kv_heads, a.capacity, b, a.start[b] + s);
    for (int64_t h = 0; h < a.kv_heads; ++h) {
      const int64_t slot = place.first + h * place.apart;
      rotate(a.k, at(a.k, h));
      quantize_into(a.k_cache, slot, x.data(), n, a.bits, a.k_clip);
      load_vector(x.data(), a.dtype, a.v.data, at(a.v, h), n);
      quantize_into(a.v_cache, slot, x.data(), n, a.bits, a.v_clip);
    }
  }
}

}  // namespace

void rope_hadamard_kv_append(const KvAppendArgs& a, const Executor& executor) {
  const int64_t elements = (a.heads + 2 * a.kv_heads) * a.head_dim;
  parallel_rows(executor, a.batch * a.seq, elements,
                [&](int64_t begin, int64_t end) { append(a, begin, end); });
}

}  // namespace quarot::cpu::QUAROT_ISA
