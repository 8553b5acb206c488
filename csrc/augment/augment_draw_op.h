// torch.ops.fastreg.augment_draw, augment_matrices and augment_gaussian, which make the tables that augment
// takes, and augment_words: checks, allocation, loop or launch. Part of augment_op.cpp.
#pragma once
#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/backend.h"
#include "augment_draw.h"

namespace fastreg {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> augment_draw(
    Tensor images, Tensor seed, int64_t offset, int64_t batch, std::vector<double> chances,
    std::vector<double> low, std::vector<double> high, int64_t crop, std::vector<double> crop_box,
    std::vector<double> erase_box, std::vector<int64_t> sizes, int64_t blur_width, int64_t blur_height,
    std::optional<Tensor> index) {
  check(low.size() == kParamColumns && high.size() == kParamColumns && chances.size() == 3 &&
            crop_box.size() == 5 && erase_box.size() == 4 && sizes.size() == 4 && batch >= 0 &&
            blur_width > 0 && blur_height > 0 && crop >= 0 && crop < int(Crop::kCount),
        "augment_draw: unexpected lengths of its lists");
  // The tables.
  const auto rows = [&](int64_t columns, ScalarType dtype) {
    return allocate(images, std::array<int64_t, 2>{batch, columns}, std::array<int64_t, 2>{columns, 1},
                    dtype);
  };
  Tensor table = rows(kParamColumns, ScalarType::Double), colour = rows(kColourColumns, ScalarType::Double);
  Tensor blur = rows(blur_width + blur_height, ScalarType::Double), boxes = rows(4, ScalarType::Long);
  Tensor matrices = allocate(images, std::array<int64_t, 3>{batch, 2, 3}, std::array<int64_t, 3>{6, 3, 1},
                             ScalarType::Double);
  // What a sample draws.
  DrawArgs args{};
  SampleArgs& a = args.sample;
  a.seed = seed_of("augment", seed, images);
  a.offset = uint64_t(offset);
  if (index) {
    check_device("augment", "index", *index, "the images", images);
    check(index->scalar_type() == ScalarType::Long && index->dim() == 1 && index->size(0) == batch &&
              index->is_contiguous(),
          "augment: index must be contiguous int64 of shape (", batch, "), one for each sample, got ",
          index->scalar_type(), " of shape ", shape_text(*index));
    a.index = static_cast<const int64_t*>(index->const_data_ptr());
  }
  args.matrix.batch = a.batch = batch;
  args.matrix.in_height = a.in_height = sizes[0];
  args.matrix.in_width = a.in_width = sizes[1];
  args.matrix.out_height = a.out_height = sizes[2];
  args.matrix.out_width = a.out_width = sizes[3];
  a.hflip = chances[0];
  a.vflip = chances[1];
  a.erase = chances[2];
  std::copy(low.begin(), low.end(), a.low);
  std::copy(high.begin(), high.end(), a.high);
  a.crop = Crop(int(crop));
  std::copy_n(crop_box.begin(), 2, a.crop_area);
  std::copy_n(crop_box.begin() + 2, 2, a.crop_log_ratio);
  a.padding = crop_box[4];
  std::copy_n(erase_box.begin(), 2, a.erase_area);
  std::copy_n(erase_box.begin() + 2, 2, a.erase_log_ratio);
  a.out = static_cast<double*>(table.mutable_data_ptr());
  // What is made of it: the matrix reads the columns of the table.
  for (int column = 0; column < kGeometryColumns; ++column) {
    args.matrix.column[column] = a.out + column;
    args.matrix.stride[column] = kParamColumns;
  }
  args.matrix.out = static_cast<double*>(matrices.mutable_data_ptr());
  args.colour = static_cast<double*>(colour.mutable_data_ptr());
  args.blur_width = blur_width;
  args.blur_height = blur_height;
  args.blur = static_cast<double*>(blur.mutable_data_ptr());
  args.boxes = static_cast<int64_t*>(boxes.mutable_data_ptr());
#ifdef FASTREG_CUDA
  on_stream("augment", images, [&](void* stream) { return augment_draw_cuda(args, stream); });
#else
  for (int64_t i = 0; i < batch; ++i) draw_row(args, i);
#endif
  return {table, matrices, colour, blur, boxes};
}

Tensor augment_matrices(Tensor like, std::optional<Tensor> hflip, std::optional<Tensor> vflip,
                        std::optional<Tensor> stretch, std::optional<Tensor> scale,
                        std::optional<Tensor> angle, std::optional<Tensor> translate,
                        std::optional<Tensor> shear, std::optional<Tensor> crop, int64_t in_height,
                        int64_t in_width, int64_t out_height, int64_t out_width) {
  MatrixArgs a{};
  a.batch = like.size(0);
  a.in_height = in_height;
  a.in_width = in_width;
  a.out_height = out_height;
  a.out_width = out_width;
  // Sets `width` columns from `first` on, of a tensor of shape (batch,), or (batch, width).
  const auto columns = [&](const char* name, const std::optional<Tensor>& t, int first, int64_t width) {
    if (!t) return;
    check_device("augment", name, *t, "the other parameters", like);
    check(t->scalar_type() == ScalarType::Double && t->dim() == (width > 1 ? 2 : 1) &&
              t->size(0) == a.batch && (width == 1 || t->size(1) == width),
          "augment: ", name, " must be float64 of ", a.batch, width > 1 ? " rows, got " : " numbers, got ",
          t->scalar_type(), " of shape ", shape_text(*t));
    for (int64_t k = 0; k < width; ++k) {
      a.column[first + k] =
          static_cast<const double*>(t->const_data_ptr()) + (width > 1 ? k * t->stride(1) : 0);
      a.stride[first + k] = t->stride(0);
    }
  };
  columns("hflip", hflip, kHFlip, 1);
  columns("vflip", vflip, kVFlip, 1);
  columns("stretch", stretch, kStretch, 1);
  columns("scale", scale, kScale, 1);
  columns("angle", angle, kAngle, 1);
  columns("translate", translate, kTranslateX, 2);
  columns("shear", shear, kShearX, 2);
  columns("crop", crop, kCropTop, 4);
  Tensor out = allocate(like, std::array<int64_t, 3>{a.batch, 2, 3}, std::array<int64_t, 3>{6, 3, 1},
                        ScalarType::Double);
  a.out = static_cast<double*>(out.mutable_data_ptr());
#ifdef FASTREG_CUDA
  on_stream("augment", like, [&](void* stream) { return augment_matrices_cuda(a, stream); });
#else
  for (int64_t i = 0; i < a.batch; ++i) matrix_row(a, i);
#endif
  return out;
}

Tensor augment_gaussian(Tensor sigma_x, Tensor sigma_y, int64_t width, int64_t height) {
  GaussianArgs a{};
  a.batch = sigma_x.size(0);
  a.width = width;
  a.height = height;
  check_device("augment", "sigma", sigma_y, "the other sigma", sigma_x);
  for (const Tensor* t : {&sigma_x, &sigma_y})
    check(t->scalar_type() == ScalarType::Double && t->dim() == 1 && t->size(0) == a.batch,
          "augment: sigma must be float64 of ", a.batch, " numbers, got ", t->scalar_type(), " of shape ",
          shape_text(*t));
  check(width > 0 && height > 0, "augment: the blur's kernel must be positive, got (", width, ", ", height,
        ")");
  a.sigma_x = static_cast<const double*>(sigma_x.const_data_ptr());
  a.sigma_y = static_cast<const double*>(sigma_y.const_data_ptr());
  a.stride_x = sigma_x.stride(0);
  a.stride_y = sigma_y.stride(0);
  const int64_t columns = width + height;
  Tensor out = allocate(sigma_x, std::array<int64_t, 2>{a.batch, columns}, std::array<int64_t, 2>{columns, 1},
                        ScalarType::Double);
  a.out = static_cast<double*>(out.mutable_data_ptr());
#ifdef FASTREG_CUDA
  on_stream("augment", sigma_x, [&](void* stream) { return augment_gaussian_cuda(a, stream); });
#else
  for (int64_t i = 0; i < a.batch; ++i) gaussian_row(a, i);
#endif
  return out;
}

Tensor augment_words(Tensor seed, Tensor index, int64_t first, int64_t count) {
  const char* op = "augment_words";
  check(index.scalar_type() == ScalarType::Long && index.dim() == 1 && index.is_contiguous(), op,
        ": index must be contiguous int64 of one dimension, got ", index.scalar_type(), " of shape ",
        shape_text(index));
  check(first >= 0 && count >= 0 && first <= (int64_t(1) << 31) && count <= (int64_t(1) << 31), op,
        ": draws must be whole numbers in [0, 2^31], got ", first, " and ", count);
  WordsArgs a{};
  a.seed = seed_of(op, seed, index);
  a.index = static_cast<const int64_t*>(index.const_data_ptr());
  a.batch = index.numel();
  a.first = first;
  a.count = count;
  const Tensor words = allocate(index, std::array<int64_t, 3>{a.batch, count, 4},
                                std::array<int64_t, 3>{4 * count, 4, 1}, ScalarType::Long);
  a.out = static_cast<int64_t*>(words.mutable_data_ptr());
#ifdef FASTREG_CUDA
  on_stream(op, index, [&](void* stream) { return augment_words_cuda(a, stream); });
#else
  for (int64_t i = 0; i < a.batch * count; ++i) words_of_draw(a, i);
#endif
  return words;
}

}  // namespace
}  // namespace fastreg
