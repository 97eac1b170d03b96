#include "ops/tape.h"

#include <cstring>

#include "ops/checks.h"

namespace quarot::ops {
namespace {

thread_local Tape* recording = nullptr;

}  // namespace

Tape* Tape::current() { return recording; }

void Tape::begin() {
  if (recording != nullptr) fail("quarot: this thread records a tape already");
  recording = this;
}

void Tape::end() { recording = nullptr; }

void Tape::run(const std::vector<std::uintptr_t>& inputs, Place result,
               std::uintptr_t output) const {
  QUAROT_REQUIRE(calls() > 0 && inputs.size() == inputs_.size(), "Tape", "needs ", inputs_.size(),
                 " inputs and recorded calls; got ", inputs.size(), " and ", calls());
  const auto at = [](std::uintptr_t address) { return reinterpret_cast<void*>(address); };
  for (size_t i = 0; i < inputs.size(); ++i) {
    std::memcpy(at(inputs_[i].at), at(inputs[i]), inputs_[i].bytes);
  }
  const Executor executor = cpu_executor();
  for (const Call& call : calls_) call(executor);
  std::memcpy(at(output), at(result.at), result.bytes);
}

}  // namespace quarot::ops
