// Cross-entropy of a row of contiguous logits on the CPU; formula and arguments as in cross_entropy_math.h;
// only cross_entropy_cpu.cpp and cross_entropy_sharded_cpu.cpp include it.
//
// A row is taken in blocks that stay in the L1 cache: the largest logit, then exponentials and their sum,
// while the next block is on its way from memory. The gradient is one more pass over the exponentials. Bytes
// per float32 logit: reads 4 and writes 4, once each, as long as the exponentials stay in the L2 cache.
#pragma once
#include <type_traits>
#include <vector>

#include "../common/simd.h"
#include "cross_entropy_math.h"

namespace fastreg::FASTREG_ISA {
namespace {

// A segment is a run of blocks that share a reference: the largest logit seen when it began (Milakov and
// Gimelshein 2018). A block with a larger logit begins a new one.
template <class A>
struct Segment {
  int64_t begin;
  A reference;
  double sum, dot, mass;  // of exp(x_c - reference), q_c (x_c - reference) and q_c
  double factor;          // makes its exponentials relative to the largest logit of all
};

// The probabilities of row `inner` of batch element n.
template <class A>
void gather_soft_target(const CrossEntropyArgs& a, int64_t n, int64_t inner, A* out) {
  with_dtype(a.target_dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const S* t =
        static_cast<const S*>(a.soft_target) + n * a.target_stride.outer + inner * a.target_stride.inner;
    for (int64_t c = 0; c < a.classes; ++c) out[c] = A(to_float(t[c * a.target_stride.cls]));
  });
}

// Two vectors of neighbours. Unless kInOrder, bfloat16 comes as even and odd neighbours, which is faster.
// Weights and soft targets are indexed by class, so with them (kWeighted) the order is kept.
template <bool kInOrder, class T, class V>
FR_INLINE void load_two(const T* p, V& a, V& b) {
  if constexpr (std::is_same_v<T, BFloat16> && !kInOrder) {
    load_pairs(p, a, b);
  } else {
    a = load(p);
    b = load(p + V::kLanes);
  }
}
// The index in `exps` of class i of k, where load_two has read the logits and the exponentials were stored in
// the order of the vectors.
template <bool kInOrder, class T>
FR_INLINE int64_t index_in_exps(int64_t i, int64_t k) {
  if (!std::is_same_v<T, BFloat16> || kInOrder || i >= k / 32 * 32) return i;
  return i / 32 * 32 + i % 2 * 16 + i % 32 / 2;
}
template <bool kInOrder, class T, class V>
FR_INLINE void store_two(T* p, const V& a, const V& b) {
  if constexpr (std::is_same_v<T, BFloat16> && !kInOrder) {
    // Part by part: gcc 12 takes the copy of the whole, as in store_pairs, through memory and other
    // registers.
    const Pairs pairs = pack_pairs(a, b);
    for (int i = 0; i < V::kParts; ++i)
      memcpy(p + i * V::kPartLanes * 2, &pairs.part[i], sizeof pairs.part[i]);
  } else {
    store(p, a);
    store(p + V::kLanes, b);
  }
}

// Two vectors' worth of p into the cache, to be read or written.
template <bool kToWrite, class T>
FR_INLINE void prefetch(const T* p) {
  for (size_t byte = 0; byte < 2 * Vec<typename Accumulate<T>::type>::kLanes * sizeof(T); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, kToWrite);
}

// One row of k contiguous logits. kWeighted: q differs between classes, by class weights or soft targets.
// Otherwise it is `base` everywhere and `mix` more at the target, which needs neither array.
template <bool kWeighted, class T, class G, class A>
struct Row {
  using V = Vec<A>;
  const CrossEntropyArgs& a;
  const T* x;
  const A* soft;
  int64_t target;
  A* exps;  // room for k exponentials, or the gradient itself where it has their type
  G* grad;
  std::vector<Segment<A>>& segments;
  const A* weight = static_cast<const A*>(a.weight);
  const int64_t k = a.classes;

  struct Totals {
    V exps, dot, mass;
  };

  FR_INLINE V q_at(int64_t i, int lanes) const {
    const V zero{A(0)}, t = soft ? load(soft + i, lanes) : zero;
    const V q = smoothed_target(t, weight ? load(weight + i, lanes) : V(A(1)), V(A(a.mix)), V(A(a.base)));
    return lanes == V::kLanes ? q : select(V::first(lanes), q, zero);
  }
  FR_INLINE int64_t end_of_segment(size_t j) const {
    return j + 1 < segments.size() ? segments[j + 1].begin : k;
  }

  FR_INLINE A largest_in(int64_t begin, int64_t end, A reference, bool& larger) const {
    const A infinity = A(__builtin_inf());
    V largest(-infinity), other(-infinity);
    for_each_two<A>(
        begin, end,
        [&](int64_t i) __attribute__((always_inline)) {
          V v, w;
          load_two<kWeighted>(x + i, v, w);
          largest = maximum(v, largest);
          other = maximum(w, other);
        },
        [&](int64_t i, int lanes)
            __attribute__((always_inline)) { largest = maximum(load(x + i, lanes, -infinity), largest); });
    largest = maximum(other, largest);
    larger = any(largest > V(reference));
    return larger || begin == 0 ? largest.max() : reference;
  }

  // Exponentials of a block, and its sums.
  FR_INLINE void add_block(int64_t begin, int64_t end, A reference, Totals& totals) const {
    const A infinity = A(__builtin_inf());
    const V zero{A(0)}, origin(reference == -infinity ? A(0) : reference);
    const bool in_grad = grad && static_cast<const void*>(exps) == grad, spread = a.base != 0;
    V total = totals.exps, dot = totals.dot, mass = totals.mass;
    for_each_two<A>(
        begin, end,
        [&](int64_t i) __attribute__((always_inline)) {
          V v, w;
          load_two<kWeighted>(x + i, v, w);
          // A processor fetches ahead by itself, but not a block ahead: memory would wait while this one is
          // computed.
          prefetch<false>(x + i + kBlock);
          if (in_grad) prefetch<true>(exps + i + kBlock);
          v = v - origin;
          w = w - origin;
          if (kWeighted) {
            const V q = q_at(i, V::kLanes), r = q_at(i + V::kLanes, V::kLanes);
            dot = dot + (weighted_logit(q, v) + weighted_logit(r, w));
            mass = mass + (q + r);
          } else if (spread) {
            dot = dot + (v + w);
          }
          v = exp_nonpositive(v);
          w = exp_nonpositive(w);
          total = total + (v + w);
          if (grad) store_two<true>(exps + i, v, w);
        },
        [&](int64_t i, int lanes) __attribute__((always_inline)) {
          const V v = load(x + i, lanes, -infinity) - origin, e = exp_nonpositive(v);
          if (kWeighted) {
            const V q = q_at(i, lanes);
            dot = dot + weighted_logit(q, v);
            mass = mass + q;
          } else if (spread) {
            dot = dot + (lanes == V::kLanes ? v : select(V::first(lanes), v, zero));
          }
          total = total + e;
          if (grad) store(exps + i, e, lanes);
        });
    totals = {total, dot, mass};
  }

  FR_INLINE void close_segment(int64_t end, Totals& totals) const {
    Segment<A>& s = segments.back();
    s.sum = totals.exps.sum();
    s.dot = kWeighted ? totals.dot.sum() : a.base != 0 ? a.base * totals.dot.sum() : 0;
    s.mass = kWeighted ? double(totals.mass.sum()) : a.base * double(end - s.begin);
    totals = {V(A(0)), V(A(0)), V(A(0))};
  }

  // The sweep over the logits.
  FR_INLINE void sweep() const {
    Totals totals{V(A(0)), V(A(0)), V(A(0))};
    A reference = -A(__builtin_inf());
    segments.clear();
    for (int64_t begin = 0; begin < k; begin += kBlock) {
      const int64_t end = begin + kBlock < k ? begin + kBlock : k;
      bool larger;
      const A largest = largest_in(begin, end, reference, larger);
      if (begin == 0 || larger) {
        if (begin) close_segment(begin, totals);
        reference = largest;
        segments.push_back({begin, reference, 0, 0, 0, 1});
      }
      add_block(begin, end, reference, totals);
    }
    close_segment(k, totals);
  }

  // The sum of exponentials without the largest. Added together, the 1 of the largest would round away the
  // others' last digits. The sum is less than kPeakedSum here, so that only the largest can be 0.5 or more.
  FR_INLINE double sum_of_rest(A top) const {
    const V zero{A(0)}, origin{top};
    V rest = zero;
    for (size_t j = 0; j < segments.size(); ++j) {
      const int64_t begin = segments[j].begin;
      const V factor{A(segments[j].factor)};
      for_each_vector<A>(end_of_segment(j) - begin, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const V e = grad ? load(exps + begin + i, lanes) * factor
                         : exp_nonpositive(load(x + begin + i, lanes, -A(__builtin_inf())) - origin);
        rest = rest + select(e < V(A(0.5)), e, zero);
      });
    }
    return rest.sum();
  }

  // The sums of all segments together. Each segment gets the factor that brings its exponentials to the
  // largest logit of all.
  FR_INLINE RowSums<double> merge_segments() const {
    const A reference = segments.back().reference;
    RowSums<double> s{};
    s.top = reference;
    double mass = 0;
    for (Segment<A>& part : segments) {
      if (part.reference != reference) {
        part.factor = std::exp(double(part.reference) - s.top);
        // In a segment without a finite logit all are -inf, and shifting its dot by such a reference would
        // give NaN.
        if (part.mass != 0 && part.reference != -A(__builtin_inf()))
          part.dot += part.mass * (double(part.reference) - s.top);
      }
      s.sum += part.sum * part.factor;
      s.dot += part.dot;
      mass += part.mass;
    }
    if (s.top == -__builtin_inf()) s.sum = __builtin_nan("");
    s.q_sum = kWeighted ? mass : a.base * double(k);
    s.q_rest = s.q_sum;
    return s;
  }

  // `rest` and the logarithm, to their last digits. Where one class has nearly all the mass and is the
  // target, the loss is what the other classes have.
  FR_INLINE void take_logarithm(RowSums<double>& s) const {
    if (s.sum < kPeakedSum) {
      s.rest = sum_of_rest(A(s.top));
      s.sum = 1 + s.rest;
      s.log_sum = std::log1p(s.rest);
    } else {
      s.rest = s.sum - 1;
      s.log_sum = std::log(s.sum);
    }
  }

  // Adds to the sums what the sweep has not counted of the target; gives what is known of it.
  FR_INLINE RowTarget<double> add_target(RowSums<double>& s) const {
    if (soft) return {};
    const double w = kWeighted && weight ? double(weight[target]) : 1;
    RowTarget<double> t{};
    t.shifted = double(to_float(x[target])) - s.top;
    t.q = w * (a.mix + a.base);
    t.q_unswept = w * a.mix;
    s.q_rest = kWeighted ? s.q_sum - w * a.base : a.base * double(k - 1);
    s.q_sum += t.q_unswept;
    if (a.mix + a.base == 0 && t.shifted == -__builtin_inf()) {
      s.dot = dot_without_target(a, weight, target, s.top, [&](int64_t c) { return to_float(x[c]); });
      t.q_unswept = 0;
    }
    if (grad) {  // This is read now, because the gradient may take the exponentials' place.
      size_t j = segments.size() - 1;
      while (segments[j].begin > target) --j;
      t.exp_shifted = exps[index_in_exps<kWeighted, T>(target, k)] * segments[j].factor;
    }
    return t;
  }

  FR_INLINE void write_gradient(const RowGradient<double>& gradient, double row_factor) const {
    const V grad_factor{A(row_factor)}, same{A(a.base)};
    for (size_t j = 0; j < segments.size(); ++j) {
      const V factor(A(gradient.softmax_factor * segments[j].factor));
      for_each_two<A>(
          segments[j].begin, end_of_segment(j),
          [&](int64_t i) __attribute__((always_inline)) {
            V v, w;
            load_two<true>(exps + i, v, w);
            v = cross_entropy_grad<kWeighted>(v, kWeighted ? q_at(i, V::kLanes) : same, factor, grad_factor);
            w = cross_entropy_grad<kWeighted>(w, kWeighted ? q_at(i + V::kLanes, V::kLanes) : same, factor,
                                              grad_factor);
            store_two<kWeighted>(grad + i, v, w);
          },
          [&](int64_t i, int lanes) __attribute__((always_inline)) {
            const V q = kWeighted ? q_at(i, lanes) : same;
            store(grad + i, cross_entropy_grad<kWeighted>(load(exps + i, lanes), q, factor, grad_factor),
                  lanes);
          });
    }
    if (!soft) from_float(flush(A(gradient.at_target)), grad + target);
  }
};

// Loss, lse and, unless grad is null, the gradient of one row. It is inlined and has `row` by value, so that
// its fields stay in registers: the compiler must assume that a store of 16-bit numbers changes anything in
// memory.
template <bool kWeighted, class T, class G, class A>
FR_INLINE void finish_row(const Row<kWeighted, T, G, A> row, double row_factor, double* loss, A* lse) {
  const RowOptions<double> options(row.a);
  row.sweep();
  RowSums<double> sums = row.merge_segments();
  row.take_logarithm(sums);
  const RowTarget<double> target = row.add_target(sums);
  const RowLoss<double> result = row_loss(sums, target, options);
  *loss = result.loss;
  *lse = A(result.lse);
  if (row.grad) row.write_gradient(row_gradient(sums, target, result.lse, options, row_factor), row_factor);
}

}  // namespace
}  // namespace fastreg::FASTREG_ISA
