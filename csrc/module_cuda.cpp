// The CUDA extension module. Importing it registers the CUDA ops that are linked beside it. No torch header
// is included here, as in module.cpp.
#include <pybind11/pybind11.h>

#include "common/cuda_error.h"

namespace py = pybind11;

PYBIND11_MODULE(FASTREG_CUDA_MODULE, m, py::mod_gil_not_used()) {
  m.def("build_info", [] {
    py::dict info;
    info["built_with_torch"] = FASTREG_BUILT_WITH_TORCH;
    info["nvcc"] = FASTREG_NVCC;
    info["architectures"] = FASTREG_CUDA_ARCHS;
    return info;
  });
  m.def(
      "launch_error",
      [](const char* op, int error) { return fastreg::launch_error(op, static_cast<cudaError_t>(error)); },
      py::arg("op"), py::arg("error"), "What is said of an error of the CUDA runtime.");
}
