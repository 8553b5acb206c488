// Stochastic gradient descent with momentum and the two norm penalties, all in one pass:
//
//   g <- dE/dw + weight_decay * w + l1 * sign(w)        subgradient form, sign(0) = 0
//   v <- momentum * v + (1 - dampening) * g             (v <- g in the first step)
//   w <- w - lr * (nesterov ? g + momentum * v : v)
//
// proximal: l1 leaves the gradient, and w <- sign(w) max(|w| - lr * l1, 0) follows the step, so that weights become exactly 0
// (Daubechies, Defrise, De Mol 2004; Parikh and Boyd 2014). decoupled: both penalties act on the weight beside the step, not
// through the momentum (Loshchilov and Hutter 2019). maximize negates dE/dw alone, as torch does.
#pragma once
#include "../common/device.h"
#include "../common/isa.h"
#include "../common/philox.h"

namespace fastreg {

struct SgdTensor {
  DType dtype;
  void *param, *momentum;  // momentum null: plain SGD
  const void* grad;
  Layout param_layout, grad_layout, momentum_layout;
  bool first_step;  // with dampening only: a fresh buffer of zeros needs no first step otherwise
};

struct SgdArgs {
  double lr, momentum, dampening, weight_decay, l1;
  double grad_scale;  // the gradient is divided by this
  bool nesterov, proximal, decoupled, maximize;
  bool stochastic_rounding;  // of bfloat16 parameters
  uint64_t seed;
};

template <class V>
FR_HD V sgd_sign(V w) {
  const V zero(0), one(1);
  return select(w > zero, one, select(w < zero, zero - one, zero));
}

template <class V>
FR_HD V soft_threshold(V w, V t) {
  const V zero(0);
  return select(w > t, w - t, select(w < zero - t, w + t, select(w == w, zero, w)));
}

template <class V>
struct SgdNumbers {
  V lr, momentum, one_minus_dampening, weight_decay, l1, grad_factor;
};

// Updates w and v. The flags are the same for every element of a call.
template <class V>
FR_HD void sgd_element(V& w, V g, V* v, const SgdNumbers<V>& c, const SgdArgs& a, bool first_step) {
  g = g * c.grad_factor;
  V beside(0);
  if (a.decoupled) {
    if (a.weight_decay != 0) beside = c.weight_decay * w;
    if (a.l1 != 0 && !a.proximal) beside = beside + c.l1 * sgd_sign(w);
  } else {
    if (a.weight_decay != 0) g = g + c.weight_decay * w;
    if (a.l1 != 0 && !a.proximal) g = g + c.l1 * sgd_sign(w);
  }
  if (v) {
    *v = first_step ? g : c.momentum * *v + c.one_minus_dampening * g;
    g = a.nesterov ? g + c.momentum * *v : *v;
  }
  if (a.decoupled) g = g + beside;
  w = w - c.lr * g;
  if (a.l1 != 0 && a.proximal) w = soft_threshold(w, c.lr * c.l1);
}

struct SgdKernels {
  void (*step)(const SgdArgs&, const SgdTensor&, uint32_t tensor_index, int64_t begin, int64_t end);  // elements [begin, end)
};
FR_DECLARE_KERNELS(SgdKernels, sgd_kernels)

}  // namespace fastreg
