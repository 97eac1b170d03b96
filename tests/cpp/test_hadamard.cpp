// The Hadamard transform: exact on integers, against a dense product in int64, in every ISA variant
// and dtype.
#include "kernels/hadamard.h"
#include "testing.h"

namespace quarot::cpu {
QUAROT_DECLARE_VARIANTS(void hadamard(const HadamardArgs&, const Executor&))
}  // namespace quarot::cpu

namespace quarot::testing {
namespace {

struct Size {
  int64_t order, power, blocks;
  bool circulant = false;  // the factor is 4 x 4 circulants
};
// Below, at and above the sixteen lanes; odd orders; tails; a row of many blocks; the smallest
// circulants that a kernel looks for, and those below.
constexpr Size kSizes[] = {
    {1, 1, 5},   {1, 2, 9},         {1, 4, 3},        {1, 8, 1},         {1, 16, 2},
    {1, 32, 1},  {1, 64, 3},        {1, 128, 1},      {1, 2048, 1},      {3, 1, 7},
    {12, 1, 1},  {12, 2, 3},        {7, 8, 2},        {36, 16, 1},       {28, 64, 1},
    {172, 4, 1}, {84, 16, 1, true}, {88, 8, 1, true}, {156, 1, 3, true}, {172, 32, 2, true}};
constexpr int64_t kRows = 3;
constexpr int64_t kGap = 5;  // elements between the rows

/// Entry (i, j) of Sylvester's matrix.
int sylvester(int64_t i, int64_t j) { return __builtin_popcountll(i & j) % 2 == 0 ? 1 : -1; }

std::vector<int8_t> random_signs(Random& random, int64_t count) {
  auto signs = random.integers<int8_t>(count, 0, 1);
  for (int8_t& sign : signs) sign = sign != 0 ? 1 : -1;
  return signs;
}

std::vector<int8_t> random_factor(Random& random, const Size& s) {
  auto signs = random_signs(random, s.order * s.order);
  const int64_t m = s.order / 4;
  for (int64_t b = 0; s.circulant && b < s.order; ++b) {
    for (int64_t a = 0; a < s.order; ++a) {
      const int64_t first = b / m * m, shifted = a / m * m + (a % m + m - b % m) % m;
      signs[size_t(b * s.order + a)] = signs[size_t(first * s.order + shifted)];
    }
  }
  return signs;
}

/// x [n] times (I (x) factor (x) Sylvester), in integers.
std::vector<int64_t> dense(const std::vector<int64_t>& x, const Size& s,
                           const std::vector<int8_t>& factor) {
  const int64_t size = s.order * s.power;
  std::vector<int64_t> out(x.size(), 0);
  for (int64_t block = 0; block < s.blocks; ++block) {
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j < size; ++j) {
        const int64_t a = i / s.power, b = j / s.power;
        const int entry =
            factor[static_cast<size_t>(a * s.order + b)] * sylvester(i % s.power, j % s.power);
        out[static_cast<size_t>(block * size + j)] +=
            x[static_cast<size_t>(block * size + i)] * entry;
      }
    }
  }
  return out;
}

TEST(hadamard_equals_the_dense_product_on_integers) {
  Random random(1);
  for (const Size& s : kSizes) {
    const int64_t n = s.order * s.power * s.blocks;
    auto factor = random_factor(random, s);
    if (s.order == 1) factor = {1};
    std::vector<std::vector<int64_t>> x, expected;
    for (int64_t r = 0; r < kRows; ++r) {
      x.push_back(random.integers<int64_t>(n, -3, 3));
      expected.push_back(dense(x.back(), s, factor));
    }
    const Guarded<int8_t> signs(factor);
    for (const DType dtype : kDTypes) {
      const int64_t stride = n + kGap, bytes = bytes_of(dtype);
      Guarded<uint8_t> in(((kRows - 1) * stride + n) * bytes, 0xff);  // NaN between the rows
      for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t i = 0; i < n; ++i) {
          to_bits(dtype, in.data(), r * stride + i, static_cast<float>(x[size_t(r)][size_t(i)]));
        }
      }
      Guarded<uint8_t> want(kRows * n * bytes);
      for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t i = 0; i < n; ++i) {
          to_bits(dtype, want.data(), r * n + i,
                  0.5f * static_cast<float>(expected[size_t(r)][size_t(i)]));
        }
      }
      for (const cpu::Isa isa : available_isas()) {
        for (const Executor& executor : {serial(), threaded(3)}) {
          Guarded<uint8_t> out(kRows * n * bytes, 0xee);
          const HadamardMatrix matrix{s.order * s.power, s.order,
                                      s.order == 1 ? nullptr : signs.data(), 0.5f};
          VARIANT(isa, hadamard)
          ({out.data(), {in.data(), dtype, kRows, n, stride}, matrix}, executor);
          // Compared as numbers: a sum of zero may have either sign.
          for (int64_t i = 0; i < kRows * n; ++i) {
            const float got = from_bits(dtype, out.data(), i),
                        wanted = from_bits(dtype, want.data(), i);
            CHECK(got == wanted, cpu::isa_name(isa), " K=", s.order, " 2^p=", s.power, " dtype ",
                  static_cast<int>(dtype), " element ", i, ": ", got, " for ", wanted);
          }
          out.check_poison();
          in.check_poison();
        }
      }
    }
  }
}

TEST(hadamard_twice_is_n_times_the_row) {
  Random random(2);
  const int64_t n = 1024;
  const Guarded<float> x(random.normals(n));
  Guarded<float> once(n), twice(n);
  const HadamardMatrix matrix{n, 1, nullptr, 1.0f / 32};
  cpu::hadamard({once.data(), {x.data(), DType::f32, 1, n, n}, matrix}, serial());
  cpu::hadamard({twice.data(), {once.data(), DType::f32, 1, n, n}, matrix}, serial());
  for (int64_t i = 0; i < n; ++i)
    CHECK(std::abs(twice[i] - x[i]) < 2e-6f, i, ": ", twice[i], " for ", x[i]);
}

TEST(hadamard_variants_agree_bit_by_bit) {
  Random random(3);
  for (const Size& s : kSizes) {
    const int64_t n = s.order * s.power * s.blocks;
    const Guarded<int8_t> signs(random_factor(random, s));
    const Guarded<float> x(random.normals(kRows * n));
    const HadamardMatrix matrix{s.order * s.power, s.order, s.order == 1 ? nullptr : signs.data(),
                                0.3f};
    Guarded<float> want(kRows * n);
    cpu::baseline::hadamard({want.data(), {x.data(), DType::f32, kRows, n, n}, matrix}, serial());
    for (const cpu::Isa isa : available_isas()) {
      Guarded<float> out(kRows * n);
      VARIANT(isa, hadamard)
      ({out.data(), {x.data(), DType::f32, kRows, n, n}, matrix}, serial());
      CHECK(std::memcmp(out.data(), want.data(), size_t(kRows * n) * sizeof(float)) == 0,
            cpu::isa_name(isa), " differs from baseline, K=", s.order, " 2^p=", s.power);
    }
  }
}

TEST(every_fp16_and_bf16_number_survives_a_round_trip) {
  // The identity transform converts to fp32 and back. A NaN stays a NaN.
  constexpr int64_t kPatterns = 1 << 16;
  Guarded<uint16_t> x(kPatterns);
  for (int64_t i = 0; i < kPatterns; ++i) x[i] = static_cast<uint16_t>(i);
  for (const DType dtype : {DType::f16, DType::bf16}) {
    for (const cpu::Isa isa : available_isas()) {
      Guarded<uint16_t> out(kPatterns);
      VARIANT(isa, hadamard)
      ({out.data(), {x.data(), dtype, 1, kPatterns, kPatterns}, {1, 1, nullptr, 1.0f}}, serial());
      for (int64_t i = 0; i < kPatterns; ++i) {
        const float before = from_bits(dtype, x.data(), i), after = from_bits(dtype, out.data(), i);
        const bool kept = std::isnan(before) ? std::isnan(after) : out[i] == x[i];
        CHECK(kept, cpu::isa_name(isa), " dtype ", static_cast<int>(dtype), ": ", x[i], " became ",
              out[i]);
      }
    }
  }
}

TEST(hadamard_of_no_rows_does_nothing) {
  cpu::hadamard({nullptr, {nullptr, DType::f32, 0, 64, 64}, {64, 1, nullptr, 1.0f}}, serial());
}

}  // namespace
}  // namespace quarot::testing
