// The sum of the squares of all elements of many tensors, in one read. Its root is the global norm of the
// gradients, by which they are clipped (Pascanu, Mikolov, Bengio 2013).
//
// The order of the sum depends on the sizes alone, so that every run, thread count and instruction set gives
// the same bits. Squares and the sum of a block of 1024 are of the arithmetic's type: a float32 of 2e19,
// whose square leaves its range, gives inf, as the result does in float32. The blocks are added in float64.
#pragma once
#include <cstddef>

#include "../common/device.h"
#include "../common/isa.h"

namespace fastreg {

struct SquaresTensor {
  DType dtype;
  const void* data;
  Layout layout;
};

struct SquaresKernels {
  // The sum over elements [begin, end); begin is a multiple of 1024.
  double (*sum)(const SquaresTensor&, int64_t begin, int64_t end);
};
FR_DECLARE_KERNELS(SquaresKernels, squares_kernels)

// Over torch's threads, in sum_of_squares_op.cpp. It checks nothing: its callers have.
double sum_of_squares_cpu(const SquaresTensor* tensors, size_t count);

// The partial sums that the launch below writes.
size_t sum_of_squares_partials(const SquaresTensor* tensors, size_t count);

// On a CUDA stream, in sum_of_squares_cuda.cu; gives a cudaError_t.
int sum_of_squares_cuda(const SquaresTensor* tensors, size_t count, double* partials, void* result,
                        DType result_dtype, void* stream);

}  // namespace fastreg
