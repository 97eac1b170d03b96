#include "kernels/attention.h"
#include "kernels/cpu/isa.h"
#include "kernels/error.h"

namespace quarot::cpu {

QUAROT_DECLARE_VARIANTS(void dequantize_kv(const DequantizeKvArgs&, const Executor&))

void dequantize_kv(const DequantizeKvArgs& args, const Executor& executor) {
  QUAROT_ASSERT(args.bits == 4 || args.bits == 8, "dequantize_kv: bits must be 4 or 8");
  QUAROT_ASSERT(args.head_dim % kHeadDimMultiple == 0, "dequantize_kv: head_dim must be whole");
  QUAROT_ASSERT(args.lengths == nullptr && args.broken == nullptr && args.start <= -args.length &&
                    args.tokens <= args.length,
                "dequantize_kv: the CPU has no ragged tiles");
  for (int64_t pair = args.first; pair < args.first + args.pairs; pair += args.kv_heads) {
    check_pages("attention", args.pages, pair / args.kv_heads, 0, args.tokens);
  }
  static const auto kernel = QUAROT_PICK(dequantize_kv);
  kernel(args, executor);
}

bool prefers_torch_attention() {
  static const bool tiles = isa_available(Isa::amx);
  return tiles;
}

}  // namespace quarot::cpu
