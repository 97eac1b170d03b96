// head_hadamard_quantize on CUDA. Maths: kernels/fused_quantize.h and kernels/quantize.h.
//
// Layout and parallelisation: device/transform.cuh, ending in QuantizeSink; without a transform
// device/rows.cuh; what neither takes (odd addresses, lengths, groups): device/any_transform.cuh.
//
// Bound: memory, each input element read once, each code written once.
#include <cuda_runtime.h>

#include "kernels/cuda/device/any_transform.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/rows.cuh"
#include "kernels/cuda/device/sinks.cuh"
#include "kernels/cuda/device/sources.cuh"
#include "kernels/cuda/device/transform.cuh"
#include "kernels/fused_quantize.h"

namespace quarot::cuda {
namespace {

template <DType kDtype>
void head_rows(const HeadHadamardQuantizeArgs& args, Stream stream) {
  const Rows& x = args.x;
  const QuantizedRows& out = args.out;
  const RowSource<kDtype> source{x.data, x.row_stride};
  if (x.rows == 0) return;
  if (chunks_are_aligned(x) && x.n > 0 && groups_are_whole(out)) {
    if (args.matrix.size == 1 && args.matrix.scale == 1.0f && rows_fit(x.n, out)) {
      return launch_rows(source, x.rows, x.n, out, stream);
    }
    const QuantizeSink sink{{out, FastDiv(static_cast<int>(out.group / kChunk))}};
    if (launch_transform<false>(args.matrix, x.rows, x.n, args.head_dim, source, sink,
                                x.n / out.group, stream)) {
      return;
    }
  }
  launch_any(args.matrix, x.rows, x.n, args.head_dim, source, AnyQuantize{out}, stream,
             "head_hadamard_quantize");
}

}  // namespace

void head_hadamard_quantize(const HeadHadamardQuantizeArgs& args, Stream stream) {
  switch (args.x.dtype) {
    case DType::f32:
      return head_rows<DType::f32>(args, stream);
    case DType::f16:
      return head_rows<DType::f16>(args, stream);
    case DType::bf16:
      return head_rows<DType::bf16>(args, stream);
  }
  QUAROT_ASSERT(false, "head_hadamard_quantize: no such dtype");
}

}  // namespace quarot::cuda
