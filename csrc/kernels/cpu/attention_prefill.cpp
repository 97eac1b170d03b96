#include "kernels/attention.h"
#include "kernels/cpu/isa.h"
#include "kernels/error.h"

namespace quarot::cpu {

#if defined(QUAROT_WITH_AMX)
namespace amx {
void attention_prefill(const AttentionArgs&, const Executor&);
}
#endif

bool has_attention_prefill() {
  static const bool tiles = isa_available(Isa::amx);
  return tiles;
}

void attention_prefill([[maybe_unused]] const AttentionArgs& args,
                       [[maybe_unused]] const Executor& executor) {
  QUAROT_ASSERT(has_attention_prefill(), "attention_prefill: the processor has no tiles");
  QUAROT_ASSERT(args.bits == 4 || args.bits == 8, "attention_prefill: bits must be 4 or 8");
  QUAROT_ASSERT(args.head_dim % kHeadDimMultiple == 0 && args.heads % args.kv_heads == 0,
                "attention_prefill: head_dim must be a multiple of 8, heads of kv_heads");
  QUAROT_ASSERT(
      args.dtype == DType::bf16 && args.mask == nullptr && args.window >= args.seq,
      "attention_prefill: takes bf16 queries, no mask and no window that is less than seq");
  for (int64_t b = 0; b < args.batch; ++b) {
    QUAROT_ASSERT(args.lengths[b] == args.seq, "attention_prefill: lengths[b] must be seq");
    check_pages("attention", args.pages, b, 0, args.seq);
  }
#if defined(QUAROT_WITH_AMX)
  amx::attention_prefill(args, executor);
#endif
}

}  // namespace quarot::cpu
