// Augmentation on CUDA: kernels without blur, and the launches; stages as in augment_math.h. A thread makes
// an output pixel of all its channels, or of one channel where there are other than three. Neighbouring lanes
// make neighbouring pixels, so that a warp's loads and stores are whole sectors.
//
// Launches: one; with contrast one before it, which sums the rows of grey; with a blur of more than 13 pixels
// one after it (augment_filter_cuda.h); with antialias one at first, which looks at the matrices, a sample
// each. Bytes per value: the source's, once from memory (the four neighbours of bilinear pixels come from the
// cache), twice with contrast, and the output's, written once.
//
// The mode of csrc/common/flush_mode.h, so that the bits are those of the CPU:
// nvcc flags: -ftz=true -DFASTREG_FTZ
#include "augment_backward_cuda.h"
#include "augment_draw.h"
#include "augment_tones_cuda.h"

namespace fastreg {
inline namespace augment_kernels {

template <class P, int C, class A = typename P::A>
__global__ void __launch_bounds__(kThreads, P::kBlocks) augment_pixels(const Pass<A> pass) {
  __shared__ Sample<A> s;
  for (int64_t item = blockIdx.x; item < pass.items; item += gridDim.x) {
    const auto place = pass.template place<C>(item);
    const int channel = place.channel;
    begin_item<P>(pass, place.sample, true, s);
    const P pixels(pass, s, channel);
    for_each_pixel(pass, place.piece, [&](int32_t x, int32_t y) {
      A p[C];
      coloured_pixel(pass, s, pixels, channel, x, y, pass.a.colour_steps, p);
      emit(pass, s, place.sample, channel, x, y, p);
    });
  }
}

template <class P, int C>
int forward(const AugmentArgs& a, void* stream) {
  using A = typename P::A;
  const Scratch<A> scratch(a, false);
  if (const int error = find_shrinks(a, scratch, stream)) return error;
  if (const int error = sum_grey<P, C>(a, scratch, stream)) return error;
  return for_each_channel_range(a, [&](int first, int channels) {
    const int groups = channels / C;
    if (!a.blur)
      return launch_pass(augment_pixels<P, C>, pass_of(a, scratch, first, channels, groups, pixel_pieces(a)),
                         0, stream);
    const BlurTile tile = tile_of(a, sizeof(A));
    const int64_t across = divide_up(a.out_width, tile.width), down = divide_up(a.out_height, tile.height);
    Pass<A> pass = pass_of(a, scratch, first, channels, groups, across * down);
    pass.across = Divider(across);
    const int64_t shared = tile_values(tile, a.blur_width, a.blur_height, C);
    const int error = launch_pass(augment_tiles<P, C>, pass, shared, stream, tile);
    if (error || tile.down) return error;
    return launch_pass(blur_down<A>, pass_of(a, scratch, first, channels, channels, pixel_pieces(a)),
                       a.blur_height, stream);
  });
}

// ---- what each sample draws: a row of a table for each, in float64

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
__global__ void words_of_draws(const WordsArgs args) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.batch * args.count;
       i += int64_t(gridDim.x) * kThreads)
    words_of_draw(args, i);
}
__global__ void gaussian_rows(const GaussianArgs args) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.batch;
       i += int64_t(gridDim.x) * kThreads)
    gaussian_row(args, i);
}

}  // namespace augment_kernels

int64_t augment_cuda_bytes(const AugmentArgs& a) {
  const int64_t value_bytes = a.in_type == PixelType::kFloat64 ? 8 : 4;
  if (a.blur && tile_of(a, value_bytes).height == 0) return -1;
  return scratch_bytes(a, false);
}
int64_t augment_backward_cuda_bytes(const AugmentArgs& a) { return scratch_bytes(a, true); }

int augment_cuda(const AugmentArgs& a, void* stream) {
  const auto forward_of = [&](auto* pixels) {
    using P = std::remove_pointer_t<decltype(pixels)>;
    return a.channels == 3 ? forward<P, 3>(a, stream) : forward<P, 1>(a, stream);
  };
  if (antialiases(a))
    return a.in_type == PixelType::kFloat64 ? forward_of(static_cast<Shrunken<double>*>(nullptr))
                                            : forward_of(static_cast<Shrunken<float>*>(nullptr));
  if (a.in_type == PixelType::kUInt8) return forward_of(static_cast<Image<uint8_t>*>(nullptr));
  return with_dtype(floating_type(a.in_type), [&](auto* type) {
    return forward_of(static_cast<Image<std::remove_pointer_t<decltype(type)>>*>(nullptr));
  });
}

int augment_backward_cuda(const AugmentArgs& a, void* stream) {
  return with_dtype(floating_type(a.in_type), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return a.channels == 3 ? backward<T, 3>(a, stream) : backward<T, 1>(a, stream);
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
int augment_tones_cuda(const TonesArgs& a, void* stream) {
  if (a.channels == 1) return tones<1, false>(a, stream);
  return a.channels_last ? tones<3, true>(a, stream) : tones<3, false>(a, stream);
}
int augment_words_cuda(const WordsArgs& args, void* stream) {
  return launch(words_of_draws, blocks_for(args.batch * args.count, kThreads), kThreads, 0, stream, args);
}

}  // namespace fastreg
