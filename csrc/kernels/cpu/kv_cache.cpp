#include "kernels/kv_cache.h"

#include <stdexcept>
#include <string>

#include "kernels/cpu/isa.h"
#include "kernels/error.h"

namespace quarot::cpu {

QUAROT_DECLARE_VARIANTS(void rope_hadamard_kv_append(const KvAppendArgs&, const Executor&))

void check_pages(const char* op, const Pages& pages, int64_t b, int64_t begin, int64_t end) {
  if (pages.table == nullptr || begin >= end) return;
  for (int64_t i = begin / pages.size; i * pages.size < end; ++i) {
    const int64_t block = pages.table[b * pages.columns + i];
    if (block >= 0 && block < pages.blocks) continue;
    throw std::runtime_error("quarot::" + std::string(op) + ": block_table[" + std::to_string(b) +
                             ", " + std::to_string(i) + "] must be a block between 0 and " +
                             std::to_string(pages.blocks - 1) + "; got " + std::to_string(block));
  }
}

void rope_hadamard_kv_append(const KvAppendArgs& args, const Executor& executor) {
  QUAROT_ASSERT(args.bits == 4 || args.bits == 8, "rope_hadamard_kv_append: bits must be 4 or 8");
  QUAROT_ASSERT(args.head_dim % kHeadDimMultiple == 0 && args.head_dim <= kMaxHeadDim,
                "rope_hadamard_kv_append: head_dim must be a multiple of 8, at most 256");
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t start = args.start[b];
    if (start < 0 || start + args.seq > args.capacity) {  // the caller's: without file and line
      throw std::runtime_error("quarot::rope_hadamard_kv_append: start[" + std::to_string(b) +
                               "] is " + std::to_string(start) + "; " + std::to_string(args.seq) +
                               " token(s) from there do not fit a cache of capacity " +
                               std::to_string(args.capacity));
    }
    check_pages("rope_hadamard_kv_append", args.pages, b, start, start + args.seq);
  }
  static const auto kernel = QUAROT_PICK(rope_hadamard_kv_append);
  kernel(args, executor);
}

}  // namespace quarot::cpu
