// What the updates of the optimisers share: arithmetic of one element, on CPU and CUDA.
#pragma once
#include <type_traits>

#include "device.h"

namespace fastreg {

// Declared only: the type of a number, or of the numbers in a vector.
float scalar_of(float);
double scalar_of(double);
template <class V>
typename V::Scalar scalar_of(V);

// Zero in place of a subnormal float32, with which every later step would take 10 to 40 times as long;
// float64 as it is.
template <class V>
FR_HD V flush(V x) {
  if constexpr (std::is_same_v<decltype(scalar_of(x)), double>) return x;
  const V smallest(0x1p-126f);
  return select(x < smallest, select(x > V(0) - smallest, V(0), x), x);
}

// a + weight * (b - a) from the end that is nearer, as torch.lerp does it.
template <class V>
struct Lerp {
  V factor;
  bool near;

  Lerp() = default;
  template <class A>
  FR_HD explicit Lerp(A weight) : factor(weight < A(0.5) ? weight : weight - A(1)), near(weight < A(0.5)) {}
  FR_HD V operator()(V a, V b) const { return (near ? a : b) + factor * (b - a); }
};

// l1 * sign(w)
template <class V>
FR_HD V l1_pull(V w, V l1) {
  const V zero(0);
  return select(w > zero, l1, select(w < zero, zero - l1, zero));
}

// sign(w) max(|w| - t, 0) as w less what lies of it in [-t, t]: +0 inside, NaN kept
template <class V>
FR_HD V soft_threshold(V w, V t) {
  const V from_below = select(w < V(0) - t, V(0) - t, w);
  return w - select(from_below > t, t, from_below);
}

}  // namespace fastreg
