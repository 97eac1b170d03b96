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
  bool starts_early;  // programmatic dependent launch, sm_90
};

/// The current device's compute capability, without the minor number.
inline int compute_major() {
  int device = 0, major = 0;
  QUAROT_CUDA_CHECK(cudaGetDevice(&device));
  QUAROT_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major;
}

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
  limits.starts_early = compute_major() >= 9;
  return limits;
}

namespace detail {

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, int shared_bytes, Stream stream,
            cudaLaunchAttribute* attribute, const Args&... args) {
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
  config.attrs = attribute;
  config.numAttrs = attribute == nullptr ? 0 : 1;
  QUAROT_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace detail

/// Lets as many blocks of a kernel run on a multiprocessor as its shared memory can hold: the
/// driver would give the L1 a share of it that leaves room for half as many.
template <class... Params>
void prefer_shared_memory(void (*kernel)(Params...)) {
  QUAROT_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                         cudaSharedmemCarveoutMaxShared));
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, int shared_bytes, Stream stream,
            const Args&... args) {
  detail::launch(kernel, blocks, threads, shared_bytes, stream, nullptr, args...);
}

/// Launches a kernel that begins with wait_for_previous_grid(): where the device can, its blocks
/// come to that point while the kernel before it still runs.
template <class... Params, class... Args>
void launch_early(void (*kernel)(Params...), int64_t blocks, int threads, int shared_bytes,
                  Stream stream, const Args&... args) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  detail::launch(kernel, blocks, threads, shared_bytes, stream,
                 device_limits().starts_early ? &early : nullptr, args...);
}

}  // namespace quarot::cuda
