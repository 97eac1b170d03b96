// quarot::attention: on CUDA few queries go to the kernel, many to attention_prefill.h. Above 150
// lines: fourteen arguments to check.
#include "kernels/attention.h"

#include <algorithm>

#include "ops/attention_prefill.h"
#include "ops/cache_args.h"
#include "ops/checks.h"

namespace quarot::ops {
namespace {

constexpr const char* kOp = "attention";

/// The largest length; each must be in [0, capacity], and `expected` where that is given.
int64_t longest_of(const Tensor& lengths, int64_t capacity, std::optional<int64_t> expected) {
  int64_t longest = 0;
  for (int64_t b = 0; b < lengths.size(0); ++b) {
    const int64_t length = data<const int32_t>(lengths)[b];
    QUAROT_REQUIRE(length >= 0 && length <= capacity, kOp, "lengths[", b,
                   "] must be between 0 and the capacity ", capacity, "; got ", length);
    QUAROT_REQUIRE(!expected.has_value() || length == *expected, kOp, "length must be that of all ",
                   "sequences, lengths[", b, "] = ", length, "; got ", expected.value_or(0));
    longest = length > longest ? length : longest;
  }
  return longest;
}

/// A call's arguments, checked; the tensors hold what `args` points to. Without out and workspace.
struct Call {
  AttentionArgs args{};
  Tensor queries, lengths;
  OptionalTensor mask, table;
  int64_t longest = 0;  // of lengths; on CUDA `length`, or 0: lengths are only on the device
};

Call checked(const Tensor& q, const Tensor& k_codes, const Tensor& k_scale, const Tensor& k_zero,
             const Tensor& v_codes, const Tensor& v_scale, const Tensor& v_zero,
             const Tensor& lengths, const OptionalTensor& mask, int64_t bits, double scale,
             std::optional<int64_t> length, std::optional<int64_t> window,
             const OptionalTensor& block_table) {
  const CacheShape shape = cache_shape(k_codes, bits, kOp, "k_codes");
  QUAROT_REQUIRE(q.dim() == 4, kOp, "q must be [batch, seq, heads, head_dim]; got ", describe(q));
  const int64_t batch = q.size(0), seq = q.size(1), heads = q.size(2), head_dim = q.size(3);
  const Placement placement = placement_of(block_table, shape, batch, k_codes, bits, q, kOp);
  QUAROT_REQUIRE(shape.kv_heads > 0 && heads % shape.kv_heads == 0, kOp,
                 "q must have a multiple of the cache's ", shape.kv_heads, " heads; got ",
                 describe(q));
  Call call;
  AttentionArgs& args = call.args;
  args.dtype = dtype_of(q.scalar_type(), kOp, "q");
  call.queries = q.is_contiguous() ? q : dense_copy(q);
  require_cache(k_codes, k_scale, k_zero, shape, bits, q, kOp, {"k_codes", "k_scale", "k_zero"});
  require_cache(v_codes, v_scale, v_zero, shape, bits, q, kOp, {"v_codes", "v_scale", "v_zero"});
  call.lengths = require_dense(lengths, ScalarType::Int, {batch}, q, kOp, "lengths", "q");
  QUAROT_REQUIRE(!length.has_value() || (*length >= 0 && *length <= placement.capacity), kOp,
                 "length must be between 0 and the capacity ", placement.capacity, "; got ",
                 length.value_or(0));
  QUAROT_REQUIRE(!window.has_value() || *window > 0, kOp, "window must be at least 1; got ",
                 window.value_or(0));
  // On CUDA the kernels bound what they read.
  call.longest =
      q.is_cuda() ? length.value_or(0) : longest_of(call.lengths, placement.capacity, length);

  if (mask.has_value()) {
    require_dtype(*mask, ScalarType::Bool, kOp, "mask");
    require_same_device(*mask, q, kOp, "mask", "q");
    QUAROT_REQUIRE(mask->dim() == 4 && mask->size(0) == batch &&
                       (mask->size(1) == 1 || mask->size(1) == heads) && mask->size(2) == seq &&
                       mask->size(3) >= call.longest,
                   kOp, "mask must be [", batch, ", 1 or ", heads, ", ", seq, ", at least ",
                   call.longest, "]; got ", describe(*mask));
    call.mask = mask->stride(3) == 1 ? *mask : dense_copy(*mask);
    args.mask = data<const bool>(call.mask);
    args.mask_keys = call.mask->size(3);
    args.mask_batch_stride = call.mask->stride(0);
    args.mask_head_stride = call.mask->size(1) == 1 ? 0 : call.mask->stride(1);
    args.mask_seq_stride = call.mask->stride(2);
  }
  args.q = call.queries.data_ptr();
  args.k = {data<const uint8_t>(k_codes), data<const uint16_t>(k_scale),
            data<const uint8_t>(k_zero)};
  args.v = {data<const uint8_t>(v_codes), data<const uint16_t>(v_scale),
            data<const uint8_t>(v_zero)};
  args.lengths = data<const int32_t>(call.lengths);
  args.batch = batch;
  args.seq = seq;
  args.heads = heads;
  args.kv_heads = shape.kv_heads;
  args.head_dim = head_dim;
  args.capacity = placement.capacity;
  args.bits = static_cast<int>(bits);
  args.scale = static_cast<float>(scale);
  args.window = std::min(window.value_or(kNoWindow), kNoWindow);
  args.pages = placement.pages;
  call.table = placement.table;
  return call;
}

/// Most queries a sequence that our kernels take where torch's attention is an alternative, which
/// needs keys and values, and mostly a mask, written out: ours reads the cache once for 16 rows of
/// queries on CUDA.
constexpr int64_t kDecodeQueries = 32;

Tensor new_out(const Tensor& q) { return new_tensor(q, sizes_of(q), q.scalar_type()); }

Tensor attention_cpu(const Tensor& q, const Tensor& k_codes, const Tensor& k_scale,
                     const Tensor& k_zero, const Tensor& v_codes, const Tensor& v_scale,
                     const Tensor& v_zero, const Tensor& lengths, OptionalTensor mask, int64_t bits,
                     double scale, std::optional<int64_t> length, std::optional<int64_t> window,
                     OptionalTensor block_table) {
  Call call = checked(q, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, lengths, mask, bits,
                      scale, length, window, block_table);
  AttentionArgs& args = call.args;
  const Tensor out = new_out(q);
  if (q.numel() == 0) return out;
  args.out = out.data_ptr();
  if (args.seq > kDecodeQueries && args.dtype == DType::bf16 && args.mask == nullptr &&
      length == args.seq && args.window >= args.seq && cpu::has_attention_prefill()) {
    launch<&cpu::attention_prefill>(q, args);
    return out;
  }
  // A tape runs at other lengths too.
  const int64_t floats =
      cpu::attention_workspace(args, Tape::current() == nullptr ? call.longest : args.capacity);
  const Tensor workspace = new_tensor(q, {floats}, ScalarType::Float);
  args.workspace = data<float>(workspace);
  launch<&cpu::attention>(q, args);
  return out;
}

#ifdef QUAROT_WITH_CUDA
constexpr uintptr_t kAlignment = 16;

bool is_aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.data_ptr()) % kAlignment == 0;
}

Tensor attention_cuda(const Tensor& q, const Tensor& k_codes, const Tensor& k_scale,
                      const Tensor& k_zero, const Tensor& v_codes, const Tensor& v_scale,
                      const Tensor& v_zero, const Tensor& lengths, OptionalTensor mask,
                      int64_t bits, double scale, std::optional<int64_t> length,
                      std::optional<int64_t> window, OptionalTensor block_table) {
  Call call = checked(q, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, lengths, mask, bits,
                      scale, length, window, block_table);
  AttentionArgs& args = call.args;
  if (q.numel() == 0) return new_out(q);
  for (const auto& [codes, arg] : {std::pair{&k_codes, "k_codes"}, {&v_codes, "v_codes"}}) {
    QUAROT_REQUIRE(is_aligned(*codes), kOp, arg, " must start at a multiple of ", kAlignment,
                   " bytes; got ", describe(*codes), " elsewhere");
  }
  if (args.seq > kDecodeQueries || !cuda::attention_has(args.head_dim)) {
    return Prefill(call.queries, args, length, scale).run();
  }
  if (!is_aligned(call.queries)) {
    call.queries = torch::stable::clone(call.queries);
    args.q = call.queries.data_ptr();
  }
  const CudaScope scope(q);
  const Tensor out = new_out(q);
  const Tensor workspace = new_tensor(q, {cuda::attention_workspace(args)}, ScalarType::Float);
  args.out = out.data_ptr();
  args.workspace = data<float>(workspace);
  cuda::attention(args, scope.stream());
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(quarot, CUDA, m) { m.impl("attention", TORCH_BOX(&attention_cuda)); }
#endif

STABLE_TORCH_LIBRARY_IMPL(quarot, CPU, m) { m.impl("attention", TORCH_BOX(&attention_cpu)); }

}  // namespace
}  // namespace quarot::ops
