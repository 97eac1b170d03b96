// A tape of kernel calls on the CPU, to make them again at the same addresses: what a CUDA graph is
// on a GPU. A decode step is hundreds of calls of some microseconds each, of which torch's
// dispatcher and Python take the larger part.
//
// While a thread records, each launch (ops/checks.h) is made and noted with its arguments, and the
// tensors that ops allocate live as long as the tape. What an op does by torch itself (copies,
// mostly) is not noted and spoils the tape. Lengths, codes and weights are read at each run. Knows
// no torch: the module quarot._C hands tapes to Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/types.h"

namespace quarot::ops {

class Tape {
 public:
  using Call = std::function<void(const Executor&)>;
  /// Memory that calls read or write; its owner keeps it.
  struct Place {
    std::uintptr_t at;
    std::size_t bytes;
  };

  /// inputs: where the calls will find them.
  explicit Tape(std::vector<Place> inputs) : inputs_(std::move(inputs)) {}

  /// The tape that this thread records on, or null.
  static Tape* current();

  void begin();
  void end();
  void add(Call call) { calls_.push_back(std::move(call)); }
  void hold(std::shared_ptr<void> memory) { held_.push_back(std::move(memory)); }
  void spoil() { spoiled_ = true; }

  /// How many calls a run makes; 0 of a spoiled tape.
  int64_t calls() const { return spoiled_ ? 0 : static_cast<int64_t>(calls_.size()); }

  /// Copies inputs [addresses] to their places, makes the calls with torch's threads of now, and
  /// copies `result`. What a call throws comes out.
  void run(const std::vector<std::uintptr_t>& inputs, Place result, std::uintptr_t output) const;

 private:
  std::vector<Place> inputs_;
  std::vector<Call> calls_;
  std::vector<std::shared_ptr<void>> held_;
  bool spoiled_ = false;
};

}  // namespace quarot::ops
