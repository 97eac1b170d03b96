// How the CPU's attention divides its work: by shapes and lengths alone, never by the number of
// threads, so that its result is the same with any.
#pragma once

#include <cstdint>

#include "kernels/attention.h"

namespace quarot::cpu {

/// Query rows (seq x query heads of one cache head) of a task.
inline constexpr int64_t kAttentionRows = 64;
/// Keys that are dequantized at a time.
inline constexpr int64_t kAttentionKeys = 64;
/// Fewest keys that are worth a task of their own.
inline constexpr int64_t kAttentionSplitKeys = 512;
/// Bounds the workspace.
inline constexpr int64_t kAttentionMaxSplits = 32;
/// With so many (sequence, cache head) pairs every thread has work without splitting.
inline constexpr int64_t kAttentionEnoughTasks = 64;

/// Blocks of query rows or, where there is one block (decode), splits of the sequence.
struct AttentionSplit {
  int64_t query_blocks;
  int64_t splits;
  int64_t keys;  // of a split, a multiple of kAttentionKeys unless splits is 1
};

/// The first key that a call looks at: that of the first query's window, in whole tiles.
[[gnu::always_inline]] inline int64_t attention_begin(const AttentionArgs& a, int64_t length) {
  const int64_t first = length - a.seq + 1 - a.window;
  return first < 0 ? 0 : first / kAttentionKeys * kAttentionKeys;
}

/// The division of a call whose longest sequence has `longest` keys.
AttentionSplit attention_split(const AttentionArgs& args, int64_t longest);

/// Floats of a partial result: its unnormalised output, the scores' maximum and the sum of
/// exponentials.
inline constexpr int64_t attention_partial(int64_t head_dim) { return head_dim + 2; }

}  // namespace quarot::cpu
