#include "kernels/quantize.h"

#include "kernels/cpu/isa.h"
#include "kernels/error.h"

namespace quarot::cpu {

QUAROT_DECLARE_VARIANTS(void quantize(const QuantizeArgs& args, const Executor& executor))
QUAROT_DECLARE_VARIANTS(void dequantize(const DequantizeArgs& args, const Executor& executor))
QUAROT_DECLARE_VARIANTS(void pack_int4(const PackArgs& args, const Executor& executor))
QUAROT_DECLARE_VARIANTS(void unpack_int4(const PackArgs& args, const Executor& executor))

void quantize(const QuantizeArgs& args, const Executor& executor) {
  QUAROT_PICK(quantize)(args, executor);
}

void dequantize(const DequantizeArgs& args, const Executor& executor) {
  QUAROT_PICK(dequantize)(args, executor);
}

void pack_int4(const PackArgs& args, const Executor& executor) {
  QUAROT_ASSERT(args.count % kInt4PerByte == 0, "pack_int4: the number of codes must be even");
  QUAROT_PICK(pack_int4)(args, executor);
}

void unpack_int4(const PackArgs& args, const Executor& executor) {
  QUAROT_ASSERT(args.count % kInt4PerByte == 0, "unpack_int4: the number of codes must be even");
  QUAROT_PICK(unpack_int4)(args, executor);
}

}  // namespace quarot::cpu
