// Augmentation of a batch of images in one pass: its stages, the arguments of its kernels, and the table of
// the CPU's kernels. The arithmetic of one pixel stands beside this file, a file for each stage, the same for
// both devices. Of output pixel (x, y) of a sample:
//
//   geometry (augment_geometry.h)
//     source      (u, v) = M (x, y, 1), M the sample's inverse matrix, in pixels from the first one's centre
//     resampling  the image at (u, v): nearest, bilinear, or bicubic with a = -0.75 (Keys 1981)
//   colour (augment_colour.h); grey = 0.2989 r + 0.587 g + 0.114 b
//     brightness  p <- clamp(f p)
//     contrast    p <- clamp(f p + (1 - f) m), m the mean of grey over the whole output image at this point
//     saturation  p <- clamp(f p + (1 - f) grey)
//     hue         p <- hsv^-1(h + f, s, v)
//   filter (augment_filter.h)
//     antialias   the image is shrunk by a filter before the resampling, where the matrix makes it smaller
//     blur        separable; the border is reflected without repeating the edge
//   the end
//     normalise   (p - mean) / std, as a scale and a shift
//     erase       a constant inside a box
//
// The resampling is torch's grid_sample; each step is torchvision.transforms.v2.functional's of the same
// name. Pixels lie in [0, bound] with bound = 1, or 255 for uint8. An output of uint8 is rounded after each
// step as torchvision rounds it; every other output is rounded once, at the end. What a sample draws, and the
// tables made of it, stand in augment_draw.h.
//
// In all files of this folder a row is a line of an image, and a window is the rectangle of a sample's source
// image that may be read. The numbers of the enumerations are those of the lists in fastreg/augment.
#pragma once
#include <cmath>
#include <cstdint>

#include "../common/device.h"
#include "../common/isa.h"

namespace fastreg {

enum class PixelType : int { kFloat32, kFloat64, kFloat16, kBFloat16, kUInt8 };
static_assert(int(PixelType::kFloat32) == int(DType::kFloat32) &&
                  int(PixelType::kFloat64) == int(DType::kFloat64) &&
                  int(PixelType::kFloat16) == int(DType::kFloat16) &&
                  int(PixelType::kBFloat16) == int(DType::kBFloat16),
              "a floating PixelType is cast to the DType of the same name");
FR_HD DType floating_type(PixelType type) { return DType(int(type)); }  // of every type but kUInt8
FR_HD int64_t pixel_bytes(PixelType type) {
  constexpr int64_t kBytes[] = {4, 8, 2, 2, 1};
  static_assert(sizeof kBytes / sizeof kBytes[0] == size_t(PixelType::kUInt8) + 1);
  return kBytes[int(type)];
}

enum class Interpolation : int { kNearest, kBilinear, kBicubic, kCount };
enum class Padding : int { kZeros, kBorder, kReflect, kFill, kCount };

// The columns of the table of colour factors, and the bits that say which of them are used.
enum ColourColumn { kBrightnessColumn, kContrastColumn, kSaturationColumn, kHueColumn, kColourColumns };
enum ColourStep : int { kBrightness = 1, kContrast = 2, kSaturation = 4, kHue = 8, kAllColourSteps = 15 };
static_assert(kBrightness == 1 << kBrightnessColumn && kContrast == 1 << kContrastColumn &&
                  kSaturation == 1 << kSaturationColumn && kHue == 1 << kHueColumn &&
                  kAllColourSteps == (1 << kColourColumns) - 1,
              "the step of a column is the bit of that number");

// The rows of the table of constants, which has a column for each channel.
enum ConstantRow { kFillRow, kErasedRow, kScaleRow, kShiftRow, kConstantRows };

struct AugmentArgs {
  PixelType in_type, out_type;
  int64_t batch, channels, in_height, in_width, out_height, out_width;
  const void* images;
  void* output;
  int64_t in_stride[4], out_stride[4];  // of sample, channel, row, pixel
  const double* matrices;  // (batch, 2, 3), or null: output and input have one shape and there is no geometry
  const double* colour;    // (batch, kColourColumns), or null
  const double* blur;      // (batch, blur_width + blur_height) weights, or null
  const int64_t* boxes;    // (batch, 4): top, left, height, width of what is erased; or null
  const int64_t* windows;  // (batch, 4): top, left, height, width of the window; or null: the whole image
  const double* constants;  // (kConstantRows, channels)
  int64_t blur_width, blur_height;
  int colour_steps;  // of ColourStep
  Interpolation interpolation;
  Padding padding;
  bool antialias, normalise;
  // Only of backward, where `output` is the gradient of the images and `images` is what forward was given.
  const void* grad;
  int64_t grad_stride[4];
  void* scratch;  // on CUDA, of as many bytes as the launcher asks for

  FR_HD double constant(ConstantRow row, int64_t channel) const {
    return constants[row * channels + channel];
  }
  FR_HD double factor(int64_t sample, ColourColumn column) const {
    return colour[kColourColumns * sample + column];
  }
};

struct Window {
  int64_t top, left, height, width;
  FR_HD bool lies_inside(int64_t in_height, int64_t in_width) const {
    return top >= 0 && left >= 0 && height > 0 && width > 0 && height <= in_height - top &&
           width <= in_width - left;
  }
};
FR_HD Window window_of(const AugmentArgs& a, int64_t sample) {
  if (!a.windows) return {0, 0, a.in_height, a.in_width};
  const int64_t* window = a.windows + 4 * sample;
  return {window[0], window[1], window[2], window[3]};
}

// ---- the CPU's kernels, on rows [begin, end) of one sample

// Memory that a sample, or a thread, works in. The functions of the table give the sizes.
struct AugmentScratch {
  void* source;  // the planes of the image, where they cannot be read as they are
  void* image;   // resampled and brightened, where contrast needs the mean of that first
  void* sums;    // of grey, by row
  void* rows;    // of one thread
};

struct AugmentKernels {
  int64_t (*source_bytes)(const AugmentArgs&);  // 0 where there is no such stage
  int64_t (*source_rows)(const AugmentArgs&);
  int64_t (*image_bytes)(const AugmentArgs&);
  int64_t (*rows_bytes)(const AugmentArgs&);
  int64_t (*backward_bytes)(const AugmentArgs&);
  // Fills scratch.source, of which the rows are counted here.
  void (*source)(const AugmentArgs&, const AugmentScratch&, int64_t sample, int64_t begin, int64_t end);
  // Fills scratch.image and scratch.sums.
  void (*prepare)(const AugmentArgs&, const AugmentScratch&, int64_t sample, int64_t begin, int64_t end);
  // Writes the output.
  void (*finish)(const AugmentArgs&, const AugmentScratch&, int64_t sample, int64_t begin, int64_t end);
  void (*backward)(const AugmentArgs&, void* scratch, int64_t sample);
};
FR_DECLARE_KERNELS(AugmentKernels, augment_kernels)

// ---- the launches of CUDA, each of which gives a cudaError_t

// Bytes of scratch; negative where the blur's kernel is too large.
int64_t augment_cuda_bytes(const AugmentArgs& args);
int augment_cuda(const AugmentArgs& args, void* stream);
int64_t augment_backward_cuda_bytes(const AugmentArgs& args);
int augment_backward_cuda(const AugmentArgs& args, void* stream);

}  // namespace fastreg
