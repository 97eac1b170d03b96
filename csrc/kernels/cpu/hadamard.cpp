#include "kernels/hadamard.h"

#include "kernels/cpu/isa.h"
#include "kernels/error.h"

namespace quarot::cpu {

QUAROT_DECLARE_VARIANTS(void hadamard(const HadamardArgs& args, const Executor& executor))

void hadamard(const HadamardArgs& args, const Executor& executor) {
  QUAROT_ASSERT(args.matrix.size >= 1 && args.x.n % args.matrix.size == 0,
                "hadamard: the size must divide the row");
  QUAROT_PICK(hadamard)(args, executor);
}

}  // namespace quarot::cpu
