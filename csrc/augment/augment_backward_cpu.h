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

// to += factor * from, n numbers.
template <class A>
FR_INLINE void add_scaled(A* to, const A* from, A factor, int64_t n) {
  const Vec<A> scale(factor);
  for_each_vector<A>(n, [&](int64_t x, int lanes) __attribute__((always_inline)) {
    store(to + x, load(to + x, lanes) + scale * load(from + x, lanes), lanes);
  });
}
template <class A>
FR_INLINE void fill_zeros(A* to, int64_t n) {
  memset(static_cast<void*>(to), 0, size_t(n) * sizeof(A));
}

// Back through the blur of a plane, in place; `spare` has room for the plane, a row and as much as the kernel
// reaches over its ends.
template <class A>
void blur_backward(const AugmentArgs& a, int64_t sample, A* plane, A* spare) {
  const int64_t height = a.out_height, width = a.out_width, reach = a.blur_width / 2;
  const double *across = a.blur + (a.blur_width + a.blur_height) * sample, *down = across + a.blur_width;
  fill_zeros(spare, height * width);
  for (int64_t y = 0; y < height; ++y)
    for (int64_t k = 0; k < a.blur_height; ++k)
      add_scaled(spare + mirrored(y + k - a.blur_height / 2, height) * width, plane + y * width, A(down[k]),
                 width);
  A* const row = spare + height * width;  // pixel x of it is at reach + x
  for (int64_t y = 0; y < height; ++y) {
    fill_zeros(row, width + a.blur_width);
    for (int64_t k = 0; k < a.blur_width; ++k) add_scaled(row + k, spare + y * width, A(across[k]), width);
    A* const to = plane + y * width;
    memcpy(to, row + reach, size_t(width) * sizeof(A));
    for (int64_t x = 1; x <= reach; ++x) to[mirrored(-x, width)] += row[reach - x];
    for (int64_t x = width; x < width + a.blur_width - 1 - reach; ++x)
      to[mirrored(x, width)] += row[reach + x];
  }
}

// ---- colour

// f(position, lanes) for the pixels of all planes that are coloured together, row by row, and then
// end_of_row().
template <int kChannels, class A, class F, class G>
FR_INLINE void for_each_coloured(const AugmentArgs& a, F f, G end_of_row) {
  // Planes are coloured one by one, unless they are red, green and blue; with contrast there is but one.
  for (int64_t plane = 0; plane < a.channels / kChannels; ++plane)
    for (int64_t y = 0; y < a.out_height; ++y) {
      const int64_t row = (plane * a.out_height + y) * a.out_width;
      for_each_vector<A>(a.out_width,
                         [&](int64_t x, int lanes) __attribute__((always_inline)) { f(row + x, lanes); });
      end_of_row();
    }
}
template <int kChannels, class V, class A>
FR_INLINE void load_pixels(const A* planes, int64_t pixels, int64_t at, int lanes, V* p) {
  for (int c = 0; c < kChannels; ++c) p[c] = load(planes + c * pixels + at, lanes);
}

// The mean of grey that forward had; `image` is the one before brightness. It is 0 where contrast does not
// need it.
template <int kChannels, class A>
A grey_mean(const AugmentArgs& a, int64_t sample, const A* image) {
  using V = Vec<A>;
  if (!(a.colour_steps & kContrast)) return 0;
  const int64_t pixels = a.out_height * a.out_width;
  const ColourFactors<V> factors = factors_of<V>(a, sample, A(0));
  double sum = 0;
  V of_row(0);
  for_each_coloured<kChannels, A>(
      a,
      [&](int64_t at, int lanes) __attribute__((always_inline)) {
        V p[kChannels];
        load_pixels<kChannels>(image, pixels, at, lanes, p);
        for (V& each : p) colour_pixel<false>(factors, a.colour_steps & kBrightness, each);
        const V grey = kChannels == 3 ? grey_of<false>(p[0], p[kChannels / 2], p[kChannels - 1]) : p[0];
        of_row = of_row + (lanes < V::kLanes ? select(V::first(lanes), grey, V(0)) : grey);
      },
      [&] {
        sum += double(of_row.sum());
        of_row = V(0);
      });
  return mean_of_sum<A>(sum, pixels);
}

// Back through all colour steps, in place; `image` is what they were given.
template <int kChannels, class A>
void colour_backward(const AugmentArgs& a, int64_t sample, const A* image, A* grad) {
  using V = Vec<A>;
  const int64_t pixels = a.out_height * a.out_width;
  const int steps = a.colour_steps;
  const ColourFactors<V> factors = factors_of<V>(a, sample, grey_mean<kChannels>(a, sample, image));
  double through_mean = 0;
  V of_row(0);
  const auto with_pixels = [&](int64_t at, int lanes, auto f) __attribute__((always_inline)) {
    V p[kChannels], g[kChannels];
    load_pixels<kChannels>(image, pixels, at, lanes, p);
    load_pixels<kChannels>(grad, pixels, at, lanes, g);
    f(p, g);
    for (int c = 0; c < kChannels; ++c) store(grad + c * pixels + at, g[c], lanes);
  };
  for_each_coloured<kChannels, A>(
      a,
      [&](int64_t at, int lanes) __attribute__((always_inline)) {
        with_pixels(at, lanes, [&](const V* p, V* g) __attribute__((always_inline)) {
          of_row = of_row + blends_backward<kChannels>(factors, steps, p, g);  // 0 in lanes without a pixel
        });
      },
      [&] {
        through_mean += double(of_row.sum());
        of_row = V(0);
      });
  if (!(steps & (kContrast | kBrightness))) return;
  const V mean_share(A((1 - a.factor(sample, kContrastColumn)) * through_mean / double(pixels)));
  for_each_coloured<kChannels, A>(
      a,
      [&](int64_t at, int lanes) __attribute__((always_inline)) {
        with_pixels(at, lanes, [&](const V* p, V* g) __attribute__((always_inline)) {
          brightness_backward<kChannels>(factors, steps, p, mean_share, g);
        });
      },
      [] {});
}

// ---- a sample

// What is added up for the pixels of an image has a border of one pixel around it.
int64_t bordered(int64_t width, int64_t height) { return (width + 2) * (height + 2); }

int64_t backward_bytes(const AugmentArgs& a) {
  const int64_t pixels = a.out_height * a.out_width;
  int64_t resampled = a.in_height * a.in_width, sums = bordered(a.in_width, a.in_height), filters = 0;
  for_each_shrink(a, [&](const Shrink& s) {
    resampled = most(resampled, s.size[0] * s.size[1]);
    sums = most(sums, bordered(s.size[0], s.size[1]));
    filters = most(filters, filters_bytes(a, s));
  });
  const int64_t blurred = pixels + a.out_width + a.blur_width;
  const int64_t spare = most(most(blurred, a.channels * padded_width(a.out_width)), a.in_width);
  const int64_t values = 2 * a.channels * pixels + a.channels * (a.in_height * a.in_width + resampled) +
                         (a.channels == 3 ? 4 * sums : 0) + spare;
  return rounded_up(values * accumulated_bytes(a), kCacheLine) + filters;
}

// The gradient of what was resampled, as it is added up. add(line, column, weight, i) takes the gradient of
// output pixel i, times a weight, to a pixel; add_four(at, i) to the four around a place.
template <class A>
struct PlaneSums {
  static constexpr bool kBordered = false;
  A* to;
  const A* grad;
  int64_t width, to_pixels, pixels, channels;

  FR_INLINE void add(int64_t line, int64_t column, A weight, int64_t i) const {
    for (int64_t c = 0; c < channels; ++c)
      to[c * to_pixels + line * width + column] += weight * grad[c * pixels + i];
  }
  FR_INLINE void add_four(SourcePoint at, int64_t i) const {
    A t, s;
    fraction_of(at.u, &t);
    fraction_of(at.v, &s);
    const A weight[4] = {(A(1) - s) * (A(1) - t), (A(1) - s) * t, s * (A(1) - t), s * t};
    for (int k = 0; k < 4; ++k)
      if (weight[k] != A(0)) add(whole_part(at.v) + k / 2, whole_part(at.u) + k % 2, weight[k], i);
  }
};
// Of three channels: pixels of four numbers, which are moved as one, with a border, so that a neighbour just
// outside needs no case of its own.
template <class A>
struct PixelSums {
  static constexpr bool kBordered = true;
  typedef A Four __attribute__((vector_size(4 * sizeof(A)), aligned(sizeof(A)), may_alias));
  Four* to;  // pixel (0, 0)
  int64_t pitch, width, height;
  const A* grad[3];

  PixelSums(A* sums, int64_t width, int64_t height, const A* planes, int64_t pixels)
      : to(reinterpret_cast<Four*>(sums) + width + 3),
        pitch(width + 2),
        width(width),
        height(height),
        grad{planes, planes + pixels, planes + 2 * pixels} {
    fill_zeros(sums, 4 * bordered(width, height));
  }
  FR_INLINE Four gradient(int64_t i) const { return Four{grad[0][i], grad[1][i], grad[2][i], 0}; }
  FR_INLINE void add(int64_t line, int64_t column, A weight, int64_t i) const {
    to[line * pitch + column] += weight * gradient(i);
  }
  FR_INLINE void add_four(SourcePoint at, int64_t i) const {
    A t, s;
    fraction_of(at.u, &t);
    fraction_of(at.v, &s);
    const A left = A(1) - t, upper = A(1) - s;
    const Four g = gradient(i);
    Four* const place = to + whole_part(at.v) * pitch + whole_part(at.u);
    // A weight of 0 makes no NaN of an infinite gradient.
    place[0] += upper * left * g;
    if (t != A(0)) place[1] += upper * t * g;
    if (s == A(0)) return;
    place[pitch] += s * left * g;
    if (t != A(0)) place[pitch + 1] += s * t * g;
  }
  void planes(A* out) const {
    for (int64_t y = 0; y < height; ++y)
      for (int64_t x = 0; x < width; ++x) {
        const Four pixel = to[y * pitch + x];
        for (int64_t c = 0; c < 3; ++c) out[(c * height + y) * width + x] = pixel[c];
      }
  }
};

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
  A* sums;   // with three channels, of PixelSums
  A* spare;  // a row of any image, or what the blur needs
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
    sums = in_grad + channels * in_pixels;
    spare = sums + (channels == 3 ? 4 * bordered(width, height) : 0);
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
      for (int64_t y = 0; y < a.out_height; ++y) {
        A* const to = grad + (c * a.out_height + y) * a.out_width;
        read_row(static_cast<const G*>(a.grad) + sample * a.grad_stride[0] + c * a.grad_stride[1] +
                     y * a.grad_stride[2],
                 a.grad_stride[3], to, a.out_width);
        if (a.normalise) {
          const Vec<A> scale(A(a.constant(kScaleRow, c)));
          for_each_vector<A>(a.out_width, [&](int64_t x, int lanes) __attribute__((always_inline)) {
            store(to + x, scale * load(to + x, lanes), lanes);
          });
        }
        const Erased erased(a, sample, y);
        if (erased.begin < erased.end) fill_zeros(to + erased.begin, erased.end - erased.begin);
      }
  }

  // n pixels of a row, as numbers of the arithmetic.
  template <class T>
  FR_INLINE static void read_row(const T* from, int64_t stride, A* to, int64_t n) {
    if (stride != 1) {
      for (int64_t x = 0; x < n; ++x) to[x] = A(to_float(from[x * stride]));
      return;
    }
    for_each_vector<A>(n, [&](int64_t x, int lanes) __attribute__((always_inline)) {
      store(to + x, load(from + x, lanes), lanes);
    });
  }

  // What is resampled.
  template <class T>
  void read_images(T*) const {
    if (shrink.on) return Shrinker<T, A>(a, shrink, sample, filters).make_rows(0, height, resampled, spare);
    const int64_t first = window.top * a.in_stride[2] + window.left * a.in_stride[3];
    const T* images = static_cast<const T*>(a.images) + sample * a.in_stride[0] + first;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t y = 0; y < height; ++y)
        read_row(images + c * a.in_stride[1] + y * a.in_stride[2], a.in_stride[3],
                 resampled + (c * height + y) * width, width);
  }

  // The image that the colour steps were given.
  void resample() const {
    const Source<A> planes = {resampled, resampled_pixels, width, height, width, channels};
    const Resampler<A, A> resampler(a, sample, planes, matrix);
    const int64_t pitch = padded_width(a.out_width);
    for (int64_t y = 0; y < a.out_height; ++y) {
      resampler.row(y, a.out_width, spare, pitch);
      for (int64_t c = 0; c < channels; ++c)
        memcpy(image + (c * a.out_height + y) * a.out_width, spare + c * pitch,
               size_t(a.out_width) * sizeof(A));
    }
  }

  // Every output pixel adds its gradient to the pixels that it was made of.
  void resample_backward() const {
    if (!a.matrices && !shrink.on) {  // nothing was resampled
      memcpy(resampled, grad, size_t(channels * pixels) * sizeof(A));
      return;
    }
    if (channels == 3) {
      const PixelSums<A> to(sums, width, height, grad, pixels);
      add_pixels(to);
      to.planes(resampled);
    } else {
      fill_zeros(resampled, channels * resampled_pixels);
      add_pixels(PlaneSums<A>{resampled, grad, width, resampled_pixels, pixels, channels});
    }
  }

  template <class Sums>
  FR_INLINE void add_pixels(const Sums to) const {
    const NearestGrid<A> grid = grid_of<A>(a, sample, width, height, matrix);
    const Interpolation interpolation = a.interpolation;
    const Padding padding = a.padding;
    const bool bilinear = interpolation == Interpolation::kBilinear;
    // Where all four neighbours lie, or what is 0 outside takes nothing back. As unsigned, a negative
    // coordinate is beyond any limit.
    const int64_t border = Sums::kBordered && padding == Padding::kZeros;
    const int64_t first = -border * kOne, out_height = a.out_height, out_width = a.out_width;
    const uint64_t limit_u = uint64_t(width - 1 + 2 * border) << kFractionBits,
                   limit_v = uint64_t(height - 1 + 2 * border) << kFractionBits;
    const int64_t step_u = matrix.m[0], step_v = matrix.m[3], columns = width, lines = height;
    for (int64_t y = 0; y < out_height; ++y) {
      SourcePoint next = matrix.at(0, y);
      for (int64_t x = 0; x < out_width; ++x) {
        const SourcePoint at = grid.on ? grid.at(x, y) : next;
        next.u += step_u;
        next.v += step_v;
        const int64_t i = y * out_width + x;
        if (bilinear && uint64_t(at.u - first) < limit_u && uint64_t(at.v - first) < limit_v) {
          to.add_four(at, i);
          continue;
        }
        if (bilinear && border) continue;  // none of the four lies inside
        const Taps<A> across(at.u, columns, interpolation, padding),
            down(at.v, lines, interpolation, padding);
        const A inside = padding == Padding::kFill ? inside_share(down, across) : A(1);
        for_each_tap(down, across, [&](int32_t line, int32_t column, A weight) {
          if (weight != A(0)) to.add(line, column, inside * weight, i);
        });
      }
    }
  }

  // From what was resampled to the images, of which all but the window gets 0.
  void collect() const {
    fill_zeros(in_grad, channels * in_pixels);
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
        memcpy(to + y * a.in_width, from + y * width, size_t(width) * sizeof(A));
    }
  }

  template <class T>
  void write_gradient(T*) const {
    T* out = static_cast<T*>(a.output) + sample * a.out_stride[0];
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t y = 0; y < a.in_height; ++y) {
        const A* const row = in_grad + (c * a.in_height + y) * a.in_width;
        T* const to = out + c * a.out_stride[1] + y * a.out_stride[2];
        if (a.out_stride[3] == 1)
          for_each_vector<A>(a.in_width, [&](int64_t x, int lanes) __attribute__((always_inline)) {
            store(to + x, load(row + x, lanes), lanes);
          });
        else
          for (int64_t x = 0; x < a.in_width; ++x) from_float(row[x], to + x * a.out_stride[3]);
      }
  }
};

}  // namespace
}  // namespace fastreg::FASTREG_ISA
