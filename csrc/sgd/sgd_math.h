// Stochastic gradient descent with momentum and the two norm penalties, all in one pass:
//
//   g <- dE/dw + weight_decay * w + l1 * sign(w)        subgradient form, sign(0) = 0
//   v <- momentum * v + (1 - dampening) * g             (v <- g in the first step)
//   w <- w - lr * (nesterov ? g + momentum * v : v)
//
// proximal: l1 is not in the gradient, and w <- sign(w) max(|w| - lr * l1, 0) follows the step, so that
// weights become exactly 0 (Daubechies, Defrise, De Mol 2004; Parikh and Boyd 2014). decoupled: both
// penalties act on the weight beside the step and not through the momentum (Loshchilov and Hutter 2019).
// maximize negates dE/dw alone, as torch does.
#pragma once
#include <cstddef>

#include "../common/device.h"
#include "../common/isa.h"
#include "../common/optimizer_math.h"
#include "../common/philox.h"

namespace fastreg {

struct SgdTensor {
  DType dtype;
  void *param, *momentum;  // momentum null: plain SGD
  const void* grad;
  // 0 before the first step. Null without dampening, where a fresh buffer of zeros needs no first step.
  float* started;
  Layout param_layout, grad_layout, momentum_layout;
};

struct SgdArgs {
  double lr, momentum, dampening, weight_decay, l1;
  double grad_scale;  // the gradient is divided by this
  bool nesterov, proximal, decoupled, maximize;
  bool stochastic_rounding;  // of bfloat16 parameters
  Seed seed;
  // Numbers in a GPU's memory, which only the kernel may look at. Null stands for the values above, and for
  // no overflow.
  const void* lr_at;  // float64 if lr_wide, else float32
  bool lr_wide;
  const float *grad_scale_at, *found_inf_at;
};

// What changes the instructions of an element. On the CPU it is fixed at compile time, since choosing at run
// time would cost more than the arithmetic; on a GPU choosing costs less than the code of all cases would.
enum class SgdMomentum { kNone, kHeavyBall, kNesterov };
// Of weight_decay, and of l1 in the subgradient form.
enum class SgdPenalty { kNone, kInGradient, kDecoupled };

// The numbers of a call in the type of the arithmetic.
template <class A>
struct SgdConstants {
  A lr, grad_factor, momentum, take, weight_decay, l1;
  bool proximal;
  explicit SgdConstants(const SgdArgs& a)
      : lr(A(a.lr)),
        grad_factor(A((a.maximize ? -1 : 1) / a.grad_scale)),
        momentum(A(a.momentum)),
        take(A(1 - a.dampening)),
        weight_decay(A(a.weight_decay)),
        l1(A(a.l1)),
        proximal(a.proximal && a.l1 != 0) {}
};

template <class V>
struct SgdNumbers {
  V grad_factor, lr, momentum, keep, take, weight_decay, l1, threshold;
  bool proximal;
};

template <class V, class A>
FR_HD SgdNumbers<V> sgd_numbers(const SgdConstants<A>& c, bool first_step) {
  SgdNumbers<V> n;
  n.grad_factor = V(c.grad_factor);
  n.lr = V(c.lr);
  n.momentum = V(c.momentum);
  n.keep = V(first_step ? A(0) : c.momentum);  // the buffer of a first step holds zeros
  n.take = V(first_step ? A(1) : c.take);
  n.weight_decay = V(c.weight_decay);
  n.l1 = V(c.proximal ? A(0) : c.l1);
  n.threshold = V(c.lr * c.l1);
  n.proximal = c.proximal;
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
  return g + l1_pull(w, n.l1);
}

// Updates w, and v if there is momentum.
template <class V>
FR_HD void sgd_element(SgdMomentum momentum, SgdPenalty penalty, V& w, V g, V& v, const SgdNumbers<V>& n) {
  const V old = w;
  g = g * n.grad_factor;
  if (penalty == SgdPenalty::kInGradient) g = plus_penalty(g, old, n);
  if (momentum != SgdMomentum::kNone) {
    v = flush(n.keep * v + n.take * g);
    g = momentum == SgdMomentum::kNesterov ? g + n.momentum * v : v;
  }
  if (penalty == SgdPenalty::kDecoupled) g = g + plus_penalty(V(0), old, n);
  w = old - n.lr * g;
  if (n.proximal) w = soft_threshold(w, n.threshold);
}

struct SgdKernels {
  // Elements [begin, end) of a tensor; begin is a multiple of 8. Its index among those of the step is its
  // draw.
  void (*step)(const SgdArgs&, const SgdTensor&, uint32_t tensor_index, int64_t begin, int64_t end);
};
FR_DECLARE_KERNELS(SgdKernels, sgd_kernels)

// On a CUDA stream, in sgd_cuda.cu; gives a cudaError_t. Sets `started`, where it is not null, to 1 unless
// the step was skipped.
int sgd_step_cuda(const SgdArgs&, const SgdTensor* tensors, size_t count, void* stream);

// One step of all tensors over torch's threads, in sgd_op.cpp. It checks nothing: its callers have.
void sgd_step(const SgdArgs&, const SgdTensor* tensors, size_t count);

}  // namespace fastreg
