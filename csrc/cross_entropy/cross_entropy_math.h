// Cross-entropy of a softmax against smoothed targets, and its gradient.
//
//   q_c  = weight_c * (mix * t_c + base)      t is the one-hot or soft target
//     uniform (Szegedy et al. 2016, as in torch)      mix = 1 - eps,                 base = eps / k
//     others (Goodfellow et al. 2016, section 7.5.1)  mix = 1 - eps - eps / (k - 1), base = eps / (k - 1)
//   loss = sum_c q_c (lse - x_c) + z_loss * lse^2,    lse = log sum_c exp x_c
//   dloss/dx_c = (sum q + 2 z_loss lse) p_c - q_c,    p = softmax(x)
//
// A class with q_c = 0 takes no part in the first sum, so that its logit may be -inf.
//
// A new option of a row goes to 8 places in 6 files, which tests/test_house.py counts. In a signature it is
// named three times: as an argument, in the call that checks it or passes it on, and in the docstring.
//   1. this file: a field of CrossEntropyOptions, its place in all() and in bounds(), the end of a row
//   2. cross_entropy_autograd.h: read_options, and the number of arguments of the method
//   3. fastreg/_cross_entropy.py: LossOptions, with its check, its formula and the derivative of that
//   4. fastreg/_cross_entropy.py: cross_entropy, the signature
//   5. fastreg/_linear_cross_entropy.py: linear_cross_entropy, the signature
//   6. fastreg/_sharded_cross_entropy.py: cross_entropy, the signature
//   7. fastreg/_sharded_cross_entropy.py: linear_cross_entropy, the signature
//   8. fastreg/nn.py: CrossEntropyLoss, the signature and its attribute
// The integrations name the options that a language model's loss has: fuse_loss and transformers.loss.
#pragma once
#include <array>
#include <limits>
#include <tuple>

#include "../common/device.h"
#include "../common/flush.h"
#include "../common/isa.h"

namespace fastreg {

// What the caller chooses about a row, in the order in which the operators take it.
struct CrossEntropyOptions {
  int64_t ignore_index;
  double label_smoothing;
  bool others;  // smoothing="others"
  double z_loss;

  auto all() const { return std::tuple(ignore_index, label_smoothing, others, z_loss); }

  // The numbers and the largest that each may be; the least is 0.
  struct Bound {
    const char* name;
    double value, most;

    bool holds() const { return value >= 0 && value <= most; }
  };
  auto bounds() const {
    return std::array{Bound{"label_smoothing", label_smoothing, 1},
                      Bound{"z_loss", z_loss, std::numeric_limits<double>::max()}};
  }
};
using CrossEntropyOptionValues = decltype(CrossEntropyOptions{}.all());

// What the caller chooses about the sum over rows.
struct CrossEntropyReduction {
  enum Kind : int64_t { kNone, kMean, kSum };
  int64_t kind;
  bool all_ignored_zero;  // a mean whose normaliser is 0 is 0 and not NaN
};

struct CrossEntropyArgs : CrossEntropyOptions {
  DType dtype, target_dtype;  // target_dtype: of soft targets
  const void* logits;
  void* grad;               // null: no gradient is wanted; may be the logits, which it then overwrites
  const int64_t* target;    // one class index per row; null where the target is soft
  const void* soft_target;  // probabilities; null where the target is class indices
  const void* weight;       // one per class, of the accumulation type; null: each is 1
  double* row_loss;
  void* row_lse;  // of the accumulation type; null: unwanted
  // Row r is (r / inner, r % inner), and inner rows are neighbours; strides in elements.
  int64_t outer, inner, classes;
  struct Strides {
    int64_t outer, inner, cls;
  } logits_stride, grad_stride, target_stride;
  double mix, base;        // of the options, by set_smoothing
  double grad_factor;      // of every row: 1 / normaliser of a mean, else 1; unread where row_factor is given
  const void* row_factor;  // one for each row, of the accumulation type; null: grad_factor

  void set_smoothing() {
    base = label_smoothing == 0 ? 0 : label_smoothing / double(others ? classes - 1 : classes);
    mix = 1 - label_smoothing - (others ? base : 0);
  }
};

// ---- one class

template <class V>
FR_HD V smoothed_target(V t, V weight, V mix, V base) {
  return weight * (mix * t + base);
}
// 0 * inf counts as 0.
template <class V>
FR_HD V weighted_logit(V q, V x) {
  return select(q == V(0), V(0), q * x);
}

// softmax_factor: of e^(x - top) in the gradient. What would be subnormal is 0: such numbers take many times
// as long, here and in the matrix product that follows. kWeighted: by class weights or soft targets, which
// may all be so small that their products with other numbers are subnormal. Such rows are not computed in
// flush mode.
template <bool kWeighted, class V>
FR_HD V cross_entropy_grad(V exp_shifted, V q, V softmax_factor, V grad_factor) {
  const V result = multiply_add(exp_shifted, softmax_factor, V(0) - q * grad_factor);
  return kWeighted ? flush(result) : flush_result(result);
}

// ---- the end of a row, the same for rows and columns of the CPU and for CUDA. V is a number, or a vector
// that holds a number for each of several rows.

// The options as numbers of the type in which a row is finished.
template <class S>
struct RowOptions {
  S mix, base;
  S target_mass;  // mix + base: q of the target, before its weight
  S z_loss;

  FR_HD explicit RowOptions(const CrossEntropyArgs& a)
      : mix(S(a.mix)), base(S(a.base)), target_mass(S(a.mix + a.base)), z_loss(S(a.z_loss)) {}
};

// What the sweep over the classes has found.
template <class V>
struct RowSums {
  V top;      // the largest logit
  V sum;      // sum_c exp(x_c - top)
  V rest;     // the same without one of the largest: sum - 1, without its rounding error
  V log_sum;  // log(sum)
  V dot;      // sum_c q_c (x_c - top), without q_unswept of the target
  V q_sum;    // sum_c q_c
  V q_rest;   // the same without the target's class
};

// Where the sum is less than this, the CPU adds up `rest` by itself: of `sum` too few digits are left. It is
// then at most 0.125, as log1p_small of simd_math.h needs it, and no exponential but the largest is above
// 0.125.
constexpr double kPeakedSum = 1.125;

// The class that is the target; all zeros where the target is soft.
template <class V>
struct RowTarget {
  V shifted, exp_shifted;  // x - top, and its exponential
  V q;
  // The part of q that the sweep has not counted, because it did not know the target: weight * mix where it
  // has counted `base` for each class, all of q where it has left the target out.
  V q_unswept;
};

template <class V>
struct RowLoss {
  V loss, lse;
};
template <class V, class S>
FR_HD RowLoss<V> row_loss(const RowSums<V>& s, const RowTarget<V>& t, const RowOptions<S>& o) {
  const V lse = s.top + s.log_sum, dot = s.dot + weighted_logit(t.q_unswept, t.shifted);
  V loss = s.q_sum * s.log_sum - dot;
  if (o.z_loss != S(0)) loss = loss + V(o.z_loss) * lse * lse;
  return {loss, lse};
}

// What a row's gradient is made of. At the target it is at_target, elsewhere it is
// cross_entropy_grad(exp(x - top), q, softmax_factor, factor).
template <class V>
struct RowGradient {
  V softmax_factor, at_target;
};

// a / b for b >= 1. On a GPU a division of float64 is a call, around which registers are spilled: there
// cross_entropy_row_cuda.h has another.
struct Divide {
  template <class V>
  FR_HD V operator()(V a, V b) const {
    return a / b;
  }
};

// At the target the gradient is q_sum p - q. Where p is at least 1/2, both may be nearly the same, and
// the difference is no better than the last bit of 1; it is then taken from what the other classes have, as
// q_rest - q_sum (1 - p), where 1 - p is (rest + (1 - exp)) / sum. The error is some units of the last
// place of the result however confident the row is. pull: what options add to each p, 2 z_loss lse.
template <class V, class Quotient = Divide>
FR_HD RowGradient<V> pulled_gradient(const RowSums<V>& s, const RowTarget<V>& t, V pull, V factor,
                                     Quotient quotient = {}) {
  const V softmax_factor = quotient((s.q_sum + pull) * factor, s.sum);
  const V missing = s.rest + (V(1) - t.exp_shifted);
  const V from_rest = factor * (s.q_rest + quotient(pull * t.exp_shifted - s.q_sum * missing, s.sum));
  const V from_target = t.exp_shifted * softmax_factor - t.q * factor;
  return {softmax_factor, flush(select(t.exp_shifted + t.exp_shifted < s.sum, from_target, from_rest))};
}
template <class V, class S, class Quotient = Divide>
FR_HD RowGradient<V> row_gradient(const RowSums<V>& s, const RowTarget<V>& t, V lse, const RowOptions<S>& o,
                                  V factor, Quotient quotient = {}) {
  return pulled_gradient(s, t, o.z_loss != S(0) ? V(S(2) * o.z_loss) * lse : V(S(0)), factor, quotient);
}

// The sum of q_c (x_c - top) without the target, one class after another; logit(c) reads a logit, weight may
// be null. It is for "others" with eps = 1, where the target may be -inf: it has no mass, but base and mix,
// each counted apart, would be inf - inf.
template <class S, class A, class Logit>
FR_HD S dot_without_target(const CrossEntropyArgs& a, const A* weight, int64_t target, S top,
                           const Logit& logit) {
  S dot = 0;
  for (int64_t c = 0; c < a.classes; ++c) {
    const S q = S(a.base) * (weight ? S(weight[c]) : S(1));
    if (c != target && q != 0) dot += q * (S(logit(c)) - top);
  }
  return dot;
}

// ---- launchers and kernels

// What CUDA does in one go: the normaliser of a mean, the rows, and the sum of their losses, all on the
// device.
struct CrossEntropyLaunch {
  CrossEntropyArgs rows;  // row_loss and row_lse unused
  CrossEntropyReduction reduction;
  DType loss_dtype;
  void* loss;     // one, or one for each row where nothing is reduced
  void* lse;      // one for each row, of the accumulation type; null: unwanted
  void* scratch;  // cross_entropy_scratch() numbers of the accumulation type
};
constexpr int kSumBlocks = 256;
inline int64_t cross_entropy_scratch(int64_t rows, const CrossEntropyReduction& reduction) {
  return reduction.kind == CrossEntropyReduction::kNone ? 0 : 2 + 2 * kSumBlocks + rows;
}
int cross_entropy_forward_cuda(const CrossEntropyLaunch&, void* stream);  // gives a cudaError_t

// A number of a gradient times a factor, of which what falls below the normal numbers is 0. 0 stays 0: a sum
// over no row, divided by their number, sends inf here, and of that ignored rows get none.
template <class V>
FR_HD V scaled_gradient(V x, V factor) {
  return select(is_small(x), V(0), flush_result(x * factor));
}

// values *= *factor. The kernel reads the factor on the device and, where it is 1, as it usually is, moves
// nothing.
struct CrossEntropyScale {
  DType dtype, factor_dtype;
  void* values;  // without gaps
  int64_t numel;
  const void* factor;
};
int cross_entropy_scale_cuda(const CrossEntropyScale&, void* stream);

struct CrossEntropyKernels {
  // Tiles [begin, end), in the numbering of cross_entropy_tiles.
  void (*forward)(const CrossEntropyArgs&, int64_t begin, int64_t end);
  void (*scale)(const CrossEntropyScale&, int64_t begin, int64_t end);
};
FR_DECLARE_KERNELS(CrossEntropyKernels, cross_entropy_kernels)

// A tile is this many neighbouring rows with all of their classes. In N-d inputs such rows lie side by side
// in memory: a cache line of the logits holds one class of all of them.
constexpr int64_t kTileRows = 16;
inline int64_t cross_entropy_tiles(const CrossEntropyArgs& a) {
  return a.outer * ((a.inner + kTileRows - 1) / kTileRows);
}

}  // namespace fastreg
