// The colours of augmentation on CUDA: one output pixel after geometry and colour, and the sums of grey. Part
// of augment_cuda.cu.
#pragma once
#include "augment_geometry_cuda.h"

namespace fastreg {
inline namespace augment_kernels {

template <class P, class A>
__device__ __forceinline__ bool quantises(const Pass<A>& pass) {
  return P::kBytes && pass.a.out_type == PixelType::kUInt8;
}

template <bool kQuantise, int C, class A>
__device__ __forceinline__ void colour_channels(const ColourFactors<A>& factors, int steps, A (&p)[C]) {
  if constexpr (C == 3)
    colour_pixel<kQuantise>(factors, steps, p[0], p[1], p[2]);
  else
    colour_pixel<kQuantise>(factors, steps, p[0]);
}
template <bool kQuantise, int C, class A>
__device__ __forceinline__ A grey_of_channels(const A (&p)[C]) {
  if constexpr (C == 3)
    return grey_of<kQuantise>(p[0], p[1], p[2]);
  else
    return p[0];
}

template <int C, class P, class A>
__device__ __forceinline__ void coloured_pixel(const Pass<A>& pass, const Sample<A>& s, const P& pixels,
                                               int channel, int32_t x, int32_t y, int steps, A (&p)[C]) {
  resampled_pixel(pass, s, pixels, channel, x, y, p);
  if (quantises<P>(pass)) {
    if (pass.a.matrices)
      for (int c = 0; c < C; ++c) p[c] = quantised(p[c], A(255));
    colour_channels<P::kBytes>(s.factors, steps, p);
  } else {
    colour_channels<false>(s.factors, steps, p);
  }
}

// Sums the rows of brightened grey, of which contrast takes the mean. Its pieces are those of sum_rows.
// Bytes per value: the source's, read once.
template <class P, int C, class A = typename P::A>
__global__ void __launch_bounds__(kThreads, P::kLoopBlocks) grey_sums(const Pass<A> pass) {
  __shared__ Sample<A> s;
  const AugmentArgs& a = pass.a;
  for (int64_t item = blockIdx.x; item < pass.items; item += gridDim.x) {
    const auto place = pass.template place<C>(item);
    begin_item<P>(pass, place.sample, false, s);
    const P pixels(pass, s, 0);
    sum_rows(a, place.sample, place.piece, pass.sums, [&](int32_t x, int32_t y) {
      A p[C];
      coloured_pixel(pass, s, pixels, 0, x, y, a.colour_steps & kBrightness, p);
      return quantises<P>(pass) ? grey_of_channels<P::kBytes>(p) : grey_of_channels<false>(p);
    });
  }
}

// ---- the end of a pixel: normalise, erase, store

template <class T, int C, class A>
__device__ __forceinline__ void store_pixel(void* output, int64_t at, int64_t plane, const A (&p)[C]) {
  T* to = static_cast<T*>(output) + at;
#pragma unroll
  for (int c = 0; c < C; ++c, to += plane) store_float(p[c], to);
}

// Normalises, erases and stores the C channels of an output pixel.
template <int C, class A>
__device__ __forceinline__ void emit(const Pass<A>& pass, const Sample<A>& s, int64_t sample, int channel,
                                     int32_t x, int32_t y, A (&p)[C]) {
  const AugmentArgs& a = pass.a;
  const bool erased = s.is_erased(x, y);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (a.normalise) p[c] = p[c] * pass.scale[channel + c] + pass.shift[channel + c];
    if (erased) p[c] = pass.erased[channel + c];
  }
  const int64_t plane = a.out_stride[1];
  const int64_t at = sample * a.out_stride[0] + channel * plane + y * a.out_stride[2] + x * a.out_stride[3];
  if constexpr (std::is_same_v<A, double>)
    store_pixel<double>(a.output, at, plane, p);
  else if (a.out_type == PixelType::kFloat32)
    store_pixel<float>(a.output, at, plane, p);
  else if (a.out_type == PixelType::kFloat16)
    store_pixel<Half>(a.output, at, plane, p);
  else if (a.out_type == PixelType::kBFloat16)
    store_pixel<BFloat16>(a.output, at, plane, p);
  else
    store_pixel<uint8_t>(a.output, at, plane, p);
}

}  // namespace augment_kernels
}  // namespace fastreg
