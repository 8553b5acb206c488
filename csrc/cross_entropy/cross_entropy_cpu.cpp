// Smoothed cross-entropy on the CPU with its gradient written in the same sweep; formula in cross_entropy_math.h.
// Bytes per float32 logit: reads 4 and writes 4, once each, as long as a row and its exponentials stay in the L2 cache: 8, the
// floor; 4 without gradient. The three passes over a row (largest, exponentials and their sum, gradient) are passes over cache.
#include <type_traits>
#include <vector>

#include "../common/simd.h"
#include "cross_entropy_math.h"

namespace fastreg::FASTREG_ISA {
namespace {

// One row of k contiguous logits. General: with class weights or soft targets; otherwise q is `base` everywhere and mix more at
// the target, which needs neither array. exps: room for k exponentials, or the gradient itself where it has their type.
template <bool kGeneral, class T, class G, class A>
void row(const CrossEntropyArgs& a, const T* x, const A* soft, int64_t target, A* exps, G* grad, double* loss, double* lse) {
  using V = Vec<A>;
  const int64_t k = a.classes;
  const A* weight = static_cast<const A*>(a.weight);
  const A infinity = A(__builtin_inf());

  V largest(-infinity);
  for_each_vector<A>(k, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    const V v = load(x + i, lanes, -infinity);
    largest = maximum(v, largest);
  });
  const A top = largest.max();

  const auto q_at = [&](int64_t i, int lanes) __attribute__((always_inline)) {
    const V t = soft ? load(soft + i, lanes) : V(A(0));
    V q = smoothed_target(t, weight ? load(weight + i, lanes) : V(A(1)), V(A(a.mix)), V(A(a.base)));
    return lanes == V::kLanes ? q : select(V::first(lanes), q, V(A(0)));
  };
  const A target_weight = kGeneral && !soft && weight ? weight[target] : A(1);
  const V zero{A(0)};
  const bool spread = a.base != 0;
  V total = zero, weighted = zero, mass = zero;
  for_each_vector<A>(k, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    const V shifted = load(x + i, lanes, -infinity) - V(top), e = exp_nonpositive(shifted);
    if (grad) store(exps + i, e, lanes);
    total = total + e;
    if (kGeneral) {
      const V q = q_at(i, lanes);
      weighted = weighted + weighted_logit(q, shifted);
      mass = mass + q;
    } else if (spread) {
      weighted = weighted + (lanes == V::kLanes ? shifted : select(V::first(lanes), shifted, zero));
    }
  });
  double sum = total.sum(), log_sum;
  if (sum < 1.125) {
    // One class has nearly all the mass. Its 1 has swallowed the last bits of the others', which are the whole loss where it is
    // the target: add those up alone.
    V rest = zero;
    for_each_vector<A>(k, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      const V e = grad ? load(exps + i, lanes) : exp_nonpositive(load(x + i, lanes, -infinity) - V(top));
      rest = rest + select(e < V(A(0.5)), e, zero);
    });
    const double others = rest.sum();
    sum = 1 + others;
    log_sum = std::log1p(others);
  } else {
    log_sum = std::log(sum);
  }
  double dot = weighted.sum(), q_sum;
  if (kGeneral) {
    q_sum = mass.sum();
  } else {
    dot = spread ? dot * a.base : 0;
    q_sum = a.base * double(k);
  }
  if (!soft) {
    const double q_target = double(target_weight) * a.mix;  // beyond the base that every class has
    const double shifted = double(to_float(x[target])) - double(top);
    if (q_target != 0) dot += q_target * shifted;
    if (a.mix + a.base == 0 && shifted == -double(infinity)) {  // "others" with eps = 1: no mass here, where dot became inf - inf
      dot = 0;
      for (int64_t c = 0; c < k; ++c) {
        const double q = a.base * (weight ? double(weight[c]) : 1);
        if (c != target && q != 0) dot += q * (double(to_float(x[c])) - double(top));
      }
    }
    q_sum += q_target;
  }
  *lse = double(top) + log_sum;
  *loss = q_sum * log_sum - dot + (a.z_loss != 0 ? a.z_loss * *lse * *lse : 0);

  if (!grad) return;
  const double softmax_factor = (q_sum + 2 * a.z_loss * *lse) * a.grad_factor / sum;
  const double target_exp = soft ? 0 : double(exps[target]);  // grad may be the same memory
  for_each_vector<A>(k, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    const V q = kGeneral ? q_at(i, lanes) : V(A(a.base));
    store(grad + i, cross_entropy_grad(load(exps + i, lanes), q, V(A(softmax_factor)), V(A(a.grad_factor))), lanes);
  });
  if (!soft) {
    const double q = double(target_weight) * (a.mix + a.base);
    from_float(A(cross_entropy_grad(target_exp, q, softmax_factor, a.grad_factor)), grad + target);
  }
}

template <class T, class G>
void forward_typed(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  const int64_t k = a.classes, per_outer = (a.positions + kRowBlock - 1) / kRowBlock;
  const bool direct = a.logits_stride.cls == 1 && (!a.grad || a.grad_stride.cls == 1);
  const bool keeps_exps = a.grad && !(direct && std::is_same_v<A, G>);
  // A block is gathered once per cache line, not once per row: neighbours in memory are neighbouring rows.
  const int64_t rows_at_once = direct ? 1 : kRowBlock;
  std::vector<A> exps(keeps_exps ? size_t(k) : 0), soft_row(a.soft_target ? size_t(k) : 0);
  std::vector<T> logits(direct ? 0 : size_t(k * kRowBlock));
  std::vector<G> grads(direct || !a.grad ? 0 : size_t(k * kRowBlock));

  for (int64_t block = begin; block < end; ++block) {
    const int64_t n = block / per_outer, first = block % per_outer * kRowBlock;
    const int64_t last = first + kRowBlock < a.positions ? first + kRowBlock : a.positions;
    for (int64_t s0 = first; s0 < last; s0 += rows_at_once) {
      const int64_t rows = last - s0 < rows_at_once ? last - s0 : rows_at_once;
      const T* x = static_cast<const T*>(a.logits) + n * a.logits_stride.outer + s0 * a.logits_stride.position;
      G* g = static_cast<G*>(a.grad) + (a.grad ? n * a.grad_stride.outer + s0 * a.grad_stride.position : 0);
      if (!direct) {
        for (int64_t c = 0; c < k; ++c)
          for (int64_t r = 0; r < rows; ++r)
            logits[size_t(r * k + c)] = x[c * a.logits_stride.cls + r * a.logits_stride.position];
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t index = n * a.positions + s0 + r;
        const T* row_x = direct ? x : logits.data() + r * k;
        G* row_g = !a.grad ? nullptr : direct ? g : grads.data() + r * k;
        A* row_exps = exps.data();
        if constexpr (std::is_same_v<A, G>) {
          if (direct) row_exps = row_g;
        }
        const int64_t target = a.target ? a.target[index] : 0;
        if (a.target && target == a.ignore_index) {
          a.row_loss[index] = a.row_lse[index] = 0;
          if (row_g) memset(static_cast<void*>(row_g), 0, size_t(k) * sizeof(G));
          continue;
        }
        if (a.soft_target) {
          with_dtype(a.target_dtype, [&](auto* type) {
            using S = std::remove_pointer_t<decltype(type)>;
            const S* t = static_cast<const S*>(a.soft_target) + n * a.target_stride.outer + (s0 + r) * a.target_stride.position;
            for (int64_t c = 0; c < k; ++c) soft_row[size_t(c)] = A(to_float(t[c * a.target_stride.cls]));
          });
        }
        const A* soft = a.soft_target ? soft_row.data() : nullptr;
        const auto run = soft || a.weight ? row<true, T, G, A> : row<false, T, G, A>;
        run(a, row_x, soft, target, row_exps, row_g, a.row_loss + index, a.row_lse + index);
      }
      if (!direct && a.grad) {
        for (int64_t c = 0; c < k; ++c)
          for (int64_t r = 0; r < rows; ++r) g[c * a.grad_stride.cls + r * a.grad_stride.position] = grads[size_t(r * k + c)];
      }
    }
  }
}

void forward(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    // A float16 gradient is kept in float32: its small values would vanish before a loss scale could lift them.
    using G = std::conditional_t<std::is_same_v<T, Half>, float, T>;
    forward_typed<T, G>(a, begin, end);
  });
}

}  // namespace

extern const CrossEntropyKernels cross_entropy_kernels;
const CrossEntropyKernels cross_entropy_kernels = {forward};

}  // namespace fastreg::FASTREG_ISA
