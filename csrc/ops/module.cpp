// The Python module quarot._C. Importing it registers torch.ops.quarot.* (static initialisers of
// ops/*.cpp); torch must be imported first. No torch header here: the module itself says only what
// was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "kernels/cpu/isa.h"

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "quarot's kernels, registered as torch.ops.quarot.*";
  m.attr("__version__") = QUAROT_VERSION;
  m.attr("cuda_archs") = words(QUAROT_CUDA_ARCH_LIST);
  // Deciding here makes a wrong QUAROT_CPU_ISA an error of the import.
  m.attr("cpu_isa") = quarot::cpu::isa_name(quarot::cpu::active_isa());
  m.attr("cpu_isas") = available_isas();
}
