// What every op does before and around its kernel: named checks, dtype conversion, allocation, rows
// of a strided tensor, and the place a kernel runs on (torch's CPU threads, or a guarded device
// with its current stream). Above 150 lines: short helpers that every op includes together.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/types.h"
#include "ops/tape.h"

// Weak: a CPU build of torch does not have it, and one _C serves both.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace quarot::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;
using OptionalTensor = std::optional<Tensor>;

// ---- Messages ----

/// "float32", "uint8", …, as torch writes it.
inline const char* name(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::BFloat16:
      return "bfloat16";
    default:
      return "another dtype";
  }
}

inline Sizes sizes_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

inline std::string text(const Sizes& sizes) {
  std::string out = "[";
  for (size_t i = 0; i < sizes.size(); ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
  return out + "]";
}

/// "int8 [2, 64] on cpu", for messages.
inline std::string describe(const Tensor& x) {
  const std::string device = x.is_cpu() ? "cpu" : "cuda:" + std::to_string(x.get_device_index());
  return std::string(name(x.scalar_type())) + " " + text(sizes_of(x)) + " on " + device;
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

/// Throws "quarot::<op>: <parts>" unless the condition holds; the parts are evaluated only then.
#define QUAROT_REQUIRE(condition, op, ...)                    \
  do {                                                        \
    if (!(condition)) [[unlikely]]                            \
      ::quarot::ops::fail("quarot::", op, ": ", __VA_ARGS__); \
  } while (false)

// ---- Checks: `op` and `arg` are names for the message ----

inline void require_dtype(const Tensor& x, ScalarType want, const char* op, const char* arg) {
  QUAROT_REQUIRE(x.scalar_type() == want, op, arg, " must be ", name(want), "; got ", describe(x));
}

inline bool has_shape(const Tensor& x, const Sizes& want) {
  return std::ranges::equal(x.sizes(), want);
}

inline void require_shape(const Tensor& x, const Sizes& want, const char* op, const char* arg) {
  QUAROT_REQUIRE(has_shape(x, want), op, arg, " must have shape ", text(want), "; got ",
                 describe(x));
}

inline void require_dim(const Tensor& x, int64_t at_least, const char* op, const char* arg) {
  QUAROT_REQUIRE(x.dim() >= at_least, op, arg, " must have at least ", at_least,
                 " dimension(s); got ", describe(x));
}

inline void require_same_device(const Tensor& x, const Tensor& other, const char* op,
                                const char* arg, const char* other_arg) {
  QUAROT_REQUIRE(x.is_cuda() == other.is_cuda() && x.get_device_index() == other.get_device_index(),
                 op, arg, " must be on the device of ", other_arg, "; got ", describe(x), " and ",
                 describe(other));
}

/// A copy of x; `copied` is what torch made of it. Not a kernel's doing, so no tape has it.
inline Tensor off_tape(const Tensor& copied) {
  if (Tape* tape = Tape::current(); tape != nullptr) tape->spoil();
  return copied;
}
inline Tensor dense_copy(const Tensor& x) { return off_tape(torch::stable::contiguous(x)); }

/// A tensor of the given dtype and shape, dense, on the device of `like`; returned contiguous.
inline Tensor require_dense(const Tensor& x, ScalarType dtype, const Sizes& sizes,
                            const Tensor& like, const char* op, const char* arg,
                            const char* like_arg) {
  require_dtype(x, dtype, op, arg);
  require_shape(x, sizes, op, arg);
  require_same_device(x, like, op, arg, like_arg);
  return x.is_contiguous() ? x : dense_copy(x);
}

/// The kernel's name of a floating-point dtype.
inline DType dtype_of(ScalarType type, const char* op, const char* arg) {
  switch (type) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      fail("quarot::", op, ": ", arg, " must be float32, float16 or bfloat16; got ", name(type));
  }
}

// ---- Memory ----

/// A new contiguous tensor on the device of `like`, uninitialised.
inline Tensor new_tensor(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  const auto dim = static_cast<int64_t>(sizes.size());
  Sizes strides(sizes.size());
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  // The shim itself: torch::stable::new_empty looks its op up by name at each call.
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      like.get_device_index(), &handle));
  Tensor made(handle);
  if (Tape* tape = Tape::current(); tape != nullptr) tape->hold(std::make_shared<Tensor>(made));
  return made;
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}
/// The pointer, or null for no tensor.
template <class T>
T* data(const OptionalTensor& x) {
  return x.has_value() ? data<T>(*x) : nullptr;
}

/// A floating-point tensor as rows of its last `dims` dimensions, and the tensor that holds the
/// memory: `x` itself where its leading dimensions have one common stride and its rows are dense,
/// else a contiguous copy.
struct RowsOf {
  Tensor memory;
  Rows rows;
};
inline RowsOf rows_of(const Tensor& x, int64_t dims, const char* op, const char* arg) {
  const DType dtype = dtype_of(x.scalar_type(), op, arg);
  require_dim(x, dims, op, arg);
  const int64_t lead = x.dim() - dims;
  int64_t n = 1;
  bool dense = true;
  for (int64_t d = x.dim() - 1; d >= lead; --d) {
    dense = dense && (x.size(d) == 1 || x.stride(d) == n);
    n *= x.size(d);
  }
  int64_t rows = 1;
  int64_t row_stride = n;
  for (int64_t d = lead - 1; d >= 0; --d) {
    if (x.size(d) == 1) continue;
    if (rows == 1) {
      row_stride = x.stride(d);
    } else {
      dense = dense && x.stride(d) == row_stride * rows;
    }
    rows *= x.size(d);
  }
  if (x.numel() == 0 || dense) return {x, {x.data_ptr(), dtype, rows, n, row_stride}};
  Tensor copy = dense_copy(x);
  return {copy, {copy.data_ptr(), dtype, rows, n, n}};
}

// ---- Where a kernel runs ----

/// torch's intra-op threads (torch.set_num_threads).
inline Executor cpu_executor() {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return {static_cast<int>(threads), [](int64_t tasks, Executor::Body body, void* ctx) {
            torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) {
              for (int64_t task = begin; task < end; ++task) body(ctx, task);
            });
          }};
}

/// Makes the tensor's device current for its lifetime and knows the caller's stream there.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& x) : guard_(x.get_device_index()) {
    if (aoti_torch_get_current_cuda_stream == nullptr) {
      fail("quarot: this torch has no CUDA, yet a CUDA kernel was called");
    }
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
  Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

/// Calls kernel(args..., executor) or kernel(args..., stream), whichever the kernel takes, on x's
/// device. The former is noted on this thread's tape.
template <auto kernel, class... Args>
void launch(const Tensor& x, const Args&... args) {
  if constexpr (std::is_invocable_v<decltype(kernel), const Args&..., const Executor&>) {
    if (Tape* tape = Tape::current(); tape != nullptr) [[unlikely]] {
      tape->add([args...](const Executor& executor) { kernel(args..., executor); });
    }
    kernel(args..., cpu_executor());
  } else {
    kernel(args..., CudaScope(x).stream());
  }
}

}  // namespace quarot::ops
