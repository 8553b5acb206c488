// The SGD step on CUDA, formula in sgd_math.h; the launches stand in ../common/optimizer_cuda.h.
// Bytes per float32 element: reads w, g, v, writes w, v: 20, the floor; 12 without momentum, 8 more with the
// moving average.
//
// The mode of csrc/common/flush_mode.h, so that the bits are those of the CPU:
// nvcc flags: -ftz=true -DFASTREG_FTZ
#include "../common/optimizer_cuda.h"
#include "sgd_math.h"

namespace fastreg {
inline namespace sgd_kernels {

template <class A>
struct SgdWork {
  using Numbers = SgdNumbers<A>;
  SgdArgs args;
  SgdMomentum momentum;
  SgdPenalty penalty;

  explicit SgdWork(const SgdArgs& a) : args(a), momentum(sgd_momentum(a)), penalty(sgd_penalty(a)) {}
  __device__ __forceinline__ const StepArgs& step() const { return args.step; }
  __device__ __forceinline__ Numbers numbers(const StepPointers& t) const {
    return sgd_numbers<A, A>(args, t.counter, t.n_averaged);
  }
  __device__ __forceinline__ void element(A* value, const Numbers& n) const {
    sgd_element(momentum, penalty, value[kParam], value[kGrad], value[kMomentum], n);
    value[kAverage] = n.average(value[kAverage], value[kParam]);
  }
};

}  // namespace sgd_kernels

int sgd_step_cuda(const SgdArgs& a, const StepTensor* tensors, size_t count, void* stream) {
  constexpr unsigned kPlain = 1u << kParam | 1u << kGrad, kBuffer = 1u << kMomentum, kEma = 1u << kAverage;
  const bool average = any_has(tensors, count, kAverage);
  return launch_step<SgdWork<float>>(
      a.step, sgd_counts(a), tensors, count, stream, [&](auto* type, auto begin, auto end) {
        using T = std::remove_pointer_t<decltype(type)>;
        const SgdWork<typename Accumulate<T>::type> work(a);
        if (a.momentum == 0)
          return average ? launch_steps<T, kPlain | kEma>(work, tensors, begin, end, stream)
                         : launch_steps<T, kPlain>(work, tensors, begin, end, stream);
        return average ? launch_steps<T, kPlain | kBuffer | kEma>(work, tensors, begin, end, stream)
                       : launch_steps<T, kPlain | kBuffer>(work, tensors, begin, end, stream);
      });
}

}  // namespace fastreg
