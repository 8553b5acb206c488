// What the stages of augmentation on the CPU share: pixels of every type in vectors, rows in buffers, and the
// planes of a sample. Part of augment_cpu.cpp, compiled once per instruction set.
#pragma once
#include <type_traits>

#include "../common/simd.h"
#include "augment_math.h"

namespace fastreg::FASTREG_ISA {

// ---- bytes in vectors

typedef int64_t I64Part __attribute__((vector_size(FR_VECTOR_BYTES)));
typedef uint8_t BytePart __attribute__((vector_size(FR_VECTOR_BYTES / 4)));

FR_INLINE Vec<float> load(const uint8_t* p) {
  Vec<float> v;
  for (int i = 0; i < v.kParts; ++i) {
    BytePart raw;
    memcpy(&raw, p + i * v.kPartLanes, sizeof raw);
#if defined(__AVX512F__)
    v.part[i] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)raw));
#elif defined(__AVX2__)
    v.part[i] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)raw)));
#else
    v.part[i] = __builtin_convertvector(__builtin_convertvector(raw, I32Part), Vec<float>::Part);
#endif
  }
  return v;
}
FR_INLINE void store(uint8_t* p, const Vec<float>& v) {  // whole numbers in [0, 255]
  for (int i = 0; i < v.kParts; ++i) {
    const BytePart raw = __builtin_convertvector(__builtin_convertvector(v.part[i], I32Part), BytePart);
    memcpy(p + i * v.kPartLanes, &raw, sizeof raw);
  }
}
namespace {

template <class V>
FR_INLINE V reversed(const V& v) {
  typename V::Scalar lane[V::kLanes], turned[V::kLanes];
  store(lane, v);
  for (int j = 0; j < V::kLanes; ++j) turned[j] = lane[V::kLanes - 1 - j];
  return load(turned);
}

// f(a null pointer of the type of the pixels)
template <class F>
FR_INLINE void with_pixels(PixelType type, F f) {
  if (type == PixelType::kUInt8) return f(static_cast<uint8_t*>(nullptr));
  with_dtype(floating_type(type), f);
}
// Bytes of the type in which pixels are computed.
inline int64_t accumulated_bytes(const AugmentArgs& a) { return a.in_type == PixelType::kFloat64 ? 8 : 4; }
inline bool quantises(const AugmentArgs& a) { return a.out_type == PixelType::kUInt8; }

// ---- sizes

// Not std's: if the compiler does not inline those, one copy of them serves all instruction sets.
template <class I>
FR_INLINE I least(I a, I b) {
  return a < b ? a : b;
}
template <class I>
FR_INLINE I most(I a, I b) {
  return a < b ? b : a;
}
template <class I>
FR_INLINE I clamped(I x, I low, I high) {
  return x < low ? low : x > high ? high : x;
}

FR_INLINE int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
constexpr int kPad = 16;  // rows in buffers are whole vectors, of float32 or of float64
FR_INLINE int64_t padded_width(int64_t n) { return rounded_up(n, kPad); }
constexpr int64_t kCacheLine = 64;  // parts of a thread's memory begin with one

// ---- the planes of a sample

// Planes of rows whose pixels are neighbours in memory.
template <class T>
struct Source {
  const T* data;
  int64_t plane_stride, row_stride, height, width, channels;
  const T* plane(int64_t c) const { return data + c * plane_stride; }
  int64_t count() const { return (height - 1) * row_stride + width; }
};

// Whether the rows of a sample are copied, because neighbours in a row are not neighbours in memory.
inline bool copies_images(const AugmentArgs& a) { return a.in_stride[3] != 1 && a.in_width != 1; }

// The window of a sample in the images, or in their copy where there is one.
template <class T>
Source<T> source_of(const AugmentArgs& a, const void* copied, int64_t sample) {
  Source<T> source = {};
  source.channels = a.channels;
  if (copied && copies_images(a)) {
    source.data = static_cast<const T*>(copied);
    source.plane_stride = a.in_height * a.in_width;
    source.row_stride = a.in_width;
  } else {
    source.data = static_cast<const T*>(a.images) + sample * a.in_stride[0];
    source.plane_stride = a.in_stride[1];
    source.row_stride = a.in_stride[2];
  }
  const Window window = window_of(a, sample);
  source.data += window.top * source.row_stride + window.left;
  source.height = window.height;
  source.width = window.width;
  return source;
}

// ---- what is erased

// The columns [begin, end) of row y that are erased.
struct Erased {
  int64_t begin = 0, end = 0;
  Erased(const AugmentArgs& a, int64_t sample, int64_t y) {
    if (!a.boxes) return;
    const int64_t* box = a.boxes + 4 * sample;
    if (y < box[0] || y - box[0] >= box[2]) return;
    // The right edge comes from the left one as it is: a box may begin outside of the image.
    const int64_t left = least(box[1], a.out_width);
    const int64_t right = box[3] < a.out_width - left ? left + box[3] : a.out_width;
    begin = most(left, int64_t(0));
    end = most(right, begin);
  }
};

}  // namespace
}  // namespace fastreg::FASTREG_ISA
