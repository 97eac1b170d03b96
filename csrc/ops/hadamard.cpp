// quarot::hadamard.
#include "kernels/hadamard.h"

#include "ops/checks.h"
#include "ops/transform_args.h"

namespace quarot::ops {
namespace {

/// x [..., n] -> the same shape and dtype, contiguous.
template <auto kernel>
Tensor hadamard(const Tensor& x, int64_t size, OptionalTensor factor, double scale) {
  const RowsOf in = rows_of(x, 1, "hadamard", "x");
  const MatrixOf m = matrix_of(size, factor, scale, in.rows.n, x, "hadamard", "size");
  Tensor out = new_tensor(x, sizes_of(x), x.scalar_type());
  if (x.numel() != 0) launch<kernel>(x, HadamardArgs{out.data_ptr(), in.rows, m.matrix});
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(quarot, CPU, m) {
  m.impl("hadamard", TORCH_BOX(&hadamard<&cpu::hadamard>));
}
#ifdef QUAROT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(quarot, CUDA, m) {
  m.impl("hadamard", TORCH_BOX(&hadamard<&cuda::hadamard>));
}
#endif

}  // namespace
}  // namespace quarot::ops
