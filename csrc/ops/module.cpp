// The Python module quarot._C. Importing it registers torch.ops.quarot.* (static initialisers of
// ops/*.cpp); torch must be imported first. No torch header here: the module itself says what was
// built, and has the class Tape.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cpu/isa.h"
#include "ops/tape.h"

namespace {

/// "80-real 90a-real" -> {"80-real", "90a-real"}.
std::vector<std::string> words(const char* text) {
  std::istringstream stream(text);
  std::vector<std::string> out;
  for (std::string word; stream >> word;) out.push_back(word);
  return out;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> out;
  for (const auto isa : quarot::cpu::kIsas) {
    if (quarot::cpu::isa_available(isa)) out.emplace_back(quarot::cpu::isa_name(isa));
  }
  return out;
}

/// Address and bytes.
using Memory = std::pair<std::uintptr_t, std::size_t>;

quarot::ops::Tape new_tape(const std::vector<Memory>& inputs) {
  std::vector<quarot::ops::Tape::Place> places;
  for (const auto& [at, bytes] : inputs) places.push_back({at, bytes});
  return quarot::ops::Tape(std::move(places));
}

void run_tape(const quarot::ops::Tape& tape, const std::vector<std::uintptr_t>& inputs,
              const Memory& result, std::uintptr_t output) {
  tape.run(inputs, {result.first, result.second}, output);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "quarot's kernels, registered as torch.ops.quarot.*";
  m.attr("__version__") = QUAROT_VERSION;
  m.attr("cuda_archs") = words(QUAROT_CUDA_ARCH_LIST);
  // Deciding here makes a wrong QUAROT_CPU_ISA an error of the import.
  m.attr("cpu_isa") = quarot::cpu::isa_name(quarot::cpu::active_isa());
  m.attr("cpu_isas") = available_isas();

  using quarot::ops::Tape;
  pybind11::class_<Tape>(m, "Tape")
      .def(pybind11::init(&new_tape))
      .def("begin", &Tape::begin)
      .def("end", &Tape::end)
      .def("run", &run_tape)
      .def_property_readonly("calls", &Tape::calls);
}
