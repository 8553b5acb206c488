// Zero in place of numbers below float32's smallest normal one, 2^-126, which processors compute with 10 to
// 40 times as slowly.
#pragma once
#include <cmath>
#include <type_traits>

#include "device.h"

namespace fastreg {

// The sign of a number by its bits: a comparison takes a subnormal one as 0 in flush mode (flush_mode.h). A
// NaN has none. simd_vector.h has these for vectors.
FR_HD bool is_positive(float x) { return float_bits(x) - 1u < 0x7f800000u; }
FR_HD bool is_negative(float x) { return float_bits(x) - 0x80000001u < 0x7f800000u; }
FR_HD bool is_small(float x) { return (float_bits(x) & 0x7fffffffu) < 0x800000u; }  // 0 or subnormal
FR_HD bool is_positive(double x) { return x > 0; }
FR_HD bool is_negative(double x) { return x < 0; }
FR_HD bool is_small(double x) { return x == 0; }

// Declared only: the type of a number, or of the numbers in a vector.
float scalar_of(float);
double scalar_of(double);
template <class V>
typename V::Scalar scalar_of(V);

FR_HD float magnitude(float x) { return fabsf(x); }
FR_HD float signed_zero(float x) { return bits_float(float_bits(x) & 0x80000000u); }  // of the sign of x

// Whether the kernels that flush run in a mode in which the processor does so (flush_mode.h). FASTREG_FTZ
// stands beside nvcc's -ftz=true. The host's compiler has no mode for CUDA kernels that it compiles.
#if defined(FASTREG_FTZ) || \
    (!defined(__CUDACC__) && !defined(FASTREG_CUDAHOST) && (defined(__SSE2__) || defined(__aarch64__)))
constexpr bool kFlushes = true;
#else
constexpr bool kFlushes = false;
#endif

// The zero has the sign of the number. float64 stays as it is.
template <class V>
FR_HD V flush(V x) {
  if constexpr (std::is_same_v<decltype(scalar_of(x)), double>) {
    return x;
  } else {
    return select(magnitude(x) < V(0x1p-126f), signed_zero(x), x);
  }
}

// The same for what arithmetic has just given, which in flush mode is normal, or 0.
template <class V>
FR_HD V flush_result(V x) {
  return kFlushes ? x : flush(x);
}

}  // namespace fastreg
