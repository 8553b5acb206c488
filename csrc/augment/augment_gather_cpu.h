// Vectors of neighbours for resampling on the CPU: whole numbers and coordinates in the lanes of a vector,
// and the pixels found there, by gathers or from rows held in registers. Part of augment_cpu.cpp, compiled
// once per instruction set.
#pragma once
#include "augment_geometry.h"
#include "augment_pixels_cpu.h"

namespace fastreg::FASTREG_ISA {
namespace {

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
  explicit FR_INLINE Ints(const V& whole) {  // numbers that an int32 can hold
    for (int i = 0; i < kParts; ++i) part[i] = __builtin_convertvector(whole.part[i], Part);
  }
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

#define FR_EACH(name, expression)                            \
  friend FR_INLINE Ints name(const Ints& a, const Ints& b) { \
    Ints c;                                                  \
    for (int i = 0; i < kParts; ++i) c.part[i] = expression; \
    return c;                                                \
  }
  // clang-format off
  FR_EACH(operator+, a.part[i] + b.part[i])
  FR_EACH(operator-, a.part[i] - b.part[i])
  FR_EACH(operator*, a.part[i] * b.part[i])
  FR_EACH(least, a.part[i] < b.part[i] ? a.part[i] : b.part[i])
  FR_EACH(most, a.part[i] < b.part[i] ? b.part[i] : a.part[i])
  // clang-format on
#undef FR_EACH
};
// To the nearest, ties to even, as processors round; of numbers that an int32 can hold.
template <class A>
FR_INLINE Ints<A> rounded(const Vec<A>& v) {
#ifdef __x86_64__
  if constexpr (sizeof(A) == 4) {
    Ints<A> whole;
    for (int i = 0; i < Vec<A>::kParts; ++i) {
#if defined(__AVX512F__)
      whole.part[i] = (typename Ints<A>::Part)_mm512_cvtps_epi32(v.part[i]);
#elif defined(__AVX2__)
      whole.part[i] = (typename Ints<A>::Part)_mm256_cvtps_epi32(v.part[i]);
#else
      whole.part[i] = (typename Ints<A>::Part)_mm_cvtps_epi32(v.part[i]);
#endif
    }
    return whole;
  }
#endif
  return Ints<A>(nearest_whole(v, Vec<A>(NearestGrid<A>::kBig)));
}
template <class V>
FR_INLINE typename V::Mask both(const typename V::Mask& a, const typename V::Mask& b) {
  typename V::Mask c;
  for (int i = 0; i < V::kParts; ++i) c.part[i] = a.part[i] & b.part[i];
  return c;
}

template <class V>
FR_INLINE bool all(const typename V::Mask& a) {
  typename V::Mask other;
  for (int i = 0; i < V::kParts; ++i) other.part[i] = MaskPart<typename V::Scalar>(~a.part[i]);
  return !any(other);
}

// ---- coordinates

// The coordinates base + j * step of neighbouring output pixels j, as whole parts and fractions.
template <class A>
struct LaneCoordinates {
  static constexpr int kLanes = Vec<A>::kLanes, kParts = Vec<A>::kParts, kI64Lanes = FR_VECTOR_BYTES / 8;
  typedef uint32_t Low __attribute__((vector_size(4 * Vec<A>::kPartLanes)));
  Ints<A> whole;
  Low low[kParts];

  FR_INLINE LaneCoordinates(const int64_t* steps, int64_t base) {  // steps[j] = j * step
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
};

// ---- gathers
// A plane holds `count` elements. Of pairs, index and index + 1 lie inside of it.

#if defined(__AVX512F__)
// Four neighbouring bytes to a lane, the first of them at the index; where the plane ends they are read from
// further left.
FR_INLINE __m512i gather_quads(const uint8_t* plane, __m512i index, int64_t count) {
  const __m512i start = _mm512_min_epi32(index, _mm512_set1_epi32(int32_t(count - 4)));
  const __m512i shift = _mm512_slli_epi32(_mm512_sub_epi32(index, start), 3);
  return _mm512_srlv_epi32(_mm512_i32gather_epi32(start, plane, 1), shift);
}
FR_INLINE Vec<float>::Part first_byte(__m512i quads) {
  return (Vec<float>::Part)_mm512_cvtepi32_ps(_mm512_and_si512(quads, _mm512_set1_epi32(255)));
}
FR_INLINE __m512i next_byte(__m512i quads) { return _mm512_srli_epi32(quads, 8); }

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
#elif defined(__AVX2__)
FR_INLINE __m256i gather_quads(const uint8_t* plane, __m256i index, int64_t count) {
  const __m256i start = _mm256_min_epi32(index, _mm256_set1_epi32(int32_t(count - 4)));
  const __m256i shift = _mm256_slli_epi32(_mm256_sub_epi32(index, start), 3);
  return _mm256_srlv_epi32(_mm256_i32gather_epi32(reinterpret_cast<const int*>(plane), start, 1), shift);
}
FR_INLINE Vec<float>::Part first_byte(__m256i quads) {
  return (Vec<float>::Part)_mm256_cvtepi32_ps(_mm256_and_si256(quads, _mm256_set1_epi32(255)));
}
FR_INLINE __m256i next_byte(__m256i quads) { return _mm256_srli_epi32(quads, 8); }
#endif

template <class T, class A>
FR_INLINE void gather_pairs(const T* plane, const Ints<A>& index, int64_t count, Vec<A>& left,
                            Vec<A>& right) {
  [[maybe_unused]] typedef typename Vec<A>::Part Part;
#if defined(__AVX512F__)
  // A pair of floats is 64 bits, so two gathers have all pairs of a vector.
  if constexpr (std::is_same_v<T, float>) {
    const __m512i at = (__m512i)index.part[0];
    const __m512i low = _mm512_i32gather_epi64(_mm512_castsi512_si256(at), plane, 4);
    const __m512i high = _mm512_i32gather_epi64(_mm512_extracti64x4_epi64(at, 1), plane, 4);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    left.part[0] = (Part)_mm512_permutex2var_epi32(low, even, high);
    right.part[0] = (Part)_mm512_permutex2var_epi32(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
    return;
  }
  // A pair of narrower values is part of 32 bits, of which one gather has a vector.
  if constexpr (sizeof(T) <= 2)
    if (count * int64_t(sizeof(T)) >= 4) {
      const __m512i at = (__m512i)index.part[0];
      if constexpr (sizeof(T) == 1) {
        const __m512i quads = gather_quads(plane, at, count);
        left.part[0] = first_byte(quads);
        right.part[0] = first_byte(next_byte(quads));
      } else {
        split_pairs<T>(_mm512_i32gather_epi32(at, plane, 2), left, right);
      }
      return;
    }
#elif defined(__AVX2__)
  // The same with the two halves of a vector.
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
  if constexpr (sizeof(T) == 1 || std::is_same_v<T, BFloat16>)
    if (count * int64_t(sizeof(T)) >= 4) {
      for (int i = 0; i < 2; ++i) {
        const __m256i at = (__m256i)index.part[i];
        if constexpr (sizeof(T) == 1) {
          const __m256i quads = gather_quads(plane, at, count);
          left.part[i] = first_byte(quads);
          right.part[i] = first_byte(next_byte(quads));
        } else {
          const __m256i both = _mm256_i32gather_epi32(reinterpret_cast<const int*>(plane), at, 2);
          left.part[i] = (Part)_mm256_slli_epi32(both, 16);
          right.part[i] = (Part)_mm256_and_si256(both, _mm256_set1_epi32(int32_t(0xffff0000u)));
        }
      }
      return;
    }
#endif
  // Any other type and instruction set, one lane after the other.
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
  [[maybe_unused]] Vec<A> v;
  if constexpr (std::is_same_v<T, float>) {
    v.part[0] = (typename Vec<A>::Part)_mm512_i32gather_ps((__m512i)index.part[0], plane, 4);
    return v;
  }
  if constexpr (sizeof(T) == 1)
    if (count >= 4) {
      v.part[0] = first_byte(gather_quads(plane, (__m512i)index.part[0], count));
      return v;
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

// ---- lookups, which replace gathers where they pay
// Neighbouring output pixels lie in few rows of the source unless the image is turned far. A lookup holds 32
// pixels of such a row in registers, and the lanes that lie in it take theirs by one permutation, where a
// gather would load for each lane. What a mask leaves out is not read and counts as 0, which makes a border
// of zeros free.

#ifdef __AVX512F__
constexpr int32_t kLookupColumns = 32, kLookupRows = 5;  // for more rows gathers are faster

template <class T>
struct Lookup {  // 16-bit pixels, and bytes made so: one register holds the row, a 32-bit lane left and right
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
  FR_INLINE void start(__m512i left, __m512i right) {
    index = _mm512_or_si512(left, _mm512_slli_epi32(right, 16));
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
  FR_INLINE void start(__m512i left_index, __m512i right_index) {
    left = (__m512)left_index;
    right = (__m512)right_index;
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

}  // namespace
}  // namespace fastreg::FASTREG_ISA
