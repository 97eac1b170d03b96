// Attention for many queries by torch's own, on tiles of the dequantized cache. A tile is some
// sequences, or some cache heads of one, with all their keys; so memory stays bounded and every
// call has whole rows of scores. For CUDA.
//
// Where the caller knows that all sequences hold just the new tokens (`length` = seq, no mask, no
// narrower window), one causal call does it. Else a mask says what each query sees, as lengths are
// only on the device, and the heads of a group take turns: torch's kernels with a mask do not share
// keys among heads. With a window some queries at a time take the keys of theirs, counted from the
// end of each sequence. `length` is taken as true. Above 150 lines: one walk over tiles.
#pragma once

#include <algorithm>
#include <array>
#include <optional>

#include "kernels/attention.h"
#include "ops/checks.h"

namespace quarot::ops {

/// Bytes of the keys and values of a tile (one head of one sequence may be more), and of a mask
/// written out.
inline constexpr int64_t kKeysAndValuesBytes = int64_t{256} << 20;
inline constexpr int64_t kVisibleBytes = int64_t{64} << 20;
/// Queries that share keys, at least, if a window is narrow.
inline constexpr int64_t kLeastQueries = 256;

/// torch.nn.functional.scaled_dot_product_attention; all [batch, heads, tokens, head_dim].
inline Tensor torch_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                              const OptionalTensor& mask, bool causal, double scale, bool grouped) {
  using torch::stable::detail::from;
  std::array<StableIValue, 8> stack{from(q),
                                    from(k),
                                    from(v),
                                    from(mask),
                                    from(0.0),
                                    from(causal),
                                    from(std::optional<double>(scale)),
                                    from(grouped)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::scaled_dot_product_attention", "",
                                               stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

/// x[.., start, start + step, ...] along a dimension: `count` entries.
inline Tensor every(const Tensor& x, int64_t dim, int64_t start, int64_t count, int64_t step = 1) {
  using torch::stable::detail::from;
  std::array<StableIValue, 5> stack{from(x), from(dim), from(std::optional<int64_t>(start)),
                                    from(std::optional<int64_t>(start + (count - 1) * step + 1)),
                                    from(step)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::slice", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

/// Attention of many queries: `a` without `out` and the workspace, whose q is `q`; `length`: that
/// of all sequences, if the host knows it.
class Prefill {
 public:
  Prefill(const Tensor& q, const AttentionArgs& a, std::optional<int64_t> length, double scale)
      : q_(q), a_(a), length_(length), scale_(scale), scope_(q), group_(a.heads / a.kv_heads) {
    tokens_ = length.value_or(a.capacity);
    if (a.mask != nullptr && a.mask_keys < tokens_) tokens_ = a.mask_keys;
    windowed_ = a.window < tokens_;
    causal_ = a.mask == nullptr && length == a.seq && !windowed_;
    queries_ = a.seq;
    if (windowed_) {
      // As many queries as keys before them: half of the products are within the window.
      queries_ = std::min(a.seq, std::max(a.window, kLeastQueries));
      tokens_ = std::min(tokens_, a.window - 1 + queries_);
    }
  }

  Tensor run() {
    out_ = new_tensor(q_, {a_.batch, a_.seq, a_.heads, a_.head_dim}, q_.scalar_type());
    if (tokens_ == 0) return torch::stable::zero_(out_);
    const int64_t head_bytes = 2 * tokens_ * a_.head_dim * (a_.dtype == DType::f32 ? 4 : 2);
    const int64_t most = std::max<int64_t>(kKeysAndValuesBytes / head_bytes, 1);
    const int64_t heads = std::min(most, a_.kv_heads);
    const int64_t batch = heads < a_.kv_heads ? 1 : std::min(most / a_.kv_heads, a_.batch);
    for (int64_t b = 0; b < a_.batch; b += batch) {
      for (int64_t h = 0; h < a_.kv_heads; h += heads) {
        const Tile tile{b, std::min(batch, a_.batch - b), h, std::min(heads, a_.kv_heads - h)};
        for (int64_t s = 0; s < a_.seq; s += queries_) {
          attend(tile, s, std::min(s + queries_, a_.seq));
        }
      }
    }
    return out_;
  }

 private:
  /// Sequences [b, b + batch), cache heads [h, h + heads).
  struct Tile {
    int64_t b, batch, h, heads;
  };

  /// Queries [first, end) of a tile.
  void attend(const Tile& t, int64_t first, int64_t end) {
    const Sizes sizes{t.batch, t.heads, tokens_, a_.head_dim};
    const Tensor keys = new_tensor(q_, sizes, q_.scalar_type());
    const Tensor values = new_tensor(q_, sizes, q_.scalar_type());
    OptionalTensor broken, any_broken;  // where a NaN key would reach queries that it is masked for
    if (!causal_) {
      broken = new_tensor(q_, {t.batch, t.heads, tokens_}, ScalarType::Bool);
      any_broken = new_tensor(q_, {t.batch, t.heads}, ScalarType::Int);
      torch::stable::zero_(*any_broken);
    }
    // The first key is the first that the first query sees.
    const int64_t start = windowed_ ? first - a_.seq + 1 - a_.window : -kNoWindow;
    cuda::dequantize_kv(
        {keys.data_ptr(), values.data_ptr(), causal_ ? nullptr : data<bool>(*broken),
         causal_ ? nullptr : data<int32_t>(*any_broken), a_.k, a_.v,
         length_.has_value() ? nullptr : a_.lengths, a_.dtype, length_.value_or(0),
         t.b * a_.kv_heads + t.h, t.batch * t.heads, tokens_, start, a_.kv_heads, a_.head_dim,
         a_.capacity, a_.bits, a_.pages},
        scope_.stream());
    if (causal_ && a_.dtype != DType::f32) {  // torch's fp32 kernels do not share keys
      const int64_t heads = t.heads * group_;
      const Tensor result = torch_attention(part(q_, t, t.h * group_, heads, 1, 0, a_.seq), keys,
                                            values, std::nullopt, true, scale_, true);
      if (t.batch == a_.batch && heads == a_.heads) {
        out_ = torch::stable::contiguous(torch::stable::transpose(result, 1, 2));
      } else {
        put(result, part(out_, t, t.h * group_, heads, 1, 0, a_.seq));
      }
      return;
    }
    const bool per_head = a_.mask != nullptr && a_.mask_head_stride != 0;
    const int64_t row_bytes = t.batch * (per_head ? t.heads : 1) * tokens_;
    const int64_t seq = causal_ ? a_.seq : std::max<int64_t>(kVisibleBytes / row_bytes, 1);
    for (int64_t s = first; s < end; s += seq) {
      const int64_t count = std::min(seq, end - s);
      std::optional<Sight> sight;
      for (int64_t turn = 0; turn < group_; ++turn) {
        const int64_t head = t.h * group_ + turn;
        const Tensor out = part(out_, t, head, t.heads, group_, s, count);
        if (!causal_ && (turn == 0 || per_head)) sight = see(t, head, s, count, start, per_head);
        put(torch_attention(part(q_, t, head, t.heads, group_, s, count), keys, values,
                            causal_ ? std::nullopt : OptionalTensor(sight->visible), causal_,
                            scale_, false),
            out);
        if (causal_) continue;
        cuda::mend_rows(
            {out.data_ptr(), a_.dtype, data<bool>(sight->any), data<bool>(sight->visible),
             data<bool>(*broken), data<int32_t>(*any_broken), sight->any.size(1), tokens_, t.batch,
             count, t.heads, a_.head_dim, out.stride(0), out.stride(2), out.stride(1)},
            scope_.stream());
      }
    }
  }

  /// What queries [s, s + count) see, for query heads head, head + group, ... or all.
  struct Sight {
    Tensor visible;  // bool [tile's batch, tile's heads or 1, count, tokens]
    Tensor any;      // bool [tile's batch, tile's heads or 1, count]: sees a key
  };
  Sight see(const Tile& t, int64_t head, int64_t s, int64_t count, int64_t start,
            bool per_head) const {
    const int64_t heads = per_head ? t.heads : 1;
    Sight sight{new_tensor(q_, {t.batch, heads, count, tokens_}, ScalarType::Bool),
                new_tensor(q_, {t.batch, heads, count}, ScalarType::Bool)};
    const bool* mask = a_.mask;
    if (mask != nullptr) {
      mask += t.b * a_.mask_batch_stride + head * a_.mask_head_stride + s * a_.mask_seq_stride;
    }
    cuda::visible_keys(
        {data<bool>(sight.visible), data<bool>(sight.any),
         length_.has_value() ? nullptr : a_.lengths + t.b, mask, a_.mask_keys, a_.mask_batch_stride,
         a_.mask_head_stride * group_, a_.mask_seq_stride, length_.value_or(0), t.batch, heads,
         count, tokens_, start, s - a_.seq, a_.window},
        scope_.stream());
    return sight;
  }

  /// [tile's batch, heads, queries, head_dim] of x [batch, seq, heads, head_dim].
  static Tensor part(const Tensor& x, const Tile& t, int64_t head, int64_t heads, int64_t step,
                     int64_t s, int64_t queries) {
    const Tensor rows = every(every(x, 0, t.b, t.batch), 1, s, queries);
    return torch::stable::transpose(every(rows, 2, head, heads, step), 1, 2);
  }
  static void put(const Tensor& from, Tensor to) { torch::stable::copy_(to, from); }

  const Tensor& q_;
  const AttentionArgs& a_;
  std::optional<int64_t> length_;
  double scale_;
  CudaScope scope_;
  int64_t group_;
  int64_t queries_;  // at a time
  int64_t tokens_;   // keys for these of a sequence, those beyond its length included
  bool windowed_;    // some keys may be too old
  bool causal_;      // is_causal says what a query sees
  Tensor out_;
};

}  // namespace quarot::ops
