// quarot::quantize, dequantize, pack_int4, unpack_int4.
#include "kernels/quantize.h"

#include "ops/checks.h"
#include "ops/quantized_out.h"

namespace quarot::ops {
namespace {

/// x [..., n] -> codes, scale [...] or [..., n / group], zero.
template <auto kernel>
QuantizedTensors quantize(const Tensor& x, int64_t bits, bool symmetric, double clip, int64_t group,
                          bool packed) {
  const RowsOf in = rows_of(x, 1, "quantize", "x");
  const QuantizedOut out = quantized_out(x, lead_of(x, 1), in.rows.n,
                                         {bits, symmetric, clip, group, packed}, "quantize");
  if (std::get<1>(out.tensors).numel() != 0) launch<kernel>(x, QuantizeArgs{out.rows, in.rows});
  return out.tensors;
}

/// q int8 [..., n] or packed uint8 [..., n / 2] -> [..., n] of dtype.
template <auto kernel>
Tensor dequantize(const Tensor& q, const Tensor& scale, OptionalTensor zero, ScalarType dtype) {
  constexpr const char* op = "dequantize";
  require_dim(q, 1, op, "q");
  const bool packed = q.scalar_type() == ScalarType::Byte;
  QUAROT_REQUIRE(packed || q.scalar_type() == ScalarType::Char, op,
                 "q must be int8, or uint8 where it is packed; got ", describe(q));
  const int64_t n = q.size(q.dim() - 1) * (packed ? kInt4PerByte : 1);
  Sizes sizes = lead_of(q, 1);
  const bool grouped = scale.dim() == q.dim();
  Sizes scale_sizes = sizes;
  int64_t group = n;
  if (grouped) {
    const int64_t groups = scale.size(scale.dim() - 1);
    QUAROT_REQUIRE(groups > 0 ? n % groups == 0 : n == 0, op, "scale's groups must divide the ", n,
                   " columns of q; got ", describe(scale));
    group = groups > 0 ? n / groups : 1;
    scale_sizes.push_back(groups);
  }
  const Tensor codes = q.is_contiguous() ? q : dense_copy(q);
  const Tensor s = require_dense(scale, ScalarType::Float, scale_sizes, q, op, "scale", "q");
  OptionalTensor z;
  if (zero.has_value()) z = require_dense(*zero, ScalarType::Int, scale_sizes, q, op, "zero", "q");
  const DType out_dtype = dtype_of(dtype, op, "dtype");
  sizes.push_back(n);
  Tensor out = new_tensor(q, sizes, dtype);
  if (out.numel() == 0) return out;
  launch<kernel>(q,
                 DequantizeArgs{out.data_ptr(), out_dtype, codes.data_ptr(), data<const float>(s),
                                data<const int32_t>(z), out.numel() / n, n, group, packed});
  return out;
}

/// int8 [..., n] -> uint8 [..., n / 2].
template <auto kernel>
Tensor pack_int4(const Tensor& q) {
  require_dim(q, 1, "pack_int4", "q");
  require_dtype(q, ScalarType::Char, "pack_int4", "q");
  const int64_t n = q.size(q.dim() - 1);
  QUAROT_REQUIRE(n % kInt4PerByte == 0, "pack_int4", "q must have an even last dimension; got ",
                 describe(q));
  const Tensor codes = q.is_contiguous() ? q : dense_copy(q);
  Sizes sizes = lead_of(q, 1);
  sizes.push_back(n / kInt4PerByte);
  Tensor out = new_tensor(q, sizes, ScalarType::Byte);
  if (q.numel() != 0)
    launch<kernel>(q, PackArgs{data<uint8_t>(out), data<int8_t>(codes), q.numel()});
  return out;
}

/// uint8 [..., n / 2] -> int8 [..., n].
template <auto kernel>
Tensor unpack_int4(const Tensor& packed) {
  require_dim(packed, 1, "unpack_int4", "packed");
  require_dtype(packed, ScalarType::Byte, "unpack_int4", "packed");
  const Tensor bytes = packed.is_contiguous() ? packed : dense_copy(packed);
  Sizes sizes = lead_of(packed, 1);
  sizes.push_back(packed.size(packed.dim() - 1) * kInt4PerByte);
  Tensor out = new_tensor(packed, sizes, ScalarType::Char);
  if (out.numel() != 0) {
    launch<kernel>(packed, PackArgs{data<uint8_t>(bytes), data<int8_t>(out), out.numel()});
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(quarot, CPU, m) {
  m.impl("quantize", TORCH_BOX(&quantize<&cpu::quantize>));
  m.impl("dequantize", TORCH_BOX(&dequantize<&cpu::dequantize>));
  m.impl("pack_int4", TORCH_BOX(&pack_int4<&cpu::pack_int4>));
  m.impl("unpack_int4", TORCH_BOX(&unpack_int4<&cpu::unpack_int4>));
}
#ifdef QUAROT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(quarot, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&quantize<&cuda::quantize>));
  m.impl("dequantize", TORCH_BOX(&dequantize<&cuda::dequantize>));
  m.impl("pack_int4", TORCH_BOX(&pack_int4<&cuda::pack_int4>));
  m.impl("unpack_int4", TORCH_BOX(&unpack_int4<&cuda::unpack_int4>));
}
#endif

}  // namespace
}  // namespace quarot::ops
