// Tests of the steps of a policy on bytes: against plain loops over the formulas of augment_tones.h, in
// double, and the same bits on every instruction set.
#include "../../csrc/augment/augment_tones.h"

#include <algorithm>
#include <utility>

#include "harness.h"

namespace fastreg::test::augment_tones_test {
namespace {

struct TonesCase {
  int64_t channels, height, width;
  bool last;
  int64_t step;
  double strength;
};

// The image of a case, its results, and what the formulas give.
struct Picture {
  const TonesCase& c;
  Array images, output;

  explicit Picture(const TonesCase& c)
      : c(c),
        images(1, contiguous(c.channels * c.height * c.width)),
        output(1, contiguous(c.channels * c.height * c.width)) {}

  int64_t at(int64_t channel, int64_t y, int64_t x) const {
    return c.last ? (y * c.width + x) * c.channels + channel : (channel * c.height + y) * c.width + x;
  }
  double pixel(int64_t channel, int64_t y, int64_t x) const { return double(images.raw(at(channel, y, x))); }
  double in_float(double x) const { return round_to(DType::kFloat32, x); }
  double level(double x) const { return std::floor(x < 0 ? 0 : x > 255 ? 255 : x); }

  // Grey as torch adds it up: a product is rounded with the sum, or, where the mean is wanted, before it.
  double grey(int64_t y, int64_t x, bool at_once) const {
    if (c.channels == 1) return pixel(0, y, x);
    const double r = in_float(0.2989), g = in_float(0.587), b = in_float(0.114);
    const auto added = [&](double sum, double product) {
      return in_float(sum + (at_once ? product : in_float(product)));
    };
    const double red = in_float(r * pixel(0, y, x));
    return std::floor(added(added(red, g * pixel(1, y, x)), b * pixel(2, y, x)));
  }
  double mean() const {
    double sum = 0;
    for (int64_t y = 0; y < c.height; ++y)
      for (int64_t x = 0; x < c.width; ++x) sum += grey(y, x, false);
    return in_float(sum / double(c.height * c.width));
  }
  int64_t below(int64_t channel, double bound) const {
    int64_t count = 0;
    for (int64_t y = 0; y < c.height; ++y)
      for (int64_t x = 0; x < c.width; ++x) count += pixel(channel, y, x) < bound;
    return count;
  }
  double extreme(int64_t channel, bool high) const {
    double found = pixel(channel, 0, 0);
    for (int64_t y = 0; y < c.height; ++y)
      for (int64_t x = 0; x < c.width; ++x) {
        const double p = pixel(channel, y, x);
        found = high ? std::max(found, p) : std::min(found, p);
      }
    return found;
  }
  double sharpened(int64_t channel, int64_t y, int64_t x, double rest) const {
    const double p = pixel(channel, y, x);
    if (y == 0 || x == 0 || y == c.height - 1 || x == c.width - 1) return p;
    double sum = 4 * p;
    for (int64_t i = -1; i <= 1; ++i)
      for (int64_t j = -1; j <= 1; ++j) sum += pixel(channel, y + i, x + j);
    return level(in_float(p + rest * (std::nearbyint(sum / 13) - p)));
  }
  double wanted(int64_t channel, int64_t y, int64_t x, double mean) const {
    const double p = pixel(channel, y, x), s = c.strength;
    const double factor = in_float(1 + s), rest = in_float(1 - (1 + s));
    switch (Tone(c.step)) {
      case Tone::kBrightness:
        return level(in_float(p * factor));
      case Tone::kSaturation:
        if (c.channels == 1) return p;
        return level(in_float(in_float(p * factor) + rest * grey(y, x, true)));
      case Tone::kContrast:
        return level(in_float(in_float(p * factor) + in_float(rest * mean)));
      case Tone::kSharpness:
        return sharpened(channel, y, x, rest);
      case Tone::kPosterize:
        return p - std::fmod(p, std::exp2(8 - s));
      case Tone::kSolarize:
        return p >= in_float(255 * s) ? 255 - p : p;
      case Tone::kAutocontrast: {
        const double low = extreme(channel, false), high = extreme(channel, true);
        if (low == high) return p;
        return level(in_float((p - low) / in_float((high - low) * in_float(1 / 255.))));
      }
      case Tone::kEqualize: {
        const int64_t step = below(channel, extreme(channel, true)) / 255;
        return step ? double(std::min<int64_t>(255, (below(channel, p) + step / 2) / step)) : p;
      }
      case Tone::kInvert:
        return 255 - p;
      default:
        return p;
    }
  }
};

void tones_case(const TonesCase& c, int count) {
  const std::string name = "augment_tones/" + std::to_string(c.step);
  current_case = name + " sides " + std::to_string(c.height) + " " + std::to_string(c.width) + " channels " +
                 std::to_string(c.channels) + (c.last ? " last" : "");
  Picture picture(c);
  Random random{uint64_t(count) * 31 + 3};
  const int64_t levels = count % 3 ? 256 : 20;
  for (int64_t i = 0; i < picture.images.numel(); ++i)
    picture.images.set_raw(i, uint64_t(random.below(levels) + (256 - levels) / 2));
  // The second of two samples, of which the first is not there.
  const int64_t steps[] = {0, c.step};
  const double strengths[] = {0, c.strength};
  TonesArgs a{};
  a.channels = c.channels;
  a.height = c.height;
  a.width = c.width;
  a.channels_last = c.last;
  a.steps = steps;
  a.strengths = strengths;
  a.images = picture.images.data<uint8_t>() - a.sample_bytes();
  a.output = picture.output.data<uint8_t>() - a.sample_bytes();
  kernels::augment_tones_kernels.apply(a, 1);

  const double mean = picture.mean();
  for (int64_t channel = 0; channel < c.channels; ++channel)
    for (int64_t y = 0; y < c.height; ++y)
      for (int64_t x = 0; x < c.width; ++x) {
        const double want = picture.wanted(channel, y, x, mean);
        const uint64_t got = picture.output.raw(picture.at(channel, y, x));
        if (double(got) != want)
          fail("channel %lld row %lld column %lld is %d, expected %g", (long long)channel, (long long)y,
               (long long)x, int(got), want);
      }
  picture.output.expect_guards("output");
  picture.output.add_to(digests[name]);
}

void tones() {
  int count = 0;
  for (const int64_t step : {0, 6, 7, 8, 9, 10, 11, 12, 13, 14})
    for (const int64_t channels : {1, 3})
      for (const bool last : {false, true})
        for (const auto& [height, width] :
             {std::pair<int64_t, int64_t>{1, 1}, {2, 7}, {3, 17}, {20, 31}, {3, 530}}) {
          const double strength = step == 10   ? double(count % 9)
                                  : step == 11 ? 0.37
                                               : 0.013 * (count % 140) - 0.9;
          tones_case({channels, height, width, last, step, strength}, count++);
        }
}
const Case tones_cases(tones);

}  // namespace
}  // namespace fastreg::test::augment_tones_test
