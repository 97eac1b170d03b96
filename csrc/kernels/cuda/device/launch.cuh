// Launches, and the device's numbers that a launch is planned with.
#pragma once

#include <cuda_runtime.h>

#include <unordered_map>

#include "kernels/error.h"
#include "kernels/types.h"

namespace quarot::cuda {

/// Dynamic shared memory that needs no opt-in.
constexpr int kDefaultSharedBytes = 48 * 1024;
/// Shared memory that a block costs beyond what it asks for (CUDA programming guide).
constexpr int kReservedSharedBytes = 1024;

struct DeviceLimits {
  int device = -1;
  int processors;
  int block_shared_bytes;
  int processor_shared_bytes;
  int compute_major;
  bool starts_early;  // programmatic dependent launch, sm_90
};

/// Of the current device: asked for when a thread comes to another device, not at each call.
inline const DeviceLimits& device_limits() {
  thread_local DeviceLimits limits;
  int device = 0;
  QUAROT_CUDA_CHECK(cudaGetDevice(&device));
  if (device == limits.device) return limits;
  const auto ask = [device](cudaDeviceAttr attribute) {
    int value = 0;
    QUAROT_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
  };
  limits.processors = ask(cudaDevAttrMultiProcessorCount);
  limits.block_shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  limits.processor_shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  limits.compute_major = ask(cudaDevAttrComputeCapabilityMajor);
  limits.starts_early = limits.compute_major >= 9;
  limits.device = device;
  return limits;
}

/// The current device's compute capability, without the minor number.
inline int compute_major() { return device_limits().compute_major; }

/// Lets blocks of a kernel have so much dynamic shared memory on the current device: the driver is
/// asked once a thread, not at each call.
inline void allow_shared(const void* kernel, int bytes) {
  struct Allowed {
    int device = -1, bytes = 0;
  };
  thread_local std::unordered_map<const void*, Allowed> kernels;
  Allowed& allowed = kernels[kernel];
  const int device = device_limits().device;
  if (allowed.device == device && allowed.bytes >= bytes) return;
  QUAROT_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  allowed = {device, bytes};
}

namespace detail {

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, int shared_bytes, Stream stream,
            cudaLaunchAttribute* attributes, unsigned count, const Args&... args) {
  QUAROT_ASSERT(blocks < (int64_t{1} << 31), "too many rows for one launch");
  if (shared_bytes > kDefaultSharedBytes) {
    allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
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
  detail::launch(kernel, blocks, threads, shared_bytes, stream, nullptr, 0, args...);
}

/// launch_early, in clusters of so many blocks (sm_90).
template <class... Params, class... Args>
void launch_clusters(void (*kernel)(Params...), int64_t blocks, int cluster, int threads,
                     int shared_bytes, Stream stream, const Args&... args) {
  constexpr int kPortable = 8;
  if (cluster > kPortable) {
    QUAROT_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (device_limits().starts_early) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  detail::launch(kernel, blocks, threads, shared_bytes, stream, attributes, count, args...);
}

/// Launches a kernel that begins with wait_for_previous_grid(): where the device can, its blocks
/// come to that point while the kernel before it still runs.
template <class... Params, class... Args>
void launch_early(void (*kernel)(Params...), int64_t blocks, int threads, int shared_bytes,
                  Stream stream, const Args&... args) {
  launch_clusters(kernel, blocks, 1, threads, shared_bytes, stream, args...);
}

}  // namespace quarot::cuda
