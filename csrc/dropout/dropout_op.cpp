// torch.ops.fastreg.dropout and its relatives: checks, allocation, threads or launch. Schemas stand in
// fastreg/_dropout.py.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "../common/backend.h"
#include "dropout_math.h"

namespace fastreg {
namespace {

#ifdef FASTREG_CUDA
void forward(const char* op, const Tensor& input, const DropoutArgs& a) {
  on_stream(op, input, [&](void* stream) { return dropout_forward_cuda(a, stream); });
}
void apply(const char* op, const Tensor& input, const DropoutArgs& a) {
  on_stream(op, input, [&](void* stream) { return dropout_apply_cuda(a, stream); });
}
void add(const char* op, const Tensor& input, const DropoutAddArgs& a) {
  on_stream(op, input, [&](void* stream) { return dropout_add_cuda(a, stream); });
}
#else
// A thread gets at least so many elements; a multiple of 8, so that no two threads share a byte of the mask.
constexpr int64_t kGrain = 1 << 15;

void apply(const char*, const Tensor&, const DropoutArgs& a) {
  const int64_t numel = a.input_layout.numel;
  const DropoutKernels& kernels = FR_KERNELS(dropout_kernels, numel);
  parallel(numel, kGrain, [&](int64_t begin, int64_t end) { kernels.apply(a, begin, end); });
}
void forward(const char* op, const Tensor& input, const DropoutArgs& a) {
  const int64_t numel = a.input_layout.numel;
  const DropoutKernels& kernels = FR_KERNELS(dropout_kernels, numel);
  if (a.inner == 1)
    return parallel(numel, kGrain, [&](int64_t begin, int64_t end) { kernels.forward(a, begin, end); });
  parallel((a.decisions + 7) / 8, kGrain / 8,
           [&](int64_t begin, int64_t end) { kernels.draw(a, begin, end); });
  apply(op, input, a);
}
void add(const char*, const Tensor&, const DropoutAddArgs& a) {
  const int64_t numel = a.input_layout.numel;
  const DropoutKernels& kernels = FR_KERNELS(dropout_kernels, numel);
  parallel(numel, kGrain, [&](int64_t begin, int64_t end) { kernels.add(a, begin, end); });
}
#endif

// The mask has one bit per run of `inner` elements.
DropoutArgs arguments(const char* op, const Tensor& input, const Tensor& output, const Tensor& mask,
                      int64_t inner, double scale, double shift, double dropped) {
  DropoutArgs a{};
  a.dtype = dtype_of(op, "input", input);
  a.input = input.const_data_ptr();
  a.output = output.mutable_data_ptr();
  a.mask = static_cast<uint8_t*>(const_cast<void*>(mask.const_data_ptr()));
  a.input_layout = layout_of(op, input);
  a.output_layout = layout_of(op, output);
  a.inner = inner;
  a.decisions = input.numel() / inner;
  a.scale = scale;
  a.shift = shift;
  a.dropped = dropped;
  return a;
}

int64_t decisions_of(const char* op, const Tensor& input, int64_t inner) {
  check(inner >= 1 && input.numel() % inner == 0, op, ": inner must divide the number of elements, ",
        input.numel(), ", got ", inner);
  return input.numel() / inner;
}

uint64_t threshold_of(const char* op, double p) {
  check(p >= 0 && p <= 1, op, ": p must be in [0, 1], got ", p);
  return dropout_threshold(p);
}

Tensor draw_and_apply(const char* op, const Tensor& input, const Tensor& output, double p, const Tensor& seed,
                      int64_t offset, int64_t inner, double scale, double shift, double dropped) {
  const uint64_t threshold = threshold_of(op, p);
  check(offset >= 0, op, ": offset must be at least 0, got ", offset);
  const int64_t bytes = (decisions_of(op, input, inner) + 7) / 8;
  dtype_of(op, "input", input);
  const Seed seed_value = seed_of(op, seed, input);
  Tensor mask = allocate_bytes(input, bytes);
  DropoutArgs a = arguments(op, input, output, mask, inner, scale, shift, dropped);
  a.seed = seed_value;
  a.offset = static_cast<uint64_t>(offset);
  a.threshold = threshold;
  forward(op, input, a);
  return mask;
}

std::tuple<Tensor, Tensor> dropout(Tensor input, double p, Tensor seed, int64_t offset, int64_t inner,
                                   double scale, double shift, double dropped) {
  dtype_of("dropout", "input", input);
  Tensor output = allocate_like(input);
  Tensor mask = draw_and_apply("dropout", input, output, p, seed, offset, inner, scale, shift, dropped);
  return {output, mask};
}

Tensor dropout_inplace(Tensor input, double p, Tensor seed, int64_t offset, int64_t inner, double scale,
                       double shift, double dropped) {
  check(!overlaps_itself(layout_of("dropout", input)),
        "dropout: inplace needs an input whose elements do not share memory; call "
        "it with inplace=False or on input.clone()");
  return draw_and_apply("dropout", input, input, p, seed, offset, inner, scale, shift, dropped);
}

Tensor dropout_mask(Tensor like, int64_t decisions, double p, Tensor seed, int64_t offset, int64_t columns,
                    int64_t row) {
  const char* op = "dropout_mask";
  check(decisions >= 0 && offset >= 0 && columns >= 0 && row >= 0, op,
        ": decisions, offset, columns and row must be at least 0, got ", decisions, ", ", offset, ", ",
        columns, " and ", row);
  DropoutMaskArgs a{};
  a.threshold = threshold_of(op, p);
  a.seed = seed_of(op, seed, like);
  a.decisions = decisions;
  a.columns = columns ? columns : std::max<int64_t>(decisions, 1);
  a.row = row;
  a.first = static_cast<uint64_t>(offset);
  const int64_t bytes = (decisions + 7) / 8;
  Tensor mask = allocate_bytes(like, bytes);
  a.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
#ifdef FASTREG_CUDA
  on_stream(op, like, [&](void* stream) { return dropout_mask_cuda(a, stream); });
#else
  const DropoutKernels& kernels = FR_KERNELS(dropout_kernels, decisions);
  parallel(bytes, kGrain / 8, [&](int64_t begin, int64_t end) { kernels.mask(a, begin, end); });
#endif
  return mask;
}

Tensor dropout_apply(Tensor input, Tensor mask, int64_t inner, double scale, double shift, double dropped) {
  const char* op = "dropout_apply";
  const int64_t bytes = (decisions_of(op, input, inner) + 7) / 8;
  check(mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() && mask.numel() == bytes, op,
        ": mask must be contiguous uint8 of shape (", bytes, ",), got shape ", shape_text(mask));
  check_device(op, "mask", mask, "input", input);
  dtype_of(op, "input", input);
  Tensor output = allocate_like(input);
  apply(op, input, arguments(op, input, output, mask, inner, scale, shift, dropped));
  return output;
}

std::tuple<Tensor, Tensor> dropout_add(Tensor input, Tensor residual, std::optional<Tensor> bias, double p,
                                       Tensor seed, double scale) {
  const char* op = "dropout_add";
  const uint64_t threshold = threshold_of(op, p);
  dtype_of(op, "input", input);
  check_same(op, "residual", residual, "input", input);
  const int64_t columns = input.dim() ? input.size(-1) : 1;
  if (bias) {
    check(bias->scalar_type() == input.scalar_type(), op,
          ": bias must have the dtype of input; convert it with .to(input.dtype)");
    check_device(op, "bias", *bias, "input", input);
    check(input.dim() && bias->dim() == 1 && bias->size(0) == columns, op,
          ": bias must have the size of input's last dimension, ", "got ", shape_text(*bias), " for ",
          shape_text(input));  // (columns,)
    check(bias->is_contiguous(), op, ": bias must be contiguous; call .contiguous()");
  }
  const Seed seed_value = seed_of(op, seed, input);
  Tensor output = allocate_like(input), mask = allocate_bytes(input, (input.numel() + 7) / 8);
  DropoutAddArgs a{};
  static_cast<DropoutArgs&>(a) = arguments(op, input, output, mask, 1, scale, 0, 0);
  a.seed = seed_value;
  a.threshold = threshold;
  a.residual = residual.const_data_ptr();
  a.residual_layout = layout_of(op, residual);
  a.bias = bias ? bias->const_data_ptr() : nullptr;
  a.columns = columns ? columns : 1;  // a divisor, even where there is no element
  add(op, input, a);
  return {output, mask};
}

}  // namespace
}  // namespace fastreg

FR_LIBRARY_IMPL(m) {
  m.impl("dropout", TORCH_BOX(&fastreg::dropout));
  m.impl("dropout_", TORCH_BOX(&fastreg::dropout_inplace));
  m.impl("dropout_mask", TORCH_BOX(&fastreg::dropout_mask));
  m.impl("dropout_apply", TORCH_BOX(&fastreg::dropout_apply));
  m.impl("dropout_add", TORCH_BOX(&fastreg::dropout_add));
}
