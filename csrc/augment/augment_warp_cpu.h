// The geometry of augmentation on the CPU: rows of output pixels from the pixels of a source, 16 at a time.
// Vectors whose pixels all lie inside the image take neighbours in pairs, by gathers, or with AVX-512 from
// rows of the source held in registers. Part of augment_cpu.cpp, compiled once per instruction set.
#pragma once
#include <type_traits>

#include "../common/simd.h"
#include "augment_math.h"

namespace fastreg::FASTREG_ISA {

typedef int32_t I32Part __attribute__((vector_size(FR_VECTOR_BYTES)));
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

template <class F>
FR_INLINE void with_pixels(PixelType type, F f) {
  if (type == PixelType::kUInt8) return f(static_cast<uint8_t*>(nullptr));
  with_dtype(DType(int(type)), f);
}

// Not std's: what the compiler does not inline of those would be one function for all instruction sets.
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

constexpr int kPad = 16;  // rows in buffers are whole vectors, of float32 or of float64
FR_INLINE int64_t padded_width(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

template <class V>
FR_INLINE V reversed(const V& v) {
  typename V::Scalar lane[V::kLanes], turned[V::kLanes];
  store(lane, v);
  for (int j = 0; j < V::kLanes; ++j) turned[j] = lane[V::kLanes - 1 - j];
  return load(turned);
}

// ---- a whole number for each lane of a Vec<A>

template <class A>
struct Ints {
  using V = Vec<A>;
  static constexpr int kParts = V::kParts, kPartLanes = V::kPartLanes;
  typedef int32_t Part __attribute__((vector_size(4 * V::kPartLanes)));
  Part part[kParts];

  Ints() = default;
  FR_INLINE Ints(int32_t x) {
    for (int i = 0; i < kParts; ++i) part[i] = x - Part{};
  }
#define FR_EACH(name, expression)                            \
  friend FR_INLINE Ints name(const Ints& a, const Ints& b) { \
    Ints c;                                                  \
    for (int i = 0; i < kParts; ++i) c.part[i] = expression; \
    return c;                                                \
  }
  // clang-format off
  FR_EACH(operator+, a.part[i] + b.part[i]) FR_EACH(operator-, a.part[i] - b.part[i]) FR_EACH(operator*, a.part[i] * b.part[i])
  FR_EACH(least, a.part[i] < b.part[i] ? a.part[i] : b.part[i]) FR_EACH(most, a.part[i] < b.part[i] ? b.part[i] : a.part[i])
  // clang-format on
#undef FR_EACH
              friend FR_INLINE typename V::Mask operator==(const Ints& a, const Ints& b) {
    typename V::Mask m;
#ifdef __AVX512F__
    if constexpr (sizeof(A) == 4)
      m.part[0] = _mm512_cmpeq_epi32_mask((__m512i)a.part[0], (__m512i)b.part[0]);
    else
      m.part[0] = _mm256_cmpeq_epi32_mask((__m256i)a.part[0], (__m256i)b.part[0]);
#else
    for (int i = 0; i < kParts; ++i)
      m.part[i] = __builtin_convertvector(a.part[i] == b.part[i], typename V::IntPart);
#endif
    return m;
  }
  template <class F>
  FR_INLINE Ints each(F f) const {  // lane by lane
    int32_t lane[V::kLanes];
    memcpy(lane, part, sizeof lane);
    for (int32_t& x : lane) x = f(x);
    Ints c;
    memcpy(c.part, lane, sizeof lane);
    return c;
  }
};
template <class V>
FR_INLINE typename V::Mask both(const typename V::Mask& a, const typename V::Mask& b) {
  typename V::Mask c;
  for (int i = 0; i < V::kParts; ++i) c.part[i] = a.part[i] & b.part[i];
  return c;
}

// Positions base + j * step of neighbouring output pixels j, taken apart.
template <class A>
struct Positions {
  static constexpr int kLanes = Vec<A>::kLanes, kParts = Vec<A>::kParts, kI64Lanes = FR_VECTOR_BYTES / 8;
  typedef uint32_t Low __attribute__((vector_size(4 * Vec<A>::kPartLanes)));
  Ints<A> whole;
  Low low[kParts];

  FR_INLINE Positions(const int64_t* steps, int64_t base) {  // steps[j] = j * step
    for (int i = 0; i < kParts; ++i) {
      if constexpr (sizeof(A) == 4) {
        I64Part a, b;
        memcpy(&a, steps + 2 * i * kI64Lanes, sizeof a);
        memcpy(&b, steps + (2 * i + 1) * kI64Lanes, sizeof b);
        const I32Part x = (I32Part)(a + base), y = (I32Part)(b + base);
#if FR_VECTOR_BYTES == 64
        low[i] =
            (Low)__builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        whole.part[i] =
            __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif FR_VECTOR_BYTES == 32
        low[i] = (Low)__builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14);
        whole.part[i] = __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15);
#else
        low[i] = (Low)__builtin_shufflevector(x, y, 0, 2, 4, 6);
        whole.part[i] = __builtin_shufflevector(x, y, 1, 3, 5, 7);
#endif
      } else {
        I64Part a;
        memcpy(&a, steps + i * kI64Lanes, sizeof a);
        a += base;
        low[i] = (Low) __builtin_convertvector(a & 0xffffffff, typename Ints<A>::Part);
        whole.part[i] = __builtin_convertvector(a >> 32, typename Ints<A>::Part);
      }
    }
  }
  FR_INLINE Vec<A> fraction() const {
    Vec<A> t;
    for (int i = 0; i < kParts; ++i) {
      if constexpr (sizeof(A) == 4)
        t.part[i] = __builtin_convertvector((typename Ints<A>::Part)(low[i] >> 8), typename Vec<A>::Part) *
                    A(0x1p-24);
      else
        for (int j = 0; j < Vec<A>::kPartLanes; ++j) t.part[i][j] = A(low[i][j]) * A(0x1p-32);
    }
    return t;
  }
  FR_INLINE Ints<A> nearest()
      const {  // ties to even: up where the fraction is more than a half, or a half and the whole is odd
    Ints<A> n;
    for (int i = 0; i < kParts; ++i)
      n.part[i] = whole.part[i] - (typename Ints<A>::Part)(low[i] > 0x80000000u - ((Low)whole.part[i] & 1u));
    return n;
  }
};

// ---- gathers. The planes hold `count` elements; index + 1 lies inside for pairs.

#ifdef __AVX512F__
template <class T>
FR_INLINE void split_pairs(__m512i pairs, Vec<float>& left, Vec<float>& right) {  // of 16-bit values
  if constexpr (std::is_same_v<T, BFloat16>) {
    left.part[0] = (Vec<float>::Part)_mm512_slli_epi32(pairs, 16);
    right.part[0] = (Vec<float>::Part)_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xffff0000u)));
  } else if constexpr (std::is_same_v<T, Half>) {
    left.part[0] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
    right.part[0] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
  } else {
    left.part[0] = _mm512_cvtepi32_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff)));
    right.part[0] = _mm512_cvtepi32_ps(_mm512_srli_epi32(pairs, 16));
  }
}
#endif

template <class T, class A>
FR_INLINE void gather_pairs(const T* plane, const Ints<A>& index, int64_t count, Vec<A>& left,
                            Vec<A>& right) {
  [[maybe_unused]] typedef typename Vec<A>::Part Part;
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    const __m512i at = (__m512i)index.part[0];
    if constexpr (std::is_same_v<T, float>) {
      const __m512i low = _mm512_i32gather_epi64(_mm512_castsi512_si256(at), plane, 4);
      const __m512i high = _mm512_i32gather_epi64(_mm512_extracti64x4_epi64(at, 1), plane, 4);
      const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      left.part[0] = (Part)_mm512_permutex2var_epi32(low, even, high);
      right.part[0] =
          (Part)_mm512_permutex2var_epi32(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
      return;
    }
    if constexpr (sizeof(T) <= 2) {
      if (count * int64_t(sizeof(T)) >= 4) {
        if constexpr (sizeof(T) == 1) {  // four neighbours, from further left where the plane ends
          const __m512i start = _mm512_min_epi32(at, _mm512_set1_epi32(int32_t(count - 4))),
                        byte = _mm512_set1_epi32(255);
          const __m512i shift = _mm512_slli_epi32(_mm512_sub_epi32(at, start), 3);
          const __m512i words = _mm512_srlv_epi32(_mm512_i32gather_epi32(start, plane, 1), shift);
          left.part[0] = (Part)_mm512_cvtepi32_ps(_mm512_and_si512(words, byte));
          right.part[0] = (Part)_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(words, 8), byte));
        } else {
          split_pairs<T>(_mm512_i32gather_epi32(at, plane, 2), left, right);
        }
        return;
      }
    }
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) {
    for (int i = 0; i < 2; ++i) {
      const __m256i at = (__m256i)index.part[i];
      const auto pairs = [&](__m128i four) {
        return _mm256_castpd_ps(_mm256_i32gather_pd(reinterpret_cast<const double*>(plane), four, 4));
      };
      const __m256 low = pairs(_mm256_castsi256_si128(at)), high = pairs(_mm256_extracti128_si256(at, 1));
      const auto in_order = [](__m256 x) { return (Part)_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8); };
      left.part[i] = in_order(_mm256_shuffle_ps(low, high, 0x88));
      right.part[i] = in_order(_mm256_shuffle_ps(low, high, 0xdd));
    }
    return;
  }
  if constexpr (sizeof(T) == 1 || std::is_same_v<T, BFloat16>) {
    if (count * int64_t(sizeof(T)) >= 4) {
      for (int i = 0; i < 2; ++i) {
        const __m256i at = (__m256i)index.part[i];
        const int* base = reinterpret_cast<const int*>(plane);
        if constexpr (sizeof(T) == 1) {
          const __m256i start = _mm256_min_epi32(at, _mm256_set1_epi32(int32_t(count - 4)));
          const __m256i shift = _mm256_slli_epi32(_mm256_sub_epi32(at, start), 3),
                        byte = _mm256_set1_epi32(255);
          const __m256i words = _mm256_srlv_epi32(_mm256_i32gather_epi32(base, start, 1), shift);
          left.part[i] = _mm256_cvtepi32_ps(_mm256_and_si256(words, byte));
          right.part[i] = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(words, 8), byte));
        } else {
          const __m256i words = _mm256_i32gather_epi32(base, at, 2);
          left.part[i] = (Part)_mm256_slli_epi32(words, 16);
          right.part[i] = (Part)_mm256_and_si256(words, _mm256_set1_epi32(int32_t(0xffff0000u)));
        }
      }
      return;
    }
  }
#endif
  (void)count;
  int32_t at_lane[Vec<A>::kLanes];
  memcpy(at_lane, index.part, sizeof at_lane);
  T lane[2][Vec<A>::kLanes];
  for (int j = 0; j < Vec<A>::kLanes; ++j) {
    lane[0][j] = plane[at_lane[j]];
    lane[1][j] = plane[at_lane[j] + 1];
  }
  left = load(lane[0]);
  right = load(lane[1]);
}

template <class T, class A>
FR_INLINE Vec<A> gather(const T* plane, const Ints<A>& index, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    const __m512i at = (__m512i)index.part[0];
    Vec<A> v;
    if constexpr (std::is_same_v<T, float>) {
      v.part[0] = (typename Vec<A>::Part)_mm512_i32gather_ps(at, plane, 4);
      return v;
    }
    if constexpr (sizeof(T) == 1) {
      if (count >= 4) {
        const __m512i start = _mm512_min_epi32(at, _mm512_set1_epi32(int32_t(count - 4)));
        const __m512i shift = _mm512_slli_epi32(_mm512_sub_epi32(at, start), 3);
        const __m512i words = _mm512_srlv_epi32(_mm512_i32gather_epi32(start, plane, 1), shift);
        v.part[0] =
            (typename Vec<A>::Part)_mm512_cvtepi32_ps(_mm512_and_si512(words, _mm512_set1_epi32(255)));
        return v;
      }
    }
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) {
    Vec<A> v;
    for (int i = 0; i < 2; ++i) v.part[i] = _mm256_i32gather_ps(plane, (__m256i)index.part[i], 4);
    return v;
  }
#endif
  (void)count;
  int32_t at_lane[Vec<A>::kLanes];
  memcpy(at_lane, index.part, sizeof at_lane);
  T lane[Vec<A>::kLanes];
  for (int j = 0; j < Vec<A>::kLanes; ++j) lane[j] = plane[at_lane[j]];
  return load(lane);
}

// ---- lookups, instead of gathers where they pay. Neighbouring output pixels lie in few rows of the source,
// unless the image is turned far. 32 pixels of such a row are held in registers, and the lanes that lie in it
// take theirs by one permutation, where a gather would load for each lane. What a mask leaves out is not read
// and counts as 0, which is a border of zeros for nothing.

#ifdef __AVX512F__
constexpr int32_t kLookupColumns = 32, kLookupRows = 5;  // for more rows gathers are faster

template <class T>
struct Lookup {  // 16-bit pixels, and bytes as such: one register holds the row, 32-bit lanes hold left and
                 // right
  struct Row {
    __m512i pixels;
    FR_INLINE Row() : pixels(_mm512_setzero_si512()) {}
    FR_INLINE Row(const T* p, uint32_t inside) {
      if constexpr (sizeof(T) == 1)
        pixels = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(inside, p));
      else
        pixels = _mm512_maskz_loadu_epi16(inside, p);
    }
  };
  __m512i index, pairs;
  FR_INLINE void start(__m512i left) {
    index = _mm512_or_si512(left, _mm512_slli_epi32(_mm512_add_epi32(left, _mm512_set1_epi32(1)), 16));
    pairs = _mm512_setzero_si512();
  }
  FR_INLINE void take(__mmask16 lanes, const Row& row) {
    pairs = _mm512_mask_mov_epi32(pairs, lanes, _mm512_permutexvar_epi16(index, row.pixels));
  }
  FR_INLINE void result(Vec<float>& left, Vec<float>& right) const { split_pairs<T>(pairs, left, right); }
};
template <>
struct Lookup<float> {
  struct Row {
    __m512 low, high;
    FR_INLINE Row() : low(_mm512_setzero_ps()), high(_mm512_setzero_ps()) {}
    FR_INLINE Row(const float* p, uint32_t inside)
        : low(_mm512_maskz_loadu_ps(__mmask16(inside), p)),
          high(_mm512_maskz_loadu_ps(__mmask16(inside >> 16), p + 16)) {}
  };
  __m512 left, right;  // of lanes that have not taken theirs: the index
  FR_INLINE void start(__m512i index) {
    left = (__m512)index;
    right = (__m512)_mm512_add_epi32(index, _mm512_set1_epi32(1));
  }
  FR_INLINE void take(__mmask16 lanes, const Row& row) {
    left = _mm512_mask2_permutex2var_ps(row.low, (__m512i)left, lanes, row.high);
    right = _mm512_mask2_permutex2var_ps(row.low, (__m512i)right, lanes, row.high);
  }
  FR_INLINE void result(Vec<float>& l, Vec<float>& r) const {
    l.part[0] = left;
    r.part[0] = right;
  }
};
#endif

// ---- geometry

// A sample's source: planes of rows whose pixels are neighbours in memory.
template <class T>
struct Source {
  const T* data;
  int64_t plane_stride, row_stride, height, width, channels;
  const T* plane(int64_t c) const { return data + c * plane_stride; }
  int64_t count() const { return (height - 1) * row_stride + width; }
};

template <class A>
struct Filler {  // what lies outside
  Padding padding;
  const double* fill;  // of each channel
  A value(int64_t c) const { return padding == Padding::kFill ? A(fill[c]) : A(0); }
};

template <class T, class A>
struct Warp {
  using V = Vec<A>;
  static constexpr int kLanes = V::kLanes;
  Source<T> source;
  Interpolation interpolation;
  Padding padding;
  Filler<A> filler;
  FixedMatrix matrix;
  int32_t lookup_rows = 0;  // the rows in which a vector's upper neighbours lie, if they are few
  bool straight;            // output pixels are source pixels, in rows from left to right or back
  alignas(64) int64_t step_u[kLanes], step_v[kLanes];

  Warp(const AugmentArgs& a, const Source<T>& source, const FixedMatrix& matrix)
      : source(source),
        interpolation(a.interpolation),
        padding(a.padding),
        filler{a.padding, a.constants},
        matrix(matrix) {
    const int64_t one = int64_t(1) << kFractionBits;
    const int64_t* m = matrix.m;
    straight = (m[0] == one || m[0] == -one) && m[1] == 0 && m[3] == 0 && (m[4] == one || m[4] == -one) &&
               m[2] % one == 0 && m[5] % one == 0;
    for (int j = 0; j < kLanes; ++j) {
      step_u[j] = m[0] * j;
      step_v[j] = m[3] * j;
    }
#ifdef __AVX512F__
    const auto reach = [&](int64_t step) {  // pixels from the first lane to the last, rounded up
      const int64_t size = least(step < 0 ? -step : step, kLookupColumns * one);
      return ((kLanes - 1) * size + one - 1) >> kFractionBits;
    };
    const bool few = reach(m[0]) < kLookupColumns - 1 && reach(m[3]) < kLookupRows;
    if (few && sizeof(A) == 4 && interpolation == Interpolation::kBilinear &&
        (source.channels == 1 || source.channels == 3))
      lookup_rows = int32_t(reach(m[3])) + 1;
#endif
  }

  // Output row y, n pixels of each channel, to out + c * pitch; whole vectors are written.
  void row(int64_t y, int64_t n, A* out, int64_t pitch) const {
    if (straight) return straight_row(y, n, out, pitch);
#ifdef __AVX512F__
    if constexpr (sizeof(A) == 4)
      if (lookup_rows)
        return source.channels == 3 ? lookup_row<3>(y, n, out, pitch) : lookup_row<1>(y, n, out, pitch);
#endif
    if (interpolation == Interpolation::kBilinear) return bilinear_row(y, n, out, pitch);
    if (interpolation == Interpolation::kNearest) return nearest_row(y, n, out, pitch);
    bicubic_row(y, n, out, pitch);
  }

  void straight_row(int64_t y, int64_t n, A* out, int64_t pitch) const {
    const Position first = matrix.at(0, y);
    const int64_t u = first.u >> kFractionBits, direction = matrix.m[0] > 0 ? 1 : -1;
    const int32_t v = padded(whole_part(first.v), int32_t(source.height), padding);
    // Output pixels [begin, end) lie inside.
    int64_t begin = direction > 0 ? -u : u - (source.width - 1),
            end = direction > 0 ? source.width - u : u + 1;
    begin = clamped(v < 0 ? n : begin, int64_t(0), n);
    end = clamped(v < 0 ? n : end, begin, n);
    for (int64_t c = 0; c < source.channels; ++c, out += pitch) {
      const T* line = source.plane(c) + (v < 0 ? 0 : v) * source.row_stride;
      const auto outside = [&](int64_t x) {
        const int32_t pixel = v < 0 ? -1 : padded(int32_t(u + direction * x), int32_t(source.width), padding);
        out[x] = pixel < 0 ? filler.value(c) : A(to_float(line[pixel]));
      };
      for (int64_t x = 0; x < begin; ++x) outside(x);
      int64_t x = begin;
      if (direction > 0)
        for (; x + kLanes <= end; x += kLanes) store(out + x, load(line + u + x));
      else
        for (; x + kLanes <= end; x += kLanes) store(out + x, reversed(load(line + u - x - (kLanes - 1))));
      for (; x < end; ++x) out[x] = A(to_float(line[u + direction * x]));
      for (; x < n; ++x) outside(x);
    }
  }

  // Whether all neighbours of the vector that starts here lie inside. A negative position is beyond any limit
  // as unsigned.
  FR_INLINE bool is_inside(Position at) const {
    const uint64_t limit_u = uint64_t(source.width - 1) << kFractionBits,
                   limit_v = uint64_t(source.height - 1) << kFractionBits;
    const int64_t last_u = at.u + (kLanes - 1) * matrix.m[0], last_v = at.v + (kLanes - 1) * matrix.m[3];
    return (uint64_t(at.u) < limit_u) & (uint64_t(last_u) < limit_u) & (uint64_t(at.v) < limit_v) &
           (uint64_t(last_v) < limit_v);
  }

  FR_INLINE void bilinear_row(int64_t y, int64_t n, A* out, int64_t pitch) const {
    const int64_t count = source.count(), row_stride = source.row_stride;
    Position at = matrix.at(0, y);
    for (int64_t x = 0; x < n; x += kLanes, at.u += kLanes * matrix.m[0], at.v += kLanes * matrix.m[3]) {
      if (!is_inside(at)) {
        bilinear_edge(at, x, out, pitch);
        continue;
      }
      const Positions<A> u(step_u, at.u), v(step_v, at.v);
      const Ints<A> index = v.whole * Ints<A>(int32_t(row_stride)) + u.whole;
      const V t = u.fraction(), s = v.fraction();
      for (int64_t c = 0; c < source.channels; ++c) {
        const T* plane = source.plane(c);
        V top_left, top_right, bottom_left, bottom_right;
        gather_pairs(plane, index, count, top_left, top_right);
        gather_pairs(plane + row_stride, index, count - row_stride, bottom_left, bottom_right);
        store(out + c * pitch + x, lerp(lerp(top_left, bottom_left, s), lerp(top_right, bottom_right, s), t));
      }
    }
  }

#ifdef __AVX512F__
  template <int kChannels>
  void lookup_row(int64_t y, int64_t n, A* out, int64_t pitch) const {
    const int64_t row_stride = source.row_stride, height = source.height, width = source.width,
                  rows = lookup_rows;
    const T* plane[kChannels];
    for (int c = 0; c < kChannels; ++c) plane[c] = source.plane(c);
    const bool zeros = padding == Padding::kZeros;
    const int64_t low_u = least(int64_t(0), (kLanes - 1) * matrix.m[0]),
                  low_v = least(int64_t(0), (kLanes - 1) * matrix.m[3]);
    Position at = matrix.at(0, y);
    for (int64_t x = 0; x < n; x += kLanes, at.u += kLanes * matrix.m[0], at.v += kLanes * matrix.m[3]) {
      // All left upper neighbours lie in `rows` rows from `line` on, in columns from `column` on.
      const int64_t column = (at.u + low_u) >> kFractionBits;
      int64_t line = (at.v + low_v) >> kFractionBits;
      const bool far = (column < -kLookupColumns) | (column >= width) | (line < -rows) | (line >= height);
      if (far || (!zeros && !is_inside(at))) {
        bilinear_edge(at, x, out, pitch);
        continue;
      }
      const int64_t begin = most(-column, int64_t(0)), end = least(width - column, int64_t(kLookupColumns));
      const uint32_t inside = uint32_t((uint64_t(1) << end) - (uint64_t(1) << begin));
      const Positions<A> u(step_u, at.u), v(step_v, at.v);
      const __m512i index = (__m512i)(u.whole - Ints<A>(int32_t(column))).part[0];
      __m512i row = (__m512i)(v.whole - Ints<A>(int32_t(line))).part[0];
      Lookup<T> top[kChannels], bottom[kChannels];
      typename Lookup<T>::Row above[kChannels];
      int64_t offset = line * row_stride + column;
      bool there = line >= 0;
#pragma GCC unroll 3
      for (int c = 0; c < kChannels; ++c) {
        top[c].start(index);
        bottom[c].start(index);
        if (there) above[c] = typename Lookup<T>::Row(plane[c] + offset, inside);
      }
      const int64_t last = line + rows;
      do {
        const __mmask16 lanes = _mm512_testn_epi32_mask(row, row);
        row = _mm512_sub_epi32(row, _mm512_set1_epi32(1));
        offset += row_stride;
        there = uint64_t(++line) < uint64_t(height);
#pragma GCC unroll 3
        for (int c = 0; c < kChannels; ++c) {
          typename Lookup<T>::Row below;
          if (there) below = typename Lookup<T>::Row(plane[c] + offset, inside);
          top[c].take(lanes, above[c]);
          bottom[c].take(lanes, below);
          above[c] = below;
        }
      } while (line < last);
      const V t = u.fraction(), s = v.fraction();
#pragma GCC unroll 3
      for (int c = 0; c < kChannels; ++c) {
        V top_left, top_right, bottom_left, bottom_right;
        top[c].result(top_left, top_right);
        bottom[c].result(bottom_left, bottom_right);
        store(out + c * pitch + x, lerp(lerp(top_left, bottom_left, s), lerp(top_right, bottom_right, s), t));
      }
    }
  }
#endif

  // Pixel numbers along one axis: those that stand for them, and which of them are there at all.
  struct Found {
    Ints<A> pixel;
    typename V::Mask there;
  };
  FR_INLINE Found find(const Ints<A>& wanted, int32_t n) const {
    const Padding rule = padding;
    const Ints<A> i = rule == Padding::kReflect
                          ? wanted.each([=](int32_t x) { return padded(x, n, Padding::kReflect); })
                          : wanted;
    const Ints<A> pixel = most(Ints<A>(0), least(i, Ints<A>(n - 1)));
    return {pixel, rule == Padding::kZeros || rule == Padding::kFill ? pixel == i : pixel == pixel};
  }

  // A vector at the border, or beyond: neighbours outside are looked for by the padding's rule. Of two
  // neighbours in a row one pair is gathered, from which each takes its own.
  __attribute__((noinline)) void bilinear_edge(Position at, int64_t x, A* out, int64_t pitch) const {
    const int64_t last_u = at.u + (kLanes - 1) * matrix.m[0], last_v = at.v + (kLanes - 1) * matrix.m[3];
    const bool far = most(at.u, last_u) < -(int64_t(1) << kFractionBits) ||
                     least(at.u, last_u) >> kFractionBits >= source.width ||
                     most(at.v, last_v) < -(int64_t(1) << kFractionBits) ||
                     least(at.v, last_v) >> kFractionBits >= source.height;
    if (far && (padding == Padding::kZeros || padding == Padding::kFill)) {
      for (int64_t c = 0; c < source.channels; ++c) store(out + c * pitch + x, V(filler.value(c)));
      return;
    }
    const int32_t height = int32_t(source.height), width = int32_t(source.width);
    const Positions<A> u(step_u, at.u), v(step_v, at.v);
    const Ints<A> one(1), stride(int32_t(source.row_stride));
    const Found left = find(u.whole, width), right = find(u.whole + one, width);
    const Found top = find(v.whole, height), bottom = find(v.whole + one, height);
    const Ints<A> pair = most(Ints<A>(0), least(least(left.pixel, right.pixel), Ints<A>(width - 2)));
    const auto left_is_first = left.pixel == pair, right_is_first = right.pixel == pair;
    const Ints<A> upper = top.pixel * stride + pair, lower = bottom.pixel * stride + pair;
    const auto there_ul = both<V>(top.there, left.there), there_ur = both<V>(top.there, right.there),
               there_ll = both<V>(bottom.there, left.there), there_lr = both<V>(bottom.there, right.there);
    const auto there = both<V>(there_ul, there_lr);  // all four
    const V zero(0), full(1), t = u.fraction(), s = v.fraction();
    const auto blend = [&](const V& ul, const V& ur, const V& ll, const V& lr)
                           __attribute__((always_inline)) {
                             return lerp(lerp(select(there_ul, ul, zero), select(there_ll, ll, zero), s),
                                         lerp(select(there_ur, ur, zero), select(there_lr, lr, zero), s), t);
                           };
    const V inside = padding == Padding::kFill ? blend(full, full, full, full) : full;
    const int64_t count = source.count();
    for (int64_t c = 0; c < source.channels; ++c) {
      const T* plane = source.plane(c);
      V first, second, below_first, below_second;
      if (width > 1) {
        gather_pairs(plane, upper, count, first, second);
        gather_pairs(plane, lower, count, below_first, below_second);
      } else {
        first = second = gather(plane, upper, count);
        below_first = below_second = gather(plane, lower, count);
      }
      V value = blend(select(left_is_first, first, second), select(right_is_first, first, second),
                      select(left_is_first, below_first, below_second),
                      select(right_is_first, below_first, below_second));
      if (padding == Padding::kFill) value = select(there, value, filled(value, inside, V(filler.value(c))));
      store(out + c * pitch + x, value);
    }
  }

  void nearest_row(int64_t y, int64_t n, A* out, int64_t pitch) const {
    Position at = matrix.at(0, y);
    for (int64_t x = 0; x < n; x += kLanes, at.u += kLanes * matrix.m[0], at.v += kLanes * matrix.m[3]) {
      const Found column = find(Positions<A>(step_u, at.u).nearest(), int32_t(source.width));
      const Found line = find(Positions<A>(step_v, at.v).nearest(), int32_t(source.height));
      const Ints<A> index = line.pixel * Ints<A>(int32_t(source.row_stride)) + column.pixel;
      const auto there = both<V>(line.there, column.there);
      for (int64_t c = 0; c < source.channels; ++c)
        store(out + c * pitch + x,
              select(there, gather(source.plane(c), index, source.count()), V(filler.value(c))));
    }
  }

  void bicubic_row(int64_t y, int64_t n, A* out, int64_t pitch) const {
    Position at = matrix.at(0, y);
    for (int64_t x = 0; x < n; ++x, at.u += matrix.m[0], at.v += matrix.m[3]) {
      const Taps<A> columns(at.u, source.width, interpolation, padding),
          lines(at.v, source.height, interpolation, padding);
      const A inside = padding == Padding::kFill ? inside_share(lines, columns) : A(1);
      int32_t column[4];
      A across[4];
      for (int k = 0; k < 4; ++k) {
        column[k] = columns.pixel(k);
        across[k] = columns.weight(k);
      }
      for (int64_t c = 0; c < source.channels; ++c) {
        A value = 0;
        for (int i = 0; i < 4; ++i) {
          if (lines.pixel(i) < 0) continue;
          const T* line = source.plane(c) + lines.pixel(i) * source.row_stride;
          A sum = 0;
          for (int k = 0; k < 4; ++k)
            if (column[k] >= 0) sum += across[k] * A(to_float(line[column[k]]));
          value += lines.weight(i) * sum;
        }
        out[c * pitch + x] = inside == A(1) ? value : filled(value, inside, filler.value(c));
      }
    }
  }
};

template <class T>
Source<T> source_of(const AugmentArgs& a, const void* copied, int64_t sample) {
  Source<T> source = {static_cast<const T*>(a.images) + sample * a.in_stride[0],
                      a.in_stride[1],
                      a.in_stride[2],
                      a.in_height,
                      a.in_width,
                      a.channels};
  if (copied && a.in_stride[3] != 1)
    source = {static_cast<const T*>(copied),
              a.in_height * a.in_width,
              a.in_width,
              a.in_height,
              a.in_width,
              a.channels};
  const Window window = window_of(a, sample);
  source.data += window.top * source.row_stride + window.left;
  source.height = window.height;
  source.width = window.width;
  return source;
}

FixedMatrix matrix_of_sample(const double* matrix, const AugmentArgs& a) {
  FixedMatrix fixed = {{kOne, 0, 0, 0, kOne, 0}};
  if (matrix) fixed_matrix(matrix, a.out_height, a.out_width, &fixed);
  return fixed;
}

}  // namespace
}  // namespace fastreg::FASTREG_ISA
