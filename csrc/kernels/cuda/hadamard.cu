// hadamard on CUDA: out = scale * x * (I (x) H (x) I).
//
// The maths, the layout and the parallelisation are in device/transform.cuh; here a transform block
// is a row of its own, so that rows of several blocks need no more memory.
//
// Bound: memory, each element read and written once.
#include <cuda_runtime.h>

#include "kernels/cuda/device/any_transform.cuh"
#include "kernels/cuda/device/fwht.cuh"
#include "kernels/cuda/device/fwht_sinks.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/sinks.cuh"
#include "kernels/cuda/device/sources.cuh"
#include "kernels/cuda/device/transform.cuh"
#include "kernels/hadamard.h"

namespace quarot::cuda {
namespace {

template <DType kDtype>
void hadamard_of(const HadamardArgs& args, Stream stream) {
  const RowSource<kDtype> source{args.x.data, args.x.row_stride};
  const bool aligned =
      chunks_are_aligned(args.x) && reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
  if (aligned && launch_fwht(args.matrix, args.x.rows, args.x.n, source,
                             StoreRows<kDtype>{args.out}, 0, stream))
    return;
  if (aligned && launch_transform<true>(args.matrix, args.x.rows, args.x.n, 1, source,
                                        StoreSink<kDtype>{args.out}, 0, stream))
    return;
  launch_any(args.matrix, args.x.rows, args.x.n, 1, source, AnyStore<kDtype>{args.out}, stream,
             "hadamard");
}

}  // namespace

void hadamard(const HadamardArgs& args, Stream stream) {
  QUAROT_ASSERT(args.matrix.size >= 1 && args.x.n % args.matrix.size == 0,
                "hadamard: size must divide the row");
  if (args.x.rows == 0 || args.x.n == 0) return;
  HadamardArgs a = args;
  if (a.x.row_stride == a.x.n || a.x.rows == 1) {  // dense: blocks follow each other
    a.x.rows *= a.x.n / a.matrix.size;
    a.x.n = a.x.row_stride = a.matrix.size;
  }
  switch (a.x.dtype) {
    case DType::f32:
      return hadamard_of<DType::f32>(a, stream);
    case DType::f16:
      return hadamard_of<DType::f16>(a, stream);
    case DType::bf16:
      return hadamard_of<DType::bf16>(a, stream);
  }
  QUAROT_ASSERT(false, "hadamard: no such dtype");
}

}  // namespace quarot::cuda
