// The AdamW step on the CPU, formula in adamw_math.h.
// Bytes per float32 element: reads w, g, m, v, writes w, m, v: 28, the floor; 8 more with amsgrad, 8 more
// with the moving average.
#include "../common/flush_mode.h"
#include "../common/optimizer_cpu.h"
#include "adamw_math.h"

namespace fastreg::FASTREG_ISA {
namespace {

// Whether a step has none of the options that are rare and cost instructions, and both lerps go from the old
// value, as they do where beta1 and ema are above 0.5.
template <class V>
bool is_usual(const AdamwNumbers<V>& n, bool has_average) {
  return !n.cautious && !n.amsgrad && n.moment.near &&
         !(has_average && (n.average.first || !n.average.lerp.near));
}

// The arithmetic on contiguous memory. The usual form is compiled apart from the others: in bfloat16, where
// the instructions are the bound, the others' branches and registers would take a sixth of the time.
template <class T, class V, bool kUsual>
__attribute__((noinline)) void step_vectors(T* const* slots, int64_t count, const uint16_t* random,
                                            const AdamwNumbers<V>& numbers) {
  T *const param = slots[kParam], *const exp_avg = slots[kExpAvg], *const exp_avg_sq = slots[kExpAvgSq];
  T *const max_exp_avg_sq = kUsual ? nullptr : slots[kMaxExpAvgSq], *const average = slots[kAverage];
  const T* const grad = slots[kGrad];
  AdamwNumbers<V> n = numbers;  // a copy, since the compiler must assume that a store changes the original
  if (kUsual) {
    n.cautious = n.amsgrad = n.average.first = false;
    n.moment.near = n.average.lerp.near = true;
  }
  int64_t done = 0;
  if constexpr (std::is_same_v<T, BFloat16>) {
    for (; done + 32 <= count; done += 32) {  // even elements in one vector, odd ones in another
      const uint16_t* const bits = random ? random + done : nullptr;
      fetch_ahead(slots, done, count);
      V w_even, w_odd, g_even, g_odd, m_even, m_odd, v_even, v_odd, most_even(0), most_odd(0);
      load_pairs(param + done, w_even, w_odd);
      load_pairs(grad + done, g_even, g_odd);
      load_pairs(exp_avg + done, m_even, m_odd);
      load_pairs(exp_avg_sq + done, v_even, v_odd);
      if (max_exp_avg_sq) load_pairs(max_exp_avg_sq + done, most_even, most_odd);
      adamw_element(w_even, g_even, m_even, v_even, most_even, n);
      adamw_element(w_odd, g_odd, m_odd, v_odd, most_odd, n);
      store_pairs(exp_avg + done, pack_pairs(m_even, m_odd));
      store_pairs(exp_avg_sq + done, pack_pairs(v_even, v_odd));
      if (max_exp_avg_sq) store_pairs(max_exp_avg_sq + done, pack_pairs(most_even, most_odd));
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
    V w = load(param + i, lanes), m = load(exp_avg + i, lanes), v = load(exp_avg_sq + i, lanes), most(0);
    if (max_exp_avg_sq) most = load(max_exp_avg_sq + i, lanes);
    adamw_element(w, load(grad + i, lanes), m, v, most, n);
    store(exp_avg + i, m, lanes);
    store(exp_avg_sq + i, v, lanes);
    if (max_exp_avg_sq) store(max_exp_avg_sq + i, most, lanes);
    if (average) store_rounded(average + i, n.average(load(average + i, lanes), w), lanes, bits);
    store_rounded(param + i, w, lanes, bits);
  });
}

void step(const AdamwArgs& a, const StepTensor& t, int64_t begin, int64_t end) {
  with_dtype(t.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = typename Accumulate<T>::type;
    using V = Vec<A>;
    const AdamwNumbers<V> numbers =
        adamw_numbers<V, A>(a, steps_done(t.counter, t.step), t.n_averaged, t.data[kMaxExpAvgSq] != nullptr);
    const auto vectors =
        is_usual(numbers, t.data[kAverage] != nullptr) ? step_vectors<T, V, true> : step_vectors<T, V, false>;
    const FlushMode<A> mode;
    step_blocks<T>(a.step, t, begin, end, [&](T* const* slots, int64_t count, const uint16_t* random) {
      vectors(slots, count, random, numbers);
    });
  });
}

}  // namespace

extern const AdamwKernels adamw_kernels;
const AdamwKernels adamw_kernels = {step};

}  // namespace fastreg::FASTREG_ISA
