#include "kernels/linear_int4.h"

#include "kernels/cpu/isa.h"
#include "kernels/error.h"

namespace quarot::cpu {

QUAROT_DECLARE_VARIANTS(void linear_int4(const LinearInt4Args&, const Executor&))
QUAROT_DECLARE_VARIANTS(void prepack_int4(uint8_t*, const uint8_t*, int64_t, int64_t,
                                          const Executor&))
QUAROT_DECLARE_VARIANTS(void unprepack_int4(uint8_t*, const uint8_t*, int64_t, int64_t,
                                            const Executor&))

#if defined(QUAROT_WITH_AMX)
namespace amx {
void linear_int4(const LinearInt4Args&, const Executor&);
}
#endif

namespace {

auto pick_linear() {
#if defined(QUAROT_WITH_AMX)
  if (active_isa() == Isa::amx) return &amx::linear_int4;
#endif
  return QUAROT_PICK(linear_int4);
}

}  // namespace

void linear_int4(const LinearInt4Args& args, const Executor& executor) {
  QUAROT_ASSERT(args.k > 0 && args.k % kLinearInt4KMultiple == 0 && args.k <= kLinearInt4KMax,
                "linear_int4: k must be a multiple of 32, at most 2^19");
  QUAROT_ASSERT(args.groups > 0 && args.k % args.groups == 0 &&
                    args.k / args.groups % kLinearInt4GroupMultiple == 0,
                "linear_int4: groups must divide k into multiples of 8 columns");
  QUAROT_ASSERT(args.x_zero == nullptr || args.w_sum != nullptr, "linear_int4: x_zero needs w_sum");
  static const auto kernel = pick_linear();
  kernel(args, executor);
}

void prepack_int4(uint8_t* dst, const uint8_t* src, int64_t n, int64_t k,
                  const Executor& executor) {
  QUAROT_ASSERT(k % kLinearInt4Columns == 0, "prepack_int4: k must be a multiple of 8");
  static const auto kernel = QUAROT_PICK(prepack_int4);
  kernel(dst, src, n, k, executor);
}

void unprepack_int4(uint8_t* dst, const uint8_t* src, int64_t n, int64_t k,
                    const Executor& executor) {
  QUAROT_ASSERT(k % kLinearInt4Columns == 0, "unprepack_int4: k must be a multiple of 8");
  static const auto kernel = QUAROT_PICK(unprepack_int4);
  kernel(dst, src, n, k, executor);
}

}  // namespace quarot::cpu
