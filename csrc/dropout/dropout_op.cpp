// torch.ops.fastreg.dropout and its relatives on the CPU: checks, allocation, threads. Schemas stand in fastreg/dropout.py.
#include <cmath>
#include <tuple>

#include "../common/check.h"
#include "dropout_math.h"

namespace fastreg {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements per thread at least; a multiple of 8, so that no two threads share a mask byte

// The mask has one bit per run of `inner` elements.
DropoutArgs arguments(const char* op, const Tensor& input, const Tensor& output, const Tensor& mask, int64_t inner, double scale,
                      double shift, double dropped) {
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
  check(inner >= 1 && input.numel() % inner == 0, op, ": inner must divide the number of elements, ", input.numel(), ", got ",
        inner);
  return input.numel() / inner;
}

Tensor draw_and_apply(const char* op, const Tensor& input, const Tensor& output, double p, const Tensor& seed, int64_t offset,
                      int64_t inner, double scale, double shift, double dropped) {
  check(p >= 0 && p <= 1, op, ": p must be in [0, 1], got ", p);
  check(offset >= 0, op, ": offset must be at least 0, got ", offset);
  const int64_t bytes = (decisions_of(op, input, inner) + 7) / 8;
  dtype_of(op, "input", input);
  const uint64_t seed_value = seed_of(op, seed);
  Tensor mask = allocate_bytes(input, bytes);
  DropoutArgs a = arguments(op, input, output, mask, inner, scale, shift, dropped);
  a.seed = seed_value;
  a.offset = static_cast<uint64_t>(offset);
  a.threshold = dropout_threshold(p);
  const DropoutKernels& kernels = FR_KERNELS(dropout_kernels, input.numel());
  if (inner == 1) {
    parallel(input.numel(), kGrain, [&](int64_t begin, int64_t end) { kernels.forward(a, begin, end); });
  } else {
    parallel(bytes, kGrain / 8, [&](int64_t begin, int64_t end) { kernels.draw(a, begin, end); });
    parallel(input.numel(), kGrain, [&](int64_t begin, int64_t end) { kernels.apply(a, begin, end); });
  }
  return mask;
}

std::tuple<Tensor, Tensor> dropout(Tensor input, double p, Tensor seed, int64_t offset, int64_t inner, double scale, double shift,
                                   double dropped) {
  dtype_of("dropout", "input", input);
  Tensor output = allocate_like(input);
  Tensor mask = draw_and_apply("dropout", input, output, p, seed, offset, inner, scale, shift, dropped);
  return {output, mask};
}

Tensor dropout_inplace(Tensor input, double p, Tensor seed, int64_t offset, int64_t inner, double scale, double shift,
                       double dropped) {
  check(!overlaps_itself(layout_of("dropout", input)),
        "dropout: inplace needs an input whose elements do not share memory; call "
        "it with inplace=False or on input.clone()");
  return draw_and_apply("dropout", input, input, p, seed, offset, inner, scale, shift, dropped);
}

Tensor dropout_apply(Tensor input, Tensor mask, int64_t inner, double scale, double shift, double dropped) {
  const char* op = "dropout_apply";
  const int64_t bytes = (decisions_of(op, input, inner) + 7) / 8;
  check(mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() && mask.numel() == bytes, op,
        ": mask must be contiguous uint8 of shape (", bytes, ",), got shape ", shape_text(mask));
  check(mask.is_cpu(), op, ": mask must be on the device of input; move it with .to(input.device)");
  dtype_of(op, "input", input);
  Tensor output = allocate_like(input);
  const DropoutArgs a = arguments(op, input, output, mask, inner, scale, shift, dropped);
  parallel(input.numel(), kGrain,
           [&](int64_t begin, int64_t end) { FR_KERNELS(dropout_kernels, input.numel()).apply(a, begin, end); });
  return output;
}

}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg, CPU, m) {
  m.impl("dropout", TORCH_BOX(&fastreg::dropout));
  m.impl("dropout_", TORCH_BOX(&fastreg::dropout_inplace));
  m.impl("dropout_apply", TORCH_BOX(&fastreg::dropout_apply));
}
