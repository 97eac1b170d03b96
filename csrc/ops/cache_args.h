// The quantized cache's tensors, as rope_hadamard_kv_append and attention take them.
#pragma once

#include "kernels/kv_cache.h"
#include "ops/checks.h"

namespace quarot::ops {

/// batch, kv_heads, capacity and head_dim of a cache; in a paged one blocks, and tokens of one.
struct CacheShape {
  int64_t batch, kv_heads, capacity, head_dim;
};

/// Checks codes uint8 [batch, kv_heads, capacity, head_dim * bits / 8] and reads their shape.
inline CacheShape cache_shape(const Tensor& codes, int64_t bits, const char* op, const char* arg) {
  QUAROT_REQUIRE(bits == 4 || bits == 8, op, "bits must be 4 or 8; got ", bits);
  require_dtype(codes, ScalarType::Byte, op, arg);
  QUAROT_REQUIRE(codes.dim() == 4, op, arg,
                 " must be [batch, kv_heads, capacity, head_dim * bits / 8]; got ",
                 describe(codes));
  const CacheShape shape{codes.size(0), codes.size(1), codes.size(2), codes.size(3) * 8 / bits};
  QUAROT_REQUIRE(
      shape.head_dim > 0 && shape.head_dim % kHeadDimMultiple == 0 && shape.head_dim <= kMaxHeadDim,
      op, arg, ": head_dim must be a multiple of ", kHeadDimMultiple, ", at most ", kMaxHeadDim,
      "; got ", shape.head_dim);
  return shape;
}

/// Where the tokens of each sequence stand.
struct Placement {
  OptionalTensor table;  // what `pages` points to
  Pages pages{};
  int64_t capacity;  // of a sequence
};

/// Checks block_table, int32 [batch, columns], whose entries the CPU's kernels check; without one
/// that the cache has `batch` sequences.
inline Placement placement_of(const OptionalTensor& table, const CacheShape& shape, int64_t batch,
                              const Tensor& codes, int64_t bits, const Tensor& q, const char* op) {
  QUAROT_REQUIRE((table.has_value() || shape.batch == batch) && shape.head_dim == q.size(3), op,
                 "k_codes must belong to ", batch, " sequence(s) and head_dim ", q.size(3),
                 " as q ", describe(q), " does; got ", describe(codes), " of ", bits, " bits");
  if (!table.has_value()) return {{}, {}, shape.capacity};
  require_dtype(*table, ScalarType::Int, op, "block_table");
  QUAROT_REQUIRE(table->dim() == 2 && table->size(0) == batch, op, "block_table must be [", batch,
                 ", blocks of a sequence]; got ", describe(*table));
  require_same_device(*table, q, op, "block_table", "q");
  QUAROT_REQUIRE(shape.capacity > 0 && shape.capacity % kPageMultiple == 0, op,
                 "k_codes: blocks must be of a multiple of ", kPageMultiple, " tokens; got ",
                 describe(codes));
  const Tensor dense = table->is_contiguous() ? *table : dense_copy(*table);
  const int64_t columns = table->size(1);
  return {dense,
          {data<const int32_t>(dense), columns, shape.batch, shape.capacity},
          columns * shape.capacity};
}

/// Checks one cache tensor. It is read or written in place, so it is never copied: it must be
/// contiguous.
inline void require_cache_part(const Tensor& x, ScalarType dtype, const Sizes& sizes,
                               const Tensor& like, const char* op, const char* arg) {
  require_dtype(x, dtype, op, arg);
  require_shape(x, sizes, op, arg);
  require_same_device(x, like, op, arg, "q");
  QUAROT_REQUIRE(x.is_contiguous(), op, arg, " must be contiguous; got ", describe(x),
                 " with other strides");
}

/// Checks codes, scale fp16 and zero uint8 of one cache; `args` are their names.
inline void require_cache(const Tensor& codes, const Tensor& scale, const Tensor& zero,
                          const CacheShape& shape, int64_t bits, const Tensor& like, const char* op,
                          const std::array<const char*, 3>& args) {
  const Sizes slots{shape.batch, shape.kv_heads, shape.capacity};
  require_cache_part(codes, ScalarType::Byte,
                     {shape.batch, shape.kv_heads, shape.capacity, shape.head_dim * bits / 8}, like,
                     op, args[0]);
  require_cache_part(scale, ScalarType::Half, slots, like, op, args[1]);
  require_cache_part(zero, ScalarType::Byte, slots, like, op, args[2]);
}

}  // namespace quarot::ops
