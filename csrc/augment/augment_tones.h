// The steps of a policy that change the values of bytes: each sample has one, of its own strength s.
//
//   brightness    p <- clamp((1 + s) p)
//   saturation    p <- clamp((1 + s) p - s grey); grey, and the two above it, as in augment_math.h
//   contrast      p <- clamp((1 + s) p - s m), m the mean of grey over the image
//   sharpness     p <- clamp(p - s (smooth - p)) of the inner pixels
//   posterize     p <- p without all but the upper s bits
//   solarize      p <- 255 - p where p >= 255 s
//   autocontrast  p <- clamp((p - low) / ((high - low) / 255))
//   equalize      p <- (pixels of the channel below p + step / 2) / step
//   invert        p <- 255 - p
//
// smooth is the mean of a pixel and its eight neighbours, in which the pixel counts five times, rounded to
// whole levels; low and high are of the channel, and where they are one p stays; step is a 255th of the
// pixels below high, and where it is 0 p stays.
//
// Each is torchvision.transforms.v2.functional's, whose rounding it has: all round down at the end.
#pragma once
#include <cmath>

#include "../common/isa.h"
#include "augment_colour.h"

namespace fastreg {

// The numbers are those of OPERATIONS in fastreg/augment/_tone_op.py. The others there leave the values.
enum class Tone : int64_t {
  kBrightness = 6,
  kSaturation,
  kContrast,
  kSharpness,
  kPosterize,
  kSolarize,
  kAutocontrast,
  kEqualize,
  kInvert,
  kCount
};

struct TonesArgs {
  const uint8_t* images;
  uint8_t* output;
  int64_t batch, channels, height, width;  // 1 or 3 channels
  bool channels_last;                      // both lie in memory in this order, without gaps
  const int64_t* steps;                    // of each sample
  const double* strengths;
  void* scratch;  // on CUDA, of tones_scratch_bytes

  FR_HD int64_t pixels() const { return height * width; }
  FR_HD int64_t sample_bytes() const { return channels * pixels(); }
};

constexpr int kLevels = 256;

// ---- what each level of a channel becomes

// The level before it is rounded down. Where low and high are one there is no other.
FR_HD float autocontrasted(int level, int low, int high) {
  if (low == high) return float(level);
  const float scale = float(high - low) * (1.f / 255.f);
  return minimum(255.f, float(level - low) / scale);
}
// `step` is a 255th of the pixels below the highest level, `below` the pixels of lower levels. Both are below
// 2^31, so that a quotient in float64 is rounded to no whole number that it is not. N is double where there
// are vectors of it, and a whole number where those are quicker.
template <class N>
FR_HD uint8_t equalized(int level, uint32_t below, uint32_t step) {
  if (step == 0) return uint8_t(level);
  const N spread = N(below + step / 2) / N(step);
  return uint8_t(spread < N(255) ? spread : N(255));
}
FR_HD uint32_t step_of(int64_t pixels, uint32_t in_highest) { return (uint32_t(pixels) - in_highest) / 255; }
FR_HD uint8_t kept_bits(double strength) {
  const int bits = strength < 8 ? int(maximum(0., strength)) : 8;
  return uint8_t(256 - (256 >> bits));
}
FR_HD uint8_t threshold_of(double strength) {
  uint8_t threshold;
  from_float(ceilf(float(255 * strength)), &threshold);
  return threshold;
}

// ---- what a pixel becomes

template <class V>
FR_HD V level_of(const V& x) {
  return floor_small(clamp(x, V(255.f)));
}
// add_product(a, b, c) is a * b + c, rounded once, as torch's operators do wherever the processor can.
template <class V, class AddProduct>
FR_HD void saturate_pixel(V keep, V rest, V& r, V& g, V& b, AddProduct add_product) {
  const V red = r * V(float(kGreyRed));
  const V grey = floor_small(add_product(b, V(float(kGreyBlue)), add_product(g, V(float(kGreyGreen)), red)));
  r = level_of(add_product(grey, rest, r * keep));
  g = level_of(add_product(grey, rest, g * keep));
  b = level_of(add_product(grey, rest, b * keep));
}
// What a pixel of value p would change by to be smooth, from the sum of it and the eight around it. A 13th,
// to the nearest: no sum is halfway between two, and none is above 13 * 255, so that the product is as good
// as the division.
FR_HD int change_to_smooth(int nine, int p) {
  const uint16_t sum = uint16_t(nine + 4 * p);
  return int(uint32_t(uint16_t(sum + 6)) * 5042u >> 16) - p;
}

// ---- the CPU's kernel and the launch of CUDA, which gives a cudaError_t

struct TonesKernels {
  void (*apply)(const TonesArgs&, int64_t sample);
};
FR_DECLARE_KERNELS(TonesKernels, augment_tones_kernels)

// Of each sample the sum of its grey, and then the pixels of each level of each channel.
inline int64_t tones_scratch_bytes(const TonesArgs& a) {
  return a.batch * (int64_t(sizeof(uint64_t)) + a.channels * kLevels * int64_t(sizeof(uint32_t)));
}
int augment_tones_cuda(const TonesArgs& args, void* stream);

}  // namespace fastreg
