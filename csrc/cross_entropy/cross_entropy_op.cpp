// torch.ops.fastreg.cross_entropy and its relatives; the formula is in cross_entropy_math.h, the checks in
// cross_entropy_check.h, the operators of a rank's classes in cross_entropy_sharded_op.h. Here are the
// allocations and, on the CPU, the threads and the reduction in a fixed order, on CUDA the launch. Schemas
// stand in fastreg/_cross_entropy.py and fastreg/_linear_cross_entropy.py.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/backend.h"
#include "cross_entropy_check.h"
#include "cross_entropy_math.h"
#include "cross_entropy_sharded_op.h"

namespace fastreg {
namespace {

constexpr int64_t kScaleGrain = 1 << 15;  // a thread scales at least this many numbers

// compute() writes the gradient where one is wanted; loss, a number or one for each row; and lse, one for
// each row, unless it is null. On the CPU every class index is looked at before anything is written; on CUDA
// that would wait for the GPU.
#ifdef FASTREG_CUDA
void compute(const char* op, const Tensor& input, const CrossEntropyArgs& a,
             const CrossEntropyReduction& reduction, const Tensor& loss, const Tensor* lse) {
  CrossEntropyLaunch l{};
  l.rows = a;
  l.reduction = reduction;
  l.loss_dtype = dtype_of(op, "loss", loss);
  l.loss = loss.mutable_data_ptr();
  l.lse = lse ? lse->mutable_data_ptr() : nullptr;
  Tensor scratch =
      allocate_flat(input, cross_entropy_scratch(a.outer * a.inner, reduction), statistics_of(a));
  l.scratch = scratch.mutable_data_ptr();
  on_stream(op, input, [&](void* stream) { return cross_entropy_forward_cuda(l, stream); });
}
#else
// Rounds `values` to the elements of a contiguous floating tensor, once each.
void put(const Tensor& t, const double* values, int64_t count) {
  void* p = t.mutable_data_ptr();
  with_dtype(dtype_of("cross_entropy", "loss", t), [&](auto* type) {
    auto* out = static_cast<decltype(type)>(p);
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (std::is_same_v<decltype(type), double*>)
        out[i] = values[i];
      else
        from_float(float(values[i]), out + i);
    }
  });
}

// What divides a mean: the number of counted rows, or the sum of their targets' weights.
double normaliser_of(const char* op, const CrossEntropyArgs& a) {
  const int64_t rows = a.outer * a.inner, k = a.classes;
  if (a.soft_target) return double(rows);
  int64_t counted = 0, wrong = 0;
  for (int64_t i = 0; i < rows; ++i) {  // without branches, in vectors
    const int64_t t = a.target[i];
    const int64_t ignored = t == a.ignore_index;
    counted += 1 - ignored;
    wrong |= int64_t(uint64_t(t) >= uint64_t(k)) & (1 - ignored);
  }
  double weights = 0;
  for (int64_t i = 0; (wrong || a.weight) && i < rows; ++i) {
    const int64_t t = a.target[i];
    if (t == a.ignore_index) continue;
    check(t >= 0 && t < k, op, ": target must be in [0, ", k, ") or ignore_index ", a.ignore_index, ", got ",
          t, " at element ", i);
    if (!a.weight) continue;
    weights += a.dtype == DType::kFloat64 ? static_cast<const double*>(a.weight)[t]
                                          : double(static_cast<const float*>(a.weight)[t]);
  }
  return a.weight && counted ? weights : double(counted);
}

// In one order, whatever thread computed the values. Eight sums hide the latency of the addition.
double sum_of(const double* values, int64_t count) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int j = 0; j < 8; ++j) sums[j] += values[i + j];
  for (; i < count; ++i) sums[0] += values[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

void compute(const char* op, const Tensor&, CrossEntropyArgs a, const CrossEntropyReduction& reduction,
             const Tensor& loss, const Tensor* lse) {
  const bool mean = reduction.kind == CrossEntropyReduction::kMean;
  const double normaliser = normaliser_of(op, a);
  const int64_t rows = a.outer * a.inner;
  const bool zero = normaliser == 0 && mean && reduction.all_ignored_zero;
  if (mean) a.grad_factor = zero ? 0 : 1 / normaliser;
  const auto row_loss = std::make_unique_for_overwrite<double[]>(static_cast<size_t>(rows));
  a.row_loss = row_loss.get();
  a.row_lse = lse ? lse->mutable_data_ptr() : nullptr;
  const int64_t tiles = rows > 0 ? cross_entropy_tiles(a) : 0;
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / (a.classes * kTileRows));
  parallel(tiles, grain, [&](int64_t begin, int64_t end) {
    FR_KERNELS(cross_entropy_kernels, rows * a.classes).forward(a, begin, end);
  });
  if (reduction.kind == CrossEntropyReduction::kNone) return put(loss, row_loss.get(), rows);
  double sum = sum_of(row_loss.get(), rows);
  if (mean) sum = zero ? 0 : sum / normaliser;
  put(loss, &sum, 1);
}
#endif

Tensor empty_gradient(const Tensor& input, const CrossEntropyArgs& a) {
  return a.dtype == DType::kFloat16 ? torch::stable::new_empty(input, input.sizes(), ScalarType::Float)
                                    : allocate_like(input);
}

// () or, where nothing is reduced, one for each row: of a target of probabilities it is still flat.
Tensor empty_loss(const Tensor& input, const Tensor& target, int64_t rows, bool reduced, ScalarType dtype) {
  constexpr std::array<int64_t, 0> scalar{};
  if (reduced) return allocate(input, scalar, scalar, dtype);
  const bool soft = target.scalar_type() != ScalarType::Long;
  return soft || target.dim() == 1 ? allocate_flat(input, rows, dtype)
                                   : torch::stable::new_empty(target, target.sizes(), dtype);
}

// The operators. `Values` are those of CrossEntropyOptions, one after another.
template <class>
struct Operators;
template <class... Values>
struct Operators<std::tuple<Values...>> {
  // loss: () or the target's shape; grad: d loss / d input, of the input's shape, empty if not wanted; lse:
  // (rows,).
  static std::tuple<Tensor, Tensor, Tensor> cross_entropy(Tensor input, Tensor target,
                                                          std::optional<Tensor> weight, int64_t reduction,
                                                          Values... values, bool all_ignored_zero,
                                                          std::optional<ScalarType> loss_dtype,
                                                          bool with_grad) {
    const char* op = "cross_entropy";
    CrossEntropyArgs a = check_arguments(op, input, target, weight, CrossEntropyOptions{values...});
    const ScalarType own = input.scalar_type(), out_dtype = loss_dtype ? *loss_dtype : own;
    check(out_dtype == own || out_dtype == ScalarType::Float || out_dtype == ScalarType::Double, op,
          ": loss_dtype must be torch.float32, torch.float64 or the dtype of input");
    Tensor grad = with_grad ? empty_gradient(input, a) : allocate_flat(input, 0, own);
    if (with_grad) {
      a.grad = grad.mutable_data_ptr();
      a.grad_stride = strides_of(grad, a.inner);
    }
    const int64_t rows = a.outer * a.inner;
    const bool reduced = reduction != CrossEntropyReduction::kNone;
    const bool soft = target.scalar_type() != ScalarType::Long;  // memory of no element is null
    Tensor lse = allocate_flat(input, rows, statistics_of(a));
    Tensor loss = empty_loss(input, target, rows, reduced, out_dtype);
    compute(op, input, a, {reduction, all_ignored_zero}, loss, &lse);
    if (!reduced && soft && input.dim() > 2) {
      std::vector<int64_t> shape{input.size(0)};
      for (int64_t d = 2; d < input.dim(); ++d) shape.push_back(input.size(d));
      loss = torch::stable::view(loss, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()));
    }
    return {loss, grad, lse};
  }

  // Overwrites each row of the logits, (rows, classes), with factor * its gradient; gives the losses of the
  // rows.
  static Tensor cross_entropy_inplace(Tensor logits, Tensor target, Tensor factor,
                                      std::optional<Tensor> weight, Values... values) {
    const char* op = "cross_entropy_";
    check(logits.dim() == 2 && logits.is_contiguous(), op,
          ": logits must be contiguous, (rows, classes), got ", shape_text(logits));
    CrossEntropyArgs a = check_arguments(op, logits, target, weight, CrossEntropyOptions{values...});
    const int64_t rows = logits.size(0);
    check(factor.scalar_type() == statistics_of(a) && factor.is_contiguous() && factor.numel() == rows, op,
          ": factor must have one value of the type of the statistics for each of the ", rows, " rows, got ",
          factor.scalar_type(), " of shape ", shape_text(factor));
    check_device(op, "factor", factor, "logits", logits);
    a.row_factor = factor.const_data_ptr();
    a.grad = logits.mutable_data_ptr();
    a.grad_stride = a.logits_stride;
    Tensor loss = allocate_flat(logits, rows, statistics_of(a));
    compute(op, logits, a, {CrossEntropyReduction::kNone, false}, loss, nullptr);
    return loss;
  }
};

// On CUDA the host does not look at the factor.
void cross_entropy_scale(Tensor values, Tensor factor) {
  const char* op = "cross_entropy_scale_";
  const Layout layout = layout_of(op, values);
  check(same_dense_order(layout, layout), op, ": values must fill their memory without gaps");
  check(factor.numel() == 1, op, ": factor must be one number, got shape ", shape_text(factor));
  check_device(op, "factor", factor, "values", values);
  const CrossEntropyScale a{dtype_of(op, "values", values), dtype_of(op, "factor", factor),
                            values.mutable_data_ptr(), values.numel(), factor.const_data_ptr()};
#ifdef FASTREG_CUDA
  on_stream(op, values, [&](void* stream) { return cross_entropy_scale_cuda(a, stream); });
#else
  const CrossEntropyKernels& kernels = FR_KERNELS(cross_entropy_kernels, a.numel);
  parallel(a.numel, kScaleGrain, [&](int64_t begin, int64_t end) { kernels.scale(a, begin, end); });
#endif
}

}  // namespace
}  // namespace fastreg

FR_LIBRARY_IMPL(m) {
  using Operators = fastreg::Operators<fastreg::CrossEntropyOptionValues>;
  m.impl("cross_entropy", TORCH_BOX(&Operators::cross_entropy));
  m.impl("cross_entropy_", TORCH_BOX(&Operators::cross_entropy_inplace));
  m.impl("cross_entropy_sharded_sums", TORCH_BOX(&fastreg::cross_entropy_sharded_sums));
  m.impl("cross_entropy_sharded_grad_", TORCH_BOX(&fastreg::cross_entropy_sharded_gradient));
  m.impl("cross_entropy_scale_", TORCH_BOX(&fastreg::cross_entropy_scale));
}
