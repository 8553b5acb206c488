// Augmentation on CUDA, formulas in augment_math.h: a thread makes an output pixel of all its channels, or of
// one channel where there are other than three. Neighbouring lanes make neighbouring pixels, so that a warp's
// loads and stores are whole sectors. Launches: one; with contrast one before it, which sums the rows of
// grey; with blur the pixels of a tile and its surroundings are made in shared memory, and a kernel of more
// than 13 pixels takes two launches with a float32 image between; with antialias one that looks at the
// matrices, a sample each. Bytes per value: the source's, once from memory (the four neighbours of bilinear
// pixels come from the cache), twice with contrast, and the output's, written once.
#include "augment_draw.h"
#include "augment_warp_cuda.h"

namespace fastreg {
namespace {

constexpr int kPixels = 4;      // of a thread
constexpr int kTile = 32;       // pixels along both sides
constexpr int kWideTile = 128;  // where only rows are blurred
constexpr int kTileBlur = 13;   // larger kernels would make most pixels of a tile for its neighbours' sake
constexpr int64_t kTileBytes = 96 << 10;
template <class A>
constexpr int kSumLanes = 64 / sizeof(A);  // that share a row of grey: the sums of the CPU's vectors

// ---- colour

template <class P, class A>
__device__ __forceinline__ bool quantises(const Pass<A>& pass) {
  return P::kBytes && pass.a.out_type == PixelType::kUInt8;
}

template <int C, class P, class A>
__device__ __forceinline__ void coloured_pixel(const Pass<A>& pass, const Sample<A>& s, const P& pixels,
                                               int channel, int32_t x, int32_t y, int steps, A (&p)[C]) {
  warped_pixel(pass, s, pixels, channel, x, y, p);
  if (quantises<P>(pass)) {
    for (int c = 0; c < (pass.a.matrices ? C : 0); ++c) p[c] = quantised(p[c], A(255));
    if constexpr (C == 3)
      colour_pixel<P::kBytes>(s.factors, steps, p[0], p[1], p[2]);
    else
      colour_pixel<P::kBytes>(s.factors, steps, p[0]);
  } else {
    if constexpr (C == 3)
      colour_pixel<false>(s.factors, steps, p[0], p[1], p[2]);
    else
      colour_pixel<false>(s.factors, steps, p[0]);
  }
}

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

// ---- sums of a sample

// The exact sum of two numbers as high + low (Knuth), added to what there is.
template <class A>
__device__ __forceinline__ void add_exactly(A& high, A& low, A more_high, A more_low) {
  const A sum = high + more_high, part = sum - high;
  low += (high - (sum - part)) + (more_high - part) + more_low;
  high = sum;
}

// The sum of a sample's rows over `count`, given to every thread of the block.
template <class A>
__device__ __forceinline__ A block_mean(const A* rows, int64_t number, A count) {
  __shared__ A highs[kWarps], lows[kWarps], mean;
  A high = 0, low = 0;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < number; i += kThreads) add_exactly(high, low, rows[i], A(0));
#pragma unroll 1
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const A other_high = __shfl_xor_sync(kAllLanes, high, distance),
            other_low = __shfl_xor_sync(kAllLanes, low, distance);
    add_exactly(high, low, other_high, other_low);
  }
  if (threadIdx.x % kLanes == 0) {
    highs[threadIdx.x / kLanes] = high;
    lows[threadIdx.x / kLanes] = low;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int i = 1; i < kWarps; ++i) add_exactly(high, low, highs[i], lows[i]);
    const A sum = high + low;
    mean = mean_of(sum, low - (sum - high), count);
  }
  __syncthreads();
  return mean;
}

// What every kernel begins with: the sample of an item, with the mean of its grey where contrast wants it.
template <class P, class A>
__device__ __forceinline__ void begin_item(const Pass<A>& pass, int64_t sample, bool with_mean,
                                           Sample<A>& s) {
  const AugmentArgs& a = pass.a;
  __syncthreads();  // no thread is at work on the last item
  A mean = 0;
  if (with_mean && a.colour_steps & kContrast)
    mean = block_mean(pass.sums + sample * a.out_height, a.out_height, A(a.out_height * a.out_width));
  if (threadIdx.x < kLanes) set_up<P::kShrinks>(pass, sample, mean, s);
  __syncthreads();
}

// Adds f(x, y) up over the rows of an item, which are as many as a block has groups of lanes, in the order of
// the CPU's vectors.
template <class A, class F>
__device__ __forceinline__ void sum_rows(const AugmentArgs& a, int64_t sample, int64_t tile, A* sums, F f) {
  const int lane = threadIdx.x % kSumLanes<A>;
  const int64_t y = tile * (kThreads / kSumLanes<A>)+threadIdx.x / kSumLanes<A>;
  A sum = 0;
#pragma unroll 1
  for (int64_t x = lane; x < (y < a.out_height ? a.out_width : 0); x += kSumLanes<A>)
    sum += f(int32_t(x), int32_t(y));
#pragma unroll
  for (int distance = kSumLanes<A> / 2; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  if (lane == 0 && y < a.out_height) sums[sample * a.out_height + y] = sum;
}

// Of brightened grey. Items as sum_rows has them.
template <class P, int C, class A = typename P::A>
__global__ void __launch_bounds__(kThreads, P::kLoopBlocks) grey_sums(const Pass<A> pass) {
  __shared__ Sample<A> s;
  const AugmentArgs& a = pass.a;
  for (int64_t item = blockIdx.x; item < pass.items; item += gridDim.x) {
    const auto place = pass.template place<C>(item);
    begin_item<P>(pass, place.sample, false, s);
    const P pixels(pass, s, 0);
    sum_rows(a, place.sample, place.tile, pass.sums, [&](int32_t x, int32_t y) {
      A p[C];
      coloured_pixel(pass, s, pixels, 0, x, y, a.colour_steps & kBrightness, p);
      if constexpr (C == 3)
        return quantises<P>(pass) ? grey_of<P::kBytes>(p[0], p[1], p[2]) : grey_of<false>(p[0], p[1], p[2]);
      else
        return p[0];
    });
  }
}

// ---- without blur

// Calls f(x, y) for the pixels of an item that are this thread's.
template <class A, class F>
__device__ __forceinline__ void for_each_pixel(const Pass<A>& pass, int64_t tile, F f) {
  const int64_t pixels = pass.a.out_height * pass.a.out_width;
#pragma unroll 1
  for (int k = 0; k < kPixels; ++k) {
    const int64_t i = (tile * kPixels + k) * kThreads + threadIdx.x;
    if (i >= pixels) return;
    const int64_t y = pass.width.divide(i);
    f(int32_t(i - y * pass.a.out_width), int32_t(y));
  }
}

template <class P, int C, class A = typename P::A>
__global__ void __launch_bounds__(kThreads, P::kBlocks) augment_pixels(const Pass<A> pass) {
  __shared__ Sample<A> s;
  for (int64_t item = blockIdx.x; item < pass.items; item += gridDim.x) {
    const auto place = pass.template place<C>(item);
    const int channel = place.channel;
    begin_item<P>(pass, place.sample, true, s);
    const P pixels(pass, s, channel);
    for_each_pixel(pass, place.tile, [&](int32_t x, int32_t y) {
      A p[C];
      coloured_pixel(pass, s, pixels, channel, x, y, pass.a.colour_steps, p);
      emit(pass, s, place.sample, channel, x, y, p);
    });
  }
}

// Where a value of the output's shape is in scratch: (batch, channels, height, width).
__device__ __forceinline__ int64_t kept_at(const AugmentArgs& a, int64_t sample, int channel, int64_t x,
                                           int64_t y) {
  return ((sample * a.channels + channel) * a.out_height + y) * a.out_width + x;
}

// ---- with blur

// Calls f(row, column) for the pixels of a rectangle that are this thread's.
template <class F>
__device__ __forceinline__ void for_each_in(int rows, int columns, F f) {
  const unsigned factor =
      0xffffffffu / unsigned(columns) + 1;  // i / columns without a division, exact below 2^32 / columns
  for (int i = threadIdx.x; i < rows * columns; i += kThreads) {
    const int row = columns == 1 ? i : int(__umulhi(unsigned(i), factor));
    f(row, i - row * columns);
  }
}

// The weights of a sample's blur from `first` on, to shared memory.
template <class A>
__device__ __forceinline__ void load_weights(const AugmentArgs& a, int64_t sample, int64_t first,
                                             int64_t count, A* weight) {
  const double* from = a.blur + sample * (a.blur_width + a.blur_height) + first;
  for (int64_t k = threadIdx.x; k < count; k += kThreads) weight[k] = A(from[k]);
}

struct Tile {
  int width, height;
  bool down;  // blur along y too
};
// Of shared memory.
int64_t tile_values(const Tile& tile, int64_t blur_width, int64_t blur_height, int channels) {
  const int64_t columns = tile.width + blur_width - 1, rows = tile.height + (tile.down ? blur_height - 1 : 0);
  return channels * rows * (columns + (tile.down ? tile.width : 0)) + blur_width + blur_height;
}

// Pixels of a tile and of what surrounds it by half a kernel, blurred along x, then along y; or along x only,
// to pass.blurred.
template <class P, int C, class A = typename P::A>
__global__ void __launch_bounds__(kThreads, P::kLoopBlocks)
    augment_tiles(const Pass<A> pass, const Tile tile) {
  __shared__ Sample<A> s;
  const AugmentArgs& a = pass.a;
  const int blur_width = int(a.blur_width), blur_height = tile.down ? int(a.blur_height) : 1;
  const int pitch = tile.width + blur_width - 1, lines = tile.height + blur_height - 1;
  A* weight = reinterpret_cast<A*>(dynamic_shared);
  A *made = weight + a.blur_width + a.blur_height, *across = made + C * lines * pitch;
  for (int64_t item = blockIdx.x; item < pass.items; item += gridDim.x) {
    const auto place = pass.template place<C>(item);
    const int channel = place.channel;
    begin_item<P>(pass, place.sample, true, s);
    const P pixels(pass, s, channel);
    const int64_t tile_row = pass.across.divide(place.tile),
                  tile_column = place.tile - tile_row * int64_t(pass.across.divisor);
    const int64_t top = tile_row * tile.height, left = tile_column * tile.width;
    const int height = int(a.out_height - top < tile.height ? a.out_height - top : tile.height);
    const int width = int(a.out_width - left < tile.width ? a.out_width - left : tile.width);
    const int made_height = height + blur_height - 1;
    load_weights(a, place.sample, 0, a.blur_width + a.blur_height, weight);
    for_each_in(made_height, width + blur_width - 1, [&](int row, int column) {
      A p[C];
      const int64_t y = mirrored(top + row - blur_height / 2, a.out_height);
      const int64_t x = mirrored(left + column - blur_width / 2, a.out_width);
      coloured_pixel(pass, s, pixels, channel, int32_t(x), int32_t(y), a.colour_steps, p);
      for (int c = 0; c < C; ++c) made[(c * lines + row) * pitch + column] = p[c];
    });
    __syncthreads();
    for_each_in(made_height, width, [&](int row, int column) {
      for (int c = 0; c < C; ++c) {
        const A* from = made + (c * lines + row) * pitch + column;
        A sum = 0;
        for (int k = 0; k < blur_width; ++k) sum += weight[k] * from[k];
        if (tile.down)
          across[(c * lines + row) * tile.width + column] = sum;
        else
          pass.blurred[kept_at(a, place.sample, channel + c, left + column, top + row)] = sum;
      }
    });
    if (!tile.down) continue;
    __syncthreads();
    for_each_in(height, width, [&](int row, int column) {
      A p[C];
      for (int c = 0; c < C; ++c) {
        const A* from = across + (c * lines + row) * tile.width + column;
        A sum = 0;
        for (int k = 0; k < blur_height; ++k) sum += weight[blur_width + k] * from[k * tile.width];
        p[c] = quantises<P>(pass) ? quantised(sum, A(255)) : sum;
      }
      emit(pass, s, place.sample, channel, int32_t(left + column), int32_t(top + row), p);
    });
  }
}

// The second half of a large kernel's blur.
template <class A>
__global__ void __launch_bounds__(kThreads) blur_down(const Pass<A> pass) {
  __shared__ Sample<A> s;
  const AugmentArgs& a = pass.a;
  A* weight = reinterpret_cast<A*>(dynamic_shared);
  for (int64_t item = blockIdx.x; item < pass.items; item += gridDim.x) {
    const auto place = pass.template place<1>(item);
    const int channel = place.channel;
    begin_item<Image<A>>(pass, place.sample, false, s);
    load_weights(a, place.sample, a.blur_width, a.blur_height, weight);
    __syncthreads();
    const A* plane = pass.blurred + kept_at(a, place.sample, channel, 0, 0);
    for_each_pixel(pass, place.tile, [&](int32_t x, int32_t y) {
      A p[1] = {0};
      for (int64_t k = 0; k < a.blur_height; ++k)
        p[0] += weight[k] * plane[mirrored(y + k - a.blur_height / 2, a.out_height) * a.out_width + x];
      if (a.out_type == PixelType::kUInt8) p[0] = quantised(p[0], A(255));
      emit(pass, s, place.sample, channel, x, y, p);
    });
  }
}

// ---- backward

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
    for_each_pixel(pass, place.tile, [&](int32_t x, int32_t y) {
      const int64_t i = place.sample * a.grad_stride[0] + channel * a.grad_stride[1] + y * a.grad_stride[2] +
                        x * a.grad_stride[3];
      const A grad = load_as<A>(a.out_type, a.grad, i), scale = a.normalise ? pass.scale[channel] : A(1);
      out[kept_at(a, place.sample, channel, x, y)] = s.is_erased(x, y) ? A(0) : scale * grad;
    });
  }
}

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
    for_each_pixel(pass, place.tile, [&](int32_t x, int32_t y) {
      const int64_t own = down ? y : x;
      const A* line = in + plane + (down ? x : y * a.out_width);
      A sum = 0;
      for (int64_t i = own < radius ? 0 : own - radius; i < length && i <= own + radius; ++i)
        if (i >= radius && i + radius < length)
          sum += weight[own - i + radius] * line[i * step];
        else  // took from reflected pixels too
          for (int64_t k = 0; k < size; ++k)
            if (mirrored(i + k - radius, length) == own) sum += weight[k] * line[i * step];
      out[plane + y * a.out_width + x] = sum;
    });
  }
}

// Back through saturation and contrast, in place; of each row what it adds to the gradient of the mean. Items
// as of sum_rows.
template <class A, int C>
__global__ void __launch_bounds__(kThreads, Grid<A>::kBlocks)
    blends_backward_rows(const Pass<A> pass, A* grad, A* through_mean) {
  __shared__ Sample<A> s;
  const AugmentArgs& a = pass.a;
  const int64_t plane = a.out_height * a.out_width;
  for (int64_t item = blockIdx.x; item < pass.items; item += gridDim.x) {
    const auto place = pass.template place<C>(item);
    begin_item<Grid<A>>(pass, place.sample, true, s);
    const Grid<A> pixels(pass, s, 0);
    sum_rows(a, place.sample, place.tile, through_mean, [&](int32_t x, int32_t y) {
      A p[C], g[C], *at = grad + kept_at(a, place.sample, 0, x, y);
      warped_pixel(pass, s, pixels, 0, x, y, p);
      for (int c = 0; c < C; ++c) g[c] = at[c * plane];
      const A sum = blends_backward<C>(s.factors, a.colour_steps, p, g);
      for (int c = 0; c < C; ++c) at[c * plane] = g[c];
      return sum;
    });
  }
}

// Where the gradient of the images is summed: floating point of any strides.
template <class A>
struct Sums {
  A* data;
  int64_t stride[4];
};

// Back through brightness and the warp: every pixel adds its share to the pixels that it was made of.
template <class A, int C>
__global__ void __launch_bounds__(kThreads, Grid<A>::kBlocks)
    warp_backward(const Pass<A> pass, const A* grad, const A* through_mean, const Sums<A> sums) {
  __shared__ Sample<A> s;
  const AugmentArgs& a = pass.a;
  const int64_t plane = a.out_height * a.out_width;
  for (int64_t item = blockIdx.x; item < pass.items; item += gridDim.x) {
    const auto place = pass.template place<C>(item);
    const int channel = place.channel;
    begin_item<Grid<A>>(pass, place.sample, false, s);
    if (!s.valid) continue;
    A mean_share = 0;
    if (a.colour_steps & kContrast)
      mean_share = one_minus(a.colour[kColourColumns * place.sample + kContrastColumn], A()) *
                   block_mean(through_mean + place.sample * a.out_height, a.out_height, A(plane));
    const Grid<A> pixels(pass, s, channel);
    A* to = sums.data + place.sample * sums.stride[0] + channel * sums.stride[1];
    const Window window = window_of(a, place.sample);
    to += window.top * sums.stride[2] + window.left * sums.stride[3];
    const auto add = [&](int32_t line, int32_t column, A weight, const A(&g)[C]) {
      A* at = to + line * sums.stride[2] + column * sums.stride[3];
      for (int c = 0; c < C; ++c) atomicAdd(at + c * sums.stride[1], weight * g[c]);
    };
    for_each_pixel(pass, place.tile, [&](int32_t x, int32_t y) {
      A g[C];
      for (int c = 0; c < C; ++c) g[c] = grad[kept_at(a, place.sample, channel + c, x, y)];
      if (a.colour_steps) {
        A p[C];
        warped_pixel(pass, s, pixels, channel, x, y, p);
        brightness_backward<C>(s.factors, a.colour_steps, p, mean_share, g);
      }
      const Position at = s.matrix.at(x, y);
      const auto interpolation = s.one_pixel ? Interpolation::kNearest : a.interpolation;
      const Taps<A> lines(at.v, s.height, interpolation, a.padding),
          columns(at.u, s.width, interpolation, a.padding);
      const A inside = a.padding == Padding::kFill ? inside_share(lines, columns) : A(1);
      for_each_tap(lines, columns, [&](int32_t line, int32_t column, A weight) {
        if (weight == A(0)) return;
        weight *= inside;
        if (!s.shrinks) return add(line, column, weight, g);
        const auto across = s.columns.span(column), down = s.rows.span(line);
        weight = weight / (s.rows.total(down) * s.columns.total(across));
        for (int32_t v = down.first; v < (across.last > across.first ? down.last : down.first); ++v)
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

// ---- a row of a table for each sample, in float64

__global__ void draw_rows(const DrawArgs args) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.sample.batch;
       i += int64_t(gridDim.x) * kThreads)
    draw_row(args, i);
}
__global__ void matrix_rows(const MatrixArgs args) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.batch;
       i += int64_t(gridDim.x) * kThreads)
    matrix_row(args, i);
}
__global__ void gaussian_rows(const GaussianArgs args) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.batch;
       i += int64_t(gridDim.x) * kThreads)
    gaussian_row(args, i);
}
__global__ void shrink_rows(const AugmentArgs a, Shrink* shrinks) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.batch;
       i += int64_t(gridDim.x) * kThreads) {
    shrinks[i] = shrink_of(a, i);
  }
}

// ---- launches

// Scratch, one part after another; `base` null only counts.
struct Parts {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(base + used);
    used += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return count ? part : nullptr;
  }
};

bool antialiases(const AugmentArgs& a) {
  return a.antialias && a.matrices && a.interpolation != Interpolation::kNearest;
}
int together(const AugmentArgs& a) { return a.channels == 3 ? 3 : 1; }
Tile tile_of(const AugmentArgs& a, int64_t value_bytes) {
  const auto bytes = [&](const Tile& t) {
    return value_bytes * tile_values(t, a.blur_width, a.blur_height, together(a));
  };
  const int64_t most =
      int64_t(most_shared()) - 4096 < kTileBytes ? int64_t(most_shared()) - 4096 : kTileBytes;
  Tile tile = {kTile, kTile, true};
  if (a.blur_width <= kTileBlur && a.blur_height <= kTileBlur && bytes(tile) <= most) return tile;
  for (tile = {kWideTile, kTile, false}; tile.height && bytes(tile) > most; tile.height /= 2) {
  }
  return tile;
}

template <class A>
struct Scratch {
  Shrink* shrinks;
  A *sums, *blurred, *grad, *spare, *through_mean, *in_grad;
  int64_t bytes;

  Scratch(const AugmentArgs& a, bool backward) {
    Parts parts{static_cast<char*>(a.scratch)};
    const int64_t values = a.batch * a.channels * a.out_height * a.out_width;
    const int64_t rows = a.colour_steps & kContrast ? a.batch * a.out_height : 0;
    const bool blends = backward && a.colour_steps & (kContrast | kSaturation);
    shrinks = parts.take<Shrink>(antialiases(a) ? a.batch : 0);
    sums = parts.take<A>(rows);
    blurred = parts.take<A>(a.blur && !backward && !tile_of(a, sizeof(A)).down ? values : 0);
    grad = parts.take<A>(backward ? values : 0);
    spare = parts.take<A>(backward && a.blur ? values : 0);
    through_mean = parts.take<A>(blends ? a.batch * a.out_height : 0);
    in_grad =
        parts.take<A>(backward && (a.in_type == PixelType::kFloat16 || a.in_type == PixelType::kBFloat16)
                          ? a.batch * a.channels * a.in_height * a.in_width
                          : 0);
    bytes = parts.used;
  }
};

int64_t size_of(PixelType type) {
  const int64_t sizes[] = {4, 8, 2, 2, 1};
  return sizes[int(type)];
}

// A pass over channels [first, first + channels) in `groups`, each with `tiles`. To its kernels the first of
// them is channel 0.
template <class A>
Pass<A> pass_of(const AugmentArgs& a, const Scratch<A>& scratch, int first, int channels, int groups,
                int64_t tiles) {
  Pass<A> pass;
  pass.a = a;
  pass.a.images = static_cast<const char*>(a.images) + first * a.in_stride[1] * size_of(a.in_type);
  pass.a.output = static_cast<char*>(a.output) + first * a.out_stride[1] * size_of(a.out_type);
  pass.a.grad = static_cast<const char*>(a.grad) + first * a.grad_stride[1] * size_of(a.out_type);
  pass.items = a.batch * groups * tiles;
  pass.tiles = Divider(tiles);
  pass.groups = Divider(groups);
  pass.width = Divider(a.out_width);
  pass.shrinks = scratch.shrinks;
  pass.sums = scratch.sums;
  pass.blurred = scratch.blurred + first * a.out_height * a.out_width;
  for (int i = 0; i < kMostChannels; ++i) {
    const bool there = i < channels;
    const double* constant = a.constants + first + i;
    pass.fill[i] = there && a.padding == Padding::kFill ? A(constant[0]) : A(0);
    pass.erased[i] = there ? A(constant[a.channels]) : A(0);
    pass.scale[i] = there ? A(constant[2 * a.channels]) : A(0);
    pass.shift[i] = there ? A(constant[3 * a.channels]) : A(0);
  }
  return pass;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t pixel_tiles(const AugmentArgs& a) {
  return divide_up(a.out_height * a.out_width, kThreads * kPixels);
}
template <class A>
int64_t row_tiles(const AugmentArgs& a) {
  return divide_up(a.out_height, kThreads / kSumLanes<A>);
}

template <class A, class... Parameters, class... Arguments>
int launch_pass(void (*kernel)(Pass<A>, Parameters...), const Pass<A>& pass, int64_t shared_values,
                void* stream, Arguments... arguments) {
  return launch(kernel, blocks_for(pass.items, 1), kThreads, size_t(shared_values) * sizeof(A), stream, pass,
                arguments...);
}

// f(first channel, channels) for as many channels as a launch takes, until one gives an error.
template <class F>
int for_each_group(const AugmentArgs& a, F f) {
  int error = 0;
  for (int64_t first = 0; first < a.channels && !error; first += kMostChannels)
    error = f(int(first), int(a.channels - first < kMostChannels ? a.channels - first : kMostChannels));
  return error;
}

template <class A>
int find_shrinks(const AugmentArgs& a, const Scratch<A>& scratch, void* stream) {
  return scratch.shrinks
             ? launch(shrink_rows, blocks_for(a.batch, kThreads), kThreads, 0, stream, a, scratch.shrinks)
             : 0;
}

template <class P, int C>
int sum_grey(const AugmentArgs& a, const Scratch<typename P::A>& scratch, void* stream) {
  using A = typename P::A;
  if (!scratch.sums) return 0;
  return launch_pass(grey_sums<P, C>, pass_of(a, scratch, 0, C, 1, row_tiles<A>(a)), 0, stream);
}

template <class P, int C>
int forward(const AugmentArgs& a, void* stream) {
  using A = typename P::A;
  const Scratch<A> scratch(a, false);
  if (const int error = find_shrinks(a, scratch, stream)) return error;
  if (const int error = sum_grey<P, C>(a, scratch, stream)) return error;
  return for_each_group(a, [&](int first, int channels) {
    const int groups = channels / C;
    if (!a.blur)
      return launch_pass(augment_pixels<P, C>, pass_of(a, scratch, first, channels, groups, pixel_tiles(a)),
                         0, stream);
    const Tile tile = tile_of(a, sizeof(A));
    const int64_t across = divide_up(a.out_width, tile.width);
    Pass<A> pass =
        pass_of(a, scratch, first, channels, groups, across * divide_up(a.out_height, tile.height));
    pass.across = Divider(across);
    const int64_t shared = tile_values(tile, a.blur_width, a.blur_height, C);
    const int error = launch_pass(augment_tiles<P, C>, pass, shared, stream, tile);
    if (error || tile.down) return error;
    return launch_pass(blur_down<A>, pass_of(a, scratch, first, channels, channels, pixel_tiles(a)),
                       a.blur_height, stream);
  });
}

template <class T, int C>
int backward(const AugmentArgs& a, void* stream) {
  using A = typename Accumulate<T>::type;
  constexpr bool kConverted = !std::is_same_v<T, A>;
  const Scratch<A> scratch(a, true);
  const int64_t values = a.batch * a.channels * a.in_height * a.in_width;
  Sums<A> sums = {scratch.in_grad,
                  {a.channels * a.in_height * a.in_width, a.in_height * a.in_width, a.in_width, 1}};
  if (!kConverted)
    sums = {static_cast<A*>(a.output), {a.out_stride[0], a.out_stride[1], a.out_stride[2], a.out_stride[3]}};
  if (const int error = zero(sums.data, values, stream)) return error;
  if (const int error = find_shrinks(a, scratch, stream)) return error;
  if (const int error = sum_grey<Grid<A>, C>(a, scratch, stream)) return error;
  const int error = for_each_group(a, [&](int first, int channels) {
    const int64_t skipped = first * a.out_height * a.out_width;
    A *grad = scratch.grad + skipped, *spare = scratch.spare + skipped;
    const Pass<A> by_channel = pass_of(a, scratch, first, channels, channels, pixel_tiles(a));
    int error = launch_pass(incoming_gradient<A>, by_channel, 0, stream, grad);
    if (a.blur && !error)
      error = launch_pass(blur_backward<A>, by_channel, a.blur_height, stream, grad, spare, true);
    if (a.blur && !error)
      error = launch_pass(blur_backward<A>, by_channel, a.blur_width, stream, spare, grad, false);
    if (!error && scratch.through_mean)
      error = launch_pass(blends_backward_rows<A, C>,
                          pass_of(a, scratch, first, channels, channels / C, row_tiles<A>(a)), 0, stream,
                          grad, scratch.through_mean);
    if (error) return error;
    Sums<A> part = sums;
    part.data += first * sums.stride[1];
    return launch_pass(warp_backward<A, C>,
                       pass_of(a, scratch, first, channels, channels / C, pixel_tiles(a)), 0, stream, grad,
                       scratch.through_mean, part);
  });
  if constexpr (kConverted)
    if (!error)
      return launch(round_gradient<T>, blocks_for(values, kThreads), kThreads, 0, stream, a, scratch.in_grad,
                    Divider(a.in_width), Divider(a.in_height), Divider(a.channels), values);
  return error;
}

int64_t scratch_bytes(const AugmentArgs& a, bool backward) {
  return a.in_type == PixelType::kFloat64 ? Scratch<double>(a, backward).bytes
                                          : Scratch<float>(a, backward).bytes;
}

}  // namespace

int64_t augment_cuda_bytes(const AugmentArgs& a) {
  return a.blur && !tile_of(a, a.in_type == PixelType::kFloat64 ? 8 : 4).height ? -1
                                                                                : scratch_bytes(a, false);
}
int64_t augment_backward_cuda_bytes(const AugmentArgs& a) { return scratch_bytes(a, true); }

int augment_cuda(const AugmentArgs& a, void* stream) {
  const auto run = [&](auto* pixels) {
    using P = std::remove_pointer_t<decltype(pixels)>;
    return together(a) == 3 ? forward<P, 3>(a, stream) : forward<P, 1>(a, stream);
  };
  if (antialiases(a))
    return a.in_type == PixelType::kFloat64 ? run(static_cast<Grid<double>*>(nullptr))
                                            : run(static_cast<Grid<float>*>(nullptr));
  if (a.in_type == PixelType::kUInt8) return run(static_cast<Image<uint8_t>*>(nullptr));
  return with_dtype(DType(int(a.in_type)), [&](auto* type) {
    return run(static_cast<Image<std::remove_pointer_t<decltype(type)>>*>(nullptr));
  });
}

int augment_backward_cuda(const AugmentArgs& a, void* stream) {
  return with_dtype(DType(int(a.in_type)), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return together(a) == 3 ? backward<T, 3>(a, stream) : backward<T, 1>(a, stream);
  });
}

int augment_draw_cuda(const DrawArgs& args, void* stream) {
  return launch(draw_rows, blocks_for(args.sample.batch, kThreads), kThreads, 0, stream, args);
}
int augment_matrices_cuda(const MatrixArgs& args, void* stream) {
  return launch(matrix_rows, blocks_for(args.batch, kThreads), kThreads, 0, stream, args);
}
int augment_gaussian_cuda(const GaussianArgs& args, void* stream) {
  return launch(gaussian_rows, blocks_for(args.batch, kThreads), kThreads, 0, stream, args);
}

}  // namespace fastreg
