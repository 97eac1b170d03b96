// Splits rows over the Executor's threads. Only for *_isa.cpp files (see vec.h).
#pragma once

#include <cstdint>

#include "kernels/cpu/vec.h"
#include "kernels/types.h"

namespace quarot::cpu::QUAROT_ISA {

/// Elements a task should have at least: below it, waking a thread costs more than it saves.
inline constexpr int64_t kTaskElements = 16384;

/// Calls body(begin, end) for ranges that cover [0, rows); each row belongs to one call, so a
/// result that depends on its row alone does not depend on the number of threads. `row_elements`:
/// work of a row.
template <class Body>
QUAROT_INLINE void parallel_rows(const Executor& executor, int64_t rows, int64_t row_elements,
                                 const Body& body) {
  if (rows <= 0) return;
  int64_t tasks = ceil_div(rows * (row_elements > 0 ? row_elements : 1), kTaskElements);
  tasks = tasks < executor.threads ? tasks : executor.threads;
  tasks = tasks < rows ? tasks : rows;
  if (tasks <= 1) {
    body(int64_t{0}, rows);
    return;
  }
  struct Context {
    const Body* body;
    int64_t rows, tasks;
  } context{&body, rows, tasks};
  executor.run(
      tasks,
      [](void* ctx, int64_t task) {
        const auto* c = static_cast<const Context*>(ctx);
        const int64_t begin = c->rows * task / c->tasks;
        const int64_t end = c->rows * (task + 1) / c->tasks;
        (*c->body)(begin, end);
      },
      &context);
}

}  // namespace quarot::cpu::QUAROT_ISA
