// What each sample of a batch draws, and the tables that the operator takes of it: matrices, factors of
// colour, weights of the blur, boxes. All of it is float64.
//
// Parameters are uniform in intervals, from Philox with the counter (global index of the sample, draw). Boxes
// are drawn as torchvision's RandomResizedCrop and RandomErasing draw them. The matrix is torchvision's
// affine, then crop, stretch and flips.
#pragma once
#include "../common/philox.h"
#include "augment_math.h"

namespace fastreg {

// The columns of the table of parameters, a row for each sample: COLUMNS in fastreg/augment.
enum ParamColumn {
  kHFlip,
  kVFlip,
  kStretch,
  kScale,
  kAngle,
  kTranslateX,
  kTranslateY,
  kShearX,
  kShearY,
  kCropTop,
  kCropLeft,
  kCropHeight,
  kCropWidth,
  kGeometryColumns,
  kBrightnessParam = kGeometryColumns,
  kContrastParam,
  kSaturationParam,
  kHueParam,
  kSigma,
  kEraseTop,
  kEraseLeft,
  kEraseHeight,
  kEraseWidth,
  kParamColumns
};
static_assert(kContrastParam - kBrightnessParam == kContrastColumn &&
                  kSaturationParam - kBrightnessParam == kSaturationColumn &&
                  kHueParam - kBrightnessParam == kHueColumn && kSigma - kBrightnessParam == kColourColumns,
              "the factors of colour are copied as one run of columns");
static_assert(kCropWidth == kCropTop + 3 && kEraseWidth == kEraseTop + 3,
              "a box is one run of columns: top, left, height, width");

// The Philox draws of a sample: its parameters, four columns to a draw, then the attempts at two boxes, a
// draw each.
constexpr uint32_t kParamDraws = 5, kCropDraw = 16, kEraseDraw = 32, kBoxAttempts = 10;
static_assert(kSigma < 4 * kParamDraws && kParamDraws <= kCropDraw && kCropDraw + kBoxAttempts <= kEraseDraw,
              "no two parameters may draw the same bits");

enum class Crop : int { kNone, kByArea, kWindow, kCount };

struct SampleArgs {
  Seed seed;
  uint64_t offset;       // global index of the first sample
  const int64_t* index;  // or, where it is not null, of each
  int64_t batch;
  int64_t in_height, in_width, out_height, out_width;
  double hflip, vflip, erase;                      // probabilities
  double low[kParamColumns], high[kParamColumns];  // the intervals of what is uniform
  Crop crop;
  double crop_area[2], crop_log_ratio[2];  // of Crop::kByArea
  double padding;                          // of Crop::kWindow: pixels around the image
  double erase_area[2], erase_log_ratio[2];
  double* out;  // (batch, kParamColumns)
};

// ---- a sample's parameters

// Uniform in (0, 1), never an end.
FR_HD double uniform_of(uint32_t word) { return (double(word) + 0.5) * 0x1p-32; }
FR_HD double between(double low, double high, uint32_t word) { return low + (high - low) * uniform_of(word); }
FR_HD double whole_below(double n, uint32_t word) { return std::floor(n * uniform_of(word)); }  // 0 .. n - 1

// A box of some share of the area and some ratio of width to height, as torchvision draws it: ten attempts,
// each with four words of its own. False if none fits. A crop may be as large as the image, which `inside`
// says; what is erased is smaller.
FR_HD bool draw_box(const SampleArgs& a, uint64_t index, uint32_t draw, const double* area,
                    const double* log_ratio, double height, double width, bool inside, double* box) {
  for (uint32_t attempt = 0; attempt < kBoxAttempts; ++attempt) {
    const PhiloxWords words = philox_group(a.seed.get(), index, draw + attempt, Purpose::kAugment);
    const double size = height * width * between(area[0], area[1], words.word[0]);
    const double ratio = std::exp(between(log_ratio[0], log_ratio[1], words.word[1]));
    const double w = std::nearbyint(std::sqrt(size * ratio)), h = std::nearbyint(std::sqrt(size / ratio));
    if (w < 1 || h < 1 || (inside ? w > width || h > height : w >= width || h >= height)) continue;
    box[0] = whole_below(height - h + 1, words.word[2]);
    box[1] = whole_below(width - w + 1, words.word[3]);
    box[2] = h;
    box[3] = w;
    return true;
  }
  return false;
}

// The crop of a sample; `top` and `left` are words of its own.
FR_HD void draw_crop(const SampleArgs& a, uint64_t index, uint32_t top, uint32_t left, double* crop) {
  const double height = double(a.in_height), width = double(a.in_width);
  crop[0] = crop[1] = 0;
  crop[2] = height;
  crop[3] = width;
  if (a.crop == Crop::kByArea &&
      !draw_box(a, index, kCropDraw, a.crop_area, a.crop_log_ratio, height, width, true, crop)) {
    // torchvision's way out: the largest box in the middle whose ratio is allowed
    const double ratio = width / height, smallest = std::exp(a.crop_log_ratio[0]),
                 largest = std::exp(a.crop_log_ratio[1]);
    if (ratio < smallest) crop[2] = std::nearbyint(width / smallest);
    if (ratio > largest) crop[3] = std::nearbyint(height * largest);
    crop[0] = std::floor((height - crop[2]) / 2);
    crop[1] = std::floor((width - crop[3]) / 2);
  }
  if (a.crop == Crop::kWindow) {
    crop[2] = double(a.out_height);
    crop[3] = double(a.out_width);
    crop[0] = whole_below(height + 2 * a.padding - crop[2] + 1, top) - a.padding;
    crop[1] = whole_below(width + 2 * a.padding - crop[3] + 1, left) - a.padding;
  }
}

// Row `i` of the table. Each column depends on the seed and the global index of the sample alone, whichever
// other steps are on.
FR_HD void sample_row(const SampleArgs& a, int64_t i) {
  const uint64_t index = a.index ? uint64_t(a.index[i]) : a.offset + uint64_t(i);
  double* row = a.out + i * kParamColumns;
  PhiloxWords words[kParamDraws];
  for (uint32_t draw = 0; draw < kParamDraws; ++draw)
    words[draw] = philox_group(a.seed.get(), index, draw, Purpose::kAugment);
  const auto word = [&](int column) { return words[column / 4].word[column % 4]; };
  row[kHFlip] = uniform_of(word(kHFlip)) < a.hflip;
  row[kVFlip] = uniform_of(word(kVFlip)) < a.vflip;
  for (int column = kStretch; column <= kShearY; ++column)
    row[column] = between(a.low[column], a.high[column], word(column));
  for (int column = kBrightnessParam; column <= kSigma; ++column)
    row[column] = between(a.low[column], a.high[column], word(column));
  row[kTranslateX] = std::nearbyint(row[kTranslateX]);  // whole pixels, as torchvision's RandomAffine
  row[kTranslateY] = std::nearbyint(row[kTranslateY]);
  // The words of the crop's columns serve Crop::kWindow, and whether something is erased.
  draw_crop(a, index, word(kCropTop), word(kCropLeft), row + kCropTop);
  double* erased = row + kEraseTop;
  erased[0] = erased[1] = erased[2] = erased[3] = 0;
  if (uniform_of(word(kCropHeight)) < a.erase)
    draw_box(a, index, kEraseDraw, a.erase_area, a.erase_log_ratio, double(a.out_height), double(a.out_width),
             false, erased);
}

// ---- the tables made of the parameters

// The parameters that make the matrices, by column; a null column is neutral.
struct MatrixArgs {
  int64_t batch, in_height, in_width, out_height, out_width;
  const double* column[kGeometryColumns];
  int64_t stride[kGeometryColumns];  // from sample to sample
  double* out;                       // (batch, 2, 3)
};

// The inverse matrix of sample i. From an output pixel it leads through the crop, then the inverse of
// torchvision's affine about the centre of the image, then stretch and flips, to the source.
FR_HD void matrix_row(const MatrixArgs& args, int64_t i) {
  const double height = double(args.in_height), width = double(args.in_width);
  double p[kGeometryColumns];
  for (int column = 0; column < kGeometryColumns; ++column) {
    p[column] = column == kStretch || column == kScale ? 1
                : column == kCropHeight                ? height
                : column == kCropWidth                 ? width
                                                       : 0;
    if (args.column[column]) p[column] = args.column[column][i * args.stride[column]];
  }
  const double degree = 0.017453292519943295;
  const double angle = p[kAngle] * degree, shear_x = p[kShearX] * degree, shear_y = p[kShearY] * degree,
               scale = p[kScale];
  double a = 1, b = 0, c = 0, d = 1;
  if (angle != 0 || shear_x != 0 || shear_y != 0) {
    const double cosine = std::cos(angle), sine = std::sin(angle);
    const double slant_x = shear_x != 0 ? std::tan(shear_x) : 0,
                 slant_y = shear_y != 0 ? std::tan(shear_y) : 0;
    a = cosine + sine * slant_y;  // cos(angle - shear_y) / cos(shear_y)
    b = -(a * slant_x + sine);
    c = sine - cosine * slant_y;  // sin(angle - shear_y) / cos(shear_y)
    d = cosine - c * slant_x;
  }
  const double sign_x = p[kHFlip] != 0 ? -1 : 1, sign_y = p[kVFlip] != 0 ? -1 : 1;
  const double m00 = d / scale * sign_x, m01 = -b / scale * sign_x;
  const double m10 = -c / scale / p[kStretch] * sign_y, m11 = a / scale / p[kStretch] * sign_y;
  const double centre_x = 0.5 * (width - 1), centre_y = 0.5 * (height - 1);
  // Output pixel x lies at step_x x + start_x of the image before it was cropped.
  const double step_x = p[kCropWidth] / double(args.out_width),
               step_y = p[kCropHeight] / double(args.out_height);
  const double start_x = p[kCropLeft] + 0.5 * step_x - 0.5 - centre_x - p[kTranslateX];
  const double start_y = p[kCropTop] + 0.5 * step_y - 0.5 - centre_y - p[kTranslateY];
  double* matrix = args.out + 6 * i;
  matrix[0] = m00 * step_x;
  matrix[1] = m01 * step_y;
  matrix[2] = m00 * start_x + m01 * start_y + centre_x;
  matrix[3] = m10 * step_x;
  matrix[4] = m11 * step_y;
  matrix[5] = m10 * start_x + m11 * start_y + centre_y;
}

// The weights of a blur along one axis: exp(-x^2 / (2 sigma^2)) at `size` whole numbers around 0, brought to
// sum 1; all on the middle where sigma is 0.
FR_HD void gaussian(double sigma, int64_t size, double* weight) {
  double sum = 0;
  for (int64_t k = 0; k < size; ++k) {
    const double x = double(k - size / 2) / (sigma < 1e-8 ? 1e-8 : sigma);
    weight[k] = k == size / 2 ? 1 : sigma > 0 ? std::exp(-0.5 * x * x) : 0;
    sum += weight[k];
  }
  for (int64_t k = 0; k < size; ++k) weight[k] /= sum;
}

struct GaussianArgs {
  int64_t batch, width, height;
  const double *sigma_x, *sigma_y;
  int64_t stride_x, stride_y;
  double* out;  // (batch, width + height)
};
FR_HD void gaussian_row(const GaussianArgs& args, int64_t i) {
  double* row = args.out + i * (args.width + args.height);
  gaussian(args.sigma_x[i * args.stride_x], args.width, row);
  gaussian(args.sigma_y[i * args.stride_y], args.height, row + args.width);
}

// All that a sample draws, and the tables that the operator takes.
struct DrawArgs {
  SampleArgs sample;
  MatrixArgs matrix;  // of the sample's own columns
  double* colour;     // (batch, kColourColumns)
  int64_t blur_width, blur_height;
  double* blur;    // (batch, blur_width + blur_height)
  int64_t* boxes;  // (batch, 4)
};
FR_HD void draw_row(const DrawArgs& args, int64_t i) {
  sample_row(args.sample, i);
  matrix_row(args.matrix, i);
  const double* row = args.sample.out + i * kParamColumns;
  for (int k = 0; k < kColourColumns; ++k) args.colour[i * kColourColumns + k] = row[kBrightnessParam + k];
  for (int k = 0; k < 4; ++k) args.boxes[4 * i + k] = int64_t(row[kEraseTop + k]);
  double* weights = args.blur + i * (args.blur_width + args.blur_height);
  gaussian(row[kSigma], args.blur_width, weights);
  if (args.blur_height == args.blur_width)
    for (int64_t k = 0; k < args.blur_width; ++k) weights[args.blur_width + k] = weights[k];
  else
    gaussian(row[kSigma], args.blur_height, weights + args.blur_width);
}

// The words of draws [first, first + count) of each sample.
struct WordsArgs {
  Seed seed;
  const int64_t* index;
  int64_t batch, first, count;
  int64_t* out;  // (batch, count, 4)
};
FR_HD void words_of_draw(const WordsArgs& args, int64_t i) {
  const int64_t sample = i / args.count, draw = args.first + i % args.count;
  const PhiloxWords words =
      philox_group(args.seed.get(), uint64_t(args.index[sample]), uint32_t(draw), Purpose::kAugment);
  for (int k = 0; k < 4; ++k) args.out[4 * i + k] = words.word[k];
}

// ---- launches, each of which gives a cudaError_t

int augment_draw_cuda(const DrawArgs& args, void* stream);
int augment_matrices_cuda(const MatrixArgs& args, void* stream);
int augment_gaussian_cuda(const GaussianArgs& args, void* stream);
int augment_words_cuda(const WordsArgs& args, void* stream);

}  // namespace fastreg
