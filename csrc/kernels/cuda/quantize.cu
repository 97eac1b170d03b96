// quantize, dequantize, pack_int4, unpack_int4 on CUDA. Maths: kernels/quantize.h.
//
// quantize is device/rows.cuh. The others go element by element: a thread moves kFlatChunks chunks
// of 8, a block's threads side by side.
//
// Bound: memory.
#include <cuda_runtime.h>

#include "kernels/cuda/device/any_transform.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/rows.cuh"
#include "kernels/cuda/device/sources.cuh"
#include "kernels/quantize.h"

namespace quarot::cuda {
namespace {

constexpr int kFlatThreads = 256;
/// Chunks that a thread has in flight.
constexpr int kFlatChunks = 4;

bool aligned(const void* p, int bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

/// Runs use(i, load(i)) for this thread's elements i < count of a flat range, all loads first; the
/// grid covers it.
template <class Load, class Use>
__device__ __forceinline__ void flat(int64_t count, const Load& load, const Use& use) {
  const int64_t first = int64_t{blockIdx.x} * kFlatThreads * kFlatChunks + threadIdx.x;
  decltype(load(0)) raw[kFlatChunks];
#pragma unroll
  for (int c = 0; c < kFlatChunks; ++c) {
    const int64_t i = first + c * kFlatThreads;
    if (i < count) raw[c] = load(i);
  }
#pragma unroll
  for (int c = 0; c < kFlatChunks; ++c) {
    const int64_t i = first + c * kFlatThreads;
    if (i < count) use(i, raw[c]);
  }
}
int64_t flat_blocks(int64_t count) { return ceil_div(count, int64_t{kFlatThreads} * kFlatChunks); }

// ---- Dequantize ---------------------------------------------------------------------------------

/// Eight elements a thread and chunk. group_chunks: chunks of a group.
template <DType kDtype, bool kPacked>
__global__ void __launch_bounds__(kFlatThreads)
    dequantize_kernel(const DequantizeArgs args, int64_t chunks, const FastDiv group_chunks) {
  struct Raw {
    uint2 codes;  // one word if packed
    float scale;
    int zero;
  };
  const auto load = [&](int64_t i) {
    const int group = group_chunks(static_cast<int>(i));
    Raw raw{{}, args.scale[group], args.zero == nullptr ? 0 : args.zero[group]};
    if constexpr (kPacked) {
      raw.codes.x = static_cast<const uint32_t*>(args.codes)[i];
    } else {
      raw.codes = static_cast<const uint2*>(args.codes)[i];
    }
    return raw;
  };
  flat(chunks, load, [&](int64_t i, const Raw& raw) {
    uint2 bytes = raw.codes;
    if constexpr (kPacked) bytes = {unpack_nibbles(bytes.x), unpack_nibbles(bytes.x >> 16)};
    float v[kChunk];
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const uint32_t word = j < 4 ? bytes.x : bytes.y;
      const int code = static_cast<int8_t>(word >> (8 * (j % 4)));
      v[j] = __fmul_rn(static_cast<float>(code - raw.zero), raw.scale);
    }
    store_chunk<kDtype>(args.out, i * kChunk, v);
  });
}

/// Any group, any address: one element a thread and chunk.
template <DType kDtype>
__global__ void __launch_bounds__(kFlatThreads)
    dequantize_any_kernel(const DequantizeArgs args, int64_t count) {
  const auto load = [&](int64_t i) -> int {
    if (!args.packed) return static_cast<const int8_t*>(args.codes)[i];
    const int byte = static_cast<const uint8_t*>(args.codes)[i / 2];
    return ((byte >> (i % 2 * 4) & 15) ^ 8) - 8;
  };
  flat(count, load, [&](int64_t i, int code) {
    const int64_t group = i / args.group;
    const int zero = args.zero == nullptr ? 0 : args.zero[group];
    store1<kDtype>(args.out, i, __fmul_rn(static_cast<float>(code - zero), args.scale[group]));
  });
}

template <DType kDtype>
void dequantize_to(const DequantizeArgs& args, Stream stream) {
  const int64_t count = args.rows * args.n;
  const int64_t chunks = count / kChunk;
  const bool whole = args.group % kChunk == 0 && aligned(args.out, 16) && aligned(args.codes, 8);
  if (whole && chunks < (int64_t{1} << 31)) {
    launch(args.packed ? &dequantize_kernel<kDtype, true> : &dequantize_kernel<kDtype, false>,
           flat_blocks(chunks), kFlatThreads, 0, stream, args, chunks,
           FastDiv(static_cast<int>(args.group / kChunk)));
  } else {
    launch(&dequantize_any_kernel<kDtype>, flat_blocks(count), kFlatThreads, 0, stream, args,
           count);
  }
}

// ---- Pack ---------------------------------------------------------------------------------------

/// One byte of two codes.
template <bool kPack>
__device__ __forceinline__ void pack_byte(const PackArgs& args, int64_t byte) {
  if constexpr (kPack) {
    args.packed[byte] =
        static_cast<uint8_t>((args.codes[2 * byte] & 15) | (args.codes[2 * byte + 1] & 15) << 4);
  } else {
    args.codes[2 * byte] = static_cast<int8_t>(((args.packed[byte] & 15) ^ 8) - 8);
    args.codes[2 * byte + 1] = static_cast<int8_t>((args.packed[byte] >> 4 ^ 8) - 8);
  }
}

/// Chunks of 8 codes <-> 4 bytes; the elements after the last whole chunk are left to the first
/// threads.
template <bool kPack>
__global__ void __launch_bounds__(kFlatThreads) pack_kernel(const PackArgs args, int64_t chunks) {
  auto* codes = reinterpret_cast<uint2*>(args.codes);
  auto* packed = reinterpret_cast<uint32_t*>(args.packed);
  if constexpr (kPack) {
    flat(
        chunks, [&](int64_t i) { return codes[i]; },
        [&](int64_t i, const uint2& bytes) { packed[i] = pack_nibbles(bytes); });
  } else {
    flat(
        chunks, [&](int64_t i) { return packed[i]; },
        [&](int64_t i, uint32_t nibbles) {
          codes[i] = {unpack_nibbles(nibbles), unpack_nibbles(nibbles >> 16)};
        });
  }
  const int64_t byte = chunks * (kChunk / 2) + threadIdx.x;
  if (blockIdx.x == 0 && byte < args.count / 2) {
    pack_byte<kPack>(args, byte);
  }
}

/// Odd addresses: one byte of two codes a thread.
template <bool kPack>
__global__ void __launch_bounds__(kFlatThreads) pack_any_kernel(const PackArgs args) {
  flat(
      args.count / 2, [](int64_t) { return 0; },
      [&](int64_t byte, int) { pack_byte<kPack>(args, byte); });
}

template <bool kPack>
void pack(const PackArgs& args, Stream stream) {
  if (args.count == 0) return;
  if (aligned(args.codes, 8) && aligned(args.packed, 4)) {
    const int64_t chunks = args.count / kChunk;
    const int64_t blocks = flat_blocks(chunks);
    launch(&pack_kernel<kPack>, blocks > 0 ? blocks : 1, kFlatThreads, 0, stream, args, chunks);
  } else {
    launch(&pack_any_kernel<kPack>, flat_blocks(args.count / 2), kFlatThreads, 0, stream, args);
  }
}

// ---- Quantize -----------------------------------------------------------------------------------

template <DType kDtype>
void quantize_of(const QuantizeArgs& args, Stream stream) {
  const Rows& x = args.x;
  const RowSource<kDtype> source{x.data, x.row_stride};
  if (chunks_are_aligned(x) && rows_fit(x.n, args.out)) {
    launch_rows(source, x.rows, x.n, args.out, stream);
  } else {
    launch_any(kNoTransform, x.rows, x.n, 1, source, AnyQuantize{args.out}, stream, "quantize");
  }
}

}  // namespace

void quantize(const QuantizeArgs& args, Stream stream) {
  if (args.x.rows == 0) return;
  switch (args.x.dtype) {
    case DType::f32:
      return quantize_of<DType::f32>(args, stream);
    case DType::f16:
      return quantize_of<DType::f16>(args, stream);
    case DType::bf16:
      return quantize_of<DType::bf16>(args, stream);
  }
  QUAROT_ASSERT(false, "quantize: no such dtype");
}

void dequantize(const DequantizeArgs& args, Stream stream) {
  if (args.rows * args.n == 0) return;
  switch (args.dtype) {
    case DType::f32:
      return dequantize_to<DType::f32>(args, stream);
    case DType::f16:
      return dequantize_to<DType::f16>(args, stream);
    case DType::bf16:
      return dequantize_to<DType::bf16>(args, stream);
  }
  QUAROT_ASSERT(false, "dequantize: no such dtype");
}

void pack_int4(const PackArgs& args, Stream stream) { pack<true>(args, stream); }
void unpack_int4(const PackArgs& args, Stream stream) { pack<false>(args, stream); }

}  // namespace quarot::cuda
