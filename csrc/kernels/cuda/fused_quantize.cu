// The fused quantizers on CUDA, head_hadamard_quantize apart (head_quantize.cu): one pass over
// memory, fp32 up to the code. Maths: kernels/fused_quantize.h and kernels/quantize.h.
//
// Layout and parallelisation: with a transform those of device/rows_transform.cuh's kernels;
// without one those of device/rows.cuh. Blocks that share a scale and rows of more than 32768
// columns: device/transform.cuh. What none takes (odd addresses, lengths, groups):
// device/any_transform.cuh.
//
// Bound: memory, each input element read once, each code written once.
#include <cuda_runtime.h>

#include "kernels/cuda/device/any_transform.cuh"
#include "kernels/cuda/device/fwht_sinks.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/rows.cuh"
#include "kernels/cuda/device/rows_transform.cuh"
#include "kernels/cuda/device/sinks.cuh"
#include "kernels/cuda/device/sources.cuh"
#include "kernels/cuda/device/transform.cuh"
#include "kernels/fused_quantize.h"

namespace quarot::cuda {
namespace {

/// quantize(source's rows of n * (I (x) H)).
template <class Source>
void transform_quantize(const Source& source, bool aligned, const HadamardMatrix& matrix,
                        int64_t rows, int64_t n, const QuantizedRows& out, Stream stream,
                        const char* op) {
  if (rows == 0) return;
  if (aligned && n > 0 && n % kChunk == 0 && groups_are_whole(out)) {
    if (matrix.size == 1 && matrix.scale == 1.0f && rows_fit(n, out)) {
      return launch_rows(source, rows, n, out, stream);
    }
    const FastDiv group_chunks(static_cast<int>(out.group / kChunk));
    const int row_groups = static_cast<int>(n / out.group);
    const QuantizeRows sink{out, group_chunks, row_groups};
    if (launch_rows_transform(matrix, rows, n, source, sink, row_groups, stream)) return;
    if (launch_transform<true>(matrix, rows, n, 1, source, QuantizeSink{{out, group_chunks}},
                               row_groups, stream))
      return;
  }
  launch_any(matrix, rows, n, 1, source, AnyQuantize{out}, stream, op);
}

template <DType kDtype>
void hadamard_rows(const HadamardQuantizeArgs& args, Stream stream) {
  const Rows& x = args.x;
  transform_quantize(RowSource<kDtype>{x.data, x.row_stride}, chunks_are_aligned(x), args.matrix,
                     x.rows, x.n, args.out, stream, "hadamard_quantize");
}

template <DType kDtype>
void glu_rows(const GluHadamardQuantizeArgs& args, Stream stream) {
  const Rows& x = args.gate_up;
  const int64_t n = x.n / 2;
  const GluSource<kDtype> source{x.data, x.row_stride, static_cast<int>(n), args.activation};
  const bool aligned = chunks_are_aligned(x) && n % kChunk == 0;
  transform_quantize(source, aligned, args.matrix, x.rows, n, args.out, stream,
                     "glu_hadamard_quantize");
}

template <DType kDtype, bool kWeighted, DType kWeight>
void rmsnorm_weighted(const RmsnormQuantizeArgs& args, Stream stream) {
  const Rows& x = args.x;
  const RmsnormSource<kDtype, kWeighted, kWeight> source{
      {x.data, x.row_stride}, args.weight, args.eps};
  const bool aligned = chunks_are_aligned(x) && reinterpret_cast<uintptr_t>(args.weight) % 16 == 0;
  if (aligned && rows_fit(x.n, args.out)) {
    return launch_rows(source, x.rows, x.n, args.out, stream);
  }
  launch_any(kNoTransform, x.rows, x.n, 1, source, AnyQuantize{args.out}, stream,
             "rmsnorm_quantize");
}

template <DType kDtype>
void rmsnorm_rows(const RmsnormQuantizeArgs& args, Stream stream) {
  if (args.x.rows == 0) return;
  if (args.weight == nullptr) return rmsnorm_weighted<kDtype, false, DType::f32>(args, stream);
  switch (args.weight_dtype) {
    case DType::f32:
      return rmsnorm_weighted<kDtype, true, DType::f32>(args, stream);
    case DType::f16:
      return rmsnorm_weighted<kDtype, true, DType::f16>(args, stream);
    case DType::bf16:
      return rmsnorm_weighted<kDtype, true, DType::bf16>(args, stream);
  }
  QUAROT_ASSERT(false, "rmsnorm_quantize: no such weight dtype");
}

}  // namespace

void hadamard_quantize(const HadamardQuantizeArgs& args, Stream stream) {
  switch (args.x.dtype) {
    case DType::f32:
      return hadamard_rows<DType::f32>(args, stream);
    case DType::f16:
      return hadamard_rows<DType::f16>(args, stream);
    case DType::bf16:
      return hadamard_rows<DType::bf16>(args, stream);
  }
  QUAROT_ASSERT(false, "hadamard_quantize: no such dtype");
}

void rmsnorm_quantize(const RmsnormQuantizeArgs& args, Stream stream) {
  switch (args.x.dtype) {
    case DType::f32:
      return rmsnorm_rows<DType::f32>(args, stream);
    case DType::f16:
      return rmsnorm_rows<DType::f16>(args, stream);
    case DType::bf16:
      return rmsnorm_rows<DType::bf16>(args, stream);
  }
  QUAROT_ASSERT(false, "rmsnorm_quantize: no such dtype");
}

void glu_hadamard_quantize(const GluHadamardQuantizeArgs& args, Stream stream) {
  switch (args.gate_up.dtype) {
    case DType::f32:
      return glu_rows<DType::f32>(args, stream);
    case DType::f16:
      return glu_rows<DType::f16>(args, stream);
    case DType::bf16:
      return glu_rows<DType::bf16>(args, stream);
  }
  QUAROT_ASSERT(false, "glu_hadamard_quantize: no such dtype");
}

}  // namespace quarot::cuda
