// What the CUDA kernels of augmentation share: what a launch is given, what a block knows of its sample, how
// the pixels of a sample are shared out, and sums over a sample. Part of augment_cuda.cu.
//
// An item is a piece of one sample, or of one of its channels where channels are made one by one. The blocks
// take the items of a launch in turn.
#pragma once
#include <type_traits>

#include "../common/cuda.h"
#include "augment_colour.h"
#include "augment_filter.h"

namespace fastreg {
inline namespace augment_kernels {

constexpr int kMostChannels = 32;    // of a launch, where channels are made one by one
constexpr int kPixelsPerThread = 4;  // of an item
template <class A>
constexpr int kSumLanes = 64 / sizeof(A);  // that share a row of grey: the sums of the CPU's vectors

// ---- what a launch is given

template <class A>
struct Pass {
  AugmentArgs a;
  int64_t items;  // samples times channel groups times pieces
  Divider pieces, channel_groups, across, width;
  const Shrink* shrinks;
  A *sums, *blurred;
  A fill[kMostChannels], erased[kMostChannels], scale[kMostChannels], shift[kMostChannels];

  struct Place {
    int64_t sample, piece;
    int channel;  // the first of its channel group
  };
  // Channel groups have C channels; of three there is only one.
  template <int C>
  __device__ __forceinline__ Place place(int64_t item) const {
    const int64_t made = pieces.divide(item), sample = C == 3 ? made : channel_groups.divide(made);
    return {sample, item - made * int64_t(pieces.divisor),
            C == 3 ? 0 : int(made - sample * int64_t(channel_groups.divisor))};
  }
};

// Where a value of the output's shape is in scratch: (batch, channels, height, width).
__device__ __forceinline__ int64_t kept_at(const AugmentArgs& a, int64_t sample, int channel, int64_t x,
                                           int64_t y) {
  return ((sample * a.channels + channel) * a.out_height + y) * a.out_width + x;
}

// Value i of an array of any PixelType.
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

// ---- what the threads of a block share of a sample

template <class A>
struct Sample {
  FixedMatrix matrix;
  int64_t offset;         // of the window's first pixel, from the first sample's
  int32_t height, width;  // of what is resampled: the window, or the shrunken image
  // Not bool, which the compiler loads together with the bytes after them.
  int32_t valid;      // 0: the matrix or the window is not usable, which the host cannot see
  int32_t one_pixel;  // an output pixel is one pixel of what is resampled
  int64_t fine[6];    // the matrix in finer units, for the grid
  NearestGrid<A> grid;
  int32_t shrinks;
  int32_t box[4];  // top, left, bottom, right of what is erased
  ColourFactors<A> factors;
  Filter<A> columns, rows;

  __device__ __forceinline__ SourcePoint at(int32_t x, int32_t y) const {
    return grid.on ? grid.at(x, y) : matrix.at(x, y);
  }
  __device__ __forceinline__ bool is_erased(int32_t x, int32_t y) const {
    return y >= box[0] && y < box[2] && x >= box[1] && x < box[3];
  }
};

// Done by the first warp: a lane loads each coefficient of the matrix, because the loads of one lane would
// wait for each other, and one lane does the rest.
template <bool kShrinks, class A>
__device__ __forceinline__ void set_up(const Pass<A>& pass, int64_t i, A mean, Sample<A>& s) {
  const AugmentArgs& a = pass.a;
  const int lane = threadIdx.x;
  const bool nearest = a.interpolation == Interpolation::kNearest && a.matrices;
  if (lane < 6) {
    s.matrix.m[lane] = a.matrices ? fixed_coefficient(a.matrices[6 * i + lane]) : lane % 4 == 0 ? kOne : 0;
    s.fine[lane] = nearest ? fine_coefficient(a.matrices[6 * i + lane]) : 0;
  }
  __syncwarp();
  if (lane != 0) return;
  const Window window = window_of(a, i);
  int64_t box[4] = {};
  if (a.boxes)
    for (int k = 0; k < 4; ++k) box[k] = a.boxes[4 * i + k];
  s.valid = window.lies_inside(a.in_height, a.in_width) && within_reach(s.matrix, a.out_height, a.out_width);
  s.offset = i * a.in_stride[0] + window.top * a.in_stride[2] + window.left * a.in_stride[3];
  s.height = int32_t(window.height);
  s.width = int32_t(window.width);
  s.shrinks = kShrinks && pass.shrinks && s.valid && pass.shrinks[i].on;
  if (kShrinks) {  // the compiler reads them before it is known whether the sample shrinks
    s.columns = Filter<A>{};
    s.rows = Filter<A>{};
  }
  if (kShrinks && s.shrinks) {
    const Shrink& shrink = pass.shrinks[i];
    s.columns = Filter<A>(shrink, 0, window.width, a.interpolation, a.padding);
    s.rows = Filter<A>(shrink, 1, window.height, a.interpolation, a.padding);
    s.width = int32_t(shrink.size[0]);
    s.height = int32_t(shrink.size[1]);
    s.matrix = shrink.rest;
  }
  s.one_pixel = a.interpolation == Interpolation::kNearest || is_straight(s.matrix);
  s.grid = NearestGrid<A>{};  // the compiler reads it before it is known whether it is on
  if (nearest) s.grid.set(s.matrix, a.matrices + 6 * i, s.fine, s.width, s.height, a.out_width, a.out_height);
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

// ---- what every kernel begins with, and how it shares out the pixels of an item

// The sample of an item, with the mean of its grey where contrast needs it.
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

// Calls f(x, y) for the pixels of an item that are this thread's. A piece is kThreads * kPixelsPerThread
// pixels.
template <class A, class F>
__device__ __forceinline__ void for_each_pixel(const Pass<A>& pass, int64_t piece, F f) {
  const int64_t pixels = pass.a.out_height * pass.a.out_width;
#pragma unroll 1
  for (int k = 0; k < kPixelsPerThread; ++k) {
    const int64_t i = (piece * kPixelsPerThread + k) * kThreads + threadIdx.x;
    if (i >= pixels) return;
    const int64_t y = pass.width.divide(i);
    f(int32_t(i - y * pass.a.out_width), int32_t(y));
  }
}

// Adds f(x, y) up over the rows of an item, in the order of the CPU's vectors. A piece is as many rows as a
// block has sets of kSumLanes lanes.
template <class A, class F>
__device__ __forceinline__ void sum_rows(const AugmentArgs& a, int64_t sample, int64_t piece, A* sums, F f) {
  const int lane = threadIdx.x % kSumLanes<A>;
  const int64_t y = piece * (kThreads / kSumLanes<A>)+threadIdx.x / kSumLanes<A>;
  A sum = 0;
  if (y < a.out_height) {
#pragma unroll 1
    for (int64_t x = lane; x < a.out_width; x += kSumLanes<A>) sum += f(int32_t(x), int32_t(y));
  }
#pragma unroll
  for (int distance = kSumLanes<A> / 2; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  if (lane == 0 && y < a.out_height) sums[sample * a.out_height + y] = sum;
}

}  // namespace augment_kernels
}  // namespace fastreg
