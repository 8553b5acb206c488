// What both sides of every kernel share: the host/device marker, the storage types and their conversions, the
// layout of a tensor. No torch header and no CUDA header, so that kernels compile in a second and run
// wherever there is a compiler.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FR_HD __host__ __device__ __forceinline__
#else
#define FR_HD inline __attribute__((always_inline))
#endif

namespace fastreg {

enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Gives f(a null pointer of the storage type): how a kernel meets the dtype of its tensors. It is always
// inlined, since what it calls is compiled once per instruction set.
template <class F>
inline __attribute__((always_inline)) auto with_dtype(DType dtype, F f) {
#ifdef FASTREG_FLOAT32_ONLY  // to compile fast, in a test that breaks kernels
  (void)dtype;
  return f(static_cast<float*>(nullptr));
#else
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kFloat64:
      return f(static_cast<double*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Half*>(nullptr));
    default:
      return f(static_cast<BFloat16*>(nullptr));
  }
#endif
}

// The type in which a storage type is computed: float64 for float64, float32 for everything else.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

FR_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
FR_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

FR_HD float to_float(uint8_t x) { return float(x); }
FR_HD float to_float(float x) { return x; }
FR_HD double to_float(double x) { return x; }
FR_HD float to_float(BFloat16 x) { return bits_float(uint32_t(x.bits) << 16); }
FR_HD float to_float(Half x) {
  // Exponent and mantissa go to their place, and the exponent's bias changes. Infinities and NaN keep an
  // exponent that is all ones. A subnormal one is a whole number of 2^-24: no float32 below the normal ones
  // takes part, which a kernel may have to take as 0.
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  const uint32_t magnitude = rest >= 0x7c00u  ? rest << 13 | 0x7f800000u
                             : rest >= 0x400u ? (rest << 13) + 0x38000000u
                                              : float_bits(float(int32_t(rest)) * 0x1p-24f);
  return bits_float(sign | magnitude);
}

// Rounds to nearest, ties to even; a NaN stays one. Bytes are cut off to whole numbers and at 0 and 255; a
// NaN is 0.
FR_HD void from_float(float x, uint8_t* out) { *out = uint8_t(x > 0 ? (x < 255 ? x : 255.f) : 0.f); }
FR_HD void from_float(float x, float* out) { *out = x; }
FR_HD void from_float(double x, double* out) { *out = x; }
FR_HD void from_float(float x, BFloat16* out) {
  const uint32_t u = float_bits(x);
  out->bits = uint16_t(x != x ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
FR_HD void from_float(float x, Half* out) {
  const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  uint32_t h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    h = 0x7c00u;
  } else if (magnitude <
             0x38800000u) {  // below 2^-14: adding 0.5 makes the FPU round at the subnormal's last bit
    h = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    h = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = uint16_t(sign | h);
}

template <class T>
FR_HD T select(bool condition, T yes, T no) {
  return condition ? yes : no;
}

// a where a > b (a < b), else b: a NaN in b stays.
template <class T>
FR_HD T maximum(T a, T b) {
  return a > b ? a : b;
}
template <class T>
FR_HD T minimum(T a, T b) {
  return a < b ? a : b;
}

// Sizes and strides in elements, after dimensions that can be walked as one have been merged. `contiguous`
// means that logical order is memory order; then the sizes and strides need not be set.
constexpr int kMaxDims = 16;
struct Layout {
  int64_t numel = 0;
  int dims = 0;
  bool contiguous = true;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];
};

// Calls f(position, offset, stride, count) for runs that cover logical elements [begin, end): for j < count,
// element position + j lies at memory offset + j * stride.
template <class F>
FR_HD void for_each_run(const Layout& layout, int64_t begin, int64_t end, F f) {
  if (begin >= end) return;
  if (layout.contiguous) {
    f(begin, begin, int64_t(1), end - begin);
    return;
  }
  int64_t index[kMaxDims], offset = 0;
  for (int64_t d = layout.dims - 1, rest = begin; d >= 0; --d) {
    index[d] = rest % layout.size[d];
    rest /= layout.size[d];
    offset += index[d] * layout.stride[d];
  }
  const int last = layout.dims - 1;
  for (int64_t position = begin; position < end;) {
    int64_t count = layout.size[last] - index[last];
    if (count > end - position) count = end - position;
    f(position, offset, layout.stride[last], count);
    position += count;
    index[last] += count;
    offset += count * layout.stride[last];
    for (int d = last; d > 0 && index[d] == layout.size[d]; --d) {
      offset += layout.stride[d - 1] - index[d] * layout.stride[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

}  // namespace fastreg
