// Batches of images as tensors, for the operators of augmentation.
#pragma once
#include <array>

#include "../common/backend.h"

namespace fastreg {
namespace {

// As torch has it: a dimension of size 1 may have any stride.
inline bool is_channels_last(const Tensor& t) {
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) == 1) continue;
    if (t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

inline Tensor allocate_images(const Tensor& like, int64_t channels, int64_t height, int64_t width,
                              ScalarType dtype) {
  const int64_t plane = height * width, last = !like.is_contiguous() && is_channels_last(like);
  const std::array<int64_t, 4> sizes = {like.size(0), channels, height, width};
  const std::array<int64_t, 4> strides =
      last ? std::array<int64_t, 4>{channels * plane, 1, channels * width, channels}
           : std::array<int64_t, 4>{channels * plane, plane, width, 1};
  return allocate(like, sizes, strides, dtype);
}

}  // namespace
}  // namespace fastreg
