// Launches, and the device's numbers that a launch is planned with.
#pragma once

#include <cuda_runtime.h>

#include "kernels/error.h"
#include "kernels/types.h"

namespace quarot::cuda {

/// Dynamic shared memory that needs no opt-in.
constexpr int kDefaultSharedBytes = 48 * 1024;
/// Shared memory that a block costs beyond what it asks for (CUDA programming guide).
constexpr int kReservedSharedBytes = 1024;

struct DeviceLimits {
  int processors;
  int block_shared_bytes;
  int processor_shared_bytes;
};

inline DeviceLimits device_limits() {
  int device = 0;
  DeviceLimits limits{};
  QUAROT_CUDA_CHECK(cudaGetDevice(&device));
  QUAROT_CUDA_CHECK(
      cudaDeviceGetAttribute(&limits.processors, cudaDevAttrMultiProcessorCount, device));
  QUAROT_CUDA_CHECK(cudaDeviceGetAttribute(&limits.block_shared_bytes,
                                           cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  QUAROT_CUDA_CHECK(cudaDeviceGetAttribute(&limits.processor_shared_bytes,
                                           cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  return limits;
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, int shared_bytes, Stream stream,
            const Args&... args) {
  QUAROT_ASSERT(blocks < (int64_t{1} << 31), "too many rows for one launch");
  if (shared_bytes > kDefaultSharedBytes) {
    QUAROT_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  QUAROT_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace quarot::cuda
