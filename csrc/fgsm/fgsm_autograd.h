// The usual call of fgsm_step in C++: two plain tensors and numbers. Nothing is derived; what is saved is the
// way from Python to the kernel, which takes longer than the step of a small image.
#pragma once
#include "../common/autograd.h"

namespace fastreg::autograd {

// A bound, where None is no bound.
inline bool bound(PyObject* object, double otherwise, double* value) {
  constexpr double most = std::numeric_limits<double>::infinity();
  *value = otherwise;
  return object == Py_None || number(object, -most, most, value);
}

// (x, grad, eps, lower or None, upper or None) -> output or None
inline PyObject* fgsm_step(PyObject*, PyObject* const* args, Py_ssize_t) {
  using Values = std::optional<Tensor>;
  static const auto op = find<Tensor(const Tensor&, const Tensor&, double, double, double, const Values&,
                                     const Values&, const Values&)>("fastreg::fgsm_step");
  constexpr double most = std::numeric_limits<double>::max(), inf = std::numeric_limits<double>::infinity();
  const Tensor *x = plain(args[0]), *grad = plain(args[1]);
  double eps = 0, lower = 0, upper = 0;
  if (!x || !grad || !number(args[2], -most, most, &eps) || !bound(args[3], -inf, &lower) ||
      !bound(args[4], inf, &upper) || lower > upper || is_transformed())
    Py_RETURN_NONE;
  // What the operator would refuse is refused by Python.
  if (!has_kernel(x->scalar_type()) || x->dim() > 16 || grad->scalar_type() != x->scalar_type() ||
      grad->sizes() != x->sizes() || grad->device() != x->device())
    Py_RETURN_NONE;
  return without_lock([&] { return call(op, *x, *grad, eps, lower, upper, Values(), Values(), Values()); });
}

inline const Method<fgsm_step, 5> register_fgsm_step("fgsm_step");

}  // namespace fastreg::autograd
