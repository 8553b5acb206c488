// Smoothed cross-entropy on the CPU with its gradient written in the same sweep; formula in
// cross_entropy_math.h. Bytes per float32 logit: reads 4 and writes 4, once each, as long as a row's
// exponentials stay in the L2 cache: 8, the floor; 4 without gradient. A row is taken in blocks that stay in
// the L1 cache: largest logit, then exponentials and their sum, while the next block is on its way from
// memory. The gradient is one more pass over the exponentials.
#include <type_traits>
#include <vector>

#include "../common/simd.h"
#include "cross_entropy_columns.h"
#include "cross_entropy_math.h"

namespace fastreg::FASTREG_ISA {
namespace {

constexpr int64_t kBlock = 1024;

// A run of blocks whose exponentials are relative to one number, the largest logit up to there (Milakov and
// Gimelshein 2018). Whenever a block has a larger one, a segment ends.
template <class A>
struct Segment {
  int64_t begin;
  A reference;
  double sum, factor;
};

// Two vectors of neighbours; of bfloat16 in an order of its own, unless `linear`.
template <bool linear, class T, class V>
FR_INLINE void load_two(const T* p, V& a, V& b) {
  if constexpr (std::is_same_v<T, BFloat16> && !linear) {
    load_pairs(p, a, b);
  } else {
    a = load(p);
    b = load(p + V::kLanes);
  }
}
// Where neighbour i of k stands after for_each_two has put such vectors side by side.
template <bool linear, class T>
FR_INLINE int64_t place_of(int64_t i, int64_t k) {
  if (!std::is_same_v<T, BFloat16> || linear || i >= k / 32 * 32) return i;
  return i / 32 * 32 + i % 2 * 16 + i % 32 / 2;
}
template <bool linear, class T, class V>
FR_INLINE void store_two(T* p, const V& a, const V& b) {
  if constexpr (std::is_same_v<T, BFloat16> && !linear) {
    store_pairs(p, pack_pairs(a, b));
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

// One row of k contiguous logits. General: with class weights or soft targets; otherwise q is `base`
// everywhere and mix more at the target, which needs neither array. exps: room for k exponentials, or the
// gradient itself where it has their type.
template <bool kGeneral, class T, class G, class A>
void row(const CrossEntropyArgs& a, const T* x, const A* soft, int64_t target, double row_factor, A* exps,
         G* grad, std::vector<Segment<A>>& segments, double* loss, double* lse) {
  using V = Vec<A>;
  const int64_t k = a.classes;
  const A* weight = static_cast<const A*>(a.weight);
  const A infinity = A(__builtin_inf());
  const V zero{A(0)};
  const bool spread = a.base != 0;

  const auto q_at = [&](int64_t i, int lanes) __attribute__((always_inline)) {
    const V t = soft ? load(soft + i, lanes) : zero;
    V q = smoothed_target(t, weight ? load(weight + i, lanes) : V(A(1)), V(A(a.mix)), V(A(a.base)));
    return lanes == V::kLanes ? q : select(V::first(lanes), q, zero);
  };

  const bool in_grad = grad && static_cast<const void*>(exps) == grad;
  A reference = -infinity;
  V total = zero, weighted = zero, mass = zero;
  double dot = 0, q_sum = 0;  // sums of q_c x_c and of q_c; of x_c alone where q_c is the same for all
  const auto close_segment = [&](int64_t end) {
    Segment<A>& s = segments.back();
    const double origin = s.reference == -infinity ? 0 : s.reference;
    s.sum = total.sum();
    if (kGeneral) {
      const double segment_mass = mass.sum();
      q_sum += segment_mass;
      dot += weighted.sum() + segment_mass * origin;
    } else if (spread) {
      dot += weighted.sum() + double(end - s.begin) * origin;
    }
    total = weighted = mass = zero;
  };
  segments.clear();
  for (int64_t block = 0; block < k; block += kBlock) {
    const int64_t end = block + kBlock < k ? block + kBlock : k;
    V largest(-infinity), other(-infinity);
    for_each_two<A>(
        block, end,
        [&](int64_t i) __attribute__((always_inline)) {
          V v, w;
          load_two<kGeneral>(x + i, v, w);
          largest = maximum(v, largest);
          other = maximum(w, other);
        },
        [&](int64_t i, int lanes)
            __attribute__((always_inline)) { largest = maximum(load(x + i, lanes, -infinity), largest); });
    largest = maximum(other, largest);
    if (block == 0 || any(largest > V(reference))) {
      if (block) close_segment(block);
      reference = largest.max();
      segments.push_back({block, reference, 0, 0});
    }
    const V origin(reference == -infinity ? A(0) : reference);
    for_each_two<A>(
        block, end,
        [&](int64_t i) __attribute__((always_inline)) {
          V v, w;
          load_two<kGeneral>(x + i, v, w);
          // A processor fetches ahead by itself, but not a block ahead: memory would wait while this one is
          // computed.
          prefetch<false>(x + i + kBlock);
          if (in_grad) prefetch<true>(exps + i + kBlock);
          v = v - origin;
          w = w - origin;
          if (kGeneral) {
            const V q = q_at(i, V::kLanes), r = q_at(i + V::kLanes, V::kLanes);
            weighted = weighted + (weighted_logit(q, v) + weighted_logit(r, w));
            mass = mass + (q + r);
          } else if (spread) {
            weighted = weighted + (v + w);
          }
          v = exp_nonpositive(v);
          w = exp_nonpositive(w);
          total = total + (v + w);
          if (grad) store_two<true>(exps + i, v, w);
        },
        [&](int64_t i, int lanes) __attribute__((always_inline)) {
          const V v = load(x + i, lanes, -infinity) - origin, e = exp_nonpositive(v);
          if (kGeneral) {
            const V q = q_at(i, lanes);
            weighted = weighted + weighted_logit(q, v);
            mass = mass + q;
          } else if (spread) {
            weighted = weighted + (lanes == V::kLanes ? v : select(V::first(lanes), v, zero));
          }
          total = total + e;
          if (grad) store(exps + i, e, lanes);
        });
  }
  close_segment(k);
  const double top = reference;
  double sum = 0, log_sum;
  for (Segment<A>& s : segments) {
    s.factor = s.reference == reference ? 1 : std::exp(double(s.reference) - top);
    sum += s.sum * s.factor;
  }
  if (top == -double(infinity)) sum = __builtin_nan("");
  if (sum < 1.125) {
    // One class has nearly all the mass. Its 1 has swallowed the last bits of the others', which are the
    // whole loss where it is the target: add those up alone.
    V rest = zero;
    const V origin{A(top)};
    for (size_t j = 0; j < segments.size(); ++j) {
      const int64_t begin = segments[j].begin, end = j + 1 < segments.size() ? segments[j + 1].begin : k;
      const V factor{A(segments[j].factor)};
      for_each_vector<A>(end - begin, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const V e = grad ? load(exps + begin + i, lanes) * factor
                         : exp_nonpositive(load(x + begin + i, lanes, -infinity) - origin);
        rest = rest + select(e < V(A(0.5)), e, zero);
      });
    }
    const double others = rest.sum();
    sum = 1 + others;
    log_sum = std::log1p(others);
  } else {
    log_sum = std::log(sum);
  }
  if (!kGeneral) {
    dot *= spread ? a.base : 0;
    q_sum = a.base * double(k);
  }
  dot -= q_sum == 0 ? 0 : q_sum * top;  // of x_c - top from here on
  const A target_weight = kGeneral && !soft && weight ? weight[target] : A(1);
  const double shifted = soft ? 0 : double(to_float(x[target])) - top;
  if (!soft) {
    const double q_target = double(target_weight) * a.mix;  // beyond the base that every class has
    if (q_target != 0) dot += q_target * shifted;
    if (a.mix + a.base == 0 &&
        shifted == -double(infinity)) {  // "others" with eps = 1: no mass here, where dot became inf - inf
      dot = 0;
      for (int64_t c = 0; c < k; ++c) {
        const double q = a.base * (weight ? double(weight[c]) : 1);
        if (c != target && q != 0) dot += q * (double(to_float(x[c])) - top);
      }
    }
    q_sum += q_target;
  }
  *lse = top + log_sum;
  *loss = q_sum * log_sum - dot + (a.z_loss != 0 ? a.z_loss * *lse * *lse : 0);

  if (!grad) return;
  const double softmax_factor = (q_sum + 2 * a.z_loss * *lse) * row_factor / sum;
  double target_exp = 0;  // read now: grad may be the same memory
  if (!soft) {
    size_t j = segments.size() - 1;
    while (segments[j].begin > target) --j;
    target_exp = exps[place_of<kGeneral, T>(target, k)] * segments[j].factor;
  }
  const V grad_factor{A(row_factor)}, same{A(a.base)};
  for (size_t j = 0; j < segments.size(); ++j) {
    const V factor{A(softmax_factor * segments[j].factor)};
    for_each_two<A>(
        segments[j].begin, j + 1 < segments.size() ? segments[j + 1].begin : k,
        [&](int64_t i) __attribute__((always_inline)) {
          V v, w;
          load_two<true>(exps + i, v, w);
          v = cross_entropy_grad(v, kGeneral ? q_at(i, V::kLanes) : same, factor, grad_factor);
          w = cross_entropy_grad(w, kGeneral ? q_at(i + V::kLanes, V::kLanes) : same, factor, grad_factor);
          store_two<kGeneral>(grad + i, v, w);
        },
        [&](int64_t i, int lanes) __attribute__((always_inline)) {
          const V q = kGeneral ? q_at(i, lanes) : same;
          store(grad + i, cross_entropy_grad(load(exps + i, lanes), q, factor, grad_factor), lanes);
        });
  }
  if (!soft) {
    const double q = double(target_weight) * (a.mix + a.base);
    from_float(A(target_exp * softmax_factor - q * row_factor), grad + target);
  }
}

template <class T, class G>
void forward_typed(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  const int64_t k = a.classes, per_outer = (a.positions + kRowBlock - 1) / kRowBlock;
  if (lies_in_columns<A>(a)) {
    std::vector<A> exps(size_t(k) * Vec<A>::kLanes);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block % per_outer * kRowBlock;
      const int64_t last = first + kRowBlock < a.positions ? first + kRowBlock : a.positions;
      column_block<T, G>(a, block / per_outer, first, last, exps.data());
    }
    return;
  }
  const bool direct = a.logits_stride.cls == 1 && (!a.grad || a.grad_stride.cls == 1);
  const bool keeps_exps = a.grad && !(direct && std::is_same_v<A, G> && a.grad != a.logits);
  // A block is gathered once per cache line, not once per row: neighbours in memory are neighbouring rows.
  const int64_t rows_at_once = direct ? 1 : kRowBlock;
  std::vector<A> exps(keeps_exps ? size_t(k) : 0), soft_row(a.soft_target ? size_t(k) : 0);
  std::vector<T> logits(direct ? 0 : size_t(k * kRowBlock));
  std::vector<Segment<A>> segments;
  std::vector<G> grads(direct || !a.grad ? 0 : size_t(k * kRowBlock));

  for (int64_t block = begin; block < end; ++block) {
    const int64_t n = block / per_outer, first = block % per_outer * kRowBlock;
    const int64_t last = first + kRowBlock < a.positions ? first + kRowBlock : a.positions;
    for (int64_t s0 = first; s0 < last; s0 += rows_at_once) {
      const int64_t rows = last - s0 < rows_at_once ? last - s0 : rows_at_once;
      const T* x =
          static_cast<const T*>(a.logits) + n * a.logits_stride.outer + s0 * a.logits_stride.position;
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
          if (!keeps_exps) row_exps = row_g;
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
            const S* t = static_cast<const S*>(a.soft_target) + n * a.target_stride.outer +
                         (s0 + r) * a.target_stride.position;
            for (int64_t c = 0; c < k; ++c) soft_row[size_t(c)] = A(to_float(t[c * a.target_stride.cls]));
          });
        }
        const A* soft = a.soft_target ? soft_row.data() : nullptr;
        const auto run = soft || a.weight ? row<true, T, G, A> : row<false, T, G, A>;
        const double factor = a.row_factor ? static_cast<const A*>(a.row_factor)[index] : a.grad_factor;
        run(a, row_x, soft, target, factor, row_exps, row_g, segments, a.row_loss + index, a.row_lse + index);
      }
      if (!direct && a.grad) {
        for (int64_t c = 0; c < k; ++c)
          for (int64_t r = 0; r < rows; ++r)
            g[c * a.grad_stride.cls + r * a.grad_stride.position] = grads[size_t(r * k + c)];
      }
    }
  }
}

void forward(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    // A float16 gradient is kept in float32: its small values would vanish before a loss scale could lift
    // them.
    using G = std::conditional_t<std::is_same_v<T, Half>, float, T>;
    a.grad == a.logits ? forward_typed<T, T>(a, begin, end) : forward_typed<T, G>(a, begin, end);
  });
}

}  // namespace

extern const CrossEntropyKernels cross_entropy_kernels;
const CrossEntropyKernels cross_entropy_kernels = {forward};

}  // namespace fastreg::FASTREG_ISA
