// How fwht_kernel (fwht.cuh) cuts rows into tiles, and where a tile lies in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/vec.cuh"
#include "kernels/hadamard.h"

namespace quarot::cuda {

constexpr int kGroupColumns = 64;  // of X that a warp multiplies
constexpr int kColumnBits = 6;
constexpr int kPaddedGroup = 72;  // floats of a group in the exchange: 4 more a 32, see kBankStep
constexpr int kBankStep = 8;   // rows of the exchange begin 8 banks apart, 16 bytes a chunk of them
constexpr int kLeastBits = 3;  // of a segment: a chunk
constexpr int kMostBits = 9;
constexpr int kMostOrder = 176;
constexpr int kTileWarps = 4;  // of a block, at least, where rows are short
/// A line that rows of X beyond the order are read from.
constexpr int kZeroBytes = kGroupColumns * 2;

/// Values of a thread are 32 row_tiles, so that these threads have the registers they need.
constexpr int max_threads(int row_tiles) { return row_tiles == 1 ? 768 : 512; }

/// Sizes are in elements unless they say otherwise.
struct FwhtPlan {
  int64_t rows;
  int tiles;
  int n;                       // of a row: order << bits
  int bits;                    // of a segment
  int row_tiles;               // mma tiles of rows that a warp multiplies
  int order;                   // rows of X, a multiple of 4
  int steps;                   // of the product: mma tiles of the order
  int bands;                   // warps that share the rows of F^T
  int groups;                  // of kGroupColumns columns, of a block
  int side;                    // rows of x in a tile, side by side
  bool alone;                  // a warp needs no other one
  int plane_bytes, raw_pitch;  // of an operand, and of a row of it
  int buffer_bytes;            // between the two buffers of the operand; 0: there is one
  int pitch;                   // of a row of the exchange
  int warp_units;              // chunks that a warp loads
  int table_at, raw_at, exchange_at, slots_at, shared_bytes, threads;
  const int8_t* factor;
  int factor_order, log_sylvester;  // K, q
  float scale;
  FastDiv by_order, by_bands, by_steps, by_words;
};

/// What a launch asks for.
struct FwhtRequest {
  const HadamardMatrix& matrix;
  int64_t rows, n;
  bool dense;  // rows follow each other
  int areas;   // of shared memory of an operand's size: inputs or planes
  int slots;   // of the sink, a row
  int slot_bytes;
  int log_n;  // p of n = K 2^p
};

/// Words of 32 signs in a row of F, odd against bank conflicts.
__host__ __device__ constexpr int sign_words(int order) { return (order + 31) / 32 | 1; }

inline int align_up(int x, int to) { return (x + to - 1) / to * to; }

/// The order and the segment, and what follows from them.
inline bool plan_matrix(FwhtPlan& p, const FwhtRequest& r, int bits, int row_tiles) {
  const HadamardMatrix& m = r.matrix;
  const int64_t order = bits > r.log_n ? 0 : m.factor_order << (r.log_n - bits);
  if (order == 0 || order > kMostOrder || order % 4 != 0) return false;
  p = FwhtPlan{};
  p.rows = r.rows;
  p.n = static_cast<int>(r.n);
  p.bits = bits;
  p.row_tiles = row_tiles;
  p.order = static_cast<int>(order);
  p.steps = (p.order + kMmaRows - 1) / kMmaRows;
  p.bands = (p.steps + row_tiles - 1) / row_tiles;
  p.factor = m.factor;
  p.factor_order = static_cast<int>(m.factor_order);
  p.log_sylvester = r.log_n - bits;
  p.scale = m.scale;
  p.by_order = FastDiv(p.order);
  p.by_bands = FastDiv(p.bands);
  p.by_steps = FastDiv(p.steps);
  p.by_words = FastDiv(sign_words(p.order));
  return true;
}

/// Places a tile in shared memory: table, operand, exchange, slots. The exchange lies over the
/// operand's planes but the first: see fwht_kernel.
inline void place_tile(FwhtPlan& p, const FwhtRequest& r, int buffers) {
  p.raw_pitch = p.groups * kGroupColumns * 2 + 16;
  p.pitch = p.groups * kPaddedGroup;
  if (p.pitch % (2 * kBankStep) != kBankStep) p.pitch += kBankStep;
  p.plane_bytes = p.order * p.raw_pitch;
  p.buffer_bytes = buffers == 2 ? p.plane_bytes : 0;
  p.raw_at = p.bands * p.steps * kWarp * 4 + kZeroBytes;
  p.exchange_at = p.raw_at + buffers * p.plane_bytes;
  const int exchange = p.order * std::max(p.pitch, sign_words(p.order)) * 4;
  p.slots_at = p.exchange_at + align_up(std::max(exchange, (r.areas - 1) * p.plane_bytes), 16);
  p.shared_bytes = p.slots_at + align_up(2 * p.side * r.slots * r.slot_bytes, 16);
}

inline int blocks_of_processor(const FwhtPlan& p, const DeviceLimits& device) {
  return std::min(device.processor_shared_bytes / (p.shared_bytes + kReservedSharedBytes),
                  max_threads(p.row_tiles) / p.threads);
}

/// A plan with these parameters, if there is one.
inline bool plan_tile(FwhtPlan& p, const FwhtRequest& r, const DeviceLimits& device, int bits,
                      int row_tiles, int buffers) {
  if ((row_tiles == 1 && bits == kMostBits) || (row_tiles == 2 && bits < kColumnBits)) return false;
  if ((buffers == 2 && r.areas > 1) || (!r.dense && bits < kColumnBits)) return false;
  if (!plan_matrix(p, r, bits, row_tiles)) return false;
  const int wide = bits > kColumnBits ? 1 << (bits - kColumnBits) : 1;       // groups of a row
  const int per_group = bits < kColumnBits ? 1 << (kColumnBits - bits) : 1;  // rows of a group
  const bool alone = p.bands == 1 && wide == 1 && r.slots <= 1 && r.areas == 1;
  int beside = std::max(1, kTileWarps / (p.bands * wide));
  // A thread's rows of F^T X are of one row of x, and a warp's chunks too.
  const int items = 4 * row_tiles / wide;
  if (!r.dense || (!alone && p.order / 4 % items != 0)) beside = 1;
  if (!alone && bits >= kColumnBits && p.n % (32 * 4 * row_tiles * kChunk) != 0) beside = 1;
  const int64_t fair = ceil_div(ceil_div(r.rows, device.processors), per_group);
  while (beside > 1 && beside / 2 >= fair) beside /= 2;
  p.alone = alone;
  p.groups = beside * wide;
  p.side = beside * per_group;
  p.tiles = static_cast<int>(ceil_div(r.rows, p.side));
  p.threads = p.bands * p.groups * kWarp;
  p.warp_units = alone ? per_group * p.n / kChunk : 4 * row_tiles * kWarp;
  if (p.threads > max_threads(row_tiles)) return false;
  place_tile(p, r, buffers);
  return p.shared_bytes <= device.block_shared_bytes;
}

/// About the cost of an element: steps of the product, those of padding too, more where few warps
/// hide each other's latency, or where few tiles wait for one thread's work; barriers, which count
/// less where little runs; and what a block does once for its tiles, the signs of F. The numbers
/// were fitted on an H200 to all plans of 396 cases, 1 row and more of 576 ... 28672: those chosen
/// take 1.3 % longer than the best ones.
inline float cost_of(const FwhtPlan& p, const FwhtRequest& r, const DeviceLimits& device) {
  const auto f = [](int64_t x) { return static_cast<float>(x); };
  const int most = std::max(1, blocks_of_processor(p, device));
  const int64_t blocks = std::min<int64_t>(most, ceil_div(p.tiles, device.processors));
  const float turns = f(p.tiles) / f(most * device.processors);
  const float rows = f(p.bands * p.row_tiles * kMmaRows) / f(p.order);
  const float product =
      rows * (0.2f + f(p.steps)) * (1.0f + 7.0f / f(blocks * p.threads / kWarp * p.row_tiles));
  const bool waits = p.row_tiles == 2 && p.tiles <= device.processors;
  const float barriers = p.alone ? 0.0f : r.slots > 0 ? 1.75f : 1.3f * std::min(1.0f, turns / 8);
  const float once = 0.006f * f(p.order) / std::max(turns, 1.0f / 3);
  return ((waits ? 1.3f : 1.0f) * product + barriers) * (p.buffer_bytes == 0 ? 1.01f : 1.0f) + once;
}

/// Plans fwht_kernel. Returns false where the shape needs another kernel.
inline bool plan_fwht(FwhtPlan& p, const FwhtRequest& r) {
  const DeviceLimits device = device_limits();
  float best = 0.0f;
  FwhtPlan found{};
  for (int bits = kLeastBits; bits <= kMostBits; ++bits) {
    for (int option = 0; option < 4; ++option) {
      if (!plan_tile(p, r, device, bits, 1 + option % 2, 2 - option / 2)) continue;
      const float cost = cost_of(p, r, device);
      if (found.tiles == 0 || cost < best) {
        best = cost;
        found = p;
      }
    }
  }
  p = found;
  return p.tiles > 0;
}

/// Blocks of a launch: as many as run at the same time.
inline int64_t fwht_blocks(const FwhtPlan& p) {
  const DeviceLimits device = device_limits();
  const int64_t most = int64_t{std::max(1, blocks_of_processor(p, device))} * device.processors;
  return std::min(int64_t{p.tiles}, most);
}

/// A request, if the matrix is one that the kernels know.
inline bool can_transform(const HadamardMatrix& m, int64_t rows, int64_t n, int& log_n) {
  if (m.size != n || rows > (int64_t{1} << 30)) return false;
  if (m.factor_order > 1 && m.factor_order % 4 != 0) return false;
  log_n = 0;
  while (m.factor_order << log_n < n) ++log_n;
  return true;
}

}  // namespace quarot::cuda
