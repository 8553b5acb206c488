// The usual step of SGD, for small tensors: its parameter groups, read without Python.
#pragma once
#include "../common/optimizer_autograd.h"
#include "sgd_math.h"

namespace fastreg::autograd {

inline bool collect_sgd(const GroupOptions& options, PyObject* state, size_t first,
                        StepGroup<SgdArgs>* result) {
  SgdArgs& a = result->args;
  if (!read_options(options, &a.step) || !options.read("momentum", &a.momentum) ||
      !options.read("dampening", &a.dampening) || a.dampening != 0 ||
      !options.read("nesterov", &a.nesterov) || !options.read("decoupled", &a.decoupled))
    return false;
  static PyObject *const buffer = name_of("momentum_buffer"), *const step = name_of("step");
  PyObject* const counter = a.step.stochastic_rounding ? step : nullptr;
  if (a.momentum != 0) return collect_tensors(options, state, {buffer}, counter, first, result);
  return collect_tensors(options, state, {}, counter, first, result);
}

// (param_groups, state[, max_norm]), see step_groups
inline PyObject* sgd(PyObject*, PyObject* const* args, Py_ssize_t count) {
  static const auto step = reinterpret_cast<decltype(&sgd_step)>(PyCapsule_Import("fastreg._C.sgd_step", 0));
  return step_groups<SgdArgs>(args, count, step, collect_sgd);
}

inline const Method<sgd, 2, 3> register_sgd("sgd");

}  // namespace fastreg::autograd
