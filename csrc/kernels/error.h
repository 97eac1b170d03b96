// How the torch-free tier reports a broken assumption: it throws. Shapes and dtypes that a user can
// get wrong are checked by the ops, with the argument's name; what stands here guards the kernels.
#pragma once

#include <stdexcept>
#include <string>

namespace quarot {

[[noreturn]] inline void throw_error(const char* file, int line, const std::string& message) {
  throw std::runtime_error("quarot: " + message + " (" + file + ":" + std::to_string(line) + ")");
}

}  // namespace quarot

/// Throws std::runtime_error with `message` unless `condition` holds. Not for *_isa.cpp files: the
/// string code would be compiled for their instruction set.
#define QUAROT_ASSERT(condition, message)                                   \
  do {                                                                      \
    if (!(condition)) ::quarot::throw_error(__FILE__, __LINE__, (message)); \
  } while (false)

/// Throws when a CUDA runtime call fails. Only for files that include cuda_runtime.h.
#define QUAROT_CUDA_CHECK(call)                                                             \
  do {                                                                                      \
    const cudaError_t quarot_status = (call);                                               \
    if (quarot_status != cudaSuccess) {                                                     \
      ::quarot::throw_error(__FILE__, __LINE__,                                             \
                            std::string(#call) + ": " + cudaGetErrorString(quarot_status)); \
    }                                                                                       \
  } while (false)
