// torch.ops.fastreg.example. Its schema is in fastreg/_example.py.
//
// Here belong the checks, the allocation of the results, and the threads or the launch. This is the only file
// of the op that sees torch, and only torch's stable ABI. It is compiled twice, for the CPU and, with
// FASTREG_CUDA, for CUDA, so that both check alike. A check says "op: what must be, got what; remedy".
#include "../common/backend.h"
#include "example_math.h"

namespace fastreg {
namespace {

Tensor example(Tensor input, double factor) {
  const char* op = "example";
  check(factor == factor, op, ": factor must be a number, got NaN; choose another one");
  ExampleArgs a{};
  a.dtype = dtype_of(op, "input", input);
  const Tensor output = allocate_like(input);
  a.input = input.const_data_ptr();
  a.output = output.mutable_data_ptr();
  a.input_layout = layout_of(op, input);
  a.output_layout = layout_of(op, output);
  a.factor = factor;
  // Two tensors that fill their memory in one order, both channels-last for instance, are walked as flat
  // memory.
  if (same_dense_order(a.input_layout, a.output_layout))
    a.input_layout.contiguous = a.output_layout.contiguous = true;
#ifdef FASTREG_CUDA
  on_stream(op, input, [&](void* stream) { return example_cuda(a, stream); });
#else
  constexpr int64_t kGrain = 1 << 15;  // elements per thread at least
  parallel(input.numel(), kGrain, [&](int64_t begin, int64_t end) {
    FR_KERNELS(example_kernels, input.numel()).scale(a, begin, end);
  });
#endif
  return output;
}

}  // namespace
}  // namespace fastreg

FR_LIBRARY_IMPL(m) { m.impl("example", TORCH_BOX(&fastreg::example)); }
