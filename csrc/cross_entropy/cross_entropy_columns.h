// Cross-entropy where neighbouring rows lie side by side in memory, as the pixels of (N, C, H, W): each row
// has a lane, so that nothing is transposed and nothing is summed across lanes. Formula and arguments as in
// cross_entropy_math.h; only cross_entropy_cpu.cpp includes it.
//
// Bytes per float32 logit: reads 4 and writes 4, once each, as long as the logits and exponentials of
// kLanes rows stay in the L2 cache.
#pragma once
#include <type_traits>
#include <vector>

#include "../common/simd.h"
#include "cross_entropy_math.h"

namespace fastreg::FASTREG_ISA {
namespace {

// So many classes are summed before they join the sum: rounding errors stay those of short sums.
constexpr int64_t kShortSum = 64;

// Rows [first, first + lanes) of one batch element.
template <bool kWeighted, class T, class G, class S, class A>
struct Columns {
  using V = Vec<A>;
  static constexpr int kLanes = V::kLanes;
  const CrossEntropyArgs& a;
  const T* x;     // class 0 of the first row, as `soft` and `grad`
  const S* soft;  // probabilities; null where the targets are class indices
  G* grad;        // null: no gradient is wanted
  int64_t index;  // of the first row among all
  int lanes;
  A* exps;  // room for classes * kLanes
  const A* weight = static_cast<const A*>(a.weight);
  const int64_t k = a.classes;

  // What each row has at its target; zeros where the targets are soft.
  struct Targets {
    A logit[kLanes] = {}, weight[kLanes] = {};
    uint32_t kept;
  };
  struct Totals {
    V exps, dot, mass;
  };

  FR_INLINE V q_at(int64_t c) const {
    const V t = soft ? load(soft + c * a.target_stride.cls, lanes) : V(A(0));
    return smoothed_target(t, V(weight ? weight[c] : A(1)), V(A(a.mix)), V(A(a.base)));
  }

  FR_INLINE void read_targets(Targets& t) const {
    t.kept = (1u << lanes) - 1u;
    if (soft) return;
    for (int j = 0; j < lanes; ++j) {
      const int64_t target = a.target[index + j];
      if (target == a.ignore_index) {
        t.kept &= ~(1u << j);
        continue;
      }
      t.logit[j] = to_float(x[target * a.logits_stride.cls + j]);
      t.weight[j] = weight ? weight[target] : A(1);
    }
  }

  FR_INLINE V largest() const {
    const A infinity = A(__builtin_inf());
    V top(-infinity);
    for (int64_t c = 0; c < k; ++c) top = maximum(load(x + c * a.logits_stride.cls, lanes, -infinity), top);
    return top;
  }

  FR_INLINE Totals sweep(const V& origin) const {
    const V zero{A(0)};
    const bool spread = a.base != 0;
    Totals all{zero, zero, zero};
    for (int64_t first = 0; first < k; first += kShortSum) {
      V total = zero, dot = zero, mass = zero;
      for (int64_t c = first; c < k && c < first + kShortSum; ++c) {
        const V shifted = load(x + c * a.logits_stride.cls, lanes) - origin, e = exp_nonpositive(shifted);
        if (kWeighted) {
          const V q = q_at(c);
          dot = dot + weighted_logit(q, shifted);
          mass = mass + q;
        } else if (spread) {
          dot = dot + shifted;
        }
        total = total + e;
        store(exps + c * kLanes, e);
      }
      all = {all.exps + total, all.dot + dot, all.mass + mass};
    }
    return all;
  }

  FR_INLINE RowSums<V> sums(const V& top, const Totals& totals) const {
    const V one{A(1)};
    RowSums<V> s;
    s.top = top;
    s.sum = select(top == V(-A(__builtin_inf())), V(A(__builtin_nan(""))), totals.exps);
    s.rest = s.sum - one;
    // Where one class has nearly all the mass, its 1 has rounded away the last digits of the others'. Only
    // that one can be 0.5 or more.
    const auto peaked = s.sum < V(A(kPeakedSum));
    if (any(peaked)) {
      V rest{A(0)};
      for (int64_t c = 0; c < k; ++c) {
        const V e = load(exps + c * kLanes);
        rest = rest + select(e < V(A(0.5)), e, V(A(0)));
      }
      s.rest = select(peaked, rest, s.rest);
      s.sum = select(peaked, one + rest, s.sum);
      s.log_sum = select(peaked, log1p_small(rest), log_from_one(s.sum));
    } else {
      s.log_sum = log_from_one(s.sum);
    }
    s.dot = kWeighted ? totals.dot : V(A(a.base)) * totals.dot;
    s.q_sum = kWeighted ? totals.mass : V(A(a.base * double(k)));
    s.q_rest = s.q_sum;
    return s;
  }

  // Adds to the sums what the sweep has not counted of the targets.
  FR_INLINE void add_targets(const Targets& targets, const RowOptions<A>& options, RowSums<V>& s,
                             RowTarget<V>& t) const {
    const V weights = load(targets.weight);
    t.shifted = load(targets.logit) - s.top;
    t.q = weights * V(options.target_mass);
    t.q_unswept = weights * V(options.mix);
    s.q_rest = kWeighted ? s.q_sum - weights * V(options.base) : V(A(a.base * double(k - 1)));
    s.q_sum = s.q_sum + t.q_unswept;
    if (options.target_mass == 0) leave_out_impossible_targets(targets, s, t);
    if (!grad) return;
    A at_target[kLanes] = {};
    for (int j = 0; j < lanes; ++j)
      if (targets.kept >> j & 1) at_target[j] = exps[a.target[index + j] * kLanes + j];
    t.exp_shifted = load(at_target);
  }

  FR_INLINE void leave_out_impossible_targets(const Targets& targets, RowSums<V>& s, RowTarget<V>& t) const {
    A dots[kLanes], tops[kLanes], unswept[kLanes];
    store(dots, s.dot);
    store(tops, s.top);
    store(unswept, t.q_unswept);
    for (int j = 0; j < lanes; ++j) {
      if ((targets.kept >> j & 1) == 0 || targets.logit[j] != -A(__builtin_inf())) continue;
      dots[j] = dot_without_target(a, weight, a.target[index + j], tops[j],
                                   [&](int64_t c) { return to_float(x[c * a.logits_stride.cls + j]); });
      unswept[j] = 0;
    }
    s.dot = load(dots);
    t.q_unswept = load(unswept);
  }

  FR_INLINE void write_losses(const RowLoss<V>& result, const typename V::Mask& keep) const {
    A losses[kLanes], lses[kLanes];
    store(losses, select(keep, result.loss, V(A(0))));
    store(lses, select(keep, result.lse, V(A(0))));
    for (int j = 0; j < lanes; ++j) {
      a.row_loss[index + j] = losses[j];
      a.row_lse[index + j] = lses[j];
    }
  }

  FR_INLINE void write_gradient(const RowGradient<V>& gradient, const V& factor, uint32_t kept) const {
    const V base{A(a.base)}, zero{A(0)};
    const SoftmaxFactor<V> softmax(gradient.softmax_factor);
    const auto keep = V::from_bits(kept);
    for (int64_t c = 0; c < k; ++c) {
      const V e = load(exps + c * kLanes);
      const V g = cross_entropy_grad(e, kWeighted ? q_at(c) : base, softmax, factor);
      store(grad + c * a.grad_stride.cls, select(keep, g, zero), lanes);
    }
    if (soft) return;
    A at_target[kLanes];
    store(at_target, gradient.at_target);
    for (int j = 0; j < lanes; ++j)
      if (kept >> j & 1) from_float(at_target[j], grad + a.target[index + j] * a.grad_stride.cls + j);
  }
};

// Losses, lse and, unless grad is null, the gradient of the rows. Inlined for the reason of finish_row.
template <bool kWeighted, class T, class G, class S, class A>
FR_INLINE void finish_columns(const Columns<kWeighted, T, G, S, A> rows) {
  using V = Vec<A>;
  const CrossEntropyArgs& a = rows.a;
  const RowOptions<A> options(a);
  typename Columns<kWeighted, T, G, S, A>::Targets targets;
  rows.read_targets(targets);
  const V top = rows.largest();
  const V origin = select(top == V(-A(__builtin_inf())), V(A(0)), top);
  RowSums<V> sums = rows.sums(top, rows.sweep(origin));
  const V zero{A(0)};
  RowTarget<V> target{zero, zero, zero, zero};
  if (!rows.soft) rows.add_targets(targets, options, sums, target);
  const RowLoss<V> result = row_loss(sums, target, options);
  rows.write_losses(result, V::from_bits(targets.kept));
  if (!rows.grad) return;
  const V factor =
      a.row_factor ? load(static_cast<const A*>(a.row_factor) + rows.index, rows.lanes) : V(A(a.grad_factor));
  rows.write_gradient(row_gradient(sums, target, result.lse, options, factor), factor, targets.kept);
}

// The rows of one tile, a vector at a time.
template <class T, class G, class A>
void column_tile(const CrossEntropyArgs& a, int64_t n, int64_t first, int64_t last, A* exps) {
  const T* x = static_cast<const T*>(a.logits) + n * a.logits_stride.outer;
  G* grad = a.grad ? static_cast<G*>(a.grad) + n * a.grad_stride.outer : nullptr;
  const auto finish = [&](auto weighted, const auto* soft) {
    using S = std::remove_cv_t<std::remove_pointer_t<decltype(soft)>>;
    for (int64_t s = first; s < last; s += Vec<A>::kLanes) {
      const int lanes = int(last - s < Vec<A>::kLanes ? last - s : Vec<A>::kLanes);
      const S* const soft_at = soft ? soft + s : nullptr;
      G* const grad_at = grad ? grad + s : nullptr;
      finish_columns(Columns<decltype(weighted)::value, T, G, S, A>{a, x + s, soft_at, grad_at,
                                                                    n * a.inner + s, lanes, exps});
    }
  };
  // Each type of probabilities has code of its own. Without any there is one code, whatever their type.
  constexpr const A* none = nullptr;
  if (!a.soft_target) return a.weight ? finish(std::true_type(), none) : finish(std::false_type(), none);
  with_dtype(a.target_dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<typename Accumulate<S>::type, A>)
      finish(std::true_type(), static_cast<const S*>(a.soft_target) + n * a.target_stride.outer);
  });
}

// With more classes a tile no longer stays in the L2 cache over three passes, and transposing it once is
// faster.
constexpr int64_t kMostClasses = 4096;

// Whether rows are to be taken so.
template <class A>
bool lies_in_columns(const CrossEntropyArgs& a) {
  const bool same_type = !a.soft_target || (a.target_dtype == DType::kFloat64) == std::is_same_v<A, double>;
  return a.classes <= kMostClasses && a.logits_stride.cls != 1 && a.logits_stride.inner == 1 &&
         (!a.grad || a.grad_stride.inner == 1) && (!a.soft_target || a.target_stride.inner == 1) && same_type;
}

}  // namespace
}  // namespace fastreg::FASTREG_ISA
