// The FGSM and PGD steps on the CPU, formulas in fgsm_math.h.
// Bytes per float32 element: FGSM reads x and g, writes x': 12, the floor; PGD reads the origin too: 16.
#include <initializer_list>
#include <type_traits>

#include "../common/simd.h"
#include "fgsm_math.h"

namespace fastreg::FASTREG_ISA {
namespace {

// How many elements from i share its value. A value per element is no limit: value_at loads those as a
// vector.
FR_INLINE int64_t run_length(const FgsmParameter& parameter, int64_t i) {
  return parameter.values && parameter.inner > 1 ? parameter.inner - i % parameter.inner : INT64_MAX;
}

// Values of elements [i, i + lanes), which must lie in one run. Values per element start again after the last
// one, also within the vector.
template <class A>
FR_INLINE Vec<A> value_at(const FgsmParameter& parameter, int64_t i, int lanes) {
  const A* values = static_cast<const A*>(parameter.values);
  if (!values) return Vec<A>(A(parameter.value));
  if (parameter.inner > 1) return Vec<A>(values[i / parameter.inner % parameter.count]);
  const int64_t at = i % parameter.count;
  if (at + lanes <= parameter.count) return load(values + at, lanes);
  A lane[Vec<A>::kLanes] = {};
  for (int j = 0; j < lanes; ++j) lane[j] = values[(at + j) % parameter.count];
  return load(lane);
}

// 32 neighbouring bfloat16, the even ones in one vector, the odd ones in another. The parameters must be
// constant, because load_pairs changes the order. The origin is read only to project.
template <bool kProject, class V>
FR_INLINE void step_pairs(const BFloat16* x, const BFloat16* grad, const BFloat16* origin, BFloat16* out,
                          V step, V radius, V lower, V upper) {
  V x_even, x_odd, grad_even, grad_odd;
  load_pairs(x, x_even, x_odd);
  load_pairs(grad, grad_even, grad_odd);
  if (kProject) {
    V origin_even, origin_odd;
    load_pairs(origin, origin_even, origin_odd);
    x_even = pgd_element(x_even, grad_even, origin_even, step, radius, lower, upper);
    x_odd = pgd_element(x_odd, grad_odd, origin_odd, step, radius, lower, upper);
  } else {
    x_even = fgsm_element(x_even, grad_even, step, lower, upper);
    x_odd = fgsm_element(x_odd, grad_odd, step, lower, upper);
  }
  store_pairs(out, pack_pairs(x_even, x_odd));
}

// Elements [first, first + count), whose tensors begin at the pointers. Within a run no parameter changes,
// unless one has a value per element.
template <class T, bool kProject>
FR_INLINE void step_run(const FgsmArgs& a, int64_t first, int64_t count, const T* x, const T* grad,
                        const T* origin, T* out) {
  using A = typename Accumulate<T>::type;
  const auto body = [&](int64_t i, int lanes, Vec<A> step, Vec<A> radius, Vec<A> lower,
                        Vec<A> upper) __attribute__((always_inline)) {
    const Vec<A> vx = load(x + i, lanes), vg = load(grad + i, lanes);
    if (kProject)
      store(out + i, pgd_element(vx, vg, load(origin + i, lanes), step, radius, lower, upper), lanes);
    else
      store(out + i, fgsm_element(vx, vg, step, lower, upper), lanes);
  };
  const bool per_element = (a.step.values && a.step.inner == 1) || (a.radius.values && a.radius.inner == 1) ||
                           (a.lower.values && a.lower.inner == 1) || (a.upper.values && a.upper.inner == 1);
  if (per_element) {
    for_each_vector<A>(count, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      body(i, lanes, value_at<A>(a.step, first + i, lanes), value_at<A>(a.radius, first + i, lanes),
           value_at<A>(a.lower, first + i, lanes), value_at<A>(a.upper, first + i, lanes));
    });
    return;
  }
  const Vec<A> step = value_at<A>(a.step, first, 1), radius = value_at<A>(a.radius, first, 1),
               lower = value_at<A>(a.lower, first, 1), upper = value_at<A>(a.upper, first, 1);
  int64_t done = 0;
  if constexpr (std::is_same_v<T, BFloat16>)
    for (; done + 32 <= count; done += 32)
      step_pairs<kProject>(x + done, grad + done, origin + done, out + done, step, radius, lower, upper);
  for_each_vector<A>(count - done, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    body(done + i, lanes, step, radius, lower, upper);
  });
}

// Elements [begin, end), a block after the other, and each block run by run.
template <class T, bool kProject>
void step_blocks(const FgsmArgs& a, int64_t begin, int64_t end) {
  T x_buffer[kBlock], grad_buffer[kBlock], origin_buffer[kBlock], out_buffer[kBlock];
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t n = end - block < kBlock ? end - block : kBlock;
    const T* x = read_block(a.x_layout, static_cast<const T*>(a.x), block, block + n, x_buffer);
    const T* grad = read_block(a.grad_layout, static_cast<const T*>(a.grad), block, block + n, grad_buffer);
    const T* origin = nullptr;
    if (kProject)
      origin = read_block(a.origin_layout, static_cast<const T*>(a.origin), block, block + n, origin_buffer);
    T* out = block_to_write(a.output_layout, static_cast<T*>(a.output), block, out_buffer);
    for (int64_t i = 0; i < n;) {
      int64_t run = n - i;
      for (const FgsmParameter* parameter : {&a.step, &a.radius, &a.lower, &a.upper}) {
        const int64_t same = run_length(*parameter, block + i);
        run = same < run ? same : run;
      }
      step_run<T, kProject>(a, block + i, run, x + i, grad + i, kProject ? origin + i : nullptr, out + i);
      i += run;
    }
    write_block(a.output_layout, static_cast<T*>(a.output), block, block + n, out);
  }
}

void step(const FgsmArgs& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    a.origin ? step_blocks<T, true>(a, begin, end) : step_blocks<T, false>(a, begin, end);
  });
}

}  // namespace

extern const FgsmKernels fgsm_kernels;
const FgsmKernels fgsm_kernels = {step};

}  // namespace fastreg::FASTREG_ISA
