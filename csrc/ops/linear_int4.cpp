// quarot::linear_int4, quarot::prepack_int4, quarot::unprepack_int4. Above 150 lines: nine
// arguments to check.
#include "kernels/linear_int4.h"

#include "ops/checks.h"

namespace quarot::ops {
namespace {

constexpr const char* kOp = "linear_int4";

/// What differs between the devices.
struct Cpu {
  static constexpr auto kLinear = &cpu::linear_int4;
  static constexpr auto kPrepack = &cpu::prepack_int4;
  static constexpr auto kUnprepack = &cpu::unprepack_int4;
  static constexpr int64_t kKMax = cpu::kLinearInt4KMax;
  static constexpr int64_t kGroupMultiple = cpu::kLinearInt4GroupMultiple;
  static constexpr int64_t kPackedGroupMultiple = 1;  // packed x is refused
  static constexpr int64_t kAlignment = 1;            // of x and w, in bytes
  static Sizes prepacked_sizes(int64_t n, int64_t k) {
    return {ceil_div(n, cpu::kLinearInt4Channels), k / cpu::kLinearInt4Columns,
            cpu::kLinearInt4Channels * cpu::kLinearInt4WordBytes};
  }
  static bool reads_packed(const Tensor&) { return false; }
};
#ifdef QUAROT_WITH_CUDA
struct Cuda {
  static constexpr auto kLinear = &cuda::linear_int4;
  static constexpr auto kPrepack = &cuda::prepack_int4;
  static constexpr auto kUnprepack = &cuda::unprepack_int4;
  static constexpr int64_t kKMax = cuda::kLinearInt4KMax;
  static constexpr int64_t kGroupMultiple = cuda::kLinearInt4GroupMultiple;
  static constexpr int64_t kPackedGroupMultiple = cuda::kLinearInt4Columns;
  static constexpr int64_t kAlignment = 16;
  static Sizes prepacked_sizes(int64_t n, int64_t k) {
    return {ceil_div(n, cuda::kLinearInt4Channels), ceil_div(k, cuda::kLinearInt4Columns),
            cuda::kLinearInt4TileBytes};
  }
  static bool reads_packed(const Tensor& x) {
    const CudaScope scope(x);
    return cuda::linear_int4_reads_packed();
  }
};
#endif

template <class Device>
void require_k(int64_t k, const char* op, const char* arg, const Tensor& x) {
  QUAROT_REQUIRE(k > 0 && k % kLinearInt4KMultiple == 0 && k <= Device::kKMax, op, arg,
                 " must have a multiple of ", kLinearInt4KMultiple, " input channels, at most ",
                 Device::kKMax, "; got ", k, " in ", describe(x));
}

/// x itself, contiguous, or a copy where its memory begins off the kernel's alignment.
template <class Device>
Tensor aligned(const Tensor& x) {
  const auto address = reinterpret_cast<uintptr_t>(x.data_ptr());
  return address % Device::kAlignment == 0 ? x : off_tape(torch::stable::clone(x));
}

/// A floating-point tensor of the given shape beside x, or none; contiguous.
OptionalTensor require_addend(const OptionalTensor& t, const Sizes& sizes, const Tensor& x,
                              const char* arg) {
  if (!t.has_value()) return t;
  dtype_of(t->scalar_type(), kOp, arg);
  return require_dense(*t, t->scalar_type(), sizes, x, kOp, arg, "x_q");
}

/// x_q int8 [..., k] or packed uint8 [..., k / 2], w prepacked [n, k] -> [..., n] of out_dtype;
/// bias and residual of any floating-point dtype.
template <class Device>
Tensor linear_int4(const Tensor& x_q, const Tensor& x_scale, OptionalTensor x_zero, const Tensor& w,
                   const Tensor& w_scale, OptionalTensor w_sum, OptionalTensor bias,
                   OptionalTensor residual, ScalarType out_dtype) {
  const bool packed = x_q.scalar_type() == ScalarType::Byte;
  QUAROT_REQUIRE(
      !packed || Device::reads_packed(x_q), kOp,
      "x_q: packed codes (uint8) have no kernel on this device; needs int8 [..., k]; got ",
      describe(x_q));
  if (!packed) require_dtype(x_q, ScalarType::Char, kOp, "x_q");
  require_dim(x_q, 1, kOp, "x_q");
  Sizes lead = sizes_of(x_q);
  const int64_t k = packed ? lead.back() * kInt4PerByte : lead.back();
  lead.pop_back();
  require_k<Device>(k, kOp, "x_q", x_q);
  int64_t m = 1;
  for (const int64_t size : lead) m *= size;

  QUAROT_REQUIRE(w_scale.dim() == 2 && w_scale.size(0) >= 1 && w_scale.size(1) >= 1, kOp,
                 "w_scale must be [n, groups]; got ", describe(w_scale));
  const int64_t n = w_scale.size(0), groups = w_scale.size(1);
  QUAROT_REQUIRE(k % groups == 0 && k / groups % Device::kGroupMultiple == 0, kOp,
                 "w_scale: ", groups, " groups must divide k = ", k, " into multiples of ",
                 Device::kGroupMultiple, " columns; got ", describe(w_scale));
  QUAROT_REQUIRE(!packed || groups == 1 || k / groups % Device::kPackedGroupMultiple == 0, kOp,
                 "w_scale: with packed x_q, groups must have multiples of ",
                 Device::kPackedGroupMultiple, " columns; got ", describe(w_scale));
  QUAROT_REQUIRE(!x_zero.has_value() || w_sum.has_value(), kOp,
                 "w_sum must be int32 [n, groups] where x_zero is given; got None");

  const Tensor x = aligned<Device>(x_q.is_contiguous() ? x_q : dense_copy(x_q));
  const Tensor xs = require_dense(x_scale, ScalarType::Float, lead, x_q, kOp, "x_scale", "x_q");
  const Sizes w_sizes = Device::prepacked_sizes(n, k);
  QUAROT_REQUIRE(has_shape(w, w_sizes), kOp, "w must be prepack_int4 of codes [", n, ", ",
                 k / kInt4PerByte,
                 "] (the rows of w_scale, half of x_q's columns) on this device, "
                 "which has shape ",
                 text(w_sizes), "; got ", describe(w));
  const Tensor weight =
      aligned<Device>(require_dense(w, ScalarType::Byte, w_sizes, x_q, kOp, "w", "x_q"));
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
  launch<Device::kLinear>(
      x_q, LinearInt4Args{out.data_ptr(), data<const int8_t>(x), data<const float>(xs),
                          data<const int32_t>(x_zero), weight.data_ptr(), data<const float>(ws),
                          data<const int32_t>(w_sum), data<const char>(b), data<const char>(r),
                          type, dtype_or_f32(b, "bias"), dtype_or_f32(r, "residual"), m, n, k,
                          groups, packed});
  return out;
}

/// Canonical uint8 [n, k / 2] -> the device's layout (kernels/linear_int4.h).
template <class Device>
Tensor prepack_int4(const Tensor& w_packed) {
  constexpr const char* op = "prepack_int4";
  require_dtype(w_packed, ScalarType::Byte, op, "w_packed");
  QUAROT_REQUIRE(w_packed.dim() == 2 && w_packed.size(0) >= 1, op,
                 "w_packed must be [n, k / 2]; got ", describe(w_packed));
  const int64_t n = w_packed.size(0), k = w_packed.size(1) * kInt4PerByte;
  require_k<Device>(k, op, "w_packed", w_packed);
  const Tensor in = w_packed.is_contiguous() ? w_packed : dense_copy(w_packed);
  Tensor out = new_tensor(w_packed, Device::prepacked_sizes(n, k), ScalarType::Byte);
  launch<Device::kPrepack>(w_packed, data<uint8_t>(out), data<const uint8_t>(in), n, k);
  return out;
}

template <class Device>
Tensor unprepack_int4(const Tensor& w, int64_t n, int64_t k) {
  constexpr const char* op = "unprepack_int4";
  QUAROT_REQUIRE(n >= 1, op, "n must be at least 1; got ", n);
  require_k<Device>(k, op, "k", w);
  const Tensor in = aligned<Device>(
      require_dense(w, ScalarType::Byte, Device::prepacked_sizes(n, k), w, op, "w", "w"));
  Tensor out = new_tensor(w, {n, k / kInt4PerByte}, ScalarType::Byte);
  launch<Device::kUnprepack>(w, data<uint8_t>(out), data<const uint8_t>(in), n, k);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(quarot, CPU, m) {
  m.impl("linear_int4", TORCH_BOX(&linear_int4<Cpu>));
  m.impl("prepack_int4", TORCH_BOX(&prepack_int4<Cpu>));
  m.impl("unprepack_int4", TORCH_BOX(&unprepack_int4<Cpu>));
}
#ifdef QUAROT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(quarot, CUDA, m) {
  m.impl("linear_int4", TORCH_BOX(&linear_int4<Cuda>));
  m.impl("prepack_int4", TORCH_BOX(&prepack_int4<Cuda>));
  m.impl("unprepack_int4", TORCH_BOX(&unprepack_int4<Cuda>));
}
#endif

}  // namespace
}  // namespace quarot::ops
