// What attention with dropout does to a block of scores, between its matrix products:
//
//   forward    W = e^(s - largest of the row), Z = sum of W over the row, D = dropout(W);  output = D V / Z
//   backward   with G the gradient of the output divided by Z, and P = G V^T:
//              the gradient of the scores is D * P - W * (sum of D * P over the row) / Z,  that of V is D^T G
//
// The division by Z is left to the output, which is smaller. Where it is not (`normalised`), what comes out
// is D / Z, and P is the gradient of that.
//
// s is q k^T * scale plus the mask, where there is one, and -inf above the diagonal, where attention is
// causal. Vaswani et al. 2017; by blocks of rows: Dao et al. 2022, FlashAttention. A whole row is in the
// block, so that no sum is corrected later. A row that is all -inf gets weights 0.
//
// Whether the weight of (row, column) is kept is decision row * keys + column of dropout (dropout_math.h),
// with the rows of all heads counted one after the other.
#pragma once
#include "../common/device.h"
#include "../common/isa.h"
#include "../common/philox.h"

namespace fastreg {

// A block: `rows` rows of each of some heads, one after the other, contiguous.
struct AttentionArgs {
  DType dtype;            // of everything but the mask: float32 or float64
  void* scores;           // products times scale; the mask is added to them
  void* dropped;          // D; it may be the scores themselves, and null in backward: it is not wanted
  const void* gradients;  // backward: P, or null: the gradient of the scores is not wanted
  void* d_scores;         // backward: that gradient; it may be P itself where D is wanted
  void* largest;          // of each row: written by forward, read by backward
  void* total;            // Z, at least 1, likewise
  bool normalised;
  int64_t rows, columns;
  int64_t keys;       // of a row of all scores; a causal block may leave out the last
  int64_t first_row;  // the number of the first row among all rows of all heads
  int64_t query;      // causal: the place of the first row in its head; else -1
  const void* mask;   // or null
  DType mask_dtype;
  bool mask_is_bool;       // then true means that the key is seen, and mask_dtype says nothing
  int64_t mask_stride[3];  // of heads, rows and columns, in elements
  Seed seed;
  uint64_t threshold;  // kept if 32 random bits are below it
  double factor;       // of what is kept
};

struct AttentionKernels {
  // Rows [begin, end) of the block, those of all its heads counted.
  void (*weights)(const AttentionArgs&, int64_t begin, int64_t end);
  void (*gradient)(const AttentionArgs&, int64_t begin, int64_t end);
};
FR_DECLARE_KERNELS(AttentionKernels, attention_kernels)

}  // namespace fastreg
