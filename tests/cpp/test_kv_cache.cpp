// rope_hadamard_kv_append: values are quantized without a transform, hence equal to scalar fp32
// code bit by bit; queries and keys are compared with double arithmetic.
#include "kernels/kv_cache.h"
#include "testing.h"

namespace quarot::cpu {
QUAROT_DECLARE_VARIANTS(void rope_hadamard_kv_append(const KvAppendArgs&, const Executor&))
}  // namespace quarot::cpu

namespace quarot::testing {
namespace {

struct Shape {
  int64_t batch, seq, heads, kv_heads, head_dim, rotary, size, order;
};
// Whole and broken vectors, partial and no rotary, factors, blocks, no transform.
constexpr Shape kShapes[] = {{1, 1, 3, 1, 64, 64, 64, 1},  {2, 5, 4, 2, 96, 96, 96, 12},
                             {2, 3, 2, 2, 80, 20, 16, 1},  {1, 4, 1, 1, 24, 8, 24, 3},
                             {3, 2, 2, 1, 128, 128, 1, 1}, {1, 2, 1, 1, 8, 0, 8, 1}};
constexpr int64_t kCapacity = 9;
constexpr uint8_t kUntouched = 0xa5;

/// The three parts of a cache, filled with kUntouched.
struct Cache {
  Guarded<uint8_t> codes;
  Guarded<uint16_t> scale;
  Guarded<uint8_t> zero;
  Cache(int64_t slots, int64_t row_bytes)
      : codes(slots * row_bytes, kUntouched),
        scale(slots, 0x0101 * kUntouched),
        zero(slots, kUntouched) {}
  KvCache view() { return {codes.data(), scale.data(), zero.data()}; }
  void check_poison() {
    codes.check_poison();
    scale.check_poison();
    zero.check_poison();
  }
  bool operator==(const Cache& other) const {
    return codes.values() == other.codes.values() && scale.values() == other.scale.values() &&
           zero.values() == other.zero.values();
  }
};

/// A call with random contents; q, k and v are parts of one buffer [batch, seq, heads + 2 kv_heads,
/// head_dim].
struct Call {
  Shape s;
  DType dtype;
  int bits;
  Guarded<uint8_t> qkv;
  Guarded<float> cos, sin;
  Guarded<int8_t> factor;
  Guarded<int32_t> start;
  Guarded<uint8_t> q_out;
  Cache k, v;

  int64_t all_heads() const { return s.heads + 2 * s.kv_heads; }
  int64_t slots() const { return s.batch * s.kv_heads * kCapacity; }

  Call(const Shape& shape, DType type, int code_bits)
      : s(shape),
        dtype(type),
        bits(code_bits),
        qkv(s.batch * s.seq * all_heads() * s.head_dim * bytes_of(type)),
        cos(s.batch * s.seq * s.rotary),
        sin(s.batch * s.seq * s.rotary),
        factor(s.order * s.order),
        start(s.batch),
        q_out(s.batch * s.seq * s.heads * s.head_dim * bytes_of(type), 0xee),
        k(slots(), s.head_dim * bits / 8),
        v(slots(), s.head_dim * bits / 8) {
    Random random(static_cast<uint32_t>(s.head_dim + bits));
    for (int64_t i = 0; i < qkv.size() / bytes_of(type); ++i) {
      to_bits(type, qkv.data(), i, 2 * random.normal() + 0.5f);
    }
    for (int64_t i = 0; i < cos.size(); ++i) {
      const float angle = random.uniform(-3, 3);
      cos[i] = std::cos(angle);
      sin[i] = std::sin(angle);
    }
    for (int64_t i = 0; i < factor.size(); ++i) factor[i] = random.integer(0, 1) == 0 ? -1 : 1;
    for (int64_t b = 0; b < s.batch; ++b)
      start[b] = static_cast<int32_t>(random.integer(0, kCapacity - s.seq));
  }

  /// Element offset of vector `head` of all_heads().
  int64_t offset(int64_t b, int64_t t, int64_t head) const {
    return ((b * s.seq + t) * all_heads() + head) * s.head_dim;
  }
  float input(int64_t b, int64_t t, int64_t head, int64_t i) const {
    return from_bits(dtype, qkv.data(), offset(b, t, head) + i);
  }
  int64_t slot(int64_t b, int64_t t, int64_t head) const {
    return (b * s.kv_heads + head) * kCapacity + start[b] + t;
  }

  KvAppendArgs args() {
    const auto part = [&](int64_t head) {
      return HeadVectors{qkv.data() + offset(0, 0, head) * bytes_of(dtype), offset(1, 0, 0),
                         offset(0, 1, 0), s.head_dim};
    };
    const HadamardMatrix matrix{s.size, s.order, s.order == 1 ? nullptr : factor.data(),
                                1 / std::sqrt(static_cast<float>(s.size))};
    return {q_out.data(),  k.view(),
            v.view(),      part(0),
            part(s.heads), part(s.heads + s.kv_heads),
            cos.data(),    sin.data(),
            start.data(),  matrix,
            dtype,         DType::f32,
            s.batch,       s.seq,
            s.heads,       s.kv_heads,
            s.head_dim,    kCapacity,
            s.rotary,      s.seq * s.rotary,
            bits,          0.95f,
            0.9f,          {}};
  }

  /// The vector after RoPE and the transform, in double.
  std::vector<double> rotated(int64_t b, int64_t t, int64_t head) const {
    std::vector<double> x(static_cast<size_t>(s.head_dim)), y(x.size());
    for (int64_t i = 0; i < s.head_dim; ++i) x[static_cast<size_t>(i)] = input(b, t, head, i);
    for (int64_t i = 0; i < s.rotary; ++i) {
      const int64_t half = s.rotary / 2, angle = (b * s.seq + t) * s.rotary + i;
      const double turned =
          i < half ? -x[static_cast<size_t>(i + half)] : x[static_cast<size_t>(i - half)];
      y[static_cast<size_t>(i)] = x[static_cast<size_t>(i)] * cos[angle] + turned * sin[angle];
    }
    std::copy(y.begin(), y.begin() + s.rotary, x.begin());
    const int64_t power = s.size / s.order;
    for (int64_t j = 0; j < s.head_dim; ++j) {
      double sum = 0;
      for (int64_t i = j / s.size * s.size; i < j / s.size * s.size + s.size; ++i) {
        const int64_t row = i % s.size, column = j % s.size;
        const int sylvester = __builtin_popcountll(row % power & column % power) % 2 == 0 ? 1 : -1;
        const int entry = s.order == 1 ? 1 : factor[row / power * s.order + column / power];
        sum += x[static_cast<size_t>(i)] * sylvester * entry;
      }
      y[static_cast<size_t>(j)] = sum / std::sqrt(static_cast<double>(s.size));
    }
    return y;
  }
};

int code_at(const Cache& cache, int bits, int64_t slot, int64_t dim, int64_t i) {
  const int byte = cache.codes[slot * dim * bits / 8 + i * bits / 8];
  return bits == 8 ? byte : i % 2 == 0 ? byte & 15 : byte >> 4;
}

/// What one slot must hold for the vector x: the quantizer of kv_cache.h, one float operation at a
/// time.
void check_quantized(const Cache& cache, int bits, int64_t slot, const std::vector<float>& x,
                     float clip) {
  const auto dim = static_cast<int64_t>(x.size());
  const float top = bits == 4 ? 15 : 255;
  float low = 0, high = 0;
  bool finite = true;
  for (const float value : x) {
    low = std::min(low, value);
    high = std::max(high, value);
    finite = finite && std::isfinite(value);
  }
  if (!finite) {
    CHECK(std::isnan(from_f16(cache.scale[slot])));
    CHECK(cache.zero[slot] == 0);
    for (int64_t i = 0; i < dim; ++i) CHECK(code_at(cache, bits, slot, dim, i) == 0);
    return;
  }
  low = clip * low;
  high = clip * high;
  const uint16_t scale = to_f16(std::clamp((high - low) / top, 0x1p-14f, 65504.0f));
  CHECK(cache.scale[slot] == scale, from_f16(cache.scale[slot]), " for ", from_f16(scale));
  const float inv = 1 / from_f16(scale);
  const float zero = std::min(std::nearbyint(-low * inv), top);
  CHECK(cache.zero[slot] == zero, int{cache.zero[slot]}, " for ", zero);
  for (int64_t i = 0; i < dim; ++i) {
    const float code =
        std::clamp(std::nearbyint(x[static_cast<size_t>(i)] * inv) + zero, 0.0f, top);
    CHECK(code_at(cache, bits, slot, dim, i) == code, "at ", i, " of slot ", slot);
  }
}

TEST(kv_append_quantizes_values_bit_by_bit) {
  for (const Shape& shape : kShapes) {
    for (const DType dtype : kDTypes) {
      for (const int bits : {4, 8}) {
        for (const cpu::Isa isa : available_isas()) {
          Call call(shape, dtype, bits);
          VARIANT(isa, rope_hadamard_kv_append)(call.args(), threaded(2));
          for (int64_t b = 0; b < shape.batch; ++b) {
            for (int64_t t = 0; t < shape.seq; ++t) {
              for (int64_t h = 0; h < shape.kv_heads; ++h) {
                std::vector<float> x(static_cast<size_t>(shape.head_dim));
                for (int64_t i = 0; i < shape.head_dim; ++i) {
                  x[static_cast<size_t>(i)] = call.input(b, t, shape.heads + shape.kv_heads + h, i);
                }
                check_quantized(call.v, bits, call.slot(b, t, h), x, 0.9f);
              }
            }
          }
        }
      }
    }
  }
}

TEST(kv_append_quantizes_extreme_values) {
  const float big = 3e38f, nan = std::nanf(""), inf = HUGE_VALF;
  const std::vector<std::vector<float>> rows = {{0, 0},   {1e-30f, -1e-30f}, {big, -big}, {big, 0},
                                                {nan, 1}, {1, inf},          {-inf, inf}, {5, 6},
                                                {-5, -6}};
  for (const auto& row : rows) {
    for (const int bits : {4, 8}) {
      for (const cpu::Isa isa : available_isas()) {
        Call call({1, 1, 1, 1, 24, 0, 1, 1}, DType::f32, bits);
        std::vector<float> x(24);
        for (size_t i = 0; i < x.size(); ++i) x[i] = row[i % row.size()];
        std::memcpy(call.qkv.data() + 2 * 24 * 4, x.data(), 24 * 4);
        VARIANT(isa, rope_hadamard_kv_append)(call.args(), serial());
        check_quantized(call.v, bits, call.slot(0, 0, 0), x, 0.9f);
      }
    }
  }
}

TEST(kv_append_rotates_queries_and_keys) {
  for (const Shape& shape : kShapes) {
    for (const DType dtype : kDTypes) {
      const double rounding = dtype == DType::f32   ? 0x1p-21
                              : dtype == DType::f16 ? 0x1p-10
                                                    : 0x1p-7;
      Call call(shape, dtype, 8);
      cpu::rope_hadamard_kv_append(call.args(), threaded(2));
      for (int64_t b = 0; b < shape.batch; ++b) {
        for (int64_t t = 0; t < shape.seq; ++t) {
          for (int64_t h = 0; h < shape.heads + shape.kv_heads; ++h) {
            const std::vector<double> want = call.rotated(b, t, h);
            double largest = 0;
            for (const double value : want) largest = std::max(largest, std::abs(value));
            for (int64_t i = 0; i < shape.head_dim; ++i) {
              const double expected = want[static_cast<size_t>(i)];
              if (h < shape.heads) {
                const int64_t at = ((b * shape.seq + t) * shape.heads + h) * shape.head_dim + i;
                const double got = from_bits(dtype, call.q_out.data(), at);
                CHECK(std::abs(got - expected) <= rounding * largest, got, " for ", expected);
                continue;
              }
              // The codes reach the clipped range, to within the rounding of the zero point.
              const int64_t slot = call.slot(b, t, h - shape.heads);
              const double scale = from_f16(call.k.scale[slot]);
              const int zero = call.k.zero[slot];
              const double reached = std::clamp(expected, -zero * scale, (255 - zero) * scale);
              CHECK(std::abs(reached - expected) <= 0.051 * largest + 0.501 * scale);
              const double got = scale * (code_at(call.k, 8, slot, shape.head_dim, i) - zero);
              CHECK(std::abs(got - reached) <= 0.501 * scale, got, " for ", reached);
            }
          }
        }
      }
    }
  }
}

TEST(kv_append_variants_and_threads_agree_and_write_nothing_else) {
  for (const Shape& shape : kShapes) {
    for (const DType dtype : kDTypes) {
      for (const int bits : {4, 8}) {
        Call want(shape, dtype, bits);
        cpu::baseline::rope_hadamard_kv_append(want.args(), serial());
        for (const cpu::Isa isa : available_isas()) {
          Call call(shape, dtype, bits);
          VARIANT(isa, rope_hadamard_kv_append)(call.args(), threaded(3));
          CHECK(call.q_out.values() == want.q_out.values(), cpu::isa_name(isa));
          CHECK(call.k == want.k && call.v == want.v, cpu::isa_name(isa));
          call.q_out.check_poison();
          call.k.check_poison();
          call.v.check_poison();
        }
        for (int64_t slot = 0; slot < want.slots(); ++slot) {
          const int64_t b = slot / kCapacity / shape.kv_heads,
                        at = slot % kCapacity - want.start[b];
          if (at >= 0 && at < shape.seq) continue;
          CHECK(want.k.zero[slot] == kUntouched && want.k.scale[slot] == 0x0101 * kUntouched);
          for (int64_t i = 0; i < shape.head_dim * bits / 8; ++i) {
            CHECK(want.k.codes[slot * shape.head_dim * bits / 8 + i] == kUntouched);
          }
        }
      }
    }
  }
}

TEST(kv_append_refuses_to_write_outside) {
  for (const int32_t start : {-1, static_cast<int32_t>(kCapacity) - 4}) {
    Call call({2, 5, 1, 1, 64, 64, 64, 1}, DType::f32, 4);
    const Call fresh({2, 5, 1, 1, 64, 64, 64, 1}, DType::f32, 4);
    call.start[0] = 0;
    call.start[1] = start;
    CHECK_THROWS(cpu::rope_hadamard_kv_append(call.args(), serial()), "start[1]");
    CHECK(call.k == fresh.k && call.v == fresh.v);
  }
}

}  // namespace
}  // namespace quarot::testing
