#include "kernels/attention.h"

#include "kernels/cpu/attention_split.h"
#include "kernels/cpu/isa.h"
#include "kernels/error.h"

namespace quarot::cpu {

QUAROT_DECLARE_VARIANTS(void attention(const AttentionArgs&, const AttentionSplit&,
                                       const Executor&))

AttentionSplit attention_split(const AttentionArgs& a, int64_t longest) {
  // Each sequence's keys lie within so many from its attention_begin.
  const int64_t in_window = a.seq - 1 + a.window + kAttentionKeys - 1;
  const int64_t span = longest < in_window ? longest : in_window;
  const int64_t rows = a.seq * (a.heads / a.kv_heads);
  const int64_t query_blocks = ceil_div(rows, kAttentionRows);
  if (query_blocks != 1 || a.batch * a.kv_heads >= kAttentionEnoughTasks)
    return {query_blocks, 1, span};
  int64_t keys = ceil_div(ceil_div(span, kAttentionMaxSplits), kAttentionKeys) * kAttentionKeys;
  keys = keys < kAttentionSplitKeys ? kAttentionSplitKeys : keys;
  return {1, span > keys ? ceil_div(span, keys) : 1, keys};
}

int64_t attention_workspace(const AttentionArgs& a, int64_t longest) {
  if (attention_split(a, longest).splits == 1) return 0;
  const int64_t splits = ceil_div(longest, kAttentionSplitKeys);
  const int64_t most = splits < kAttentionMaxSplits ? splits : kAttentionMaxSplits;
  return a.batch * a.seq * a.heads * most * attention_partial(a.head_dim);
}

void attention(const AttentionArgs& args, const Executor& executor) {
  QUAROT_ASSERT(args.bits == 4 || args.bits == 8, "attention: bits must be 4 or 8");
  QUAROT_ASSERT(args.head_dim % kHeadDimMultiple == 0 && args.head_dim <= kMaxHeadDim,
                "attention: head_dim must be a multiple of 8, at most 256");
  QUAROT_ASSERT(args.heads % args.kv_heads == 0, "attention: heads must be a multiple of kv_heads");
  int64_t longest = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    QUAROT_ASSERT(args.lengths[b] >= 0 && args.lengths[b] <= args.capacity,
                  "attention: lengths[b] must be in [0, capacity]");
    const int64_t first = args.lengths[b] - args.seq + 1 - args.window;  // of the first query
    check_pages("attention", args.pages, b, first < 0 ? 0 : first, args.lengths[b]);
    longest = args.lengths[b] > longest ? args.lengths[b] : longest;
  }
  const AttentionSplit split = attention_split(args, longest);
  QUAROT_ASSERT(split.splits == 1 || args.workspace != nullptr,
                "attention: the workspace is missing");
  static const auto kernel = QUAROT_PICK(attention);
  kernel(args, split, executor);
}

}  // namespace quarot::cpu
