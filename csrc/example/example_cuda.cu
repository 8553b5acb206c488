// The example on CUDA. The formula is in example_math.h.
// Bytes per float32 element: x is read and y is written, 8, which is the floor.
//
// Here belong the kernels and the function that launches them, over raw pointers and a stream, without torch:
// tests/test_cuda_example.py executes both without a GPU. A launch allocates nothing and waits for nothing,
// so that it can be captured in a CUDA graph.
#include <type_traits>

#include "../common/cuda.h"
#include "example_math.h"

namespace fastreg {
inline namespace example_kernels {

// Contiguous tensors on 16-byte addresses: each lane takes a word of 16 bytes, neighbouring lanes
// neighbouring words. The elements after the last whole word are the first threads', one each.
template <class T, class A>
__global__ void __launch_bounds__(kThreads)
    example_words(const T* input, T* output, int64_t numel, A factor) {
  constexpr int kSize = Word<T>::kSize;
  const int64_t words = numel / kSize, thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t word = thread; word < words; word += int64_t(gridDim.x) * kThreads) {
    Word<T> x = load_word(input + word * kSize);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const T value = x.value[i];
      store_float(example_element(A(load_float(value)), factor), &x.value[i]);
    }
    store_word(output + word * kSize, x);
  }
  const int64_t i = words * kSize + thread;
  if (thread < kSize && i < numel) store_float(example_element(A(load_float(input[i])), factor), &output[i]);
}

// Any other tensors: an element per thread, at the place that its layout says.
template <class T, class A>
__global__ void __launch_bounds__(kThreads)
    example_elements(const T* input, T* output, int64_t numel, A factor, const Offsets input_at,
                     const Offsets output_at) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < numel;
       i += int64_t(gridDim.x) * kThreads)
    store_float(example_element(A(load_float(input[input_at[i]])), factor), &output[output_at[i]]);
}

template <class T>
int scale(const ExampleArgs& a, void* stream) {
  using A = typename Accumulate<T>::type;
  constexpr int kSize = Word<T>::kSize;
  const auto* input = static_cast<const T*>(a.input);
  auto* output = static_cast<T*>(a.output);
  const int64_t numel = a.input_layout.numel;
  if (a.input_layout.contiguous && a.output_layout.contiguous && word_aligned(input, output))
    return launch(example_words<T, A>, blocks_for(numel, kThreads * kSize), kThreads, 0, stream, input,
                  output, numel, A(a.factor));
  return launch(example_elements<T, A>, blocks_for(numel, kThreads), kThreads, 0, stream, input, output,
                numel, A(a.factor), Offsets(a.input_layout), Offsets(a.output_layout));
}

}  // namespace example_kernels

int example_cuda(const ExampleArgs& a, void* stream) {
  return with_dtype(a.dtype,
                    [&](auto* type) { return scale<std::remove_pointer_t<decltype(type)>>(a, stream); });
}

}  // namespace fastreg
