// Scales of int4 weights by clip search: of the scales p * max|w| / 7 of a group of columns, with p
// = 1.00, 0.99 ... 0.21, the one of the least error sum_i m_i |code_i * scale - w_i|^norm, the
// first of equals. m is the importance of a column, or 1. QuaRot (arXiv 2404.00456), section 5.
//
// Errors are summed in units of the scale, as p^norm * sum_i m_i |code_i - w_i / scale|^norm in
// fp32, so that small weights do not underflow. A group of zeros has scale 1, one with a NaN or an
// infinity NaN.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace quarot {

struct ClipSearchArgs {
  float* scale;             // [w.rows, w.n / group]
  Rows w;                   // w.n >= 1
  int64_t group;            // divides w.n; w.n = one scale a row
  float norm;               // > 0
  const float* importance;  // [w.n], >= 0; null = 1
};

inline constexpr int kClipTrials = 80;

/// Shrink factor p of trial t.
[[gnu::always_inline]] inline constexpr float clip_shrink(int trial) {
  return static_cast<float>((100 - trial) / 100.0);
}

/// Scales below the smallest normal number, whose inverse may overflow, become 1.
inline constexpr float kClipScaleFloor = 0x1p-126f;

namespace cpu {
void clip_search(const ClipSearchArgs& args, const Executor& executor);
}  // namespace cpu
namespace cuda {
void clip_search(const ClipSearchArgs& args, Stream stream);
}  // namespace cuda

}  // namespace quarot
