// Tests of the kernels of augmentation: the whole forward chain against the formulas of augment_math.h in
// double, pixel by pixel, and the gradient as the transpose of the chain.
#include <cstdlib>
#include <vector>

#include "../../csrc/augment/augment_math.h"
#include "harness.h"

namespace fastreg::test::augment_test {
namespace {

struct AugmentCase {
  PixelType in, out;
  int64_t batch, channels, height, width, out_height, out_width;
  int colour_steps;
  Interpolation interpolation;
  Padding padding;
  bool last, blurred, boxed, windowed, antialias, resampled, normalise;
};

// Values of pixels, uint8 among them.
struct Pixels {
  PixelType type;
  std::unique_ptr<Array> array;
  Pixels(PixelType type, int64_t numel) : type(type) {
    if (type == PixelType::kUInt8)
      array = std::make_unique<Array>(1, contiguous(numel));
    else
      array = std::make_unique<Array>(DType(int(type)), contiguous(numel));
  }
  double get(int64_t i) const { return type == PixelType::kUInt8 ? double(array->raw(i)) : array->get(i); }
  void set(int64_t i, double x) {
    type == PixelType::kUInt8 ? array->set_raw(i, uint64_t(x)) : array->set(i, x);
  }
};

double bounded(double x, double bound) { return x < 0 ? 0 : x > bound ? bound : x; }

// The cubic kernel of Keys 1981.
double keys(double x, double a) {
  x = std::fabs(x);
  return x < 1 ? ((a + 2) * x - (a + 3)) * x * x + 1 : x < 2 ? ((a * x - 5 * a) * x + 8 * a) * x - 4 * a : 0;
}

// What the formulas give for one value of image(row, column) at (u, v).
template <class F>
double sampled(F image, double u, double v, int64_t height, int64_t width, const AugmentCase& c,
               double fill) {
  if (c.interpolation == Interpolation::kNearest) u = std::nearbyint(u), v = std::nearbyint(v);
  double sum = 0, inside = 0;
  for (int64_t y = int64_t(std::floor(v)) - 1; y <= int64_t(std::floor(v)) + 2; ++y)
    for (int64_t x = int64_t(std::floor(u)) - 1; x <= int64_t(std::floor(u)) + 2; ++x) {
      const auto weight = [&](double d) {
        return c.interpolation == Interpolation::kBicubic ? keys(d, -0.75)
               : std::fabs(d) < 1                         ? 1 - std::fabs(d)
                                                          : 0;
      };
      const auto found = [&](int64_t i, int64_t n) -> int64_t {
        if (c.padding == Padding::kReflect) {
          while (i < 0 || i >= n) i = i < 0 ? -1 - i : 2 * n - 1 - i;
          return i;
        }
        if (c.padding == Padding::kBorder) return i < 0 ? 0 : i >= n ? n - 1 : i;
        return i < 0 || i >= n ? -1 : i;
      };
      const double w = weight(double(x) - u) * weight(double(y) - v);
      const int64_t column = found(x, width), row = found(y, height);
      if (w == 0 || column < 0 || row < 0) continue;
      inside += w;
      sum += w * image(row, column);
    }
  if (c.padding != Padding::kFill) return sum;
  return c.interpolation == Interpolation::kNearest ? (inside < 0.5 ? fill : sum)
                                                    : inside * (sum - fill) + fill;
}

// Everything that a call gets, drawn from the number of the case.
struct Inputs {
  Pixels images, out;
  std::vector<double> matrices, colour, blur, constants;  // 6, 4 and 8 for each sample; 4 for each channel
  std::vector<int64_t> boxes, windows;

  Inputs(const AugmentCase& c, int count)
      : images(c.in, c.batch * c.channels * c.height * c.width),
        out(c.out, c.batch * c.channels * c.out_height * c.out_width) {
    Random random{uint64_t(count) * 31 + 5};
    for (int64_t i = 0; i < images.array->numel(); ++i)
      images.set(i, c.in == PixelType::kUInt8 ? double(random.below(256)) : random.uniform());
    for (int64_t i = 0; i < c.batch; ++i) {
      add_matrix(c, i, random);
      for (const double factor :
           {0.5 + random.uniform(), 0.5 + random.uniform(), 0.5 + random.uniform(), random.uniform() - 0.5})
        colour.push_back(factor);
      for (const double w : {0.25, 0.5, 0.25, 0.125, 0.25, 0.25, 0.25, 0.125})
        blur.push_back(w);  // 3 across, 5 down
      for (const int64_t side : {int64_t(i), int64_t(1), int64_t(3), int64_t(c.out_width + 5)})
        boxes.push_back(side);
      for (const int64_t side : {int64_t(1), int64_t(0), c.height - 1, c.width - 1}) windows.push_back(side);
    }
    for (int64_t i = 0; i < 4 * c.channels; ++i) constants.push_back(0.25 + 0.1 * double(i));
  }

  void add_matrix(const AugmentCase& c, int64_t i, Random& random) {
    // Cosine and sine come from the tangent of half the angle: C libraries differ in the last bits of theirs.
    const double tangent = i % 3 ? 6 * random.uniform() - 3 : 0,
                 scale = (c.antialias ? 3 : 1) * (0.5 + random.uniform());
    const double a = scale * (1 - tangent * tangent) / (1 + tangent * tangent),
                 b = scale * 2 * tangent / (1 + tangent * tangent);
    const double height = c.windowed ? double(c.height - 1) : double(c.height),
                 width = c.windowed ? double(c.width - 1) : double(c.width);
    // The odd fractions stay away from ties of the nearest pixel, which rounding decides.
    const double u = 0.0123 + std::floor(3 * random.uniform()), v = 0.0071 - std::floor(2 * random.uniform());
    const double cx = double(c.out_width - 1) / 2, cy = double(c.out_height - 1) / 2;
    const bool plain = i % 4 == 3;  // whole pixels, backwards
    for (const double m :
         {plain ? -1 : a, plain ? 0 : b, plain ? width : (width - 1) / 2 - a * cx - b * cy + u,
          plain ? 0 : -b, plain ? 1 : a, plain ? -1 : (height - 1) / 2 + b * cx - a * cy + v})
      matrices.push_back(m);
  }
};

AugmentArgs arguments(const AugmentCase& c, const Inputs& in) {
  AugmentArgs a{};
  a.in_type = c.in;
  a.out_type = c.out;
  a.batch = c.batch;
  a.channels = c.channels;
  a.in_height = c.height;
  a.in_width = c.width;
  a.out_height = c.out_height;
  a.out_width = c.out_width;
  a.images = in.images.array->data();
  a.output = in.out.array->data();
  const auto strides = [&](int64_t* stride, int64_t height, int64_t width) {
    const int64_t planar[] = {c.channels * height * width, height * width, width, 1};
    const int64_t last[] = {c.channels * height * width, 1, width * c.channels, c.channels};
    for (int d = 0; d < 4; ++d) stride[d] = c.last ? last[d] : planar[d];
  };
  strides(a.in_stride, c.height, c.width);
  strides(a.out_stride, c.out_height, c.out_width);
  a.matrices = c.resampled ? in.matrices.data() : nullptr;
  a.colour = in.colour.data();
  a.colour_steps = c.colour_steps;
  a.blur = c.blurred ? in.blur.data() : nullptr;
  a.blur_width = c.blurred ? 3 : 1;
  a.blur_height = c.blurred ? 5 : 1;
  a.boxes = c.boxed ? in.boxes.data() : nullptr;
  a.windows = c.windowed ? in.windows.data() : nullptr;
  a.constants = in.constants.data();
  a.interpolation = c.interpolation;
  a.padding = c.padding;
  a.antialias = c.antialias;
  a.normalise = c.normalise;
  return a;
}

// All stages of the forward pass, each for two spans of rows, as two threads would call it.
void run_forward(const AugmentArgs& a) {
  const AugmentKernels& k = kernels::augment_kernels;
  const auto memory = [](int64_t bytes) {
    return std::unique_ptr<char, void (*)(void*)>(static_cast<char*>(bytes ? malloc(size_t(bytes)) : nullptr),
                                                  free);
  };
  const auto source = memory(k.source_bytes(a)), image = memory(k.image_bytes(a)),
             rows = memory(k.rows_bytes(a));
  std::vector<double> sums(static_cast<size_t>(a.out_height));
  const AugmentScratch scratch = {source.get(), image.get(), sums.data(), rows.get()};
  for (int64_t i = 0; i < a.batch; ++i) {
    const auto halves = [&](auto kernel, int64_t n) {
      kernel(a, scratch, i, n / 3, n);
      kernel(a, scratch, i, 0, n / 3);
    };
    if (source) halves(k.source, k.source_rows(a));
    if (image) halves(k.prepare, a.out_height);
    halves(k.finish, a.out_height);
  }
}

// What the formulas give for one sample, stage by stage, in double.
class Reference {
 public:
  Reference(const AugmentCase& c, const AugmentArgs& a, const Inputs& in, int64_t sample)
      : c_(c), a_(a), in_(in), sample_(sample), image_(static_cast<size_t>(c.channels * pixels_)) {
    resample();
    adjust_colours();
    if (c_.channels == 3 && c_.colour_steps & kHue) turn_hue();
    if (c_.blurred) blur();
  }

  // Value p of a channel at the end, and the size of the terms that it is a sum of.
  void expect(int64_t channel, int64_t p, double narrow) const {
    const double* constant = &in_.constants[size_t(channel)];
    double want = image_[size_t(channel * pixels_ + p)], size = bound_;
    if (c_.normalise)
      want = want * constant[2 * c_.channels] + constant[3 * c_.channels], size *= constant[2 * c_.channels];
    const int64_t y = p / c_.out_width, x = p % c_.out_width;
    if (c_.boxed && y >= sample_ && y < sample_ + 3 && x >= 1) want = constant[c_.channels];
    const int64_t where =
        sample_ * a_.out_stride[0] + channel * a_.out_stride[1] + y * a_.out_stride[2] + x * a_.out_stride[3];
    in_.out.array->expect_near(where, want, narrow * (1 + size), "augmented");
  }

 private:
  double& at(int64_t channel, int64_t p) { return image_[size_t(channel * pixels_ + p)]; }
  double grey(int64_t p) {
    if (c_.channels == 1) return at(0, p);
    return 0.2989 * at(0, p) + 0.587 * at(1, p) + 0.114 * at(2, p);
  }

  void resample() {
    const int64_t height = c_.windowed ? c_.height - 1 : c_.height,
                  width = c_.windowed ? c_.width - 1 : c_.width;
    const double* m = &in_.matrices[size_t(6 * sample_)];
    for (int64_t channel = 0; channel < c_.channels; ++channel)
      for (int64_t p = 0; p < pixels_; ++p) {
        const double x = double(p % c_.out_width), y = double(p / c_.out_width);
        const auto pixel = [&](int64_t row, int64_t column) {
          const int64_t top = c_.windowed;
          return in_.images.get(sample_ * a_.in_stride[0] + channel * a_.in_stride[1] +
                                (row + top) * a_.in_stride[2] + column * a_.in_stride[3]);
        };
        at(channel, p) = c_.resampled ? sampled(pixel, m[0] * x + m[1] * y + m[2], m[3] * x + m[4] * y + m[5],
                                                height, width, c_, in_.constants[size_t(channel)])
                                      : pixel(int64_t(y), int64_t(x));
      }
  }

  void adjust_colours() {
    const double* f = &in_.colour[size_t(4 * sample_)];
    for (double& p : image_)
      if (c_.colour_steps & kBrightness) p = bounded(p * f[0], bound_);
    double mean = 0;
    for (int64_t p = 0; p < pixels_ && c_.colour_steps & kContrast; ++p) mean += grey(p) / double(pixels_);
    for (double& p : image_)
      if (c_.colour_steps & kContrast) p = bounded(p * f[1] + (1 - f[1]) * mean, bound_);
    for (int64_t p = 0; p < pixels_ && c_.colour_steps & kSaturation && c_.channels == 3; ++p) {
      const double g = grey(p);
      for (int64_t channel = 0; channel < 3; ++channel) {
        double& value = at(channel, p);
        value = bounded(value * f[2] + (1 - f[2]) * g, bound_);
      }
    }
  }

  void turn_hue() {  // by the six sectors of HSV
    const double turn = in_.colour[size_t(4 * sample_ + 3)];
    for (int64_t p = 0; p < pixels_; ++p) {
      const double r = at(0, p), g = at(1, p), b = at(2, p);
      const double v = std::fmax(r, std::fmax(g, b)), low = std::fmin(r, std::fmin(g, b)),
                   d = v == low ? 1 : v - low;
      double h = v == r ? (g - b) / d : v == g ? 2 + (b - r) / d : 4 + (r - g) / d;
      h = std::fmod(h + 6 * turn + 12, 6);
      const double part = h - std::floor(h), q = v - (v - low) * part, t = v - (v - low) * (1 - part);
      const double table[6][3] = {{v, t, low}, {q, v, low}, {low, v, t},
                                  {low, q, v}, {t, low, v}, {v, low, q}};
      for (int64_t channel = 0; channel < 3; ++channel) at(channel, p) = table[int(h)][channel];
    }
  }

  void blur() {
    const auto folded = [](int64_t j, int64_t n) {
      while (n > 1 && (j < 0 || j >= n)) j = j < 0 ? -j : 2 * (n - 1) - j;
      return n > 1 ? j : 0;
    };
    std::vector<double> blurred(image_.size());
    for (int64_t channel = 0; channel < c_.channels; ++channel)
      for (int64_t p = 0; p < pixels_; ++p) {
        double sum = 0;
        for (int64_t dy = 0; dy < 5; ++dy)
          for (int64_t dx = 0; dx < 3; ++dx)
            sum += in_.blur[size_t(dx)] * in_.blur[size_t(3 + dy)] *
                   at(channel, folded(p / c_.out_width + dy - 2, c_.out_height) * c_.out_width +
                                   folded(p % c_.out_width + dx - 1, c_.out_width));
        blurred[size_t(channel * pixels_ + p)] = sum;
      }
    image_ = blurred;
  }

  const AugmentCase& c_;
  const AugmentArgs& a_;
  const Inputs& in_;
  const int64_t sample_, pixels_ = c_.out_height * c_.out_width;
  const double bound_ = c_.in == PixelType::kUInt8 ? 255 : 1;
  std::vector<double> image_;  // (channels, height, width)
};

void augment_case(const AugmentCase& c, int count, Digest& digest) {
  const Inputs in(c, count);
  const AugmentArgs a = arguments(c, in);
  run_forward(a);
  in.out.array->expect_guards("augmented");
  in.out.array->add_to(digest);
  if (c.antialias || c.out == PixelType::kUInt8) return;  // tests/test_augment.py compares those with torch
  const double narrow = c.out == PixelType::kFloat16 ? 2e-3 : c.out == PixelType::kBFloat16 ? 2e-2 : 2e-5;
  for (int64_t i = 0; i < c.batch; ++i) {
    const Reference reference(c, a, in, i);
    for (int64_t channel = 0; channel < c.channels; ++channel)
      for (int64_t p = 0; p < c.out_height * c.out_width; ++p) reference.expect(channel, p, narrow);
  }
}

// The gradient of a chain without colours is its transpose: <A x - A 0, g> = <x, A' g>, all in float64.
void augment_backward_case(AugmentCase c, int count, Digest& digest) {
  Random random{uint64_t(count) * 17 + 3};
  const int64_t in_values = c.channels * c.height * c.width,
                out_values = c.channels * c.out_height * c.out_width;
  Array images(DType::kFloat64, contiguous(in_values)), grad(DType::kFloat64, contiguous(out_values));
  Array out(DType::kFloat64, contiguous(out_values)), in_grad(DType::kFloat64, contiguous(in_values));
  const double tangent = 6 * random.uniform() - 3,
               scale = (c.antialias ? 3.1 : 0.9) / (1 + tangent * tangent);
  const double m = scale * (1 - tangent * tangent), n = scale * 2 * tangent;
  const double matrix[] = {m,  n, 0.3 - n * double(c.out_height) / 2,
                           -n, m, 0.4 + n * double(c.out_width) / 2};
  const double blur[] = {0.25, 0.5, 0.25, 0.125, 0.25, 0.25, 0.25, 0.125};
  std::vector<double> constants(size_t(4 * c.channels), 0.5);
  AugmentArgs a{};
  a.in_type = a.out_type = PixelType::kFloat64;
  a.batch = 1;
  a.channels = c.channels;
  a.in_height = c.height;
  a.in_width = c.width;
  a.out_height = c.out_height;
  a.out_width = c.out_width;
  const int64_t in_stride[] = {in_values, c.height * c.width, c.width, 1},
                out_stride[] = {out_values, c.out_height * c.out_width, c.out_width, 1};
  a.matrices = matrix;
  a.blur = blur;
  a.blur_width = 3;
  a.blur_height = 5;
  a.constants = constants.data();
  a.interpolation = c.interpolation;
  a.padding = c.padding;
  a.antialias = c.antialias;
  a.normalise = true;
  const AugmentKernels& k = kernels::augment_kernels;
  const auto forward = [&] {
    a.images = images.data();
    a.output = out.data();
    memcpy(a.in_stride, in_stride, sizeof in_stride);
    memcpy(a.out_stride, out_stride, sizeof out_stride);
    std::vector<char> source(size_t(k.source_bytes(a))), rows(size_t(k.rows_bytes(a)));
    const AugmentScratch scratch = {source.empty() ? nullptr : source.data(), nullptr, nullptr, rows.data()};
    if (!source.empty()) k.source(a, scratch, 0, 0, k.source_rows(a));
    k.finish(a, scratch, 0, 0, c.out_height);
  };
  // left = <A x - A 0, g>
  double left = 0, right = 0, size = 0;
  for (int64_t i = 0; i < in_values; ++i) images.set(i, 0);
  for (int64_t i = 0; i < out_values; ++i) grad.set(i, random.signed_value());
  forward();
  for (int64_t i = 0; i < out_values; ++i) left -= grad.get(i) * out.get(i);
  for (int64_t i = 0; i < in_values; ++i) images.set(i, random.uniform());
  forward();
  for (int64_t i = 0; i < out_values; ++i)
    left += grad.get(i) * out.get(i), size += std::fabs(grad.get(i) * out.get(i));
  // right = <x, A' g>
  a.output = in_grad.data();
  a.grad = grad.data();
  memcpy(a.grad_stride, out_stride, sizeof out_stride);
  memcpy(a.out_stride, in_stride, sizeof in_stride);
  std::vector<char> memory(size_t(k.backward_bytes(a)));
  k.backward(a, memory.data(), 0);
  for (int64_t i = 0; i < in_values; ++i) right += in_grad.get(i) * images.get(i);
  if (!(std::fabs(left - right) <= 1e-9 * (1 + size)))
    fail("the gradient is not the transpose: %.17g, %.17g", left, right);
  in_grad.expect_guards("the images' gradient");
  in_grad.add_to(digest);
}

void augment() {
  const PixelType types[][2] = {
      {PixelType::kFloat32, PixelType::kFloat32}, {PixelType::kFloat64, PixelType::kFloat64},
      {PixelType::kFloat16, PixelType::kFloat16}, {PixelType::kBFloat16, PixelType::kFloat32},
      {PixelType::kUInt8, PixelType::kFloat32},   {PixelType::kUInt8, PixelType::kUInt8}};
  const int64_t sizes[][4] = {{9, 33, 9, 33}, {2, 2, 7, 19}, {31, 17, 5, 40}, {3, 65, 33, 3}};
  int count = 0;
  for (const auto& type : types)
    for (int interpolation = 0; interpolation < 3; ++interpolation)
      for (int padding = 0; padding < 4; ++padding)
        for (int variant = 0; variant < 8; ++variant, ++count) {
          const int64_t* size = sizes[variant % 4];
          AugmentCase c{};
          c.in = type[0];
          c.out = type[1];
          c.batch = 4;
          c.channels = variant % 3 == 1 ? 1 : 3;
          c.height = size[0];
          c.width = size[1];
          c.resampled = variant != 4;
          c.out_height = c.resampled ? size[2] : c.height;
          c.out_width = c.resampled ? size[3] : c.width;
          c.colour_steps = count % 5 == 4 ? 0 : count * 7 % 16;
          c.interpolation = Interpolation(interpolation);
          c.padding = Padding(padding);
          c.last = variant == 2 || variant == 7;
          c.blurred = count % 3 == 0;
          c.boxed = count % 4 == 1;
          c.windowed = c.resampled && variant == 5;
          c.antialias = c.resampled && variant == 6;
          c.normalise = c.out != PixelType::kUInt8 && count % 2;
          current_case = "augment/" + std::to_string(count);
          augment_case(c, count,
                       digests["augment/" + std::to_string(int(c.in)) + "-" + std::to_string(int(c.out))]);
          if (variant % 4 == 0 && c.in == PixelType::kFloat32) {
            current_case = "augment backward/" + std::to_string(count);
            c.antialias = variant == 4;
            augment_backward_case(c, count, digests["augment/backward"]);
          }
        }
}
const Case augment_cases(augment);

}  // namespace
}  // namespace fastreg::test::augment_test
