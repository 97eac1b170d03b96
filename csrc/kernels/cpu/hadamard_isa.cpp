// Hadamard transform on the CPU: a row is converted to fp32 scratch, part by part transformed there
// by 2^p, then as a whole by the factor (transform.h), scaled and rounded once. Parallel over rows.
// Bound by memory for power-of-two sizes, by K / 4 additions an element otherwise.
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/transform.h"
#include "kernels/cpu/vec.h"
#include "kernels/hadamard.h"

namespace quarot::cpu::QUAROT_ISA {

namespace {

/// Entries of a row, or more, that are loaded and then transformed by 2^p; a power of two.
constexpr int64_t kPart = 1024;

/// Scales and rounds elements of a row into the output.
template <DType kDtype>
struct PutScaled {
  void* out;
  int64_t first;  // element of out where the row begins
  F32 scale;
  QUAROT_INLINE void operator()(int64_t at, int64_t end, const F32& value) const {
    store_upto<kDtype>(out, first + at, first + end, value * scale);
  }
};

template <DType kDtype>
void hadamard_rows(const HadamardArgs& args, const Executor& executor) {
  const int64_t n = args.x.n, work = n * args.matrix.factor_order;
  parallel_rows(executor, args.x.rows, work, [&](int64_t begin, int64_t last) {
    const Transform transform(args.matrix);
    const Scratch row(n);
    // Whole blocks of 2^p that stay in the L1 between being loaded and transformed.
    const int64_t step = ceil_div(kPart, transform.columns()) * transform.columns();
    for (int64_t r = begin; r < last; ++r) {
      const int64_t first = r * args.x.row_stride;
      for (int64_t part = 0; part < n; part += step) {
        const int64_t end = part + step < n ? part + step : n;
        for (int64_t i = part; i < end; i += kLanes) {
          store(row.data() + i, load_upto<kDtype>(args.x.data, first + i, first + n));
        }
        transform.power(row.data() + part, end - part);
      }
      const PutScaled<kDtype> put{args.out, r * n, f32(args.matrix.scale)};
      if (transform.has_factor()) {
        transform.factor(row.data(), n, 1, put);
      } else {
        for (int64_t i = 0; i < n; i += kLanes) put(i, n, load(row.data() + i));
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
