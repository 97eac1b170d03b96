// linear_int4: y = ((acc * s_x) * s_w) (+ bias) (+ residual), in fp32 and in this order, where
//   acc[i, j] = sum_k x_q[i, k] * w_q[j, k]  -  x_zero[i] * w_sum[j]         exact in int32.
// With weight scales in groups of k / groups columns, acc and the two products are taken for each
// group, and the groups are added in ascending order before bias and residual. The result is
// rounded once, to the output's type.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace quarot {

/// Arguments of a quantized linear layer: m tokens, n output channels, k input channels.
struct LinearInt4Args {
  void* out;              // [m, n] out_dtype, contiguous
  const int8_t* x;        // [m, k] codes of 4 or 8 bits, contiguous
  const float* x_scale;   // [m]
  const int32_t* x_zero;  // [m] or null: symmetric activations
  const void* w;          // prepacked by prepack_int4 of the same device
  const float* w_scale;   // [n, groups]
  const int32_t* w_sum;   // [n, groups] sums of the codes of each group; read only with x_zero
  const void* bias;       // [n] bias_dtype or null
  const void* residual;   // [m, n] residual_dtype, contiguous, or null; `out` itself if types agree
  DType out_dtype;
  DType bias_dtype;
  DType residual_dtype;
  int64_t m;
  int64_t n;
  int64_t k;       // a multiple of kLinearInt4KMultiple, at most the device's kLinearInt4KMax
  int64_t groups;  // divides k; k / groups is a multiple of the device's kLinearInt4GroupMultiple
  bool x_packed = false;  // x is uint8 [m, k / 2], packed codes; cuda::linear_int4_reads_packed
};

/// Columns come in whole SIMD steps on every device.
inline constexpr int64_t kLinearInt4KMultiple = 32;

namespace cpu {

// The CPU's weight layout, [ceil(n / 16), k / 8, 16, 4] bytes: blocks of 16 output channels; in a
// block, for each 8 columns, four bytes a channel. Byte b holds column b in its low nibble and
// column 4 + b in its high one, as unsigned code + 8. So 64 bytes and a mask, or a shift and a
// mask, are 16 channels x 4 columns of bytes for instructions that multiply unsigned by signed ones
// and add four products a lane (vpdpbusd): 16 channels are 16 lanes of int32 sums, and nothing is
// shuffled. Channels beyond n are zeros.

inline constexpr int64_t kLinearInt4Channels = 16;  // output channels of a block
inline constexpr int64_t kLinearInt4Columns = 8;    // input channels of a word
inline constexpr int64_t kLinearInt4WordBytes = 4;
inline constexpr int kLinearInt4Offset = 8;  // what is added to the codes

/// k * 128 * 15 for the sum of unsigned codes, and k * 128 * 8 twice for offset and zero point:
/// |acc| stays below 2^31.
inline constexpr int64_t kLinearInt4KMax = int64_t{1} << 19;
/// A group covers whole words of the weight layout (quantize offers 32, 64, 128, 256).
inline constexpr int64_t kLinearInt4GroupMultiple = 8;

/// dst [ceil(n / 16), k / 8, 64] bytes  <-  src [n, k / 2], canonical (even column low). k % 8 = 0.
void prepack_int4(uint8_t* dst, const uint8_t* src, int64_t n, int64_t k, const Executor& executor);

/// The inverse: dst [n, k / 2]  <-  src [ceil(n / 16), k / 8, 64].
void unprepack_int4(uint8_t* dst, const uint8_t* src, int64_t n, int64_t k,
                    const Executor& executor);

void linear_int4(const LinearInt4Args& args, const Executor& executor);

}  // namespace cpu

namespace cuda {

// The weight layout of all CUDA kernels, [ceil(n / 16), ceil(k / 64), 32 lanes, 16] bytes: tiles of
// 16 output channels x 64 input channels, 512 contiguous bytes. Of a tile, with g = lane / 4 and
// t = lane % 4, a lane has four little-endian words, and byte b of word j holds the codes of
//
//     row g + 8 (j % 2), columns 16 (j / 2) + 4 t + b (low nibble) and 32 more (high nibble).
//
// So a lane's 16-byte load is its fragment of the tensor cores' int8 operand A (mma m16n8k32, wgmma
// m64k32) for two steps of 32 columns: (word << 4) & 0xf0f0f0f0 and word & 0xf0f0f0f0 are 16 times
// the codes as int8. Channels beyond n and columns beyond k are zeros.

inline constexpr int64_t kLinearInt4Channels = 16;  // of a tile
inline constexpr int64_t kLinearInt4Columns = 64;
inline constexpr int64_t kLinearInt4TileBytes = 512;

/// 16 |acc| <= 16 * k * 128 * 8 stays below 2^31.
inline constexpr int64_t kLinearInt4KMax = (int64_t{1} << 17) - kLinearInt4KMultiple;
/// A group covers whole steps of the tensor cores.
inline constexpr int64_t kLinearInt4GroupMultiple = 32;

/// dst [ceil(n / 16), ceil(k / 64), 512] bytes  <-  src [n, k / 2], canonical.
void prepack_int4(uint8_t* dst, const uint8_t* src, int64_t n, int64_t k, Stream stream);

/// The inverse: dst [n, k / 2]  <-  src [ceil(n / 16), ceil(k / 64), 512].
void unprepack_int4(uint8_t* dst, const uint8_t* src, int64_t n, int64_t k, Stream stream);

/// x and w must be 16-byte aligned. One launch; allocates nothing.
void linear_int4(const LinearInt4Args& args, Stream stream);

/// Whether the current device multiplies packed activations: int4 tensor cores, sm_80 to sm_89.
/// With several groups these must be multiples of kLinearInt4Columns then.
bool linear_int4_reads_packed();

}  // namespace cuda
}  // namespace quarot
