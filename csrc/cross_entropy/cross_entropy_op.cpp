// torch.ops.fastreg.cross_entropy and its relatives; the formula is in cross_entropy_math.h. Here are the
// checks, the allocations and, on the CPU, the threads and the reduction in a fixed order, on CUDA the
// launch. Schemas stand in fastreg/_cross_entropy.py and fastreg/_linear_cross_entropy.py.
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

// Strides of (N, C, d1, ...) as (outer, inner, classes). The dimensions after the classes, `inner` elements
// of them, must merge into one; where there are none, the rows of the batch are the inner ones, so that
// threads have something to split.
CrossEntropyArgs::Strides strides_of(const Tensor& t, int64_t inner) {
  if (t.dim() == 2) return {0, t.stride(0), t.stride(1)};
  int64_t stride = 1;
  for (int64_t d = 2; d < t.dim(); ++d)
    if (t.size(d) != 1) stride = t.stride(d);
  return {t.stride(0), inner == 1 ? 1 : stride, t.stride(1)};
}
bool inner_merges(const Tensor& t) {
  int64_t expected = -1;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (t.size(d) == 1) continue;
    if (expected >= 0 && t.stride(d) != expected) return false;
    expected = t.stride(d) * t.size(d);
  }
  return true;
}

void check_options(const char* op, const CrossEntropyOptions& o, const Tensor& input) {
  for (const auto& bound : o.bounds())
    check(bound.holds(), op, ": ", bound.name, " must be in [0, ", bound.most, "], got ", bound.value);
  check(!o.others || o.label_smoothing == 0 || input.size(1) > 1, op,
        ": smoothing='others' needs at least two classes, got ", shape_text(input));
}

void set_target(const char* op, CrossEntropyArgs& a, const Tensor& target, const Tensor& input,
                int64_t inner) {
  check_device(op, "target", target, "input", input);
  if (target.scalar_type() != ScalarType::Long) {
    a.target_dtype = dtype_of(op, "a target of probabilities", target);
    check(same_shape(target, input), op, ": a target of probabilities must have the shape of input, ",
          shape_text(input), ", got ", shape_text(target));  // (N, C, ...)
    check(inner_merges(target), op,
          ": dimensions after the classes must merge into one; call .contiguous() on target");
    a.soft_target = target.const_data_ptr();
    a.target_stride = strides_of(target, inner);
    return;
  }
  bool fits = target.dim() == input.dim() - 1 && target.size(0) == input.size(0);
  for (int64_t d = 2; fits && d < input.dim(); ++d) fits = target.size(d - 1) == input.size(d);
  check(fits && target.is_contiguous(), op,
        ": a target of class indices must be contiguous and have the shape of input without "
        "its classes, input ",
        shape_text(input), ", got ", shape_text(target));  // (N, ...)
  a.target = static_cast<const int64_t*>(target.const_data_ptr());
}

// The arguments of the kernels that both operators have in common, checked.
CrossEntropyArgs check_arguments(const char* op, const Tensor& input, const Tensor& target,
                                 const std::optional<Tensor>& weight, const CrossEntropyOptions& options) {
  check(input.dim() >= 2, op, ": input must be (N, C, ...), got ", shape_text(input));
  CrossEntropyArgs a{};
  static_cast<CrossEntropyOptions&>(a) = options;
  a.dtype = dtype_of(op, "input", input);
  const int64_t n = input.size(0), k = input.size(1);
  check(k >= 1, op, ": input must have at least one class, got ", shape_text(input));
  check_options(op, options, input);
  check(inner_merges(input), op,
        ": dimensions after the classes must merge into one; call .contiguous() first");
  int64_t inner = 1;
  for (int64_t d = 2; d < input.dim(); ++d) inner *= input.size(d);
  set_target(op, a, target, input, inner);
  if (weight) {
    const ScalarType expected = a.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
    check(weight->dim() == 1 && weight->size(0) == k && weight->is_contiguous() &&
              weight->scalar_type() == expected,
          op, ": weight must have one value for each of the ", k, " classes, shape (", k, ",), got ",
          shape_text(*weight));  // (C,)
    check_device(op, "weight", *weight, "input", input);
    a.weight = weight->const_data_ptr();
  }
  a.logits = input.const_data_ptr();
  a.outer = input.dim() == 2 ? 1 : n;
  a.inner = input.dim() == 2 ? n : inner;
  a.classes = k;
  a.logits_stride = strides_of(input, inner);
  a.grad_factor = 1;
  a.set_smoothing();
  return a;
}

ScalarType statistics_of(const CrossEntropyArgs& a) {
  return a.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

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

void compute(const char* op, const Tensor&, CrossEntropyArgs a, const CrossEntropyReduction& reduction,
             const Tensor& loss, const Tensor* lse) {
  const bool mean = reduction.kind == CrossEntropyReduction::kMean;
  const double normaliser = normaliser_of(op, a);
  const int64_t rows = a.outer * a.inner;
  const bool zero = normaliser == 0 && mean && reduction.all_ignored_zero;
  if (mean) a.grad_factor = zero ? 0 : 1 / normaliser;
  std::vector<double> row_loss(static_cast<size_t>(rows)), row_lse(static_cast<size_t>(rows));
  a.row_loss = row_loss.data();
  a.row_lse = row_lse.data();
  const int64_t tiles = rows > 0 ? cross_entropy_tiles(a) : 0;
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / (a.classes * kTileRows));
  parallel(tiles, grain, [&](int64_t begin, int64_t end) {
    FR_KERNELS(cross_entropy_kernels, rows * a.classes).forward(a, begin, end);
  });
  if (lse) put(*lse, row_lse.data(), rows);
  if (reduction.kind == CrossEntropyReduction::kNone) return put(loss, row_loss.data(), rows);
  double sum = 0;  // in the order of the rows, whatever thread computed them
  for (const double value : row_loss) sum += value;
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

#ifdef FASTREG_CUDA
// values *= factor, a number that the host does not look at. Where it is 1 nothing is moved.
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
  using Operators = fastreg::Operators<fastreg::CrossEntropyOptionValues>;
  m.impl("cross_entropy", TORCH_BOX(&Operators::cross_entropy));
  m.impl("cross_entropy_", TORCH_BOX(&Operators::cross_entropy_inplace));
#ifdef FASTREG_CUDA
  m.impl("cross_entropy_scale_", TORCH_BOX(&fastreg::cross_entropy_scale));
#endif
}
