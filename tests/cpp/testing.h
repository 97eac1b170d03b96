// The frame of the torch-free tier's tests: named tests, checks, memory with poison around it,
// threads, random numbers, and access to each ISA variant of a kernel.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/types.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace quarot::testing {

// ---- Tests and checks ---------------------------------------------------------------------------

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Registration {
  Registration(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

#define TEST(name)                                                                \
  static void name();                                                             \
  static const ::quarot::testing::Registration registration_##name(#name, &name); \
  static void name()

template <class... Parts>
[[noreturn]] void fail(const char* file, int line, const Parts&... parts) {
  std::ostringstream message;
  message << file << ":" << line << ": ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

/// Ends the test unless the condition holds; the other arguments are printed.
#define CHECK(condition, ...)                                                                 \
  do {                                                                                        \
    if (!(condition)) {                                                                       \
      ::quarot::testing::fail(__FILE__, __LINE__, #condition " " __VA_OPT__(, ) __VA_ARGS__); \
    }                                                                                         \
  } while (false)

/// Checks that the statement throws a std::exception whose message contains `text`.
#define CHECK_THROWS(statement, text)                                                          \
  do {                                                                                         \
    std::string message;                                                                       \
    try {                                                                                      \
      statement;                                                                               \
    } catch (const std::exception& error) {                                                    \
      message = error.what();                                                                  \
    }                                                                                          \
    CHECK(message.find(text) != std::string::npos, "threw '", message, "', not '", text, "'"); \
  } while (false)

// ---- Memory -------------------------------------------------------------------------------------

/// An array between two runs of poison: writing there fails `check_poison`, and under ASan touching
/// it ends the program.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t count, T value = T{})
      : count_(count), memory_(bytes() + 2 * kPoison, kByte) {
    std::fill_n(data(), count, value);
    forbid(true);
  }
  explicit Guarded(const std::vector<T>& values) : Guarded(static_cast<int64_t>(values.size())) {
    std::copy(values.begin(), values.end(), data());
  }
  ~Guarded() { forbid(false); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() { return reinterpret_cast<T*>(memory_.data() + kPoison); }
  const T* data() const { return reinterpret_cast<const T*>(memory_.data() + kPoison); }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return count_; }
  std::vector<T> values() const { return {data(), data() + count_}; }

  void check_poison() {
    forbid(false);
    for (size_t i = 0; i < kPoison; ++i) {
      CHECK(memory_[i] == kByte, "written ", kPoison - i, " bytes before the array");
      CHECK(memory_[kPoison + bytes() + i] == kByte, "written ", i, " bytes after the array");
    }
    forbid(true);
  }

 private:
  static constexpr size_t kPoison = 128;
  static constexpr char kByte = static_cast<char>(0xff);  // NaN in every floating-point type
  size_t bytes() const { return static_cast<size_t>(count_) * sizeof(T); }
  void forbid([[maybe_unused]] bool on) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(memory_.data(), memory_.size());
    if (!on) return;
    ASAN_POISON_MEMORY_REGION(memory_.data(), kPoison);
    ASAN_POISON_MEMORY_REGION(memory_.data() + kPoison + bytes(), kPoison);
#endif
  }
  int64_t count_;
  std::vector<char> memory_;
};

// ---- Threads ------------------------------------------------------------------------------------

/// One thread; the tasks in descending order, which no kernel may notice.
inline Executor serial() {
  return {1, [](int64_t tasks, Executor::Body body, void* ctx) {
            for (int64_t task = tasks - 1; task >= 0; --task) body(ctx, task);
          }};
}

/// `threads` real threads that take the tasks as they come.
inline Executor threaded(int threads) {
  return {threads, [](int64_t tasks, Executor::Body body, void* ctx) {
            std::atomic<int64_t> next = 0;
            std::vector<std::thread> workers;
            for (int64_t i = 0; i < std::min<int64_t>(tasks, 4); ++i) {
              workers.emplace_back([&] {
                for (int64_t task; (task = next++) < tasks;) body(ctx, task);
              });
            }
            for (std::thread& worker : workers) worker.join();
          }};
}

// ---- ISA variants -------------------------------------------------------------------------------

/// The variants that can run here; the first is baseline.
inline std::vector<cpu::Isa> available_isas() {
  std::vector<cpu::Isa> found;
  for (const cpu::Isa isa : cpu::kIsas) {
    if (cpu::isa_available(isa)) found.push_back(isa);
  }
  CHECK(!found.empty(), "no variant can run here, so nothing would be tested");
  return found;
}

/// The variant `isa` of a kernel declared by QUAROT_DECLARE_VARIANTS in namespace quarot::cpu.
#if defined(__x86_64__)
#define VARIANT(isa, kernel)                                            \
  ((isa) >= ::quarot::cpu::Isa::avx512 ? &::quarot::cpu::avx512::kernel \
   : (isa) == ::quarot::cpu::Isa::avx2 ? &::quarot::cpu::avx2::kernel   \
                                       : &::quarot::cpu::baseline::kernel)
#else
#define VARIANT(isa, kernel) (&::quarot::cpu::baseline::kernel)
#endif

// ---- Numbers ------------------------------------------------------------------------------------

/// Reproducible random numbers.
class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  int64_t integer(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }
  float normal() { return std::normal_distribution<float>()(engine_); }
  float uniform(float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(engine_);
  }
  template <class T>
  std::vector<T> integers(int64_t count, int64_t low, int64_t high) {
    std::vector<T> out(static_cast<size_t>(count));
    for (T& value : out) value = static_cast<T>(integer(low, high));
    return out;
  }
  std::vector<float> normals(int64_t count, float deviation = 1) {
    std::vector<float> out(static_cast<size_t>(count));
    for (float& value : out) value = deviation * normal();
    return out;
  }

 private:
  std::mt19937 engine_;
};

/// fp16 by its definition, not by _Float16, which GCC 11 does not have.
inline float from_f16(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  if (exponent == 31) {
    magnitude = mantissa == 0 ? INFINITY : std::nanf("");
  } else if (exponent > 0) {
    magnitude = std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  }
  return std::copysign(magnitude, bits >> 15 != 0 ? -1.0f : 1.0f);
}
/// To nearest even.
inline uint16_t to_f16(float x) {
  const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
  if (std::isnan(x)) return sign | 0x7e00;
  const float magnitude = std::abs(x);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  const float last_places = std::nearbyint(std::ldexp(magnitude, 10 - exponent));
  return static_cast<uint16_t>(sign + ((exponent + 14) << 10) + static_cast<int>(last_places));
}
inline float from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}
/// The nearer of the two neighbours, the even one in a tie; for finite numbers.
inline uint16_t to_bf16(float x) {
  uint32_t wide;
  std::memcpy(&wide, &x, sizeof wide);
  const auto down = static_cast<uint16_t>(wide >> 16), up = static_cast<uint16_t>(down + 1);
  const double below = std::abs(double{x} - from_bf16(down));
  const double above = std::abs(double{from_bf16(up)} - x);
  if (below == above) return down % 2 == 0 ? down : up;
  return below < above ? down : up;
}

inline float from_bits(DType dtype, const void* data, int64_t i) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(data)[i];
    case DType::f16:
      return from_f16(static_cast<const uint16_t*>(data)[i]);
    case DType::bf16:
      return from_bf16(static_cast<const uint16_t*>(data)[i]);
  }
  __builtin_unreachable();
}
inline void to_bits(DType dtype, void* data, int64_t i, float x) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(data)[i] = x;
      return;
    case DType::f16:
      static_cast<uint16_t*>(data)[i] = to_f16(x);
      return;
    case DType::bf16:
      static_cast<uint16_t*>(data)[i] = to_bf16(x);
      return;
  }
  __builtin_unreachable();
}
inline int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
inline constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};

}  // namespace quarot::testing
