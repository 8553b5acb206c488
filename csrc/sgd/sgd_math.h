// Stochastic gradient descent with momentum and the two norm penalties, all in one pass:
//
//   g <- dE/dw + weight_decay * w + l1 * sign(w)        subgradient form, sign(0) = 0
//   v <- momentum * v + (1 - dampening) * g             (v <- g in the first step)
//   w <- w - lr * (nesterov ? g + momentum * v : v)
//   average <- ema * average + (1 - ema) * w            (average <- w in its first step)
//
// proximal: l1 is not in the gradient, and w <- sign(w) max(|w| - lr * l1, 0) follows the step, so that
// weights become exactly 0 (Daubechies, Defrise, De Mol 2004; Parikh and Boyd 2014). decoupled: both
// penalties act on the weight beside the step and not through the momentum (Loshchilov and Hutter 2019).
// maximize negates dE/dw alone, as torch does. The average is taken of the weight before it is rounded.
#pragma once
#include "../common/isa.h"
#include "../common/optimizer_math.h"

namespace fastreg {

constexpr int kMomentum = kState;  // the slot of the momentum; null: plain SGD
// StepTensor::counter is 0 before the first step. Null without dampening, where a fresh buffer of zeros needs
// no first step, unless there are numbers to draw for each step.

struct SgdArgs {
  StepArgs step;
  double momentum, dampening;
  bool nesterov, decoupled;
};

// Whether the counter counts the steps, or only tells that there was one.
inline bool sgd_counts(const SgdArgs& a) { return a.step.stochastic_rounding; }

// What changes the instructions of an element. On the CPU it is fixed at compile time, since choosing at run
// time would cost more than the arithmetic; on a GPU choosing costs less than the code of all cases would.
enum class SgdMomentum { kNone, kHeavyBall, kNesterov };
inline SgdMomentum sgd_momentum(const SgdArgs& a) {
  return a.momentum == 0 ? SgdMomentum::kNone : a.nesterov ? SgdMomentum::kNesterov : SgdMomentum::kHeavyBall;
}
// Where weight_decay acts, and l1 in the subgradient form.
enum class SgdPenalty { kNone, kInGradient, kDecoupled };
inline SgdPenalty sgd_penalty(const SgdArgs& a) {
  if (a.step.weight_decay == 0 && (a.step.l1 == 0 || a.step.proximal)) return SgdPenalty::kNone;
  return a.decoupled ? SgdPenalty::kDecoupled : SgdPenalty::kInGradient;
}

// The numbers of a step of one tensor.
template <class V>
struct SgdNumbers {
  V grad_factor, lr, momentum, keep, take, weight_decay, l1, threshold;
  Average<V> average;
  bool proximal;
};

template <class V, class A>
FR_HD SgdNumbers<V> sgd_numbers(const SgdArgs& a, const float* started, const float* n_averaged) {
  const bool first_step = started && *started == 0;
  const A lr = A(number_at(a.step.lr_at, a.step.lr_wide, a.step.lr)), l1 = A(a.step.l1);
  SgdNumbers<V> n;
  n.grad_factor = V(gradient_factor<A>(a.step));
  n.lr = V(lr);
  n.momentum = V(A(a.momentum));
  n.keep = V(first_step ? A(0) : A(a.momentum));  // the buffer of a first step holds zeros
  n.take = V(first_step ? A(1) : A(1 - a.dampening));
  n.weight_decay = V(A(a.step.weight_decay));
  n.proximal = a.step.proximal && a.step.l1 != 0;
  n.l1 = V(n.proximal ? A(0) : l1);
  n.threshold = V(lr * l1);
  n.average = average_of<V, A>(a.step, n_averaged);
  return n;
}

// g + weight_decay * w + l1 * sign(w); a factor of 0 makes no NaN of an infinite w.
template <class V>
FR_HD V plus_penalty(V g, V w, const SgdNumbers<V>& n) {
  const V zero(0);
  g = g + select(n.weight_decay > zero, n.weight_decay * w, zero);
  return g + l1_pull(w, n.l1);
}

// Updates w, and v if there is momentum.
template <class V>
FR_HD void sgd_element(SgdMomentum momentum, SgdPenalty penalty, V& w, V g, V& v, const SgdNumbers<V>& n) {
  const V old = w;
  g = g * n.grad_factor;
  if (penalty == SgdPenalty::kInGradient) g = plus_penalty(g, old, n);
  if (momentum != SgdMomentum::kNone) {
    v = flush_result(n.keep * v + n.take * g);
    g = momentum == SgdMomentum::kNesterov ? g + n.momentum * v : v;
  }
  if (penalty == SgdPenalty::kDecoupled) g = g + plus_penalty(V(0), old, n);
  w = kept_if_small(old - n.lr * g, old);
  if (n.proximal) w = soft_threshold(w, n.threshold);
}

struct SgdKernels {
  // Elements [begin, end) of a tensor.
  void (*step)(const SgdArgs&, const StepTensor&, int64_t begin, int64_t end);
};
FR_DECLARE_KERNELS(SgdKernels, sgd_kernels)

// On a CUDA stream, in sgd_cuda.cu; gives a cudaError_t. Sets `counter`, where it is not null, to 1 and
// counts the averages, unless the step was skipped.
int sgd_step_cuda(const SgdArgs&, const StepTensor* tensors, size_t count, void* stream);

// One step of all tensors over torch's threads, in sgd_op.cpp. It checks nothing: its callers have.
void sgd_step(const SgdArgs&, const StepTensor* tensors, size_t count);

}  // namespace fastreg
