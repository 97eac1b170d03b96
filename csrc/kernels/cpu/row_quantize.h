// Quantizes a row of fp32 in scratch memory, for every kernel that ends in codes. Only for
// *_isa.cpp files (see vec.h). Two passes over the row: the range of each group, then its codes.
// The arithmetic is in kernels/quantize.h.
#pragma once

#include <cstdint>

#include "kernels/cpu/vec.h"
#include "kernels/quantize.h"

namespace quarot::cpu::QUAROT_ISA {

/// Smallest normal float: a smaller scale becomes 1, since its inverse could overflow.
inline constexpr float kScaleFloor = 0x1p-126f;

/// How the values of a group become codes: clamp(rint(x * inv), low, high) + shift.
struct Grid {
  float scale, inv, low, high;
  int32_t zero, shift;
  bool finite;
};

/// The grid of x[0, count); lanes beyond count are not read.
inline Grid make_grid(const float* x, int64_t count, const QuantizedRows& q) {
  // As integers, |x| compares like |x| and NaN is above infinity.
  I32 magnitude = i32(0);
  F32 low = f32(0.0f), high = f32(0.0f);
  for (int64_t i = 0; i < count; i += kLanes) {
    const F32 v = load_upto<DType::f32>(x, i, count);
    magnitude = max(magnitude, bits(v) & i32(0x7fffffff));
    if (q.zero != nullptr) {
      low = min(v, low);
      high = max(v, high);
    }
  }
  const int32_t largest = reduce_max(magnitude);
  if (largest >= kInfinityBits) return {__builtin_nanf(""), 0.0f, 0.0f, 0.0f, 0, 0, false};

  const int32_t half = 1 << (q.bits - 1);
  if (q.zero == nullptr) {
    const float scale =
        (q.clip * __builtin_bit_cast(float, largest)) / static_cast<float>(half - 1);
    const float safe = scale < kScaleFloor ? 1.0f : scale;
    return {safe, 1.0f / safe, static_cast<float>(-half), static_cast<float>(half - 1), 0, 0, true};
  }
  const float lo = q.clip * reduce_min(low), hi = q.clip * reduce_max(high);
  const float steps = static_cast<float>(2 * half - 1);
  const float scale = (hi - lo) / steps;
  const float safe = scale < kScaleFloor ? 1.0f : scale;
  const float inv = 1.0f / safe;
  const float zero = (-lo * inv + kRound) - kRound;
  // clamp(rint(v) + zero, 0, steps) = clamp(rint(v), -zero, steps - zero) + zero: the bounds are
  // integers.
  const int32_t shift = static_cast<int32_t>(zero) - half;
  return {safe, inv, -zero, steps - zero, shift, shift, true};
}

/// Writes the codes of x[0, count) as int8.
inline void write_codes(const float* x, int64_t count, const Grid& grid, int8_t* codes) {
  if (!grid.finite) {
    __builtin_memset(codes, 0, static_cast<size_t>(count));
    return;
  }
  const F32 inv = f32(grid.inv), low = f32(grid.low), high = f32(grid.high);
  const I32 shift = i32(grid.shift);
  for (int64_t i = 0; i < count; i += kLanes) {
    // Clamped before it is rounded, which gives the same code and keeps rint_i32 in its range.
    const F32 v = min(max(load_upto<DType::f32>(x, i, count) * inv, low), high);
    const I32 code = rint_i32(v) + shift;
    if (count - i >= kLanes) {
      store_i8(codes + i, code);
    } else {
      int8_t tail[kLanes];
      store_i8(tail, code);
      __builtin_memcpy(codes + i, tail, static_cast<size_t>(count - i));
    }
  }
}

/// int8 codes [count] -> nibbles [count / 2]; count even.
inline void pack_row(const int8_t* codes, int64_t count, uint8_t* packed) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_i4(packed + i / 2, load_i8(codes + i));
  for (; i < count; i += 2) {
    packed[i / 2] = static_cast<uint8_t>((codes[i] & 15) | ((codes[i + 1] & 15) << 4));
  }
}

/// The inverse of pack_row.
inline void unpack_row(const uint8_t* packed, int64_t count, int8_t* codes) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_i8(codes + i, load_i4(packed + i / 2));
  for (; i < count; i += 2) {
    codes[i] = static_cast<int8_t>(((packed[i / 2] & 15) ^ 8) - 8);
    codes[i + 1] = static_cast<int8_t>((packed[i / 2] >> 4 ^ 8) - 8);
  }
}

/// Room for a row of int8 codes.
class CodeScratch {
 public:
  explicit CodeScratch(int64_t count) : floats_(ceil_div(count, 4)) {}
  int8_t* data() const { return reinterpret_cast<int8_t*>(floats_.data()); }

 private:
  Scratch floats_;
};

/// Quantizes x[0, n) into row r of q. codes: n bytes of scratch, used when q is packed.
[[gnu::noinline]] inline void quantize_row(const float* x, int64_t n, const QuantizedRows& q,
                                           int64_t r, int8_t* codes) {
  int8_t* row_codes = q.packed ? codes : static_cast<int8_t*>(q.codes) + r * n;
  const int64_t groups = q.group == n ? 1 : n / q.group;
  for (int64_t g = 0; g < groups; ++g) {
    const float* values = x + g * q.group;
    const Grid grid = make_grid(values, q.group, q);
    q.scale[r * groups + g] = grid.scale;
    if (q.zero != nullptr) q.zero[r * groups + g] = grid.zero;
    write_codes(values, q.group, grid, row_codes + g * q.group);
  }
  if (q.packed) pack_row(codes, n, static_cast<uint8_t*>(q.codes) + r * (n / kInt4PerByte));
}

}  // namespace quarot::cpu::QUAROT_ISA
