// The blur of augmentation on CUDA. Part of augment_cuda.cu. The filter of antialias is where the pixels of a
// shrunken image are made, in augment_geometry_cuda.h.
//
// The pixels of a tile and its surroundings are made in shared memory and blurred there. A kernel of more
// than 13 pixels takes two launches with a float32 image between them, because most pixels of a tile would be
// made for its neighbours' sake.
#pragma once
#include "augment_colour_cuda.h"

namespace fastreg {
inline namespace augment_kernels {

constexpr int kTileSide = 32;             // pixels along both sides of a tile that is blurred along both
constexpr int kRowTileWidth = 128;        // of a tile that is blurred along x only
constexpr int kTileBlur = 13;             // the largest kernel that is blurred along both sides in a tile
constexpr int64_t kTileBytes = 96 << 10;  // of shared memory, at most

struct BlurTile {
  int width, height;
  bool down;  // blur along y too
};
// How many values a tile holds in shared memory: weights, pixels, and pixels blurred along x.
inline int64_t tile_values(const BlurTile& tile, int64_t blur_width, int64_t blur_height, int channels) {
  const int64_t columns = tile.width + blur_width - 1, rows = tile.height + (tile.down ? blur_height - 1 : 0);
  return channels * rows * (columns + (tile.down ? tile.width : 0)) + blur_width + blur_height;
}
// The tile that shared memory has room for. Its height is 0 where there is no room for any.
inline BlurTile tile_of(const AugmentArgs& a, int64_t value_bytes) {
  const int channels = a.channels == 3 ? 3 : 1;
  const int64_t shared = int64_t(most_shared()) - 4096, most = shared < kTileBytes ? shared : kTileBytes;
  const auto fits = [&](const BlurTile& t) {
    return value_bytes * tile_values(t, a.blur_width, a.blur_height, channels) <= most;
  };
  BlurTile tile = {kTileSide, kTileSide, true};
  if (a.blur_width <= kTileBlur && a.blur_height <= kTileBlur && fits(tile)) return tile;
  tile = {kRowTileWidth, kTileSide, false};
  while (tile.height && !fits(tile)) tile.height /= 2;
  return tile;
}

// Calls f(row, column) for the pixels of a rectangle that are this thread's.
template <class F>
__device__ __forceinline__ void for_each_in(int rows, int columns, F f) {
  // i / columns without a division, exact below 2^32 / columns.
  const unsigned factor = 0xffffffffu / unsigned(columns) + 1;
  for (int i = threadIdx.x; i < rows * columns; i += kThreads) {
    const int row = columns == 1 ? i : int(__umulhi(unsigned(i), factor));
    f(row, i - row * columns);
  }
}

// Copies the weights of a sample's blur from `first` on to shared memory.
template <class A>
__device__ __forceinline__ void load_weights(const AugmentArgs& a, int64_t sample, int64_t first,
                                             int64_t count, A* weight) {
  const double* from = a.blur + sample * (a.blur_width + a.blur_height) + first;
  for (int64_t k = threadIdx.x; k < count; k += kThreads) weight[k] = A(from[k]);
}

// Makes the pixels of a tile and of what surrounds it by half a kernel, blurs them along x, then along y. A
// tile that is not blurred `down` goes to pass.blurred after x. Bytes per value: the source's, and the
// output's or those of pass.blurred.
template <class P, int C, class A = typename P::A>
__global__ void __launch_bounds__(kThreads, P::kLoopBlocks)
    augment_tiles(const Pass<A> pass, const BlurTile tile) {
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
    const int64_t tile_row = pass.across.divide(place.piece),
                  tile_column = place.piece - tile_row * int64_t(pass.across.divisor);
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

// Blurs along y what augment_tiles has blurred along x. Bytes per value: those of pass.blurred, once from
// memory, and the output's.
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
    for_each_pixel(pass, place.piece, [&](int32_t x, int32_t y) {
      A p[1] = {0};
      for (int64_t k = 0; k < a.blur_height; ++k)
        p[0] += weight[k] * plane[mirrored(y + k - a.blur_height / 2, a.out_height) * a.out_width + x];
      if (a.out_type == PixelType::kUInt8) p[0] = quantised(p[0], A(255));
      emit(pass, s, place.sample, channel, x, y, p);
    });
  }
}

}  // namespace augment_kernels
}  // namespace fastreg
