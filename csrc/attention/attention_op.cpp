// torch.ops.fastreg.attention_weights_ and attention_gradient_: checks, and the rows shared out over threads.
// Their schemas, and the matrix products around them, are in fastreg/_attention_blocks.py. There is no CUDA
// kernel: torch's operators do the same on every other device.
#include "../common/backend.h"
#include "../dropout/dropout_math.h"
#include "attention_math.h"

#ifndef FASTREG_CUDA
namespace fastreg {
namespace {

// A thread gets at least this many scores.
constexpr int64_t kGrain = 1 << 14;

void* contiguous(const char* op, const char* name, const Tensor& t, const Tensor& scores, int64_t numel) {
  check(t.is_contiguous() && t.numel() == numel && t.scalar_type() == scores.scalar_type(), op, ": ", name,
        " must be contiguous, of ", numel, " elements of the dtype of scores, got shape ", shape_text(t));
  return t.mutable_data_ptr();
}

AttentionArgs arguments(const char* op, const Tensor& scores, const std::optional<Tensor>& mask, double p,
                        const Tensor& seed, int64_t first_row, int64_t keys, int64_t query, bool normalised,
                        const Tensor& largest, const Tensor& total) {
  AttentionArgs a{};
  check(scores.dim() == 3, op, ": scores must be of shape (heads, rows, columns), got ", shape_text(scores));
  a.dtype = dtype_of(op, "scores", scores);
  check(a.dtype == DType::kFloat32 || a.dtype == DType::kFloat64, op,
        ": scores must be float32 or float64, got ", scores.scalar_type(), "; convert them with .float()");
  check(p >= 0 && p <= 1, op, ": p must be in [0, 1], got ", p);
  check(first_row >= 0 && keys >= scores.size(2), op, ": first_row must be at least 0 and keys at least ",
        scores.size(2), ", got ", first_row, " and ", keys);
  a.rows = scores.size(1);
  a.columns = scores.size(2);
  a.keys = keys;
  a.first_row = first_row;
  a.query = query;
  a.normalised = normalised;
  a.scores = contiguous(op, "scores", scores, scores, scores.numel());  // (heads, rows, columns)
  const int64_t rows = scores.size(0) * a.rows;
  a.largest = contiguous(op, "largest", largest, scores, rows);  // (heads, rows)
  a.total = contiguous(op, "total", total, scores, rows);        // (heads, rows)
  if (mask) {                                                    // (heads, rows, columns)
    check(same_shape(*mask, scores), op, ": mask must have the shape of scores, ", shape_text(scores),
          ", got ", shape_text(*mask), "; expand it");
    a.mask = mask->const_data_ptr();
    a.mask_is_bool = mask->scalar_type() == ScalarType::Bool;
    if (!a.mask_is_bool) a.mask_dtype = dtype_of(op, "mask", *mask);
    for (int i = 0; i < 3; ++i) a.mask_stride[i] = mask->stride(i);
  }
  a.seed = seed_of(op, seed, scores);
  a.threshold = dropout_threshold(p);
  a.factor = a.threshold ? 0x1p32 / double(a.threshold) : 0;
  return a;
}

template <class F>
void over_rows(const AttentionArgs& a, const Tensor& scores, F f) {
  if (!scores.numel()) return;
  const AttentionKernels& kernels = FR_KERNELS(attention_kernels, scores.numel());
  parallel(scores.numel() / a.columns, (kGrain + a.columns - 1) / a.columns,
           [&](int64_t begin, int64_t end) { f(kernels, begin, end); });
}

void weights(Tensor scores, Tensor dropped, std::optional<Tensor> mask, double p, Tensor seed,
             int64_t first_row, int64_t keys, int64_t query, bool normalised, Tensor largest, Tensor total) {
  const char* op = "attention_weights";
  AttentionArgs a = arguments(op, scores, mask, p, seed, first_row, keys, query, normalised, largest, total);
  a.dropped = contiguous(op, "dropped", dropped, scores, scores.numel());  // (heads, rows, columns)
  over_rows(a, scores, [&](const AttentionKernels& kernels, int64_t begin, int64_t end) {
    kernels.weights(a, begin, end);
  });
}

void gradient(Tensor scores, std::optional<Tensor> dropped, std::optional<Tensor> gradients,
              std::optional<Tensor> d_scores, std::optional<Tensor> mask, double p, Tensor seed,
              int64_t first_row, int64_t keys, int64_t query, bool normalised, Tensor largest, Tensor total) {
  const char* op = "attention_gradient";
  AttentionArgs a = arguments(op, scores, mask, p, seed, first_row, keys, query, normalised, largest, total);
  check(gradients.has_value() == d_scores.has_value() && (dropped || gradients), op,
        ": expected dropped, or gradients and d_scores, or all three");
  const int64_t numel = scores.numel();
  if (dropped) a.dropped = contiguous(op, "dropped", *dropped, scores, numel);
  if (gradients) a.gradients = contiguous(op, "gradients", *gradients, scores, numel);
  if (d_scores) a.d_scores = contiguous(op, "d_scores", *d_scores, scores, numel);
  check(!numel || a.dropped || a.gradients != a.d_scores, op,
        ": without dropped, d_scores must have memory of its own");
  over_rows(a, scores, [&](const AttentionKernels& kernels, int64_t begin, int64_t end) {
    kernels.gradient(a, begin, end);
  });
}

}  // namespace
}  // namespace fastreg

FR_LIBRARY_IMPL(m) {
  m.impl("attention_weights_", TORCH_BOX(&fastreg::weights));
  m.impl("attention_gradient_", TORCH_BOX(&fastreg::gradient));
}
#endif
