// The AdamW step on CUDA, formula in adamw_math.h; the launches stand in ../common/optimizer_cuda.h.
// Bytes per float32 element: reads w, g, m, v, writes w, m, v: 28, the floor; 8 more with amsgrad, 8 more
// with the moving average. The powers of beta are taken in float64, by one thread of a block; an element sees
// no float64.
//
// The mode of csrc/common/flush_mode.h, so that the bits are those of the CPU:
// nvcc flags: -ftz=true -DFASTREG_FTZ
#include "../common/optimizer_cuda.h"
#include "adamw_math.h"

namespace fastreg {
inline namespace adamw_kernels {

template <class A>
struct AdamwWork {
  using Numbers = AdamwNumbers<A>;
  AdamwArgs args;
  bool amsgrad;

  __device__ __forceinline__ const StepArgs& step() const { return args.step; }
  __device__ __forceinline__ Numbers numbers(const StepPointers& t) const {
    return adamw_numbers<A, A>(args, steps_done(t.counter, t.step), t.n_averaged, amsgrad);
  }
  __device__ __forceinline__ void element(A* value, const Numbers& n) const {
    adamw_element(value[kParam], value[kGrad], value[kExpAvg], value[kExpAvgSq], value[kMaxExpAvgSq], n);
    value[kAverage] = n.average(value[kAverage], value[kParam]);
  }
};

}  // namespace adamw_kernels

int adamw_step_cuda(const AdamwArgs& a, const StepTensor* tensors, size_t count, void* stream) {
  constexpr unsigned kPlain = 1u << kParam | 1u << kGrad | 1u << kExpAvg | 1u << kExpAvgSq;
  constexpr unsigned kMost = 1u << kMaxExpAvgSq, kEma = 1u << kAverage;
  const bool average = any_has(tensors, count, kAverage), amsgrad = any_has(tensors, count, kMaxExpAvgSq);
  return launch_step<AdamwWork<float>>(
      a.step, true, tensors, count, stream, [&](auto* type, auto begin, auto end) {
        using T = std::remove_pointer_t<decltype(type)>;
        const AdamwWork<typename Accumulate<T>::type> work{a, amsgrad};
        if (amsgrad)
          return average ? launch_steps<T, kPlain | kMost | kEma>(work, tensors, begin, end, stream)
                         : launch_steps<T, kPlain | kMost>(work, tensors, begin, end, stream);
        return average ? launch_steps<T, kPlain | kEma>(work, tensors, begin, end, stream)
                       : launch_steps<T, kPlain>(work, tensors, begin, end, stream);
      });
}

}  // namespace fastreg
