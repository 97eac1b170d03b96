// Vocabulary of the torch-free tier: element types, the int4 format, and what a kernel runs on.
#pragma once

#include <cstdint>

namespace quarot {

/// Floating-point element types of activations and outputs.
enum class DType { f32, f16, bf16 };

/// A CUDA stream (cudaStream_t) without the CUDA headers.
using Stream = void*;

/// Runs independent tasks on CPU threads. `run` calls body(ctx, task) once for each task in
/// [0, tasks), in any order, possibly at the same time, and returns when all are done. A body
/// should not throw: what is wrong with the arguments is found before.
struct Executor {
  using Body = void (*)(void* ctx, int64_t task);
  int threads;
  void (*run)(int64_t tasks, Body body, void* ctx);
};

/// Rows of floating-point numbers: element (r, c) is data[r * row_stride + c], for c < n.
struct Rows {
  const void* data;
  DType dtype;
  int64_t rows;
  int64_t n;
  int64_t row_stride;  // in elements
};

// The int4 format: two's complement nibbles in [-8, 7], two a byte, the even index in the low
// nibble.

/// Codes per byte of a packed tensor.
inline constexpr int64_t kInt4PerByte = 2;

[[gnu::always_inline]] inline constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace quarot
