// What the launches of augmentation on CUDA share, forward and backward: scratch memory, passes over the
// channels, and the kernels that come before a pixel is made. Part of augment_cuda.cu.
#pragma once
#include "augment_filter_cuda.h"

namespace fastreg {
inline namespace augment_kernels {

// ---- scratch

// Parts of scratch, one after another; with a null base they are only counted.
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

inline bool antialiases(const AugmentArgs& a) {
  return a.antialias && a.matrices && a.interpolation != Interpolation::kNearest;
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
    const bool rounds = a.in_type == PixelType::kFloat16 || a.in_type == PixelType::kBFloat16;
    shrinks = parts.take<Shrink>(antialiases(a) ? a.batch : 0);
    sums = parts.take<A>(rows);
    blurred = parts.take<A>(a.blur && !backward && !tile_of(a, sizeof(A)).down ? values : 0);
    grad = parts.take<A>(backward ? values : 0);
    spare = parts.take<A>(backward && a.blur ? values : 0);
    through_mean = parts.take<A>(blends ? a.batch * a.out_height : 0);
    in_grad = parts.take<A>(backward && rounds ? a.batch * a.channels * a.in_height * a.in_width : 0);
    bytes = parts.used;
  }
};
inline int64_t scratch_bytes(const AugmentArgs& a, bool backward) {
  return a.in_type == PixelType::kFloat64 ? Scratch<double>(a, backward).bytes
                                          : Scratch<float>(a, backward).bytes;
}

// ---- passes

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Pieces of a sample as for_each_pixel has them, and as sum_rows has them.
inline int64_t pixel_pieces(const AugmentArgs& a) {
  return divide_up(a.out_height * a.out_width, kThreads * kPixelsPerThread);
}
template <class A>
int64_t row_pieces(const AugmentArgs& a) {
  return divide_up(a.out_height, kThreads / kSumLanes<A>);
}

// A pointer moved by `count`; null stays null.
template <class T>
T* skipped(T* pointer, int64_t count) {
  return pointer ? pointer + count : pointer;
}

// A pass over channels [first, first + channels) in `groups`, each of `pieces`. To its kernels the first of
// them is channel 0.
template <class A>
Pass<A> pass_of(const AugmentArgs& a, const Scratch<A>& scratch, int first, int channels, int groups,
                int64_t pieces) {
  Pass<A> pass;
  pass.a = a;
  pass.a.images = static_cast<const char*>(a.images) + first * a.in_stride[1] * pixel_bytes(a.in_type);
  pass.a.output = static_cast<char*>(a.output) + first * a.out_stride[1] * pixel_bytes(a.out_type);
  pass.a.grad = skipped(static_cast<const char*>(a.grad), first * a.grad_stride[1] * pixel_bytes(a.out_type));
  pass.items = a.batch * groups * pieces;
  pass.pieces = Divider(pieces);
  pass.channel_groups = Divider(groups);
  pass.width = Divider(a.out_width);
  pass.shrinks = scratch.shrinks;
  pass.sums = scratch.sums;
  pass.blurred = skipped(scratch.blurred, first * a.out_height * a.out_width);
  for (int i = 0; i < kMostChannels; ++i) {
    const auto constant = [&](ConstantRow row) {
      return i < channels ? A(a.constant(row, first + i)) : A(0);
    };
    pass.fill[i] = a.padding == Padding::kFill ? constant(kFillRow) : A(0);
    pass.erased[i] = constant(kErasedRow);
    pass.scale[i] = constant(kScaleRow);
    pass.shift[i] = constant(kShiftRow);
  }
  return pass;
}

template <class A, class... Parameters, class... Arguments>
int launch_pass(void (*kernel)(Pass<A>, Parameters...), const Pass<A>& pass, int64_t shared_values,
                void* stream, Arguments... arguments) {
  return launch(kernel, blocks_for(pass.items, 1), kThreads, size_t(shared_values) * sizeof(A), stream, pass,
                arguments...);
}

// f(first channel, channels) for as many channels as a launch takes, until one gives an error.
template <class F>
int for_each_channel_range(const AugmentArgs& a, F f) {
  for (int64_t first = 0; first < a.channels; first += kMostChannels) {
    const int64_t rest = a.channels - first;
    if (const int error = f(int(first), int(rest < kMostChannels ? rest : kMostChannels))) return error;
  }
  return 0;
}

// ---- what comes before a pixel is made

// A row of a table for each sample, in float64.
__global__ void shrink_rows(const AugmentArgs a, Shrink* shrinks) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.batch;
       i += int64_t(gridDim.x) * kThreads)
    shrinks[i] = shrink_of(a, i);
}
template <class A>
int find_shrinks(const AugmentArgs& a, const Scratch<A>& scratch, void* stream) {
  if (!scratch.shrinks) return 0;
  return launch(shrink_rows, blocks_for(a.batch, kThreads), kThreads, 0, stream, a, scratch.shrinks);
}

template <class P, int C>
int sum_grey(const AugmentArgs& a, const Scratch<typename P::A>& scratch, void* stream) {
  using A = typename P::A;
  if (!scratch.sums) return 0;
  return launch_pass(grey_sums<P, C>, pass_of(a, scratch, 0, C, 1, row_pieces<A>(a)), 0, stream);
}

}  // namespace augment_kernels
}  // namespace fastreg
