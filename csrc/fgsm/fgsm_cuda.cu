// The FGSM and PGD steps on CUDA, formulas in fgsm_math.h.
// Bytes per float32 element: FGSM reads x and g, writes x': 12, the floor; PGD reads the origin too: 16.
#include <type_traits>

#include "../common/cuda.h"
#include "fgsm_math.h"

namespace fastreg {
inline namespace fgsm_kernels {

// An FgsmParameter in the type of accumulation, with divisions made ready.
template <class A>
struct Parameter {
  A value;
  const A* values;
  bool per_element;  // inner == 1
  Divider inner, count;

  explicit Parameter(const FgsmParameter& n)
      : value(A(n.value)), values(static_cast<const A*>(n.values)), per_element(n.inner == 1) {
    if (!values) return;
    inner = Divider(n.inner);
    count = Divider(n.count);
  }

  __device__ __forceinline__ A operator()(int64_t i) const {
    if (!values) return value;
    const int64_t run = per_element ? i : inner.divide(i);
    return values[run - count.divide(run) * int64_t(count.divisor)];
  }
};

template <class A>
struct Parameters {
  Parameter<A> step, radius, lower, upper;
};

// Without projection the origin and the radius are never read; callers pass anything in their place.
template <class T, bool kProject, class A>
__device__ __forceinline__ T element(T x, T grad, T origin, A step, A radius, A lower, A upper) {
  const A vx = load_float(x), vg = load_float(grad);
  T result;
  store_float(kProject ? pgd_element(vx, vg, A(load_float(origin)), step, radius, lower, upper)
                       : fgsm_element(vx, vg, step, lower, upper),
              &result);
  return result;
}

// All tensors are contiguous, and the elements of a word share one value of each parameter.
template <class T, bool kProject>
__global__ void __launch_bounds__(kThreads)
    fgsm_words(const T* x, const T* grad, const T* origin, T* output, int64_t numel,
               const Parameters<typename Accumulate<T>::type> parameters) {
  constexpr int kSize = Word<T>::kSize;
  const int64_t words = numel / kSize, thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t word = thread; word < words; word += int64_t(gridDim.x) * kThreads) {
    const int64_t i = word * kSize;
    Word<T> vx = load_word(x + i), vo{};
    const Word<T> vg = load_word(grad + i);
    if (kProject) vo = load_word(origin + i);
    const auto step = parameters.step(i), lower = parameters.lower(i), upper = parameters.upper(i);
    const auto radius = kProject ? parameters.radius(i) : step;
#pragma unroll
    for (int j = 0; j < kSize; ++j)
      vx.value[j] = element<T, kProject>(vx.value[j], vg.value[j], vo.value[j], step, radius, lower, upper);
    store_word(output + i, vx);
  }
  const int64_t i = words * kSize + thread;  // fewer than a word are left
  if (thread < kSize && i < numel)
    output[i] = element<T, kProject>(x[i], grad[i], kProject ? origin[i] : T{}, parameters.step(i),
                                     parameters.radius(i), parameters.lower(i), parameters.upper(i));
}

struct FgsmOffsets {
  Offsets x, grad, origin, output;
};

// Any strides, and any shapes of the parameters.
template <class T, bool kProject>
__global__ void __launch_bounds__(kThreads)
    fgsm_elements(const T* x, const T* grad, const T* origin, T* output, int64_t numel,
                  const Parameters<typename Accumulate<T>::type> parameters, const FgsmOffsets at) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < numel;
       i += int64_t(gridDim.x) * kThreads)
    output[at.output[i]] = element<T, kProject>(
        x[at.x[i]], grad[at.grad[i]], kProject ? origin[at.origin[i]] : T{}, parameters.step(i),
        parameters.radius(i), parameters.lower(i), parameters.upper(i));
}

template <class T, bool kProject>
int step(const FgsmArgs& a, void* stream) {
  using A = typename Accumulate<T>::type;
  constexpr int kSize = Word<T>::kSize;
  const auto *x = static_cast<const T*>(a.x), *grad = static_cast<const T*>(a.grad),
             *origin = static_cast<const T*>(a.origin);
  auto* output = static_cast<T*>(a.output);
  const Parameters<A> parameters{Parameter<A>(a.step), Parameter<A>(a.radius), Parameter<A>(a.lower),
                                 Parameter<A>(a.upper)};
  bool words = a.x_layout.contiguous && a.grad_layout.contiguous && a.output_layout.contiguous &&
               (!kProject || a.origin_layout.contiguous) && word_aligned(x, grad, origin, output);
  // A word may not straddle two values: whole words share one, or all elements do.
  for (const FgsmParameter* parameter : {&a.step, &a.radius, &a.lower, &a.upper})
    words =
        words && (!parameter->values || parameter->inner % kSize == 0 || parameter->inner > a.x_layout.numel);
  const int64_t numel = a.x_layout.numel;
  if (words)
    return launch(fgsm_words<T, kProject>, blocks_for(numel, kThreads * kSize), kThreads, 0, stream, x, grad,
                  origin, output, numel, parameters);
  const FgsmOffsets at{Offsets(a.x_layout), Offsets(a.grad_layout),
                       kProject ? Offsets(a.origin_layout) : Offsets(), Offsets(a.output_layout)};
  return launch(fgsm_elements<T, kProject>, blocks_for(numel, kThreads), kThreads, 0, stream, x, grad, origin,
                output, numel, parameters, at);
}

}  // namespace fgsm_kernels

int fgsm_step_cuda(const FgsmArgs& a, void* stream) {
  return with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return a.origin ? step<T, true>(a, stream) : step<T, false>(a, stream);
  });
}

}  // namespace fastreg
