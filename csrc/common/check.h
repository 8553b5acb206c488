// Checks that every op makes before it works, and what it needs to know of a tensor. This is for *_op.cpp
// only, since it sees torch. std::invalid_argument reaches Python as a ValueError.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "device.h"

// An older torch, 2.10 for one, has only the form without torch's own message.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace fastreg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// check(condition, "op: ", "expected ...", got, "; remedy")
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

// A shape that is written out only where a check fails. Made into a string for every check that holds, it
// took a quarter of the time of a small loss.
struct ShapeText {
  const Tensor& tensor;
};
inline ShapeText shape_text(const Tensor& t) { return {t}; }
inline std::ostream& operator<<(std::ostream& text, const ShapeText& shape) {
  const Tensor& t = shape.tensor;
  text << '(';
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  return text << (t.dim() == 1 ? ",)" : ")");
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      fail(op, ": ", name, " must be float32, float64, float16 or bfloat16, got ", t.scalar_type(),
           "; convert it with .float()");
  }
}

inline void check_device(const char* op, const char* name, const Tensor& t, const char* like_name,
                         const Tensor& like) {
  check(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ", name,
        " must be on the device of ", like_name, "; move it with .to(", like_name, ".device)");
}

// The text is built only for a check that fails, since an optimiser comes here for every tensor of a step.
inline void check_same(const char* op, const char* name, const Tensor& t, const char* like_name,
                       const Tensor& like) {
  check(t.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of ", like_name,
        "; convert it with .to(", like_name, ".dtype)");
  check_device(op, name, t, like_name, like);
  if (!same_shape(t, like))
    fail(op, ": ", name, " must have the shape of ", like_name, ", ", shape_text(like), ", got ",
         shape_text(t));
}

// torch::stable's empty_like and new_empty look their operator up by name and call it boxed, which costs a
// small op more than all its arithmetic; this goes straight to the allocation.
template <class Sizes>
Tensor allocate(const Tensor& like, const Sizes& sizes, const Sizes& strides, ScalarType dtype) {
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               device_type, device_index, &handle));
  return Tensor(handle);
}

// torch.empty_like, memory format kept.
inline Tensor allocate_like(const Tensor& t) {
  return t.is_contiguous() ? allocate(t, t.sizes(), t.strides(), t.scalar_type())
                           : torch::stable::empty_like(t);
}

// Uninitialised, of shape (count,), on the device of a tensor.
inline Tensor allocate_flat(const Tensor& like, int64_t count, ScalarType dtype) {
  return allocate(like, std::array<int64_t, 1>{count}, std::array<int64_t, 1>{1}, dtype);
}
inline Tensor allocate_bytes(const Tensor& like, int64_t bytes) {
  return allocate_flat(like, bytes, ScalarType::Byte);
}

// The layout with mergeable dimensions merged: a tensor that is contiguous comes out with one dimension at
// most.
inline Layout layout_of(const char* op, const Tensor& t) {
  Layout layout;
  layout.numel = t.numel();
  layout.contiguous = t.is_contiguous();
  if (layout.contiguous || layout.numel == 0) {
    layout.contiguous = true;
    return layout;
  }
  for (int64_t d = 0; d < t.dim(); ++d) {
    const int64_t size = t.size(d), stride = t.stride(d);
    if (size == 1) continue;
    if (layout.dims && layout.stride[layout.dims - 1] == stride * size) {
      layout.size[layout.dims - 1] *= size;
      layout.stride[layout.dims - 1] = stride;
      continue;
    }
    check(layout.dims < kMaxDims, op, ": at most ", kMaxDims, " dimensions that do not merge, got ", t.dim(),
          "; call .contiguous() first");
    layout.size[layout.dims] = size;
    layout.stride[layout.dims++] = stride;
  }
  layout.contiguous = layout.dims == 0 || (layout.dims == 1 && layout.stride[0] == 1);
  return layout;
}

// Whether two elements lie at one address, which an in-place op cannot have. Sorted by stride, each dimension
// must step over everything that the smaller ones reach.
inline bool overlaps_itself(const Layout& layout) {
  if (layout.contiguous) return false;
  int order[kMaxDims];
  for (int i = 0; i < layout.dims; ++i) {
    int j = i;
    for (; j > 0 && layout.stride[order[j - 1]] > layout.stride[i]; --j) order[j] = order[j - 1];
    order[j] = i;
  }
  int64_t reach = 0;
  for (int i = 0; i < layout.dims; ++i) {
    if (layout.stride[order[i]] <= reach) return true;
    reach += layout.stride[order[i]] * (layout.size[order[i]] - 1);
  }
  return false;
}

// Whether two tensors fill their memory without gaps and in the same order: an elementwise op can walk such
// tensors as flat memory.
inline bool same_dense_order(const Layout& a, const Layout& b) {
  if (a.contiguous || b.contiguous) return a.contiguous && b.contiguous;
  if (a.dims != b.dims) return false;
  int64_t reach = 1;
  for (int i = 0; i < a.dims; ++i) {
    if (a.size[i] != b.size[i] || a.stride[i] != b.stride[i]) return false;
    reach += a.stride[i] * (a.size[i] - 1);
  }
  return reach == a.numel && !overlaps_itself(a);
}

// Splits [0, n) at multiples of `grain` over torch's threads; a loop that fits in one grain stays on this
// thread.
template <class F>
void parallel(int64_t n, int64_t grain, F f) {
  const int64_t pieces = (n + grain - 1) / grain;
  if (pieces <= 1) {
    if (n > 0) f(int64_t(0), n);
    return;
  }
  torch::stable::parallel_for(
      0, pieces, 1, [&](int64_t begin, int64_t end) { f(begin * grain, end * grain < n ? end * grain : n); });
}

}  // namespace fastreg
