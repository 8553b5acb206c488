// What the steps of the optimisers share: their arguments, and the arithmetic of one element on CPU and CUDA.
// fastreg/_optimizer_math.py has the same in plain torch.
#pragma once
#include <cmath>
#include <cstddef>
#include <type_traits>

#include "device.h"
#include "flush.h"
#include "mix_seed.h"
#include "philox.h"

namespace fastreg {

// The tensors that belong to one parameter, by number: what every optimiser has, then its own state, which
// begins at kState.
enum Slot { kParam, kGrad, kAverage, kState };
constexpr int kSlots = 6;

constexpr int64_t kAhead = 512;  // bytes that the CPU's loops ask for before they read them

struct StepTensor {
  DType dtype;
  void* data[kSlots];  // null where there is none; the gradient is only read
  // How many steps were done, or for SGD whether there was one, in the memory of the parameter's device. Null
  // where `step` has the number, or where it is not needed.
  float* counter;
  float step;
  float* n_averaged;  // updates of the average, where there is one
  // What the rounding at random is drawn by: a number of the tensor's own, and the index of element i in the
  // whole of which the tensor is a part, first + i / columns * row + i % columns.
  uint32_t draw;
  int64_t first, columns, row;
  Layout layout[kSlots];
};

FR_HD float steps_done(const float* counter, float step) { return counter ? *counter : step; }

// The seed of a step of one tensor: every step has its own, the same on every rank that takes the step. What
// is no count, such as infinity, is taken as 0: C++ does not define its conversion to an integer, and
// processors disagree.
FR_HD uint64_t seed_of_step(const Seed& seed, float steps) {
  return mix_seed(seed.get(), steps > 0 && steps < 0x1p63f ? uint64_t(steps) : 0);
}

struct StepArgs {
  double lr, weight_decay, l1, ema;
  double grad_factor;  // 1, or -1 to climb, over the scale of the loss; the gradient is multiplied by it
  double clip;         // the factor that clips the gradient
  bool proximal, maximize;
  bool stochastic_rounding;  // of bfloat16 parameters and averages
  Seed seed;
  // Numbers in a GPU's memory, which only the kernel may look at. Null stands for the values above, and for
  // no overflow. Those that are `wide` are float64, all others float32.
  bool lr_wide, ema_wide;
  const void *lr_at, *ema_at;
  const float *grad_scale_at, *found_inf_at, *clip_at;
};

FR_HD double number_at(const void* at, bool wide, double otherwise) {
  if (!at) return otherwise;
  return wide ? *static_cast<const double*>(at) : double(*static_cast<const float*>(at));
}

// What a gradient is multiplied with.
template <class A>
FR_HD A gradient_factor(const StepArgs& a) {
  const A factor = a.grad_scale_at ? A(a.maximize ? -1 : 1) / A(*a.grad_scale_at) : A(a.grad_factor);
  return factor * (a.clip_at ? A(*a.clip_at) : A(a.clip));
}

FR_HD float square_root(float x) { return sqrtf(x); }
FR_HD double square_root(double x) { return sqrt(x); }

// a + weight * (b - a) from the end that is nearer, as torch.lerp does it.
template <class V>
struct Lerp {
  V factor;
  bool near;

  Lerp() = default;
  template <class A>
  FR_HD explicit Lerp(A weight) : factor(weight < A(0.5) ? weight : weight - A(1)), near(weight < A(0.5)) {}
  FR_HD V operator()(V a, V b) const {
    if (near) return a + factor * (b - a);
    return b + factor * (b - a);
  }
};

// Moves the average of the weights towards w; in its first step the average becomes w.
template <class V>
struct Average {
  Lerp<V> lerp;
  bool first;

  Average() = default;
  template <class A>
  FR_HD Average(A take, bool is_first) : lerp(take), first(is_first) {}
  FR_HD V operator()(V average, V w) const {
    if (first) return flush(w);
    return flush_result(lerp(average, w));
  }
};
// How a step moves the average of a tensor.
template <class V, class A>
FR_HD Average<V> average_of(const StepArgs& a, const float* n_averaged) {
  return {A(1 - number_at(a.ema_at, a.ema_wide, a.ema)), n_averaged && *n_averaged == 0};
}

// A step takes float32 below the normal numbers as 0 (flush_mode.h). Such a weight keeps its value where the
// step gives 0.
template <class V>
FR_HD V kept_if_small(V result, V old) {
  const V zero(0);
  return select(result == zero, select(is_small(old), old, result), result);
}

// l1 * sign(w), of a subnormal weight too.
template <class V>
FR_HD V l1_pull(V w, V l1) {
  const V zero(0);
  return select(is_positive(w), l1, select(is_negative(w), zero - l1, zero));
}

// sign(w) max(|w| - t, 0), as w minus w clamped to [-t, t]: +0 where |w| <= t, and a NaN stays.
template <class V>
FR_HD V soft_threshold(V w, V t) {
  const V from_below = select(w < V(0) - t, V(0) - t, w);
  return w - select(from_below > t, t, from_below);
}

}  // namespace fastreg
