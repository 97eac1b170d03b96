// linear_int4 on sm_90a for many tokens. Maths: kernels/linear_int4.h.
#pragma once

#include "kernels/linear_int4.h"

namespace quarot::cuda {

/// Whether linear_int4_prefill takes these arguments on the current device.
bool linear_int4_prefill_fits(const LinearInt4Args& args);

/// Any m >= 1 and n >= 1. Allocates nothing; may be captured in a graph.
void linear_int4_prefill(const LinearInt4Args& args, Stream stream);

}  // namespace quarot::cuda
