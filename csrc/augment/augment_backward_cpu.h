// The gradient of augmentation on the CPU, with respect to the images: a sample at a time, its stages in
// reverse. Whole planes of the sample stay in memory. Part of augment_cpu.cpp, compiled once per instruction
// set.
//
// Bytes per value: those of the gradient and, with colour steps, of the images, each read once; and the
// result, written once. Everything else stays in the scratch memory of a thread.
#pragma once
#include "augment_colour_cpu.h"
#include "augment_filter_cpu.h"
#include "augment_geometry_cpu.h"

namespace fastreg::FASTREG_ISA {
namespace {

// ---- filter

// Back through the blur of a plane, in place; `spare` has the size of the plane.
template <class A>
void blur_backward(const AugmentArgs& a, int64_t sample, A* plane, A* spare) {
  const int64_t height = a.out_height, width = a.out_width;
  const double *across = a.blur + (a.blur_width + a.blur_height) * sample, *down = across + a.blur_width;
  for (int64_t i = 0; i < height * width; ++i) spare[i] = 0;
  for (int64_t y = 0; y < height; ++y)
    for (int64_t k = 0; k < a.blur_height; ++k) {
      A* to = spare + mirrored(y + k - a.blur_height / 2, height) * width;
      for (int64_t x = 0; x < width; ++x) to[x] += A(down[k]) * plane[y * width + x];
    }
  for (int64_t i = 0; i < height * width; ++i) plane[i] = 0;
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x)
      for (int64_t k = 0; k < a.blur_width; ++k)
        plane[y * width + mirrored(x + k - a.blur_width / 2, width)] += A(across[k]) * spare[y * width + x];
}

// ---- colour

// The mean of grey that forward had; `image` is the one before brightness. It is 0 where contrast does not
// need it.
template <int kChannels, class A>
A grey_mean(const AugmentArgs& a, int64_t sample, const A* image) {
  if (!(a.colour_steps & kContrast)) return 0;
  const int64_t pixels = a.out_height * a.out_width;
  const ColourFactors<A> factors = factors_of<A>(a, sample, A(0));
  double sum = 0;
  for (int64_t i = 0; i < pixels; ++i) {
    A p[kChannels];
    for (int c = 0; c < kChannels; ++c) {
      p[c] = image[c * pixels + i];
      colour_pixel<false>(factors, a.colour_steps & kBrightness, p[c]);
    }
    sum += double(kChannels == 3 ? grey_of<false>(p[0], p[kChannels / 2], p[kChannels - 1]) : p[0]);
  }
  return mean_of_sum<A>(sum, pixels);
}

// Back through all colour steps, in place; `image` is what they were given.
template <int kChannels, class A>
void colour_backward(const AugmentArgs& a, int64_t sample, const A* image, A* grad) {
  const int64_t pixels = a.out_height * a.out_width, planes = a.channels / kChannels;
  const ColourFactors<A> factors = factors_of<A>(a, sample, grey_mean<kChannels>(a, sample, image));
  // f(image, gradient) of each pixel. Planes are coloured one by one, unless they are red, green and blue;
  // with contrast there is but one.
  const auto for_each_pixel = [&](auto f) {
    for (int64_t plane = 0; plane < planes; ++plane)
      for (int64_t i = plane * pixels; i < (plane + 1) * pixels; ++i) {
        A p[kChannels], g[kChannels];
        for (int c = 0; c < kChannels; ++c) {
          p[c] = image[c * pixels + i];
          g[c] = grad[c * pixels + i];
        }
        f(p, g);
        for (int c = 0; c < kChannels; ++c) grad[c * pixels + i] = g[c];
      }
  };
  double through_mean = 0;
  for_each_pixel([&](const A* p, A* g) {
    through_mean += double(blends_backward<kChannels>(factors, a.colour_steps, p, g));
  });
  const A mean_share = A((1 - a.factor(sample, kContrastColumn)) * through_mean / double(pixels));
  for_each_pixel(
      [&](const A* p, A* g) { brightness_backward<kChannels>(factors, a.colour_steps, p, mean_share, g); });
}

// ---- a sample

int64_t backward_bytes(const AugmentArgs& a) {
  const int64_t pixels = a.out_height * a.out_width;
  int64_t resampled = a.in_height * a.in_width, filters = 0;
  for_each_shrink(a, [&](const Shrink& s) {
    resampled = most(resampled, s.size[0] * s.size[1]);
    filters = most(filters, filters_bytes(a, s));
  });
  const int64_t spare = most(most(pixels, a.channels * padded_width(a.out_width)), a.in_width);
  const int64_t values =
      2 * a.channels * pixels + a.channels * (a.in_height * a.in_width + resampled) + spare;
  return rounded_up(values * accumulated_bytes(a), kCacheLine) + filters;
}

// Where the images and the gradients are read and written their types are asked for; all else is made once
// for each A.
template <class A>
struct SampleBackward {
  const AugmentArgs& a;
  const int64_t sample, channels, pixels, in_pixels;  // pixels of a plane of the output, and of the images
  const Shrink shrink;
  const Window window;
  const FixedMatrix matrix;
  // What was resampled, the window or the shrunken image: planes of `width` by `height`, later their
  // gradient.
  const int64_t width, height, resampled_pixels;
  A *grad, *image, *resampled, *in_grad;
  A* spare;  // a row of any image, or a plane of the output
  char* filters;

  SampleBackward(const AugmentArgs& a, void* scratch, int64_t sample)
      : a(a),
        sample(sample),
        channels(a.channels),
        pixels(a.out_height * a.out_width),
        in_pixels(a.in_height * a.in_width),
        shrink(shrink_of(a, sample)),
        window(window_of(a, sample)),
        matrix(shrink.on ? shrink.rest : matrix_of(a, sample)),
        width(shrink.on ? shrink.size[0] : window.width),
        height(shrink.on ? shrink.size[1] : window.height),
        resampled_pixels(width * height) {
    grad = static_cast<A*>(scratch);
    image = grad + channels * pixels;
    resampled = image + channels * pixels;
    in_grad = resampled + channels * resampled_pixels;
    spare = in_grad + channels * in_pixels;
    filters = static_cast<char*>(scratch) + backward_bytes(a) - (shrink.on ? filters_bytes<A>(a, shrink) : 0);
  }

  void images_gradient() const {
    with_pixels_of(a.out_type, [&](auto* type) { read_gradient(type); });
    if (a.blur)
      for (int64_t c = 0; c < channels; ++c) blur_backward(a, sample, grad + c * pixels, spare);
    if (a.colour_steps) {
      with_pixels_of(a.in_type, [&](auto* type) { read_images(type); });
      resample();
      channels == 3 ? colour_backward<3>(a, sample, image, grad) : colour_backward<1>(a, sample, image, grad);
    }
    resample_backward();
    collect();
    with_pixels_of(a.in_type, [&](auto* type) { write_gradient(type); });
  }

 private:
  // f(null pointer to the type of a pixel), which is one that is computed in A.
  template <class F>
  static void with_pixels_of(PixelType type, F f) {
    with_dtype(floating_type(type), [&](auto* pixel) {
      if constexpr (std::is_same_v<typename Accumulate<std::remove_pointer_t<decltype(pixel)>>::type, A>)
        f(pixel);
    });
  }

  // The output's gradient before normalisation; 0 where the output was erased.
  template <class G>
  void read_gradient(G*) const {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t y = 0; y < a.out_height; ++y)
        for (int64_t x = 0; x < a.out_width; ++x) {
          const G* from = static_cast<const G*>(a.grad) + sample * a.grad_stride[0] + c * a.grad_stride[1] +
                          y * a.grad_stride[2];
          bool erased = false;
          if (a.boxes) {
            const int64_t* box = a.boxes + 4 * sample;
            erased = y >= box[0] && y - box[0] < box[2] && x >= box[1] && x - box[1] < box[3];
          }
          const A scale = a.normalise ? A(a.constant(kScaleRow, c)) : A(1);
          grad[(c * a.out_height + y) * a.out_width + x] =
              erased ? A(0) : scale * A(to_float(from[x * a.grad_stride[3]]));
        }
  }

  // What is resampled.
  template <class T>
  void read_images(T*) const {
    if (shrink.on) return Shrinker<T, A>(a, shrink, sample, filters).make_rows(0, height, resampled, spare);
    const int64_t first = window.top * a.in_stride[2] + window.left * a.in_stride[3];
    const T* images = static_cast<const T*>(a.images) + sample * a.in_stride[0] + first;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t y = 0; y < height; ++y)
        for (int64_t x = 0; x < width; ++x)
          resampled[(c * height + y) * width + x] =
              A(to_float(images[c * a.in_stride[1] + y * a.in_stride[2] + x * a.in_stride[3]]));
  }

  // The image that the colour steps were given.
  void resample() const {
    const Source<A> planes = {resampled, resampled_pixels, width, height, width, channels};
    const Resampler<A, A> resampler(a, sample, planes, matrix);
    const int64_t pitch = padded_width(a.out_width);
    for (int64_t y = 0; y < a.out_height; ++y) {
      resampler.row(y, a.out_width, spare, pitch);
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t x = 0; x < a.out_width; ++x)
          image[(c * a.out_height + y) * a.out_width + x] = spare[c * pitch + x];
    }
  }

  // Output pixel i adds its gradient to its four neighbours at a place; all of them lie inside.
  FR_INLINE void add_four(SourcePoint at, int64_t i) const {
    A t, s;
    fraction_of(at.u, &t);
    fraction_of(at.v, &s);
    const A weight[4] = {(A(1) - s) * (A(1) - t), (A(1) - s) * t, s * (A(1) - t), s * t};
    A* to = resampled + whole_part(at.v) * width + whole_part(at.u);
    const int64_t place[4] = {0, 1, width, width + 1};
    for (int64_t c = 0; c < channels; ++c, to += resampled_pixels)
      for (int k = 0; k < 4; ++k)
        if (weight[k] != A(0)) to[place[k]] += weight[k] * grad[c * pixels + i];
  }

  // Every output pixel adds its gradient to the pixels that it was made of.
  void resample_backward() const {
    for (int64_t i = 0; i < channels * resampled_pixels; ++i) resampled[i] = 0;
    const NearestGrid<A> grid = grid_of<A>(a, sample, width, height, matrix);
    const bool bilinear = a.interpolation == Interpolation::kBilinear;
    const uint64_t limit_u = uint64_t(width - 1) << kFractionBits, limit_v = uint64_t(height - 1)
                                                                             << kFractionBits;
    for (int64_t y = 0; y < a.out_height; ++y)
      for (int64_t x = 0; x < a.out_width; ++x) {
        const SourcePoint at = grid.on ? grid.at(x, y) : matrix.at(x, y);
        if (bilinear && uint64_t(at.u) < limit_u && uint64_t(at.v) < limit_v) {
          add_four(at, y * a.out_width + x);
          continue;
        }
        const Taps<A> columns(at.u, width, a.interpolation, a.padding),
            lines(at.v, height, a.interpolation, a.padding);
        const A inside = a.padding == Padding::kFill ? inside_share(lines, columns) : A(1);
        for_each_tap(lines, columns, [&](int32_t line, int32_t column, A weight) {
          if (weight == A(0)) return;
          for (int64_t c = 0; c < channels; ++c)
            resampled[c * resampled_pixels + line * width + column] +=
                inside * weight * grad[c * pixels + y * a.out_width + x];
        });
      }
  }

  // From what was resampled to the images, of which all but the window gets 0.
  void collect() const {
    for (int64_t i = 0; i < channels * in_pixels; ++i) in_grad[i] = 0;
    const int64_t first = window.top * a.in_width + window.left;
    for (int64_t c = 0; c < channels; ++c) {
      A* to = in_grad + c * in_pixels + first;
      const A* from = resampled + c * resampled_pixels;
      if (shrink.on) {
        with_pixels_of(a.in_type, [&](auto* type) {
          using T = std::remove_pointer_t<decltype(type)>;
          Shrinker<T, A>(a, shrink, sample, filters).add_gradient(from, to, spare);
        });
        continue;
      }
      for (int64_t y = 0; y < height; ++y)
        for (int64_t x = 0; x < width; ++x) to[y * a.in_width + x] = from[y * width + x];
    }
  }

  template <class T>
  void write_gradient(T*) const {
    T* out = static_cast<T*>(a.output) + sample * a.out_stride[0];
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t y = 0; y < a.in_height; ++y)
        for (int64_t x = 0; x < a.in_width; ++x)
          from_float(in_grad[(c * a.in_height + y) * a.in_width + x],
                     out + c * a.out_stride[1] + y * a.out_stride[2] + x * a.out_stride[3]);
  }
};

}  // namespace
}  // namespace fastreg::FASTREG_ISA
