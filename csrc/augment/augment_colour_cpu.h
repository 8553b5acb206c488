// The colours of augmentation on the CPU: the chosen steps of a row, and the sum of its grey. Part of
// augment_cpu.cpp, compiled once per instruction set.
#pragma once
#include "augment_colour.h"
#include "augment_pixels_cpu.h"

namespace fastreg::FASTREG_ISA {
namespace {

template <class V, class A>
ColourFactors<V> factors_of(const AugmentArgs& a, int64_t sample, A mean) {
  if (!a.colour_steps) return {};
  const A bound = a.in_type == PixelType::kUInt8 ? A(255) : A(1);
  return {a.colour + kColourColumns * sample, bound, mean};
}

template <class A>
struct Colour {
  using V = Vec<A>;
  int64_t channels;
  bool quantise;
  ColourFactors<V> factors;

  Colour(const AugmentArgs& a, int64_t sample, A mean)
      : channels(a.channels), quantise(quantises(a)), factors(factors_of<V>(a, sample, mean)) {}

  // The given steps of n pixels, from one row buffer to another.
  void row(int steps, const A* in, int64_t in_pitch, A* out, int64_t out_pitch, int64_t n) const {
    quantise ? row<true>(steps, in, in_pitch, out, out_pitch, n)
             : row<false>(steps, in, in_pitch, out, out_pitch, n);
  }

 private:
  template <bool kQuantise>
  FR_INLINE void row(int steps, const A* in, int64_t in_pitch, A* out, int64_t out_pitch, int64_t n) const {
    if (channels == 3) {
      for (int64_t x = 0; x < n; x += V::kLanes) {
        V r = load(in + x), g = load(in + in_pitch + x), b = load(in + 2 * in_pitch + x);
        colour_pixel<kQuantise>(factors, steps, r, g, b);
        store(out + x, r);
        store(out + out_pitch + x, g);
        store(out + 2 * out_pitch + x, b);
      }
      return;
    }
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t x = 0; x < n; x += V::kLanes) {
        V p = load(in + c * in_pitch + x);
        colour_pixel<kQuantise>(factors, steps, p);
        store(out + c * out_pitch + x, p);
      }
  }
};

template <class A>
A mean_of_sum(double sum, int64_t count) {
  const A high = A(sum);
  return mean_of(high, A(sum - double(high)), A(count));
}
template <class A>
double grey_sum(const A* in, int64_t pitch, int64_t channels, int64_t n, bool quantise) {
  using V = Vec<A>;
  V sum(0);
  for (int64_t x = 0; x < n; x += V::kLanes) {
    V grey = load(in + x);
    if (channels == 3) {
      const V g = load(in + pitch + x), b = load(in + 2 * pitch + x);
      grey = quantise ? grey_of<true>(grey, g, b) : grey_of<false>(grey, g, b);
    }
    sum = sum + (n - x < V::kLanes ? select(V::first(int(n - x)), grey, V(0)) : grey);
  }
  return double(sum.sum());
}

}  // namespace
}  // namespace fastreg::FASTREG_ISA
