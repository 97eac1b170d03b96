// quarot::linear_int4, quarot::prepack_int4, quarot::unprepack_int4.
#include "kernels/linear_int4.h"

#include "ops/checks.h"

namespace quarot::ops {
namespace {

constexpr const char* kOp = "linear_int4";

/// Shape of prepacked weights on the CPU.
Sizes prepacked_sizes(int64_t n, int64_t k) {
  return {ceil_div(n, cpu::kLinearInt4Channels), k / cpu::kLinearInt4Columns,
          cpu::kLinearInt4Channels * cpu::kLinearInt4WordBytes};
}

void require_k(int64_t k, const char* op, const char* arg, const Tensor& x) {
  QUAROT_REQUIRE(k > 0 && k % kLinearInt4KMultiple == 0 && k <= kLinearInt4KMax, op, arg,
                 " must have a multiple of ", kLinearInt4KMultiple, " input channels, at most ",
                 kLinearInt4KMax, "; got ", k, " in ", describe(x));
}

/// A floating-point tensor of the given shape beside x, or none; contiguous.
OptionalTensor require_addend(const OptionalTensor& t, const Sizes& sizes, const Tensor& x,
                              const char* arg) {
  if (!t.has_value()) return t;
  dtype_of(t->scalar_type(), kOp, arg);
  return require_dense(*t, t->scalar_type(), sizes, x, kOp, arg, "x_q");
}

/// x_q int8 [..., k], w prepacked [n, k] -> [..., n] of out_dtype; bias and residual of any
/// floating-point dtype.
Tensor linear_int4(const Tensor& x_q, const Tensor& x_scale, OptionalTensor x_zero, const Tensor& w,
                   const Tensor& w_scale, OptionalTensor w_sum, OptionalTensor bias,
                   OptionalTensor residual, ScalarType out_dtype) {
  QUAROT_REQUIRE(x_q.scalar_type() != ScalarType::Byte, kOp,
                 "x_q: packed codes (uint8) have no kernel on the CPU; needs int8 [..., k]; got ",
                 describe(x_q));
  require_dtype(x_q, ScalarType::Char, kOp, "x_q");
  require_dim(x_q, 1, kOp, "x_q");
  Sizes lead = sizes_of(x_q);
  const int64_t k = lead.back();
  lead.pop_back();
  require_k(k, kOp, "x_q", x_q);
  int64_t m = 1;
  for (const int64_t size : lead) m *= size;

  QUAROT_REQUIRE(w_scale.dim() == 2 && w_scale.size(0) >= 1 && w_scale.size(1) >= 1, kOp,
                 "w_scale must be [n, groups]; got ", describe(w_scale));
  const int64_t n = w_scale.size(0), groups = w_scale.size(1);
  QUAROT_REQUIRE(k % groups == 0 && k / groups % kLinearInt4GroupMultiple == 0, kOp,
                 "w_scale: ", groups, " groups must divide k = ", k, " into multiples of ",
                 kLinearInt4GroupMultiple, " columns; got ", describe(w_scale));
  QUAROT_REQUIRE(!x_zero.has_value() || w_sum.has_value(), kOp,
                 "w_sum is needed where x_zero is given");

  const Tensor x = x_q.is_contiguous() ? x_q : torch::stable::contiguous(x_q);
  const Tensor xs = require_dense(x_scale, ScalarType::Float, lead, x_q, kOp, "x_scale", "x_q");
  QUAROT_REQUIRE(sizes_of(w) == prepacked_sizes(n, k), kOp, "w must be prepack_int4 of codes [", n,
                 ", ", k / kInt4PerByte, "], which has shape ", text(prepacked_sizes(n, k)),
                 "; got ", describe(w));
  const Tensor weight =
      require_dense(w, ScalarType::Byte, prepacked_sizes(n, k), x_q, kOp, "w", "x_q");
  const Tensor ws =
      require_dense(w_scale, ScalarType::Float, {n, groups}, x_q, kOp, "w_scale", "x_q");
  if (x_zero.has_value()) {
    x_zero = require_dense(*x_zero, ScalarType::Int, lead, x_q, kOp, "x_zero", "x_q");
    w_sum = require_dense(*w_sum, ScalarType::Int, {n, groups}, x_q, kOp, "w_sum", "x_q");
  }
  Sizes out_sizes = lead;
  out_sizes.push_back(n);
  const OptionalTensor b = require_addend(bias, {n}, x_q, "bias");
  const OptionalTensor r = require_addend(residual, out_sizes, x_q, "residual");
  const auto dtype_or_f32 = [](const OptionalTensor& t, const char* arg) {
    return t.has_value() ? dtype_of(t->scalar_type(), kOp, arg) : DType::f32;
  };
  const DType type = dtype_of(out_dtype, kOp, "out_dtype");
  Tensor out = new_tensor(x_q, out_sizes, out_dtype);
  if (m == 0) return out;
  launch<&cpu::linear_int4>(
      x_q,
      LinearInt4Args{out.data_ptr(), data<const int8_t>(x), data<const float>(xs),
                     data<const int32_t>(x_zero), weight.data_ptr(), data<const float>(ws),
                     data<const int32_t>(w_sum), data<const char>(b), data<const char>(r), type,
                     dtype_or_f32(b, "bias"), dtype_or_f32(r, "residual"), m, n, k, groups});
  return out;
}

/// Canonical uint8 [n, k / 2] -> the CPU's layout (kernels/linear_int4.h).
Tensor prepack_int4(const Tensor& w_packed) {
  constexpr const char* op = "prepack_int4";
  require_dtype(w_packed, ScalarType::Byte, op, "w_packed");
  QUAROT_REQUIRE(w_packed.dim() == 2 && w_packed.size(0) >= 1, op,
                 "w_packed must be [n, k / 2]; got ", describe(w_packed));
  const int64_t n = w_packed.size(0), k = w_packed.size(1) * kInt4PerByte;
  require_k(k, op, "w_packed", w_packed);
  const Tensor in = w_packed.is_contiguous() ? w_packed : torch::stable::contiguous(w_packed);
  Tensor out = new_tensor(w_packed, prepacked_sizes(n, k), ScalarType::Byte);
  launch<&cpu::prepack_int4>(w_packed, data<uint8_t>(out), data<const uint8_t>(in), n, k);
  return out;
}

Tensor unprepack_int4(const Tensor& w, int64_t n, int64_t k) {
  constexpr const char* op = "unprepack_int4";
  QUAROT_REQUIRE(n >= 1, op, "n must be at least 1; got ", n);
  require_k(k, op, "k", w);
  const Tensor in = require_dense(w, ScalarType::Byte, prepacked_sizes(n, k), w, op, "w", "w");
  Tensor out = new_tensor(w, {n, k / kInt4PerByte}, ScalarType::Byte);
  launch<&cpu::unprepack_int4>(w, data<uint8_t>(out), data<const uint8_t>(in), n, k);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(quarot, CPU, m) {
  m.impl("linear_int4", TORCH_BOX(&linear_int4));
  m.impl("prepack_int4", TORCH_BOX(&prepack_int4));
  m.impl("unprepack_int4", TORCH_BOX(&unprepack_int4));
}

}  // namespace
}  // namespace quarot::ops
