// clip_search on the CPU: checks, and picks the instruction set.
#include "kernels/clip_search.h"

#include "kernels/cpu/isa.h"
#include "kernels/error.h"

namespace quarot::cpu {

QUAROT_DECLARE_VARIANTS(void clip_search(const ClipSearchArgs& args, const Executor& executor))

void clip_search(const ClipSearchArgs& args, const Executor& executor) {
  QUAROT_ASSERT(args.group >= 1 && args.w.n % args.group == 0,
                "clip_search: the group must divide the row");
  QUAROT_PICK(clip_search)(args, executor);
}

}  // namespace quarot::cpu
