// quarot::rope_hadamard_kv_append.
#include "kernels/kv_cache.h"

#include "ops/cache_args.h"
#include "ops/checks.h"
#include "ops/transform_args.h"

namespace quarot::ops {
namespace {

constexpr const char* kOp = "rope_hadamard_kv_append";

/// A tensor [batch, seq, heads, head_dim] of the given shape and dtype, its last dimension dense
/// (else a copy).
Tensor require_heads(const Tensor& x, ScalarType dtype, const Sizes& sizes, const Tensor& like,
                     const char* arg) {
  require_dtype(x, dtype, kOp, arg);
  require_shape(x, sizes, kOp, arg);
  require_same_device(x, like, kOp, arg, "q");
  return x.stride(3) == 1 ? x : dense_copy(x);
}

HeadVectors heads_of(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

/// Writes k and v into the caches; returns the rotated q, [batch, seq, heads, head_dim],
/// contiguous.
template <auto kernel>
Tensor rope_hadamard_kv_append(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                               const Tensor& sin, const Tensor& k_codes, const Tensor& k_scale,
                               const Tensor& k_zero, const Tensor& v_codes, const Tensor& v_scale,
                               const Tensor& v_zero, const Tensor& start, int64_t bits,
                               int64_t size, OptionalTensor factor, double k_clip, double v_clip,
                               OptionalTensor block_table) {
  const CacheShape shape = cache_shape(k_codes, bits, kOp, "k_codes");
  QUAROT_REQUIRE(q.dim() == 4, kOp, "q must be [batch, seq, heads, head_dim]; got ", describe(q));
  const int64_t batch = q.size(0), seq = q.size(1), heads = q.size(2), head_dim = q.size(3);
  const Placement placement = placement_of(block_table, shape, batch, k_codes, bits, q, kOp);
  const DType dtype = dtype_of(q.scalar_type(), kOp, "q");
  const Sizes kv_sizes{batch, seq, shape.kv_heads, head_dim};
  const Tensor queries = require_heads(q, q.scalar_type(), {batch, seq, heads, head_dim}, q, "q");
  const Tensor keys = require_heads(k, q.scalar_type(), kv_sizes, q, "k");
  const Tensor values = require_heads(v, q.scalar_type(), kv_sizes, q, "v");
  require_cache(k_codes, k_scale, k_zero, shape, bits, q, kOp, {"k_codes", "k_scale", "k_zero"});
  require_cache(v_codes, v_scale, v_zero, shape, bits, q, kOp, {"v_codes", "v_scale", "v_zero"});

  QUAROT_REQUIRE(cos.dim() == 3 && (cos.size(0) == 1 || cos.size(0) == batch) &&
                     cos.size(1) == seq && cos.size(2) % 2 == 0 && cos.size(2) <= head_dim,
                 kOp, "cos must be [1 or ", batch, ", ", seq, ", even number of dimensions up to ",
                 head_dim, "]; got ", describe(cos));
  const DType rotary_dtype = dtype_of(cos.scalar_type(), kOp, "cos");
  const Tensor cosines = require_dense(cos, cos.scalar_type(), sizes_of(cos), q, kOp, "cos", "q");
  const Tensor sines = require_dense(sin, cos.scalar_type(), sizes_of(cos), q, kOp, "sin", "q");
  const Tensor first = require_dense(start, ScalarType::Int, {batch}, q, kOp, "start", "q");
  for (const auto& [clip, arg] : {std::pair{k_clip, "k_clip"}, {v_clip, "v_clip"}}) {
    QUAROT_REQUIRE(clip > 0 && clip <= 1, kOp, arg, " must be in (0, 1]; got ", clip);
  }
  const double scale = 1.0 / __builtin_sqrt(static_cast<double>(size));
  const MatrixOf matrix = matrix_of(size, factor, scale, head_dim, q, kOp, "size");

  Tensor out = new_tensor(q, {batch, seq, heads, head_dim}, q.scalar_type());
  if (batch == 0 || seq == 0) return out;
  launch<kernel>(
      q, KvAppendArgs{out.data_ptr(),
                      {data<uint8_t>(k_codes), data<uint16_t>(k_scale), data<uint8_t>(k_zero)},
                      {data<uint8_t>(v_codes), data<uint16_t>(v_scale), data<uint8_t>(v_zero)},
                      heads_of(queries),
                      heads_of(keys),
                      heads_of(values),
                      cosines.data_ptr(),
                      sines.data_ptr(),
                      data<const int32_t>(first),
                      matrix.matrix,
                      dtype,
                      rotary_dtype,
                      batch,
                      seq,
                      heads,
                      shape.kv_heads,
                      head_dim,
                      placement.capacity,
                      cos.size(2),
                      cos.size(0) == 1 ? 0 : seq * cos.size(2),
                      static_cast<int>(bits),
                      static_cast<float>(k_clip),
                      static_cast<float>(v_clip),
                      placement.pages});
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(quarot, CPU, m) {
  m.impl("rope_hadamard_kv_append",
         TORCH_BOX(&rope_hadamard_kv_append<&cpu::rope_hadamard_kv_append>));
}
#ifdef QUAROT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(quarot, CUDA, m) {
  m.impl("rope_hadamard_kv_append",
         TORCH_BOX(&rope_hadamard_kv_append<&cuda::rope_hadamard_kv_append>));
}
#endif

}  // namespace
}  // namespace quarot::ops
