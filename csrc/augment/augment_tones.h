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
  int64_t channels, height, width;  // 1 or 3 channels
  bool channels_last;               // both lie in memory in this order, without gaps
  const int64_t* steps;             // of each sample
  const double* strengths;

  FR_HD int64_t sample_bytes() const { return channels * height * width; }
};

constexpr int kLevels = 256;

// ---- what each level of a channel becomes

inline uint8_t autocontrasted(int level, int low, int high) {
  if (low == high) return uint8_t(level);
  const float scale = float(high - low) * (1.f / 255.f);
  return uint8_t(minimum(255.f, float(level - low) / scale));
}
// From the number of pixels of each level.
inline void equalize_table(const int64_t* count, uint8_t* table) {
  int64_t all = 0, highest = 0, below = 0;
  for (int i = 0; i < kLevels; ++i) {
    all += count[i];
    if (count[i]) highest = count[i];
  }
  const int64_t step = (all - highest) / 255;
  for (int i = 0; i < kLevels; ++i) {
    const int64_t spread = step ? (below + step / 2) / step : i;
    table[i] = uint8_t(spread < 255 ? spread : 255);
    below += count[i];
  }
}

struct TonesKernels {
  void (*apply)(const TonesArgs&, int64_t sample);
};
FR_DECLARE_KERNELS(TonesKernels, augment_tones_kernels)

}  // namespace fastreg
