// torch.ops.fastreg.augment and its gradient: checks, allocation, threads or launch. Schemas stand in
// fastreg/augment/_op.py, the operators that make its tables in augment_draw_op.h. There is no
// augment_autograd.h: a batch of images is large, so that the time of autograd in Python does not count.
#include <cstdlib>
#include <memory>
#include <new>

#include "augment_draw_op.h"
#include "augment_geometry.h"
#include "augment_images.h"
#include "augment_tones_op.h"

namespace fastreg {
namespace {

PixelType pixel_type(const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return PixelType::kFloat32;
    case ScalarType::Double:
      return PixelType::kFloat64;
    case ScalarType::Half:
      return PixelType::kFloat16;
    case ScalarType::BFloat16:
      return PixelType::kBFloat16;
    case ScalarType::Byte:
      return PixelType::kUInt8;
    default:
      fail("augment: ", name, " must be uint8, float32, float64, float16 or bfloat16, got ", type,
           "; convert it with .float()");
  }
}

// A table with a row for each sample, on the device of the images.
template <class T>
const T* table(const char* name, const std::optional<Tensor>& t, const Tensor& images, int64_t columns) {
  if (!t) return nullptr;
  const bool is_double = std::is_same_v<T, double>;
  check_device("augment", name, *t, "images", images);
  check(t->scalar_type() == (is_double ? ScalarType::Double : ScalarType::Long) && t->is_contiguous() &&
            t->numel() == images.size(0) * columns,
        "augment: ", name, " must be a contiguous ", is_double ? "float64" : "int64", " tensor of (",
        images.size(0), ", ", columns, "), got ", t->scalar_type(), " of shape ", shape_text(*t),
        "; use .contiguous()");
  return static_cast<const T*>(t->const_data_ptr());
}

void set_strides(int64_t* stride, const Tensor& t) {
  for (int64_t d = 0; d < 4; ++d) stride[d] = t.stride(d);
}

// The arguments of a call, checked; the output is not allocated yet.
struct Call {
  AugmentArgs args{};

  Call(const Tensor& images, const std::optional<Tensor>& matrices, const std::optional<Tensor>& colour,
       const std::optional<Tensor>& blur, const std::optional<Tensor>& boxes,
       const std::optional<Tensor>& windows, const std::vector<double>& constants, int64_t height,
       int64_t width, int64_t blur_width, int64_t blur_height, int64_t colour_steps, int64_t interpolation,
       int64_t padding, bool antialias, bool normalise, ScalarType dtype) {
    const char* op = "augment";
    AugmentArgs& a = args;
    // Types and sizes.
    check(images.dim() == 4, op, ": images must be (batch, channels, height, width), got ",
          shape_text(images), "; add a dimension with .unsqueeze(0)");
    a.in_type = pixel_type("images", images.scalar_type());
    a.out_type = pixel_type("the output", dtype);
    check((a.in_type == PixelType::kFloat64) == (a.out_type == PixelType::kFloat64) &&
              (a.out_type != PixelType::kUInt8 || (a.in_type == PixelType::kUInt8 && !normalise)),
          op, ": images of ", images.scalar_type(), " cannot become ", dtype, "; convert them first");
    a.batch = images.size(0);      // B
    a.channels = images.size(1);   // C
    a.in_height = images.size(2);  // H
    a.in_width = images.size(3);   // W
    a.out_height = height;         // H'
    a.out_width = width;           // W'
    check(height >= 0 && width >= 0, op, ": size must not be negative, got (", height, ", ", width, ")");
    check(matrices || (height == a.in_height && width == a.in_width), op,
          ": without matrices the size is that of images");
    a.images = images.const_data_ptr();
    set_strides(a.in_stride, images);
    const int64_t most = INT32_MAX;
    check(a.in_height < most && a.in_width < most && height < most && width < most &&
              (a.in_height == 0 || std::max(a.in_stride[2], a.in_width) <= most / a.in_height),
          op, ": a plane may have 2^31 pixels at most, got ", shape_text(images), "; take a part of it");
    // Tables.
    a.matrices = table<double>("matrices", matrices, images, 6);
    a.colour = table<double>("colour", colour, images, kColourColumns);
    a.blur = table<double>("blur", blur, images, blur_width + blur_height);
    a.boxes = table<int64_t>("boxes", boxes, images, 4);
    a.windows = table<int64_t>("windows", windows, images, 4);
    check(int64_t(constants.size()) == kConstantRows * a.channels, op,
          ": constants must be four per channel, ", kConstantRows * a.channels, ", got ", constants.size());
    a.constants = constants.data();
    // Steps.
    check(!blur || (blur_width > 0 && blur_height > 0 && blur_width % 2 && blur_height % 2), op,
          ": the blur's kernel must be odd and positive, got (", blur_width, ", ", blur_height, ")");
    a.blur_width = blur_width;
    a.blur_height = blur_height;
    check(colour_steps >= 0 && colour_steps <= kAllColourSteps && (colour || !colour_steps), op,
          ": colour_steps needs colour");
    check(!(colour_steps & ~kBrightness) || a.channels == 1 || a.channels == 3, op,
          ": contrast, saturation and hue take images of 1 or 3 channels, got ", a.channels);
    check(interpolation >= 0 && interpolation < int(Interpolation::kCount) && padding >= 0 &&
              padding < int(Padding::kCount),
          op, ": unknown interpolation or padding");
    a.colour_steps = int(colour_steps);
    a.interpolation = Interpolation(interpolation);
    a.padding = Padding(padding);
    a.antialias = antialias;
    a.normalise = normalise;
    check_values();
  }

  bool empty() const { return args.batch * args.channels * args.out_height * args.out_width == 0; }

  // A GPU's tables cannot be looked at without waiting for it: there a sample whose matrix or window is no
  // good becomes NaN (0 in uint8).
  void check_values() {
#ifndef FASTREG_CUDA
    const char* op = "augment";
    const AugmentArgs& a = args;
    if (a.windows)
      for (int64_t i = 0; i < a.batch; ++i) {
        const Window w = window_of(a, i);
        check(w.lies_inside(a.in_height, a.in_width), op, ": the window of sample ", i,
              " must lie inside the image of (", a.in_height, ", ", a.in_width, "), got top ", w.top,
              ", left ", w.left, ", height ", w.height, ", width ", w.width);
      }
    if (a.matrices && !empty())
      for (int64_t i = 0; i < a.batch; ++i) {
        FixedMatrix unused;
        check(fixed_matrix(a.matrices + 6 * i, a.out_height, a.out_width, &unused), op,
              ": the matrix of sample ", i,
              " is not finite or leads further than 2^30 pixels away from the image; is its scale zero?");
      }
#endif
  }
};

#ifdef FASTREG_CUDA

void compute(AugmentArgs& a, const Tensor& images) {
  const int64_t bytes = augment_cuda_bytes(a);
  check(bytes >= 0, "augment: the blur's kernel of (", a.blur_width, ", ", a.blur_height,
        ") pixels is too large for this GPU's shared memory; use a smaller one, or .cpu()");
  const Tensor scratch = allocate_bytes(images, bytes);
  a.scratch = scratch.mutable_data_ptr();
  on_stream("augment", images, [&](void* stream) { return augment_cuda(a, stream); });
}
void compute_backward(AugmentArgs& a, const Tensor& images) {
  const Tensor scratch = allocate_bytes(images, augment_backward_cuda_bytes(a));
  a.scratch = scratch.mutable_data_ptr();
  on_stream("augment", images, [&](void* stream) { return augment_backward_cuda(a, stream); });
}

#else

constexpr int64_t kGrain = 1 << 14;  // values per thread at least
constexpr int64_t kSmallBatch = 16;  // fewer samples, where there are stages, are shared out by rows

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, Free>;
Buffer buffer(int64_t bytes) {
  if (bytes == 0) return {};
  Buffer result(std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64));
  if (!result) throw std::bad_alloc();
  return result;
}

// Rows [begin, end) of all samples in one numbering, as rows of one sample after another.
template <class F>
void by_sample(int64_t begin, int64_t end, int64_t rows, F f) {
  for (int64_t i = begin; i < end;) {
    const int64_t sample = i / rows, stop = std::min(end, (sample + 1) * rows);
    f(sample, i - sample * rows, stop - sample * rows);
    i = stop;
  }
}

// The stages before the last one, by the scratch memory of a sample: no bytes, no stage.
struct Stages {
  int64_t source_bytes, source_rows, image_bytes, sums_bytes;
  Stages(const AugmentArgs& a, const AugmentKernels& kernels)
      : source_bytes(kernels.source_bytes(a)),
        source_rows(kernels.source_rows(a)),
        image_bytes(kernels.image_bytes(a)),
        sums_bytes(image_bytes ? a.out_height * int64_t(sizeof(double)) : 0) {}
};

// Many samples: each is done by one thread from beginning to end, in memory that stays in its cache.
void compute_by_samples(const AugmentArgs& a, const AugmentKernels& kernels, const Stages& stages) {
  const int64_t values = a.channels * a.out_height * a.out_width;
  parallel(a.batch, std::max<int64_t>(1, kGrain / values), [&](int64_t begin, int64_t end) {
    const Buffer source = buffer(stages.source_bytes), image = buffer(stages.image_bytes),
                 sums = buffer(stages.sums_bytes), rows = buffer(kernels.rows_bytes(a));
    const AugmentScratch scratch = {source.get(), image.get(), sums.get(), rows.get()};
    for (int64_t i = begin; i < end; ++i) {
      if (source) kernels.source(a, scratch, i, 0, stages.source_rows);
      if (image) kernels.prepare(a, scratch, i, 0, a.out_height);
      kernels.finish(a, scratch, i, 0, a.out_height);
    }
  });
}

// Few samples, or only the last stage: the threads share the rows of each stage.
void compute_by_rows(const AugmentArgs& a, const AugmentKernels& kernels, const Stages& stages) {
  const Buffer source = buffer(stages.source_bytes * a.batch), image = buffer(stages.image_bytes * a.batch),
               sums = buffer(stages.sums_bytes * a.batch);
  const auto scratch_of = [&](int64_t sample, void* rows) {
    const auto part = [&](const Buffer& all, int64_t bytes) {
      return all ? static_cast<void*>(static_cast<char*>(all.get()) + sample * bytes) : nullptr;
    };
    return AugmentScratch{part(source, stages.source_bytes), part(image, stages.image_bytes),
                          part(sums, stages.sums_bytes), rows};
  };
  const auto compute_stage = [&](auto kernel, int64_t rows, int64_t row_values) {
    parallel(a.batch * rows, std::max<int64_t>(1, kGrain / row_values), [&](int64_t begin, int64_t end) {
      const Buffer of_thread = buffer(kernels.rows_bytes(a));
      by_sample(begin, end, rows, [&](int64_t sample, int64_t first, int64_t last) {
        kernel(a, scratch_of(sample, of_thread.get()), sample, first, last);
      });
    });
  };
  if (source) compute_stage(kernels.source, stages.source_rows, a.channels * a.in_width);
  if (image) compute_stage(kernels.prepare, a.out_height, a.channels * a.out_width);
  compute_stage(kernels.finish, a.out_height, a.channels * a.out_width);
}

void compute(const AugmentArgs& a, const Tensor&) {
  const int64_t values = a.batch * a.channels * a.out_height * a.out_width;
  const AugmentKernels& kernels = FR_KERNELS(augment_kernels, values);
  const Stages stages(a, kernels);
  if ((stages.source_bytes || stages.image_bytes) && a.batch >= kSmallBatch)
    compute_by_samples(a, kernels, stages);
  else
    compute_by_rows(a, kernels, stages);
}

void compute_backward(const AugmentArgs& a, const Tensor&) {
  const int64_t values = a.channels * (a.out_height * a.out_width + a.in_height * a.in_width);
  const AugmentKernels& kernels = FR_KERNELS(augment_kernels, a.batch * values);
  parallel(a.batch, std::max<int64_t>(1, kGrain / values), [&](int64_t begin, int64_t end) {
    const Buffer scratch = buffer(kernels.backward_bytes(a));
    for (int64_t i = begin; i < end; ++i) kernels.backward(a, scratch.get(), i);
  });
}

#endif

Tensor augment(Tensor images, std::optional<Tensor> matrices, std::optional<Tensor> colour,
               std::optional<Tensor> blur, std::optional<Tensor> boxes, std::optional<Tensor> windows,
               std::vector<double> constants, int64_t height, int64_t width, int64_t blur_width,
               int64_t blur_height, int64_t colour_steps, int64_t interpolation, int64_t padding,
               bool antialias, bool normalise, ScalarType dtype) {
  Call call(images, matrices, colour, blur, boxes, windows, constants, height, width, blur_width, blur_height,
            colour_steps, interpolation, padding, antialias, normalise, dtype);
  Tensor output = allocate_images(images, call.args.channels, height, width, dtype);
  if (call.empty()) return output;
  check(call.args.in_height > 0 && call.args.in_width > 0, "augment: images have no pixels, got ",
        shape_text(images));
  call.args.output = output.mutable_data_ptr();
  set_strides(call.args.out_stride, output);
  compute(call.args, images);
  return output;
}

Tensor augment_backward(Tensor grad, Tensor images, std::optional<Tensor> matrices,
                        std::optional<Tensor> colour, std::optional<Tensor> blur, std::optional<Tensor> boxes,
                        std::optional<Tensor> windows, std::vector<double> constants, int64_t height,
                        int64_t width, int64_t blur_width, int64_t blur_height, int64_t colour_steps,
                        int64_t interpolation, int64_t padding, bool antialias, bool normalise,
                        ScalarType dtype) {
  Call call(images, matrices, colour, blur, boxes, windows, constants, height, width, blur_width, blur_height,
            colour_steps, interpolation, padding, antialias, normalise, dtype);
  AugmentArgs& a = call.args;
  check(a.in_type != PixelType::kUInt8, "augment: images of uint8 have no gradient");
  check(!(colour_steps & kHue) || a.channels == 1,
        "augment: hue has no gradient; leave hue out, or call it under torch.no_grad()");
  check_device("augment", "the gradient", grad, "images", images);
  check(grad.scalar_type() == dtype && grad.dim() == 4 && grad.size(0) == a.batch &&
            grad.size(1) == a.channels && grad.size(2) == height && grad.size(3) == width,
        "augment: the gradient must be like the output, (", a.batch, ", ", a.channels, ", ", height, ", ",
        width, "), got ", shape_text(grad));
  Tensor output = allocate_images(images, a.channels, a.in_height, a.in_width, images.scalar_type());
  if (output.numel() == 0) return output;
  a.output = output.mutable_data_ptr();
  set_strides(a.out_stride, output);
  a.grad = grad.const_data_ptr();
  set_strides(a.grad_stride, grad);
  compute_backward(a, images);
  return output;
}

}  // namespace
}  // namespace fastreg

FR_LIBRARY_IMPL(m) {
  m.impl("augment", TORCH_BOX(&fastreg::augment));
  m.impl("augment_backward", TORCH_BOX(&fastreg::augment_backward));
  m.impl("augment_draw", TORCH_BOX(&fastreg::augment_draw));
  m.impl("augment_matrices", TORCH_BOX(&fastreg::augment_matrices));
  m.impl("augment_gaussian", TORCH_BOX(&fastreg::augment_gaussian));
  m.impl("augment_words", TORCH_BOX(&fastreg::augment_words));
  m.impl("augment_tones", TORCH_BOX(&fastreg::augment_tones));
}
