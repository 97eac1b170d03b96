// quarot::attention.
#include "kernels/attention.h"

#include "ops/cache_args.h"
#include "ops/checks.h"

namespace quarot::ops {
namespace {

constexpr const char* kOp = "attention";

/// The largest length; each must be in [0, capacity].
int64_t longest_of(const Tensor& lengths, int64_t batch, int64_t capacity) {
  int64_t longest = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = data<const int32_t>(lengths)[b];
    QUAROT_REQUIRE(length >= 0 && length <= capacity, kOp, "lengths[", b,
                   "] must be between 0 and the capacity ", capacity, "; got ", length);
    longest = length > longest ? length : longest;
  }
  return longest;
}

/// q [batch, seq, heads, head_dim] -> the same shape and dtype, contiguous.
Tensor attention(const Tensor& q, const Tensor& k_codes, const Tensor& k_scale,
                 const Tensor& k_zero, const Tensor& v_codes, const Tensor& v_scale,
                 const Tensor& v_zero, const Tensor& lengths, OptionalTensor mask, int64_t bits,
                 double scale) {
  const CacheShape shape = cache_shape(k_codes, bits, kOp, "k_codes");
  QUAROT_REQUIRE(q.dim() == 4, kOp, "q must be [batch, seq, heads, head_dim]; got ", describe(q));
  const int64_t batch = q.size(0), seq = q.size(1), heads = q.size(2), head_dim = q.size(3);
  QUAROT_REQUIRE(shape.batch == batch && shape.head_dim == head_dim, kOp, "k_codes must belong to ",
                 batch, " sequence(s) and head_dim ", head_dim, " as q ", describe(q),
                 " does; got ", describe(k_codes), " of ", bits, " bits");
  QUAROT_REQUIRE(shape.kv_heads > 0 && heads % shape.kv_heads == 0, kOp,
                 "q must have a multiple of the cache's ", shape.kv_heads, " heads; got ",
                 describe(q));
  const DType dtype = dtype_of(q.scalar_type(), kOp, "q");
  const Tensor queries = q.is_contiguous() ? q : torch::stable::contiguous(q);
  require_cache(k_codes, k_scale, k_zero, shape, bits, q, kOp, {"k_codes", "k_scale", "k_zero"});
  require_cache(v_codes, v_scale, v_zero, shape, bits, q, kOp, {"v_codes", "v_scale", "v_zero"});
  const Tensor filled = require_dense(lengths, ScalarType::Int, {batch}, q, kOp, "lengths", "q");
  const int64_t longest = longest_of(filled, batch, shape.capacity);

  if (mask.has_value()) {
    require_dtype(*mask, ScalarType::Bool, kOp, "mask");
    require_same_device(*mask, q, kOp, "mask", "q");
    QUAROT_REQUIRE(mask->dim() == 4 && mask->size(0) == batch &&
                       (mask->size(1) == 1 || mask->size(1) == heads) && mask->size(2) == seq &&
                       mask->size(3) >= longest,
                   kOp, "mask must be [", batch, ", 1 or ", heads, ", ", seq, ", at least ",
                   longest, "]; got ", describe(*mask));
    if (mask->stride(3) != 1) mask = torch::stable::contiguous(*mask);
  }
  Tensor out = new_tensor(q, {batch, seq, heads, head_dim}, q.scalar_type());
  if (q.numel() == 0) return out;
  const int64_t floats =
      cpu::attention_workspace(batch, seq, heads, shape.kv_heads, head_dim, longest);
  const Tensor workspace = new_tensor(q, {floats}, ScalarType::Float);
  AttentionArgs args{};
  args.out = out.data_ptr();
  args.workspace = data<float>(workspace);
  args.q = queries.data_ptr();
  args.k = {data<const uint8_t>(k_codes), data<const uint16_t>(k_scale),
            data<const uint8_t>(k_zero)};
  args.v = {data<const uint8_t>(v_codes), data<const uint16_t>(v_scale),
            data<const uint8_t>(v_zero)};
  args.lengths = data<const int32_t>(filled);
  if (mask.has_value()) {
    args.mask = data<const bool>(mask);
    args.mask_batch_stride = mask->stride(0);
    args.mask_head_stride = mask->size(1) == 1 ? 0 : mask->stride(1);
    args.mask_seq_stride = mask->stride(2);
  }
  args.dtype = dtype;
  args.batch = batch;
  args.seq = seq;
  args.heads = heads;
  args.kv_heads = shape.kv_heads;
  args.head_dim = head_dim;
  args.capacity = shape.capacity;
  args.bits = static_cast<int>(bits);
  args.scale = static_cast<float>(scale);
  launch<&cpu::attention>(q, args);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(quarot, CPU, m) { m.impl("attention", TORCH_BOX(&attention)); }

}  // namespace
}  // namespace quarot::ops
