// The filters of augmentation: antialiasing before the resampling, and the border of the blur after the
// colours. The arithmetic of one pixel, the same on both devices.
//
// With antialias an image that the matrix makes smaller is first shrunk: each pixel of the shrunken image is
// a weighted mean of source pixels, as in torch's interpolate(antialias=True). The resampling goes on from
// there.
#pragma once
#include "augment_geometry.h"

namespace fastreg {

// ---- antialiasing

// How the image of a sample is shrunk. Along an axis, the centre of pixel i of the shrunken image lies at
// start + step * i of the source, in units of 2^-32 pixels. Without a rotation or a shear the shrunken image
// has the pixels of the output, and nothing is left to resample.
struct Shrink {
  bool on;
  int64_t size[2];  // width, height
  int64_t start[2], step[2];
  FixedMatrix rest;  // from the output's pixels to those of the shrunken image
};
// The matrix must fit (fixed_matrix). This is computed in float64, once for each sample.
FR_HD Shrink shrink_of(const double* m, int64_t in_height, int64_t in_width, int64_t out_height,
                       int64_t out_width, Interpolation interpolation) {
  Shrink s = {};
  if (interpolation == Interpolation::kNearest) return s;
  const int64_t in[2] = {in_width, in_height}, out[2] = {out_width, out_height};
  const bool aligned = m[1] == 0 && m[3] == 0;  // without a rotation or a shear
  double rest[6];
  for (int axis = 0; axis < 2; ++axis) {
    // How far the source's coordinate moves from one output pixel to the next, across and down; and both.
    const double across = m[3 * axis], down = m[3 * axis + 1],
                 shrinks = std::sqrt(across * across + down * down);
    // torch's cubic has another coefficient with antialias than without, also where nothing shrinks. Bicubic
    // therefore always filters an aligned image.
    s.on = s.on || shrinks > (aligned ? (interpolation == Interpolation::kBicubic ? 0 : 1) : 2);
    double step, start;
    if (aligned) {
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

// The shrinking of a sample; it is off where the matrix or the window of the sample is not usable.
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

// The filter along one axis is a triangle, or Keys' cubic with a = -0.5. It is stretched by the step, cut off
// at the edges of the image, and its weights are divided by their sum. Lengths are in units of 2^-32 source
// pixels, except n, which is in pixels.
template <class A>
struct Filter {
  int64_t n, start, step;
  int64_t support;  // from the centre to where the filter ends
  A per_unit;       // turns a distance from the centre into one of the filter that is not stretched
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
  // Source pixels [first, last). There are none where the centre lies outside of the image and the padding is
  // zeros or a fill.
  struct Range {
    int32_t first, last;
    int64_t centre;  // of the filter, from the left edge of the image's first pixel
  };
  // The source pixels that pixel i of the shrunken image is made of.
  FR_HD Range range(int64_t i) const {
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
  // The weight of source pixel j, before it is divided by the sum.
  FR_HD A weight(const Range& range, int64_t j) const {
    const int64_t distance = (j << kFractionBits) - range.centre + kHalf;
    const A x = A(distance < 0 ? -distance : distance) * per_unit;
    if (interpolation != Interpolation::kBicubic) return x < A(1) ? A(1) - x : A(0);
    return x < A(1)   ? (A(1.5) * x - A(2.5)) * x * x + A(1)
           : x < A(2) ? ((A(-0.5) * x + A(2.5)) * x - A(4)) * x + A(2)
                      : A(0);
  }
  // That sum.
  FR_HD A total(const Range& range) const {
    A sum = 0;
    for (int32_t j = range.first; j < range.last; ++j) sum += weight(range, j);
    return sum;
  }
};

// ---- blur

// Pixel i of a line of n, reflected about the centres of the edge pixels; a line shorter than the kernel is
// reflected again.
FR_HD int64_t mirrored(int64_t i, int64_t n) {
  i = i < 0 ? -i : i;
  i = i < n ? i : 2 * (n - 1) - i;
  if (i >= 0) return i;
  if (n == 1) return 0;
  const uint32_t period = 2 * uint32_t(n - 1), in_period = uint32_t(-i) % period;
  return in_period < uint32_t(n) ? in_period : period - in_period;
}

}  // namespace fastreg
