// torch.ops.fastreg.cross_entropy and its relatives: checks, allocation, threads and the reduction in a fixed
// order, or launch. Schemas stand in fastreg/_cross_entropy.py and fastreg/_linear_cross_entropy.py.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/backend.h"
#include "cross_entropy_math.h"

namespace fastreg {
namespace {

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// (N, C, positions...) as (outer, positions, classes). Positions must merge into one dimension; without any,
// the rows of the batch are the positions, so that threads have something to split.
CrossEntropyArgs::Strides strides_of(const Tensor& t, int64_t positions) {
  if (t.dim() == 2) return {0, t.stride(0), t.stride(1)};
  int64_t inner = 1;
  for (int64_t d = 2; d < t.dim(); ++d)
    if (t.size(d) != 1) inner = t.stride(d);
  return {t.stride(0), positions == 1 ? 1 : inner, t.stride(1)};
}
bool positions_merge(const Tensor& t) {
  int64_t expected = -1;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (t.size(d) == 1) continue;
    if (expected >= 0 && t.stride(d) != expected) return false;
    expected = t.stride(d) * t.size(d);
  }
  return true;
}

// What both operators check before they work.
CrossEntropyArgs check_arguments(const char* op, const Tensor& input, const Tensor& target,
                                 const std::optional<Tensor>& weight, int64_t ignore_index,
                                 double label_smoothing, bool others, double z_loss) {
  check(input.dim() >= 2, op, ": input must be (N, C, ...), got ", shape_text(input));
  const DType dtype = dtype_of(op, "input", input);
  const int64_t n = input.size(0), k = input.size(1);
  check(k >= 1, op, ": input must have at least one class, got ", shape_text(input));
  check(label_smoothing >= 0 && label_smoothing <= 1, op, ": label_smoothing must be in [0, 1], got ",
        label_smoothing);
  check(std::isfinite(z_loss) && z_loss >= 0, op, ": z_loss must be finite and at least 0, got ", z_loss);
  check(!others || label_smoothing == 0 || k > 1, op, ": smoothing='others' needs at least two classes, got ",
        shape_text(input));
  check_device(op, "target", target, "input", input);
  check(positions_merge(input), op,
        ": dimensions after the classes must merge into one; call .contiguous() first");
  int64_t positions = 1;
  for (int64_t d = 2; d < input.dim(); ++d) positions *= input.size(d);

  CrossEntropyArgs a{};
  if (target.scalar_type() != ScalarType::Long) {
    a.target_dtype = dtype_of(op, "a target of probabilities", target);
    check(same_shape(target, input), op, ": a target of probabilities must have the shape of input, ",
          shape_text(input), ", got ", shape_text(target));
    check(positions_merge(target), op,
          ": dimensions after the classes must merge into one; call .contiguous() on target");
    a.soft_target = target.const_data_ptr();
    a.target_stride = strides_of(target, positions);
  } else {
    bool fits = target.dim() == input.dim() - 1 && target.size(0) == n;
    for (int64_t d = 2; fits && d < input.dim(); ++d) fits = target.size(d - 1) == input.size(d);
    check(fits && target.is_contiguous(), op,
          ": a target of class indices must be contiguous and have the shape of input without "
          "its classes, input ",
          shape_text(input), ", got ", shape_text(target));
    a.target = static_cast<const int64_t*>(target.const_data_ptr());
  }
  if (weight) {
    const ScalarType expected = dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
    check(weight->dim() == 1 && weight->size(0) == k && weight->is_contiguous() &&
              weight->scalar_type() == expected,
          op, ": weight must have one value for each of the ", k, " classes, shape (", k, ",), got ",
          shape_text(*weight));
    check_device(op, "weight", *weight, "input", input);
    a.weight = weight->const_data_ptr();
  }

  a.dtype = dtype;
  a.logits = input.const_data_ptr();
  a.outer = input.dim() == 2 ? 1 : n;
  a.positions = input.dim() == 2 ? n : positions;
  a.classes = k;
  a.logits_stride = strides_of(input, positions);
  a.ignore_index = ignore_index;
  const double spread = label_smoothing == 0 ? 0 : label_smoothing / double(others ? k - 1 : k);
  a.base = spread;
  a.mix = 1 - label_smoothing - (others ? spread : 0);
  a.z_loss = z_loss;
  a.grad_factor = 1;
  return a;
}

ScalarType statistics_of(const CrossEntropyArgs& a) {
  return a.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// The gradient where one is wanted; loss, a number or one for each row; and lse, one for each row, unless
// null. On the CPU every class index is looked at before anything is written; on CUDA that would wait for the
// GPU.
#ifdef FASTREG_CUDA
void run(const char* op, const Tensor& input, const CrossEntropyArgs& a, Reduction reduction,
         bool all_ignored_zero, const Tensor& loss, const Tensor* lse) {
  CrossEntropyLaunch l{};
  l.rows = a;
  l.reduction = reduction;
  l.all_ignored_zero = all_ignored_zero;
  l.loss_dtype = dtype_of(op, "loss", loss);
  l.loss = loss.mutable_data_ptr();
  l.lse = lse ? lse->mutable_data_ptr() : nullptr;
  Tensor scratch =
      allocate_flat(input, cross_entropy_scratch(a.outer * a.positions, reduction), statistics_of(a));
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
  const int64_t rows = a.outer * a.positions, k = a.classes;
  if (a.soft_target) return double(rows);
  double weights = 0;
  int64_t counted = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t t = a.target[i];
    if (t == a.ignore_index) continue;
    check(t >= 0 && t < k, op, ": target must be in [0, ", k, ") or ignore_index ", a.ignore_index, ", got ",
          t, " at element ", i);
    ++counted;
    if (!a.weight) continue;
    weights += a.dtype == DType::kFloat64 ? static_cast<const double*>(a.weight)[t]
                                          : double(static_cast<const float*>(a.weight)[t]);
  }
  return a.weight && counted ? weights : double(counted);
}

void run(const char* op, const Tensor&, CrossEntropyArgs a, Reduction reduction, bool all_ignored_zero,
         const Tensor& loss, const Tensor* lse) {
  const double normaliser = normaliser_of(op, a);
  const int64_t rows = a.outer * a.positions;
  const bool zero = normaliser == 0 && reduction == kMean && all_ignored_zero;
  if (reduction == kMean) a.grad_factor = zero ? 0 : 1 / normaliser;
  std::vector<double> row_loss(static_cast<size_t>(rows)), row_lse(static_cast<size_t>(rows));
  a.row_loss = row_loss.data();
  a.row_lse = row_lse.data();
  const int64_t blocks = rows > 0 ? cross_entropy_blocks(a) : 0;
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / (a.classes * kRowBlock));
  parallel(blocks, grain, [&](int64_t begin, int64_t end) {
    FR_KERNELS(cross_entropy_kernels, rows * a.classes).forward(a, begin, end);
  });
  if (lse) put(*lse, row_lse.data(), rows);
  if (reduction == kNone) return put(loss, row_loss.data(), rows);
  double sum = 0;  // in the order of the rows, whatever thread computed them
  for (const double value : row_loss) sum += value;
  if (reduction == kMean) sum = zero ? 0 : sum / normaliser;
  put(loss, &sum, 1);
}
#endif

// loss: () or the target's shape; grad: d loss / d input, of the input's shape, empty if not wanted; lse:
// (rows,).
std::tuple<Tensor, Tensor, Tensor> cross_entropy(Tensor input, Tensor target, std::optional<Tensor> weight,
                                                 int64_t reduction, int64_t ignore_index,
                                                 double label_smoothing, bool others, double z_loss,
                                                 bool all_ignored_zero, std::optional<ScalarType> loss_dtype,
                                                 bool with_grad) {
  const char* op = "cross_entropy";
  CrossEntropyArgs a =
      check_arguments(op, input, target, weight, ignore_index, label_smoothing, others, z_loss);
  const ScalarType out_dtype = loss_dtype ? *loss_dtype : input.scalar_type();
  check(out_dtype == input.scalar_type() || out_dtype == ScalarType::Float || out_dtype == ScalarType::Double,
        op, ": loss_dtype must be torch.float32, torch.float64 or the dtype of input");
  Tensor grad = input;
  if (!with_grad) {
    grad = allocate_flat(input, 0, input.scalar_type());
  } else if (a.dtype == DType::kFloat16) {
    grad = torch::stable::new_empty(input, input.sizes(), ScalarType::Float);
  } else {
    grad = allocate_like(input);
  }
  if (with_grad) {
    a.grad = grad.mutable_data_ptr();
    a.grad_stride = strides_of(grad, a.positions);
  }
  const int64_t rows = a.outer * a.positions;
  const bool soft = target.scalar_type() != ScalarType::Long;
  Tensor lse = allocate_flat(input, rows, statistics_of(a)), loss = lse;
  if (reduction != kNone) {
    constexpr std::array<int64_t, 0> scalar{};
    loss = allocate(input, scalar, scalar, out_dtype);
  } else if (soft || target.dim() == 1) {
    loss = allocate_flat(input, rows, out_dtype);
  } else {
    loss = torch::stable::new_empty(target, target.sizes(), out_dtype);
  }
  run(op, input, a, Reduction(reduction), all_ignored_zero, loss, &lse);
  if (reduction == kNone && soft && input.dim() > 2) {
    std::vector<int64_t> shape{input.size(0)};
    for (int64_t d = 2; d < input.dim(); ++d) shape.push_back(input.size(d));
    loss = torch::stable::view(loss, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()));
  }
  return {loss, grad, lse};
}

// Overwrites each row of the logits, (rows, classes), with factor * its gradient; gives the losses of the
// rows.
Tensor cross_entropy_inplace(Tensor logits, Tensor target, Tensor factor, std::optional<Tensor> weight,
                             int64_t ignore_index, double label_smoothing, bool others, double z_loss) {
  const char* op = "cross_entropy_";
  check(logits.dim() == 2 && logits.is_contiguous(), op, ": logits must be contiguous, (rows, classes), got ",
        shape_text(logits));
  CrossEntropyArgs a =
      check_arguments(op, logits, target, weight, ignore_index, label_smoothing, others, z_loss);
  const int64_t rows = logits.size(0);
  check(factor.scalar_type() == statistics_of(a) && factor.is_contiguous() && factor.numel() == rows, op,
        ": factor must have one value of the type of the statistics for each of the ", rows, " rows, got ",
        factor.scalar_type(), " of shape ", shape_text(factor));
  check_device(op, "factor", factor, "logits", logits);
  a.row_factor = factor.const_data_ptr();
  a.grad = logits.mutable_data_ptr();
  a.grad_stride = a.logits_stride;
  Tensor loss = allocate_flat(logits, rows, statistics_of(a));
  run(op, logits, a, kNone, false, loss, nullptr);
  return loss;
}

#ifdef FASTREG_CUDA
// values *= factor, a number that the host does not look at. Of 1 nothing is moved.
void cross_entropy_scale(Tensor values, Tensor factor) {
  const char* op = "cross_entropy_scale_";
  const Layout layout = layout_of(op, values);
  check(same_dense_order(layout, layout), op, ": values must fill their memory without gaps");
  check(factor.numel() == 1, op, ": factor must be one number, got shape ", shape_text(factor));
  check_device(op, "factor", factor, "values", values);
  const CrossEntropyScale a{dtype_of(op, "values", values), dtype_of(op, "factor", factor),
                            values.mutable_data_ptr(), values.numel(), factor.const_data_ptr()};
  on_stream(op, values, [&](void* stream) { return cross_entropy_scale_cuda(a, stream); });
}
#endif

}  // namespace
}  // namespace fastreg

FR_LIBRARY_IMPL(m) {
  m.impl("cross_entropy", TORCH_BOX(&fastreg::cross_entropy));
  m.impl("cross_entropy_", TORCH_BOX(&fastreg::cross_entropy_inplace));
#ifdef FASTREG_CUDA
  m.impl("cross_entropy_scale_", TORCH_BOX(&fastreg::cross_entropy_scale));
#endif
}
