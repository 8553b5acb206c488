// What the operators of cross-entropy check of their arguments, and the kernels' arguments made of them. Part
// of cross_entropy_op.cpp.
#pragma once
#include <optional>

#include "../common/check.h"
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

}  // namespace
}  // namespace fastreg
