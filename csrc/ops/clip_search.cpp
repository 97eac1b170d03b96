// quarot::clip_search.
#include "kernels/clip_search.h"

#include "ops/checks.h"

namespace quarot::ops {
namespace {

/// w [rows, n] -> scale [rows, n / group].
template <auto kernel>
Tensor clip_search(const Tensor& w, double norm, int64_t group, OptionalTensor importance) {
  constexpr const char* op = "clip_search";
  QUAROT_REQUIRE(w.dim() == 2 && w.size(1) >= 1, op,
                 "w must be [rows, n] with at least one column; got ", describe(w));
  const RowsOf in = rows_of(w, 1, op, "w");
  const int64_t rows = w.size(0), n = w.size(1);
  QUAROT_REQUIRE(norm > 0, op, "norm must be above 0; got ", norm);
  QUAROT_REQUIRE(group == 0 || (group > 0 && n % group == 0), op, "group must be 0 or divide ", n,
                 ", the columns of w; got ", group);
  if (group == 0) group = n;
  if (importance.has_value()) {
    importance = require_dense(*importance, ScalarType::Float, {n}, w, op, "importance", "w");
  }
  Tensor scale = new_tensor(w, {rows, n / group}, ScalarType::Float);
  if (rows != 0) {
    launch<kernel>(w, ClipSearchArgs{data<float>(scale), in.rows, group, static_cast<float>(norm),
                                     data<const float>(importance)});
  }
  return scale;
}

STABLE_TORCH_LIBRARY_IMPL(quarot, CPU, m) {
  m.impl("clip_search", TORCH_BOX(&clip_search<&cpu::clip_search>));
}
#ifdef QUAROT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(quarot, CUDA, m) {
  m.impl("clip_search", TORCH_BOX(&clip_search<&cuda::clip_search>));
}
#endif

}  // namespace
}  // namespace quarot::ops
