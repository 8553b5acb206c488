// Cross-entropy of a rank's classes on the CPU; formula and arguments as in cross_entropy_sharded.h.
// Bytes per float32 logit: 4 read before the message, 4 read and 4 written after it. That is the floor of two
// sweeps: exponentials that were kept from the first to the second would be 4 written and 4 read instead of
// the logits' 4.
#include <type_traits>
#include <vector>

#include "../common/flush_mode.h"
#include "cross_entropy_rows.h"
#include "cross_entropy_sharded.h"

namespace fastreg::FASTREG_ISA {
namespace {

// What a thread needs beside its rows.
template <class A>
struct Room {
  std::vector<A> soft;
  std::vector<Segment<A>> segments;

  explicit Room(const ShardedArgs& a) : soft(a.soft_target ? size_t(a.classes) : 0) {}

  const A* soft_row(const ShardedArgs& a, int64_t row) {
    if (!a.soft_target) return nullptr;
    gather_soft_target(a, 0, row, soft.data());
    return soft.data();
  }
};

template <bool kWeighted, class T, class A>
FR_INLINE void sums_of_row(const Row<kWeighted, T, T, A> row, A* out, int64_t rows) {
  const double infinity = __builtin_inf();
  row.sweep();
  RowSums<double> s = row.merge_segments();
  const double origin = s.top == -infinity ? 0 : s.top;
  if (s.top == -infinity)
    s.rest = row.segments.back().sum;  // 0, or NaN where a logit is
  else
    row.take_logarithm(s);
  double first = 0, second = s.dot;
  if (row.soft) {
    first = s.dot;
    second = s.q_sum;
  } else if (row.target >= 0 && row.a.mix + row.a.base == 0) {
    second = dot_without_target(row.a, row.weight, row.target, origin,
                                [&](int64_t c) { return to_float(row.x[c]); });
  } else if (row.target >= 0) {
    first = double(to_float(row.x[row.target])) - origin;
  }
  out[0] = A(s.top);
  out[rows] = A(s.rest);
  out[2 * rows] = A(first);
  out[3 * rows] = A(second);
}

template <class T>
void sums_typed(const ShardedArgs& a, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  const FlushMode<A> mode(!a.weight && !a.soft_target);
  Room<A> room(a);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t rows = a.inner, target = a.target ? a.target[r] : 0;
    A* const out = static_cast<A*>(a.sums) + r;
    if (a.target && target == kUncounted) {
      for (int64_t i = 0; i < kSums; ++i) out[i * rows] = 0;
      continue;
    }
    const T* x = static_cast<const T*>(a.logits) + r * a.logits_stride.inner;
    const A* soft = room.soft_row(a, r);
    if (soft || a.weight)
      sums_of_row(Row<true, T, T, A>{a, x, soft, target, nullptr, nullptr, room.segments}, out, rows);
    else
      sums_of_row(Row<false, T, T, A>{a, x, soft, target, nullptr, nullptr, room.segments}, out, rows);
  }
}

// gradient(exponentials, q) for all classes of a row, of which x may be the place to write to.
template <bool kWeighted, class T, class G, class A, class Gradient>
FR_INLINE void write_row(const Row<kWeighted, T, G, A>& row, A top, const Gradient& gradient) {
  using V = Vec<A>;
  const V origin{top}, same{A(row.a.base)};
  for_each_two<A>(
      0, row.k,
      [&](int64_t i) __attribute__((always_inline)) {
        V v, w;
        load_two<kWeighted>(row.x + i, v, w);
        v = gradient(exp_nonpositive(v - origin), kWeighted ? row.q_at(i, V::kLanes) : same);
        w = gradient(exp_nonpositive(w - origin), kWeighted ? row.q_at(i + V::kLanes, V::kLanes) : same);
        store_two<kWeighted>(row.grad + i, v, w);
      },
      [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const V e = exp_nonpositive(load(row.x + i, lanes, top) - origin);
        store(row.grad + i, gradient(e, kWeighted ? row.q_at(i, lanes) : same), lanes);
      });
}

template <bool kWeighted, class T, class G, class A>
FR_INLINE void gradient_of_row(const Row<kWeighted, T, G, A> row, const WholeRow<double>& whole) {
  using V = Vec<A>;
  const RowSums<double> s = whole.sums();
  RowTarget<double> t{};
  if (!row.soft && row.target >= 0) {
    t.shifted = double(to_float(row.x[row.target])) - whole.top;
    t.exp_shifted = std::exp(t.shifted);
    t.q = (kWeighted && row.weight ? double(row.weight[row.target]) : 1) * (row.a.mix + row.a.base);
  }
  const RowGradient<double> g = pulled_gradient(s, t, whole.pull, whole.factor);
  const V softmax_factor{A(g.softmax_factor)};
  const V factor{A(whole.factor)};
  if (row.soft) {
    const double of_sum = whole.factor / s.sum;
    write_row(row, A(whole.top),
              SoftGradient<V>{softmax_factor, factor, V(A(whole.mass)), V(A(whole.rest)), V(A(s.sum)),
                              V(A(of_sum * whole.mass)), V(A(of_sum * whole.pull))});
  } else {
    write_row(row, A(whole.top), [&](const V& e, const V& q) __attribute__((always_inline)) {
      return cross_entropy_grad<kWeighted>(e, q, softmax_factor, factor);
    });
    if (row.target >= 0) from_float(A(g.at_target), row.grad + row.target);
  }
}

template <class T, class G>
void gradient_typed(const ShardedArgs& a, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  const FlushMode<A> mode(!a.weight && !a.soft_target);
  Room<A> room(a);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t target = a.target ? a.target[r] : 0;
    const T* x = static_cast<const T*>(a.logits) + r * a.logits_stride.inner;
    G* g = static_cast<G*>(a.grad) + r * a.grad_stride.inner;
    if (a.target && target == kUncounted) {
      memset(static_cast<void*>(g), 0, size_t(a.classes) * sizeof(G));
      continue;
    }
    const WholeRow<double> whole(static_cast<const A*>(a.whole), a.inner, r);
    const A* soft = room.soft_row(a, r);
    if (soft || a.weight)
      gradient_of_row(Row<true, T, G, A>{a, x, soft, target, nullptr, g, room.segments}, whole);
    else
      gradient_of_row(Row<false, T, G, A>{a, x, soft, target, nullptr, g, room.segments}, whole);
  }
}

void sums(const ShardedArgs& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto* type) { sums_typed<std::remove_pointer_t<decltype(type)>>(a, begin, end); });
}

void gradient(const ShardedArgs& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using G = std::conditional_t<std::is_same_v<T, Half>, float, T>;  // as in cross_entropy_cpu.cpp
    a.grad == a.logits ? gradient_typed<T, T>(a, begin, end) : gradient_typed<T, G>(a, begin, end);
  });
}

}  // namespace

extern const ShardedKernels cross_entropy_sharded_kernels;
const ShardedKernels cross_entropy_sharded_kernels = {sums, gradient};

}  // namespace fastreg::FASTREG_ISA
