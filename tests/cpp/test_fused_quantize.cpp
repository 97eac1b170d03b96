// The fused quantizers against the same steps in float64: the scale within 8 ulp, codes off by one
// in at most 1 of 200 (float32 rounds the steps before the code); and equal bit by bit between the
// ISA variants.
#include <functional>

#include "kernels/fused_quantize.h"
#include "testing.h"

namespace quarot::cpu {
QUAROT_DECLARE_VARIANTS(void hadamard_quantize(const HadamardQuantizeArgs&, const Executor&))
QUAROT_DECLARE_VARIANTS(void rmsnorm_quantize(const RmsnormQuantizeArgs&, const Executor&))
QUAROT_DECLARE_VARIANTS(void glu_hadamard_quantize(const GluHadamardQuantizeArgs&, const Executor&))
QUAROT_DECLARE_VARIANTS(void head_hadamard_quantize(const HeadHadamardQuantizeArgs&,
                                                    const Executor&))
}  // namespace quarot::cpu

namespace quarot::testing {
namespace {

constexpr int64_t kRows = 4;
constexpr float kClip = 0.9f;
constexpr double kScaleUlps = 8;

/// In place: positions of `inner` numbers, x (I (x) factor (x) Sylvester (x) I_inner) * scale.
void transform(std::vector<double>& x, const HadamardMatrix& m, int64_t inner) {
  const int64_t power = m.size / m.factor_order, block = m.size * inner;
  std::vector<double> out(x.size(), 0.0);
  for (size_t first = 0; first < x.size(); first += static_cast<size_t>(block)) {
    for (int64_t i = 0; i < m.size; ++i) {
      for (int64_t j = 0; j < m.size; ++j) {
        const int a = m.factor == nullptr ? 1 : m.factor[i / power * m.factor_order + j / power];
        const int b = __builtin_popcountll((i % power) & (j % power)) % 2 == 0 ? a : -a;
        for (int64_t c = 0; c < inner; ++c) {
          out[first + size_t(j * inner + c)] +=
              b * x[first + size_t(i * inner + c)] * double{m.scale};
        }
      }
    }
  }
  x = out;
}

/// Runs a fused op in every variant and checks it: `run(isa, out)` calls the kernel, `exact(r)`
/// gives row r in float64. 8 bits, asymmetric and symmetric.
void check(const char* what, int64_t n,
           const std::function<void(cpu::Isa, const QuantizedRows&)>& run,
           const std::function<std::vector<double>(int64_t)>& exact) {
  for (const bool symmetric : {true, false}) {
    std::vector<int8_t> first_codes;
    std::vector<float> first_scale;
    for (const cpu::Isa isa : available_isas()) {
      Guarded<int8_t> codes(kRows * n, 99);
      Guarded<float> scale(kRows, -1);
      Guarded<int32_t> zero(kRows, 999);
      run(isa, {codes.data(), scale.data(), symmetric ? nullptr : zero.data(), n, 8, false, kClip});
      codes.check_poison();
      scale.check_poison();
      zero.check_poison();
      if (first_codes.empty()) {
        first_codes = codes.values();
        first_scale = scale.values();
      }
      CHECK(codes.values() == first_codes && scale.values() == first_scale, what, ": ",
            cpu::isa_name(isa), " differs from baseline");
      int64_t off = 0;
      for (int64_t r = 0; r < kRows; ++r) {
        const std::vector<double> y = exact(r);
        double lo = 0, hi = 0;
        for (const double v : y) {
          lo = std::min(lo, v);
          hi = std::max(hi, v);
        }
        const double want = symmetric ? kClip * std::max(-lo, hi) / 127 : kClip * (hi - lo) / 255;
        CHECK(std::abs(scale[r] - want) <= kScaleUlps * 0x1p-23 * want, what, " n=", n, ": scale ",
              scale[r], " for ", want);
        for (int64_t i = 0; i < n; ++i) {
          const double shift = symmetric ? 0 : zero[r];
          const double code =
              std::clamp(std::nearbyint(y[size_t(i)] / want) + shift, -128.0, 127.0);
          const double error = std::abs(codes[r * n + i] - code);
          CHECK(error <= 1, what, " n=", n, ": code ", int{codes[r * n + i]}, " for ", code);
          off += error != 0;
        }
      }
      CHECK(off * 200 <= kRows * n, what, " n=", n, ": ", off, " codes differ");
    }
  }
}

std::vector<int8_t> signs(Random& random, int64_t order) {
  auto out = random.integers<int8_t>(order * order, 0, 1);
  for (int8_t& s : out) s = s != 0 ? 1 : -1;
  return out;
}

TEST(hadamard_quantize_follows_float64) {
  Random random(7);
  for (const auto& [order, power, blocks] :
       {std::array<int64_t, 3>{1, 256, 2}, {12, 8, 1}, {20, 2, 3}, {1, 1, 50}}) {
    const int64_t n = order * power * blocks;
    const Guarded<int8_t> factor(signs(random, order));
    const Guarded<float> x(random.normals(kRows * n));
    const HadamardMatrix m{order * power, order, order == 1 ? nullptr : factor.data(), 0.25f};
    const Rows rows{x.data(), DType::f32, kRows, n, n};
    check(
        "hadamard_quantize", n,
        [&](cpu::Isa isa, const QuantizedRows& out) {
          VARIANT(isa, hadamard_quantize)({out, rows, m}, serial());
        },
        [&](int64_t r) {
          std::vector<double> y(x.data() + r * n, x.data() + (r + 1) * n);
          transform(y, m, 1);
          return y;
        });
  }
}

TEST(head_hadamard_quantize_follows_float64) {
  Random random(8);
  for (const auto& [order, power, blocks, dim] : {std::array<int64_t, 4>{1, 8, 1, 64},
                                                  {12, 1, 2, 16},
                                                  {1, 4, 2, 6},
                                                  {12, 2, 1, 7},
                                                  {1, 1, 9, 64}}) {
    const int64_t n = order * power * blocks * dim;
    const Guarded<int8_t> factor(signs(random, order));
    const Guarded<float> x(random.normals(kRows * n));
    const HadamardMatrix m{order * power, order, order == 1 ? nullptr : factor.data(), 0.25f};
    const Rows rows{x.data(), DType::f32, kRows, n, n};
    const int64_t inner = dim;
    check(
        "head_hadamard_quantize", n,
        [&](cpu::Isa isa, const QuantizedRows& out) {
          VARIANT(isa, head_hadamard_quantize)({out, rows, inner, m}, serial());
        },
        [&](int64_t r) {
          std::vector<double> y(x.data() + r * n, x.data() + (r + 1) * n);
          transform(y, m, inner);
          return y;
        });
  }
}

TEST(rmsnorm_quantize_follows_float64) {
  Random random(9);
  for (const int64_t n : {1, 30, 576, 4096}) {
    for (const bool weighted : {false, true}) {
      const Guarded<float> x(random.normals(kRows * n, 5.0f)), weight(random.normals(n));
      const float eps = 1e-5f;
      const Rows rows{x.data(), DType::f32, kRows, n, n};
      check(
          "rmsnorm_quantize", n,
          [&](cpu::Isa isa, const QuantizedRows& out) {
            VARIANT(isa, rmsnorm_quantize)
            ({out, rows, weighted ? weight.data() : nullptr, DType::f32, eps}, serial());
          },
          [&](int64_t r) {
            std::vector<double> y(x.data() + r * n, x.data() + (r + 1) * n);
            double squares = 0;
            for (const double v : y) squares += v * v;
            const double inv = 1 / std::sqrt(squares / static_cast<double>(n) + double{eps});
            for (int64_t i = 0; i < n; ++i)
              y[size_t(i)] *= inv * (weighted ? double{weight[i]} : 1.0);
            return y;
          });
    }
  }
}

TEST(glu_hadamard_quantize_follows_float64) {
  Random random(10);
  const int64_t n = 96;
  const Guarded<int8_t> factor(signs(random, 12));
  const Guarded<float> x(random.normals(kRows * 2 * n, 3.0f));
  for (const Activation activation : {Activation::silu, Activation::gelu, Activation::gelu_tanh}) {
    for (const int64_t size : {int64_t{1}, n}) {
      const bool whole = size == n;
      const HadamardMatrix m{size, whole ? 12 : 1, whole ? factor.data() : nullptr,
                             whole ? 0.125f : 1.0f};
      const Rows rows{x.data(), DType::f32, kRows, 2 * n, 2 * n};
      check(
          "glu_hadamard_quantize", n,
          [&](cpu::Isa isa, const QuantizedRows& out) {
            VARIANT(isa, glu_hadamard_quantize)({out, rows, activation, m}, serial());
          },
          [&](int64_t r) {
            std::vector<double> y(static_cast<size_t>(n));
            for (int64_t i = 0; i < n; ++i) {
              const double g = x[r * 2 * n + i], up = x[r * 2 * n + n + i];
              const double u = std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g);
              const double a = activation == Activation::silu ? g / (1 + std::exp(-g))
                               : activation == Activation::gelu
                                   ? 0.5 * g * (1 + std::erf(g / std::sqrt(2.0)))
                                   : 0.5 * g * (1 + std::tanh(u));
              y[size_t(i)] = a * up;
            }
            transform(y, m, 1);
            return y;
          });
    }
  }
}

TEST(activations_of_extreme_gates_stay_finite) {
  // e^-gate overflows, e^gate underflows; the codes are those of gate * up or of 0.
  const std::vector<float> gates = {-200.0f, -104.0f, -90.0f, -1e-30f, 0.0f, 1e-30f, 90.0f, 127.0f};
  const auto n = static_cast<int64_t>(gates.size());
  for (const Activation activation : {Activation::silu, Activation::gelu, Activation::gelu_tanh}) {
    std::vector<float> row = gates;
    row.resize(size_t(2 * n), 1.0f);  // up = 1
    const Guarded<float> x(row);
    for (const cpu::Isa isa : available_isas()) {
      Guarded<int8_t> codes(n);
      Guarded<float> scale(1);
      VARIANT(isa, glu_hadamard_quantize)
      ({{codes.data(), scale.data(), nullptr, n, 8, false, 1.0f},
        {x.data(), DType::f32, 1, 2 * n, 2 * n},
        activation,
        {1, 1, nullptr, 1.0f}},
       serial());
      CHECK(scale[0] == 1.0f, "scale ", scale[0]);
      CHECK((codes.values() == std::vector<int8_t>{0, 0, 0, 0, 0, 0, 90, 127}), cpu::isa_name(isa),
            " activation ", static_cast<int>(activation));
    }
  }
}

TEST(a_row_that_becomes_infinite_has_no_codes) {
  const int64_t n = 32;
  std::vector<float> values(size_t(2 * n), 1.0f);
  values[5] = INFINITY;
  const Guarded<float> x(values);
  Guarded<uint8_t> codes(n, 0xee);  // [2, n / 2] packed
  Guarded<float> scale(2);
  const Rows rows{x.data(), DType::f32, 2, n, n};
  cpu::rmsnorm_quantize(
      {{codes.data(), scale.data(), nullptr, n, 4, true, 1.0f}, rows, nullptr, DType::f32, 1e-6f},
      serial());
  CHECK(std::isnan(scale[0]) && std::isfinite(scale[1]), scale[0], " ", scale[1]);
  for (int64_t i = 0; i < n / 2; ++i) CHECK(codes[i] == 0 && codes[n / 2 + i] == 0x77, i);
}

}  // namespace
}  // namespace quarot::testing
