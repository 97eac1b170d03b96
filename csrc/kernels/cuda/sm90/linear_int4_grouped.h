// linear_int4 with scales of groups of columns on sm_90a. Maths: kernels/linear_int4.h.
#pragma once

#include "kernels/linear_int4.h"

namespace quarot::cuda {

/// Whether linear_int4_grouped takes these arguments on the current device.
bool linear_int4_grouped_fits(const LinearInt4Args& args);

/// Any m >= 1 and n >= 1. Allocates nothing; may be captured in a graph.
void linear_int4_grouped(const LinearInt4Args& args, Stream stream);

}  // namespace quarot::cuda
