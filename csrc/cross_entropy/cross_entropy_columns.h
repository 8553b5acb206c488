// Cross-entropy where neighbouring rows lie side by side in memory, as the pixels of (N, C, H, W), or where
// classes are few: each row has a lane, so that nothing is summed across lanes. Formula and arguments as in
// cross_entropy_math.h; only cross_entropy_cpu.cpp includes it.
//
// The classes of a row lie far apart in memory, often by a power of two, so that their cache lines would
// drive each other out. So neighbouring rows are copied into a buffer, class after class, several cache lines
// of each; all that is computed is computed there, and the gradient is copied back in the same way.
//
// Bytes per float32 logit: reads 4 and writes 4, once each; four times as many in the L1 cache, as long as
// the buffers fit into it.
#pragma once
#include <memory>
#include <type_traits>

#include "../common/simd.h"
#include "cross_entropy_math.h"

namespace fastreg::FASTREG_ISA {
namespace {

// So many classes are summed before they join the sum: rounding errors stay those of short sums.
constexpr int64_t kShortSum = 64;

// The buffers of a thread, for up to `rows` rows. Lines of neighbouring classes are `pitch` numbers apart,
// which is a cache line more than is needed: at a distance of a power of two they would take each other's
// place in the L1 cache, and stores would look to the processor like those that the loads after them must
// wait for.
template <class A>
class ColumnBuffers {
 public:
  explicit ColumnBuffers(int64_t classes)
      : rows(rows_of(classes)),
        pitch(rows + kLine),
        room_(std::make_unique_for_overwrite<A[]>(size_t(2 * classes * pitch + kLine))) {
    logits = room_.get() + (64 - reinterpret_cast<uintptr_t>(room_.get()) % 64) / sizeof(A);
    exps = logits + classes * pitch;
  }
  const int64_t rows, pitch;
  A *logits, *exps;  // the gradient takes the exponentials' place

 private:
  static constexpr int64_t kMostRows = 128, kBytes = 256 << 10;  // of the L2 cache
  static constexpr int64_t kLine = 64 / sizeof(A);
  static int64_t rows_of(int64_t classes) {
    const int64_t rows = kBytes / (2 * int64_t(sizeof(A)) * classes) / kTileRows * kTileRows;
    return rows < kTileRows ? kTileRows : rows > kMostRows ? kMostRows : rows;
  }
  std::unique_ptr<A[]> room_;
};

// Some neighbouring rows, as many as a vector has lanes, or the `lanes` first of them.
template <bool kWeighted, class S, class A>
struct Columns {
  using V = Vec<A>;
  static constexpr int kLanes = V::kLanes;
  const CrossEntropyArgs& a;
  const A* logits;  // class 0 of the first row in the buffers, as `exps`
  A* exps;
  int64_t pitch;
  const S* soft;  // probabilities of class 0 in memory; null where the targets are class indices
  int64_t index;  // of the first row among all
  int lanes;
  const A* weight = static_cast<const A*>(a.weight);
  const int64_t k = a.classes;

  // What each row has at its target; zeros where the targets are soft.
  struct Targets {
    A logit[kLanes] = {}, weight[kLanes] = {};
    int64_t place[kLanes] = {};  // in the buffers; that of class 0 for a row that is ignored
    uint32_t kept;
  };
  struct Totals {
    V exps, dot, mass;
  };

  FR_INLINE V q_at(int64_t c) const {
    const V t = soft ? load(soft + c * a.target_stride.cls, lanes) : V(A(0));
    return smoothed_target(t, V(weight ? weight[c] : A(1)), V(A(a.mix)), V(A(a.base)));
  }

  // f(row) for each row, with as many as a vector has lanes as a case of its own, which needs no branches.
  template <class F>
  FR_INLINE void for_each_row(F f) const {
    if (lanes == kLanes)
      for (int j = 0; j < kLanes; ++j) f(j);
    else
      for (int j = 0; j < lanes; ++j) f(j);
  }

  FR_INLINE void read_targets(Targets& t) const {
    t.kept = (1u << lanes) - 1u;
    if (soft) return;
    uint32_t ignored = 0;
    for_each_row([&](int j) __attribute__((always_inline)) {
      const int64_t target = a.target[index + j];
      const bool ignore = target == a.ignore_index;
      ignored |= uint32_t(ignore) << j;
      t.place[j] = (ignore ? 0 : target) * pitch + j;
      t.logit[j] = logits[t.place[j]];
      t.weight[j] = weight ? weight[ignore ? 0 : target] : A(1);
    });
    t.kept &= ~ignored;
  }

  // f(c, which) for all classes, where `which` alternates between 0 and 1. Two results, of even and of odd
  // classes, hide half of the latency of maximum and addition.
  template <class F>
  FR_INLINE void for_each_class(int64_t begin, int64_t end, F f) const {
    int64_t c = begin;
    for (; c + 2 <= end; c += 2) {
      f(c, std::integral_constant<int, 0>());
      f(c + 1, std::integral_constant<int, 1>());
    }
    if (c < end) f(c, std::integral_constant<int, 0>());
  }

  FR_INLINE V largest() const {
    const V lowest(-A(__builtin_inf()));
    V top[2] = {lowest, lowest};
    for_each_class(0, k, [&](int64_t c, auto which) __attribute__((always_inline)) {
      top[which] = maximum(load(logits + c * pitch), top[which]);
    });
    return maximum(top[0], top[1]);
  }

  FR_INLINE Totals sweep(const V& origin) const {
    const V zero{A(0)};
    const bool spread = a.base != 0;
    Totals all{zero, zero, zero};
    for (int64_t first = 0; first < k; first += kShortSum) {
      V total[2] = {zero, zero}, dot[2] = {zero, zero}, mass[2] = {zero, zero};
      const int64_t end = first + kShortSum < k ? first + kShortSum : k;
      for_each_class(first, end, [&](int64_t c, auto which) __attribute__((always_inline)) {
        const V shifted = load(logits + c * pitch) - origin, e = exp_nonpositive(shifted);
        if (kWeighted) {
          const V q = q_at(c);
          dot[which] = dot[which] + weighted_logit(q, shifted);
          mass[which] = mass[which] + q;
        } else if (spread) {
          dot[which] = dot[which] + shifted;
        }
        total[which] = total[which] + e;
        store(exps + c * pitch, e);
      });
      all = {all.exps + (total[0] + total[1]), all.dot + (dot[0] + dot[1]), all.mass + (mass[0] + mass[1])};
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
        const V e = load(exps + c * pitch);
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
    if (!a.grad) return;
    A at_target[kLanes] = {};
    for_each_row([&](int j) __attribute__((always_inline)) { at_target[j] = exps[targets.place[j]]; });
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
                                   [&](int64_t c) { return logits[c * pitch + j]; });
      unswept[j] = 0;
    }
    s.dot = load(dots);
    t.q_unswept = load(unswept);
  }

  FR_INLINE void write_losses(const RowLoss<V>& result, const typename V::Mask& keep) const {
    A losses[kLanes];
    store(losses, select(keep, result.loss, V(A(0))));
    for_each_row([&](int j) __attribute__((always_inline)) { a.row_loss[index + j] = losses[j]; });
    if (a.row_lse) store(static_cast<A*>(a.row_lse) + index, select(keep, result.lse, V(A(0))), lanes);
  }

  FR_INLINE void write_gradient(const RowGradient<V>& gradient, const V& factor,
                                const Targets& targets) const {
    const V base{A(a.base)}, zero{A(0)};
    const V softmax_factor = gradient.softmax_factor;
    const auto keep = V::from_bits(targets.kept);
    for (int64_t c = 0; c < k; ++c) {
      const V e = load(exps + c * pitch);
      const V g = cross_entropy_grad<kWeighted>(e, kWeighted ? q_at(c) : base, softmax_factor, factor);
      store(exps + c * pitch, select(keep, g, zero));
    }
    if (soft) return;
    A at_target[kLanes];
    store(at_target, select(keep, gradient.at_target, zero));
    for_each_row([&](int j) __attribute__((always_inline)) { exps[targets.place[j]] = at_target[j]; });
  }
};

// Losses, lse and, unless none is wanted, the gradient of the rows. Inlined for the reason of finish_row.
template <bool kWeighted, class S, class A>
FR_INLINE void finish_columns(const Columns<kWeighted, S, A> rows) {
  using V = Vec<A>;
  const CrossEntropyArgs& a = rows.a;
  const RowOptions<A> options(a);
  typename Columns<kWeighted, S, A>::Targets targets;
  rows.read_targets(targets);
  const V top = rows.largest();
  const V origin = select(top == V(-A(__builtin_inf())), V(A(0)), top);
  RowSums<V> sums = rows.sums(top, rows.sweep(origin));
  const V zero{A(0)};
  RowTarget<V> target{zero, zero, zero, zero};
  if (!rows.soft) rows.add_targets(targets, options, sums, target);
  const RowLoss<V> result = row_loss(sums, target, options);
  rows.write_losses(result, V::from_bits(targets.kept));
  if (!a.grad) return;
  const V factor =
      a.row_factor ? load(static_cast<const A*>(a.row_factor) + rows.index, rows.lanes) : V(A(a.grad_factor));
  rows.write_gradient(row_gradient(sums, target, result.lse, options, factor), factor, targets);
}

// Rows [first, last) of batch element n in the buffers, a vector at a time.
template <class A>
void finish_tile(const CrossEntropyArgs& a, int64_t n, int64_t first, int64_t last, ColumnBuffers<A>& b) {
  const auto finish = [&](auto weighted, const auto* soft) {
    using S = std::remove_cv_t<std::remove_pointer_t<decltype(soft)>>;
    for_each_vector<A>(last - first, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      finish_columns(Columns<decltype(weighted)::value, S, A>{a, b.logits + i, b.exps + i, b.pitch,
                                                              soft ? soft + first + i : nullptr,
                                                              n * a.inner + first + i, lanes});
    });
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

// Where rows are not neighbours in memory, one number after another is copied.
template <class T, class A>
void read_tile(const T* x, const CrossEntropyArgs::Strides& stride, int64_t rows, int64_t classes,
               ColumnBuffers<A>& b) {
  A* const to = b.logits;
  if (stride.inner == 1) {
    for (int64_t c = 0; c < classes; ++c)
      for_each_vector<A>(rows, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        store(to + c * b.pitch + i, load(x + c * stride.cls + i, lanes, -A(__builtin_inf())));
      });
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < classes; ++c)
      to[c * b.pitch + r] = A(to_float(x[r * stride.inner + c * stride.cls]));
  // The last vector has lanes without a row.
  for (int64_t r = rows; r % Vec<A>::kLanes != 0; ++r)
    for (int64_t c = 0; c < classes; ++c) to[c * b.pitch + r] = -A(__builtin_inf());
}
template <class G, class A>
void write_tile(G* grad, const CrossEntropyArgs::Strides& stride, int64_t rows, int64_t classes,
                const ColumnBuffers<A>& b) {
  const A* const from = b.exps;
  if (stride.inner == 1) {
    for (int64_t c = 0; c < classes; ++c)
      for_each_vector<A>(rows, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        store(grad + c * stride.cls + i, load(from + c * b.pitch + i), lanes);
      });
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < classes; ++c)
      from_float(from[c * b.pitch + r], grad + r * stride.inner + c * stride.cls);
}

template <class T, class G, class A>
void column_tile(const CrossEntropyArgs& a, int64_t n, int64_t first, int64_t last, ColumnBuffers<A>& b) {
  const auto &xs = a.logits_stride, &gs = a.grad_stride;
  read_tile(static_cast<const T*>(a.logits) + n * xs.outer + first * xs.inner, xs, last - first, a.classes,
            b);
  finish_tile(a, n, first, last, b);
  if (a.grad)
    write_tile(static_cast<G*>(a.grad) + n * gs.outer + first * gs.inner, gs, last - first, a.classes, b);
}

// With more classes the buffers would no longer stay in the L2 cache over three passes, and transposing rows
// that are neighbours once is faster. Where they are not, each number is copied alone, which pays while the
// classes are so few that a row by itself would mostly be its beginning and its end.
constexpr int64_t kMostClasses = 4096, kFewClasses = 48;

// Whether rows are to be taken so.
template <class A>
bool goes_in_columns(const CrossEntropyArgs& a) {
  if (a.classes <= kFewClasses && !a.soft_target) return true;
  const bool same_type = !a.soft_target || (a.target_dtype == DType::kFloat64) == std::is_same_v<A, double>;
  return a.classes <= kMostClasses && a.logits_stride.cls != 1 && a.logits_stride.inner == 1 &&
         (!a.grad || a.grad_stride.inner == 1) && (!a.soft_target || a.target_stride.inner == 1) && same_type;
}

}  // namespace
}  // namespace fastreg::FASTREG_ISA
