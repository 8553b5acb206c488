// Cross-entropy of a softmax against smoothed targets, and its gradient.
//
//   q_c  = weight_c * (mix * t_c + base)      t the one-hot or soft target
//     uniform (Szegedy et al. 2016, as in torch)      mix = 1 - eps,                 base = eps / k
//     others (Goodfellow et al. 2016, section 7.5.1)  mix = 1 - eps - eps / (k - 1), base = eps / (k - 1)
//   loss = sum_c q_c (lse - x_c) + z_loss * lse^2,    lse = log sum_c exp x_c
//   dloss/dx_c = (sum q + 2 z_loss lse) p_c - q_c,    p = softmax(x)
//
// A class with q_c = 0 takes no part in the first sum, so that its logit may be -inf.
#pragma once
#include "../common/device.h"
#include "../common/isa.h"

namespace fastreg {

struct CrossEntropyArgs {
  DType dtype, target_dtype;  // target_dtype: of soft targets
  const void* logits;
  void* grad;             // null: no gradient wanted; may be the logits, which it then overwrites
  const int64_t* target;  // class indices, one per row; or null and
  const void* soft_target;
  const void* weight;  // of the accumulation type, null: 1
  double* row_loss;
  double* row_lse;
  // Row r = (r / positions, r % positions); strides in elements.
  int64_t outer, positions, classes;
  struct Strides {
    int64_t outer, position, cls;
  } logits_stride, grad_stride, target_stride;
  int64_t ignore_index;
  double mix, base, z_loss;
  double grad_factor;      // 1 / normaliser of a mean, else 1; or
  const void* row_factor;  // one for each row, of the accumulation type
};

template <class V>
FR_HD V smoothed_target(V t, V weight, V mix, V base) {
  return weight * (mix * t + base);
}
// 0 * inf counts as 0.
template <class V>
FR_HD V weighted_logit(V q, V x) {
  return select(q == V(0), V(0), q * x);
}
template <class V>
FR_HD V cross_entropy_grad(V exp_shifted, V q, V softmax_factor, V grad_factor) {
  return multiply_add(exp_shifted, softmax_factor, V(0) - q * grad_factor);
}

// What CUDA does in one go: the normaliser of a mean, the rows, and the sum of their losses, all on the
// device.
struct CrossEntropyLaunch {
  CrossEntropyArgs rows;  // row_loss, row_lse and grad_factor unused
  int64_t reduction;      // 0 none, 1 mean, 2 sum
  bool all_ignored_zero;
  DType loss_dtype;
  void* loss;     // one, or one for each row if reduction is none
  void* lse;      // one for each row, of the accumulation type; null: unwanted
  void* scratch;  // cross_entropy_scratch() numbers of the accumulation type
};
constexpr int kSumBlocks = 256;
inline int64_t cross_entropy_scratch(int64_t rows, int64_t reduction) {
  return reduction == 0 ? 0 : 2 + 2 * kSumBlocks + rows;
}
int cross_entropy_forward_cuda(const CrossEntropyLaunch&, void* stream);  // gives a cudaError_t

// values *= *factor, read on the device, where a factor of 1, the usual one, ends it at once.
struct CrossEntropyScale {
  DType dtype, factor_dtype;
  void* values;  // without gaps
  int64_t numel;
  const void* factor;
};
int cross_entropy_scale_cuda(const CrossEntropyScale&, void* stream);

struct CrossEntropyKernels {
  // Blocks of rows [begin, end), in the numbering of cross_entropy_blocks.
  void (*forward)(const CrossEntropyArgs&, int64_t begin, int64_t end);
};
FR_DECLARE_KERNELS(CrossEntropyKernels, cross_entropy_kernels)

// Rows that lie side by side in memory (N-d inputs) are transposed through a buffer of this many rows at a
// time.
constexpr int64_t kRowBlock = 16;
inline int64_t cross_entropy_blocks(const CrossEntropyArgs& a) {
  return a.outer * ((a.positions + kRowBlock - 1) / kRowBlock);
}

}  // namespace fastreg
