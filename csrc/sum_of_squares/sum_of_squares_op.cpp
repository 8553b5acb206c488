// torch.ops.fastreg.sum_of_squares: checks, threads over all tensors or launches. The schema stands in
// fastreg/_sum_of_squares.py.
#include "../common/capsule.h"
#include "../common/optimizer_op.h"
#include "sum_of_squares_math.h"

namespace fastreg {

#ifndef FASTREG_CUDA
double sum_of_squares_cpu(const SquaresTensor* tensors, size_t count) {
  std::vector<size_t> first(count + 1, 0);  // the sums of each tensor, one for each grain of its elements
  int64_t elements = 0;
  const auto numel = [&](size_t i) { return tensors[i].layout.numel; };
  for (size_t i = 0; i < count; ++i) {
    first[i + 1] = first[i] + size_t((numel(i) + kGrain - 1) / kGrain);
    elements += numel(i);
  }
  const SquaresKernels& kernels = FR_KERNELS(squares_kernels, elements);
  std::vector<double> sums(first[count]);
  for_each_span(count, numel, [&](size_t i, int64_t begin, int64_t end) {
    for (int64_t from = begin; from < end; from += kGrain)
      sums[first[i] + size_t(from / kGrain)] = kernels.sum(tensors[i], from, std::min(end, from + kGrain));
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}
// For a step that clips, which has checked the tensors itself.
const Capsule sum_of_squares_capsule("fastreg._C.sum_of_squares",
                                     reinterpret_cast<const void*>(&sum_of_squares_cpu));
#endif

namespace {

Tensor sum_of_squares(std::vector<Tensor> list) {
  const char* op = "sum_of_squares";
  const size_t count = list.size();
  check(count > 0, "sum_of_squares: expected at least one tensor, got an empty list");
  const auto tensors = std::make_unique_for_overwrite<SquaresTensor[]>(count);
  bool wide = false;
  for (size_t i = 0; i < count; ++i) {
    SquaresTensor* t = &tensors[i];
    t->dtype = dtype_of(op, "each tensor", list[i]);
    check_device(op, "each tensor", list[i], "the first", list[0]);
    t->data = list[i].const_data_ptr();
    t->layout = layout_of(op, list[i]);
    if (same_dense_order(t->layout, t->layout)) t->layout.contiguous = true;  // the sum of a permutation
    wide = wide || t->dtype == DType::kFloat64;
  }
  const Tensor result = allocate(list[0], std::array<int64_t, 0>{}, std::array<int64_t, 0>{},
                                 wide ? ScalarType::Double : ScalarType::Float);
  void* const at = result.mutable_data_ptr();
#ifdef FASTREG_CUDA
  const Tensor partials =
      allocate_flat(list[0], int64_t(sum_of_squares_partials(tensors.get(), count)), ScalarType::Double);
  on_stream(op, list[0], [&](void* stream) {
    return sum_of_squares_cuda(tensors.get(), count, static_cast<double*>(partials.mutable_data_ptr()), at,
                               wide ? DType::kFloat64 : DType::kFloat32, stream);
  });
#else
  const double total = sum_of_squares_cpu(tensors.get(), count);
  if (wide)
    *static_cast<double*>(at) = total;
  else
    *static_cast<float*>(at) = float(total);
#endif
  return result;
}

}  // namespace
}  // namespace fastreg

FR_LIBRARY_IMPL(m) { m.impl("sum_of_squares", TORCH_BOX(&fastreg::sum_of_squares)); }
