// The geometry of augmentation: where an output pixel lies in the source, and what the source is there. The
// arithmetic of one pixel, the same on both devices.
//
// Coordinates are 64-bit integers in units of 2^-32 pixels. They are exact under addition, so that they are
// the same on every device. They are also far finer than float32's, whose last bit at pixel 224 moves a
// result by 1e-5.
#pragma once
#include "augment_math.h"

namespace fastreg {

// ---- fixed point

constexpr int kFractionBits = 32;
constexpr int64_t kOne = int64_t(1) << kFractionBits, kHalf = kOne / 2;
constexpr int kFarthest = 30;  // a coordinate of 2^30 pixels or more is an error

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
// In units of 2^-kBits, to the nearest, halves away from zero; |x| < 2^(62 - kBits). The bits of x are taken
// apart because GPUs have few units for float64.
template <int kBits = kFractionBits>
FR_HD int64_t to_fixed(double x) {
  const uint64_t bits = double_bits(x), mantissa = (bits & ((uint64_t(1) << 52) - 1)) | uint64_t(1) << 52;
  const int shift = int(bits >> 52 & 0x7ff) - (1023 + 52 - kBits);  // x is the mantissa times 2^shift
  const uint64_t magnitude = shift >= 0    ? mantissa << shift
                             : shift > -54 ? ((mantissa >> (-shift - 1)) + 1) >> 1
                                           : 0;
  return bits >> 63 ? -int64_t(magnitude) : int64_t(magnitude);
}
FR_HD int32_t whole_part(int64_t coordinate) { return int32_t(coordinate >> kFractionBits); }
// For float32 the 24 leading bits, which it holds exactly.
FR_HD void fraction_of(int64_t coordinate, float* out) {
  *out = float(int32_t(uint32_t(coordinate) >> 8)) * 0x1p-24f;
}
FR_HD void fraction_of(int64_t coordinate, double* out) { *out = double(uint32_t(coordinate)) * 0x1p-32; }

// ---- matrices

// Where an output pixel is read from: along x and y of the source, in fixed point.
struct SourcePoint {
  int64_t u, v;
};
struct FixedMatrix {
  int64_t m[6];
  FR_HD SourcePoint at(int64_t x, int64_t y) const {
    return {m[0] * x + m[1] * y + m[2], m[3] * x + m[4] * y + m[5]};
  }
};
// One coefficient of a matrix; one that does not fit becomes too large for within_reach.
FR_HD int64_t fixed_coefficient(double x) { return fits_fixed(x) ? to_fixed(x) : INT64_MAX; }
// False where some output pixel lies too far away, or nowhere at all. A row counts as 16 pixels at least,
// because the CPU makes 16 at a time: the coordinates beyond the end of a narrow row would wrap around and
// seem to lie inside.
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

// ---- nearest

#ifdef __CUDA_ARCH__
#define FR_ROLLED _Pragma("unroll 1")  // so that f stands in the program once
#else
#define FR_ROLLED
#endif
// To the nearest whole number, ties to even. V is a number or a vector of numbers.
template <class V>
FR_HD V nearest_whole(V x, V big) {  // big: 2^23 for float32, 2^52 for float64, from which all are whole
  const V size = maximum(x, V(0) - x), whole = select(size < big, (size + big) - big, size);
  return select(x < V(0), V(0) - whole, whole);
}
// A coefficient in units of 2^-kFineBits, of which the lower 64 bits count.
constexpr int kFineBits = 40, kFineLimit = 21;
FR_HD int64_t fine_coefficient(double x) { return fits_fixed(x) ? to_fixed<kFineBits>(x) : 0; }
// The nearest pixel by the arithmetic of torch's grid_sample on the grid of torchvision's affine, both in the
// precision of the pixels: coordinates are in halves of the source's side, from its middle. Of two pixels
// that are equally near, or nearly so, their rounding decides. It is off where output pixels are source
// pixels.
template <class A>
struct NearestGrid {
  static constexpr A kBig = A(sizeof(A) == 8 ? 0x1p52 : 0x1p23), kFar = A(0x1p30);
  int32_t on;
  A middle[2], half[2], row[2][3];

  // `fine` are the coefficients in units of 2^-kFineBits where they fit, for float32.
  FR_HD void set(const FixedMatrix& fixed, const double* m, const int64_t* fine, int64_t width,
                 int64_t height, int64_t out_width, int64_t out_height) {
    on = !is_straight(fixed);
    middle[0] = A(0.5f) * A(out_width - 1);
    middle[1] = A(0.5f) * A(out_height - 1);
    FR_ROLLED
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t n = axis ? height : width, across = out_width - 1, down = out_height - 1;
      half[axis] = A(0.5f) * A(n);
      A* r = row[axis];
      if constexpr (sizeof(A) == 8) {
        const double* c = m + 3 * axis;
        for (int i = 0; i < 2; ++i) r[i] = c[i];
        r[2] = c[2] - 0.5 * double(n - 1) + 0.5 * (c[0] * double(across) + c[1] * double(down));
      } else if (!whole_row<kFractionBits>(fixed.m + 3 * axis, n, across, down, r)) {
        whole_row<kFineBits>(fine + 3 * axis, n, across, down, r);
      }
      for (int i = 0; i < 3; ++i) r[i] /= half[axis];
    }
  }

  // Where an output pixel, or a vector of them, lies, from its place from the middle.
  template <class V>
  FR_HD V position(int axis, V x, A y) const {
    const V u = x * V(row[axis][0]) + V(y * row[axis][1]) + V(row[axis][2]);
    return minimum(V(kFar), maximum(V(-kFar), (u + V(1)) * V(half[axis]) - V(A(0.5f))));
  }
  template <class V>
  FR_HD V nearest(int axis, V x, A y) const {
    return nearest_whole(position(axis, x, y), V(kBig));
  }
  // The centre of that pixel.
  FR_HD SourcePoint at(int64_t x, int64_t y) const {
    SourcePoint found = {};
    FR_ROLLED
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t pixel = int64_t(nearest(axis, A(x) - middle[0], A(y) - middle[1])) * kOne;
      axis ? found.v = pixel : found.u = pixel;
    }
    return found;
  }

 private:
  // A row from whole numbers, because GPUs have few units for float64. Whether some of them is too large for
  // a finer unit.
  template <int kBits>
  static FR_HD bool whole_row(const int64_t* c, int64_t n, int64_t across, int64_t down, A* r) {
    const uint64_t twice = 2 * uint64_t(c[2]) - (uint64_t(n - 1) << kBits) +
                           (uint64_t(c[0]) * uint64_t(across) + uint64_t(c[1]) * uint64_t(down));
    const A unit = A(1) / A(uint64_t(1) << kBits);
    r[0] = A(c[0]) * unit;
    r[1] = A(c[1]) * unit;
    r[2] = A(int64_t(twice)) * (A(0.5f) * unit);
    const A limit = A(1 << kFineLimit);
    return maximum(maximum(r[0], -r[0]), maximum(maximum(r[1], -r[1]), maximum(r[2], -r[2]))) >= limit;
  }
};
// ---- interpolation

template <class V>
FR_HD V lerp(V from, V to, V t) {
  return from + t * (to - from);
}
// Bilinear: down the two columns of neighbours, then across. V is a number or a vector of numbers.
template <class V>
FR_HD V blend_four(V upper_left, V lower_left, V upper_right, V lower_right, V from_top, V from_left) {
  return lerp(lerp(upper_left, lower_left, from_top), lerp(upper_right, lower_right, from_top), from_left);
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

// ---- padding

// The pixel that stands for pixel i of a line of n; -1 for none.
FR_HD int32_t padded(int32_t i, int32_t n, Padding padding) {
  if (i >= 0 && i < n) return i;
  if (padding == Padding::kBorder) return i < 0 ? 0 : n - 1;
  if (padding != Padding::kReflect) return -1;
  const uint32_t period = 2 * uint32_t(n), in_period = uint32_t(i < 0 ? -1 - i : i) % period;
  return int32_t(in_period < uint32_t(n) ? in_period : period - 1 - in_period);
}
// With a fill value; `inside` is the part of the pixel that lies inside the image. torchvision weighs so:
// that part counts for the image twice.
template <class V>
FR_HD V filled(V value, V inside, V fill) {
  return inside * (value - fill) + fill;
}

// ---- taps: one pixel as a weighted sum, whatever the interpolation

// The pixels along one axis that a coordinate takes its value from, and their weights. Each is computed when
// it is asked for: on a GPU an array that is not indexed by constants lies in memory.
template <class A>
struct Taps {
  int count;
  int32_t first, n;
  Padding padding;
  A t;

  FR_HD Taps(int64_t coordinate, int64_t n, Interpolation interpolation, Padding padding)
      : n(int32_t(n)), padding(padding) {
    count = interpolation == Interpolation::kNearest ? 1 : interpolation == Interpolation::kBilinear ? 2 : 4;
    first = whole_part(coordinate) - (count == 4);
    fraction_of(coordinate, &t);
  }
  FR_HD int32_t pixel(int i) const { return padded(first + i, n, padding); }  // -1: none
  FR_HD A weight(int i) const {
    return count == 1 ? A(1) : count == 2 ? (i ? t : A(1) - t) : cubic_weight(i, t);
  }
};
// f(line, column, weight) for each pixel of the taps of two axes that lies inside.
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
// The part of a pixel that lies inside the image; exactly 1 where all of it does.
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

}  // namespace fastreg
