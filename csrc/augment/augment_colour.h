// The colours of augmentation, forward and backward: the arithmetic of one pixel, the same on both devices.
// The steps are those of augment_math.h. kQuantise rounds after each step, as torchvision does for uint8.
//
// V is a number, or a vector of numbers, of which each lane is a pixel.
#pragma once
#include "augment_geometry.h"  // fixed point

namespace fastreg {

// ---- rounding, for values below 2^22

template <class V>
FR_HD V round_even(V x) {
  const V magic(12582912.f);
  return (x + magic) - magic;
}
template <class V>
FR_HD V floor_small(V x) {
  const V rounded = round_even(x);
  return rounded - select(rounded > x, V(1.f), V(0.f));
}
template <class V>
FR_HD V clamp(V x, V bound) {  // a NaN stays
  return maximum(V(0.f), minimum(bound, x));
}

// ---- the steps of one value

template <class V>
FR_HD V quantised(V x, V bound) {  // as torchvision rounds after geometry and after a blur
  return clamp(round_even(x), bound);
}
constexpr double kGreyRed = 0.2989, kGreyGreen = 0.587, kGreyBlue = 0.114;
template <bool kQuantise, class V>
FR_HD V grey_of(V r, V g, V b) {
  const V grey = r * V(kGreyRed) + g * V(kGreyGreen) + b * V(kGreyBlue);
  return kQuantise ? floor_small(grey) : grey;
}
template <bool kQuantise, class V>
FR_HD V brightness_element(V x, V factor, V bound) {
  const V y = clamp(x * factor, bound);
  return kQuantise ? floor_small(y) : y;
}
template <bool kQuantise, class V>
FR_HD V blend_element(V x, V rest, V factor, V bound) {  // rest: 1 - factor times what is blended in
  const V y = clamp(x * factor + rest, bound);
  return kQuantise ? floor_small(y) : y;
}
template <class V>
FR_HD V wrap_six(V x) {  // from [-6, 12) to [0, 6)
  x = select(x < V(0.f), x + V(6.f), x);
  return select(x < V(6.f), x, x - V(6.f));
}
// The hue is in units of a sixth of the colour wheel. A channel n sixths away (5 for red, 3 for green, 1 for
// blue) is v - (v - min) max(0, min(k, 4 - k, 1)) with k = n + h mod 6: hsv_to_rgb without its six cases.
template <class V>
FR_HD V hue_channel(V n, V h, V largest, V range) {
  const V k = wrap_six(n + h);
  return largest - range * maximum(V(0.f), minimum(V(1.f), minimum(V(4.f) - k, k)));
}
template <bool kQuantise, class V>
FR_HD void hue_element(V& r, V& g, V& b, V sixths) {
  const V zero(0.f), largest = maximum(r, maximum(g, b)), smallest = minimum(r, minimum(g, b)),
                     range = largest - smallest;
  const V reciprocal = V(1.f) / select(range > zero, range, V(1.f));
  V h = select(largest == r, g - b, select(largest == g, b - r, r - g)) * reciprocal;
  h = h + select(largest == r, zero, select(largest == g, V(2.f), V(4.f)));
  h = wrap_six(h + sixths);
  r = hue_channel(V(5.f), h, largest, range);
  g = hue_channel(V(3.f), h, largest, range);
  b = hue_channel(V(1.f), h, largest, range);
  if (kQuantise) {  // torchvision goes by way of [0, 1], of which the last 256th is 255
    const V stretch(255.999f / 255.f);
    r = floor_small(r * stretch);
    g = floor_small(g * stretch);
    b = floor_small(b * stretch);
  }
}

// ---- the steps of one pixel

// 1 - x, rounded once, because torchvision computes it in Python's float64. float32 has it from fixed point:
// GPUs have few units for float64.
FR_HD double one_minus(double x, double) { return 1 - x; }
FR_HD float one_minus(double x, float) {
  if (!fits_fixed<9>(x)) return 1 - float(x);
  return float((int64_t(1) << 52) - to_fixed<52>(x)) * 0x1p-52f;
}
// The factors of a sample, from its row of the table and the mean of its grey. Values are clamped at `bound`.
template <class V>
struct ColourFactors {
  V bound, brightness, contrast, contrast_rest, saturation, saturation_rest, hue;

  ColourFactors() = default;
  template <class A>
  FR_HD ColourFactors(const double* factor, A bound, A mean)
      : bound(bound),
        brightness(A(factor[kBrightnessColumn])),
        contrast(A(factor[kContrastColumn])),
        contrast_rest(one_minus(factor[kContrastColumn], A()) * mean),
        saturation(A(factor[kSaturationColumn])),
        saturation_rest(one_minus(factor[kSaturationColumn], A())),
        hue(A(6) * A(factor[kHueColumn])) {}
};
// The chosen steps. Saturation and hue leave an image of one channel as it is.
template <bool kQuantise, class V>
FR_HD void colour_pixel(const ColourFactors<V>& f, int steps, V& p) {
  if (steps & kBrightness) p = brightness_element<kQuantise>(p, f.brightness, f.bound);
  if (steps & kContrast) p = blend_element<kQuantise>(p, f.contrast_rest, f.contrast, f.bound);
}
template <bool kQuantise, class V>
FR_HD void colour_pixel(const ColourFactors<V>& f, int steps, V& r, V& g, V& b) {
  colour_pixel<kQuantise>(f, steps, r);
  colour_pixel<kQuantise>(f, steps, g);
  colour_pixel<kQuantise>(f, steps, b);
  if (steps & kSaturation) {
    const V rest = f.saturation_rest * grey_of<kQuantise>(r, g, b);
    r = blend_element<kQuantise>(r, rest, f.saturation, f.bound);
    g = blend_element<kQuantise>(g, rest, f.saturation, f.bound);
    b = blend_element<kQuantise>(b, rest, f.saturation, f.bound);
  }
  if (steps & kHue) hue_element<kQuantise>(r, g, b, f.hue);
}
// The mean of `count` values whose sum is high + low. An infinite sum makes low a NaN, which is left out.
template <class A>
FR_HD A mean_of(A high, A low, A count) {
  return low == low ? high / count + low / count : high / count;
}

// ---- backward

// The gradient of clamp, which passes where clamp changed nothing; not for a NaN.
template <class V>
FR_HD V passed(V grad, V before, V bound) {
  const V zero(0);
  const V known = select(before == before, grad, zero);
  return select(before < zero, zero, select(before > bound, zero, known));
}
// Takes the gradient of a pixel of 1 or 3 channels back through saturation and contrast; `image` is the pixel
// before brightness. Gives what this pixel adds to the gradient of the mean, without the factor 1 - contrast.
template <int kChannels, class V>
FR_HD V blends_backward(const ColourFactors<V>& f, int steps, const V* image, V* grad) {
  const V share[3] = {V(kGreyRed), V(kGreyGreen), V(kGreyBlue)};
  V bright[kChannels];
  for (int c = 0; c < kChannels; ++c)
    bright[c] = steps & kBrightness ? brightness_element<false>(image[c], f.brightness, f.bound) : image[c];
  if (kChannels == 3 && steps & kSaturation) {
    V x[kChannels], grey(0), through_grey(0);
    for (int c = 0; c < kChannels; ++c) {
      x[c] = steps & kContrast ? blend_element<false>(bright[c], f.contrast_rest, f.contrast, f.bound)
                               : bright[c];
      grey = grey + share[c] * x[c];
    }
    for (int c = 0; c < kChannels; ++c) {
      grad[c] = passed(grad[c], f.saturation * x[c] + f.saturation_rest * grey, f.bound);
      through_grey = through_grey + f.saturation_rest * grad[c];
    }
    for (int c = 0; c < kChannels; ++c) grad[c] = f.saturation * grad[c] + share[c] * through_grey;
  }
  V through_mean(0);
  if (steps & kContrast)
    for (int c = 0; c < kChannels; ++c) {
      grad[c] = passed(grad[c], f.contrast * bright[c] + f.contrast_rest, f.bound);
      through_mean = through_mean + grad[c];
      grad[c] = f.contrast * grad[c];
    }
  return through_mean;
}
// Takes it the rest of the way, through the mean and brightness. `through_mean` is the gradient of the mean
// over the number of pixels.
template <int kChannels, class V>
FR_HD void brightness_backward(const ColourFactors<V>& f, int steps, const V* image, V through_mean,
                               V* grad) {
  const V share[3] = {kChannels == 3 ? V(kGreyRed) : V(1), V(kGreyGreen), V(kGreyBlue)};
  for (int c = 0; c < kChannels; ++c) {
    if (steps & kContrast) grad[c] = grad[c] + share[c] * through_mean;
    if (steps & kBrightness) grad[c] = f.brightness * passed(grad[c], f.brightness * image[c], f.bound);
  }
}

}  // namespace fastreg
