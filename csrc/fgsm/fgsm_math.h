// One step against or along the sign of a gradient, then into [lower, upper] (the box):
//
//   x' = clamp(x + step * sign(g), lower, upper)
//        FGSM: Goodfellow, Shlens, Szegedy 2015
//   x' = clamp(clamp(x + step * sign(g), origin - radius, origin + radius), lower, upper)
//        PGD: Madry, Makelov, Schmidt, Tsipras, Vladu 2018
//
// sign(0) = sign(NaN) = 0 as in torch; a NaN in x stays. A NaN bound does not bound.
#pragma once
#include "../common/device.h"
#include "../common/isa.h"

namespace fastreg {

// The step, the radius or a bound, spread over x. Element i takes values[i / inner % count]: `inner` is how
// many neighbours share a value, `count` is how many values there are. Where `values` is null all take
// `value`.
struct FgsmParameter {
  double value;
  const void* values;  // of the accumulation type
  int64_t inner, count;
};

struct FgsmArgs {
  DType dtype;
  const void *x, *grad, *origin;  // origin null: no projection
  void* output;
  Layout x_layout, grad_layout, origin_layout, output_layout;
  FgsmParameter step, radius, lower, upper;
};

template <class V>
FR_HD V fgsm_clamp(V x, V lower, V upper) {
  return maximum(lower, minimum(upper, x));
}

template <class V>
FR_HD V fgsm_element(V x, V grad, V step, V lower, V upper) {
  const V zero(0);
  return fgsm_clamp(select(grad > zero, x + step, select(grad < zero, x - step, x)), lower, upper);
}

template <class V>
FR_HD V pgd_element(V x, V grad, V origin, V step, V radius, V lower, V upper) {
  const V zero(0), moved = select(grad > zero, x + step, select(grad < zero, x - step, x));
  return fgsm_clamp(fgsm_clamp(moved, origin - radius, origin + radius), lower, upper);
}

struct FgsmKernels {
  void (*step)(const FgsmArgs&, int64_t begin, int64_t end);  // elements [begin, end)
};
FR_DECLARE_KERNELS(FgsmKernels, fgsm_kernels)

// On a CUDA stream, in fgsm_cuda.cu; gives a cudaError_t.
int fgsm_step_cuda(const FgsmArgs&, void* stream);

}  // namespace fastreg
