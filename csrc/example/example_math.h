// The example of an op, the smallest that there is, to be copied (docs/adding_an_op.md):
//
//   y = factor * x          and its gradient, dx = factor * dy, which is the same op
//
// Here belongs what the CPU and CUDA share: the formula with its source, the arithmetic of one element, the
// arguments of a kernel, and the functions that launch one. Neither torch nor CUDA is included, so that the
// kernels compile in a second and run wherever there is a compiler.
#pragma once
#include "../common/device.h"
#include "../common/isa.h"

namespace fastreg {

// What a kernel needs to know, for the CPU and for CUDA. tests/test_cuda_example.py declares it in ctypes,
// and tests/test_cuda_structures.py compares the two.
struct ExampleArgs {
  DType dtype;
  const void* input;
  void* output;
  Layout input_layout, output_layout;
  double factor;
};

// One element, or a vector of them. V is float, double, or Vec of one of these; FR_HD marks a function of
// both the host and the device.
template <class V>
FR_HD V example_element(V x, V factor) {
  return factor * x;
}

// On the CPU, in example_cpu.cpp: one table of functions for each instruction set.
struct ExampleKernels {
  void (*scale)(const ExampleArgs&, int64_t begin, int64_t end);  // elements [begin, end)
};
FR_DECLARE_KERNELS(ExampleKernels, example_kernels)

// On a CUDA stream, in example_cuda.cu. It gives a cudaError_t.
int example_cuda(const ExampleArgs&, void* stream);

}  // namespace fastreg
