// Attention over random caches, against double arithmetic; ISA variants and threads bit by bit.
#include <optional>

#include "kernels/attention.h"
#include "kernels/cpu/attention_split.h"
#include "testing.h"

namespace quarot::cpu {
QUAROT_DECLARE_VARIANTS(void attention(const AttentionArgs&, const AttentionSplit&,
                                       const Executor&))
}  // namespace quarot::cpu

namespace quarot::testing {
namespace {

enum class Mask { none, shared, per_head };

/// What a call may have beside the shapes; page 0: not a paged cache.
struct Options {
  int64_t window = kNoWindow, page = 0;
};

struct Shape {
  int64_t seq, heads, kv_heads, head_dim;
  std::vector<int32_t> lengths;
};

const std::vector<Shape>& shapes() {
  static const std::vector<Shape> all = {
      {1, 3, 1, 64, {1}},         // the first token
      {1, 6, 2, 64, {700, 130}},  // decode: several splits, another one of a single split
      {1, 2, 2, 256, {1025}},     // widest head, a split of one key
      {5, 4, 4, 24, {5, 9, 64}},  // tails of 8 dimensions; exactly one tile
      {40, 6, 3, 80, {40, 65}},   // two blocks of rows, the second not full
      {3, 4, 2, 128, {2, 0}},     // fewer tokens than queries; nothing at all
      {9, 2, 1, 96, {600}},       // some queries, several splits
      {2, 4, 1, 32, {70, 3}},     // few rows: 8 words a key at 8 bits; a part of 16 keys
      {1, 5, 1, 128, {530}},      // 16 words at 4 bits, 32 at 8
      {200, 1, 1, 8, {257}}};
  return all;
}

/// A random cache whose capacity is the longest sequence, in whole pages: the kernel may read
/// nothing beyond.
struct Cache {
  Guarded<uint8_t> codes;
  Guarded<uint16_t> scale;
  Guarded<uint8_t> zero;
  Cache(int64_t slots, int64_t dim, int bits, Random& random)
      : codes(random.integers<uint8_t>(slots * dim * bits / 8, 0, 255)),
        scale(slots),
        zero(random.integers<uint8_t>(slots, 0, (1 << bits) - 1)) {
    for (int64_t i = 0; i < slots; ++i)
      scale[i] = to_f16(random.uniform(0.1f, 1) * (bits == 4 ? 0.2f : 0.012f));
  }
  KvCacheView view() const { return {codes.data(), scale.data(), zero.data()}; }
  double at(int64_t slot, int64_t dim, int bits, int64_t i) const {
    const int byte = codes[slot * dim * bits / 8 + i * bits / 8];
    const int code = bits == 8 ? byte : i % 2 == 0 ? byte & 15 : byte >> 4;
    return double{from_f16(scale[slot])} * (code - zero[slot]);
  }
};

struct Call {
  Shape s;
  DType dtype;
  int bits;
  Options options;
  int64_t batch, capacity;
  Random random{11};
  Guarded<int32_t> table;  // pages in descending order
  Guarded<uint8_t> q;
  Guarded<int32_t> lengths;
  Cache k, v;
  std::optional<Guarded<uint8_t>> mask;
  int64_t mask_heads;

  Call(const Shape& shape, DType type, int code_bits, Mask kind, Options more = {})
      : s(shape),
        dtype(type),
        bits(code_bits),
        options(more),
        batch(static_cast<int64_t>(s.lengths.size())),
        capacity(whole_pages(std::max(1, *std::max_element(s.lengths.begin(), s.lengths.end())))),
        table(more.page == 0 ? 0 : batch * capacity / more.page),
        q(batch * s.seq * s.heads * s.head_dim * bytes_of(type)),
        lengths(s.lengths),
        k(batch * s.kv_heads * capacity, s.head_dim, bits, random),
        v(batch * s.kv_heads * capacity, s.head_dim, bits, random),
        mask_heads(kind == Mask::per_head ? s.heads : 1) {
    for (int64_t i = 0; i < q.size() / bytes_of(type); ++i)
      to_bits(type, q.data(), i, random.normal());
    if (kind != Mask::none) {
      mask.emplace(random.integers<uint8_t>(batch * mask_heads * s.seq * capacity, 0, 1));
      // The first row sees nothing.
      for (int64_t j = 0; j < capacity; ++j) (*mask)[j] = 0;
    }
    for (int64_t i = 0; i < table.size(); ++i)
      table[i] = static_cast<int32_t>(table.size() - 1 - i);
    // What lies beyond a sequence's length is not a key, whatever memory holds there.
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t head = 0; head < s.kv_heads; ++head) {
        for (int64_t j = lengths[b]; j < capacity; ++j)
          k.scale[slot(b, head, j)] = v.scale[slot(b, head, j)] = 0x7e00;
      }
    }
  }

  int64_t whole_pages(int64_t tokens) const {
    return options.page == 0 ? tokens : ceil_div(tokens, options.page) * options.page;
  }
  Pages pages() const {
    if (options.page == 0) return {};
    return {table.data(), capacity / options.page, table.size(), options.page};
  }
  int64_t slot(int64_t b, int64_t head, int64_t j) const {
    const TokenPlace place = place_of(pages(), s.kv_heads, capacity, b, j);
    return place.first + head * place.apart;
  }

  bool sees(int64_t b, int64_t h, int64_t t, int64_t j) const {
    const int64_t last = lengths[b] - s.seq + t;
    if (j > last || j <= last - options.window) return false;
    return !mask || (*mask)[((b * mask_heads + h % mask_heads) * s.seq + t) * capacity + j] != 0;
  }

  /// Runs one variant; returns its output.
  template <class Kernel>
  std::vector<uint8_t> run(Kernel* kernel, const Executor& executor) const {
    Guarded<uint8_t> out(q.size(), 0xee);
    const int64_t longest = *std::max_element(s.lengths.begin(), s.lengths.end());
    AttentionArgs args{out.data(),
                       nullptr,
                       q.data(),
                       k.view(),
                       v.view(),
                       lengths.data(),
                       mask ? reinterpret_cast<const bool*>(mask->data()) : nullptr,
                       capacity,
                       mask_heads * s.seq * capacity,
                       mask_heads == 1 ? 0 : s.seq * capacity,
                       capacity,
                       dtype,
                       batch,
                       s.seq,
                       s.heads,
                       s.kv_heads,
                       s.head_dim,
                       capacity,
                       bits,
                       1 / std::sqrt(static_cast<float>(s.head_dim)),
                       options.window,
                       pages()};
    Guarded<float> workspace(cpu::attention_workspace(args, longest));
    args.workspace = workspace.data();
    if constexpr (std::is_same_v<Kernel, decltype(cpu::attention)>) {
      kernel(args, executor);
    } else {
      kernel(args, cpu::attention_split(args, longest), executor);
    }
    out.check_poison();
    workspace.check_poison();
    return out.values();
  }

  /// Output vector of (b, t, h) in double; NaN if a key or value that it sees has no finite scale.
  std::vector<double> expected(int64_t b, int64_t t, int64_t h) const {
    const int64_t dim = s.head_dim, head = h / (s.heads / s.kv_heads);
    std::vector<double> out(static_cast<size_t>(dim)), scores;
    double sum = 0;
    for (int64_t j = 0; j < capacity; ++j) {
      if (!sees(b, h, t, j)) continue;
      double score = 0;
      for (int64_t i = 0; i < dim; ++i) {
        const int64_t at = ((b * s.seq + t) * s.heads + h) * dim + i;
        score += double{from_bits(dtype, q.data(), at)} * k.at(slot(b, head, j), dim, bits, i);
      }
      const double weight = std::exp(score / std::sqrt(static_cast<double>(dim)));
      sum += weight;
      for (int64_t i = 0; i < dim; ++i) {
        out[static_cast<size_t>(i)] += weight * v.at(slot(b, head, j), dim, bits, i);
      }
    }
    for (double& value : out) value = sum == 0 ? 0 : value / sum;
    return out;
  }

  void check(const std::vector<uint8_t>& out, const char* what, double near = 1e-5) const {
    const double rounding = dtype == DType::f32 ? 0 : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t t = 0; t < s.seq; ++t) {
        for (int64_t h = 0; h < s.heads; ++h) {
          const std::vector<double> want = expected(b, t, h);
          for (int64_t i = 0; i < s.head_dim; ++i) {
            const int64_t at = ((b * s.seq + t) * s.heads + h) * s.head_dim + i;
            const double got = from_bits(dtype, out.data(), at),
                         wanted = want[static_cast<size_t>(i)];
            const bool right = std::isnan(wanted)
                                   ? std::isnan(got)
                                   : std::abs(got - wanted) <= near + rounding * std::abs(wanted);
            CHECK(right, what, " seq ", s.seq, " dim ", s.head_dim, " bits ", bits, " at ", b, ",",
                  t, ",", h, ",", i, ": ", got, " for ", wanted);
          }
        }
      }
    }
  }
};

TEST(attention_equals_double_arithmetic) {
  for (const Shape& shape : shapes()) {
    for (const DType dtype : kDTypes) {
      for (const int bits : {4, 8}) {
        for (const Mask mask : {Mask::none, Mask::shared, Mask::per_head}) {
          const Call call(shape, dtype, bits, mask);
          call.check(call.run(&cpu::attention, threaded(2)), "active variant");
        }
      }
    }
  }
}

TEST(attention_has_windows_and_pages) {
  for (const Shape& shape : shapes()) {
    for (const Options options : {Options{1}, {50}, {300, 16}, {kNoWindow, 16}, {64, 48}}) {
      const Call call(shape, DType::f32, 4, Mask::shared, options);
      call.check(call.run(&cpu::attention, threaded(2)), "window or pages");
    }
  }
}

TEST(attention_variants_and_threads_agree_bit_by_bit) {
  for (const Shape& shape : shapes()) {
    for (const int bits : {4, 8}) {
      for (const Options options : {Options{}, {70, 48}}) {
        const Call call(shape, DType::bf16, bits, Mask::shared, options);
        const auto want = call.run(&cpu::baseline::attention, serial());
        for (const cpu::Isa isa : available_isas()) {
          for (const Executor& executor : {serial(), threaded(2), threaded(3)}) {
            CHECK(call.run(VARIANT(isa, attention), executor) == want, cpu::isa_name(isa), " with ",
                  executor.threads, " threads, seq ", shape.seq, " dim ", shape.head_dim);
          }
        }
      }
    }
  }
}

TEST(attention_shows_nan_only_to_those_who_see_it) {
  for (const Shape& shape : shapes()) {
    for (const int bits : {4, 8}) {
      for (const Mask mask : {Mask::none, Mask::shared}) {
        Call call(shape, DType::f32, bits, mask);
        call.k.scale[call.capacity / 2] = 0x7e00;
        call.v.scale[call.capacity * 2 / 3] = 0x7e00;
        for (const cpu::Isa isa : available_isas()) {
          call.check(call.run(VARIANT(isa, attention), serial()), cpu::isa_name(isa));
        }
      }
    }
  }
}

TEST(attention_survives_scores_far_apart) {
  // One key towers over the others by more than exp can hold; the running maximum grows tile by
  // tile.
  for (const int64_t dim : {8, 64}) {
    for (const int bits : {4, 8}) {
      Call call({1, 1, 1, dim, {300}}, DType::f32, bits, Mask::none);
      for (int64_t slot = 0; slot < 300; ++slot) {
        call.k.scale[slot] = to_f16((bits == 4 ? 8.0f : 0.5f) * static_cast<float>(slot));
        call.k.zero[slot] = 0;
      }
      std::fill(call.k.codes.data(), call.k.codes.data() + call.k.codes.size(), 255);
      for (int64_t i = 0; i < dim; ++i) to_bits(DType::f32, call.q.data(), i, 1.0f);
      for (const cpu::Isa isa : available_isas()) {
        const std::vector<uint8_t> out = call.run(VARIANT(isa, attention), serial());
        for (int64_t i = 0; i < dim; ++i) {
          const double want = call.v.at(299, dim, bits, i);
          const double got = from_bits(DType::f32, out.data(), i);
          CHECK(std::abs(got - want) <= 1e-6 * std::abs(want), cpu::isa_name(isa), " dim ", dim,
                " bits ", bits, " at ", i, ": ", got, " for ", want);
        }
      }
    }
  }
}

TEST(attention_of_queries_of_zeros_and_of_no_numbers) {
  // A query of zeros sees all keys alike; one with an infinity or NaN makes NaN, and of no other.
  for (const int64_t dim : {8, 64}) {
    for (const int bits : {4, 8}) {
      Call call({1, 4, 1, dim, {130}}, DType::f32, bits, Mask::none);
      for (int64_t i = 0; i < dim; ++i) to_bits(DType::f32, call.q.data(), i, 0.0f);
      to_bits(DType::f32, call.q.data(), dim + 3, INFINITY);
      to_bits(DType::f32, call.q.data(), 2 * dim + 5, NAN);
      for (const cpu::Isa isa : available_isas()) {
        const std::vector<uint8_t> out = call.run(VARIANT(isa, attention), serial());
        for (const int64_t head : {0, 3}) {
          const std::vector<double> want = call.expected(0, 0, head);
          for (int64_t i = 0; i < dim; ++i) {
            const double got = from_bits(DType::f32, out.data(), head * dim + i);
            CHECK(std::abs(got - want[static_cast<size_t>(i)]) <= 1e-5, cpu::isa_name(isa), " dim ",
                  dim, " bits ", bits, " head ", head, " at ", i, ": ", got);
          }
        }
        for (int64_t i = dim; i < 3 * dim; ++i)
          CHECK(std::isnan(from_bits(DType::f32, out.data(), i)), cpu::isa_name(isa), " dim ", dim,
                " bits ", bits, " at ", i);
      }
    }
  }
}

TEST(attention_of_prompts_by_tiles) {
  const std::vector<Shape> prompts = {
      {33, 2, 1, 64, {33}},          // one query beyond a block
      {300, 3, 3, 64, {300}},        // keys of two rounds
      {70, 6, 2, 80, {70, 70, 70}},  // a head that is no whole tiles
      {48, 1, 1, 8, {48}},           // less than one
      {512, 2, 1, 128, {512}},      {40, 4, 2, 256, {40, 40}}, {5, 1, 1, 32, {5}}};
  for (const Shape& shape : prompts) {
    for (const int bits : {4, 8}) {
      for (const Options options : {Options{}, {kNoWindow, 48}}) {
        Call call(shape, DType::bf16, bits, Mask::none, options);
        if (!cpu::has_attention_prefill()) {
          CHECK_THROWS(call.run(&cpu::attention_prefill, serial()), "no tiles");
          continue;
        }
        const auto clean = call.run(&cpu::attention_prefill, serial());
        for (int threads : {2, 3}) {
          CHECK(call.run(&cpu::attention_prefill, threaded(threads)) == clean, threads, " threads");
        }
        // Keys, values and weights are bf16 of up to 3.
        call.check(clean, "by tiles", 3 * 0x1p-6);
        const int64_t last = call.batch - 1;
        call.k.scale[call.slot(last, 0, shape.seq / 2)] = 0x7e00;
        call.v.scale[call.slot(last, shape.kv_heads - 1, shape.seq - 2)] = 0x7e00;
        call.check(call.run(&cpu::attention_prefill, serial()), "with NaN", 3 * 0x1p-6);
      }
    }
  }
}

TEST(attention_of_prompts_refuses_what_is_none) {
  if (!cpu::has_attention_prefill()) return;  // which it says first, see above
  const auto run = [](const Call& call) { return call.run(&cpu::attention_prefill, serial()); };
  CHECK_THROWS(run({{33, 1, 1, 8, {40}}, DType::bf16, 4, Mask::none}), "must be seq");
  CHECK_THROWS(run({{33, 1, 1, 8, {33}}, DType::f16, 4, Mask::none}), "bf16");
  CHECK_THROWS(run({{33, 1, 1, 8, {33}}, DType::bf16, 4, Mask::shared}), "mask");
  CHECK_THROWS(run({{33, 1, 1, 8, {33}}, DType::bf16, 4, Mask::none, {32}}), "window");
}

TEST(attention_refuses_pages_that_there_are_not) {
  Call call({1, 1, 1, 8, {20}}, DType::f32, 8, Mask::none, {kNoWindow, 16});
  call.table[1] = 2;
  CHECK_THROWS(call.run(&cpu::attention, serial()), "block_table[0, 1]");
}

TEST(attention_reads_no_pages_before_the_first_window) {
  // Keys come in tiles that begin before it, at pages that are gone.
  for (const int bits : {4, 8}) {
    for (const int64_t seq : {1, 20}) {
      Call call({seq, 2, 1, 64, {48}}, DType::f32, bits, Mask::none, {9, 16});
      const auto want = call.run(&cpu::attention, serial());
      call.table[0] = -1;
      for (const cpu::Isa isa : available_isas()) {
        CHECK(call.run(VARIANT(isa, attention), serial()) == want, cpu::isa_name(isa));
      }
      CHECK(call.run(&cpu::attention, serial()) == want);
    }
  }
}

TEST(attention_refuses_lengths_beyond_the_capacity) {
  Call call({1, 1, 1, 8, {3}}, DType::f32, 8, Mask::none);
  call.lengths[0] = 4;
  CHECK_THROWS(call.run(&cpu::attention, serial()), "lengths");
}

}  // namespace
}  // namespace quarot::testing
