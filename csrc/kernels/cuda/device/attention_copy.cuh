// How the decode attention (cuda/attention.cu) gets a cache's keys and values: each warp copies its
// own by cp.async into a ring of stages in shared memory, kKeys a step: their codes, swizzled
// (Config), then the scales and zeros as they are.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/device/attention_config.cuh"
#include "kernels/cuda/device/attention_plan.cuh"
#include "kernels/cuda/device/reduce.cuh"

namespace quarot::cuda::decode {

/// Copies a warp's keys of a sequence and cache head into its ring, one step after the other.
template <class C>
class Copier {
 public:
  __device__ __forceinline__ Copier(const AttentionArgs& a, unsigned char* ring, int b, int head)
      : a_(a), ring_(shared_address(ring)), lane_(threadIdx.x % kWarp), b_(b), head_(head) {
    // Chunks of 16 bytes of k_scale, v_scale, k_zero, v_zero: a lane each.
    const bool scales = lane_ < 2 * kScaleChunks;
    const int index = scales ? lane_ : lane_ - 2 * kScaleChunks;
    const int count = scales ? kScaleChunks : kZeroChunks;
    const bool value = index >= count;
    const char* base = scales ? reinterpret_cast<const char*>(value ? a.v.scale : a.k.scale)
                              : reinterpret_cast<const char*>(value ? a.v.zero : a.k.zero);
    const int chunk = index - (value ? count : 0);
    raw_shift_ = scales ? 1 : 0;
    raw_half_ = chunk / (scales ? 2 : 1);
    raw_ = base + chunk * 16;
    if constexpr (C::kPaged) {
      raw_ -= raw_half_ * kPageMultiple << raw_shift_;
    } else {
      const int64_t slot = slot_of(0);
      offset_ = slot * C::kRowBytes + lane_ * 16;
      raw_ += slot << raw_shift_;
    }
    aligned_ = __all_sync(kAllLanes, reinterpret_cast<uintptr_t>(raw_) % 16 == 0 ||
                                         lane_ >= 2 * (kScaleChunks + kZeroChunks));
  }

  /// Starts the copies of the next step, `key` and those after it, to `stage` of the ring, as one
  /// group. The keys from `end` on may be anything.
  __device__ __forceinline__ void start(int key, int end, int ring_stage) {
    const uint32_t stage = ring_ + ring_stage;
    if constexpr (C::kPaged) {
      if (key < end) start_paged(stage, key, end);
    } else if (key < end && key + C::kKeys <= a_.capacity && aligned_) {
      const int64_t from = offset_ + int64_t{key} * C::kRowBytes;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        cp_async_16(stage + place(i), a_.k.codes + from + i * 16 * kWarp);
        cp_async_16(stage + place(i) + C::kCodeBytes, a_.v.codes + from + i * 16 * kWarp);
      }
      if (lane_ < 2 * (kScaleChunks + kZeroChunks)) {
        cp_async_16(stage + 2 * C::kCodeBytes + lane_ * 16, raw_ + (key << raw_shift_));
      }
    } else if (key < end) {
      start_partly(stage, key, end);
    }
    cp_async_commit();
  }

 private:
  static constexpr int kCopies = C::kCodeBytes / 16 / kWarp;
  static constexpr int kScaleChunks = C::kKeys / 8, kZeroChunks = C::kKeys / 16;
  static constexpr int kHalves = C::kKeys / static_cast<int>(kPageMultiple);
  static_assert(kHalves == 1 || kHalves == 2);

  __device__ __forceinline__ int place(int i) const {
    const int chunk = i * kWarp + lane_;
    return (chunk ^ C::swizzle(chunk * 16 / C::kRowBytes)) * 16;
  }

  /// The slot of a key below end, or -1: the block table names a block that there is not.
  __device__ __forceinline__ int64_t slot_of(int key) const {
    if constexpr (C::kPaged) {
      const TokenPlace at = place_of(a_.pages, a_.kv_heads, a_.capacity, b_, key);
      return at.first < 0 ? -1 : at.first + head_ * at.apart;
    } else {
      return (int64_t{b_} * static_cast<int>(a_.kv_heads) + head_) * a_.capacity + key;
    }
  }

  __device__ __forceinline__ void start_paged(uint32_t stage, int first, int end) const {
    int64_t slot[kHalves];  // of the 16 keys from there on
    bool there = first + C::kKeys <= end && aligned_;
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const int key = first + h * static_cast<int>(kPageMultiple);
      slot[h] = key < end ? slot_of(key) : -1;
      there = there && slot[h] >= 0;
    }
    if (!there) return start_partly(stage, first, end);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int half = (i * kWarp + lane_) * 16 / C::kRowBytes / static_cast<int>(kPageMultiple);
      const int64_t from =
          (half == 0 ? slot[0] : slot[kHalves - 1] - kPageMultiple) * C::kRowBytes +
          (i * kWarp + lane_) * 16;
      cp_async_16(stage + place(i), a_.k.codes + from);
      cp_async_16(stage + place(i) + C::kCodeBytes, a_.v.codes + from);
    }
    if (lane_ < 2 * (kScaleChunks + kZeroChunks)) {
      cp_async_16(stage + 2 * C::kCodeBytes + lane_ * 16,
                  raw_ + ((raw_half_ == 0 ? slot[0] : slot[kHalves - 1]) << raw_shift_));
    }
  }

  /// The same for any keys: some beyond the end, in no block, or at odd addresses.
  __device__ __forceinline__ void start_partly(uint32_t stage, int first, int end) const {
#pragma unroll 1
    for (int i = 0; i < kCopies; ++i) {
      const int at = (i * kWarp + lane_) * 16, key = first + at / C::kRowBytes;
      const int64_t slot = key < end ? slot_of(key) : -1;
      const int64_t from = slot < 0 ? 0 : slot * C::kRowBytes + at % C::kRowBytes;
      cp_async_16_or_zero(stage + place(i), a_.k.codes + from, slot >= 0);
      cp_async_16_or_zero(stage + place(i) + C::kCodeBytes, a_.v.codes + from, slot >= 0);
    }
    if (lane_ >= C::kKeys) return;
    constexpr uint16_t kNaN16 = 0x7e00;  // whoever sees a key in no block shall know
    const bool in = first + lane_ < end;
    const int64_t slot = in ? slot_of(first + lane_) : -1;
    const uint16_t none = in ? kNaN16 : uint16_t{0};
    unsigned char* raw =
        dynamic_shared() + (stage - shared_address(dynamic_shared())) + 2 * C::kCodeBytes;
    auto* scales = reinterpret_cast<uint16_t*>(raw);
    scales[lane_] = slot >= 0 ? a_.k.scale[slot] : none;
    scales[C::kKeys + lane_] = slot >= 0 ? a_.v.scale[slot] : none;
    unsigned char* zeros = raw + C::kKeys * 4;
    zeros[lane_] = slot >= 0 ? a_.k.zero[slot] : uint8_t{0};
    zeros[C::kKeys + lane_] = slot >= 0 ? a_.v.zero[slot] : uint8_t{0};
  }

  const AttentionArgs& a_;
  uint32_t ring_;
  int lane_, b_, head_;
  int64_t offset_;            // of the lane's first chunk of key 0 in the codes, unless paged
  const char* raw_;           // the lane's chunk of key 0's step, in a paged cache of slot 0's
  int raw_half_, raw_shift_;  // of the step's 16 keys; log2 of a key's bytes there
  bool aligned_;
};

/// Brings the first of a block's keys into the L2. Nothing comes of it if `keys` are not yet known.
template <class C>
__device__ __forceinline__ void prefetch(const AttentionArgs& a, const RowsOfBlock& rows,
                                         const Keys& keys) {
  if constexpr (C::kPaged) return;
  constexpr int kMostSteps = 4, kLineScales = 64, kLineZeros = 128;  // lines of 128 bytes
  const int count = min(keys.end - keys.begin, kMostSteps * C::kBlockKeys);
  if (count <= 0) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t slot = (rows.b * a.kv_heads + rows.head) * a.capacity + keys.begin;
  const KvCacheView& half = warp % 2 == 0 ? a.k : a.v;
  if (warp < 2) {
    if (lane == 0) bulk_prefetch_l2(half.codes + slot * C::kRowBytes, count * C::kRowBytes);
  } else {
    if (lane * kLineScales < count) prefetch_l2(half.scale + slot + lane * kLineScales);
    if (lane * kLineZeros < count) prefetch_l2(half.zero + slot + lane * kLineZeros);
  }
}

}  // namespace quarot::cuda::decode
