// What attention with dropout does to a block of scores, between its matrix products:
//
//   scores     S = Q K^T * scale + mask; -inf above the diagonal, where attention is causal
//   forward    W = e^(S - largest of the row), Z = sum of W over the row, D = dropout(W);  output = D V / Z
//   backward   with G the gradient of the output divided by Z, and P = G V^T:
//              the gradient of the scores is D * P - W * (sum of D * P over the row) / Z,  that of V is D^T G
//
// The division by Z is left to the output, which is smaller. With `normalised` it is done here: forward gives
// D / Z, and P is the gradient of that.
//
// Vaswani et al. 2017; by blocks of rows: Dao et al. 2022, FlashAttention. A block has whole rows, so that no
// sum is corrected later. A row that is all -inf gets weights 0.
//
// Whether the weight of (row, column) is kept is decision row * keys + column of dropout (dropout_math.h),
// with the rows of all heads counted one after the other.
#pragma once
#include "../common/device.h"
#include "../common/isa.h"
#include "../common/philox.h"

namespace fastreg {

// A block has `rows` rows of each of some heads, one after the other, in contiguous memory.
struct AttentionArgs {
  DType dtype;            // of everything but the mask: float32 or float64
  void* scores;           // products times scale; the mask is added to them
  void* dropped;          // D, which may overwrite the scores; null where backward does not want it
  const void* gradients;  // P in backward; null where the gradient of the scores is not wanted
  void* d_scores;         // that gradient; it may overwrite P where D is wanted, too
  void* largest;          // the largest score of each row, which forward writes and backward reads
  void* total;            // Z of each row, at least 1, likewise
  bool normalised;
  int64_t rows, columns;
  int64_t keys;       // how many there are; a causal block has columns only for those that its rows see
  int64_t first_row;  // the number of the first row among all rows of all heads
  int64_t query;      // the number of the first row in its head where attention is causal, else -1
  const void* mask;   // or null
  DType mask_dtype;
  bool mask_is_bool;       // then true means that the key is seen, and mask_dtype says nothing
  int64_t mask_stride[3];  // of heads, rows and columns, in elements
  Seed seed;
  uint64_t threshold;  // kept if 32 random bits are below it
  double factor;       // by which a weight that is kept is multiplied
};

struct AttentionKernels {
  // Rows [begin, end) of the block, those of all its heads counted.
  void (*weights)(const AttentionArgs&, int64_t begin, int64_t end);
  void (*gradient)(const AttentionArgs&, int64_t begin, int64_t end);
};
FR_DECLARE_KERNELS(AttentionKernels, attention_kernels)

}  // namespace fastreg
