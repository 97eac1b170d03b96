// quarot::hadamard_quantize, rmsnorm_quantize, glu_hadamard_quantize, head_hadamard_quantize.
#include "kernels/fused_quantize.h"

#include <string_view>

#include "ops/checks.h"
#include "ops/quantized_out.h"
#include "ops/transform_args.h"

namespace quarot::ops {
namespace {

/// x [..., n], transformed in blocks of `size`.
template <auto kernel>
QuantizedTensors hadamard_quantize(const Tensor& x, int64_t size, OptionalTensor factor,
                                   double scale, int64_t bits, bool symmetric, double clip,
                                   int64_t group, bool packed) {
  constexpr const char* op = "hadamard_quantize";
  const RowsOf in = rows_of(x, 1, op, "x");
  const MatrixOf m = matrix_of(size, factor, scale, in.rows.n, x, op, "size");
  const QuantizedOut out =
      quantized_out(x, lead_of(x, 1), in.rows.n, {bits, symmetric, clip, group, packed}, op);
  if (std::get<1>(out.tensors).numel() != 0) {
    launch<kernel>(x, HadamardQuantizeArgs{out.rows, in.rows, m.matrix});
  }
  return out.tensors;
}

/// x [..., n], weight [n] of any floating-point dtype.
template <auto kernel>
QuantizedTensors rmsnorm_quantize(const Tensor& x, OptionalTensor weight, double eps, int64_t bits,
                                  bool symmetric, double clip, int64_t group, bool packed) {
  constexpr const char* op = "rmsnorm_quantize";
  const RowsOf in = rows_of(x, 1, op, "x");
  OptionalTensor w;
  DType weight_dtype = DType::f32;
  if (weight.has_value()) {
    weight_dtype = dtype_of(weight->scalar_type(), op, "weight");
    w = require_dense(*weight, weight->scalar_type(), {in.rows.n}, x, op, "weight", "x");
  }
  const QuantizedOut out =
      quantized_out(x, lead_of(x, 1), in.rows.n, {bits, symmetric, clip, group, packed}, op);
  if (std::get<1>(out.tensors).numel() != 0) {
    launch<kernel>(x, RmsnormQuantizeArgs{out.rows, in.rows, w ? w->data_ptr() : nullptr,
                                          weight_dtype, static_cast<float>(eps)});
  }
  return out.tensors;
}

/// An owned `str` argument. Not std::string: the conversion in torch 2.11 to 2.13 leaks one a call.
class Text {
 public:
  explicit Text(StringHandle handle) : handle_(handle) {}
  ~Text() { torch_delete_string(handle_); }
  Text(const Text&) = delete;
  Text& operator=(const Text&) = delete;
  std::string_view view() const {
    const char* text = nullptr;
    size_t length = 0;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle_, &text));
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle_, &length));
    return {text, length};
  }

 private:
  StringHandle handle_;
};

Activation activation_of(std::string_view name, const char* op) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  fail("quarot::", op, ": activation must be silu, gelu or gelu_tanh; got '", name, "'");
}

/// gate_up [..., 2n], gate first -> rows of n.
template <auto kernel>
QuantizedTensors glu_hadamard_quantize(const Tensor& gate_up, StringHandle activation, int64_t size,
                                       OptionalTensor factor, double scale, int64_t bits,
                                       bool symmetric, double clip, int64_t group, bool packed) {
  constexpr const char* op = "glu_hadamard_quantize";
  const Activation act = activation_of(Text(activation).view(), op);
  const RowsOf in = rows_of(gate_up, 1, op, "gate_up");
  QUAROT_REQUIRE(in.rows.n % 2 == 0, op, "gate_up must have an even last dimension; got ",
                 describe(gate_up));
  const int64_t n = in.rows.n / 2;
  const MatrixOf m = matrix_of(size, factor, scale, n, gate_up, op, "size");
  const QuantizedOut out =
      quantized_out(gate_up, lead_of(gate_up, 1), n, {bits, symmetric, clip, group, packed}, op);
  if (std::get<1>(out.tensors).numel() != 0) {
    launch<kernel>(gate_up, GluHadamardQuantizeArgs{out.rows, in.rows, act, m.matrix});
  }
  return out.tensors;
}

/// x [..., heads, head_dim] -> rows of heads * head_dim, transformed across blocks of `heads`
/// heads.
template <auto kernel>
QuantizedTensors head_hadamard_quantize(const Tensor& x, int64_t heads, OptionalTensor factor,
                                        double scale, int64_t bits, bool symmetric, double clip,
                                        int64_t group, bool packed) {
  constexpr const char* op = "head_hadamard_quantize";
  const RowsOf in = rows_of(x, 2, op, "x");
  const MatrixOf m = matrix_of(heads, factor, scale, x.size(x.dim() - 2), x, op, "heads");
  const QuantizedOut out =
      quantized_out(x, lead_of(x, 2), in.rows.n, {bits, symmetric, clip, group, packed}, op);
  if (std::get<1>(out.tensors).numel() != 0) {
    launch<kernel>(x, HeadHadamardQuantizeArgs{out.rows, in.rows, x.size(x.dim() - 1), m.matrix});
  }
  return out.tensors;
}

STABLE_TORCH_LIBRARY_IMPL(quarot, CPU, m) {
  m.impl("hadamard_quantize", TORCH_BOX(&hadamard_quantize<&cpu::hadamard_quantize>));
  m.impl("rmsnorm_quantize", TORCH_BOX(&rmsnorm_quantize<&cpu::rmsnorm_quantize>));
  m.impl("glu_hadamard_quantize", TORCH_BOX(&glu_hadamard_quantize<&cpu::glu_hadamard_quantize>));
  m.impl("head_hadamard_quantize",
         TORCH_BOX(&head_hadamard_quantize<&cpu::head_hadamard_quantize>));
}
#ifdef QUAROT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(quarot, CUDA, m) {
  m.impl("hadamard_quantize", TORCH_BOX(&hadamard_quantize<&cuda::hadamard_quantize>));
  m.impl("rmsnorm_quantize", TORCH_BOX(&rmsnorm_quantize<&cuda::rmsnorm_quantize>));
  m.impl("glu_hadamard_quantize", TORCH_BOX(&glu_hadamard_quantize<&cuda::glu_hadamard_quantize>));
  m.impl("head_hadamard_quantize",
         TORCH_BOX(&head_hadamard_quantize<&cuda::head_hadamard_quantize>));
}
#endif

}  // namespace
}  // namespace quarot::ops
