// Clip search on the CPU. Parallel over rows; a group is converted to fp32 scratch once and read
// from cache for each trial. Bound by arithmetic.
//
// A power costs five times the rest of a trial. Where norm > 2, Hölder's inequality bounds the
// error from below by the squares, sum m |e|^norm >= (sum m)^(1 - norm / 2) (sum m e^2)^(norm / 2):
// every trial is taken with squares, and with the power only if its bound is not above the best
// error so far, beginning with the least bound. About one in five is.
#include "kernels/clip_search.h"
#include "kernels/cpu/any_dtype.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/vec.h"

namespace quarot::cpu::QUAROT_ISA {

namespace {

/// Instructions of a trial, squares and its share of the powers, on a vector.
constexpr int64_t kTrialCost = 16;
/// Keeps a bound below the error it bounds whatever fp32 sums round.
constexpr float kBoundSlack = 1.0f - 1e-4f;
static_assert(kClipTrials % kLanes == 0);

/// A group of weights, padded with zeros to whole vectors.
struct Group {
  const float* weights;
  const float* importance;  // null = 1
  int64_t size;
  float amax;
};

struct Power {
  float half_norm;
  float of_shrink[kClipTrials];  // p^norm
};

QUAROT_INLINE float trial_scale(float amax, int trial) {
  const float scale = clip_shrink(trial) * amax / 7.0f;
  return scale < kClipScaleFloor ? 1.0f : scale;
}

QUAROT_INLINE F32 pow_or_zero(const F32& a, float exponent) {
  return select(greater(a, f32(0.0f)), exp(f32(exponent) * log(a)), f32(0.0f));
}

/// sum m (e^2)^(norm / 2), e the rounding error in units of the scale; kSquares: norm = 2.
template <bool kSquares>
QUAROT_INLINE float error_sum(const Group& group, int trial, float half_norm) {
  const F32 inverse = f32(1.0f / trial_scale(group.amax, trial));
  F32 sum = f32(0.0f);
  for (int64_t i = 0; i < group.size; i += kLanes) {
    const F32 steps = load(group.weights + i) * inverse;
    const F32 code = min(max(rint(steps), f32(-8.0f)), f32(7.0f));
    F32 error = (code - steps) * (code - steps);
    if constexpr (!kSquares) error = pow_or_zero(error, half_norm);
    if (group.importance != nullptr) error = error * load(group.importance + i);
    sum = sum + error;
  }
  return reduce_add(sum);
}

/// Lower bounds of the errors of all trials; for norm = 2 the errors, for norm < 2 zeros.
void error_bounds(float* bounds, const Group& group, const Power& power) {
  if (power.half_norm < 1.0f) {
    __builtin_memset(bounds, 0, kClipTrials * sizeof(float));
    return;
  }
  for (int trial = 0; trial < kClipTrials; ++trial) {
    bounds[trial] = error_sum<true>(group, trial, 1.0f);
  }
  F32 factor = f32(1.0f);
  if (power.half_norm > 1.0f) {
    float mass = static_cast<float>(group.size);  // the padding counts: a lower bound still
    if (group.importance != nullptr) {
      F32 sum = f32(0.0f);
      for (int64_t i = 0; i < group.size; i += kLanes) sum = sum + load(group.importance + i);
      mass = reduce_add(sum);
    }
    factor = pow_or_zero(f32(mass), 1.0f - power.half_norm) * f32(kBoundSlack);
  }
  for (int trial = 0; trial < kClipTrials; trial += kLanes) {
    F32 squares = load(bounds + trial);
    if (power.half_norm > 1.0f) squares = pow_or_zero(squares, power.half_norm);
    store(bounds + trial, squares * load(power.of_shrink + trial) * factor);
  }
}

/// The trial of least error, the first of equals.
int best_trial(const Group& group, const Power& power) {
  float bounds[kClipTrials];
  error_bounds(bounds, group, power);
  int best = 0;
  for (int trial = 1; trial < kClipTrials; ++trial) {
    if (bounds[trial] < bounds[best]) best = trial;
  }
  if (power.half_norm == 1.0f) return best;
  const int guess = best;
  const auto error_of = [&](int trial) {
    return error_sum<false>(group, trial, power.half_norm) * power.of_shrink[trial];
  };
  float least = error_of(guess);
  for (int trial = 0; trial < kClipTrials; ++trial) {
    if (trial == guess || bounds[trial] > least) continue;
    const float error = error_of(trial);
    if (error < least || (error == least && trial < best)) {
      least = error;
      best = trial;
    }
  }
  return best;
}

}  // namespace

void clip_search(const ClipSearchArgs& args, const Executor& executor) {
  const Rows& w = args.w;
  const int64_t groups = w.n / args.group;
  const int64_t padded = ceil_div(args.group, kLanes) * kLanes;
  Power power;
  power.half_norm = args.norm / 2.0f;
  for (int trial = 0; trial < kClipTrials; trial += kLanes) {
    float squares[kLanes];
    for (int i = 0; i < kLanes; ++i) squares[i] = clip_shrink(trial + i) * clip_shrink(trial + i);
    store(power.of_shrink + trial, pow_or_zero(load(squares), power.half_norm));
  }
  parallel_rows(
      executor, w.rows, w.n * kClipTrials * kTrialCost / kLanes, [&](int64_t begin, int64_t end) {
        const Scratch weights(padded), importance(padded);
        for (int64_t r = begin; r < end; ++r) {
          for (int64_t g = 0; g < groups; ++g) {
            const int64_t first = g * args.group, last = first + args.group;
            F32 amax = f32(0.0f);
            I32 largest = i32(0);  // bit patterns order |x|, NaN above infinity
            for (int64_t i = 0; i < args.group; i += kLanes) {
              const F32 x =
                  load_any(w.dtype, w.data, r * w.row_stride + first + i, r * w.row_stride + last);
              store(weights.data() + i, x);
              amax = max(abs(x), amax);
              largest = max(bits(abs(x)), largest);
              if (args.importance != nullptr) {
                store(importance.data() + i,
                      load_upto<DType::f32>(args.importance, first + i, last));
              }
            }
            float& scale = args.scale[r * groups + g];
            if (reduce_max(largest) >= kInfinityBits) {
              scale = __builtin_nanf("");
              continue;
            }
            const Group group{weights.data(),
                              args.importance != nullptr ? importance.data() : nullptr, padded,
                              reduce_max(amax)};
            scale = trial_scale(group.amax, best_trial(group, power));
          }
        }
      });
}

}  // namespace quarot::cpu::QUAROT_ISA
