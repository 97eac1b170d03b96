// The processor's tiles (AMX): eight registers of 16 rows of 64 bytes, which it multiplies. Only
// for the variant amx.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/vec.h"

namespace quarot::cpu::QUAROT_ISA {

inline constexpr int64_t kTileRows = 16;
inline constexpr int64_t kTileBytes = 64;  // of a row

/// Has what was written before, at p too, in memory: GCC 12's intrinsics do not say what they read.
QUAROT_INLINE void before_tiles_read(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

/// Lets this thread use eight whole tiles while it lives.
class UseTiles {
 public:
  UseTiles() {
    for (int i = 0; i < 8; ++i) {
      config_.row_bytes[i] = kTileBytes;
      config_.rows[i] = kTileRows;
    }
    before_tiles_read(&config_);
    _tile_loadconfig(&config_);
  }
  ~UseTiles() { _tile_release(); }
  UseTiles(const UseTiles&) = delete;
  UseTiles& operator=(const UseTiles&) = delete;

 private:
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config_;
};

inline constexpr int64_t kTile = kTileRows * kTileBytes;
/// Rows and columns of the sums that are in registers: two by two tiles.
inline constexpr int64_t kPair = 2 * kTileRows;

/// acc [32, 32] = (add ? acc : 0) + x [32, columns] * w [columns, 32], x and w in tiles of Element:
/// int8_t with int32 sums, or uint16_t, bf16, with fp32 sums. `row_bytes`: the columns' bytes. Of x
/// the second sixteen rows, if there are any, are x_next bytes further; of w [row_bytes / 64, 2
/// tiles] a row is 16 sums' next 4 bytes of columns.
template <class Element, bool kSecond>
QUAROT_INLINE void multiply_tiles(void* acc, const void* x, int64_t x_next, const void* w,
                                  int64_t row_bytes, bool add) {
  constexpr int64_t kStride = 2 * kTileBytes;
  auto* sums = static_cast<char*>(acc);
  char* below = sums + kTileRows * kStride;
  if (add) {
    _tile_loadd(0, sums, kStride);
    _tile_loadd(1, sums + kTileBytes, kStride);
    if (kSecond) _tile_loadd(2, below, kStride);
    if (kSecond) _tile_loadd(3, below + kTileBytes, kStride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (kSecond) _tile_zero(2);
    if (kSecond) _tile_zero(3);
  }
  const auto* rows = static_cast<const char*>(x);
  const auto* columns = static_cast<const char*>(w);
  constexpr bool kInt8 = sizeof(Element) == 1;
  for (int64_t c = 0; c < row_bytes; c += kTileBytes, rows += kTile, columns += 2 * kTile) {
    _tile_loadd(4, rows, kTileBytes);
    _tile_loadd(6, columns, kTileBytes);
    if constexpr (kInt8) {
      _tile_dpbssd(0, 4, 6);
    } else {
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_loadd(7, columns + kTile, kTileBytes);
    if constexpr (kInt8) {
      _tile_dpbssd(1, 4, 7);
    } else {
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kSecond) {
      _tile_loadd(5, rows + x_next, kTileBytes);
      if constexpr (kInt8) {
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      } else {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + kTileBytes, kStride);
  if (kSecond) _tile_stored(2, below, kStride);
  if (kSecond) _tile_stored(3, below + kTileBytes, kStride);
}

}  // namespace quarot::cpu::QUAROT_ISA
