// The steps of a policy on bytes, on the CPU. The formulas are in augment_tones.h.
// Bytes per pixel of a channel: it is read and written, 2, which is the floor. Contrast, autocontrast and
// equalize read the image before that, another 1, since what they do depends on all of it.
#include <cstring>

#include "augment_colour_cpu.h"
#include "augment_tones.h"

namespace fastreg::FASTREG_ISA {
namespace {

using V = Vec<float>;
constexpr int64_t kBytes = 512;  // of a channel, that are worked on in buffers

// a * b + c, rounded once, as torch's operators do wherever the processor can. Where it cannot the product is
// exact in float64, and so is the sum of numbers as near to each other as these.
FR_INLINE V add_product(const V& a, const V& b, const V& c) {
#if defined(__x86_64__) && !defined(__FMA__)
  float x[V::kLanes], y[V::kLanes], z[V::kLanes];
  store(x, a);
  store(y, b);
  store(z, c);
  for (int i = 0; i < V::kLanes; ++i) z[i] = float(double(x[i]) * double(y[i]) + double(z[i]));
  return load(z);
#else
  return multiply_add(a, b, c);
#endif
}

// One sample. Its planes are its channels, or, where the channels of a pixel are neighbours, all of it is one
// plane. From one pixel of a channel to the next is a step of `stride` bytes.
struct Sample {
  const uint8_t* in;
  uint8_t* out;
  int64_t channels, height, width, stride;

  Sample(const TonesArgs& a, int64_t sample)
      : in(a.images + sample * a.sample_bytes()),
        out(a.output + sample * a.sample_bytes()),
        channels(a.channels),
        height(a.height),
        width(a.width),
        stride(a.channels_last ? a.channels : 1) {}

  int64_t pixels() const { return height * width; }
  int64_t bytes() const { return channels * pixels(); }
  int64_t offset(int64_t channel) const { return stride == 1 ? channel * pixels() : channel; }
};

void copy(const Sample& s) { memcpy(s.out, s.in, size_t(s.bytes())); }

// f of each byte.
template <class F>
FR_INLINE void each_byte(const Sample& s, F f) {
  const uint8_t* in = s.in;
  uint8_t* out = s.out;
  const int64_t n = s.bytes();
  for (int64_t i = 0; i < n; ++i) out[i] = f(in[i]);
}

// f(n, pixels of each channel, room for the results) for blocks of pixels; the results are written
// where `out` is not null. Behind the pixels of a block there are others that do not count.
template <class F>
FR_INLINE void each_block(const Sample& s, uint8_t* out, F f) {
  uint8_t in_buffer[3][kBytes] = {}, out_buffer[3][kBytes];
  for (int64_t begin = 0; begin < s.pixels(); begin += kBytes) {
    const int64_t n = least(kBytes, s.pixels() - begin);
    for (int64_t c = 0; c < s.channels; ++c) {
      const uint8_t* p = s.in + s.offset(c) + begin * s.stride;
      if (s.stride == 1)
        memcpy(in_buffer[c], p, size_t(n));
      else
        for (int64_t i = 0; i < n; ++i) in_buffer[c][i] = p[i * s.stride];
    }
    f(n, in_buffer, out_buffer);
    for (int64_t c = 0; out && c < s.channels; ++c) {
      uint8_t* p = out + s.offset(c) + begin * s.stride;
      if (s.stride == 1)
        memcpy(p, out_buffer[c], size_t(n));
      else
        for (int64_t i = 0; i < n; ++i) p[i * s.stride] = out_buffer[c][i];
    }
  }
}

// ---- by a table of what each level becomes

void look_up(const Sample& s, const uint8_t (*table)[kLevels]) {
  for (int64_t c = 0; c < s.channels; ++c) {
    const uint8_t* __restrict in = s.in + s.offset(c);
    uint8_t* __restrict out = s.out + s.offset(c);
    const uint8_t* __restrict to = table[c];
    const int64_t n = s.pixels(), stride = s.stride;
    if (stride == 1) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < n; ++i) out[i] = to[in[i]];
    } else {
      for (int64_t i = 0; i < n; ++i) out[i * stride] = to[in[i * stride]];
    }
  }
}

void equalize(const Sample& s) {
  uint8_t table[3][kLevels];
  for (int64_t c = 0; c < s.channels; ++c) {
    // Neighbours are often of one level. Counted in one place they would wait for each other.
    uint32_t count[4][kLevels] = {};
    const uint8_t* in = s.in + s.offset(c);
    const int64_t n = s.pixels();
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
      for (int64_t j = 0; j < 4; ++j) ++count[j][in[(i + j) * s.stride]];
    for (; i < n; ++i) ++count[0][in[i * s.stride]];
    for (int j = 1; j < 4; ++j)
      for (int level = 0; level < kLevels; ++level) count[0][level] += count[j][level];
    uint32_t in_highest = 0, sum = 0, below[kLevels];
    for (int level = 0; level < kLevels; ++level) {
      if (count[0][level]) in_highest = count[0][level];
      below[level] = sum;
      sum += count[0][level];
    }
    const uint32_t step = step_of(n, in_highest);
    for (int level = 0; level < kLevels; ++level)
      table[c][level] = equalized<double>(level, below[level], step);
  }
  look_up(s, table);
}

void autocontrast(const Sample& s) {
  uint8_t low[3][kBytes], high[3][kBytes];
  memset(low, 255, sizeof low);
  memset(high, 0, sizeof high);
  each_block(s, nullptr, [&](int64_t n, auto& in, auto&) __attribute__((always_inline)) {
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t i = 0; i < n; ++i) {
        low[c][i] = least(low[c][i], in[c][i]);
        high[c][i] = most(high[c][i], in[c][i]);
      }
  });
  uint8_t table[3][kLevels];
  for (int64_t c = 0; c < s.channels; ++c) {
    uint8_t lowest = 255, highest = 0;
    for (int64_t i = 0; i < kBytes; ++i) {
      lowest = least(lowest, low[c][i]);
      highest = most(highest, high[c][i]);
    }
    // Of all levels, in vectors; those that no pixel has are cut off.
    for (int level = 0; level < kLevels; ++level)
      table[c][level] = uint8_t(most(0.f, autocontrasted(level, lowest, highest)));
  }
  look_up(s, table);
}

// ---- by arithmetic

ColourFactors<V> factors(double brightness, double contrast, double saturation, float mean) {
  double factor[kColourColumns] = {};
  factor[kBrightnessColumn] = brightness;
  factor[kContrastColumn] = contrast;
  factor[kSaturationColumn] = saturation;
  return {factor, 255.f, mean};
}

// Sums of whole numbers are exact in any order while they stay below 2^24.
float mean_of_grey(const Sample& s) {
  double sum = 0;
  each_block(s, nullptr, [&](int64_t n, auto& in, auto&) __attribute__((always_inline)) {
    V part(0.f);
    for_each_vector<float>(n, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      V grey = load(in[0] + i);
      if (s.channels == 3) grey = grey_of<true>(grey, load(in[1] + i), load(in[2] + i));
      part = part + (lanes < V::kLanes ? select(V::first(lanes), grey, V(0.f)) : grey);
    });
    sum += double(part.sum());
  });
  return mean_of_sum<float>(sum, s.pixels());
}

void brighten_or_contrast(const Sample& s, int step, double strength) {
  const ColourFactors<V> f =
      factors(1 + strength, 1 + strength, 1, step == kContrast ? mean_of_grey(s) : 0.f);
  each_block(s, s.out, [&](int64_t n, auto& in, auto& out) __attribute__((always_inline)) {
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t i = 0; i < n; i += V::kLanes) {
        V p = load(in[c] + i);
        colour_pixel<true>(f, step, p);
        store(out[c] + i, p);
      }
  });
}

void saturate(const Sample& s, double strength) {
  const double factor = 1 + strength;
  const V keep{float(factor)}, rest{float(1 - factor)};
  each_block(s, s.out, [&](int64_t n, auto& in, auto& out) __attribute__((always_inline)) {
    for (int64_t i = 0; i < n; i += V::kLanes) {
      V r = load(in[0] + i), g = load(in[1] + i), b = load(in[2] + i);
      saturate_pixel(keep, rest, r, g, b, add_product);
      store(out[0] + i, r);
      store(out[1] + i, g);
      store(out[2] + i, b);
    }
  });
}

// Bytes [begin, end) of a plane, from each of which to the one below is a step of `row`.
void sharpen_bytes(const uint8_t* in, uint8_t* out, int64_t begin, int64_t end, int64_t stride, int64_t row,
                   const V& weight) {
  constexpr int64_t kAround = 2 * 3;  // the neighbours before and behind a block, of three channels at most
  uint16_t column[kBytes + kAround];  // sums of a byte and those above and below
  float pixel[kBytes] = {}, change[kBytes] = {};
  uint8_t buffer[kBytes];
  for (; begin < end; begin += kBytes) {
    const int64_t n = least(kBytes, end - begin);
    const uint8_t* from = in + begin - stride;
    for (int64_t i = 0; i < n + 2 * stride; ++i)
      column[i] = uint16_t(from[i - row] + from[i] + from[i + row]);
    for (int64_t i = 0; i < n; ++i) {
      const int p = in[begin + i];
      pixel[i] = float(p);
      change[i] = float(change_to_smooth(column[i] + column[i + stride] + column[i + 2 * stride], p));
    }
    for (int64_t i = 0; i < n; i += V::kLanes)
      store(buffer + i, level_of(add_product(load(change + i), weight, load(pixel + i))));
    memcpy(out + begin, buffer, size_t(n));
  }
}

// A plane goes through as one row; afterwards its border becomes what it was.
void sharpen(const Sample& s, double strength) {
  if (s.height < 3 || s.width < 3) return copy(s);
  const V weight{float(1 - (1 + strength))};
  const int64_t planes = s.stride == 1 ? s.channels : 1, plane = s.bytes() / planes, row = plane / s.height;
  for (int64_t i = 0; i < planes; ++i) {
    const uint8_t* in = s.in + i * plane;
    uint8_t* out = s.out + i * plane;
    sharpen_bytes(in, out, row + s.stride, plane - row - s.stride, s.stride, row, weight);
    memcpy(out, in, size_t(row));
    memcpy(out + plane - row, in + plane - row, size_t(row));
    for (int64_t at = row; at < plane - row; at += row)
      for (int64_t c = 0; c < s.stride; ++c) {
        out[at + c] = in[at + c];
        out[at + row - s.stride + c] = in[at + row - s.stride + c];
      }
  }
}

void apply(const TonesArgs& a, int64_t sample) {
  const Sample s(a, sample);
  const double strength = a.strengths[sample];
  switch (Tone(a.steps[sample])) {
    case Tone::kBrightness:
      return brighten_or_contrast(s, kBrightness, strength);
    case Tone::kContrast:
      return brighten_or_contrast(s, kContrast, strength);
    case Tone::kSaturation:
      return s.channels == 3 ? saturate(s, strength) : copy(s);
    case Tone::kSharpness:
      return sharpen(s, strength);
    case Tone::kPosterize: {
      const uint8_t kept = kept_bits(strength);
      return each_byte(s, [=](uint8_t p) __attribute__((always_inline)) { return uint8_t(p & kept); });
    }
    case Tone::kSolarize: {
      const uint8_t threshold = threshold_of(strength);
      return each_byte(
          s, [=](uint8_t p) __attribute__((always_inline)) { return uint8_t(p >= threshold ? 255 - p : p); });
    }
    case Tone::kAutocontrast:
      return autocontrast(s);
    case Tone::kEqualize:
      return equalize(s);
    case Tone::kInvert:
      return each_byte(s, [](uint8_t p) __attribute__((always_inline)) { return uint8_t(255 - p); });
    default:
      return copy(s);
  }
}

}  // namespace

extern const TonesKernels augment_tones_kernels;
const TonesKernels augment_tones_kernels = {apply};

}  // namespace fastreg::FASTREG_ISA
