// attention: softmax(scale * q k^T + mask) v over the quantized cache of kv_cache.h, in fp32.
// Query s of the seq new ones sees the keys j <= lengths[b] - seq + s that the mask allows. A query
// that sees none gets zeros. Query head h reads the cache's head h / (heads / kv_heads).
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
  const bool* mask;        // [batch, heads, seq, >= max(lengths)] or null; true = may see
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
  int bits;     // 4 or 8
  float scale;  // of the scores, usually 1 / sqrt(head_dim)
};

namespace cpu {

/// Floats of workspace that a call needs. `longest` = max(lengths).
int64_t attention_workspace(int64_t batch, int64_t seq, int64_t heads, int64_t kv_heads,
                            int64_t head_dim, int64_t longest);

void attention(const AttentionArgs& args, const Executor& executor);

}  // namespace cpu
}  // namespace quarot
