// The fused quantizers on the CPU. Each fills a row of fp32 scratch, transforms it in place
// (transform.h) and quantizes it from there (row_quantize.h). Parallel over rows. Bound by memory,
// or by the additions of a Hadamard factor.
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/row_quantize.h"
#include "kernels/cpu/transform.h"
#include "kernels/cpu/vec.h"
#include "kernels/fused_quantize.h"

namespace quarot::cpu::QUAROT_ISA {

namespace {

/// rows times: fill(r, row) writes row[0, n) as fp32; then transform over n / inner positions,
/// scale, quantize.
template <class Fill>
QUAROT_INLINE void fill_transform_quantize(int64_t rows, int64_t n, const HadamardMatrix& matrix,
                                           int64_t inner, const QuantizedRows& out,
                                           const Executor& executor, const Fill& fill) {
  parallel_rows(executor, rows, n * matrix.factor_order, [&](int64_t begin, int64_t end) {
    const Transform transform(matrix);
    const Scratch row(n);
    const CodeScratch codes(out.packed ? n : 0);
    const F32 scale = f32(matrix.scale);
    for (int64_t r = begin; r < end; ++r) {
      fill(r, row.data());
      transform(row.data(), n, inner);
      if (matrix.scale != 1.0f) {
        for (int64_t i = 0; i < n; i += kLanes) store(row.data() + i, load(row.data() + i) * scale);
      }
      quantize_row(row.data(), n, out, r, codes.data());
    }
  });
}

/// Columns whose squares a lane adds one after the other (32 of them), before the runs are added: a
/// shorter chain of roundings than one run over a long row.
constexpr int64_t kSquaresRun = 32 * kLanes;

constexpr HadamardMatrix kIdentity{1, 1, nullptr, 1.0f};

/// Loads row r of x, as it is.
template <DType kDtype>
QUAROT_INLINE void load_row(const Rows& x, int64_t r, float* row) {
  const int64_t first = r * x.row_stride;
  for (int64_t i = 0; i < x.n; i += kLanes) {
    store(row + i, load_upto<kDtype>(x.data, first + i, first + x.n));
  }
}

template <DType kDtype>
void hadamard_rows(const Rows& x, const HadamardMatrix& matrix, int64_t inner,
                   const QuantizedRows& out, const Executor& executor) {
  fill_transform_quantize(x.rows, x.n, matrix, inner, out, executor,
                          [&](int64_t r, float* row) { load_row<kDtype>(x, r, row); });
}

template <DType kDtype>
void rmsnorm_rows(const RmsnormQuantizeArgs& args, const Executor& executor) {
  const int64_t n = args.x.n;
  const Scratch weight(n);  // fp32, once for all rows
  const Rows weight_row{args.weight, args.weight_dtype, 1, n, n};
  if (args.weight != nullptr) {
    switch (args.weight_dtype) {
      case DType::f32:
        load_row<DType::f32>(weight_row, 0, weight.data());
        break;
      case DType::f16:
        load_row<DType::f16>(weight_row, 0, weight.data());
        break;
      case DType::bf16:
        load_row<DType::bf16>(weight_row, 0, weight.data());
        break;
    }
  }
  const auto fill = [&](int64_t r, float* row) {
    const int64_t first = r * args.x.row_stride;
    F32 squares = f32(0.0f);
    for (int64_t run = 0; run < n; run += kSquaresRun) {
      const int64_t last = run + kSquaresRun < n ? run + kSquaresRun : n;
      F32 part = f32(0.0f);
      for (int64_t i = run; i < last; i += kLanes) {
        const F32 v = load_upto<kDtype>(args.x.data, first + i, first + n);
        part = part + v * v;
        store(row + i, v);
      }
      squares = squares + part;
    }
    const float mean = reduce_add(squares) / static_cast<float>(n);
    const F32 inv = f32(1.0f / __builtin_sqrtf(mean + args.eps));
    for (int64_t i = 0; i < n; i += kLanes) {
      const F32 v = load(row + i) * inv;
      store(row + i, args.weight == nullptr ? v : v * load(weight.data() + i));
    }
  };
  fill_transform_quantize(args.x.rows, n, kIdentity, 1, args.out, executor, fill);
}

template <Activation kActivation>
QUAROT_INLINE F32 activate(const F32& a) {
  if constexpr (kActivation == Activation::silu) {
    return a / (f32(1.0f) + exp(-a));
  } else if constexpr (kActivation == Activation::gelu) {
    return f32(0.5f) * a * (f32(1.0f) + erf(a * f32(0x1.6a09e6p-1f)));  // 1 / sqrt(2)
  } else {
    // 0.5 * (1 + tanh(u)) = 1 / (1 + e^(-2u)), u = sqrt(2 / pi) * (a + 0.044715 a^3)
    const F32 u2 = f32(0x1.988454p+0f) * (a + f32(0.044715f) * a * a * a);
    return a / (f32(1.0f) + exp(-u2));
  }
}

template <DType kDtype, Activation kActivation>
void glu_rows(const GluHadamardQuantizeArgs& args, const Executor& executor) {
  const int64_t n = args.gate_up.n / 2;
  const auto fill = [&](int64_t r, float* row) {
    const int64_t gate = r * args.gate_up.row_stride, up = gate + n;
    for (int64_t i = 0; i < n; i += kLanes) {
      const F32 g = load_upto<kDtype>(args.gate_up.data, gate + i, gate + n);
      const F32 u = load_upto<kDtype>(args.gate_up.data, up + i, up + n);
      store(row + i, activate<kActivation>(g) * u);
    }
  };
  fill_transform_quantize(args.gate_up.rows, n, args.matrix, 1, args.out, executor, fill);
}

template <DType kDtype>
void glu(const GluHadamardQuantizeArgs& args, const Executor& executor) {
  switch (args.activation) {
    case Activation::silu:
      return glu_rows<kDtype, Activation::silu>(args, executor);
    case Activation::gelu:
      return glu_rows<kDtype, Activation::gelu>(args, executor);
    case Activation::gelu_tanh:
      return glu_rows<kDtype, Activation::gelu_tanh>(args, executor);
  }
  __builtin_unreachable();
}

void hadamard_any(const Rows& x, const HadamardMatrix& matrix, int64_t inner,
                  const QuantizedRows& out, const Executor& executor) {
  switch (x.dtype) {
    case DType::f32:
      return hadamard_rows<DType::f32>(x, matrix, inner, out, executor);
    case DType::f16:
      return hadamard_rows<DType::f16>(x, matrix, inner, out, executor);
    case DType::bf16:
      return hadamard_rows<DType::bf16>(x, matrix, inner, out, executor);
  }
  __builtin_unreachable();
}

}  // namespace

void hadamard_quantize(const HadamardQuantizeArgs& args, const Executor& executor) {
  hadamard_any(args.x, args.matrix, 1, args.out, executor);
}

void head_hadamard_quantize(const HeadHadamardQuantizeArgs& args, const Executor& executor) {
  hadamard_any(args.x, args.matrix, args.head_dim, args.out, executor);
}

void rmsnorm_quantize(const RmsnormQuantizeArgs& args, const Executor& executor) {
  switch (args.x.dtype) {
    case DType::f32:
      return rmsnorm_rows<DType::f32>(args, executor);
    case DType::f16:
      return rmsnorm_rows<DType::f16>(args, executor);
    case DType::bf16:
      return rmsnorm_rows<DType::bf16>(args, executor);
  }
  __builtin_unreachable();
}

void glu_hadamard_quantize(const GluHadamardQuantizeArgs& args, const Executor& executor) {
  switch (args.gate_up.dtype) {
    case DType::f32:
      return glu<DType::f32>(args, executor);
    case DType::f16:
      return glu<DType::f16>(args, executor);
    case DType::bf16:
      return glu<DType::bf16>(args, executor);
  }
  __builtin_unreachable();
}

}  // namespace quarot::cpu::QUAROT_ISA
