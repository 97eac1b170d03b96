// Hadamard transform on the CPU: a row is converted to fp32 scratch, transformed there
// (transform.h), scaled and rounded once. Parallel over rows. Bound by memory for power-of-two
// sizes, by K additions an element otherwise.
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/transform.h"
#include "kernels/cpu/vec.h"
#include "kernels/hadamard.h"

namespace quarot::cpu::QUAROT_ISA {

namespace {

template <DType kDtype>
void hadamard_rows(const HadamardArgs& args, const Executor& executor) {
  const int64_t n = args.x.n;
  parallel_rows(
      executor, args.x.rows, n * args.matrix.factor_order, [&](int64_t begin, int64_t end) {
        const Transform transform(args.matrix);
        const Scratch row(n);
        const F32 scale = f32(args.matrix.scale);
        for (int64_t r = begin; r < end; ++r) {
          for (int64_t i = 0; i < n; i += kLanes) {
            store(row.data() + i, load_upto<kDtype>(args.x.data, r * args.x.row_stride + i,
                                                    r * args.x.row_stride + n));
          }
          transform(row.data(), n);
          for (int64_t i = 0; i < n; i += kLanes) {
            store_upto<kDtype>(args.out, r * n + i, r * n + n, load(row.data() + i) * scale);
          }
        }
      });
}

}  // namespace

void hadamard(const HadamardArgs& args, const Executor& executor) {
  switch (args.x.dtype) {
    case DType::f32:
      return hadamard_rows<DType::f32>(args, executor);
    case DType::f16:
      return hadamard_rows<DType::f16>(args, executor);
    case DType::bf16:
      return hadamard_rows<DType::bf16>(args, executor);
  }
  __builtin_unreachable();
}

}  // namespace quarot::cpu::QUAROT_ISA
