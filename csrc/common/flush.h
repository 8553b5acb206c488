// Zero in place of numbers below float32's smallest normal one, 2^-126, which processors compute with 10 to
// 40 times as slowly.
#pragma once
#include <cmath>
#include <type_traits>

#include "device.h"

namespace fastreg {

// Declared only: the type of a number, or of the numbers in a vector.
float scalar_of(float);
double scalar_of(double);
template <class V>
typename V::Scalar scalar_of(V);

FR_HD float magnitude(float x) { return fabsf(x); }

// float64 stays as it is.
template <class V>
FR_HD V flush(V x) {
  if constexpr (std::is_same_v<decltype(scalar_of(x)), double>) {
    return x;
  } else {
    return select(magnitude(x) < V(0x1p-126f), V(0), x);
  }
}

}  // namespace fastreg
