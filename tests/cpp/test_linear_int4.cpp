// linear_int4 and the CPU's weight layout, against int64 and float arithmetic in the order of
// kernels/linear_int4.h: equal bit by bit in every ISA variant.
#include "kernels/linear_int4.h"
#include "testing.h"

namespace quarot::cpu {
QUAROT_DECLARE_VARIANTS(void linear_int4(const LinearInt4Args&, const Executor&))
QUAROT_DECLARE_VARIANTS(void prepack_int4(uint8_t*, const uint8_t*, int64_t, int64_t,
                                          const Executor&))
QUAROT_DECLARE_VARIANTS(void unprepack_int4(uint8_t*, const uint8_t*, int64_t, int64_t,
                                            const Executor&))
#if defined(QUAROT_WITH_AMX)
namespace amx {
void linear_int4(const LinearInt4Args&, const Executor&);
}
#endif
}  // namespace quarot::cpu

namespace quarot::testing {
namespace {

auto linear_variant(cpu::Isa isa) {
#if defined(QUAROT_WITH_AMX)
  if (isa == cpu::Isa::amx) return &cpu::amx::linear_int4;
#endif
  return VARIANT(isa, linear_int4);
}

/// Code (row, column) of canonical packed weights [n, k / 2].
int code_at(const std::vector<uint8_t>& packed, int64_t k, int64_t row, int64_t column) {
  const int byte = packed[static_cast<size_t>(row * (k / 2) + column / 2)];
  const int nibble = column % 2 == 0 ? byte & 15 : byte >> 4;
  return nibble < 8 ? nibble : nibble - 16;
}

int64_t prepacked_bytes(int64_t n, int64_t k) { return ceil_div(n, 16) * 16 * k / 2; }

struct Shape {
  int64_t m, n, k, groups;
};

/// A layer with random contents; `zero`, `bias`, `residual` say which of them it has.
struct Layer {
  Shape shape;
  DType dtype;
  std::vector<uint8_t> weights;
  Guarded<int8_t> x;
  Guarded<float> x_scale, w_scale;
  Guarded<int32_t> x_zero, w_sum;
  Guarded<uint8_t> bias, residual, w;
  bool zero, addends;

  Layer(const Shape& s, DType type, bool with_zero, bool with_addends, Random random)
      : shape(s),
        dtype(type),
        weights(random.integers<uint8_t>(s.n * s.k / 2, 0, 255)),
        x(random.integers<int8_t>(s.m * s.k, -128, 127)),
        x_scale(s.m),
        w_scale(s.n * s.groups),
        x_zero(random.integers<int32_t>(s.m, -128, 127)),
        w_sum(s.n * s.groups),
        bias(s.n * bytes_of(type)),
        residual(s.m * s.n * bytes_of(type)),
        w(prepacked_bytes(s.n, s.k)),
        zero(with_zero),
        addends(with_addends) {
    for (int64_t i = 0; i < s.m; ++i) x_scale[i] = random.uniform(0.001f, 0.1f);
    for (int64_t i = 0; i < s.n * s.groups; ++i) w_scale[i] = random.uniform(0.001f, 0.1f);
    for (int64_t i = 0; i < s.n; ++i) to_bits(type, bias.data(), i, random.normal());
    for (int64_t i = 0; i < s.m * s.n; ++i) to_bits(type, residual.data(), i, random.normal());
    for (int64_t j = 0; j < s.n; ++j) {
      for (int64_t c = 0; c < s.k; ++c) {
        w_sum[j * s.groups + c / (s.k / s.groups)] += code_at(weights, s.k, j, c);
      }
    }
    cpu::baseline::prepack_int4(w.data(), weights.data(), s.n, s.k, serial());
  }

  LinearInt4Args args(void* out) const {
    return {out,
            x.data(),
            x_scale.data(),
            zero ? x_zero.data() : nullptr,
            w.data(),
            w_scale.data(),
            w_sum.data(),
            addends ? bias.data() : nullptr,
            addends ? residual.data() : nullptr,
            dtype,
            dtype,
            dtype,
            shape.m,
            shape.n,
            shape.k,
            shape.groups};
  }

  /// Output (i, j) by the definition, before the rounding to the output's type.
  float expected(int64_t i, int64_t j) const {
    const int64_t width = shape.k / shape.groups;
    float y = 0;
    for (int64_t g = 0; g < shape.groups; ++g) {
      int64_t acc = 0;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        acc += int64_t{x[i * shape.k + c]} * code_at(weights, shape.k, j, c);
      }
      if (zero) acc -= int64_t{x_zero[i]} * w_sum[j * shape.groups + g];
      CHECK(acc == static_cast<int32_t>(acc));
      y = y + (static_cast<float>(acc) * x_scale[i]) * w_scale[j * shape.groups + g];
    }
    if (addends) {
      y = y + from_bits(dtype, bias.data(), j);
      y = y + from_bits(dtype, residual.data(), i * shape.n + j);
    }
    return y;
  }
};

TEST(linear_int4_equals_its_definition) {
  // Around the blocking: 2, 4, 6 and 12 rows in registers, 128 a block, 16 channels, 128 a chunk,
  // 1024 columns a segment, 32 a run; of tiles 32 rows, 512 a task, 32 channels, 512 columns.
  const Shape shapes[] = {
      {1, 1, 32, 1},     {1, 40, 64, 2},     {2, 16, 1056, 1},  {3, 17, 96, 12},
      {4, 18, 160, 4},   {5, 33, 576, 1},    {6, 33, 576, 1},   {7, 15, 512, 16},
      {13, 16, 96, 4},   {25, 5, 64, 1},     {71, 5, 64, 1},    {73, 130, 1056, 1},
      {144, 3, 1536, 3}, {145, 20, 320, 10}, {16, 33, 192, 1},  {31, 48, 2112, 1},
      {129, 40, 128, 2}, {545, 33, 64, 1},   {530, 17, 1152, 2}};
  for (const Shape& shape : shapes) {
    for (const DType dtype : kDTypes) {
      for (const bool extras : {false, true}) {
        const Layer layer(shape, dtype, extras, extras, Random(7));
        for (const cpu::Isa isa : available_isas()) {
          for (const Executor& executor : {serial(), threaded(3)}) {
            Guarded<uint8_t> out(shape.m * shape.n * bytes_of(dtype), 0xee);
            linear_variant(isa)(layer.args(out.data()), executor);
            out.check_poison();
            for (int64_t i = 0; i < shape.m; ++i) {
              for (int64_t j = 0; j < shape.n; ++j) {
                float want = 0;
                to_bits(dtype, &want, 0, layer.expected(i, j));
                const float got = from_bits(dtype, out.data(), i * shape.n + j);
                CHECK(got == from_bits(dtype, &want, 0), cpu::isa_name(isa), " m=", shape.m,
                      " n=", shape.n, " k=", shape.k, " at ", i, ",", j, ": ", got);
              }
            }
          }
        }
      }
    }
  }
}

TEST(linear_int4_is_exact_at_the_largest_sums) {
  constexpr int64_t k = 28672;  // the widest layer of a 70B model
  for (const int x_code : {-128, 127}) {
    for (const int w_code : {-8, 7}) {
      for (const int64_t m : {int64_t{1}, int64_t{7}}) {
        const std::vector<uint8_t> weights(17 * k / 2, static_cast<uint8_t>((w_code & 15) * 17));
        const std::vector<int8_t> x(static_cast<size_t>(m * k), static_cast<int8_t>(x_code));
        const std::vector<float> ones(static_cast<size_t>(std::max(m, int64_t{17})), 1.0f);
        const std::vector<int32_t> sums(17, static_cast<int32_t>(w_code * k));
        const std::vector<int32_t> zeros(static_cast<size_t>(m), -1 - x_code);
        std::vector<uint8_t> w(static_cast<size_t>(prepacked_bytes(17, k)));
        std::vector<float> out(static_cast<size_t>(m * 17));
        for (const cpu::Isa isa : available_isas()) {
          VARIANT(isa, prepack_int4)(w.data(), weights.data(), 17, k, serial());
          linear_variant(isa)(
              {out.data(), x.data(), ones.data(), zeros.data(), w.data(), ones.data(), sums.data(),
               nullptr, nullptr, DType::f32, DType::f32, DType::f32, m, 17, k, 1},
              serial());
          // x - zero = 2 x + 1, and fp32 rounds the exact sum once.
          const auto want = static_cast<float>(k * w_code * (2 * x_code + 1));
          for (const float y : out) CHECK(y == want, cpu::isa_name(isa), " ", y, " not ", want);
        }
      }
    }
  }
}

TEST(linear_int4_carries_nan_of_a_row_and_no_further) {
  Layer layer({9, 20, 64, 2}, DType::f32, false, false, Random(1));
  layer.x_scale[4] = std::nanf("");
  for (const cpu::Isa isa : available_isas()) {
    std::vector<float> out(9 * 20);
    linear_variant(isa)(layer.args(out.data()), serial());
    for (size_t i = 0; i < out.size(); ++i) CHECK(std::isnan(out[i]) == (i / 20 == 4));
  }
}

TEST(linear_int4_depends_neither_on_threads_nor_on_alignment) {
  for (const Shape& shape :
       {Shape{1, 200, 320, 1}, {4, 33, 96, 3}, {7, 100, 256, 1}, {150, 72, 1088, 1}}) {
    const Layer layer(shape, DType::bf16, true, true, Random(5));
    const auto bytes = static_cast<size_t>(shape.m * shape.n * 2);
    std::vector<uint8_t> expected(bytes);
    cpu::baseline::linear_int4(layer.args(expected.data()), serial());
    for (const cpu::Isa isa : available_isas()) {
      for (int threads = 1; threads <= 8; ++threads) {
        // Codes one byte and floats four bytes off what vectors would like.
        std::vector<int8_t> x(static_cast<size_t>(shape.m * shape.k) + 1);
        std::vector<uint8_t> w(static_cast<size_t>(prepacked_bytes(shape.n, shape.k)) + 1);
        std::vector<uint8_t> out(bytes + 2);
        std::memcpy(x.data() + 1, layer.x.data(), x.size() - 1);
        std::memcpy(w.data() + 1, layer.w.data(), w.size() - 1);
        LinearInt4Args args = layer.args(out.data() + 2);
        args.x = x.data() + 1;
        args.w = w.data() + 1;
        linear_variant(isa)(args, threaded(threads));
        CHECK(std::memcmp(out.data() + 2, expected.data(), bytes) == 0, cpu::isa_name(isa), " ",
              threads, " threads, m=", shape.m);
      }
    }
  }
}

TEST(linear_int4_may_write_over_its_residual) {
  Layer layer({61, 33, 64, 1}, DType::bf16, false, true, Random(2));
  std::vector<uint16_t> apart(61 * 33);
  cpu::linear_int4(layer.args(apart.data()), serial());
  cpu::linear_int4(layer.args(layer.residual.data()), serial());
  CHECK(std::memcmp(apart.data(), layer.residual.data(), apart.size() * 2) == 0);
}

TEST(prepack_int4_is_lossless_and_has_the_documented_layout) {
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{1, 32}, {16, 64}, {33, 576}}) {
    const std::vector<uint8_t> weights = Random(3).integers<uint8_t>(n * k / 2, 0, 255);
    for (const cpu::Isa isa : available_isas()) {
      Guarded<uint8_t> packed(prepacked_bytes(n, k), 0xee), back(n * k / 2, 0xee);
      VARIANT(isa, prepack_int4)(packed.data(), weights.data(), n, k, threaded(2));
      VARIANT(isa, unprepack_int4)(back.data(), packed.data(), n, k, threaded(2));
      packed.check_poison();
      back.check_poison();
      CHECK(back.values() == weights);
      for (int64_t channel = 0; channel < ceil_div(n, 16) * 16; ++channel) {
        for (int64_t column = 0; column < k; ++column) {
          // Byte b of the word holds columns b and 4 + b.
          const int64_t word = (channel / 16 * (k / 8) + column / 8) * 16 + channel % 16;
          const int nibble = packed[word * 4 + column % 4] >> (column % 8 / 4 * 4) & 15;
          CHECK(nibble == (channel < n ? code_at(weights, k, channel, column) + 8 : 0));
        }
      }
    }
  }
}

TEST(linear_int4_refuses_what_it_cannot_do) {
  Layer layer({1, 1, 64, 1}, DType::f32, true, false, Random(4));
  float out;
  LinearInt4Args args = layer.args(&out);
  args.k = 48;
  CHECK_THROWS(cpu::linear_int4(args, serial()), "multiple of 32");
  args = layer.args(&out);
  args.groups = 3;
  CHECK_THROWS(cpu::linear_int4(args, serial()), "groups");
  args = layer.args(&out);
  args.w_sum = nullptr;
  CHECK_THROWS(cpu::linear_int4(args, serial()), "w_sum");
}

}  // namespace
}  // namespace quarot::testing
