// What the CUDA kernels of augmentation share: what a launch is given, what a block knows of its sample, and
// the geometry of one output pixel. Part of augment_cuda.cu.
#pragma once
#include <type_traits>

#include "../common/cuda.h"
#include "augment_math.h"

namespace fastreg {
namespace {

constexpr int kMostChannels = 32;  // of a launch, where channels are made alone

// ---- what a launch is given

template <class A>
struct Pass {
  AugmentArgs a;
  int64_t items;  // samples times groups of channels times tiles, which the blocks take in turn
  Divider tiles, groups, across, width;
  const Shrink* shrinks;
  A *sums, *blurred;
  A fill[kMostChannels], erased[kMostChannels], scale[kMostChannels], shift[kMostChannels];

  struct Place {
    int64_t sample, tile;
    int channel;  // the first of the group
  };
  // Groups of C channels; of three there is but one.
  template <int C>
  __device__ __forceinline__ Place place(int64_t item) const {
    const int64_t group = tiles.divide(item), sample = C == 3 ? group : groups.divide(group);
    return {sample, item - group * int64_t(tiles.divisor),
            C == 3 ? 0 : int(group - sample * int64_t(groups.divisor))};
  }
};

// ---- what the threads of a block share of a sample

template <class A>
struct Sample {
  FixedMatrix matrix;
  int64_t offset;         // of the image's first pixel, from the first sample's
  int32_t height, width;  // of what is warped: the image, or the grid
  // Not bool, which the compiler loads together with the bytes after them.
  int32_t valid;      // 0: the matrix or the window is no good, which the host cannot see
  int32_t one_pixel;  // an output pixel is a pixel of the image
  int32_t shrinks;
  int32_t box[4];  // top, left, bottom, right of what is erased
  ColourFactors<A> factors;
  Filter<A> columns, rows;

  __device__ __forceinline__ bool is_erased(int32_t x, int32_t y) const {
    return y >= box[0] && y < box[2] && x >= box[1] && x < box[3];
  }
};

// By the first warp: a lane for each coefficient of the matrix, whose loads would wait for each other, one
// for the rest.
template <bool kShrinks, class A>
__device__ __forceinline__ void set_up(const Pass<A>& pass, int64_t i, A mean, Sample<A>& s) {
  const AugmentArgs& a = pass.a;
  const int lane = threadIdx.x;
  if (lane < 6)
    s.matrix.m[lane] = a.matrices ? fixed_coefficient(a.matrices[6 * i + lane]) : lane % 4 == 0 ? kOne : 0;
  __syncwarp();
  if (lane != 0) return;
  const Window window = window_of(a, i);
  int64_t box[4] = {};
  for (int k = 0; k < (a.boxes ? 4 : 0); ++k) box[k] = a.boxes[4 * i + k];
  s.valid = window.lies_inside(a.in_height, a.in_width) && within_reach(s.matrix, a.out_height, a.out_width);
  s.offset = i * a.in_stride[0] + window.top * a.in_stride[2] + window.left * a.in_stride[3];
  s.height = int32_t(window.height);
  s.width = int32_t(window.width);
  s.shrinks = kShrinks && pass.shrinks && s.valid && pass.shrinks[i].on;
  if (kShrinks)
    s.columns = Filter<A>{};  // read, and thrown away, before it is known whether the sample shrinks
  if (kShrinks) s.rows = Filter<A>{};
  if (kShrinks && s.shrinks) {
    const Shrink& shrink = pass.shrinks[i];
    s.columns = Filter<A>(shrink, 0, window.width, a.interpolation, a.padding);
    s.rows = Filter<A>(shrink, 1, window.height, a.interpolation, a.padding);
    s.width = int32_t(shrink.size[0]);
    s.height = int32_t(shrink.size[1]);
    s.matrix = shrink.rest;
  }
  s.one_pixel = a.interpolation == Interpolation::kNearest || is_straight(s.matrix);
  if (a.colour_steps)
    s.factors =
        ColourFactors<A>(a.colour + kColourColumns * i, A(a.in_type == PixelType::kUInt8 ? 255 : 1), mean);
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t length = axis ? a.out_width : a.out_height, first = box[axis] < length ? box[axis] : length;
    const int64_t last = box[2 + axis] < length - first ? first + box[2 + axis] : length;
    s.box[axis] = int32_t(first < 0 ? 0 : first);
    s.box[2 + axis] = int32_t(last < 0 ? 0 : last);
  }
}

// ---- geometry

// Value i of an array of whatever type.
template <class A>
__device__ __forceinline__ A load_as(PixelType type, const void* values, int64_t i) {
  if constexpr (std::is_same_v<A, double>)
    return static_cast<const double*>(values)[i];
  else
    return type == PixelType::kFloat32    ? static_cast<const float*>(values)[i]
           : type == PixelType::kFloat16  ? load_float(static_cast<const Half*>(values)[i])
           : type == PixelType::kBFloat16 ? load_float(static_cast<const BFloat16*>(values)[i])
                                          : load_float(static_cast<const uint8_t*>(values)[i]);
}

// The pixels that are warped: of an image of T ...
template <class T>
struct Image {
  using A = typename Accumulate<T>::type;
  static constexpr bool kBytes = std::is_same_v<T, uint8_t>, kShrinks = false;
  // At once on a multiprocessor, for which registers must do; of kernels that keep more alive around a pixel.
  static constexpr int kBlocks = sizeof(A) == 8 ? 2 : 4, kLoopBlocks = sizeof(A) == 8 ? 2 : 3;
  const T* data;
  int64_t plane, row, pixel;  // strides

  __device__ Image(const Pass<A>& pass, const Sample<A>& s, int channel)
      : data(static_cast<const T*>(pass.a.images) + s.offset + channel * pass.a.in_stride[1]),
        plane(pass.a.in_stride[1]),
        row(pass.a.in_stride[2]),
        pixel(pass.a.in_stride[3]) {}

  // The C channels of the pixel in line y, column x.
  template <int C>
  __device__ __forceinline__ void get(int32_t y, int32_t x, A (&p)[C]) const {
    const T* at = data + y * row + x * pixel;
#pragma unroll
    for (int c = 0; c < C; ++c, at += plane) p[c] = load_float(*at);
  }

  // Between this pixel and its neighbours to the right and below, all of which are there.
  template <int C>
  __device__ __forceinline__ void between(int32_t y, int32_t x, A from_top, A from_left, A (&p)[C]) const {
    const T* upper = data + y * row + x * pixel;
    const T* lower = upper + row;
#pragma unroll
    for (int c = 0; c < C; ++c, upper += plane, lower += plane)
      p[c] = lerp(lerp(A(load_float(upper[0])), A(load_float(lower[0])), from_top),
                  lerp(A(load_float(upper[pixel])), A(load_float(lower[pixel])), from_top), from_left);
  }
};

// ... or, for antialiasing, of the grid where the sample shrinks, made of an image of whatever type anew each
// time.
template <class Accumulated>
struct Grid {
  using A = Accumulated;
  static constexpr bool kBytes = std::is_same_v<A, float>, kShrinks = true;
  static constexpr int kBlocks = sizeof(A) == 8 ? 1 : 2, kLoopBlocks = kBlocks;
  const Pass<A>& pass;
  const Sample<A>& s;
  int channel;

  __device__ Grid(const Pass<A>& pass, const Sample<A>& s, int channel)
      : pass(pass), s(s), channel(channel) {}

  template <int C>
  __device__ __forceinline__ void image(int32_t y, int32_t x, A (&p)[C]) const {
    const AugmentArgs& a = pass.a;
    const int64_t at = s.offset + channel * a.in_stride[1] + y * a.in_stride[2] + x * a.in_stride[3];
#pragma unroll
    for (int c = 0; c < C; ++c) p[c] = load_as<A>(a.in_type, a.images, at + c * a.in_stride[1]);
  }

  template <int C>
  __device__ __forceinline__ void get(int32_t y, int32_t x, A (&p)[C]) const {
    typename Filter<A>::Span columns = {x, x + 1, 0}, lines = {y, y + 1, 0};
    if (s.shrinks) {
      columns = s.columns.span(x);
      lines = s.rows.span(y);
    }
    const bool there = columns.last > columns.first && lines.last > lines.first;
    A across = 0, down = 0, sum[C] = {};
#pragma unroll 1
    for (int32_t j = columns.first; j < (there ? columns.last : columns.first); ++j) {
      A column[C] = {};
      down = 0;
#pragma unroll 1
      for (int32_t i = lines.first; i < lines.last; ++i) {
        A pixel[C];
        image(i, j, pixel);
        const A weight = s.shrinks ? s.rows.weight(lines, i) : A(1);
        down += weight;
#pragma unroll
        for (int c = 0; c < C; ++c) column[c] += weight * pixel[c];
      }
      const A weight = s.shrinks ? s.columns.weight(columns, j) : A(1);
      across += weight;
#pragma unroll
      for (int c = 0; c < C; ++c) sum[c] += weight * column[c];
    }
#pragma unroll
    for (int c = 0; c < C; ++c) p[c] = there ? sum[c] / (down * across) : pass.fill[channel + c];
  }
};

template <int C, class P, class A>
__device__ __forceinline__ void bilinear_pixel(const Sample<A>& s, const P& pixels, Padding padding,
                                               const A* fill, Position at, A (&p)[C]) {
  A t, from_top, upper[C], left[C];
  fraction_of(at.u, &t);
  fraction_of(at.v, &from_top);
  if constexpr (!P::kShrinks) {
    const int32_t x = whole_part(at.u), y = whole_part(at.v);
    if (x >= 0 && x < s.width - 1 && y >= 0 && y < s.height - 1) return pixels.between(y, x, from_top, t, p);
  }
  int there = 0;
#pragma unroll 1
  for (int tap = 0; tap < 4; ++tap) {  // column by column
    const int32_t line = padded(whole_part(at.v) + (tap & 1), s.height, padding);
    const int32_t column = padded(whole_part(at.u) + (tap >> 1), s.width, padding);
    A pixel[C] = {};
    if (line >= 0 && column >= 0) {
      pixels.get(line, column, pixel);
      there |= 1 << tap;
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
      if ((tap & 1) == 0)
        upper[c] = pixel[c];
      else if (tap == 1)
        left[c] = lerp(upper[c], pixel[c], from_top);
      else
        p[c] = lerp(left[c], lerp(upper[c], pixel[c], from_top), t);
    }
  }
  if (padding != Padding::kFill || there == 15) return;
  const auto is_there = [&](int tap) { return A(there >> tap & 1); };
  const A inside =
      lerp(lerp(is_there(0), is_there(1), from_top), lerp(is_there(2), is_there(3), from_top), t);
#pragma unroll
  for (int c = 0; c < C; ++c) p[c] = filled(p[c], inside, fill[c]);
}

template <int C, class P, class A>
__device__ __forceinline__ void bicubic_pixel(const Sample<A>& s, const P& pixels, Padding padding,
                                              const A* fill, Position at, A (&p)[C]) {
  A t, from_top, inside = 0;
  fraction_of(at.u, &t);
  fraction_of(at.v, &from_top);
  int there = 0;
#pragma unroll
  for (int c = 0; c < C; ++c) p[c] = 0;
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const int32_t line = padded(whole_part(at.v) - 1 + i, s.height, padding);
    const A down = cubic_weight(i, from_top);
    A sum[C] = {};
#pragma unroll(P::kShrinks ? 1 : 4)
    for (int k = 0; k < 4; ++k) {
      const int32_t column = padded(whole_part(at.u) - 1 + k, s.width, padding);
      if (line < 0 || column < 0) continue;
      A pixel[C];
      pixels.get(line, column, pixel);
      const A across = cubic_weight(k, t);
      inside += down * across;
      ++there;
#pragma unroll
      for (int c = 0; c < C; ++c) sum[c] += across * pixel[c];
    }
#pragma unroll
    for (int c = 0; c < C; ++c) p[c] += down * sum[c];
  }
  if (padding != Padding::kFill || there == 16) return;
#pragma unroll
  for (int c = 0; c < C; ++c) p[c] = filled(p[c], inside, fill[c]);
}

// Output pixel (x, y) after the warp; a NaN where the sample is no good.
template <int C, class P, class A>
__device__ __forceinline__ void warped_pixel(const Pass<A>& pass, const Sample<A>& s, const P& pixels,
                                             int channel, int32_t x, int32_t y, A (&p)[C]) {
  const Padding padding = pass.a.padding;
  const A* fill = pass.fill + channel;
  if (!s.valid) {
    for (int c = 0; c < C; ++c) p[c] = A(NAN);
    return;
  }
  const Position at = s.matrix.at(x, y);
  if (s.one_pixel) {
    const int32_t line = padded(nearest_pixel(at.v), s.height, padding),
                  column = padded(nearest_pixel(at.u), s.width, padding);
    if (line >= 0 && column >= 0) return pixels.get(line, column, p);
    for (int c = 0; c < C; ++c) p[c] = fill[c];
  } else if (pass.a.interpolation == Interpolation::kBilinear) {
    bilinear_pixel(s, pixels, padding, fill, at, p);
  } else {
    bicubic_pixel(s, pixels, padding, fill, at, p);
  }
}

}  // namespace
}  // namespace fastreg
