// torch.ops.fastreg.cross_entropy_sharded_sums and cross_entropy_sharded_grad_, what a rank computes of its
// classes: checks, allocation, threads or a launch. Part of cross_entropy_op.cpp; schemas stand in
// fastreg/_sharded_cross_entropy.py.
#pragma once
#include <algorithm>
#include <array>

#include "../common/backend.h"
#include "cross_entropy_check.h"
#include "cross_entropy_sharded.h"

namespace fastreg {
namespace {

ShardedArgs sharded_arguments(const char* op, const Tensor& logits, const Tensor& target,
                              const std::optional<Tensor>& weight, double mix, double base) {
  check(logits.dim() == 2 && (logits.size(1) == 1 || logits.stride(1) == 1), op,
        ": logits must be (rows, classes), each row without gaps, got ", shape_text(logits),
        "; call .contiguous() first");
  ShardedArgs a{};
  static_cast<CrossEntropyArgs&>(a) = check_arguments(op, logits, target, weight, CrossEntropyOptions{});
  a.mix = mix;
  a.base = base;
#ifndef FASTREG_CUDA  // on CUDA that would wait for the GPU
  for (int64_t r = 0; a.target && r < a.inner; ++r)
    check(a.target[r] >= kUncounted && a.target[r] < a.classes, op, ": target must be in [-2, ", a.classes,
          "), got ", a.target[r], " at element ", r);
#endif
  return a;
}

#ifndef FASTREG_CUDA
template <class F>
void each_row(const ShardedArgs& a, F f) {
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / a.classes);
  const ShardedKernels& kernels = FR_KERNELS(cross_entropy_sharded_kernels, a.inner * a.classes);
  parallel(a.inner, grain, [&](int64_t begin, int64_t end) { f(kernels, begin, end); });
}
#endif

Tensor cross_entropy_sharded_sums(Tensor logits, Tensor target, std::optional<Tensor> weight, double mix,
                                  double base) {
  const char* op = "cross_entropy_sharded_sums";
  ShardedArgs a = sharded_arguments(op, logits, target, weight, mix, base);
  const int64_t rows = a.inner;
  const Tensor sums = allocate(logits, std::array<int64_t, 2>{kSums, rows}, std::array<int64_t, 2>{rows, 1},
                               statistics_of(a));
  a.sums = sums.mutable_data_ptr();
#ifdef FASTREG_CUDA
  on_stream(op, logits, [&](void* stream) { return cross_entropy_sharded_sums_cuda(a, stream); });
#else
  each_row(a,
           [&](const ShardedKernels& kernels, int64_t begin, int64_t end) { kernels.sums(a, begin, end); });
#endif
  return sums;
}

void cross_entropy_sharded_gradient(Tensor grad, Tensor logits, Tensor target, std::optional<Tensor> weight,
                                    Tensor whole, double mix, double base) {
  const char* op = "cross_entropy_sharded_grad_";
  ShardedArgs a = sharded_arguments(op, logits, target, weight, mix, base);
  const int64_t rows = a.inner;
  const bool in_place = grad.mutable_data_ptr() == logits.const_data_ptr();
  const ScalarType own = logits.scalar_type();
  check(same_shape(grad, logits) && (grad.size(1) == 1 || grad.stride(1) == 1), op,
        ": grad must have the shape of logits, ", shape_text(logits), ", each row without gaps, got ",
        shape_text(grad));
  // No rows have no address by which to know whether they are the logits'.
  check(grad.scalar_type() == (own == ScalarType::Half && !in_place ? ScalarType::Float : own) || rows == 0,
        op, ": grad must have the dtype of logits, or float32 beside float16, got ", grad.scalar_type());
  check_device(op, "grad", grad, "logits", logits);
  check(whole.scalar_type() == statistics_of(a) && whole.is_contiguous() && whole.dim() == 2 &&
            whole.size(0) == kWhole && whole.size(1) == rows,
        op, ": whole must be contiguous, (", kWhole, ", ", rows, ") of the type of the statistics, got ",
        whole.scalar_type(), " of shape ", shape_text(whole));
  check_device(op, "whole", whole, "logits", logits);
  a.grad = grad.mutable_data_ptr();
  a.grad_stride = strides_of(grad, rows);
  check(!in_place || a.grad_stride.inner == a.logits_stride.inner, op,
        ": grad must be logits or lie apart from it");
  a.whole = whole.const_data_ptr();
#ifdef FASTREG_CUDA
  on_stream(op, logits, [&](void* stream) { return cross_entropy_sharded_gradient_cuda(a, stream); });
#else
  each_row(
      a, [&](const ShardedKernels& kernels, int64_t begin, int64_t end) { kernels.gradient(a, begin, end); });
#endif
}

}  // namespace
}  // namespace fastreg
