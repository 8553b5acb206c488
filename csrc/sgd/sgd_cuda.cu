// The SGD step on CUDA, formula in sgd_math.h.
// Bytes per float32 element: reads w, g, v, writes w, v: 20, the floor; 12 without momentum.
//
// One launch steps as many tensors as fit in a kernel's parameters. A block takes chunks of 2048 elements,
// which are numbered through all tensors. Learning rate, loss scale and overflow are read from the GPU's
// memory, so that no step waits for the host.
#include <type_traits>

#include "../common/cuda.h"
#include "sgd_math.h"

namespace fastreg {
inline namespace sgd_kernels {

constexpr int kChunk = 2048;  // elements of a block
// 80 * 44 bytes and the numbers are below the 4096 bytes of parameters that every driver takes.
constexpr int kTensors = 80;

struct SgdPointers {
  void* param;
  const void* grad;
  void* momentum;
  const float* started;
  int64_t numel;
};

// What a launch needs to know beside its tensors.
template <class A>
struct SgdWork {
  SgdConstants<A> constants;
  SgdMomentum momentum;
  SgdPenalty penalty;
  SgdArgs args;

  explicit SgdWork(const SgdArgs& a)
      : constants(a),
        momentum(a.momentum == 0 ? SgdMomentum::kNone
                 : a.nesterov    ? SgdMomentum::kNesterov
                                 : SgdMomentum::kHeavyBall),
        penalty(sgd_penalty(a)),
        args(a) {}

  __device__ __forceinline__ bool skipped() const { return args.found_inf_at && *args.found_inf_at != 0; }

  __device__ __forceinline__ SgdNumbers<A> numbers(bool first_step) const {
    SgdConstants<A> c = constants;
    if (const void* lr = args.lr_at)
      c.lr = args.lr_wide ? A(*static_cast<const double*>(lr)) : A(*static_cast<const float*>(lr));
    if (args.grad_scale_at) c.grad_factor = A(args.maximize ? -1 : 1) / A(*args.grad_scale_at);
    return sgd_numbers<A>(c, first_step);
  }
};

template <class A>
struct SgdBatch {
  SgdWork<A> work;
  int count;
  uint32_t first_index;  // of tensor 0 in the whole step
  uint32_t first_chunk[kTensors + 1];
  SgdPointers tensor[kTensors];
};
static_assert(sizeof(SgdBatch<double>) <= 4096, "kernel parameters");

// Rounded to nearest, or up or down at random by 16 bits as on the CPU; a NaN or infinity passes unchanged.
template <class T, class A>
__device__ __forceinline__ T round_param(A w, bool stochastic, uint32_t random) {
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

template <class T, bool kMomentum, class A>
__device__ __forceinline__ void step_element(const SgdWork<A>& work, const SgdNumbers<A>& n, T& param, T grad,
                                             T& momentum, bool stochastic, uint32_t random) {
  A w = load_float(param), v = kMomentum ? A(load_float(momentum)) : A(0);
  sgd_element(kMomentum ? work.momentum : SgdMomentum::kNone, work.penalty, w, A(load_float(grad)), v, n);
  param = round_param<T>(w, stochastic, random);
  if (kMomentum) store_float(v, &momentum);
}

__device__ __forceinline__ PhiloxWords draw_rounding(uint64_t seed, int64_t i, uint32_t tensor_index) {
  return philox_group(seed, uint64_t(i) / 8, tensor_index, Purpose::kStochasticRounding);
}

template <class T, bool kMomentum>
__global__ void __launch_bounds__(kThreads) sgd_tensors(const SgdBatch<typename Accumulate<T>::type> batch) {
  using A = typename Accumulate<T>::type;
  constexpr int kSize = Word<T>::kSize;
  const SgdWork<A>& work = batch.work;
  if (work.skipped()) return;
  const bool stochastic = std::is_same_v<T, BFloat16> && work.args.stochastic_rounding;
  const uint64_t seed = stochastic ? work.args.seed.get() : 0;
  const uint32_t chunks = batch.first_chunk[batch.count];
  for (uint32_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    int low = 0,
        high = batch.count;  // the tensor of this chunk: first_chunk[low] <= chunk < first_chunk[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (batch.first_chunk[middle] <= chunk)
        low = middle;
      else
        high = middle;
    }
    const SgdPointers& t = batch.tensor[low];
    const int64_t base = int64_t(chunk - batch.first_chunk[low]) * kChunk;
    T* const param = static_cast<T*>(t.param);
    const T* const grad = static_cast<const T*>(t.grad);
    T* const momentum = static_cast<T*>(t.momentum);
    const uint32_t index = batch.first_index + uint32_t(low);
    const SgdNumbers<A> n = work.numbers(t.started && *t.started == 0);
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(param) | reinterpret_cast<uintptr_t>(grad) |
                                (kMomentum ? reinterpret_cast<uintptr_t>(momentum) : 0);
    if (base + kChunk <= t.numel && addresses % 16 == 0) {
#pragma unroll 2
      for (int j = 0; j < kChunk / (kThreads * kSize); ++j) {
        const int64_t i = base + (j * kThreads + int(threadIdx.x)) * kSize;
        Word<T> w = load_word(param + i), v{};
        const Word<T> g = load_word(grad + i);
        if (kMomentum) v = load_word(momentum + i);
        PhiloxWords random{};
        if (stochastic) random = draw_rounding(seed, i, index);
#pragma unroll
        for (int k = 0; k < kSize; ++k)
          step_element<T, kMomentum>(work, n, w.value[k], g.value[k], v.value[k], stochastic,
                                     stochastic ? philox_half(random, k % 8) : 0u);
        store_word(param + i, w);
        if (kMomentum) store_word(momentum + i, v);
      }
    } else {
      for (int64_t i = base + threadIdx.x; i < base + kChunk && i < t.numel; i += kThreads) {
        T w = param[i], v{};
        if (kMomentum) v = momentum[i];
        uint32_t random = 0;
        if (stochastic) random = philox_half(draw_rounding(seed, i, index), int(i % 8));
        step_element<T, kMomentum>(work, n, w, grad[i], v, stochastic, random);
        param[i] = w;
        if (kMomentum) momentum[i] = v;
      }
    }
  }
}

// One tensor that cannot be walked as flat memory.
template <class T, bool kMomentum>
__global__ void __launch_bounds__(kThreads)
    sgd_strided(const SgdWork<typename Accumulate<T>::type> work, const SgdPointers t, const uint32_t index,
                const Offsets param_at, const Offsets grad_at, const Offsets momentum_at) {
  using A = typename Accumulate<T>::type;
  if (work.skipped()) return;
  const bool stochastic = std::is_same_v<T, BFloat16> && work.args.stochastic_rounding;
  const uint64_t seed = stochastic ? work.args.seed.get() : 0;
  const SgdNumbers<A> n = work.numbers(t.started && *t.started == 0);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < t.numel;
       i += int64_t(gridDim.x) * kThreads) {
    T* const param = static_cast<T*>(t.param) + param_at[i];
    T* const momentum = kMomentum ? static_cast<T*>(t.momentum) + momentum_at[i] : param;
    T w = *param, v{};
    if (kMomentum) v = *momentum;
    uint32_t random = 0;
    if (stochastic) random = philox_half(draw_rounding(seed, i, index), int(i % 8));
    step_element<T, kMomentum>(work, n, w, static_cast<const T*>(t.grad)[grad_at[i]], v, stochastic, random);
    *param = w;
    if (kMomentum) *momentum = v;
  }
}

// After all tensors of a step: their next one is not the first.
struct SgdFlags {
  int count;
  const float* found_inf_at;
  float* started[kTensors];
};
__global__ void sgd_started(const SgdFlags flags) {
  if (flags.found_inf_at && *flags.found_inf_at != 0) return;
  if (int(threadIdx.x) < flags.count && flags.started[threadIdx.x]) *flags.started[threadIdx.x] = 1;
}

SgdPointers pointers_of(const SgdTensor& t) {
  return {t.param, t.grad, t.momentum, t.started, t.param_layout.numel};
}

// The tensors of one dtype from `begin` on that are flat memory, in launches of at most kTensors neighbours;
// the others alone.
template <class T, bool kMomentum>
int launch_steps(const SgdArgs& a, const SgdTensor* tensors, size_t begin, size_t end, void* stream) {
  using A = typename Accumulate<T>::type;
  const SgdWork<A> work(a);
  for (size_t i = begin; i < end;) {
    const SgdTensor& t = tensors[i];
    int error = cudaSuccess;
    if (!t.param_layout.contiguous || !t.grad_layout.contiguous ||
        (kMomentum && !t.momentum_layout.contiguous)) {
      error = launch(sgd_strided<T, kMomentum>, blocks_for(t.param_layout.numel, kThreads), kThreads, 0,
                     stream, work, pointers_of(t), uint32_t(i), Offsets(t.param_layout),
                     Offsets(t.grad_layout), kMomentum ? Offsets(t.momentum_layout) : Offsets());
      ++i;
    } else {
      SgdBatch<A> batch{work, 0, uint32_t(i), {}, {}};
      for (; i < end && batch.count < kTensors; ++i) {
        const SgdTensor& next = tensors[i];
        if (!next.param_layout.contiguous || !next.grad_layout.contiguous ||
            (kMomentum && !next.momentum_layout.contiguous))
          break;
        const int64_t chunks = (next.param_layout.numel + kChunk - 1) / kChunk;
        if (batch.count && chunks > int64_t(UINT32_MAX) - batch.first_chunk[batch.count]) break;
        batch.tensor[batch.count] = pointers_of(next);
        batch.first_chunk[batch.count + 1] = batch.first_chunk[batch.count] + uint32_t(chunks);
        ++batch.count;
      }
      error = launch(sgd_tensors<T, kMomentum>, blocks_for(batch.first_chunk[batch.count], 1), kThreads, 0,
                     stream, batch);
    }
    if (error) return error;
  }
  return cudaSuccess;
}

}  // namespace sgd_kernels

int sgd_step_cuda(const SgdArgs& a, const SgdTensor* tensors, size_t count, void* stream) {
  for (size_t begin = 0, end = 0; begin < count; begin = end) {
    while (end < count && tensors[end].dtype == tensors[begin].dtype) ++end;
    const int error = with_dtype(tensors[begin].dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      return a.momentum == 0 ? launch_steps<T, false>(a, tensors, begin, end, stream)
                             : launch_steps<T, true>(a, tensors, begin, end, stream);
    });
    if (error) return error;
  }
  for (size_t begin = 0; begin < count; begin += kTensors) {
    SgdFlags flags{0, a.found_inf_at, {}};
    bool any = false;
    for (; flags.count < kTensors && begin + size_t(flags.count) < count; ++flags.count) {
      flags.started[flags.count] = tensors[begin + size_t(flags.count)].started;
      any = any || flags.started[flags.count];
    }
    if (!any) continue;
    const int error = launch(sgd_started, 1, unsigned(kTensors + 31) / 32 * 32, 0, stream, flags);
    if (error) return error;
  }
  return cudaSuccess;
}

}  // namespace fastreg
