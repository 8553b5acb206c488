// The CUDA extension module: importing it registers the CUDA ops that are linked beside it. No torch header here.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(FASTREG_CUDA_MODULE, m) {
  m.def("build_info", [] {
    py::dict info;
    info["built_with_torch"] = FASTREG_BUILT_WITH_TORCH;
    info["nvcc"] = FASTREG_NVCC;
    info["architectures"] = FASTREG_CUDA_ARCHS;
    return info;
  });
}
