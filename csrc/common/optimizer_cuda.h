// What the steps of the optimisers share on CUDA: one launch over many tensors, and the loops over words. An
// op gives its Work<A>, a struct whose element() is the update, in <op>_cuda.cu:
//
//   const StepArgs& step() const;
//   Numbers numbers(const StepPointers&) const;                  the numbers of a tensor
//   void element(A* value, const Numbers&) const;                slots of one element, computed in place
//
// One launch steps as many tensors as fit in a kernel's parameters. A block takes chunks of 2048 elements,
// which are numbered through all tensors. Whatever may change between steps (learning rate, loss scale,
// overflow, clipping factor, counts) is read from the GPU's memory, so that no step waits for the host.
#pragma once
#include "cuda.h"
#include "optimizer_math.h"

namespace fastreg {

constexpr int kChunk = 2048;  // elements of a block
// From CUDA 13 on every driver takes 32764 bytes of parameters, before that 4096 are sure.
#if defined(CUDART_VERSION) && CUDART_VERSION < 13000
constexpr int kTensors = 40, kMostParameters = 4096;
#else
constexpr int kTensors = 80, kMostParameters = 32764;
#endif

struct StepPointers {
  void* data[kSlots];
  const float *counter, *n_averaged;
  int64_t numel, first;  // where it begins in the whole
  float step;
  uint32_t draw;

  StepPointers() = default;
  explicit StepPointers(const StepTensor& t)
      : counter(t.counter),
        n_averaged(t.n_averaged),
        numel(t.layout[kParam].numel),
        first(t.first),
        step(t.step),
        draw(t.draw) {
    for (int s = 0; s < kSlots; ++s) data[s] = t.data[s];
  }
};

template <class Work>
struct StepBatch {
  Work work;
  int count;
  uint32_t first_chunk[kTensors + 1];
  StepPointers tensor[kTensors];
};

// The tensor of a chunk: first_chunk[tensor] <= chunk < first_chunk[tensor + 1].
__device__ __forceinline__ int tensor_of(const uint32_t* first_chunk, int count, uint32_t chunk) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_chunk[middle] <= chunk)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Rounded to nearest, or up or down at random by 16 bits as on the CPU; a NaN or infinity passes unchanged.
template <class T, class A>
__device__ __forceinline__ T round_at_random(A w, bool stochastic, uint32_t random) {
  T result;
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = float_bits(w);
    if (stochastic && (bits & 0x7f800000u) != 0x7f800000u) {
      result.bits = uint16_t((bits + random) >> 16);
      return result;
    }
  }
  store_float(w, &result);
  return result;
}

// The random bits that a tensor is rounded by in a step. draw(i) are those of the 8 elements that share a
// group with element i of the whole.
template <class T>
struct Rounding {
  bool stochastic;
  uint64_t seed;
  uint32_t number;

  __device__ __forceinline__ Rounding(const StepArgs& a, const StepPointers& t)
      : stochastic(std::is_same_v<T, BFloat16> && a.stochastic_rounding),
        seed(stochastic ? seed_of_step(a.seed, steps_done(t.counter, t.step)) : 0),
        number(t.draw) {}
  __device__ __forceinline__ PhiloxWords draw(int64_t i) const {
    if (!stochastic) return PhiloxWords{};
    return philox_group(seed, uint64_t(i) / 8, number, Purpose::kStochasticRounding);
  }
};

// A form of a step is the set of slots that its tensors have, as bits: kHas below.
__host__ __device__ constexpr bool has_slot(unsigned slots, int s) { return (slots >> s & 1u) != 0; }

// Steps one element: `stored` has its value in each slot before and after.
template <class T, unsigned kHas, class Work>
__device__ __forceinline__ void step_element(const Work& work, const typename Work::Numbers& n, T* stored,
                                             bool stochastic, uint32_t random) {
  typename Accumulate<T>::type value[kSlots];
#pragma unroll
  for (int s = 0; s < kSlots; ++s)
    value[s] = has_slot(kHas, s) ? load_float(stored[s]) : typename Accumulate<T>::type(0);
  work.element(value, n);
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    if (!has_slot(kHas, s) || s == kGrad) continue;
    if (s == kParam || s == kAverage)
      stored[s] = round_at_random<T>(value[s], stochastic, random);
    else
      store_float(value[s], &stored[s]);
  }
}

// Steps the elements of a word, from element i of the tensor on.
template <class T, unsigned kHas, class Work>
__device__ __forceinline__ void step_word(const Work& work, const typename Work::Numbers& n,
                                          const StepPointers& t, int64_t i, const Rounding<T>& rounding) {
  constexpr int kSize = Word<T>::kSize;
  Word<T> word[kSlots];
#pragma unroll
  for (int s = 0; s < kSlots; ++s)
    if (has_slot(kHas, s)) word[s] = load_word(static_cast<const T*>(t.data[s]) + i);
  const PhiloxWords random = rounding.draw(t.first + i);
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    T stored[kSlots];
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
      if (has_slot(kHas, s)) stored[s] = word[s].value[k];
    step_element<T, kHas>(work, n, stored, rounding.stochastic,
                          rounding.stochastic ? philox_half(random, k % 8) : 0u);
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
      if (has_slot(kHas, s)) word[s].value[k] = stored[s];
  }
#pragma unroll
  for (int s = 0; s < kSlots; ++s)
    if (has_slot(kHas, s) && s != kGrad) store_word(static_cast<T*>(t.data[s]) + i, word[s]);
}

// Steps the element with that index in the whole, whose value of slot s lies at memory offset at(s).
template <class T, unsigned kHas, class Work, class At>
__device__ __forceinline__ void step_one(const Work& work, const typename Work::Numbers& n,
                                         const StepPointers& t, int64_t index, const Rounding<T>& rounding,
                                         const At& at) {
  T stored[kSlots];
  int64_t offset[kSlots];
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    if (!has_slot(kHas, s)) continue;
    offset[s] = at(s);
    stored[s] = static_cast<const T*>(t.data[s])[offset[s]];
  }
  uint32_t random = 0;
  if (rounding.stochastic) random = philox_half(rounding.draw(index), int(index % 8));
  step_element<T, kHas>(work, n, stored, rounding.stochastic, random);
#pragma unroll
  for (int s = 0; s < kSlots; ++s)
    if (has_slot(kHas, s) && s != kGrad) static_cast<T*>(t.data[s])[offset[s]] = stored[s];
}

template <class T, unsigned kHas, class Work>
__global__ void __launch_bounds__(kThreads) step_tensors(const StepBatch<Work> batch) {
  using Numbers = typename Work::Numbers;
  // Words of 8 elements in all slots do not fit into the registers.
  constexpr bool kWords = sizeof(T) > 2 || kHas != (1u << kSlots) - 1;
  const StepArgs& a = batch.work.step();
  if (a.found_inf_at && *a.found_inf_at != 0) return;
  __shared__ Numbers shared;
  const uint32_t chunks = batch.first_chunk[batch.count];
  for (uint32_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int index = tensor_of(batch.first_chunk, batch.count, chunk);
    const StepPointers& t = batch.tensor[index];
    // One thread makes the numbers, which are powers in float64, for all; the first barrier keeps it from
    // overwriting those of the chunk before while another thread still reads them.
    __syncthreads();
    if (threadIdx.x == 0) shared = batch.work.numbers(t);
    __syncthreads();
    const Numbers n = shared;
    const Rounding<T> rounding(a, t);
    const int64_t base = int64_t(chunk - batch.first_chunk[index]) * kChunk;
    uintptr_t addresses = 0;
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
      if (has_slot(kHas, s)) addresses |= reinterpret_cast<uintptr_t>(t.data[s]);
    const bool in_groups = !rounding.stochastic || t.first % 8 == 0;  // a word's bits come from one group
    if (kWords && base + kChunk <= t.numel && addresses % 16 == 0 && in_groups) {
#pragma unroll 2
      for (int j = 0; j < kChunk / (kThreads * Word<T>::kSize); ++j)
        step_word<T, kHas>(batch.work, n, t, base + (j * kThreads + int(threadIdx.x)) * Word<T>::kSize,
                           rounding);
    } else {
      for (int64_t i = base + threadIdx.x; i < base + kChunk && i < t.numel; i += kThreads)
        step_one<T, kHas>(batch.work, n, t, t.first + i, rounding, [i](int) { return i; });
    }
  }
}

// A step of one tensor that cannot be walked as flat memory, or is rounded as a shard of several rows.
template <class Work>
struct StridedStep {
  Work work;
  StepPointers tensor;
  Divider columns;
  int64_t row;
  Offsets at[kSlots];
};
template <class T, unsigned kHas, class Work>
__global__ void __launch_bounds__(kThreads) step_strided(const StridedStep<Work> step) {
  using Numbers = typename Work::Numbers;
  const StepArgs& a = step.work.step();
  if (a.found_inf_at && *a.found_inf_at != 0) return;
  __shared__ Numbers shared;
  if (threadIdx.x == 0) shared = step.work.numbers(step.tensor);
  __syncthreads();
  const Numbers n = shared;
  const Rounding<T> rounding(a, step.tensor);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < step.tensor.numel;
       i += int64_t(gridDim.x) * kThreads) {
    int64_t index = step.tensor.first + i;
    if (rounding.stochastic) {
      const int64_t row = step.columns.divide(i);
      index += row * (step.row - int64_t(step.columns.divisor));
    }
    step_one<T, kHas>(step.work, n, step.tensor, index, rounding, [&](int s) { return step.at[s][i]; });
  }
}

// What is counted after a step of all tensors: their steps, and the updates of their averages.
template <class Work>
struct StepCounts {
  bool counts_steps;  // else the counter only says that there was a step
  const float* found_inf_at;
  float *counter[kTensors], *n_averaged[kTensors];
};
template <class Work>
__global__ void count_steps(const StepCounts<Work> counts) {
  if (counts.found_inf_at && *counts.found_inf_at != 0) return;
  const int i = int(threadIdx.x);
  if (i >= kTensors) return;
  if (float* counter = counts.counter[i]) *counter = counts.counts_steps ? *counter + 1 : 1;
  if (float* n_averaged = counts.n_averaged[i]) *n_averaged += 1;
}

// Whether a tensor is flat memory, and its elements are neighbours in the whole.
inline bool is_flat(const StepTensor& t) {
  if (t.columns < t.layout[kParam].numel) return false;
  for (int s = 0; s < kSlots; ++s)
    if (t.data[s] && !t.layout[s].contiguous) return false;
  return true;
}

// Whether the tensors of a step have a slot. All are asked, because a tensor without elements may have a null
// pointer.
inline bool any_has(const StepTensor* tensors, size_t count, int slot) {
  for (size_t i = 0; i < count; ++i)
    if (tensors[i].data[slot]) return true;
  return false;
}

// Steps tensors [begin, end), of one dtype and one form: those that are flat memory in launches of at most
// kTensors neighbours, the others one by one.
template <class T, unsigned kHas, class Work>
int launch_steps(const Work& work, const StepTensor* tensors, size_t begin, size_t end, void* stream) {
  static_assert(sizeof(StepBatch<Work>) <= kMostParameters && sizeof(StridedStep<Work>) <= 4096,
                "kernel parameters");
  for (size_t i = begin; i < end;) {
    int error = cudaSuccess;
    if (!is_flat(tensors[i])) {
      StridedStep<Work> step{work, StepPointers(tensors[i]), Divider(tensors[i].columns), tensors[i].row, {}};
      for (int s = 0; s < kSlots; ++s)
        if (tensors[i].data[s]) step.at[s] = Offsets(tensors[i].layout[s]);
      error = launch(step_strided<T, kHas, Work>, blocks_for(step.tensor.numel, kThreads), kThreads, 0,
                     stream, step);
      ++i;
    } else {
      StepBatch<Work> batch{work, 0, {}, {}};
      for (; i < end && batch.count < kTensors && is_flat(tensors[i]); ++i) {
        const int64_t chunks = (tensors[i].layout[kParam].numel + kChunk - 1) / kChunk;
        if (batch.count && chunks > int64_t(UINT32_MAX) - batch.first_chunk[batch.count]) break;
        batch.tensor[batch.count] = StepPointers(tensors[i]);
        batch.first_chunk[batch.count + 1] = batch.first_chunk[batch.count] + uint32_t(chunks);
        ++batch.count;
      }
      error = launch(step_tensors<T, kHas, Work>, blocks_for(batch.first_chunk[batch.count], 1), kThreads, 0,
                     stream, batch);
    }
    if (error) return error;
  }
  return cudaSuccess;
}

template <class Work>
int launch_counts(const StepArgs& a, bool counts_steps, const StepTensor* tensors, size_t count,
                  void* stream) {
  for (size_t begin = 0; begin < count; begin += kTensors) {
    StepCounts<Work> counts{counts_steps, a.found_inf_at, {}, {}};
    bool any = false;
    for (size_t i = begin; i < count && i < begin + kTensors; ++i) {
      counts.counter[i - begin] = tensors[i].counter;
      counts.n_averaged[i - begin] = tensors[i].n_averaged;
      any = any || tensors[i].counter || tensors[i].n_averaged;
    }
    if (!any) continue;
    const int error = launch(count_steps<Work>, 1, unsigned(kTensors + 31) / 32 * 32, 0, stream, counts);
    if (error) return error;
  }
  return cudaSuccess;
}

// A step of all tensors; forms(T*, begin, end) launches those of one dtype.
template <class Work, class Forms>
int launch_step(const StepArgs& a, bool counts_steps, const StepTensor* tensors, size_t count, void* stream,
                Forms forms) {
  for (size_t begin = 0, end = 0; begin < count; begin = end) {
    while (end < count && tensors[end].dtype == tensors[begin].dtype) ++end;
    const int error = with_dtype(tensors[begin].dtype, [&](auto* type) { return forms(type, begin, end); });
    if (error) return error;
  }
  return launch_counts<Work>(a, counts_steps, tensors, count, stream);
}

}  // namespace fastreg
