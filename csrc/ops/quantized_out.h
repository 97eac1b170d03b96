// The result of every op that quantizes: codes, scale, zero.
#pragma once

#include <tuple>

#include "kernels/quantize.h"
#include "ops/checks.h"

namespace quarot::ops {

using QuantizedTensors = std::tuple<Tensor, Tensor, OptionalTensor>;

/// The arguments (bits, symmetric, clip, group, packed) as the caller gave them.
struct QuantizeOptions {
  int64_t bits;
  bool symmetric;
  double clip;
  int64_t group;
  bool packed;
};

/// Allocated outputs and the kernel's view of them.
struct QuantizedOut {
  QuantizedTensors tensors;
  QuantizedRows rows;
};

/// Checks the options for rows of n and allocates outputs of shape [lead..., n] on x's device.
inline QuantizedOut quantized_out(const Tensor& x, Sizes lead, int64_t n, const QuantizeOptions& o,
                                  const char* op) {
  QUAROT_REQUIRE(o.bits == 4 || o.bits == 8, op, "bits must be 4 or 8; got ", o.bits);
  QUAROT_REQUIRE(o.clip > 0.0 && o.clip <= 1.0, op, "clip must be in (0, 1]; got ", o.clip);
  QUAROT_REQUIRE(o.group == 0 || (o.group > 0 && n % o.group == 0), op,
                 "group must be 0 or divide ", n, ", the columns of a row; got ", o.group);
  QUAROT_REQUIRE(!o.packed || (o.bits == 4 && n % kInt4PerByte == 0), op,
                 "packed needs bits = 4 and an even number of columns; got bits = ", o.bits,
                 " and ", n, " columns");
  Sizes scale_sizes = lead;
  if (o.group > 0) scale_sizes.push_back(n / o.group);
  lead.push_back(o.packed ? n / kInt4PerByte : n);

  Tensor codes = new_tensor(x, lead, o.packed ? ScalarType::Byte : ScalarType::Char);
  Tensor scale = new_tensor(x, scale_sizes, ScalarType::Float);
  OptionalTensor zero;
  if (!o.symmetric) zero = new_tensor(x, scale_sizes, ScalarType::Int);
  const QuantizedRows rows{codes.data_ptr(),          data<float>(scale),       data<int32_t>(zero),
                           o.group > 0 ? o.group : n, static_cast<int>(o.bits), o.packed,
                           static_cast<float>(o.clip)};
  return {{codes, scale, zero}, rows};
}

/// The sizes of x without its last `dims`.
inline Sizes lead_of(const Tensor& x, int64_t dims) {
  Sizes sizes = sizes_of(x);
  sizes.resize(sizes.size() - static_cast<size_t>(dims));
  return sizes;
}

}  // namespace quarot::ops
