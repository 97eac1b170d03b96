// Every operator's schema, namespace quarot. The implementations are in <family>.cpp, one kernel a
// device; shapes, dtypes and meaning stand in python/quarot/ops/__init__.py, whose wrappers are the
// public functions.
#include <torch/csrc/stable/library.h>

// clang-format off: it would break a schema inside an argument.
STABLE_TORCH_LIBRARY(quarot, m) {
  m.def("hadamard(Tensor x, int size, Tensor? factor, float scale) -> Tensor");

  m.def(
      "quantize(Tensor x, int bits, bool symmetric, float clip, int group, "
      "bool packed) -> (Tensor, Tensor, Tensor?)");
  m.def("dequantize(Tensor q, Tensor scale, Tensor? zero, ScalarType dtype) -> Tensor");
  m.def("pack_int4(Tensor q) -> Tensor");
  m.def("unpack_int4(Tensor packed) -> Tensor");
  m.def("clip_search(Tensor w, float norm, int group, Tensor? importance) -> Tensor");

  m.def(
      "hadamard_quantize(Tensor x, int size, Tensor? factor, float scale, int bits, "
      "bool symmetric, float clip, int group, bool packed) -> (Tensor, Tensor, Tensor?)");
  m.def(
      "rmsnorm_quantize(Tensor x, Tensor? weight, float eps, int bits, bool symmetric, "
      "float clip, int group, bool packed) -> (Tensor, Tensor, Tensor?)");
  m.def(
      "glu_hadamard_quantize(Tensor gate_up, str activation, int size, Tensor? factor, "
      "float scale, int bits, bool symmetric, float clip, int group, "
      "bool packed) -> (Tensor, Tensor, Tensor?)");
  m.def(
      "head_hadamard_quantize(Tensor x, int heads, Tensor? factor, float scale, int bits, "
      "bool symmetric, float clip, int group, bool packed) -> (Tensor, Tensor, Tensor?)");

  m.def(
      "linear_int4(Tensor x_q, Tensor x_scale, Tensor? x_zero, Tensor w, Tensor w_scale, "
      "Tensor? w_sum, Tensor? bias, Tensor? residual, ScalarType out_dtype) -> Tensor");
  m.def("prepack_int4(Tensor w_packed) -> Tensor");
  m.def("unprepack_int4(Tensor w, int n, int k) -> Tensor");

  m.def(
      "rope_hadamard_kv_append(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, "
      "Tensor(a!) k_codes, Tensor(b!) k_scale, Tensor(c!) k_zero, Tensor(d!) v_codes, "
      "Tensor(e!) v_scale, Tensor(f!) v_zero, Tensor start, int bits, int size, "
      "Tensor? factor, float k_clip, float v_clip, Tensor? block_table) -> Tensor");
  m.def(
      "attention(Tensor q, Tensor k_codes, Tensor k_scale, Tensor k_zero, Tensor v_codes, "
      "Tensor v_scale, Tensor v_zero, Tensor lengths, Tensor? mask, int bits, "
      "float scale, int? length, int? window, Tensor? block_table) -> Tensor");
}
// clang-format on
