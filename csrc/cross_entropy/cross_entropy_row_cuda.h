// What the CUDA kernels of cross-entropy share: their arguments, the target of a row, the end of a row; only
// cross_entropy_cuda.cu includes it.
#pragma once
#include <cassert>

#include "../common/cuda.h"
#include "cross_entropy_math.h"
#include "cross_entropy_softmax_cuda.h"

namespace fastreg {
inline namespace cross_entropy_kernels {

template <class T, class G>
struct RowsWork {
  using A = typename Accumulate<T>::type;
  const T* logits;
  G* grad;  // may be the logits
  const int64_t* target;
  const void* soft;
  const A* weight;
  void* loss;
  A* lse;
  DType soft_dtype, loss_dtype;
  bool general;  // q differs from class to class beyond the target's
  int64_t rows, inner, classes, ignore_index;
  Divider per_outer;  // inner
  CrossEntropyArgs::Strides logits_stride, grad_stride, soft_stride;
  RowOptions<A> options;
  A q_all, q_rest;  // unless general: all q, and all but the target's
  A factor;
  const A* row_factor;     // one for each row; null: shared_factor
  const A* shared_factor;  // one for all; null: factor

  explicit RowsWork(const CrossEntropyArgs& a)
      : logits(static_cast<const T*>(a.logits)),
        grad(static_cast<G*>(a.grad)),
        target(a.target),
        soft(a.soft_target),
        weight(static_cast<const A*>(a.weight)),
        loss(nullptr),
        lse(nullptr),
        soft_dtype(a.target_dtype),
        loss_dtype(a.dtype),
        // "others" with eps = 1: a target of -inf has no mass, which base * -inf - base * -inf would not see
        general(a.soft_target || (a.base != 0 && (a.weight || a.mix + a.base == 0))),
        rows(a.outer * a.inner),
        inner(a.inner),
        classes(a.classes),
        ignore_index(a.ignore_index),
        per_outer(a.inner > 0 ? a.inner : 1),
        logits_stride(a.logits_stride),
        grad_stride(a.grad_stride),
        soft_stride(a.target_stride),
        options(a),
        q_all(A(a.mix + a.base * double(a.classes))),
        q_rest(A(a.base * double(a.classes - 1))),
        factor(A(a.grad_factor)),
        row_factor(static_cast<const A*>(a.row_factor)),
        shared_factor(nullptr) {}

  __device__ __forceinline__ bool spreads() const { return options.base != A(0); }
  __device__ __forceinline__ bool sums_dot() const { return general || spreads(); }

  __device__ __forceinline__ int64_t offset(const CrossEntropyArgs::Strides& stride, int64_t row) const {
    const int64_t n = per_outer.divide(row);
    return n * stride.outer + (row - n * inner) * stride.inner;
  }
  // q of a class, where general; of the class that is the target it is left to finish_row. soft_row: offset
  // of the row's probabilities.
  __device__ __forceinline__ A q_at(int64_t c, int64_t its_target, int64_t soft_row) const {
    const A w = weight ? weight[c] : A(1);
    if (soft) {
      const A t = load_as<A>(soft, soft_dtype, soft_row + c * soft_stride.cls);
      return smoothed_target(t, w, options.mix, options.base);
    }
    return c == its_target ? A(0) : w * options.base;
  }
  __device__ __forceinline__ A factor_of(int64_t row) const {
    return row_factor ? row_factor[row] : shared_factor ? *shared_factor : factor;
  }
};

enum Target : int64_t { kSoft = -1, kIgnored = -2, kInvalid = -3 };

// The class index of a row, or why it has none.
template <class T, class G>
__device__ __forceinline__ int64_t target_of(const RowsWork<T, G>& w, int64_t row) {
  if (w.soft) return kSoft;
  const int64_t t = w.target[row];
  if (t == w.ignore_index) return kIgnored;
  const bool valid = t >= 0 && t < w.classes;
  assert(valid && "cross_entropy: class index out of range");
  return valid ? t : int64_t(kInvalid);
}

// The gradient of each class of a row, but at_target of the target.
template <class A>
struct ClassGradient {
  A top;
  A softmax_factor;
  A factor, at_target;

  __device__ __forceinline__ A operator()(A x, A q) const {
    return flushed_multiply_add(exponential(x - top), softmax_factor,
                                A(0) - q * factor);  // cross_entropy_grad
  }
};

struct TimesReciprocal {
  template <class A>
  __device__ __forceinline__ A operator()(A a, A b) const {
    return a * reciprocal(b);
  }
};

// Ends a row of which s is known: the thread that `writes` writes its loss and lse; all get its gradient.
template <class T, class G, class A = typename Accumulate<T>::type>
__device__ __forceinline__ ClassGradient<A> finish_row(const RowsWork<T, G>& w, int64_t row, int64_t target,
                                                       A target_logit, const RunningSoftmax<A>& s,
                                                       bool writes) {
  const A nan = kInfinity<A> - kInfinity<A>;
  const bool hard = target >= 0;
  RowTarget<A> t{};
  const A target_weight = hard && w.weight ? w.weight[target] : A(1);
  if (hard) {
    t.shifted = target_logit - s.top;
    t.exp_shifted = exponential(t.shifted);
    t.q = target_weight * w.options.target_mass;
  }
  RowSums<A> sums;
  sums.top = s.top;
  sums.rest = s.top == kInfinity<A> || s.top == -kInfinity<A> ? nan : s.rest.value();
  sums.sum = A(1) + sums.rest;
  sums.log_sum = log_of_one_plus(sums.rest);
  sums.dot = s.dot.value();
  if (w.general) {
    t.q_unswept = t.q;  // q_at has left the target out
    sums.q_rest = s.mass.value();
    sums.q_sum = sums.q_rest + t.q;
  } else {
    t.q_unswept = target_weight * w.options.mix;
    sums.q_rest = w.q_rest;
    sums.q_sum = w.weight ? t.q : w.q_all;
  }
  RowLoss<A> result = row_loss(sums, t, w.options);
  A factor = w.grad ? w.factor_of(row) : A(0);
  if (target == kInvalid) result.loss = factor = nan;
  if (writes) {
    store_as(w.loss, w.loss_dtype, row, result.loss);
    if (w.lse) w.lse[row] = result.lse;
  }
  const RowGradient<A> gradient = row_gradient(sums, t, result.lse, w.options, factor, TimesReciprocal{});
  return {s.top, gradient.softmax_factor, factor, gradient.at_target};
}

template <class T, class G>
__device__ __forceinline__ void write_ignored(const RowsWork<T, G>& w, int64_t row) {
  using A = typename Accumulate<T>::type;
  store_as(w.loss, w.loss_dtype, row, A(0));
  if (w.lse) w.lse[row] = A(0);
}

}  // namespace cross_entropy_kernels
}  // namespace fastreg
