// Augmentation of a batch of images in one pass. Of output pixel (x, y) of a sample:
//
//   position   (u, v) = M (x, y, 1), M the sample's inverse matrix, in pixels, the first pixel's centre at 0
//   geometry   the image at (u, v): nearest, bilinear, or bicubic with a = -0.75 (Keys 1981), as in torch's
//   grid_sample brightness p <- clamp(f p) contrast   p <- clamp(f p + (1 - f) mean of grey over the whole
//   output image at this point) saturation p <- clamp(f p + (1 - f) grey), grey = 0.2989 r + 0.587 g + 0.114
//   b hue        p <- hsv^-1(h + f, s, v) blur       separable, the border reflected without repeating the
//   edge normalise  (p - mean) / std, as a scale and a shift erase      a constant inside a box
//
// Each step is torchvision.transforms.v2.functional's of the same name. Pixels lie in [0, bound], bound = 1,
// or 255 for uint8. An output of uint8 is rounded after each step as torchvision rounds it; every other one
// only once, at the end.
//
// Positions are 64-bit integers in units of 2^-32 pixels: exact under addition, so that they are the same on
// every device and far finer than float32's, whose last bit at pixel 224 alone moves a result by 1e-5.
#pragma once
#include <cmath>
#include <cstdint>

#include "../common/device.h"
#include "../common/isa.h"

namespace fastreg {

enum class PixelType : int { kFloat32, kFloat64, kFloat16, kBFloat16, kUInt8 };
enum class Interpolation : int { kNearest, kBilinear, kBicubic };
enum class Padding : int { kZeros, kBorder, kReflect, kFill };
enum ColourStep : int { kBrightness = 1, kContrast = 2, kSaturation = 4, kHue = 8 };
enum ColourColumn { kBrightnessColumn, kContrastColumn, kSaturationColumn, kHueColumn, kColourColumns };

struct AugmentArgs {
  PixelType in_type, out_type;
  int64_t batch, channels, in_height, in_width, out_height, out_width;
  const void* images;
  void* output;
  int64_t in_stride[4], out_stride[4];  // of sample, channel, row, pixel
  const double* matrices;  // (batch, 2, 3), or null: output and input have one shape and there is no geometry
  const double* colour;    // (batch, 4), or null
  const double* blur;      // (batch, blur_width + blur_height) weights, or null
  const int64_t* boxes;    // (batch, 4): top, left, height, width; or null
  const int64_t* windows;  // (batch, 4), the part of a sample's image that is the image; or null
  const double* constants;  // (4, channels): fill, erased value, scale, shift
  int64_t blur_width, blur_height;
  int colour_steps;  // of ColourStep
  Interpolation interpolation;
  Padding padding;
  bool antialias, normalise;
  // backward: output is the images' gradient, images are what they were
  const void* grad;
  int64_t grad_stride[4];
  void* scratch;  // on CUDA, of as many bytes as the launcher asks for
};

// The part of a sample's image that is the image.
struct Window {
  int64_t top, left, height, width;
  FR_HD bool lies_inside(int64_t in_height, int64_t in_width) const {
    return top >= 0 && left >= 0 && height > 0 && width > 0 && height <= in_height - top &&
           width <= in_width - left;
  }
};
FR_HD Window window_of(const AugmentArgs& a, int64_t sample) {
  if (!a.windows) return {0, 0, a.in_height, a.in_width};
  const int64_t* window = a.windows + 4 * sample;
  return {window[0], window[1], window[2], window[3]};
}

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

// ---- geometry

constexpr int kFractionBits = 32;
constexpr int64_t kOne = int64_t(1) << kFractionBits, kHalf = kOne / 2;
constexpr int kFarthest = 30;  // positions of 2^30 pixels and more are an error

FR_HD uint64_t double_bits(double x) {
  uint64_t u;
  memcpy(&u, &x, 8);
  return u;
}
// Whether |x| < 2^kBits; false for a NaN.
template <int kBits = kFarthest>
FR_HD bool fits_fixed(double x) {
  return int(double_bits(x) >> 52 & 0x7ff) < 1023 + kBits;
}
// In units of 2^-kBits, to the nearest, halves away from zero; |x| < 2^(62 - kBits). From the bits, for GPUs
// compute little in float64.
template <int kBits = kFractionBits>
FR_HD int64_t to_fixed(double x) {
  const uint64_t bits = double_bits(x), mantissa = (bits & ((uint64_t(1) << 52) - 1)) | uint64_t(1) << 52;
  const int shift = int(bits >> 52 & 0x7ff) - (1023 + 52 - kBits);  // x is the mantissa times 2^shift
  const uint64_t magnitude = shift >= 0    ? mantissa << shift
                             : shift > -54 ? ((mantissa >> (-shift - 1)) + 1) >> 1
                                           : 0;
  return bits >> 63 ? -int64_t(magnitude) : int64_t(magnitude);
}

struct Position {
  int64_t u, v;
};
struct FixedMatrix {
  int64_t m[6];
  FR_HD Position at(int64_t x, int64_t y) const {
    return {m[0] * x + m[1] * y + m[2], m[3] * x + m[4] * y + m[5]};
  }
};
// One coefficient of a matrix; one that does not fit is too far away for within_reach.
FR_HD int64_t fixed_coefficient(double x) { return fits_fixed(x) ? to_fixed(x) : INT64_MAX; }
// False where some output pixel lies too far away, or nowhere at all. A row counts as 16 pixels at least,
// which the CPU makes at a time: beyond the end of a narrow one positions would wrap around and seem to lie
// inside.
FR_HD bool within_reach(const FixedMatrix& matrix, int64_t out_height, int64_t out_width) {
  const float width = float(out_width < 16 ? 16 : out_width), height = float(out_height);
  const auto size = [](int64_t x) { return float(x < 0 ? -x : x) * 0x1p-32f; };
  bool fits = true;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t* m = matrix.m + 3 * axis;
    fits = fits && size(m[0]) * width + size(m[1]) * height + size(m[2]) < float(1 << kFarthest);
  }
  return fits;
}
FR_HD bool fixed_matrix(const double* matrix, int64_t out_height, int64_t out_width, FixedMatrix* fixed) {
  for (int i = 0; i < 6; ++i) fixed->m[i] = fixed_coefficient(matrix[i]);
  return within_reach(*fixed, out_height, out_width);
}
// Whether output pixels are source pixels, in rows from left to right or back.
FR_HD bool is_straight(const FixedMatrix& matrix) {
  const int64_t* m = matrix.m;
  return (m[0] == kOne || m[0] == -kOne) && m[1] == 0 && m[3] == 0 && (m[4] == kOne || m[4] == -kOne) &&
         uint32_t(m[2]) == 0 && uint32_t(m[5]) == 0;
}
FR_HD int32_t whole_part(int64_t position) { return int32_t(position >> kFractionBits); }
// The 24 leading bits for float32.
FR_HD void fraction_of(int64_t position, float* out) {
  *out = float(int32_t(uint32_t(position) >> 8)) * 0x1p-24f;
}
FR_HD void fraction_of(int64_t position, double* out) { *out = double(uint32_t(position)) * 0x1p-32; }
FR_HD int32_t nearest_pixel(int64_t position) {  // ties to even, as nearbyint
  return int32_t((position + kHalf - 1 + (position >> kFractionBits & 1)) >> kFractionBits);
}

template <class V>
FR_HD V lerp(V from, V to, V t) {
  return from + t * (to - from);
}
// Keys' cubic with a = -0.75, at a distance of at most 1, and of 1 to 2.
template <class V>
FR_HD V cubic_near(V x) {
  return (V(1.25) * x - V(2.25)) * x * x + V(1);
}
template <class V>
FR_HD V cubic_far(V x) {
  return ((V(-0.75) * x + V(3.75)) * x - V(6)) * x + V(3);
}
template <class V>
FR_HD V cubic_weight(int tap, V t) {  // of taps -1, 0, 1, 2 at a distance of t from tap 0
  return tap == 0   ? cubic_far(t + V(1))
         : tap == 1 ? cubic_near(t)
         : tap == 2 ? cubic_near(V(1) - t)
                    : cubic_far(V(2) - t);
}
// The pixel that stands for pixel i of a line of n; -1 for none.
FR_HD int32_t padded(int32_t i, int32_t n, Padding padding) {
  if (i >= 0 && i < n) return i;
  if (padding == Padding::kBorder) return i < 0 ? 0 : n - 1;
  if (padding != Padding::kReflect) return -1;
  const uint32_t period = 2 * uint32_t(n), in_period = uint32_t(i < 0 ? -1 - i : i) % period;
  return int32_t(in_period < uint32_t(n) ? in_period : period - 1 - in_period);
}
// The pixels along one axis that a position takes its value from, and their shares. Each is made when it is
// asked for: on a GPU an array that is not indexed by constants lies in memory.
template <class A>
struct Taps {
  int count;
  int32_t first, n;
  Padding padding;
  A t;

  FR_HD Taps(int64_t position, int64_t n, Interpolation interpolation, Padding padding)
      : n(int32_t(n)), padding(padding) {
    count = interpolation == Interpolation::kNearest ? 1 : interpolation == Interpolation::kBilinear ? 2 : 4;
    first = count == 1 ? nearest_pixel(position) : whole_part(position) - (count == 4);
    fraction_of(position, &t);
  }
  FR_HD int32_t pixel(int i) const { return padded(first + i, n, padding); }  // -1: none
  FR_HD A weight(int i) const {
    return count == 1 ? A(1) : count == 2 ? (i ? t : A(1) - t) : cubic_weight(i, t);
  }
};
#ifdef __CUDA_ARCH__
#define FR_ROLLED _Pragma("unroll 1")  // f stands in the program once
#else
#define FR_ROLLED
#endif
// f(line, column, weight) for each pixel of two axes' taps that lies inside.
template <class A, class F>
FR_HD void for_each_tap(const Taps<A>& lines, const Taps<A>& columns, F f) {
  FR_ROLLED
  for (int i = 0; i < lines.count; ++i) {
    FR_ROLLED
    for (int k = 0; k < columns.count; ++k) {
      const int32_t line = lines.pixel(i), column = columns.pixel(k);
      if (line >= 0 && column >= 0) f(line, column, lines.weight(i) * columns.weight(k));
    }
  }
}
#undef FR_ROLLED
// The part of a pixel that lies inside the image; 1 where all of it does.
template <class A>
FR_HD A inside_share(const Taps<A>& lines, const Taps<A>& columns) {
  A inside = 0;
  int count = 0;
  for_each_tap(lines, columns, [&](int32_t, int32_t, A weight) {
    inside += weight;
    ++count;
  });
  return count == lines.count * columns.count ? A(1) : inside;
}
// torchvision weighs a fill value so: the part of a pixel that lies inside the image counts for the image
// twice.
template <class V>
FR_HD V filled(V value, V inside, V fill) {
  return inside * (value - fill) + fill;
}

// ---- antialiasing: first the image on a coarser grid, every pixel of which is a weighted mean, then the
// warp from there

// Pixel i of a grid lies at start + step * i of the source. Where the warp is but a shrinking, the grid is
// the output's and nothing is left to warp.
struct Shrink {
  bool on;
  int64_t size[2];  // width, height
  int64_t start[2], step[2];
  FixedMatrix rest;  // from there
};
// Of a matrix that fits. float64, once a sample.
FR_HD Shrink shrink_of(const double* m, int64_t in_height, int64_t in_width, int64_t out_height,
                       int64_t out_width, Interpolation interpolation) {
  Shrink s = {};
  if (interpolation == Interpolation::kNearest) return s;
  const int64_t in[2] = {in_width, in_height}, out[2] = {out_width, out_height};
  const bool straight = m[1] == 0 && m[3] == 0;
  double rest[6];
  for (int axis = 0; axis < 2; ++axis) {
    const double across = m[3 * axis], down = m[3 * axis + 1],
                 shrinks = std::sqrt(across * across + down * down);
    // torch's cubic is another one with antialiasing, whether it shrinks or not.
    s.on = s.on || shrinks > (straight ? (interpolation == Interpolation::kBicubic ? 0 : 1) : 2);
    double step, start;
    if (straight) {
      s.size[axis] = out[axis];
      step = m[4 * axis];
      start = m[3 * axis + 2];
      for (int i = 0; i < 3; ++i) rest[3 * axis + i] = i == axis ? 1 : 0;
    } else {
      s.size[axis] = shrinks > 2 ? int64_t(std::ceil(double(in[axis]) / shrinks)) : in[axis];
      step = double(in[axis]) / double(s.size[axis]);
      start = 0.5 * step - 0.5;
      for (int i = 0; i < 3; ++i)
        rest[3 * axis + i] = (m[3 * axis + i] + (i == 2 ? 0.5 : 0)) / step - (i == 2 ? 0.5 : 0);
    }
    s.start[axis] = to_fixed(start);
    s.step[axis] = to_fixed(step);
  }
  s.on = s.on && fixed_matrix(rest, out_height, out_width, &s.rest);
  return s;
}

// Of a sample; off where its matrix or its window is no good.
FR_HD Shrink shrink_of(const AugmentArgs& a, int64_t sample) {
  if (!a.antialias || !a.matrices) return {};
  const double* matrix = a.matrices + 6 * sample;
  const Window window = window_of(a, sample);
  FixedMatrix unused;
  if (!window.lies_inside(a.in_height, a.in_width) ||
      !fixed_matrix(matrix, a.out_height, a.out_width, &unused))
    return {};
  return shrink_of(matrix, window.height, window.width, a.out_height, a.out_width, a.interpolation);
}

// Along one axis, as torch's interpolate(antialias=True) has it: a triangle, or Keys' cubic with a = -0.5, as
// wide as the step, cut off at the image's edges and brought to sum 1.
template <class A>
struct Filter {
  int64_t n, start, step, support;
  A per_unit;  // of the filter's own width, 2^-32 source pixels
  Interpolation interpolation;
  Padding padding;

  Filter() = default;
  FR_HD Filter(const Shrink& s, int axis, int64_t n, Interpolation interpolation, Padding padding)
      : n(n), start(s.start[axis]), step(s.step[axis]), interpolation(interpolation), padding(padding) {
    const int64_t widest = int64_t(1) << 60, size = step < 0 ? -step : step;
    const int64_t scale = size < kOne ? kOne : size < widest ? size : widest;
    support = interpolation == Interpolation::kBicubic ? 2 * scale : scale;
    per_unit = A(1) / A(scale);
  }
  // Source pixels [first, last) that make up pixel i of the grid; none outside of the image, where the
  // padding fills.
  struct Span {
    int32_t first, last;
    int64_t centre;  // from the left edge of the first pixel
  };
  FR_HD Span span(int64_t i) const {
    int64_t centre = start + step * i + kHalf;
    const int64_t length = n << kFractionBits;
    if (centre < 0 || centre > length) {
      if (padding == Padding::kZeros || padding == Padding::kFill) return {0, 0, 0};
      if (padding == Padding::kReflect) {
        centre = centre < 0 ? -centre : centre;
        const uint32_t whole = uint32_t(centre >> kFractionBits) % (2 * uint32_t(n));
        centre = int64_t(whole) << kFractionBits | (centre & (kOne - 1));
        centre = centre > length ? 2 * length - centre : centre;
      }
      centre = centre < 0 ? 0 : centre > length ? length : centre;
    }
    const int64_t first = (centre - support + kHalf) >> kFractionBits,
                  last = (centre + support + kHalf) >> kFractionBits;
    return {int32_t(first < 0 ? 0 : first), int32_t(last < n ? last : n), centre};
  }
  // Of source pixel j, before the sum is brought to 1.
  FR_HD A weight(const Span& span, int64_t j) const {
    const int64_t distance = (j << kFractionBits) - span.centre + kHalf;
    const A x = A(distance < 0 ? -distance : distance) * per_unit;
    if (interpolation != Interpolation::kBicubic) return x < A(1) ? A(1) - x : A(0);
    return x < A(1)   ? (A(1.5) * x - A(2.5)) * x * x + A(1)
           : x < A(2) ? ((A(-0.5) * x + A(2.5)) * x - A(4)) * x + A(2)
                      : A(0);
  }
  FR_HD A total(const Span& span) const {
    A sum = 0;
    for (int32_t j = span.first; j < span.last; ++j) sum += weight(span, j);
    return sum;
  }
};

// ---- colour

template <class V>
FR_HD V quantised(V x, V bound) {  // as torchvision after a warp and after a blur
  return clamp(round_even(x), bound);
}
template <bool kQuantise, class V>
FR_HD V grey_of(V r, V g, V b) {
  const V grey = r * V(0.2989) + g * V(0.587) + b * V(0.114);
  return kQuantise ? floor_small(grey) : grey;
}
template <bool kQuantise, class V>
FR_HD V brightness_element(V x, V factor, V bound) {
  const V y = clamp(x * factor, bound);
  return kQuantise ? floor_small(y) : y;
}
template <bool kQuantise, class V>
FR_HD V blend_element(V x, V rest, V factor, V bound) {  // rest: (1 - factor) times what is blended in
  const V y = clamp(x * factor + rest, bound);
  return kQuantise ? floor_small(y) : y;
}
template <class V>
FR_HD V wrap_six(V x) {  // from [-6, 12) to [0, 6)
  x = select(x < V(0.f), x + V(6.f), x);
  return select(x < V(6.f), x, x - V(6.f));
}
// The colour wheel in units of a sixth. Of a channel n sixths away (5 for red, 3 for green, 1 for blue), with
// k = n + h mod 6: v - (v - min) max(0, min(k, 4 - k, 1)), which is hsv_to_rgb without its six cases.
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
  if (kQuantise) {  // by way of [0, 1], of which the last 256th is 255
    const V stretch(255.999f / 255.f);
    r = floor_small(r * stretch);
    g = floor_small(g * stretch);
    b = floor_small(b * stretch);
  }
}

// 1 - x rounded once: torchvision has it from Python's float64.
FR_HD double one_minus(double x, double) { return 1 - x; }
FR_HD float one_minus(double x, float) {
  if (!fits_fixed<9>(x)) return 1 - float(x);
  return float((int64_t(1) << 52) - to_fixed<52>(x)) * 0x1p-52f;
}
// The factors of a sample, in A or in vectors of A; `bound` is what an image's values are clamped at.
template <class V>
struct ColourFactors {
  V bound, brightness, contrast, contrast_rest, saturation, saturation_rest, hue;

  ColourFactors() = default;
  template <class A>
  FR_HD ColourFactors(const double* factor, A bound, A mean)  // of a row of the table, and the mean of grey
      : bound(bound),
        brightness(A(factor[kBrightnessColumn])),
        contrast(A(factor[kContrastColumn])),
        contrast_rest(one_minus(factor[kContrastColumn], A()) * mean),
        saturation(A(factor[kSaturationColumn])),
        saturation_rest(one_minus(factor[kSaturationColumn], A())),
        hue(A(6) * A(factor[kHueColumn])) {}
};
// The chosen steps of one pixel. Saturation and hue of one channel are what they were.
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
// The mean of `count` values whose sum is high + low; low is no number where the sum is infinite.
template <class A>
FR_HD A mean_of(A high, A low, A count) {
  return low == low ? high / count + low / count : high / count;
}

// The gradient of clamp: where it changed nothing.
template <class A>
FR_HD A passed(A grad, A before, A bound) {
  return before >= A(0) && before <= bound ? grad : A(0);
}
// The gradient of a pixel of 1 or 3 channels back through saturation and contrast; `image` is what it was
// before brightness. Gives what this pixel adds to the gradient of the mean, but for the factor 1 - contrast.
template <int kChannels, class A>
FR_HD A blends_backward(const ColourFactors<A>& f, int steps, const A* image, A* grad) {
  const A share[3] = {A(0.2989), A(0.587), A(0.114)};
  A bright[kChannels];
  for (int c = 0; c < kChannels; ++c)
    bright[c] = steps & kBrightness ? brightness_element<false>(image[c], f.brightness, f.bound) : image[c];
  if (kChannels == 3 && steps & kSaturation) {
    A x[kChannels], grey = 0, through_grey = 0;
    for (int c = 0; c < kChannels; ++c) {
      x[c] = steps & kContrast ? blend_element<false>(bright[c], f.contrast_rest, f.contrast, f.bound)
                               : bright[c];
      grey += share[c] * x[c];
    }
    for (int c = 0; c < kChannels; ++c) {
      grad[c] = passed(grad[c], f.saturation * x[c] + f.saturation_rest * grey, f.bound);
      through_grey += f.saturation_rest * grad[c];
    }
    for (int c = 0; c < kChannels; ++c) grad[c] = f.saturation * grad[c] + share[c] * through_grey;
  }
  A through_mean = 0;
  for (int c = 0; c < (steps & kContrast ? kChannels : 0); ++c) {
    grad[c] = passed(grad[c], f.contrast * bright[c] + f.contrast_rest, f.bound);
    through_mean += grad[c];
    grad[c] = f.contrast * grad[c];
  }
  return through_mean;
}
// The rest of the way, given the gradient of the mean over the number of pixels.
template <int kChannels, class A>
FR_HD void brightness_backward(const ColourFactors<A>& f, int steps, const A* image, A through_mean,
                               A* grad) {
  const A share[3] = {kChannels == 3 ? A(0.2989) : A(1), A(0.587), A(0.114)};
  for (int c = 0; c < kChannels; ++c) {
    if (steps & kContrast) grad[c] += share[c] * through_mean;
    if (steps & kBrightness) grad[c] = f.brightness * passed(grad[c], f.brightness * image[c], f.bound);
  }
}

// ---- blur

// Pixel i of a line of n, reflected about the edge pixels' centres; lines shorter than the kernel are
// reflected again.
FR_HD int64_t mirrored(int64_t i, int64_t n) {
  i = i < 0 ? -i : i;
  i = i < n ? i : 2 * (n - 1) - i;
  if (i >= 0) return i;
  if (n == 1) return 0;
  const uint32_t period = 2 * uint32_t(n - 1), in_period = uint32_t(-i) % period;
  return in_period < uint32_t(n) ? in_period : period - in_period;
}

// ---- kernels on rows [begin, end) of one sample

// Memory that a sample, or a thread, works in. Sizes by the functions of the table.
struct AugmentScratch {
  void* source;  // the images' planes, where they cannot be read as they are
  void* image;   // warped and brightened, where contrast needs their mean first
  void* sums;    // of grey, by row
  void* rows;    // of one thread
};

struct AugmentKernels {
  int64_t (*source_bytes)(const AugmentArgs&);  // 0 where there is no such stage
  int64_t (*source_rows)(const AugmentArgs&);
  int64_t (*image_bytes)(const AugmentArgs&);
  int64_t (*rows_bytes)(const AugmentArgs&);
  int64_t (*backward_bytes)(const AugmentArgs&);
  void (*source)(const AugmentArgs&, const AugmentScratch&, int64_t sample, int64_t begin,
                 int64_t end);  // rows of the source
  void (*prepare)(const AugmentArgs&, const AugmentScratch&, int64_t sample, int64_t begin, int64_t end);
  void (*finish)(const AugmentArgs&, const AugmentScratch&, int64_t sample, int64_t begin, int64_t end);
  void (*backward)(const AugmentArgs&, void* scratch, int64_t sample);
};
FR_DECLARE_KERNELS(AugmentKernels, augment_kernels)

// ---- launches, each of which gives a cudaError_t

int64_t augment_cuda_bytes(
    const AugmentArgs& args);  // of scratch; negative where the blur's kernel is too large
int augment_cuda(const AugmentArgs& args, void* stream);
int64_t augment_backward_cuda_bytes(const AugmentArgs& args);
int augment_backward_cuda(const AugmentArgs& args, void* stream);

}  // namespace fastreg
