// rope_hadamard_kv_append: what a layer does with a new token's query, key and value before
// attention.
//   q, k:  RoPE on the first `rotary` dimensions (rotate_half convention, the rest passes through),
//          x'[i] = x[i] * cos[i] + (i < R/2 ? -x[i + R/2] : x[i - R/2]) * sin[i],
//          then scale * x * H in blocks of matrix.size over the head dimension (hadamard.h);
//   q:     rounded once to its type and returned;
//   k, v:  quantized per token and head, written into the cache at start[b] ... start[b] + seq - 1.
// All of it in fp32. KV quantizer (bits b), x is about scale * (code - zero), codes unsigned:
//   lo = clip * min(x, 0), hi = clip * max(x, 0), top = 2^b - 1
//   scale = fp16(clamp((hi - lo) / top, 2^-14, 65504)), inv = 1 / scale
//   zero = clamp(rint(-lo * inv), 0, top), code = clamp(rint(x * inv) + zero, 0, top)
// A vector with a value that is not finite gets scale NaN, codes 0 and zero 0.
#pragma once

#include <cstdint>

#include "kernels/hadamard.h"
#include "kernels/types.h"

namespace quarot {

/// A cache in blocks of `size` tokens, for which batch and capacity of a cache's parts below become
/// blocks and size: tokens [i * size, (i + 1) * size) of sequence b stand in block table[b][i].
struct Pages {
  const int32_t* table;  // [batch, columns], or null: a sequence's tokens stand together
  int64_t columns;       // a sequence's capacity is columns * size
  int64_t blocks;
  int64_t size;
};
/// `size` is a multiple of this, so that kernels take so many tokens at a time.
inline constexpr int64_t kPageMultiple = 16;

/// Where a token's vectors stand: in slot `first` + head * `apart` of the cache's parts.
struct TokenPlace {
  int64_t first;  // or -1: the table names a block that there is not
  int64_t apart;
};
[[gnu::always_inline]] inline constexpr TokenPlace place_of(const Pages& pages, int64_t kv_heads,
                                                            int64_t capacity, int64_t b,
                                                            int64_t token) {
  if (pages.table == nullptr) return {b * kv_heads * capacity + token, capacity};
  // 32 bits: a division of 64 is slow on a GPU.
  const auto size = static_cast<uint32_t>(pages.size), at = static_cast<uint32_t>(token);
  const int64_t block = pages.table[b * pages.columns + at / size];
  if (block < 0 || block >= pages.blocks) return {-1, 0};
  return {block * kv_heads * pages.size + at % size, pages.size};
}

/// One of the two caches of a layer. All parts are contiguous.
struct KvCache {
  uint8_t* codes;   // [batch, kv_heads, capacity, head_dim * bits / 8]; 4 bits: even low
  uint16_t* scale;  // [batch, kv_heads, capacity] bits of fp16
  uint8_t* zero;    // [batch, kv_heads, capacity]
};

/// Vectors of [batch, seq, heads, head_dim]: the last dimension is dense, the other strides are
/// free (in elements), so that q, k and v may be parts of one buffer.
struct HeadVectors {
  const void* data;
  int64_t batch_stride;
  int64_t seq_stride;
  int64_t head_stride;
};

struct KvAppendArgs {
  void* q_out;  // [batch, seq, heads, head_dim] dtype, contiguous
  KvCache k_cache;
  KvCache v_cache;
  HeadVectors q;          // [batch, seq, heads, head_dim]
  HeadVectors k;          // [batch, seq, kv_heads, head_dim]
  HeadVectors v;          // [batch, seq, kv_heads, head_dim]
  const void* cos;        // [1 or batch, seq, rotary] rotary_dtype, contiguous
  const void* sin;        // [1 or batch, seq, rotary]
  const int32_t* start;   // [batch]
  HadamardMatrix matrix;  // of q and k; matrix.size divides head_dim, 1: none
  DType dtype;            // of q, k, v and q_out
  DType rotary_dtype;     // of cos and sin
  int64_t batch;
  int64_t seq;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;  // a multiple of 8, at most kMaxHeadDim
  int64_t capacity;
  int64_t rotary;               // even, at most head_dim
  int64_t rotary_batch_stride;  // of cos and sin, in elements; 0: the same for all sequences
  int bits;                     // 4 or 8
  float k_clip;
  float v_clip;
  Pages pages;
};

/// A head dimension's bound, so that a head fits a thread's scratch on every device.
inline constexpr int64_t kMaxHeadDim = 256;
/// Heads are read in whole 32-bit words of 4-bit codes.
inline constexpr int64_t kHeadDimMultiple = 8;

namespace cpu {

/// Throws unless the table names blocks that there are for tokens [begin, end) of sequence b.
void check_pages(const char* op, const Pages& pages, int64_t b, int64_t begin, int64_t end);

/// Throws before anything is written if a sequence would not fit: start[b] + seq > capacity.
void rope_hadamard_kv_append(const KvAppendArgs& args, const Executor& executor);

}  // namespace cpu
namespace cuda {

/// A sequence that would not fit is written as far as it fits, and nothing into blocks that there
/// are not: `start` and the block table are not read by the host.
void rope_hadamard_kv_append(const KvAppendArgs& args, Stream stream);

}  // namespace cuda
}  // namespace quarot
