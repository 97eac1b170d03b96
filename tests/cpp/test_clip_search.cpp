// clip_search: in every ISA variant, the scale of the least error by brute force in double.
#include "kernels/clip_search.h"
#include "testing.h"

namespace quarot::cpu {
QUAROT_DECLARE_VARIANTS(void clip_search(const ClipSearchArgs&, const Executor&))
}  // namespace quarot::cpu

namespace quarot::testing {
namespace {

/// sum m |code * scale - w|^norm of a group whose scale is p * amax / 7.
double error_of(const std::vector<float>& w, const float* importance, double norm, double scale) {
  double sum = 0;
  for (size_t i = 0; i < w.size(); ++i) {
    const double code = std::clamp(std::nearbyint(w[i] / scale), -8.0, 7.0);
    const double error = std::pow(std::abs(code * scale - w[i]), norm);
    sum += error * (importance == nullptr ? 1.0 : importance[i]);
  }
  return sum;
}

struct Case {
  int64_t n, group;
};
constexpr Case kCases[] = {{1, 1}, {7, 7}, {48, 16}, {70, 14}, {66, 33}, {200, 200}};
constexpr int64_t kRows = 5;

TEST(clip_search_finds_the_least_error) {
  Random random(11);
  for (const Case& c : kCases) {
    const int64_t stride = c.n + 3, groups = c.n / c.group;
    const Guarded<float> w(random.normals((kRows - 1) * stride + c.n));
    Guarded<float> importance(c.n);
    for (int64_t i = 0; i < c.n; ++i) importance[i] = static_cast<float>(random.integer(0, 4));
    importance[0] = 1;
    for (const float norm : {1.5f, 2.0f, 2.4f}) {
      for (const bool weighted : {false, true}) {
        const float* m = weighted ? importance.data() : nullptr;
        for (const cpu::Isa isa : available_isas()) {
          Guarded<float> scale(kRows * groups, -1);
          VARIANT(isa, clip_search)
          ({scale.data(), {w.data(), DType::f32, kRows, c.n, stride}, c.group, norm, m},
           threaded(2));
          for (int64_t g = 0; g < kRows * groups; ++g) {
            const int64_t column = g % groups * c.group;
            const float* first = w.data() + g / groups * stride + column;
            const std::vector<float> group(first, first + c.group);
            const float* mass = m == nullptr ? nullptr : m + column;
            double amax = 0, least = INFINITY;
            for (const float v : group) amax = std::max(amax, std::abs(double{v}));
            for (int trial = 0; trial < kClipTrials; ++trial) {
              const double tried = clip_shrink(trial) * amax / 7;
              least = std::min(least, error_of(group, mass, norm, tried));
            }
            const double error = error_of(group, mass, norm, scale[g]);
            CHECK(error <= least * (1 + 1e-4) + 1e-9 * std::pow(amax, norm), cpu::isa_name(isa),
                  " n=", c.n, " norm ", norm, ": error ", error, ", the least is ", least);
          }
          scale.check_poison();
        }
      }
    }
  }
}

TEST(clip_search_of_zeros_and_of_non_finite_weights) {
  std::vector<float> values(4 * 20, 0.5f);
  std::fill_n(values.begin(), 20, 0.0f);
  values[20 + 7] = std::nanf("");
  values[40 + 19] = -INFINITY;
  const Guarded<float> w(values);
  for (const cpu::Isa isa : available_isas()) {
    Guarded<float> scale(4, -1);
    VARIANT(isa, clip_search)
    ({scale.data(), {w.data(), DType::f32, 4, 20, 20}, 20, 2.4f, nullptr}, serial());
    CHECK(scale[0] == 1 && std::isnan(scale[1]) && std::isnan(scale[2]), cpu::isa_name(isa));
    CHECK(scale[3] > 0 && scale[3] <= 0.5f, cpu::isa_name(isa), " scale ", scale[3]);
    scale.check_poison();
  }
}

}  // namespace
}  // namespace quarot::testing
