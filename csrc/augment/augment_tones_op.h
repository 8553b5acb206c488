// torch.ops.fastreg.augment_tones: checks, allocation, threads or launch. Part of augment_op.cpp; its schema
// stands in fastreg/augment/_tone_op.py.
#pragma once
#include "augment_images.h"
#include "augment_tones.h"

namespace fastreg {
namespace {

// A GPU's steps and strengths cannot be looked at without waiting for it: there a step that is none copies,
// and a strength that is out of range gives what its formula gives, cut off at black and white.
void check_tones(const TonesArgs& a) {
#ifdef FASTREG_CUDA
  (void)a;
#else
  const char* op = "augment_tones";
  for (int64_t i = 0; i < a.batch; ++i) {
    const int64_t step = a.steps[i];
    const double s = a.strengths[i];
    check(step >= 0 && step < int64_t(Tone::kCount), op, ": a step must be in [0, ", int64_t(Tone::kCount),
          "), got ", step, " at sample ", i);
    check(s >= -1e30 && s <= 1e30, op, ": a strength must be a number in [-1e30, 1e30], got ", s,
          " at sample ", i);
    check(Tone(step) != Tone::kPosterize || (s >= 0 && s <= 8), op, ": posterize keeps 0 to 8 bits, got ", s,
          " at sample ", i);
    check(Tone(step) != Tone::kSolarize || s <= 1, op, ": a threshold of solarize must be at most 1, got ", s,
          " at sample ", i);
    check(Tone(step) != Tone::kSharpness || s >= -1, op,
          ": a strength of sharpness must be at least -1, got ", s, " at sample ", i);
  }
#endif
}

Tensor augment_tones(Tensor images, Tensor steps, Tensor strengths) {
  const char* op = "augment_tones";
  check(images.scalar_type() == ScalarType::Byte && images.dim() == 4 &&
            (images.size(1) == 1 || images.size(1) == 3),
        op, ": images must be uint8 (B, C, H, W) with 1 or 3 channels, got ", images.scalar_type(),
        " of shape ", shape_text(images));
  const bool channels_last = !images.is_contiguous();
  check(!channels_last || is_channels_last(images), op,
        ": images must be contiguous or channels last; call .contiguous()");
  const int64_t batch = images.size(0);
  check(steps.scalar_type() == ScalarType::Long && steps.is_contiguous() && steps.numel() == batch, op,
        ": steps must be a contiguous int64 tensor of (", batch, ",), got ", steps.scalar_type(),
        " of shape ", shape_text(steps));
  check(strengths.scalar_type() == ScalarType::Double && strengths.is_contiguous() &&
            strengths.numel() == batch,
        op, ": strengths must be a contiguous float64 tensor of (", batch, ",), got ",
        strengths.scalar_type(), " of shape ", shape_text(strengths));
  check_device(op, "steps", steps, "images", images);
  check_device(op, "strengths", strengths, "images", images);
  TonesArgs a{};
  a.batch = batch;
  a.channels = images.size(1);
  a.height = images.size(2);
  a.width = images.size(3);
  a.channels_last = channels_last;
  check(a.pixels() < INT32_MAX, op, ": a plane may have 2^31 pixels at most, got ", shape_text(images),
        "; take a part of it");
  a.steps = static_cast<const int64_t*>(steps.const_data_ptr());
  a.strengths = static_cast<const double*>(strengths.const_data_ptr());
  check_tones(a);
  const Tensor output = allocate_images(images, a.channels, a.height, a.width, ScalarType::Byte);
  a.images = static_cast<const uint8_t*>(images.const_data_ptr());
  a.output = static_cast<uint8_t*>(output.mutable_data_ptr());
  if (images.numel() == 0) return output;
#ifdef FASTREG_CUDA
  const Tensor scratch = allocate_bytes(images, tones_scratch_bytes(a));
  a.scratch = scratch.mutable_data_ptr();
  on_stream(op, images, [&](void* stream) { return augment_tones_cuda(a, stream); });
#else
  constexpr int64_t kGrain = 1 << 15;  // bytes per thread at least
  const TonesKernels& kernels = FR_KERNELS(augment_tones_kernels, images.numel());
  parallel(batch, (kGrain + a.sample_bytes() - 1) / a.sample_bytes(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.apply(a, i);
  });
#endif
  return output;
}

}  // namespace
}  // namespace fastreg
