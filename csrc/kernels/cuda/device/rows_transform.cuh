// Which kernel transforms rows: few ones fwht_few.cuh, powers of two of fp32 values
// fwht_butterfly.cuh, all others fwht.cuh.
#pragma once

#include "kernels/cuda/device/fwht.cuh"
#include "kernels/cuda/device/fwht_butterfly.cuh"
#include "kernels/cuda/device/fwht_few.cuh"

namespace quarot::cuda {

/// sink <- rows of source times H. slots: scales a row, or 0. Returns false where the shape needs
/// transform.cuh or any_transform.cuh.
template <class Source, class Sink>
bool launch_rows_transform(const HadamardMatrix& matrix, int64_t rows, int64_t n,
                           const Source& source, const Sink& sink, int slots, Stream stream) {
  if (launch_fwht_few(matrix, rows, n, source, sink, slots, stream)) return true;
  if constexpr (!Operand<Source>::kDirect) {
    if (launch_fwht_butterfly(matrix, rows, n, source, sink, slots, stream)) return true;
  }
  return launch_fwht(matrix, rows, n, source, sink, slots, stream);
}

}  // namespace quarot::cuda
