// AdamW with both norm penalties and the moving average of the weights, all in one pass. With g = dE/dw and t
// the number of the step:
//
//   w <- w - lr * weight_decay * w                           decoupled (Loshchilov and Hutter 2019)
//   m <- beta1 * m + (1 - beta1) * g
//   v <- beta2 * v + (1 - beta2) * g^2                       amsgrad: the largest v of all steps is used
//   d <- sqrt(v / (1 - beta2^t)) + eps
//   w <- w - lr / (1 - beta1^t) * m / d                      (Kingma and Ba 2015)
//   w <- sign(w) max(|w| - lr * l1 / d, 0)                   proximal: weights become exactly 0
//   average <- ema * average + (1 - ema) * w                 (average <- w in its first step)
//
// The threshold is the proximal operator of l1 |w|_1 in the metric of the step, d / lr (Yun, Lozano, Yang
// 2021; Melchior, Joseph, Moolekamp 2019): with the same threshold for all weights the minimum that is
// reached would be another, one that depends on d. Where l1 is not proximal, g has l1 * sign(w) beside dE/dw.
// cautious: a weight whose step pushes it away from 0 does not decay (Chen et al. 2025). maximize negates
// dE/dw alone, as torch does. The average is taken of the weight before it is rounded.
//
// As in torch, m moves by a lerp, the step is divided by the correction of m, 1 - beta1^t, and the root of v
// by the root of its own, 1 - beta2^t.
#pragma once
#include "../common/isa.h"
#include "../common/optimizer_math.h"

namespace fastreg {

// The slots of m, v and, with amsgrad, of the largest v.
constexpr int kExpAvg = kState, kExpAvgSq = kState + 1, kMaxExpAvgSq = kState + 2;

// How many steps were done is read from StepTensor::counter; where that is null it is StepTensor::step.
struct AdamwArgs {
  StepArgs step;
  double beta1, beta2, eps;
  bool cautious;
};

// base^step for whole steps below 2^31, by repeated squaring: the same on every device.
FR_HD double power(double base, float step) {
  uint32_t rest = step > 0 ? (step < 0x1.fffffep30f ? uint32_t(step) : 0x7fffff80u) : 0;
  double result = 1;
  for (; rest; rest >>= 1) {
    if (rest & 1) result = result * base;
    base = base * base;
  }
  return result;
}

// The numbers of a step of one tensor, the same for all of its elements.
template <class V>
struct AdamwNumbers {
  V grad_factor, l1, beta2, take;  // take = 1 - beta2
  V unbias;                        // 1 / sqrt(1 - beta2^t)
  V eps;
  V decay;      // 1 - lr * weight_decay
  V rate;       // lr / (1 - beta1^t)
  V threshold;  // lr * l1
  Lerp<V> moment;
  Average<V> average;
  bool in_gradient, proximal, cautious, amsgrad;
};

// `steps_done` does not count this step. In float64 there are only products and differences, because a GPU
// computes quotients and roots of float64 in subroutines, for which every thread would need a stack.
template <class V, class A>
FR_HD AdamwNumbers<V> adamw_numbers(const AdamwArgs& a, float steps_done, const float* n_averaged,
                                    bool amsgrad) {
  const A lr = A(number_at(a.step.lr_at, a.step.lr_wide, a.step.lr));
  AdamwNumbers<V> n;
  n.grad_factor = V(gradient_factor<A>(a.step));
  n.l1 = V(A(a.step.l1));
  n.beta2 = V(A(a.beta2));
  n.take = V(A(1 - a.beta2));
  n.unbias = V(A(1) / square_root(A(1 - power(a.beta2, steps_done + 1))));
  n.eps = V(A(a.eps));
  n.decay = V(A(1) - lr * A(a.step.weight_decay));
  n.rate = V(lr / A(1 - power(a.beta1, steps_done + 1)));
  n.threshold = V(lr * A(a.step.l1));
  n.moment = Lerp<V>(A(1 - a.beta1));
  n.average = average_of<V, A>(a.step, n_averaged);
  n.in_gradient = a.step.l1 != 0 && !a.step.proximal;
  n.proximal = a.step.l1 != 0 && a.step.proximal;
  n.cautious = a.cautious;
  n.amsgrad = amsgrad;
  return n;
}

// Updates w, m, v and, with amsgrad, `most`, which is the largest v so far; a NaN in v or in `most` stays.
template <class V>
FR_HD void adamw_element(V& w, V g, V& m, V& v, V& most, const AdamwNumbers<V>& n) {
  const V zero(0);
  g = g * n.grad_factor;
  if (n.in_gradient) g = g + l1_pull(w, n.l1);
  m = flush_result(n.moment(m, g));
  v = flush_result(n.beta2 * v + n.take * g * g);
  V used = v;
  if (n.amsgrad) {
    most = flush(most);
    most = select(most == most, maximum(most, v), most);
    used = most;
  }
  const V inverse = V(1) / (square_root(used) * n.unbias + n.eps);  // a division takes as long as all else

  const V old = w;
  V decayed = w * n.decay;
  if (n.cautious)
    decayed = select(m > zero, select(w < zero, w, decayed),
                     select(m < zero, select(w > zero, w, decayed), decayed));
  w = kept_if_small(decayed - n.rate * m * inverse, old);
  if (n.proximal) w = soft_threshold(w, n.threshold * inverse);
}

struct AdamwKernels {
  // Elements [begin, end) of a tensor.
  void (*step)(const AdamwArgs&, const StepTensor&, int64_t begin, int64_t end);
};
FR_DECLARE_KERNELS(AdamwKernels, adamw_kernels)

// On a CUDA stream, in adamw_cuda.cu; gives a cudaError_t. Counts the steps, where they lie on the GPU, and
// the averages, unless the step was skipped.
int adamw_step_cuda(const AdamwArgs&, const StepTensor* tensors, size_t count, void* stream);

// One step of all tensors over torch's threads, in adamw_op.cpp. It checks nothing: its callers have.
void adamw_step(const AdamwArgs&, const StepTensor* tensors, size_t count);

}  // namespace fastreg
