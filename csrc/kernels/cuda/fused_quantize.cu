// The fused quantizers on CUDA, head_hadamard_quantize apart (head_quantize.cu): one pass over
// memory, fp32 up to the code. Maths: kernels/fused_quantize.h and kernels/quantize.h.
//
// Layout and parallelisation: with a transform those of device/transform.cuh, ending in
// QuantizeSink; without one those of device/rows.cuh. What neither takes (odd addresses, lengths,
// groups): device/any_transform.cuh.
//
// Bound: memory, each input element read once, each code written once.
#include <cuda_runtime.h>

#include "kernels/cuda/device/any_transform.cuh"
#include "kernels/cuda/device/fwht.cuh"
#include "kernels/cuda/device/fwht_sinks.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/rows.cuh"
#include "kernels/cuda/device/sinks.cuh"
#include "kernels/cuda/device/sources.cuh"
#include "kernels/cuda/device/transform.cuh"
#include "kernels/fused_quantize.h"

namespace quarot::cuda {
namespace {

/// quantize(source's rows of n * (I (x) H (x) I_inner)).
template <bool kColumns, class Source>
void transform_quantize(const Source& source, bool aligned, const HadamardMatrix& matrix,
                        int64_t rows, int64_t n, int64_t inner, const QuantizedRows& out,
                        Stream stream, const char* op) {
  if (rows == 0) return;
  if (aligned && n > 0 && n % kChunk == 0 && groups_are_whole(out)) {
    if (matrix.size == 1 && matrix.scale == 1.0f && rows_fit(n, out)) {
      return launch_rows(source, rows, n, out, stream);
    }
    if constexpr (kColumns) {
      const int row_groups = static_cast<int>(n / out.group);
      const QuantizeRows sink{out, FastDiv(static_cast<int>(out.group / kChunk)), row_groups};
      if (launch_fwht(matrix, rows, n, source, sink, row_groups, stream)) return;
    }
    const QuantizeSink sink{{out, FastDiv(static_cast<int>(out.group / kChunk))}};
    if (launch_transform<kColumns>(matrix, rows, n, inner, source, sink, n / out.group, stream))
      return;
  }
  launch_any(matrix, rows, n, inner, source, AnyQuantize{out}, stream, op);
}

template <bool kColumns, DType kDtype>
void hadamard_rows(const Rows& x, const HadamardMatrix& matrix, int64_t inner,
                   const QuantizedRows& out, Stream stream, const char* op) {
  const RowSource<kDtype> source{x.data, x.row_stride};
  transform_quantize<kColumns>(source, chunks_are_aligned(x), matrix, x.rows, x.n, inner, out,
                               stream, op);
}

template <bool kColumns>
void hadamard_any(const Rows& x, const HadamardMatrix& matrix, int64_t inner,
                  const QuantizedRows& out, Stream stream, const char* op) {
  switch (x.dtype) {
    case DType::f32:
      return hadamard_rows<kColumns, DType::f32>(x, matrix, inner, out, stream, op);
    case DType::f16:
      return hadamard_rows<kColumns, DType::f16>(x, matrix, inner, out, stream, op);
    case DType::bf16:
      return hadamard_rows<kColumns, DType::bf16>(x, matrix, inner, out, stream, op);
  }
  QUAROT_ASSERT(false, "no such dtype");
}

template <DType kDtype>
void glu_rows(const GluHadamardQuantizeArgs& args, Stream stream) {
  const Rows& x = args.gate_up;
  const int64_t n = x.n / 2;
  const GluSource<kDtype> source{x.data, x.row_stride, static_cast<int>(n), args.activation};
  const bool aligned = chunks_are_aligned(x) && n % kChunk == 0;
  transform_quantize<true>(source, aligned, args.matrix, x.rows, n, 1, args.out, stream,
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
  hadamard_any<true>(args.x, args.matrix, 1, args.out, stream, "hadamard_quantize");
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
