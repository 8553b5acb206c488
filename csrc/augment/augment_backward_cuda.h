// The gradient of augmentation on CUDA, with respect to the images: kernels and launch, the stages in
// reverse. Part of augment_cuda.cu.
//
// Launches, with their bytes per value of float32: the incoming gradient (8); with blur one along each axis
// (8); with contrast or saturation the sums of grey (4, of the images) and one back through both (8, and 4 of
// the images); one back through brightness and the resampling (4, with colour steps 4 of the images, and an
// atomic addition for each tap, most of which meet in the cache); for 16-bit images one that rounds the sums
// (6).
#pragma once
#include "augment_launch_cuda.h"

namespace fastreg {
inline namespace augment_kernels {

// ---- the end

// The gradient as it comes in, before normalisation; 0 where the output was erased. Items: pixels of one
// channel.
template <class A>
__global__ void __launch_bounds__(kThreads) incoming_gradient(const Pass<A> pass, A* out) {
  __shared__ Sample<A> s;
  const AugmentArgs& a = pass.a;
  for (int64_t item = blockIdx.x; item < pass.items; item += gridDim.x) {
    const auto place = pass.template place<1>(item);
    const int channel = place.channel;
    begin_item<Image<A>>(pass, place.sample, false, s);
    for_each_pixel(pass, place.piece, [&](int32_t x, int32_t y) {
      const int64_t i = place.sample * a.grad_stride[0] + channel * a.grad_stride[1] + y * a.grad_stride[2] +
                        x * a.grad_stride[3];
      const A grad = load_as<A>(a.out_type, a.grad, i), scale = a.normalise ? pass.scale[channel] : A(1);
      out[kept_at(a, place.sample, channel, x, y)] = s.is_erased(x, y) ? A(0) : scale * grad;
    });
  }
}

// ---- filter

// The transposed blur along one axis: each pixel collects from those that took from it. Items: pixels of one
// channel.
template <class A>
__global__ void __launch_bounds__(kThreads)
    blur_backward(const Pass<A> pass, const A* in, A* out, bool down) {
  const AugmentArgs& a = pass.a;
  const int64_t size = down ? a.blur_height : a.blur_width, length = down ? a.out_height : a.out_width,
                radius = size / 2;
  const int64_t step = down ? a.out_width : 1;
  A* weight = reinterpret_cast<A*>(dynamic_shared);
  for (int64_t item = blockIdx.x; item < pass.items; item += gridDim.x) {
    const auto place = pass.template place<1>(item);
    __syncthreads();  // no thread is at work on the last item
    load_weights(a, place.sample, down ? a.blur_width : 0, size, weight);
    __syncthreads();
    const int64_t plane = kept_at(a, place.sample, place.channel, 0, 0);
    for_each_pixel(pass, place.piece, [&](int32_t x, int32_t y) {
      const int64_t own = down ? y : x;
      const A* line = in + plane + (down ? x : y * a.out_width);
      const int64_t first = own < radius ? 0 : own - radius,
                    end = own + radius < length ? own + radius + 1 : length;
      A sum = 0;
      for (int64_t i = first; i < end; ++i)
        if (i >= radius && i + radius < length)
          sum += weight[own - i + radius] * line[i * step];
        else  // took from reflected pixels too
          for (int64_t k = 0; k < size; ++k)
            if (mirrored(i + k - radius, length) == own) sum += weight[k] * line[i * step];
      out[plane + y * a.out_width + x] = sum;
    });
  }
}

// ---- colour

// Back through saturation and contrast, in place; of each row what it adds to the gradient of the mean.
// Pieces as sum_rows has them.
template <class A, int C>
__global__ void __launch_bounds__(kThreads, Shrunken<A>::kBlocks)
    blends_backward_rows(const Pass<A> pass, A* grad, A* through_mean) {
  __shared__ Sample<A> s;
  const AugmentArgs& a = pass.a;
  const int64_t plane = a.out_height * a.out_width;
  for (int64_t item = blockIdx.x; item < pass.items; item += gridDim.x) {
    const auto place = pass.template place<C>(item);
    begin_item<Shrunken<A>>(pass, place.sample, true, s);
    const Shrunken<A> pixels(pass, s, 0);
    sum_rows(a, place.sample, place.piece, through_mean, [&](int32_t x, int32_t y) {
      A p[C], g[C], *at = grad + kept_at(a, place.sample, 0, x, y);
      resampled_pixel(pass, s, pixels, 0, x, y, p);
      for (int c = 0; c < C; ++c) g[c] = at[c * plane];
      const A sum = blends_backward<C>(s.factors, a.colour_steps, p, g);
      for (int c = 0; c < C; ++c) at[c * plane] = g[c];
      return sum;
    });
  }
}

// ---- geometry

// Where the gradient of the images is summed: floating point of any strides.
template <class A>
struct Sums {
  A* data;
  int64_t stride[4];
};

// Back through brightness and the resampling: every pixel adds its share to the pixels that it was made of.
template <class A, int C>
__global__ void __launch_bounds__(kThreads, Shrunken<A>::kBlocks)
    resample_backward(const Pass<A> pass, const A* grad, const A* through_mean, const Sums<A> sums) {
  __shared__ Sample<A> s;
  const AugmentArgs& a = pass.a;
  const int64_t plane = a.out_height * a.out_width;
  for (int64_t item = blockIdx.x; item < pass.items; item += gridDim.x) {
    const auto place = pass.template place<C>(item);
    const int channel = place.channel;
    begin_item<Shrunken<A>>(pass, place.sample, false, s);
    if (!s.valid) continue;
    A mean_share = 0;
    if (a.colour_steps & kContrast)
      mean_share = one_minus(a.factor(place.sample, kContrastColumn), A()) *
                   block_mean(through_mean + place.sample * a.out_height, a.out_height, A(plane));
    const Shrunken<A> pixels(pass, s, channel);
    A* to = sums.data + place.sample * sums.stride[0] + channel * sums.stride[1];
    const Window window = window_of(a, place.sample);
    to += window.top * sums.stride[2] + window.left * sums.stride[3];
    const auto add = [&](int32_t line, int32_t column, A weight, const A(&g)[C]) {
      A* at = to + line * sums.stride[2] + column * sums.stride[3];
      for (int c = 0; c < C; ++c) atomicAdd(at + c * sums.stride[1], weight * g[c]);
    };
    for_each_pixel(pass, place.piece, [&](int32_t x, int32_t y) {
      A g[C];
      for (int c = 0; c < C; ++c) g[c] = grad[kept_at(a, place.sample, channel + c, x, y)];
      if (a.colour_steps) {
        A p[C];
        resampled_pixel(pass, s, pixels, channel, x, y, p);
        brightness_backward<C>(s.factors, a.colour_steps, p, mean_share, g);
      }
      const SourcePoint at = s.at(x, y);
      const auto interpolation = s.one_pixel ? Interpolation::kNearest : a.interpolation;
      const Taps<A> lines(at.v, s.height, interpolation, a.padding),
          columns(at.u, s.width, interpolation, a.padding);
      const A inside = a.padding == Padding::kFill ? inside_share(lines, columns) : A(1);
      for_each_tap(lines, columns, [&](int32_t line, int32_t column, A weight) {
        if (weight == A(0)) return;
        weight *= inside;
        if (!s.shrinks) return add(line, column, weight, g);
        const auto across = s.columns.range(column), down = s.rows.range(line);
        weight = weight / (s.rows.total(down) * s.columns.total(across));
        for (int32_t v = down.first; v < down.last; ++v)
          for (int32_t u = across.first; u < across.last; ++u)
            add(v, u, weight * s.columns.weight(across, u) * s.rows.weight(down, v), g);
      });
    });
  }
}

// The sums, (batch, channels, height, width), rounded to the images' dtype.
template <class T>
__global__ void __launch_bounds__(kThreads)
    round_gradient(const AugmentArgs a, const float* sums, Divider width, Divider height, Divider channels,
                   int64_t numel) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < numel;
       i += int64_t(gridDim.x) * kThreads) {
    const int64_t line = width.divide(i), plane = height.divide(line), sample = channels.divide(plane);
    store_float(sums[i], static_cast<T*>(a.output) + sample * a.out_stride[0] +
                             (plane - sample * a.channels) * a.out_stride[1] +
                             (line - plane * a.in_height) * a.out_stride[2] +
                             (i - line * a.in_width) * a.out_stride[3]);
  }
}

// ---- launch

// All kernels for channels [first, first + channels), up to the sums.
template <class A, int C>
int backward_of_channels(const AugmentArgs& a, const Scratch<A>& scratch, const Sums<A>& sums, int first,
                         int channels, void* stream) {
  const int64_t before = first * a.out_height * a.out_width;
  A *grad = skipped(scratch.grad, before), *spare = skipped(scratch.spare, before);
  const Pass<A> by_channel = pass_of(a, scratch, first, channels, channels, pixel_pieces(a));
  if (const int error = launch_pass(incoming_gradient<A>, by_channel, 0, stream, grad)) return error;
  if (a.blur) {
    if (const int error = launch_pass(blur_backward<A>, by_channel, a.blur_height, stream, grad, spare, true))
      return error;
    if (const int error = launch_pass(blur_backward<A>, by_channel, a.blur_width, stream, spare, grad, false))
      return error;
  }
  if (scratch.through_mean) {
    const Pass<A> by_row = pass_of(a, scratch, first, channels, channels / C, row_pieces<A>(a));
    if (const int error =
            launch_pass(blends_backward_rows<A, C>, by_row, 0, stream, grad, scratch.through_mean))
      return error;
  }
  Sums<A> part = sums;
  part.data += first * sums.stride[1];
  return launch_pass(resample_backward<A, C>,
                     pass_of(a, scratch, first, channels, channels / C, pixel_pieces(a)), 0, stream, grad,
                     scratch.through_mean, part);
}

// Launches the backward pass for images of T. Sums of 16-bit types are kept in float32 and rounded once, at
// the end.
template <class T, int C>
int backward(const AugmentArgs& a, void* stream) {
  using A = typename Accumulate<T>::type;
  constexpr bool kRounds = !std::is_same_v<T, A>;
  const Scratch<A> scratch(a, true);
  const int64_t values = a.batch * a.channels * a.in_height * a.in_width;
  Sums<A> sums = {scratch.in_grad,
                  {a.channels * a.in_height * a.in_width, a.in_height * a.in_width, a.in_width, 1}};
  if (!kRounds)
    sums = {static_cast<A*>(a.output), {a.out_stride[0], a.out_stride[1], a.out_stride[2], a.out_stride[3]}};
  if (const int error = zero(sums.data, values, stream)) return error;
  if (const int error = find_shrinks(a, scratch, stream)) return error;
  if (const int error = sum_grey<Shrunken<A>, C>(a, scratch, stream)) return error;
  const int error = for_each_channel_range(a, [&](int first, int channels) {
    return backward_of_channels<A, C>(a, scratch, sums, first, channels, stream);
  });
  if constexpr (kRounds)
    if (!error)
      return launch(round_gradient<T>, blocks_for(values, kThreads), kThreads, 0, stream, a, scratch.in_grad,
                    Divider(a.in_width), Divider(a.in_height), Divider(a.channels), values);
  return error;
}

}  // namespace augment_kernels
}  // namespace fastreg
