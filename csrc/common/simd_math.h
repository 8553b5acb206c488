// exp and log of a Vec, as far as a softmax needs them. Included by simd.h. tests/native/common_test.cpp
// tests all of them against the C library in a wider type, exp of float32 over every float.
//
//   function          argument                      float32: bound; worst found       float64
//   exp_nonpositive   x <= 0, -inf, NaN stays       2 ulp; 0.89; 0 below -87.68       libm; 0.51 ulp found
//   log_from_one      1 <= x < inf, NaN stays       2 ulp; 0.78                       libm
//   log1p_small       0 <= x <= 0.125, NaN stays    2 ulp; 0.57                       libm
#pragma once
#include <cmath>

#include "simd_memory.h"

namespace fastreg::FASTREG_ISA {

// 2^n * P(r) with n = round(x / ln 2) and r = x - n ln 2 in two pieces (Cody and Waite); P is of degree 6,
// fitted to the least relative error on |r| <= ln 2 / 2. Adding `round` leaves n + 127 in the lowest bits of
// the sum, which a shift by 23 turns into 2^n; n = -127, where float32 would be subnormal, gives the float 0,
// so that neither an upper clamp nor a mask is needed.
FR_INLINE Vec<float> exp_nonpositive(const Vec<float>& x) {
  using V = Vec<float>;
  const V round(0x1.8p23f + 127.f);
  const V y = maximum(V(-88.f), x);
  const V shifted = multiply_add(y, V(1.44269504f), round);
  const V n = shifted - round;
  const V r = multiply_add(n, V(2.12194440e-4f), multiply_add(n, V(-0.693359375f), y));
  V p(1.3814612757e-3f);
  p = multiply_add(p, r, V(8.3687100559e-3f));
  p = multiply_add(p, r, V(4.1668388993e-2f));
  p = multiply_add(p, r, V(1.6666521132e-1f));
  p = multiply_add(p, r, V(4.9999994040e-1f));
  p = multiply_add(p, r, V(1.f));
  p = multiply_add(p, r, V(1.f));
  V result;
  for (int i = 0; i < V::kParts; ++i) result.part[i] = p.part[i] * (V::Part)((U32Part)shifted.part[i] << 23);
  return result;
}

// log(1 + x) + exponent * ln 2 for x in [-0.2929, 0.4142], as x - x^2 / 2 + x^3 P(x); P is that of Cephes'
// logf.
FR_INLINE Vec<float> log1p_reduced(const Vec<float>& x, const Vec<float>& exponent) {
  using V = Vec<float>;
  const V square = x * x;
  V p(7.0376836292e-2f);
  p = multiply_add(p, x, V(-1.1514610310e-1f));
  p = multiply_add(p, x, V(1.1676998740e-1f));
  p = multiply_add(p, x, V(-1.2420140846e-1f));
  p = multiply_add(p, x, V(1.4249322787e-1f));
  p = multiply_add(p, x, V(-1.6668057665e-1f));
  p = multiply_add(p, x, V(2.0000714765e-1f));
  p = multiply_add(p, x, V(-2.4999993993e-1f));
  p = multiply_add(p, x, V(3.3333331174e-1f));
  V y = p * x * square;
  y = multiply_add(exponent, V(-2.12194440e-4f), y);
  y = multiply_add(square, V(-0.5f), y);
  return multiply_add(exponent, V(0.693359375f), x + y);
}
FR_INLINE Vec<float> log1p_small(const Vec<float>& x) { return log1p_reduced(x, Vec<float>(0.f)); }
// The exponent is taken where the mantissa is at least sqrt(1/2).
FR_INLINE Vec<float> log_from_one(const Vec<float>& x) {
  using V = Vec<float>;
  constexpr int32_t kRootOfHalf = 0x3f3504f3;  // the bits of sqrt(1/2)
  V mantissa, exponent;
  for (int i = 0; i < V::kParts; ++i) {
    const V::IntPart bits = (V::IntPart)x.part[i] - kRootOfHalf;
    exponent.part[i] = __builtin_convertvector(bits >> 23, V::Part);
    mantissa.part[i] = (V::Part)((bits & 0x7fffff) + kRootOfHalf);
  }
  return select(x == x, log1p_reduced(mantissa - V(1.f), exponent), x);
}

template <class F>
FR_INLINE Vec<double> each_lane(const Vec<double>& x, F f) {
  double lane[8];
  memcpy(lane, x.part, 64);
  for (double& value : lane) value = f(value);
  return load(lane);
}
FR_INLINE Vec<double> exp_nonpositive(const Vec<double>& x) {
  return each_lane(x, [](double value) __attribute__((always_inline)) { return std::exp(value); });
}
FR_INLINE Vec<double> log1p_small(const Vec<double>& x) {
  return each_lane(x, [](double value) __attribute__((always_inline)) { return std::log1p(value); });
}
FR_INLINE Vec<double> log_from_one(const Vec<double>& x) {
  return each_lane(x, [](double value) __attribute__((always_inline)) { return std::log(value); });
}

}  // namespace fastreg::FASTREG_ISA
