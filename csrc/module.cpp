// The extension module. Importing it registers the CPU ops that are linked beside it. No torch header is
// included here, since pybind11 and torch's stable headers alone keep a wheel independent of torch's version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>

#include "common/capsule.h"
#include "common/isa.h"
#include "common/philox.h"
#include "no_cuda.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  fastreg::isa();  // an impossible FASTREG_CPU_CAPABILITY fails here and not at the first op
  m.def("build_info", [] {
    py::dict info;
    info["version"] = FASTREG_VERSION;
    info["built_with_torch"] = FASTREG_BUILT_WITH_TORCH;
    info["stable_abi"] = "2.10";
    info["compiler"] = FASTREG_COMPILER;
    info["build_type"] = FASTREG_BUILD_TYPE;
    info["no_cuda"] = FASTREG_NO_CUDA;
    info["instruction_sets"] = fastreg::isa_list();
    info["instruction_set"] = fastreg::isa_name();
    return info;
  });
  for (const auto* c = fastreg::Capsule::last; c; c = c->before)
    m.attr(std::strrchr(c->name, '.') + 1) = py::capsule(c->function, c->name);
  m.def(
      "philox4x32",
      [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
        const auto words =
            fastreg::philox4x32(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
        return std::array<uint32_t, 4>{words.word[0], words.word[1], words.word[2], words.word[3]};
      },
      py::arg("counter"), py::arg("key"),
      "Philox4x32-10 of a 4-word counter and a 2-word key, to check against known answers.");
}
