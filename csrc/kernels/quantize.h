// Quantization of rows to int4 or int8 codes, its inverse, and int4 packing.
//
// A group of `group` columns (or a row) shares scale = (clip * range) / steps in fp32; inv = 1 /
// scale;
//   symmetric:  code = clamp(rint(x * inv), -qmax - 1, qmax), range = max|x|, steps = qmax =
//   2^(bits-1) - 1 asymmetric: zero = rint(-lo * inv), code = clamp(rint(x * inv) + zero, 0,
//   steps), range = hi - lo with 0 in it,
//               steps = 2^bits - 1; codes and zero are stored shifted by -2^(bits-1), that is,
//               signed
// A group with a NaN or an infinity gets scale NaN, codes 0, zero 0. All outputs are contiguous.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace quarot {

struct QuantizedRows {
  void* codes;    // int8 [rows, n], or packed uint8 [rows, n / 2]
  float* scale;   // [rows, n / group]
  int32_t* zero;  // [rows, n / group]; null = symmetric
  int64_t group;  // divides n; n = one scale a row (then scale is [rows], also where n = 0)
  int bits;       // 4 or 8
  bool packed;    // bits = 4 and n even
  float clip;     // share of the range that is kept
};

struct QuantizeArgs {
  QuantizedRows out;
  Rows x;
};

struct DequantizeArgs {
  void* out;  // [rows, n] of `dtype`
  DType dtype;
  const void* codes;    // int8 [rows, n], or packed uint8 [rows, n / 2]
  const float* scale;   // [rows, n / group]
  const int32_t* zero;  // [rows, n / group]; null = 0
  int64_t rows, n, group;
  bool packed;
};

struct PackArgs {
  uint8_t* packed;  // [count / 2]; written by pack_int4, read by unpack_int4
  int8_t* codes;    // [count]; the other way round
  int64_t count;
};

namespace cpu {
void quantize(const QuantizeArgs& args, const Executor& executor);
void dequantize(const DequantizeArgs& args, const Executor& executor);
void pack_int4(const PackArgs& args, const Executor& executor);
void unpack_int4(const PackArgs& args, const Executor& executor);
}  // namespace cpu

namespace cuda {
void quantize(const QuantizeArgs& args, Stream stream);
void dequantize(const DequantizeArgs& args, Stream stream);
void pack_int4(const PackArgs& args, Stream stream);
void unpack_int4(const PackArgs& args, Stream stream);
}  // namespace cuda

}  // namespace quarot
