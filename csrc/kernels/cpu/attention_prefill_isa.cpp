// Keys and values of a quantized cache written out in 16 bits, for torch's attention of many
// queries. Threads share the (sequence, cache head) pairs times blocks of tokens. The bound is
// memory: a quarter is read of what is written.
#include "kernels/attention.h"
#include "kernels/cpu/any_dtype.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/vec.h"

namespace quarot::cpu::QUAROT_ISA {
namespace {

constexpr int64_t kTokens = 64;  // of a task: blocks of a paged cache are whole 16
constexpr int64_t kVectorBytes = kLanes / 2;

QUAROT_INLINE float to_float(uint16_t half) {
  uint16_t halves[kLanes] = {half};
  float floats[kLanes];
  store(floats, load<DType::f16>(halves, 0));
  return floats[0];
}

/// x [head_dim] of dtype at element `at`  <-  a token's codes; `broken` (NaN) instead of values
/// where a scale is not finite.
QUAROT_INLINE void write_token(const DequantizeKvArgs& a, const KvCacheView& cache, int64_t slot,
                               bool finite, float broken, void* x, int64_t at) {
  const F32 scale = f32(finite ? to_float(cache.scale[slot]) : 0.0f);
  const I32 zero = i32(cache.zero[slot]);
  const uint8_t* codes = cache.codes + slot * (a.head_dim * a.bits / 8);
  for (int64_t i = 0; i < a.head_dim; i += kLanes) {
    uint8_t tail[kLanes] = {};
    const uint8_t* from = codes + i * a.bits / 8;
    if (a.head_dim - i < kLanes) {
      __builtin_memcpy(tail, from, static_cast<size_t>((a.head_dim - i) * a.bits / 8));
      from = tail;
    }
    const I32 code = a.bits == 4 ? load_u4(from) : load_u8(from);
    const F32 value = finite ? to_f32(code - zero) * scale : f32(broken);
    store_any(a.dtype, x, at + i, at + a.head_dim, value);
  }
}

bool is_finite(uint16_t half) { return (half & 0x7c00) != 0x7c00; }

}  // namespace

void dequantize_kv(const DequantizeKvArgs& a, const Executor& executor) {
  const int64_t blocks = ceil_div(a.tokens, kTokens);
  const int64_t work = 2 * kTokens * a.head_dim;
  parallel_rows(executor, a.pairs * blocks, work, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / blocks, first = task % blocks * kTokens;
      const int64_t b = (a.first + pair) / a.kv_heads, head = (a.first + pair) % a.kv_heads;
      for (int64_t token = first; token < first + kTokens && token < a.tokens; ++token) {
        const TokenPlace place = place_of(a.pages, a.kv_heads, a.capacity, b, token);
        const int64_t slot = place.first + head * place.apart;
        const bool finite = is_finite(a.k.scale[slot]) && is_finite(a.v.scale[slot]);
        const int64_t at = (pair * a.tokens + token) * a.head_dim;
        write_token(a, a.k, slot, finite, __builtin_nanf(""), a.keys, at);
        write_token(a, a.v, slot, finite, 0.0f, a.values, at);
      }
    }
  });
}

}  // namespace quarot::cpu::QUAROT_ISA
