// quantize, dequantize and packing: equal, bit by bit and in every ISA variant, to the definition
// in kernels/quantize.h written out in scalar code.
#include "kernels/quantize.h"
#include "testing.h"

namespace quarot::cpu {
QUAROT_DECLARE_VARIANTS(void quantize(const QuantizeArgs&, const Executor&))
QUAROT_DECLARE_VARIANTS(void dequantize(const DequantizeArgs&, const Executor&))
QUAROT_DECLARE_VARIANTS(void pack_int4(const PackArgs&, const Executor&))
QUAROT_DECLARE_VARIANTS(void unpack_int4(const PackArgs&, const Executor&))
}  // namespace quarot::cpu

namespace quarot::testing {
namespace {

struct Options {
  int bits;
  bool symmetric;
  float clip;
};

struct Group {
  std::vector<int> codes;
  float scale;
  int zero;
};

/// CONTRIBUTING.md, one group.
Group quantized(const std::vector<float>& x, const Options& o) {
  float amax = 0, lo = 0, hi = 0;
  for (const float v : x) {
    if (!std::isfinite(v)) return {std::vector<int>(x.size(), 0), std::nanf(""), 0};
    amax = std::max(amax, std::abs(v));
    lo = std::min(lo, v);
    hi = std::max(hi, v);
  }
  const int half = 1 << (o.bits - 1);
  lo *= o.clip;
  hi *= o.clip;
  float scale = o.symmetric ? (o.clip * amax) / static_cast<float>(half - 1)
                            : (hi - lo) / static_cast<float>(2 * half - 1);
  if (scale < 0x1p-126f) scale = 1;
  const float inv = 1 / scale;
  Group out{{}, scale, 0};
  const float zero = o.symmetric ? 0 : std::nearbyint(-lo * inv);
  if (!o.symmetric) out.zero = static_cast<int>(zero) - half;
  for (const float v : x) {
    const float code = std::nearbyint(v * inv) + zero;
    const float low = o.symmetric ? static_cast<float>(-half) : 0.0f;
    const float clamped = std::clamp(code, low, low + static_cast<float>(2 * half - 1));
    out.codes.push_back(static_cast<int>(clamped) - (o.symmetric ? 0 : half));
  }
  return out;
}

/// Code i of int8 or packed codes.
int code_at(const uint8_t* codes, int64_t i, bool packed) {
  if (!packed) return static_cast<int8_t>(codes[i]);
  const int nibble = i % 2 == 0 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
  return nibble < 8 ? nibble : nibble - 16;
}

/// Rows that a quantizer finds hard: ordinary, zero, tiny, huge, one-sided, ties, NaN, infinity.
std::vector<float> hard_rows(Random& random, int64_t rows, int64_t n) {
  std::vector<float> x = random.normals(rows * n);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = x.data() + r * n;
    const int64_t middle = n / 2;
    switch (r % 8) {
      case 1:
        std::fill_n(row, n, 0.0f);
        break;
      case 2:
        for (int64_t i = 0; i < n; ++i) row[i] *= 1e-39f;
        break;
      case 3:
        for (int64_t i = 0; i < n; ++i) row[i] *= 1e4f;
        break;
      case 4:
        for (int64_t i = 0; i < n; ++i) row[i] = std::abs(row[i]) + 1;
        break;
      case 5:
        for (int64_t i = 0; i < n; ++i) row[i] = 0.5f * static_cast<float>(i % 29 - 14);
        break;
      case 6:
        row[middle] = std::nanf("");
        break;
      case 7:
        row[middle] = -INFINITY;
        break;
    }
  }
  return x;
}

struct Case {
  int64_t n, group;
};
constexpr Case kCases[] = {{1, 1},   {2, 2},   {7, 7},   {16, 16},  {48, 16},
                           {70, 14}, {70, 70}, {66, 33}, {528, 528}};
constexpr int64_t kRows = 9;

TEST(quantize_and_dequantize_follow_the_definition) {
  Random random(4);
  for (const Case& c : kCases) {
    const auto values = hard_rows(random, kRows, c.n);
    const int64_t groups = c.n / c.group, stride = c.n + 3;
    for (const DType dtype : kDTypes) {
      Guarded<uint8_t> x(((kRows - 1) * stride + c.n) * bytes_of(dtype),
                         0xff);  // NaN between the rows
      for (int64_t i = 0; i < kRows * c.n; ++i) {
        const float v = values[size_t(i)];
        const int64_t at = i / c.n * stride + i % c.n;
        if (dtype == DType::bf16 && !std::isfinite(v)) {
          const auto top = static_cast<uint16_t>(std::isnan(v) ? 0x7fc0 : 0xff80);
          std::memcpy(x.data() + 2 * at, &top, 2);
        } else {
          to_bits(dtype, x.data(), at, v);
        }
      }
      for (const Options& o : {Options{4, true, 0.9f}, Options{4, false, 1.0f},
                               Options{8, true, 1.0f}, Options{8, false, 0.95f}}) {
        for (const bool packed : {false, true}) {
          if (packed && (o.bits != 4 || c.n % 2 != 0)) continue;
          for (const cpu::Isa isa : available_isas()) {
            Guarded<uint8_t> codes(packed ? kRows * c.n / 2 : kRows * c.n, 0xee);
            Guarded<float> scale(kRows * groups, -1);
            Guarded<int32_t> zero(kRows * groups, -77);
            int32_t* zeros = o.symmetric ? nullptr : zero.data();
            VARIANT(isa, quantize)
            ({{codes.data(), scale.data(), zeros, c.group, o.bits, packed, o.clip},
              {x.data(), dtype, kRows, c.n, stride}},
             threaded(2));
            Guarded<float> back(kRows * c.n, -1);
            VARIANT(isa, dequantize)
            ({back.data(), DType::f32, codes.data(), scale.data(), zeros, kRows, c.n, c.group,
              packed},
             serial());
            for (int64_t g = 0; g < kRows * groups; ++g) {
              const int64_t first = g / groups * stride + g % groups * c.group;
              std::vector<float> input;
              for (int64_t i = 0; i < c.group; ++i)
                input.push_back(from_bits(dtype, x.data(), first + i));
              const Group want = quantized(input, o);
              CHECK(std::memcmp(&scale[g], &want.scale, 4) == 0 ||
                        (std::isnan(scale[g]) && std::isnan(want.scale)),
                    cpu::isa_name(isa), " group ", g, " scale ", scale[g], " for ", want.scale);
              CHECK(o.symmetric || zero[g] == want.zero, cpu::isa_name(isa), " zero ", zero[g],
                    " for ", want.zero);
              for (int64_t i = 0; i < c.group; ++i) {
                const int64_t at = g * c.group + i;
                const int code = code_at(codes.data(), at, packed);
                CHECK(code == want.codes[size_t(i)], cpu::isa_name(isa), " n=", c.n,
                      " bits=", o.bits, " code ", at, ": ", code, " for ", want.codes[size_t(i)]);
                const float value = static_cast<float>(code - want.zero) * want.scale;
                CHECK(back[at] == value || (std::isnan(back[at]) && std::isnan(value)),
                      "dequantized ", back[at], " for ", value);
              }
            }
            codes.check_poison();
            scale.check_poison();
            zero.check_poison();
            back.check_poison();
          }
        }
      }
    }
  }
}

TEST(dequantize_rounds_once_to_nearest_even) {
  // One code a group makes every fp32 number a possible result.
  Random random(5);
  constexpr int64_t kCount = 4099;
  Guarded<float> scale(kCount);
  for (int64_t i = 0; i < kCount; ++i) {
    // Normal and subnormal fp16 results, overflow to infinity, and ties of both 16-bit formats.
    scale[i] = std::ldexp(static_cast<float>(random.integer(1, 1 << 13)),
                          static_cast<int>(random.integer(-38, 6)));
  }
  const Guarded<int8_t> codes(random.integers<int8_t>(kCount, -8, 7));
  for (const DType dtype : {DType::f16, DType::bf16}) {
    for (const cpu::Isa isa : available_isas()) {
      Guarded<uint16_t> out(kCount);
      VARIANT(isa, dequantize)
      ({out.data(), dtype, codes.data(), scale.data(), nullptr, 1, kCount, 1, false}, serial());
      for (int64_t i = 0; i < kCount; ++i) {
        const float exact = static_cast<float>(codes[i]) * scale[i];
        const uint16_t want = dtype == DType::f16 ? to_f16(exact) : to_bf16(exact);
        CHECK(out[i] == want, cpu::isa_name(isa), " ", exact, " became ", out[i], ", not ", want);
      }
      out.check_poison();
    }
  }
}

TEST(pack_and_unpack_are_inverses) {
  Random random(6);
  for (const int64_t count : {2, 14, 16, 30, 256, 4096, 12346}) {
    const Guarded<int8_t> codes(random.integers<int8_t>(count, -8, 7));
    for (const cpu::Isa isa : available_isas()) {
      Guarded<uint8_t> packed(count / 2, 0xee);
      Guarded<int8_t> back(count, 99);
      VARIANT(isa, pack_int4)({packed.data(), const_cast<int8_t*>(codes.data()), count},
                              threaded(2));
      VARIANT(isa, unpack_int4)({packed.data(), back.data(), count}, threaded(2));
      for (int64_t i = 0; i < count; ++i) {
        CHECK(code_at(packed.data(), i, true) == codes[i], cpu::isa_name(isa), " packed code ", i);
      }
      CHECK(back.values() == codes.values(), cpu::isa_name(isa), " unpacked ", count, " codes");
      packed.check_poison();
      back.check_poison();
    }
  }
  CHECK_THROWS(cpu::pack_int4({nullptr, nullptr, 3}, serial()), "even");
}

}  // namespace
}  // namespace quarot::testing
