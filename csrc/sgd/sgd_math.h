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
#include <cstddef>

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

// What changes the instructions of an element, fixed at compile time: in the loop it would cost more than the arithmetic.
enum class SgdMomentum { kNone, kHeavyBall, kNesterov };
enum class SgdPenalty { kNone, kInGradient, kDecoupled };  // of weight_decay and of l1 in the subgradient form

// The numbers of a call in the type of the arithmetic.
template <class V>
struct SgdNumbers {
  V grad_factor, lr, momentum, keep, take, weight_decay, l1, threshold;
  bool proximal;
};

template <class V, class A>
FR_HD SgdNumbers<V> sgd_numbers(const SgdArgs& a, bool first_step) {
  const A lr = A(a.lr), l1 = A(a.l1);
  SgdNumbers<V> n;
  n.grad_factor = V(A((a.maximize ? -1 : 1) / a.grad_scale));
  n.lr = V(lr);
  n.momentum = V(A(a.momentum));
  n.keep = V(A(first_step ? 0 : a.momentum));  // the buffer of a first step holds zeros
  n.take = V(A(first_step ? 1 : 1 - a.dampening));
  n.weight_decay = V(A(a.weight_decay));
  n.l1 = V(a.proximal ? A(0) : l1);
  n.threshold = V(lr * l1);
  n.proximal = a.proximal && a.l1 != 0;
  return n;
}

inline SgdPenalty sgd_penalty(const SgdArgs& a) {
  if (a.weight_decay == 0 && (a.l1 == 0 || a.proximal)) return SgdPenalty::kNone;
  return a.decoupled ? SgdPenalty::kDecoupled : SgdPenalty::kInGradient;
}

// g + weight_decay * w + l1 * sign(w); a factor of 0 makes no NaN of an infinite w.
template <class V>
FR_HD V plus_penalty(V g, V w, const SgdNumbers<V>& n) {
  const V zero(0);
  g = g + select(n.weight_decay > zero, n.weight_decay * w, zero);
  return g + select(w > zero, n.l1, select(w < zero, zero - n.l1, zero));
}

// sign(w) max(|w| - t, 0) as w less what lies of it in [-t, t]: +0 inside, NaN kept
template <class V>
FR_HD V soft_threshold(V w, V t) {
  const V from_below = select(w < V(0) - t, V(0) - t, w);
  return w - select(from_below > t, t, from_below);
}

// Updates w, and v if there is momentum.
template <SgdMomentum kMomentum, SgdPenalty kPenalty, class V>
FR_HD void sgd_element(V& w, V g, V& v, const SgdNumbers<V>& n) {
  const V old = w;
  g = g * n.grad_factor;
  if (kPenalty == SgdPenalty::kInGradient) g = plus_penalty(g, old, n);
  if (kMomentum != SgdMomentum::kNone) {
    v = n.keep * v + n.take * g;
    g = kMomentum == SgdMomentum::kNesterov ? g + n.momentum * v : v;
  }
  if (kPenalty == SgdPenalty::kDecoupled) g = g + plus_penalty(V(0), old, n);
  w = old - n.lr * g;
  if (n.proximal) w = soft_threshold(w, n.threshold);
}

struct SgdKernels {
  void (*step)(const SgdArgs&, const SgdTensor&, uint32_t tensor_index, int64_t begin, int64_t end);  // elements [begin, end)
};
FR_DECLARE_KERNELS(SgdKernels, sgd_kernels)

// One step of all tensors over torch's threads, in sgd_op.cpp: nothing is checked any more.
void sgd_step(const SgdArgs&, const SgdTensor* tensors, size_t count);

}  // namespace fastreg
