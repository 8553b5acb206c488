// Sums of squares on CUDA. Bytes per float32 element: 4, the floor.
//
// A launch covers as many tensors as fit in a kernel's parameters. Its blocks, whose number depends on the
// sizes alone, write a partial sum each; a last block adds those of all launches in their order: no atomics,
// the same bits every time.
#include <type_traits>

#include "../common/cuda.h"
#include "sum_of_squares_math.h"

namespace fastreg {
inline namespace sum_of_squares_kernels {

constexpr int kChunk = 4096;   // elements
constexpr int kTensors = 120;  // of a launch: below the 4096 bytes of parameters that every driver takes
constexpr int kBlocks = 1024;  // partial sums of a launch

struct SquaresBatch {
  int count;
  double* partials;
  uint32_t first_chunk[kTensors + 1];
  const void* data[kTensors];
  int64_t numel[kTensors];
};

// The sum over a block's threads, for thread 0.
__device__ __forceinline__ double sum_threads(double sum) {
  __shared__ double sums[kWarps];
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    sum += __shfl_down_sync(kAllLanes, sum, unsigned(distance));
  if (threadIdx.x % kLanes == 0) sums[threadIdx.x / kLanes] = sum;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0)
    for (int i = 0; i < kWarps; ++i) total += sums[i];
  return total;
}

template <class T, class A>
__device__ __forceinline__ A sum_word(const T* x) {
  const Word<T> word = load_word(x);
  A sum = 0;
#pragma unroll
  for (int k = 0; k < Word<T>::kSize; ++k) {
    const A value = load_float(word.value[k]);
    sum += value * value;
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_of_squares_tensors(const SquaresBatch batch) {
  using A = typename Accumulate<T>::type;
  double total = 0;
  const uint32_t chunks = batch.first_chunk[batch.count];
  int tensor = 0;
  for (uint32_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    while (batch.first_chunk[tensor + 1] <= chunk) ++tensor;
    const T* const x = static_cast<const T*>(batch.data[tensor]);
    const int64_t base = int64_t(chunk - batch.first_chunk[tensor]) * kChunk, numel = batch.numel[tensor];
    A sum = 0;
    if (base + kChunk <= numel && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
#pragma unroll 2
      for (int j = 0; j < kChunk / (kThreads * Word<T>::kSize); ++j)
        sum += sum_word<T, A>(x + base + (j * kThreads + int(threadIdx.x)) * Word<T>::kSize);
    } else {
      for (int64_t i = base + threadIdx.x; i < base + kChunk && i < numel; i += kThreads) {
        const A value = load_float(x[i]);
        sum += value * value;
      }
    }
    total += double(sum);
  }
  total = sum_threads(total);
  if (threadIdx.x == 0) batch.partials[blockIdx.x] = total;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_of_squares_strided(const void* data, int64_t numel, const Offsets at, double* partials) {
  using A = typename Accumulate<T>::type;
  A sum = 0;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < numel;
       i += int64_t(gridDim.x) * kThreads) {
    const A value = load_float(static_cast<const T*>(data)[at[i]]);
    sum += value * value;
  }
  const double total = sum_threads(double(sum));
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads)
    sum_of_squares_total(const double* partials, int64_t count, void* result, bool wide) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partials[i];
  sum = sum_threads(sum);
  if (threadIdx.x != 0) return;
  if (wide)
    *static_cast<double*>(result) = sum;
  else
    *static_cast<float*>(result) = float(sum);
}

unsigned blocks_of(int64_t work, int64_t per_block) {
  const unsigned blocks = blocks_for(work, per_block);
  return blocks < unsigned(kBlocks) ? blocks : unsigned(kBlocks);
}

// Calls launches(first, end, blocks, partials before it) for each launch: tensors that stand together, of one
// dtype and flat memory, or one that is strided.
template <class Launches>
int for_each_launch(const SquaresTensor* tensors, size_t count, Launches launches) {
  size_t partials = 0;
  for (size_t first = 0, end = 0; first < count; first = end) {
    int64_t chunks = 0;
    for (; end < count && end - first < size_t(kTensors); ++end) {
      const SquaresTensor& t = tensors[end];
      const int64_t more = (t.layout.numel + kChunk - 1) / kChunk;
      if (end > first && (t.dtype != tensors[first].dtype || !t.layout.contiguous ||
                          !tensors[first].layout.contiguous || chunks + more > int64_t(UINT32_MAX)))
        break;
      chunks += more;
    }
    const unsigned blocks = blocks_of(chunks, 1);
    if (const int error = launches(first, end, blocks, partials)) return error;
    partials += blocks;
  }
  return cudaSuccess;
}

template <class T>
int launch_squares(const SquaresTensor* tensors, size_t first, size_t end, unsigned blocks, double* partials,
                   void* stream) {
  const SquaresTensor& t = tensors[first];
  if (!t.layout.contiguous)
    return launch(sum_of_squares_strided<T>, blocks, kThreads, 0, stream, t.data, t.layout.numel,
                  Offsets(t.layout), partials);
  SquaresBatch batch{int(end - first), partials, {}, {}, {}};
  for (size_t i = first; i < end; ++i) {
    batch.data[i - first] = tensors[i].data;
    batch.numel[i - first] = tensors[i].layout.numel;
    batch.first_chunk[i - first + 1] =
        batch.first_chunk[i - first] + uint32_t((tensors[i].layout.numel + kChunk - 1) / kChunk);
  }
  return launch(sum_of_squares_tensors<T>, blocks, kThreads, 0, stream, batch);
}
static_assert(sizeof(SquaresBatch) <= 4096, "kernel parameters");

}  // namespace sum_of_squares_kernels

size_t sum_of_squares_partials(const SquaresTensor* tensors, size_t count) {
  size_t all = 0;
  for_each_launch(tensors, count, [&](size_t, size_t, unsigned blocks, size_t before) {
    all = before + blocks;
    return 0;
  });
  return all;
}

int sum_of_squares_cuda(const SquaresTensor* tensors, size_t count, double* partials, void* result,
                        DType result_dtype, void* stream) {
  size_t all = 0;
  const int error =
      for_each_launch(tensors, count, [&](size_t first, size_t end, unsigned blocks, size_t before) {
        all = before + blocks;
        return with_dtype(tensors[first].dtype, [&](auto* type) {
          using T = std::remove_pointer_t<decltype(type)>;
          return launch_squares<T>(tensors, first, end, blocks, partials + before, stream);
        });
      });
  if (error) return error;
  return launch(sum_of_squares_total, 1, kThreads, 0, stream, static_cast<const double*>(partials),
                int64_t(all), result, result_dtype == DType::kFloat64);
}

}  // namespace fastreg
