// The arguments (size, factor, scale) that every op with a Hadamard transform takes.
#pragma once

#include "kernels/hadamard.h"
#include "ops/checks.h"

namespace quarot::ops {

/// A checked matrix, and the tensor that holds its factor.
struct MatrixOf {
  OptionalTensor memory;
  HadamardMatrix matrix;
};

/// Checks a transform of `positions` positions (the last dim, or the heads) in blocks of `size`.
inline MatrixOf matrix_of(int64_t size, const OptionalTensor& factor, double scale,
                          int64_t positions, const Tensor& x, const char* op,
                          const char* size_arg) {
  QUAROT_REQUIRE(size >= 1, op, size_arg, " must be at least 1; got ", size);
  QUAROT_REQUIRE(positions % size == 0, op, size_arg, " must divide ", positions,
                 ", the transformed dimension of ", describe(x), "; got ", size);
  int64_t order = 1;
  OptionalTensor memory;
  if (factor.has_value()) {
    QUAROT_REQUIRE(factor->dim() == 2 && factor->size(0) == factor->size(1) && factor->size(0) >= 1,
                   op, "factor must be a square matrix; got ", describe(*factor));
    order = factor->size(0);
    QUAROT_REQUIRE(order <= kMaxFactorOrder, op, "factor must have at most ", kMaxFactorOrder,
                   " rows; got ", describe(*factor));
    memory = require_dense(*factor, ScalarType::Char, {order, order}, x, op, "factor", "x");
    if (Tape* tape = Tape::current(); tape != nullptr) {
      tape->hold(std::make_shared<Tensor>(*memory));  // of a cache that may let go of it
    }
  }
  const int64_t power = size / order;
  QUAROT_REQUIRE(power * order == size && (power & (power - 1)) == 0 && power >= 1, op, size_arg,
                 " must be a power of two times the factor's order (", order, "); got ", size);
  return {
      memory,
      {size, order, order == 1 ? nullptr : data<const int8_t>(memory), static_cast<float>(scale)}};
}

}  // namespace quarot::ops
