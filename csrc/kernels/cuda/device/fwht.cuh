// The Hadamard transform of rows, for every kernel that contains one.
//
// Maths. A row is a matrix X [order][segment], order = K 2^q, segment = 2^bits, and out = F^T X (I
// (x) H) with F = H_K (x) H_2^q and H = H_2^bits. F^T X is a product on tensor cores with the row's
// elements as they are: +-1 times 16 bits, summed in fp32, is exact. H follows as butterflies in
// fp32.
//
// Layout and parallelisation. A tile is `side` rows, their X side by side. A warp multiplies 16
// row_tiles rows of F^T by 64 columns of X: then a lane has bit 0 and bits 3 to 5 of the columns,
// does their butterflies, and writes to shared memory; from there a lane takes, of a row of X,
// 8 neighbours and those that differ in bits 6 and up, and does bits 1, 2, 6 ... Small blocks, many
// a multiprocessor: while one waits others work. The next tile comes by asynchronous copies
// during the second half.
//
// Bound: memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/device/fwht_plan.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/vec.cuh"

namespace quarot::cuda {

__device__ __forceinline__ void butterfly(float& a, float& b) {
  const float sum = a + b;
  b = a - b;
  a = sum;
}

/// use(signs_at): signs_at(k, m) are the signs of F[k][m] and the next three, the highest bits of
/// four bytes. F is data.
template <class Use>
__device__ __forceinline__ void with_signs(const FwhtPlan& p, const Use& use) {
  const int q = p.log_sylvester;
  const auto sylvester = [low = (1 << q) - 1](int k, int m) {
    const int y = k & low;
    return (y & 1 ? 0x80008000u : 0) ^ (y & 2 ? 0x80800000u : 0) ^
           (__popc(y & m) & 1 ? 0x80808080u : 0);
  };
  if (p.factor_order == 1) {
    use(sylvester);
  } else if (q == 0 && reinterpret_cast<uintptr_t>(p.factor) % 4 == 0) {
    use([&](int k, int m) {
      return *reinterpret_cast<const uint32_t*>(p.factor + k * p.factor_order + m);
    });
  } else {
    use([&](int k, int m) {
      const int8_t* row = p.factor + (k >> q) * p.factor_order;
      uint32_t signs = sylvester(k, m);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        signs ^= (static_cast<uint32_t>(row[(m + i) >> q]) & 0x80u) << 8 * i;
      return signs;
    });
  }
}

/// Signs of F, one a bit: word [k][m / 32], rows of sign_words(order). F is read once a block.
__device__ __forceinline__ void make_bits(const FwhtPlan& p, uint32_t* bits) {
  const int words = sign_words(p.order);
  with_signs(p, [&](auto signs_at) {
    for (int e = threadIdx.x; e < p.order * words; e += blockDim.x) {
      const int k = p.by_words(e), first = (e - k * words) * 32;
      uint32_t word = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int m = first + 4 * i;
        if (m < p.order) word |= (signs_at(k, m) >> 7 & 0x01010101u) * 0x10204080u >> 28 << 4 * i;
      }
      bits[e] = word;
    }
  });
}

/// Bit of F^T's sign table that belongs to word w of the operand A of row tile i; the sign of the
/// pair's second number is 16 higher.
constexpr int sign_place(int i, int w) { return w % 2 * 8 + w / 2 + i * 2; }

/// Signs of F^T as operands A: word [band][step][lane].
template <int kRowTiles>
__device__ __forceinline__ void make_sign_table(const FwhtPlan& p, const uint32_t* bits,
                                                uint32_t* table) {
  const int words = sign_words(p.order);
  for (int e = threadIdx.x; e < p.bands * p.steps * kWarp; e += blockDim.x) {
    const int lane = e % kWarp, tile = e / kWarp, band = p.by_steps(tile);
    const int m = band * kRowTiles * 16 + lane / 4;
    const int k = (tile - band * p.steps) * 16 + lane % 4 * 2;
    const uint32_t* row = bits + k * words + m / 32;
    const auto bytes = [&](int i) {  // bit 0 of byte j: the sign of column m + 8 j
      return k + i < p.order ? row[i * words] >> m % 32 & 0x01010101u : 0;
    };
    const uint32_t k0 = bytes(0), k1 = bytes(1), k8 = bytes(8), k9 = bytes(9);
    uint32_t word = __byte_perm(k0, k1, 0x5410) | __byte_perm(k8, k9, 0x5410) << 1;
    if (kRowTiles == 2) word |= __byte_perm(k0, k1, 0x7632) << 2 | __byte_perm(k8, k9, 0x7632) << 3;
    table[e] = word;
  }
}

/// What a thread has in the end: of kItems rows of X, 4 apart, 8 neighbours and their likes in bits
/// 6 and up, all of one row of the tile.
template <int kSegmentBits, int kRowTiles>
struct Result {
  static constexpr int kBits = kSegmentBits;
  static constexpr int kInRow = kBits < 6 ? kBits - 3 : 3;  // bits of lane % 8 that are columns
  static constexpr int kTop = kBits > 6 ? kBits - 6 : 0;
  static constexpr int kParts = 1 << kTop;
  static constexpr int kItems = 4 * kRowTiles / kParts;
  float v[kItems][kParts][kChunk];
  int row;    // of the tile
  int first;  // its first element
  int items;  // how many there are

  /// Element of a part after the first one: a constant, so that addresses need one addition.
  static __device__ __forceinline__ constexpr int offset(int item, int part) {
    return (item << (kBits + 2)) + part * kGroupColumns;
  }
  __device__ __forceinline__ int at(int item, int part) const { return first + offset(item, part); }
};

/// Operands of the product: the elements themselves, or their three bf16 summands, the largest
/// first, whose sum is an fp32 number exactly.
template <class Source>
struct Operand {
  static constexpr bool kDirect = Source::kDtype != DType::f32;
  static constexpr int kPlanes = kDirect ? 1 : 3;
  static constexpr int kInputs = Source::kInputs;  // units of 16 bytes a chunk
  static constexpr int kAreas = kInputs > kPlanes ? kInputs : kPlanes;
  static constexpr DType kDtype = kDirect ? Source::kDtype : DType::bf16;
};

/// v -> pairs of bf16, and what is left.
__device__ __forceinline__ uint4 take_bf16(float (&v)[kChunk]) {
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    w[i] = pack_bf16x2(v[2 * i], v[2 * i + 1]);
    v[2 * i] -= bf16_low(w[i]);
    v[2 * i + 1] -= bf16_high(w[i]);
  }
  return {w[0], w[1], w[2], w[3]};
}

// ---- Steps of a tile ----------------------------------------------------------------------------

/// acc = 16 kRowTiles rows of F^T times 64 columns of X. signs: this lane's word of the first step;
/// from: its row of the first plane for ldmatrix; zeros: what rows beyond the order are.
template <DType kDtype, int kPlanes, int kRowTiles>
__device__ __forceinline__ void multiply_planes(float (&acc)[kRowTiles][8][4], const FwhtPlan& p,
                                                const uint32_t* signs, uint32_t from,
                                                uint32_t zeros) {
  const int row = threadIdx.x % 16;
  const auto multiply_step = [&](auto first, auto plane, auto planes, int step) {
    const uint32_t bits = signs[step * kWarp];
    uint4 a[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const auto word = [&](int w) {
        return (bits << (15 - sign_place(i, w)) & 0x80008000u) | sign_bits<kDtype>(1) * 0x10001u;
      };
      a[i] = {word(0), word(1), word(2), word(3)};
    }
    const bool beyond = step * 16 + row >= p.order;
    const int plane_bytes = beyond ? 0 : p.plane_bytes;
    uint32_t at = beyond ? zeros : from + static_cast<uint32_t>(step * 16 * p.raw_pitch);
    at += static_cast<uint32_t>(plane * plane_bytes);
#pragma unroll
    for (int o = 0; o < planes; ++o, at -= static_cast<uint32_t>(plane_bytes)) {
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, at + static_cast<uint32_t>(j * kChunk * 2));
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          if (first && o == 0) {
            mma_first<kDtype>(acc[i][j], a[i], b[0], b[1]);
            mma_first<kDtype>(acc[i][j + 1], a[i], b[2], b[3]);
          } else {
            mma<kDtype>(acc[i][j], a[i], b[0], b[1]);
            mma<kDtype>(acc[i][j + 1], a[i], b[2], b[3]);
          }
        }
      }
    }
  };
  const auto multiply = [&](auto first, auto plane, auto planes) {
    if (first) multiply_step(first, plane, planes, 0);
#pragma unroll 1
    for (int step = first ? 1 : 0; step < p.steps; ++step)
      multiply_step(std::false_type{}, plane, planes, step);
  };
  // The small ones first: tensor cores cut what they add to, so that large sums lose a bit a step.
  using std::integral_constant;
  constexpr int kSmall = kPlanes > 1 ? kPlanes - 1 : 1;
  multiply(std::true_type{}, integral_constant<int, kPlanes - 1>{},
           integral_constant<int, kSmall>{});
  if constexpr (kPlanes > 1)
    multiply(std::false_type{}, integral_constant<int, 0>{}, integral_constant<int, 1>{});
}

/// Bits 0, 3, 4 and 5 of the columns.
template <int kBits, int kRowTiles>
__device__ __forceinline__ void first_butterflies(float (&acc)[kRowTiles][8][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      butterfly(acc[i][j][0], acc[i][j][1]);
      butterfly(acc[i][j][2], acc[i][j][3]);
    }
#pragma unroll
    for (int b = 0; b < 3; ++b) {
      if (kBits <= 3 + b) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j >> b & 1) continue;
#pragma unroll
        for (int c = 0; c < 4; ++c) butterfly(acc[i][j][c], acc[i][j | 1 << b][c]);
      }
    }
  }
}

/// The exchanged columns of `items` rows, 4 apart; what is beyond them may be anything.
template <class R>
__device__ __forceinline__ void read_lines(R& result, const float* line, int items, int pitch) {
#pragma unroll
  for (int r = 0; r < R::kItems; ++r) {
    if (r > 0 && r < items) line += 4 * pitch;
    auto& v = result.v[r];
#pragma unroll
    for (int c = 0; c < R::kParts; ++c)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float4 w = *reinterpret_cast<const float4*>(line + c * kPaddedGroup + h * 4);
        v[c][4 * h] = w.x, v[c][4 * h + 1] = w.y, v[c][4 * h + 2] = w.z, v[c][4 * h + 3] = w.w;
      }
  }
}

/// Bits 1, 2, 6 and up; kScaled: the result times `scale`.
template <bool kScaled, class R>
__device__ __forceinline__ void last_butterflies(R& result, float scale) {
  const auto last = [&](float& a, float& b) {
    if constexpr (kScaled) {
      const float c = b * scale;
      b = __fmaf_rn(a, scale, -c);
      a = __fmaf_rn(a, scale, c);
    } else {
      butterfly(a, b);
    }
  };
#pragma unroll
  for (int r = 0; r < R::kItems; ++r) {
    auto& v = result.v[r];
#pragma unroll
    for (int c = 0; c < R::kParts; ++c)
#pragma unroll
      for (int b = 2; b <= 4; b *= 2)
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          if ((i & b) != 0) continue;
          if (b == 4 && R::kTop == 0) {
            last(v[c][i], v[c][i | b]);
          } else {
            butterfly(v[c][i], v[c][i | b]);
          }
        }
#pragma unroll
    for (int b = 0; b < R::kTop; ++b)
#pragma unroll
      for (int c = 0; c < R::kParts; ++c) {
        if ((c >> b & 1) != 0) continue;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          if (b == R::kTop - 1) {
            last(v[c][i], v[c | 1 << b][i]);
          } else {
            butterfly(v[c][i], v[c | 1 << b][i]);
          }
        }
      }
  }
}

// ---- The kernel ---------------------------------------------------------------------------------

template <class Source, int kBits, int kRowTiles, class Sink>
__global__ void __launch_bounds__(max_threads(kRowTiles), 1)
    fwht_kernel(const __grid_constant__ FwhtPlan p, const Source source, const Sink sink) {
  constexpr DType kDtype = Operand<Source>::kDtype;
  constexpr int kPlanes = Operand<Source>::kPlanes, kInputs = Operand<Source>::kInputs;
  using R = Result<kBits, kRowTiles>;
  constexpr int kSegment = 1 << kBits;
  constexpr int kTop = R::kTop;
  constexpr int kUnits = 4 * kRowTiles;  // chunks a thread loads
  unsigned char* shared = dynamic_shared();
  auto* table = reinterpret_cast<uint32_t*>(shared + p.table_at);
  auto* slots = shared + p.slots_at;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = p.by_bands(warp), band = warp - group * p.bands;

  // A warp loads neighbours, chunk j of a lane 32 chunks after the one before it. Where they go: in
  // rows of at least kGroupColumns a step of chunks is one of rows.
  const int first_unit = p.warp_units * warp + lane;
  const int most_units = p.alone ? p.warp_units * (warp + 1) : p.side * (p.n / kChunk);
  const uint32_t raw = shared_address(shared + p.raw_at), zeros = raw - kZeroBytes;
  const auto place_of = [&](int u) {
    const int line = u >> (kBits - 3), column = u & (kSegment / kChunk - 1);
    const int row = p.by_order(line), k = line - row * p.order;
    return static_cast<uint32_t>(k * p.raw_pitch + (row * kSegment + column * kChunk) * 2);
  };
  constexpr bool kLinear = kBits >= 6;
  constexpr int kLine = kBits > 8 ? 1 << (kBits - 8) : 1;   // chunks of a thread in a row
  constexpr int kLines = kBits < 8 ? 1 << (8 - kBits) : 1;  // rows from one to the next
  uint32_t places[kLinear ? 1 : kUnits];
#pragma unroll
  for (int j = 0; j < (kLinear ? 1 : kUnits); ++j)
    places[j] = raw + place_of(first_unit + j * kWarp);
  const auto place = [&](int j) {
    if constexpr (!kLinear) {
      return places[j];
    } else {
      return places[0] + static_cast<uint32_t>(j / kLine * kLines * p.raw_pitch +
                                               j % kLine * kWarp * kChunk * 2);
    }
  };
  /// Units that a tile has, of this thread's from the first one on.
  const auto units_of = [&](int tile) {
    const int64_t left = p.rows - int64_t{tile} * p.side;
    const int units = left < p.side ? static_cast<int>(left) * (p.n / kChunk) : most_units;
    return (units < most_units ? units : most_units) - first_unit;
  };
  /// Asks for one of the inputs of a tile.
  const auto load = [&](int tile, int input, int buffer) {
    const int units = units_of(tile);
    const char* from = source.row(int64_t{tile} * p.side) + source.input_offset(input) +
                       first_unit * Source::kUnitBytes;
    const uint32_t to = static_cast<uint32_t>(input * p.plane_bytes + buffer);
#pragma unroll
    for (int j = 0; j < kUnits; ++j)
      if (j * kWarp < units) cp_async_16(place(j) + to, from + j * kWarp * Source::kUnitBytes);
  };
  /// The thread's own chunks: inputs -> planes.
  const auto prepare = [&](int tile) {
    const int units = units_of(tile);
    uint32_t at = place(0);
    // One at a time: of few rows nearly all of the time was taken by fetching instructions.
    constexpr int kTogether = kLinear ? 1 : kUnits;
#pragma unroll kTogether
    for (int j = 0; j < kUnits; ++j) {
      if (j * kWarp < units) {
        float v[kChunk];
        uint4 in[kInputs];
#pragma unroll
        for (int i = 0; i < kInputs; ++i) in[i] = load_shared(at + i * p.plane_bytes);
        source.values(v, in);
#pragma unroll
        for (int o = 0; o < kPlanes; ++o) store_shared(at + o * p.plane_bytes, take_bf16(v));
      }
      if constexpr (kLinear) {
        at += static_cast<uint32_t>((j + 1) % kLine != 0
                                        ? kWarp * kChunk * 2
                                        : kLines * p.raw_pitch - (kLine - 1) * kWarp * kChunk * 2);
      } else if (j + 1 < kUnits) {
        at = places[j + 1];
      }
    }
  };
  const auto sync = [&] {  // barriers with numbers known at run time would be 16 a block
    if (p.alone) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  };

  for (int i = threadIdx.x * 4; i < kZeroBytes; i += blockDim.x * 4)
    *reinterpret_cast<uint32_t*>(shared + p.raw_at - kZeroBytes + i) = 0;
  sink.clear(p, slots);
  auto* bits = reinterpret_cast<uint32_t*>(shared + p.exchange_at);
  if (p.factor_order == 1) make_bits(p, bits);
  start_next_grid();
  wait_for_previous_grid();
  int tile = blockIdx.x;
  if (tile < p.tiles) load(tile, 0, 0);
  if (p.factor_order > 1) make_bits(p, bits);
  __syncthreads();
  make_sign_table<kRowTiles>(p, bits, table);
  __syncthreads();
  const auto load_rest = [&](int tile) {
#pragma unroll
    for (int i = 1; i < kInputs; ++i) load(tile, i, 0);
  };
  if (tile < p.tiles) load_rest(tile);

  const uint32_t b_at =
      raw + static_cast<uint32_t>(lane % 16 * p.raw_pitch +
                                  (group * kGroupColumns + lane / 16 * kChunk) * 2);
  float* to = reinterpret_cast<float*>(shared + p.exchange_at) +
              (band * kRowTiles * 16 + lane / 4) * p.pitch + group * kPaddedGroup + lane % 4 * 2;
  const int rows_left = p.order - (band * kRowTiles * 16 + lane / 4);

  // Where its second half begins.
  const int u = lane % 8, index = warp * R::kItems * 4 + lane / 8;
  const int beside = p.alone ? warp : p.by_order(index);
  const int m = p.alone ? lane / 8 : index - beside * p.order;
  const int items = beside < p.groups >> kTop ? (p.order - m + 3) / 4 : 0;
  const int row = items == 0 ? 0 : (beside << (3 - R::kInRow)) + (u >> R::kInRow);
  const int first = row * p.n + m * kSegment + (u & ((1 << R::kInRow) - 1)) * kChunk;
  const float* lines = reinterpret_cast<const float*>(shared + p.exchange_at) +
                       (items > 0 ? m * p.pitch + (beside << kTop) * kPaddedGroup : 0) + u * 8 +
                       u / 4 * 4;

  for (int turn = 0; tile < p.tiles; tile += static_cast<int>(gridDim.x), turn ^= 1) {
    cp_async_wait_all();
    if constexpr (kPlanes > 1) prepare(tile);
    sync();
    const int next = tile + static_cast<int>(gridDim.x), buffer = turn * p.buffer_bytes;
    if (p.buffer_bytes > 0 && next < p.tiles) load(next, 0, p.buffer_bytes - buffer);
    float acc[kRowTiles][8][4];
    multiply_planes<kDtype, kPlanes, kRowTiles>(acc, p, table + band * p.steps * kWarp + lane,
                                                b_at + static_cast<uint32_t>(buffer),
                                                zeros + lane / 16 * 16);
    if constexpr (kPlanes > 1) sync();  // the exchange lies over planes
    first_butterflies<kBits, kRowTiles>(acc);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (i * 16 + h * 8 >= rows_left) continue;
        float* row = to + (i * 16 + h * 8) * p.pitch;
#pragma unroll
        for (int j = 0; j < 8; ++j)
          *reinterpret_cast<float2*>(row + j * 8 + j / 4 * 4) = {acc[i][j][2 * h],
                                                                 acc[i][j][2 * h + 1]};
      }
    sync();
    if (p.buffer_bytes == 0 && next < p.tiles) load(next, 0, 0);
    R result;
    result.row = row;
    result.first = first;
    result.items = int64_t{tile} * p.side + row < p.rows ? items : 0;
    read_lines(result, lines, items, p.pitch);
    if constexpr (kPlanes > 1) {
      sync();
      if (next < p.tiles) load_rest(next);
    }
    last_butterflies<Sink::kScaled>(result, p.scale);
    sink.take(p, result, slots, tile, turn);
  }
}

template <class Source, class Sink>
bool launch_fwht(const HadamardMatrix& matrix, int64_t rows, int64_t n, const Source& source,
                 const Sink& sink, int slots, Stream stream) {
  int log_n = 0;
  FwhtPlan p{};
  if (!can_transform(matrix, rows, n, log_n)) return false;
  const FwhtRequest request{
      matrix,           rows, n, rows == 1 || source.is_dense(n), Operand<Source>::kAreas, slots,
      Sink::kSlotBytes, log_n};
  if (!plan_fwht(p, request)) return false;
  const auto go = [&](auto kernel) {
    prefer_shared_memory(kernel);
    launch_early(kernel, fwht_blocks(p), p.threads, p.shared_bytes, stream, p, source, sink);
    return true;
  };
  switch (p.bits * 2 + p.row_tiles - 1) {
    case 6:
      return go(&fwht_kernel<Source, 3, 1, Sink>);
    case 8:
      return go(&fwht_kernel<Source, 4, 1, Sink>);
    case 10:
      return go(&fwht_kernel<Source, 5, 1, Sink>);
    case 12:
      return go(&fwht_kernel<Source, 6, 1, Sink>);
    case 13:
      return go(&fwht_kernel<Source, 6, 2, Sink>);
    case 14:
      return go(&fwht_kernel<Source, 7, 1, Sink>);
    case 15:
      return go(&fwht_kernel<Source, 7, 2, Sink>);
    case 16:
      return go(&fwht_kernel<Source, 8, 1, Sink>);
    case 17:
      return go(&fwht_kernel<Source, 8, 2, Sink>);
    case 19:
      return go(&fwht_kernel<Source, 9, 2, Sink>);
    default:
      return false;
  }
}

}  // namespace quarot::cuda
