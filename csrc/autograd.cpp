// The fast path of autograd: most of the time of a small tensor is spent between Python and the kernel, and
// this is that part in C++.
//
// The formulas stand in csrc/<op>/<op>_autograd.h, over the raw operators, and give the same bits as those in
// Python. A function there takes the usual case, plain tensors on one device and arguments that pass every
// check, or gives None before it has done anything. Then the Python code runs, which is the one that knows
// transforms, subclasses and errors.
//
// This is the one translation unit that sees torch's C++ headers, which change with each minor version. It is
// built for one of them and named after it, fastreg._autograd_<major>_<minor>, and fastreg works without it.
#include "common/autograd.h"

#include "autograd_ops.h"  // written by CMake: every csrc/*/*_autograd.h

PYBIND11_MODULE(FASTREG_AUTOGRAD_MODULE, m, pybind11::mod_gil_not_used()) {
  m.attr("torch") = FASTREG_BUILT_WITH_TORCH;
  static std::vector<PyMethodDef> table = [] {
    std::vector<PyMethodDef> all = fastreg::autograd::methods();
    all.push_back({});  // the end of a table
    return all;
  }();
  if (PyModule_AddFunctions(m.ptr(), table.data())) throw pybind11::error_already_set();
}
