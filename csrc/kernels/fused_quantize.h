// One pass over a row: something in fp32, a Hadamard transform, quantization. Nothing is rounded in
// between.
#pragma once

#include <cstdint>

#include "kernels/hadamard.h"
#include "kernels/quantize.h"
#include "kernels/types.h"

namespace quarot {

/// quantize(hadamard(x)).
struct HadamardQuantizeArgs {
  QuantizedRows out;
  Rows x;
  HadamardMatrix matrix;  // size divides x.n
};

/// quantize(x / sqrt(mean(x^2) + eps) * weight).
struct RmsnormQuantizeArgs {
  QuantizedRows out;
  Rows x;
  const void* weight;  // [x.n] of weight_dtype; null = ones
  DType weight_dtype;
  float eps;
};

/// The activation of a gated linear unit. silu(a) = a / (1 + e^-a); gelu is the exact one (erf),
/// gelu_tanh its approximation by tanh.
enum class Activation { silu, gelu, gelu_tanh };

/// quantize(hadamard(activation(gate) * up)).
struct GluHadamardQuantizeArgs {
  QuantizedRows out;
  Rows gate_up;  // n = 2 * columns: gate, then up
  Activation activation;
  HadamardMatrix matrix;  // size divides the columns
};

/// quantize(x * (H_heads (x) I_head_dim)) in blocks of matrix.size heads.
struct HeadHadamardQuantizeArgs {
  QuantizedRows out;
  Rows x;  // n = heads * head_dim
  int64_t head_dim;
  HadamardMatrix matrix;  // size divides the number of heads
};

namespace cpu {
void hadamard_quantize(const HadamardQuantizeArgs& args, const Executor& executor);
void rmsnorm_quantize(const RmsnormQuantizeArgs& args, const Executor& executor);
void glu_hadamard_quantize(const GluHadamardQuantizeArgs& args, const Executor& executor);
void head_hadamard_quantize(const HeadHadamardQuantizeArgs& args, const Executor& executor);
}  // namespace cpu

namespace cuda {
void hadamard_quantize(const HadamardQuantizeArgs& args, Stream stream);
void rmsnorm_quantize(const RmsnormQuantizeArgs& args, Stream stream);
void glu_hadamard_quantize(const GluHadamardQuantizeArgs& args, Stream stream);
void head_hadamard_quantize(const HeadHadamardQuantizeArgs& args, Stream stream);
}  // namespace cuda

}  // namespace quarot
