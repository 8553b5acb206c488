// The resampling of augmentation on CUDA: one output pixel, C channels at once, of an image or of a shrunken
// image. Part of augment_cuda.cu.
#pragma once
#include "augment_pass_cuda.h"

namespace fastreg {
inline namespace augment_kernels {

// ---- the pixels that are resampled

// The pixels of an image of T.
template <class T>
struct Image {
  using A = typename Accumulate<T>::type;
  static constexpr bool kBytes = std::is_same_v<T, uint8_t>, kShrinks = false;
  // Blocks at once on a multiprocessor, for which the registers must do: of kernels that make a pixel and
  // forget it, and of those that keep more alive around it.
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
      p[c] = blend_four(A(load_float(upper[0])), A(load_float(lower[0])), A(load_float(upper[pixel])),
                        A(load_float(lower[pixel])), from_top, from_left);
  }
};

// The pixels of the shrunken image where the sample shrinks, and of the image itself where it does not. The
// image may have any type; the pixels of a shrunken image are made each time that they are asked for.
template <class Accumulated>
struct Shrunken {
  using A = Accumulated;
  static constexpr bool kBytes = std::is_same_v<A, float>, kShrinks = true;
  static constexpr int kBlocks = sizeof(A) == 8 ? 1 : 2, kLoopBlocks = kBlocks;
  const Pass<A>& pass;
  const Sample<A>& s;
  int channel;

  __device__ Shrunken(const Pass<A>& pass, const Sample<A>& s, int channel)
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
    typename Filter<A>::Range columns = {x, x + 1, 0}, lines = {y, y + 1, 0};
    if (s.shrinks) {
      columns = s.columns.range(x);
      lines = s.rows.range(y);
    }
    if (columns.last <= columns.first || lines.last <= lines.first) {
#pragma unroll
      for (int c = 0; c < C; ++c) p[c] = pass.fill[channel + c];
      return;
    }
    A across = 0, down = 0, sum[C] = {};
#pragma unroll 1
    for (int32_t j = columns.first; j < columns.last; ++j) {
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
    for (int c = 0; c < C; ++c) p[c] = sum[c] / (down * across);
  }
};

// ---- interpolation

template <int C, class P, class A>
__device__ __forceinline__ void bilinear_pixel(const Sample<A>& s, const P& pixels, Padding padding,
                                               const A* fill, SourcePoint at, A (&p)[C]) {
  A t, from_top, upper[C], left[C];
  fraction_of(at.u, &t);
  fraction_of(at.v, &from_top);
  if constexpr (!P::kShrinks) {
    const int32_t x = whole_part(at.u), y = whole_part(at.v);
    if (x >= 0 && x < s.width - 1 && y >= 0 && y < s.height - 1) return pixels.between(y, x, from_top, t, p);
  }
  // At the border, and of a shrunken image, this is blend_four taken apart: a loop makes one neighbour after
  // the other, column by column. So the code of a neighbour stands in the program once, and no more than two
  // of them are in registers.
  int there = 0;
#pragma unroll 1
  for (int tap = 0; tap < 4; ++tap) {
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
  const A inside = blend_four(is_there(0), is_there(1), is_there(2), is_there(3), from_top, t);
#pragma unroll
  for (int c = 0; c < C; ++c) p[c] = filled(p[c], inside, fill[c]);
}

template <int C, class P, class A>
__device__ __forceinline__ void bicubic_pixel(const Sample<A>& s, const P& pixels, Padding padding,
                                              const A* fill, SourcePoint at, A (&p)[C]) {
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

// Output pixel (x, y) after the geometry; NaN where the matrix or the window of the sample is not usable.
template <int C, class P, class A>
__device__ __forceinline__ void resampled_pixel(const Pass<A>& pass, const Sample<A>& s, const P& pixels,
                                                int channel, int32_t x, int32_t y, A (&p)[C]) {
  const Padding padding = pass.a.padding;
  const A* fill = pass.fill + channel;
  if (!s.valid) {
    for (int c = 0; c < C; ++c) p[c] = A(NAN);
    return;
  }
  const SourcePoint at = s.at(x, y);
  if (s.one_pixel) {
    const int32_t line = padded(whole_part(at.v), s.height, padding),
                  column = padded(whole_part(at.u), s.width, padding);
    if (line >= 0 && column >= 0) return pixels.get(line, column, p);
    for (int c = 0; c < C; ++c) p[c] = fill[c];
  } else if (pass.a.interpolation == Interpolation::kBilinear) {
    bilinear_pixel(s, pixels, padding, fill, at, p);
  } else {
    bicubic_pixel(s, pixels, padding, fill, at, p);
  }
}

}  // namespace augment_kernels
}  // namespace fastreg
