// attention: softmax(scale * q k^T + mask) v over the quantized cache of kv_cache.h, in fp32.
// Query s of the seq new ones is token p = lengths[b] - seq + s; it sees the keys j <= p, j > p -
// window, that the mask allows. A query that sees none gets zeros. Query head h reads the cache's
// head h / (heads / kv_heads).
#pragma once

#include <cstdint>

#include "kernels/kv_cache.h"
#include "kernels/types.h"

namespace quarot {

/// One of the two caches of a layer, for reading. All parts are contiguous.
struct KvCacheView {
  const uint8_t* codes;   // [batch, kv_heads, capacity, head_dim * bits / 8]
  const uint16_t* scale;  // [batch, kv_heads, capacity] bits of fp16
  const uint8_t* zero;    // [batch, kv_heads, capacity]
};

struct AttentionArgs {
  void* out;         // [batch, seq, heads, head_dim] dtype, contiguous
  float* workspace;  // attention_workspace(...) floats, or null where that is 0
  const void* q;     // [batch, seq, heads, head_dim] dtype, contiguous
  KvCacheView k;
  KvCacheView v;
  const int32_t* lengths;  // [batch] tokens in the cache with the new ones, in [0, capacity]
  const bool* mask;        // [batch, heads, seq, mask_keys >= max(lengths)] or null; true = may see
  int64_t mask_keys;
  int64_t mask_batch_stride;
  int64_t mask_head_stride;  // 0: the same for all heads
  int64_t mask_seq_stride;
  DType dtype;  // of q and out
  int64_t batch;
  int64_t seq;
  int64_t heads;  // a multiple of kv_heads
  int64_t kv_heads;
  int64_t head_dim;  // a multiple of 8, at most kMaxHeadDim
  int64_t capacity;
  int bits;        // 4 or 8
  float scale;     // of the scores, usually 1 / sqrt(head_dim)
  int64_t window;  // in [1, kNoWindow]
  Pages pages;
};
/// A window beyond any length, with which sums still fit 32 bits.
inline constexpr int64_t kNoWindow = int64_t{1} << 30;

/// Some tokens of some (sequence, cache head) pairs of a cache as 16- or 32-bit keys and values.
/// Tokens beyond a length become zeros. A broken token, one whose key or value has a scale that is
/// not finite: value 0 and key NaN, or both 0 where `broken` is there to say so.
struct DequantizeKvArgs {
  void* keys;           // [pairs, tokens, head_dim] dtype
  void* values;         // the same
  bool* broken;         // [pairs, tokens], or null
  int32_t* any_broken;  // [pairs], zeros before the call; null with `broken`
  KvCacheView k;
  KvCacheView v;
  const int32_t* lengths;  // [batch], or null: `length`
  DType dtype;
  int64_t length;
  int64_t first;  // pair: sequence * kv_heads + head
  int64_t pairs;
  int64_t tokens;
  int64_t start;  // the first one is token max(lengths[b] + start, 0) of the sequence
  int64_t kv_heads;
  int64_t head_dim;  // a multiple of 8
  int64_t capacity;
  int bits;
  Pages pages;
};

namespace cpu {

/// Floats of workspace that a call with lengths up to `longest` needs.
int64_t attention_workspace(const AttentionArgs& args, int64_t longest);

void attention(const AttentionArgs& args, const Executor& executor);

/// The same for bf16 prompts: lengths[b] = seq, no mask, window >= seq; no workspace. By tiles of
/// bf16, to which keys, values and weights are rounded, as torch's attention does.
void attention_prefill(const AttentionArgs& args, const Executor& executor);

/// Whether there is that: a matter of the processor, not of the variant in use, which shows in no
/// result.
bool has_attention_prefill();

}  // namespace cpu
namespace cuda {

/// Floats of workspace that a call needs; from shapes alone: lengths are not read by the host.
int64_t attention_workspace(const AttentionArgs& args);

/// Whether there is a kernel for a head dimension.
bool attention_has(int64_t head_dim);

/// For few queries a sequence: its work grows with seq. q, out and the codes are 16-byte aligned. A
/// length beyond the capacity counts as the capacity, a key beyond the mask as not seen.
void attention(const AttentionArgs& args, Stream stream);

// ---- Many queries: what torch's attention needs -------------------------------------------------

void dequantize_kv(const DequantizeKvArgs& args, Stream stream);

/// What each query sees, written out for some sequences, mask heads and queries.
struct VisibleArgs {
  bool* visible;           // [batch, heads, seq, keys]
  bool* any;               // [batch, heads, seq]: the query sees a key
  const int32_t* lengths;  // [batch], or null: `length`
  const bool* mask;        // [batch, heads, seq, mask_keys] or null
  int64_t mask_keys;
  int64_t mask_batch_stride;
  int64_t mask_head_stride;
  int64_t mask_seq_stride;
  int64_t length;
  int64_t batch;
  int64_t heads;  // of the mask; 1: the same for all
  int64_t seq;
  int64_t keys;
  int64_t start;   // key j is token max(lengths[b] + start, 0) + j
  int64_t offset;  // query s is token lengths[b] + offset + s
  int64_t window;
};
void visible_keys(const VisibleArgs& args, Stream stream);

/// Makes zeros of the queries of out [batch, seq, heads, head_dim] (with strides in elements, the
/// last dimension dense) that see no key, and NaN of those that see a broken one. heads: one of
/// each cache head's.
struct MendArgs {
  void* out;
  DType dtype;
  const bool* any;            // [batch, mask_heads, seq]
  const bool* visible;        // [batch, mask_heads, seq, keys]
  const bool* broken;         // [batch, heads, keys]
  const int32_t* any_broken;  // [batch, heads]
  int64_t mask_heads;
  int64_t keys;
  int64_t batch;
  int64_t seq;
  int64_t heads;
  int64_t head_dim;
  int64_t batch_stride;
  int64_t seq_stride;
  int64_t head_stride;
};
void mend_rows(const MendArgs& args, Stream stream);

}  // namespace cuda
}  // namespace quarot
