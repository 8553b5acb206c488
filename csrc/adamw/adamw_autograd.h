// The usual step of AdamW, for small tensors: its parameter groups, read without Python.
#pragma once
#include "../common/optimizer_autograd.h"
#include "adamw_math.h"

namespace fastreg::autograd {

inline bool collect_adamw(const GroupOptions& options, PyObject* state, size_t first,
                          StepGroup<AdamwArgs>* result) {
  AdamwArgs& a = result->args;
  PyObject* const betas = options.at("betas");
  const double below_one = std::nextafter(1., 0.);
  bool amsgrad = false;
  if (!read_options(options, &a.step) || !options.read("eps", &a.eps) ||
      !options.read("cautious", &a.cautious) || !options.read("amsgrad", &amsgrad) || !betas ||
      !PyTuple_CheckExact(betas) || PyTuple_GET_SIZE(betas) != 2 ||
      !number(PyTuple_GET_ITEM(betas, 0), 0, below_one, &a.beta1) ||
      !number(PyTuple_GET_ITEM(betas, 1), 0, below_one, &a.beta2))
    return false;
  static PyObject *const m = name_of("exp_avg"), *const v = name_of("exp_avg_sq"),
                         *const most = name_of("max_exp_avg_sq"), *const counter = name_of("step");
  if (amsgrad) return collect_tensors(options, state, {m, v, most}, counter, first, result);
  return collect_tensors(options, state, {m, v}, counter, first, result);
}

// (param_groups, state[, max_norm]), see step_groups
inline PyObject* adamw(PyObject*, PyObject* const* args, Py_ssize_t count) {
  static const auto step =
      reinterpret_cast<decltype(&adamw_step)>(PyCapsule_Import("fastreg._C.adamw_step", 0));
  return step_groups<AdamwArgs>(args, count, step, collect_adamw);
}

inline const Method<adamw, 2, 3> register_adamw("adamw");

}  // namespace fastreg::autograd
