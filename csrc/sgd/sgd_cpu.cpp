// The SGD step on the CPU, formula in sgd_math.h.
// Bytes per float32 element: reads w, g, v, writes w, v: 20, the floor; 12 without momentum, 8 more with the
// moving average.
#include "../common/flush_mode.h"
#include "../common/optimizer_cpu.h"
#include "sgd_math.h"

namespace fastreg::FASTREG_ISA {
namespace {

// The arithmetic on contiguous memory. It is a function of its own so that the code for strided tensors is
// not compiled for each of its nine forms. The average has no form of its own: it is one more stream of
// memory, beside which a branch costs nothing.
template <class T, SgdMomentum kForm, SgdPenalty kPenalty, class V>
__attribute__((noinline)) void step_vectors(T* const* slots, int64_t count, const uint16_t* random,
                                            const SgdNumbers<V>& numbers) {
  constexpr bool has_momentum = kForm != SgdMomentum::kNone;
  T *const param = slots[kParam], *const momentum = slots[kMomentum], *const average = slots[kAverage];
  const T* const grad = slots[kGrad];
  const SgdNumbers<V> n =
      numbers;  // a copy, since the compiler must assume that a store changes the original
  int64_t done = 0;
  if constexpr (std::is_same_v<T, BFloat16>) {
    for (; done + 32 <= count; done += 32) {  // in pairs
      const uint16_t* const bits = random ? random + done : nullptr;
      fetch_ahead(slots, done, count);
      V w_even, w_odd, g_even, g_odd, v_even(0), v_odd(0);
      load_pairs(param + done, w_even, w_odd);
      load_pairs(grad + done, g_even, g_odd);
      if (has_momentum) load_pairs(momentum + done, v_even, v_odd);
      sgd_element(kForm, kPenalty, w_even, g_even, v_even, n);
      sgd_element(kForm, kPenalty, w_odd, g_odd, v_odd, n);
      if (has_momentum) store_pairs(momentum + done, pack_pairs(v_even, v_odd));
      if (average) {
        V even, odd;
        load_pairs(average + done, even, odd);
        store_rounded(average + done, n.average(even, w_even), n.average(odd, w_odd), bits);
      }
      store_rounded(param + done, w_even, w_odd, bits);
    }
  }
  for_each_vector<typename V::Scalar>(count - done, [&](int64_t j, int lanes) __attribute__((always_inline)) {
    const int64_t i = done + j;
    const uint16_t* const bits = random ? random + i : nullptr;
    fetch_ahead(slots, i, count);
    V w = load(param + i, lanes), v(0);
    if (has_momentum) v = load(momentum + i, lanes);
    sgd_element(kForm, kPenalty, w, load(grad + i, lanes), v, n);
    if (has_momentum) store(momentum + i, v, lanes);
    if (average) store_rounded(average + i, n.average(load(average + i, lanes), w), lanes, bits);
    store_rounded(param + i, w, lanes, bits);
  });
}

template <class T, class V, SgdMomentum kForm>
auto choose_penalty(SgdPenalty penalty) {
  return penalty == SgdPenalty::kNone         ? step_vectors<T, kForm, SgdPenalty::kNone, V>
         : penalty == SgdPenalty::kInGradient ? step_vectors<T, kForm, SgdPenalty::kInGradient, V>
                                              : step_vectors<T, kForm, SgdPenalty::kDecoupled, V>;
}

void step(const SgdArgs& a, const StepTensor& t, int64_t begin, int64_t end) {
  with_dtype(t.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = typename Accumulate<T>::type;
    using V = Vec<A>;
    const SgdNumbers<V> numbers = sgd_numbers<V, A>(a, t.counter, t.n_averaged);
    const SgdPenalty penalty = sgd_penalty(a);
    const auto vectors = !t.data[kMomentum] ? choose_penalty<T, V, SgdMomentum::kNone>(penalty)
                         : a.nesterov       ? choose_penalty<T, V, SgdMomentum::kNesterov>(penalty)
                                            : choose_penalty<T, V, SgdMomentum::kHeavyBall>(penalty);
    const FlushMode<A> mode;
    step_blocks<T>(a.step, t, begin, end, [&](T* const* slots, int64_t count, const uint16_t* random) {
      vectors(slots, count, random, numbers);
    });
  });
}

}  // namespace

extern const SgdKernels sgd_kernels;
const SgdKernels sgd_kernels = {step};

}  // namespace fastreg::FASTREG_ISA
