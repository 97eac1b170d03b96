#include "kernels/fused_quantize.h"

#include "kernels/cpu/isa.h"

namespace quarot::cpu {

QUAROT_DECLARE_VARIANTS(void hadamard_quantize(const HadamardQuantizeArgs& args,
                                               const Executor& executor))
QUAROT_DECLARE_VARIANTS(void rmsnorm_quantize(const RmsnormQuantizeArgs& args,
                                              const Executor& executor))
QUAROT_DECLARE_VARIANTS(void glu_hadamard_quantize(const GluHadamardQuantizeArgs& args,
                                                   const Executor& executor))
QUAROT_DECLARE_VARIANTS(void head_hadamard_quantize(const HeadHadamardQuantizeArgs& args,
                                                    const Executor& executor))

void hadamard_quantize(const HadamardQuantizeArgs& args, const Executor& executor) {
  QUAROT_PICK(hadamard_quantize)(args, executor);
}

void rmsnorm_quantize(const RmsnormQuantizeArgs& args, const Executor& executor) {
  QUAROT_PICK(rmsnorm_quantize)(args, executor);
}

void glu_hadamard_quantize(const GluHadamardQuantizeArgs& args, const Executor& executor) {
  QUAROT_PICK(glu_hadamard_quantize)(args, executor);
}

void head_hadamard_quantize(const HeadHadamardQuantizeArgs& args, const Executor& executor) {
  QUAROT_PICK(head_hadamard_quantize)(args, executor);
}

}  // namespace quarot::cpu
