// linear_int4's kernels for sm_80 to sm_89, which are the fallback of every other GPU: s8 mma for
// int8 codes, s4 mma for packed ones. tests/test_cuda_sm80.py compiles this and the kernels as
// sm_80's code for the GPU at hand, so that none of sm_90a's kernels exists, and runs it.
#include <cuda_runtime.h>

#include "../cpp/testing.h"
#include "kernels/error.h"
#include "kernels/linear_int4.h"

namespace quarot::testing {
namespace {

/// A copy on the device.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<T>& values) : count_(values.size()) {
    QUAROT_CUDA_CHECK(cudaMalloc(&data_, count_ * sizeof(T)));
    QUAROT_CUDA_CHECK(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~OnDevice() { cudaFree(data_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  T* data() const { return static_cast<T*>(data_); }
  std::vector<T> values() const {
    std::vector<T> out(count_);
    QUAROT_CUDA_CHECK(cudaMemcpy(out.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
  }

 private:
  size_t count_;
  void* data_ = nullptr;
};

/// Codes -> canonical nibbles, two a byte.
std::vector<uint8_t> packed(const std::vector<int8_t>& codes) {
  std::vector<uint8_t> out(codes.size() / 2);
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = static_cast<uint8_t>((codes[2 * i] & 15) | (codes[2 * i + 1] & 15) << 4);
  }
  return out;
}

struct Layer {
  int64_t m, n, k, groups;
  std::vector<int8_t> x, w;
  std::vector<int32_t> x_zero;  // empty: symmetric
};

/// Checks every output against the formula with int64 sums.
void check(const Layer& layer, bool x_packed) {
  const auto [m, n, k, groups, x, w, x_zero] = layer;
  const int64_t width = k / groups;
  Random random(1);
  std::vector<float> x_scale(m), w_scale(n * groups);
  for (float& scale : x_scale) scale = random.uniform(0.5f, 1.5f);
  for (float& scale : w_scale) scale = random.uniform(0.5f, 1.5f);
  std::vector<int32_t> w_sum(n * groups);
  for (int64_t i = 0; i < n * k; ++i) w_sum[i / width] += w[i];

  const OnDevice<uint8_t> canonical(packed(w));
  const OnDevice<uint8_t> prepacked(std::vector<uint8_t>(ceil_div(n, cuda::kLinearInt4Channels) *
                                                         ceil_div(k, cuda::kLinearInt4Columns) *
                                                         cuda::kLinearInt4TileBytes));
  const OnDevice<int8_t> codes(x);
  const OnDevice<uint8_t> pairs(packed(x));
  const OnDevice<float> scales(x_scale), w_scales(w_scale);
  const OnDevice<int32_t> zeros(x_zero), sums(w_sum);
  const OnDevice<float> out(std::vector<float>(m * n, NAN));
  cuda::prepack_int4(prepacked.data(), canonical.data(), n, k, nullptr);
  LinearInt4Args args{};
  args.out = out.data();
  args.x = x_packed ? reinterpret_cast<const int8_t*>(pairs.data()) : codes.data();
  args.x_scale = scales.data();
  args.x_zero = x_zero.empty() ? nullptr : zeros.data();
  args.w = prepacked.data();
  args.w_scale = w_scales.data();
  args.w_sum = sums.data();
  args.out_dtype = DType::f32;
  args.m = m;
  args.n = n;
  args.k = k;
  args.groups = groups;
  args.x_packed = x_packed;
  cuda::linear_int4(args, nullptr);
  const std::vector<float> got = out.values();
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float want = 0;
      for (int64_t g = 0; g < groups; ++g) {
        int64_t acc = 0;
        for (int64_t c = g * width; c < (g + 1) * width; ++c) {
          acc += int64_t{x[i * k + c]} * w[j * k + c];
        }
        if (!x_zero.empty()) acc -= int64_t{x_zero[i]} * w_sum[j * groups + g];
        const float scaled = static_cast<float>(acc) * x_scale[i];
        want = want + scaled * w_scale[j * groups + g];
      }
      CHECK(got[i * n + j] == want, "m=", m, " n=", n, " k=", k, " groups=", groups,
            " packed=", x_packed, " at ", i, ",", j, ": ", got[i * n + j], " not ", want);
    }
  }
}

void check_random(int64_t m, int64_t n, int64_t k, int64_t groups, bool x_packed) {
  Random random(static_cast<uint32_t>(m + n));
  const int half = x_packed ? 8 : 128;
  for (const bool asymmetric : {false, true}) {
    check({m, n, k, groups, random.integers<int8_t>(m * k, -half, half - 1),
           random.integers<int8_t>(n * k, -8, 7),
           random.integers<int32_t>(asymmetric ? m : 0, -half, half - 1)},
          x_packed);
  }
}

/// k of the widest layer of a 70B model, all codes and zero points at an end of their range.
void check_largest(bool x_packed) {
  constexpr int64_t n = 3, k = 28672;
  const int half = x_packed ? 8 : 128;
  for (const int64_t m : {1, 9, 17, 70}) {
    for (const int x : {-half, half - 1}) {
      for (const int w : {-8, 7}) {
        for (const int zero : {0, -1 - x}) {
          Layer layer{m,
                      n,
                      k,
                      1,
                      std::vector<int8_t>(m * k, static_cast<int8_t>(x)),
                      std::vector<int8_t>(n * k, static_cast<int8_t>(w)),
                      {}};
          layer.w[k + 5] += w < 0 ? 1 : -1;  // an odd sum, too
          if (zero != 0) layer.x_zero.assign(m, zero);
          check(layer, x_packed);
        }
      }
    }
  }
}

// Tokens on both sides of each kernel's limit; channels and columns that no tile divides.
constexpr int64_t kTokens[] = {1, 8, 9, 16, 17, 33, 70, 129};

TEST(s8_mma_with_a_scale_a_channel) {
  for (const int64_t m : kTokens) check_random(m, 77, 1056, 1, false);
  for (const int64_t n : {4100, 5200, 8200, 16400, 29000, 30000}) {
    check_random(8, n, 96, 1, false);
    check_random(16, n, 96, 1, false);
  }
}

TEST(s8_mma_with_scales_of_groups) {
  for (const int64_t m : kTokens) {
    check_random(m, 77, 1152, 36, false);
    check_random(m, 77, 1152, 9, false);
  }
  check_random(16, 4100, 256, 2, false);
  check_random(16, 8200, 256, 2, false);
}

TEST(s4_mma_with_a_scale_a_channel) {
  for (const int64_t m : kTokens) check_random(m, 77, 1056, 1, true);
}

TEST(s4_mma_with_scales_of_groups) {
  for (const int64_t m : kTokens) {
    check_random(m, 77, 1152, 18, true);
    check_random(m, 77, 1152, 9, true);
  }
}

TEST(s8_mma_is_exact_at_the_largest_sums) { check_largest(false); }
TEST(s4_mma_is_exact_at_the_largest_sums) { check_largest(true); }

}  // namespace
}  // namespace quarot::testing
