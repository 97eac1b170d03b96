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

}  // namespace quarot::cpu::QUAROT_ISA
