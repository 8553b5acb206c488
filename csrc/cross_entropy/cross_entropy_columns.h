// Cross-entropy where neighbouring rows lie side by side in memory, as the pixels of (N, C, H, W): a lane for
// each row, so that nothing is transposed and nothing summed across lanes. Formula and arguments as in
// cross_entropy_math.h; for cross_entropy_cpu.cpp alone.
#pragma once
#include <type_traits>
#include <vector>

#include "../common/simd.h"
#include "cross_entropy_math.h"

namespace fastreg::FASTREG_ISA {
namespace {

constexpr int64_t kSumBlock =
    64;  // classes summed before they join the sum: rounding errors stay those of short sums

// Rows [first, first + lanes) of one batch element; x, grad and soft point at class 0 of the first of them.
// exps: room for classes * lanes of a vector. index: of the first row among all.
template <bool kGeneral, class T, class G, class S, class A>
void columns(const CrossEntropyArgs& a, const T* x, const S* soft, G* grad, int64_t index, int lanes,
             A* exps) {
  using V = Vec<A>;
  constexpr int kLanes = V::kLanes;
  const int64_t k = a.classes;
  const A* weight = static_cast<const A*>(a.weight);
  const A infinity = A(__builtin_inf());
  const V zero{A(0)}, mix{A(a.mix)}, base{A(a.base)};
  const bool spread = a.base != 0;

  // What of each row is at its target; of soft targets there is none.
  A target_logit[kLanes] = {}, target_weight[kLanes] = {};
  uint32_t kept = (1u << lanes) - 1u;
  if (!soft) {
    for (int j = 0; j < lanes; ++j) {
      const int64_t t = a.target[index + j];
      if (t == a.ignore_index) {
        kept &= ~(1u << j);
        continue;
      }
      target_logit[j] = to_float(x[t * a.logits_stride.cls + j]);
      target_weight[j] = weight ? weight[t] : A(1);
    }
  }
  const auto keep = V::from_bits(kept);

  V top(-infinity);
  for (int64_t c = 0; c < k; ++c) top = maximum(load(x + c * a.logits_stride.cls, lanes, -infinity), top);
  const V origin = select(top == V(-infinity), zero, top);

  const auto q_at = [&](int64_t c) __attribute__((always_inline)) {
    const V t = soft ? load(soft + c * a.target_stride.cls, lanes) : zero;
    return smoothed_target(t, V(weight ? weight[c] : A(1)), mix, base);
  };
  V total = zero, weighted = zero, mass = zero;
  for (int64_t block = 0; block < k; block += kSumBlock) {
    V block_total = zero, block_weighted = zero, block_mass = zero;
    for (int64_t c = block; c < k && c < block + kSumBlock; ++c) {
      const V shifted = load(x + c * a.logits_stride.cls, lanes) - origin, e = exp_nonpositive(shifted);
      if (kGeneral) {
        const V q = q_at(c);
        block_weighted = block_weighted + weighted_logit(q, shifted);
        block_mass = block_mass + q;
      } else if (spread) {
        block_weighted = block_weighted + shifted;
      }
      block_total = block_total + e;
      store(exps + c * kLanes, e);
    }
    total = total + block_total;
    weighted = weighted + block_weighted;
    mass = mass + block_mass;
  }
  total = select(top == V(-infinity), V(A(__builtin_nan(""))), total);

  // Where one class has nearly all the mass, its 1 has swallowed the last bits of the others'.
  const auto peaked = total < V(A(1.125));
  V rest = zero;
  if (any(peaked)) {
    for (int64_t c = 0; c < k; ++c) {
      const V e = load(exps + c * kLanes);
      rest = rest + select(e < V(A(0.5)), e, zero);
    }
    total = select(peaked, V(A(1)) + rest, total);
  }
  const V log_sum = select(peaked, log1p_small(rest), log_from_one(total)), lse = top + log_sum;

  const V shifted = load(target_logit) - top, q_target = load(target_weight) * mix;
  V q_sum = kGeneral ? mass : V(A(a.base * double(k))), dot = kGeneral ? weighted : base * weighted;
  if (!soft) {
    if (a.mix != 0) dot = dot + weighted_logit(q_target, shifted);
    q_sum = q_sum + q_target;
    if (a.mix + a.base ==
        0) {  // "others" with eps = 1: a target of -inf has no mass, but dot became inf - inf
      A dots[kLanes];
      store(dots, dot);
      for (int j = 0; j < lanes; ++j) {
        if ((kept >> j & 1) == 0 || target_logit[j] != -infinity) continue;
        A tops[kLanes], sum = 0;
        store(tops, top);
        for (int64_t c = 0; c < k; ++c) {
          const A q = A(a.base) * (weight ? weight[c] : A(1));
          if (c != a.target[index + j] && q != 0)
            sum += q * (to_float(x[c * a.logits_stride.cls + j]) - tops[j]);
        }
        dots[j] = sum;
      }
      dot = load(dots);
    }
  }
  V loss = q_sum * log_sum - dot;
  if (a.z_loss != 0) loss = loss + V(A(a.z_loss)) * lse * lse;
  A losses[kLanes], lses[kLanes];
  store(losses, select(keep, loss, zero));
  store(lses, select(keep, lse, zero));
  for (int j = 0; j < lanes; ++j) {
    a.row_loss[index + j] = losses[j];
    a.row_lse[index + j] = lses[j];
  }

  if (!grad) return;
  const V factor =
      a.row_factor ? load(static_cast<const A*>(a.row_factor) + index, lanes) : V(A(a.grad_factor));
  const V softmax_factor = (q_sum + V(A(2 * a.z_loss)) * (a.z_loss != 0 ? lse : zero)) * factor / total;
  for (int64_t c = 0; c < k; ++c) {
    const V g =
        cross_entropy_grad(load(exps + c * kLanes), kGeneral ? q_at(c) : base, softmax_factor, factor);
    store(grad + c * a.grad_stride.cls, select(keep, g, zero), lanes);
  }
  if (soft) return;
  A factors[kLanes], softmax_factors[kLanes];
  store(factors, factor);
  store(softmax_factors, softmax_factor);
  for (int j = 0; j < lanes; ++j) {
    if ((kept >> j & 1) == 0) continue;
    const int64_t t = a.target[index + j];
    const A q = target_weight[j] * A(a.mix + a.base);
    from_float(exps[t * kLanes + j] * softmax_factors[j] - q * factors[j], grad + t * a.grad_stride.cls + j);
  }
}

// The rows of one block, a vector at a time.
template <class T, class G, class A>
void column_block(const CrossEntropyArgs& a, int64_t n, int64_t first, int64_t last, A* exps) {
  const T* x = static_cast<const T*>(a.logits) + n * a.logits_stride.outer;
  G* grad = a.grad ? static_cast<G*>(a.grad) + n * a.grad_stride.outer : nullptr;
  with_dtype(a.soft_target ? a.target_dtype : a.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<typename Accumulate<S>::type, A>) {
      const S* soft =
          a.soft_target ? static_cast<const S*>(a.soft_target) + n * a.target_stride.outer : nullptr;
      const auto run = soft || a.weight ? columns<true, T, G, S, A> : columns<false, T, G, S, A>;
      for (int64_t s = first; s < last; s += Vec<A>::kLanes) {
        const int lanes = int(last - s < Vec<A>::kLanes ? last - s : Vec<A>::kLanes);
        run(a, x + s, soft ? soft + s : nullptr, grad ? grad + s : nullptr, n * a.positions + s, lanes, exps);
      }
    }
  });
}

// Of more classes a block no longer stays in the L2 cache over three passes, and transposing it once is
// faster.
constexpr int64_t kMostClasses = 4096;

// Whether rows are to be taken so.
template <class A>
bool lies_in_columns(const CrossEntropyArgs& a) {
  const bool same_type = !a.soft_target || (a.target_dtype == DType::kFloat64) == std::is_same_v<A, double>;
  return a.classes <= kMostClasses && a.logits_stride.cls != 1 && a.logits_stride.position == 1 &&
         (!a.grad || a.grad_stride.position == 1) && (!a.soft_target || a.target_stride.position == 1) &&
         same_type;
}

}  // namespace
}  // namespace fastreg::FASTREG_ISA
