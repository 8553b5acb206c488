// Cross-entropy of logits whose classes are split over ranks: what a rank computes of its own classes, before
// and after the one message (fastreg/_sharded_cross_entropy.py, which has the formula of the loss). q, mix
// and base are those of cross_entropy_math.h, for the classes of all ranks.
//
// What is sent, kSums numbers of each row:
//   top     the largest logit here
//   rest    sum_c exp(x_c - top) - 1
//   first   x_t - top, 0 where the target is elsewhere;  of probabilities sum_c q_c (x_c - top)
//   second  sum_c weight_c base (x_c - top);             of probabilities sum_c q_c
// Where mix + base = 0 a class index has no mass and its logit may be -inf: first is 0, and second leaves it
// out.
//
// What is known after it, kWhole numbers of each row: top, rest, mass, others, pull and factor; top and rest
// of all classes, the sum of their q, the same without the target's class, what options add to each p, and
// the factor of the gradient. Both are matrices with a column for each row of the logits.
#pragma once
#include "cross_entropy_math.h"

namespace fastreg {

struct ShardedArgs : CrossEntropyArgs {
  void* sums;         // before; of the accumulation type, as is `whole`
  const void* whole;  // after
};
constexpr int64_t kSums = 4, kWhole = 6;

// What stands for a class index of the whole in place of one of this rank's.
enum TargetHere : int64_t { kElsewhere = -1, kUncounted = -2 };

// A row after the message.
template <class S>
struct WholeRow {
  S top, rest, mass, others, pull, factor;

  template <class A>
  FR_HD WholeRow(const A* whole, int64_t rows, int64_t row)
      : top(S(whole[row])),
        rest(S(whole[rows + row])),
        mass(S(whole[2 * rows + row])),
        others(S(whole[3 * rows + row])),
        pull(S(whole[4 * rows + row])),
        factor(S(whole[5 * rows + row])) {}

  FR_HD RowSums<S> sums() const { return {top, S(1) + rest, rest, S(0), S(0), mass, others}; }
};

// The gradient of a class whose target is a probability. Where p is at least 1/2 it is taken from what the
// other classes have, as row_gradient does for a class index.
template <class V>
struct SoftGradient {
  V softmax_factor;
  V factor, mass, rest, sum;
  V mass_factor, pull_factor;  // factor * mass / sum, factor * pull / sum

  FR_HD V operator()(V exp_shifted, V q) const {
    const V usual = cross_entropy_grad<true>(exp_shifted, q, softmax_factor, factor);
    const V missing = rest + (V(1) - exp_shifted);
    const V from_rest = factor * (mass - q) + (pull_factor * exp_shifted - mass_factor * missing);
    return select(exp_shifted + exp_shifted < sum, usual, flush(from_rest));
  }
};

struct ShardedKernels {
  // Rows [begin, end). The gradient may overwrite the logits.
  void (*sums)(const ShardedArgs&, int64_t begin, int64_t end);
  void (*gradient)(const ShardedArgs&, int64_t begin, int64_t end);
};
FR_DECLARE_KERNELS(ShardedKernels, cross_entropy_sharded_kernels)

int cross_entropy_sharded_sums_cuda(const ShardedArgs&, void* stream);  // give a cudaError_t
int cross_entropy_sharded_gradient_cuda(const ShardedArgs&, void* stream);

}  // namespace fastreg
