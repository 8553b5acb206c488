// A step of SGD over many small tensors. In Python, collecting them would take longer than the step. The
// rules are those of SGD._collect and the checks beside it in fastreg/optim.py.
#pragma once
#include "../common/autograd.h"
#include "sgd_math.h"

namespace fastreg::autograd {

// A tensor on the CPU that fills its memory without gaps, so that elementwise work can walk it as flat
// memory.
inline const Tensor* flat(PyObject* object) {
  const Tensor* t = plain(object);
  return t && t->is_cpu() && has_kernel(t->scalar_type()) && t->is_non_overlapping_and_dense() ? t : nullptr;
}

inline bool same_form(const Tensor& a, const Tensor& b) {
  return is_plain(b) && a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         a.strides() == b.strides();
}

inline DType dtype_of(ScalarType type) {  // one that has kernels
  return type == ScalarType::Float    ? DType::kFloat32
         : type == ScalarType::Double ? DType::kFloat64
         : type == ScalarType::Half   ? DType::kFloat16
                                      : DType::kBFloat16;
}

// What a step needs of a parameter group.
struct SgdGroup {
  SgdArgs args{};
  std::unique_ptr<SgdTensor[]> tensors;
  std::vector<Tensor> params;  // those with a gradient
  // Gradients and buffers: while no lock of Python is held, another thread may drop them.
  std::vector<Tensor> held;
};

// False for a parameter group that is not the usual case. Python has checked that its numbers are in range.
inline bool collect(PyObject* group, PyObject* state, SgdGroup* result) {
  SgdArgs& a = result->args;
  const auto item = [&](const char* name) { return PyDict_GetItemString(group, name); };
  const auto read = [&](const char* name, double* value) {
    return item(name) && number(item(name), 0, std::numeric_limits<double>::max(), value);
  };
  for (const char* name : {"nesterov", "decoupled", "maximize"})
    if (!item(name) || !is_bool(item(name))) return false;
  PyObject *list = item("params"), *mode = item("l1_mode");
  if (!list || !PyList_CheckExact(list) || !mode || item("stochastic_rounding") != Py_False ||
      !read("lr", &a.lr) || !read("momentum", &a.momentum) || !read("dampening", &a.dampening) ||
      a.dampening != 0 || !read("weight_decay", &a.weight_decay) || !read("l1", &a.l1))
    return false;
  a.grad_scale = 1;
  a.nesterov = item("nesterov") == Py_True;
  a.decoupled = item("decoupled") == Py_True;
  a.maximize = item("maximize") == Py_True;
  a.proximal = choice(mode, {"subgradient", "proximal"}) == 1;
  const Py_ssize_t count = PyList_GET_SIZE(list);
  // Not zeroed: most of it are layouts that nobody reads.
  result->tensors = std::make_unique_for_overwrite<SgdTensor[]>(size_t(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* object = PyList_GET_ITEM(list, i);
    const Tensor* param = flat(object);
    if (!param) return false;
    const Tensor& grad = param->grad();
    if (!grad.defined()) continue;
    const Tensor* buffer = nullptr;
    if (a.momentum != 0) {
      PyObject* own = PyDict_GetItemWithError(state, object);
      PyObject* kept = own && PyDict_CheckExact(own) ? PyDict_GetItemString(own, "momentum_buffer") : nullptr;
      buffer = kept ? flat(kept) : nullptr;
    }
    if (!same_form(*param, grad) || (a.momentum != 0 && !(buffer && same_form(*param, *buffer))))
      return false;
    SgdTensor& t = result->tensors[result->params.size()];
    t.dtype = dtype_of(param->scalar_type());
    t.param = param->mutable_data_ptr();
    t.grad = grad.const_data_ptr();
    t.momentum = buffer ? buffer->mutable_data_ptr() : nullptr;
    t.param_layout.numel = param->numel();
    t.started = nullptr;
    result->params.push_back(*param);
    result->held.push_back(grad);
    if (buffer) result->held.push_back(*buffer);
  }
  return true;
}

// (param_groups, state) -> True if all of them have been stepped, None if none has
inline PyObject* sgd(PyObject*, PyObject* const* args, Py_ssize_t) {
  static const auto step = reinterpret_cast<decltype(&sgd_step)>(PyCapsule_Import("fastreg._C.sgd_step", 0));
  if (!step) return nullptr;
  if (!PyList_CheckExact(args[0]) || !PyDict_Check(args[1]) || is_transformed()) Py_RETURN_NONE;
  std::vector<SgdGroup> groups(size_t(PyList_GET_SIZE(args[0])));
  for (size_t i = 0; i < groups.size(); ++i) {
    PyObject* group = PyList_GET_ITEM(args[0], Py_ssize_t(i));
    if (!PyDict_CheckExact(group) || !collect(group, args[1], &groups[i])) {
      if (PyErr_Occurred()) return nullptr;
      Py_RETURN_NONE;
    }
  }
  {
    const pybind11::gil_scoped_release no_gil;
    for (const SgdGroup& group : groups) {
      step(group.args, group.tensors.get(), group.params.size());
      for (const Tensor& param : group.params)
        param.unsafeGetTensorImpl()->bump_version();  // a graph that saved it must notice
    }
  }
  Py_RETURN_TRUE;
}

inline const Method<sgd, 2> register_sgd("sgd");

}  // namespace fastreg::autograd
