// The running softmax of a row on CUDA: what is known of it after some of its classes; only
// cross_entropy_cuda.cu includes it.
//
// Largest logit and sum of exponentials come from one sweep, relative to a running reference (Milakov and
// Gimelshein 2018). The reference moves only when a logit lies 8 above it: each move costs a rounding, and a
// row may have its logits in ascending order. One largest logit stays out of the sum, so that log1p(sum)
// keeps the last bits of a row in which one class has nearly all the mass.
#pragma once
#include <limits>

#include "../common/cuda.h"
#include "cross_entropy_math.h"

namespace fastreg {
inline namespace cross_entropy_kernels {

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();
template <class A>
constexpr A kMost = std::numeric_limits<A>::max();

// The functions of a softmax, for results that are normal numbers. tests/test_cuda_softmax_math.py measures
// them against a wider type, in the interpreter of tests/cudacheck.
//
//   function          argument                     float32: bound; worst found   float64
//   exponential       x <= 8, -inf, NaN stays      2 ulp; 1.08                   1 ulp; 0.82
//   log_of_one_plus   0 <= x <= 2^40, NaN stays    1 ulp; 0.88                   2 ulp; 0.99
//   reciprocal        1 <= x <= 2^40               0.5 ulp; 0.50                 1 ulp; 0.50

// NaN only where both are.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
// 1 / x for x >= 1. A division of float64, such as the one in log1p, is a call, around which registers are
// spilled; here two of Newton's steps refine the reciprocal of float32.
__device__ __forceinline__ float reciprocal(float x) { return 1.f / x; }
__device__ __forceinline__ double reciprocal(double x) {
  double r = double(1.f / float(x));
  for (int step = 0; step < 2; ++step) r = multiply_add(r, multiply_add(-x, r, 1.), r);
  return r;
}
__device__ __forceinline__ float log_of_one_plus(float x) { return log1pf(x); }
__device__ __forceinline__ double log_of_one_plus(double x) {
  const double sum = 1. + x;
  return log(sum) + (x - (sum - 1.)) * reciprocal(sum);  // the second term is what of x the sum has lost
}

template <class A>
__device__ __forceinline__ A load_as(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32:
      return A(static_cast<const float*>(p)[i]);
    case DType::kFloat64:
      return A(static_cast<const double*>(p)[i]);
    case DType::kFloat16:
      return A(load_float(static_cast<const Half*>(p)[i]));
    default:
      return A(load_float(static_cast<const BFloat16*>(p)[i]));
  }
}
template <class A>
__device__ __forceinline__ void store_as(void* p, DType dtype, int64_t i, A x) {
  switch (dtype) {
    case DType::kFloat32:
      return store_float(float(x), static_cast<float*>(p) + i);
    case DType::kFloat64:
      return store_float(double(x), static_cast<double*>(p) + i);
    case DType::kFloat16:
      return store_float(float(x), static_cast<Half*>(p) + i);
    default:
      return store_float(float(x), static_cast<BFloat16*>(p) + i);
  }
}

template <class A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int step = kLanes / 2; step; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
template <class A>
__device__ __forceinline__ A warp_max(A x) {
#pragma unroll
  for (int step = kLanes / 2; step; step /= 2) x = larger(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// ---- a sum
template <class A>
struct Compensated {
  A high, low;

  __device__ __forceinline__ void add(const Compensated& x) {  // Knuth 1969
    const A sum = high + x.high, part = sum - high;
    low += (high - (sum - part)) + (x.high - part) + x.low;
    high = sum;
  }
  // Dekker 1971; a larger x is added as a plain number would be.
  __device__ __forceinline__ void add_smaller(A x) {
    const A sum = high + x;
    low += x - (sum - high);
    high = sum;
  }
  // Where `low` is NaN it came from inf - inf, and is no correction.
  __device__ __forceinline__ A value() const { return low == low ? high + low : high; }
};

// What is known of a row, or of a thread's part of it, after some of its classes.
template <class A>
struct RunningSoftmax {
  A top, origin;
  Compensated<A> rest;       // sum of exp(x - origin) over all but one of the largest
  Compensated<A> dot, mass;  // sums of q * (x - origin) and of q

  // Before any class. The origin is finite, so that a logit of -inf less the origin is -inf.
  static __device__ __forceinline__ RunningSoftmax none() { return {-kInfinity<A>, -kMost<A>, {}, {}, {}}; }

  // Before numbers up to `largest` are added.
  __device__ __forceinline__ void raise(A largest) {
    if (largest - origin > A(8)) move(largest);
  }
  __device__ __forceinline__ void move(A to) {
    const A factor = exponential(origin - to);
    rest.high *= factor;
    rest.low *= factor;
    dot.add_smaller(weighted_logit(mass.value(), origin - to));
    origin = to;
  }
  // What x adds to `rest`: itself, or, where it is the largest so far, the largest before it.
  __device__ __forceinline__ A part_of(A x) {
    const bool above = top < x;
    const A part = exponential((above ? top : x) - origin);
    top = above ? x : top;
    return part;
  }
  __device__ __forceinline__ void add(A x) { rest.add_smaller(part_of(x)); }
  __device__ __forceinline__ void add_target(A x, A q) {
    dot.add_smaller(weighted_logit(q, x - origin));
    mass.add_smaller(q);
  }
  // Combines all lanes of the warp; each gets the same.
  __device__ __forceinline__ void combine(bool with_dot) {
    const A largest = warp_max(top), reference = largest == -kInfinity<A> ? A(0) : largest;
    const unsigned holders = __ballot_sync(kAllLanes, top == largest);
    const bool left_out = int(threadIdx.x % kLanes) == __ffs(int(holders)) - 1;
    const A mine = rest.value() * exponential(origin - reference);
    rest = {warp_sum(mine + (left_out ? A(0) : exponential(top - reference))), A(0)};
    if (with_dot) {
      const A its_mass = mass.value();
      dot = {warp_sum(dot.value() + weighted_logit(its_mass, origin - reference)), A(0)};
      mass = {warp_sum(its_mass), A(0)};
    }
    top = largest;
    origin = reference;
  }
  // The end, for a thread that has a whole row.
  __device__ __forceinline__ void close() {
    if (top > -kInfinity<A>) move(top);
  }
};

}  // namespace cross_entropy_kernels
}  // namespace fastreg
