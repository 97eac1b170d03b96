// Causal attention of a bf16 prompt over the quantized cache, by a processor that multiplies tiles
// of bf16 (tdpbf16ps: 16 x 32 by 32 x 16). Maths: attention.h; layouts: kv_cache.h.
//
// Everything is transposed, so that the lanes of a vector are queries: the softmax has no sums over
// lanes, and two keys' weights are one row of a tile as they are, side by side.
//
//   keys    tiles of 16 keys x 32 dimensions   } bf16, written once for all queries and the heads
//   values  tiles of 16 dimensions x 32 keys   } that share them; times scale * log2(e): the keys
//   for each head and 32 queries, 256 keys at a time up to the queries' own:
//     scores [keys, 32]  <-  keys * queries
//     weights            <-  2^(scores - maximum), bf16; running maximum and sum of each query
//     out [dim, 32]      <-  2^(maximum before - maximum) * out + values * weights
//
// Keys, values and weights are rounded to bf16, as torch's attention of bf16 does. A key or value
// whose scale is not finite makes NaN of the rows that see it, and of no other: such a key is NaN,
// the value 0. The bound is the vector unit: about 17 instructions for 16 weights.
#include <immintrin.h>

#include "kernels/attention.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/tiles.h"
#include "kernels/cpu/vec.h"

namespace quarot::cpu::QUAROT_ISA {
namespace {

constexpr int64_t kKeys = 256;  // whose scores are held: 32 KB
constexpr int64_t kTileDims = kTileBytes / 2;
/// Keys and values that are written out at a time, unless a head has more.
constexpr int64_t kHeadsBytes = int64_t{64} << 20;
constexpr float kLowest = -0x1.fffffep127f;  // below any score, and finite
constexpr float kLog2E = 0x1.715476p+0f;

/// Sizes that all heads of a call share; a head's keys, and values, are `elements` bf16.
struct Sizes {
  int64_t dim, keys, elements;  // head_dim in whole 32, seq in whole 32
};

/// A thread's memory.
struct Block {
  int32_t* q;        // tiles [dim / 32, 2] of 32 dimensions x 16 queries
  float* scores;     // [kKeys, 32]
  uint16_t* weight;  // tiles [kKeys / 32, 2] of 32 keys x 16 queries
  float* out;        // [dim, 32] unnormalised
  float* maximum;    // [32]
  float* sum;        // [32]
};

// ---- Keys and values as tiles -------------------------------------------------------------------

/// v [keys]  <-  codes [i, i + 16) of `valid` tokens' keys or values; zeros of the others.
QUAROT_INLINE void dequantize(I32 (&v)[kLanes], const uint8_t* codes, int bits_per_code,
                              int64_t head_dim, int64_t i, int64_t valid, const float* scale,
                              const int32_t* zero) {
  const int64_t count = head_dim - i < kLanes ? head_dim - i : kLanes;
  for (int64_t key = 0; key < kLanes; ++key) {
    const uint8_t* from = codes + (key * head_dim + i) * bits_per_code / 8;
    uint8_t tail[kLanes] = {};
    if (key >= valid || count < kLanes) [[unlikely]] {
      if (key < valid && count > 0) {
        __builtin_memcpy(tail, from, static_cast<size_t>(count * bits_per_code / 8));
      }
      from = tail;
    }
    const I32 code = bits_per_code == 4 ? load_u4(from) : load_u8(from);
    v[key] = bits(to_f32(code - i32(zero[key])) * f32(scale[key]));
  }
}

/// Sixteen keys and values from token `key` on, of which `valid` are there.
void write_sixteen(const AttentionArgs& a, const Sizes& sizes, uint16_t* keys, uint16_t* values,
                   int64_t slot, int64_t key, int64_t valid) {
  const F32 k_scale = load_upto<DType::f16>(a.k.scale, slot, slot + valid);
  const F32 v_scale = load_upto<DType::f16>(a.v.scale, slot, slot + valid);
  const F32 poison = (k_scale - k_scale) + (v_scale - v_scale);  // 0, or NaN
  float scale[2][kLanes];
  store(scale[0], k_scale * f32(a.scale * kLog2E) + poison);
  store(scale[1], select(equal(poison, poison), v_scale, f32(0)));
  int32_t zero[2][kLanes];
  uint8_t zeros[2][kLanes] = {};
  __builtin_memcpy(zeros[0], a.k.zero + slot, static_cast<size_t>(valid));
  __builtin_memcpy(zeros[1], a.v.zero + slot, static_cast<size_t>(valid));
  store(zero[0], load_u8(zeros[0]));
  store(zero[1], load_u8(zeros[1]));
  const int64_t at = slot * a.head_dim * a.bits / 8;
  for (int64_t i = 0; i < sizes.dim; i += kLanes) {
    I32 v[kLanes];
    dequantize(v, a.k.codes + at, a.bits, a.head_dim, i, valid, scale[0], zero[0]);
    uint16_t* to = keys + key * sizes.dim + i / kTileDims * kTile / 2 + i % kTileDims;
    for (int64_t r = 0; r < kLanes; ++r) store<DType::bf16>(to, r * kTileDims, from_bits(v[r]));
    dequantize(v, a.v.codes + at, a.bits, a.head_dim, i, valid, scale[1], zero[1]);
    transpose(v);
    to = values + i * sizes.keys + key / kTileDims * kTile / 2 + key % kTileDims;
    for (int64_t r = 0; r < kLanes; ++r) store<DType::bf16>(to, r * kTileDims, from_bits(v[r]));
  }
}

// ---- A block of queries -------------------------------------------------------------------------

/// 2^x for x <= 0, within 2^-18 of it; NaN stays.
QUAROT_INLINE F32 exp2(const F32& v) {
  const F32 x = max(f32(-150), v);  // in this order NaN passes
  const F32 n = rint(x), r = x - n;
  F32 p = f32(0.00958285201f);
  p = fma(p, r, f32(0.0559064262f));
  p = fma(p, r, f32(0.240240991f));
  p = fma(p, r, f32(0.693124175f));
  p = fma(p, r, f32(1.0f));
  return scale_by_power(p, n);
}

/// Weights of the keys [key, key + count) and of the 16 queries from `query` on, which are column
/// tile `half` of the block.
void weigh(const Block& t, int64_t half, int64_t query, int64_t key, int64_t count, int64_t dim) {
  constexpr int32_t kNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  float* scores = t.scores + half * kLanes;
  float* maximum = t.maximum + half * kLanes;
  const F32 before = load(maximum);
  F32 parts[4] = {before, before, before, before};  // chains of one would wait for each other
  const int64_t all = query - key + 1;              // keys that all of the queries see
  int64_t k = 0;
  for (; k + 4 <= count && k + 4 <= all; k += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) parts[i] = max(load(scores + (k + i) * kPair), parts[i]);
  }
  F32 most = max(max(parts[0], parts[1]), max(parts[2], parts[3]));  // passes over NaN
  for (; k < count; ++k) {
    const I32 hidden = greater(i32(static_cast<int32_t>(key + k - query)), load(kNumbers));
    const F32 score = select(hidden, f32(-__builtin_inff()), load(scores + k * kPair));
    store(scores + k * kPair, score);
    most = max(score, most);
  }
  F32 sum = f32(0);
  for (k = 0; k < count; k += 2) {
    const F32 low = exp2(load(scores + k * kPair) - most);
    const F32 high = exp2(load(scores + (k + 1) * kPair) - most);
    sum = sum + (low + high);
    // To the nearest bf16, ties away from zero.
    const I32 lower = bits(low) + i32(0x8000), upper = bits(high) + i32(0x8000);
    uint16_t* row = t.weight + (k / kTileDims * 2 + half) * kTile / 2 + k % kTileDims * kLanes;
    store_as(row, ((lower >> 16) & i32(0xffff)) | (upper & i32(-0x10000)));
  }
  const F32 factor = exp2(before - most);
  store(maximum, most);
  store(t.sum + half * kLanes, load(t.sum + half * kLanes) * factor + sum);
  float* out = t.out + half * kLanes;
  for (int64_t i = 0; i < dim; ++i) store(out + i * kPair, load(out + i * kPair) * factor);
}

/// Queries [query, query + 32) of head `head` of sequence b.
void attend(const AttentionArgs& a, const Sizes& sizes, const uint16_t* keys,
            const uint16_t* values, const Block& t, int64_t b, int64_t head, int64_t query) {
  const auto offset = [&](int64_t s) __attribute__((always_inline)) {
    return ((b * a.seq + s) * a.heads + head) * a.head_dim;
  };
  const int64_t left = a.seq - query, dim = sizes.dim;
  for (int64_t tile = 0; tile < dim / kTileDims * 2; ++tile) {
    const int64_t first = query + tile % 2 * kLanes, i = tile / 2 * kTileDims;
    const int64_t count = a.head_dim - i < kTileDims ? a.head_dim - i : kTileDims;
    I32 v[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) {
      uint16_t row[kTileDims] = {};
      if (first + r < a.seq) {
        __builtin_memcpy(row, static_cast<const uint16_t*>(a.q) + offset(first + r) + i,
                         static_cast<size_t>(count) * sizeof *row);
      }
      v[r] = load_as<I32>(row);
    }
    transpose(v);
    for (int64_t r = 0; r < kLanes; ++r) store(t.q + (tile * kLanes + r) * kLanes, v[r]);
  }
  for (int64_t i = 0; i < kPair; i += kLanes) {
    store(t.maximum + i, f32(kLowest));
    store(t.sum + i, f32(0));
  }
  for (int64_t i = 0; i < dim * kPair; i += kLanes) store(t.out + i, f32(0));
  before_tiles_read(t.q);
  const int64_t end = query + kPair;
  for (int64_t key = 0; key < end; key += kKeys) {
    const int64_t count = end - key < kKeys ? end - key : kKeys;
    for (int64_t k = 0; k < count; k += kPair) {
      multiply_tiles<uint16_t, true>(t.scores + k * kPair, keys + (key + k) * dim,
                                     kTileRows * dim * 2, t.q, dim * 2, false);
    }
    for (int64_t half = 0; half < 2; ++half) {
      weigh(t, half, query + half * kLanes, key, count, dim);
    }
    before_tiles_read(t.weight);
    for (int64_t i = 0; i < dim; i += kPair) {
      multiply_tiles<uint16_t, true>(t.out + i * kPair, values + i * sizes.keys + key * kTileRows,
                                     kTileRows * sizes.keys * 2, t.weight, count * 2, true);
    }
  }
  for (int64_t half = 0; half < 2 && half * kLanes < left; ++half) {
    const F32 inverse = f32(1) / load(t.sum + half * kLanes);
    for (int64_t i = 0; i < a.head_dim; i += kLanes) {
      I32 v[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) {
        v[r] = bits(load(t.out + (i + r) * kPair + half * kLanes) * inverse);
      }
      transpose(v);
      for (int64_t r = 0; r < kLanes && half * kLanes + r < left; ++r) {
        const int64_t at = offset(query + half * kLanes + r);
        store_upto<DType::bf16>(a.out, at + i, at + a.head_dim, from_bits(v[r]));
      }
    }
  }
}

}  // namespace

void attention_prefill(const AttentionArgs& a, const Executor& executor) {
  const int64_t blocks = ceil_div(a.seq, kPair), group = a.heads / a.kv_heads;
  Sizes sizes{ceil_div(a.head_dim, kTileDims) * kTileDims, blocks * kPair, 0};
  sizes.elements = sizes.dim * sizes.keys;
  const int64_t most = kHeadsBytes / 4 / sizes.elements;
  const int64_t heads = most < 1 ? 1 : most < a.kv_heads ? most : a.kv_heads;
  const Scratch scratch(heads * sizes.elements);
  const auto keys_of = [&](int64_t head) __attribute__((always_inline)) {
    return reinterpret_cast<uint16_t*>(scratch.data()) + head * 2 * sizes.elements;
  };
  for (int64_t b = 0; b < a.batch; ++b) {
    for (int64_t h = 0; h < a.kv_heads; h += heads) {
      const int64_t some = a.kv_heads - h < heads ? a.kv_heads - h : heads;
      const int64_t sixteens = sizes.keys / kLanes;
      parallel_rows(
          executor, some * sixteens, 2 * kLanes * sizes.dim, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
              const int64_t key = i % sixteens * kLanes, head = i / sixteens;
              const int64_t valid = a.seq - key < kLanes ? a.seq - key : kLanes;
              int64_t slot = 0;
              if (valid > 0) {
                const TokenPlace place = place_of(a.pages, a.kv_heads, a.capacity, b, key);
                slot = place.first + (h + head) * place.apart;
              }
              write_sixteen(a, sizes, keys_of(head), keys_of(head) + sizes.elements, slot, key,
                            valid > 0 ? valid : 0);
            }
          });
      parallel_rows(executor, some * group * blocks, kPair * a.seq * sizes.dim,
                    [&](int64_t begin, int64_t end) {
                      const Scratch q(kTileRows * sizes.dim), scores(kKeys * kPair);
                      const Scratch weight(kKeys * kPair / 2), out(sizes.dim * kPair),
                          rows(2 * kPair);
                      const Block block{reinterpret_cast<int32_t*>(q.data()),
                                        scores.data(),
                                        reinterpret_cast<uint16_t*>(weight.data()),
                                        out.data(),
                                        rows.data(),
                                        rows.data() + kPair};
                      const UseTiles tiles;
                      for (int64_t i = begin; i < end; ++i) {
                        // Later queries see more keys: blocks from both ends in turn give each
                        // thread its share.
                        const int64_t part = i % blocks, head = i / blocks;
                        const int64_t turn = part % 2 == 0 ? part / 2 : blocks - 1 - part / 2;
                        const uint16_t* keys = keys_of(head / group);
                        attend(a, sizes, keys, keys + sizes.elements, block, b, h * group + head,
                               turn * kPair);
                      }
                    });
    }
  }
}

}  // namespace quarot::cpu::QUAROT_ISA
