// Hadamard transform of the rows of a matrix: out = scale * x * (I (x) H (x) I_inner), where (x) is
// the Kronecker product and H = H_K (x) H_2^p, H_2^p Sylvester's matrix and H_K a +-1 factor given
// as data.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace quarot {

/// Largest factor order that the project constructs (CONTRIBUTING.md); kernels size their tiles by
/// it.
inline constexpr int64_t kMaxFactorOrder = 172;

/// The matrix of a transform of `size` = factor_order * 2^p positions.
struct HadamardMatrix {
  int64_t size;          // 1 = identity
  int64_t factor_order;  // K <= kMaxFactorOrder; 1 = none
  const int8_t*
      factor;   // [K, K] of +-1, row-major, acting from the right of a row; null when K = 1
  float scale;  // 1 / sqrt(size) makes it orthonormal
};

struct HadamardArgs {
  void* out;  // [x.rows, x.n] contiguous, of x.dtype; must not overlap x
  Rows x;     // x.n is a multiple of matrix.size
  HadamardMatrix matrix;
};

namespace cpu {
void hadamard(const HadamardArgs& args, const Executor& executor);
}
namespace cuda {
void hadamard(const HadamardArgs& args, Stream stream);
}  // namespace cuda

}  // namespace quarot
