// The fast path of autograd: of a small tensor's time most is spent between Python and the kernel, and this
// is that part in C++.
//
// The formulas stand in csrc/<op>/<op>_autograd.h, over the raw operators, and give the same bits as those in
// Python. A function there takes the usual case, plain tensors on one device and arguments that pass every
// check, or gives None before it has done anything; the Python code is then the one that knows transforms,
// subclasses and errors.
//
// The one translation unit that sees torch's C++ headers, which change with each minor version: it is built
// for one and named after it, fastreg._autograd_<major>_<minor>, and fastreg works without.
#include "cross_entropy/cross_entropy_autograd.h"
#include "dropout/dropout_autograd.h"
#include "sgd/sgd_autograd.h"

PYBIND11_MODULE(FASTREG_AUTOGRAD_MODULE, m) {
  using namespace fastreg::autograd;
  static PyMethodDef own[] = {method<mix, 2>("mix_seed"), {}};
  m.attr("torch") = FASTREG_BUILT_WITH_TORCH;
  for (PyMethodDef* methods : {own, dropout_methods, cross_entropy_methods, sgd_methods})
    if (PyModule_AddFunctions(m.ptr(), methods)) throw pybind11::error_already_set();
}
