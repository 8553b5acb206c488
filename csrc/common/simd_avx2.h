// The machine vector of AVX2 with FMA and F16C: 32 bytes.
#pragma once
#define FR_VECTOR_BYTES 32
#include "simd_portable.h"

namespace fastreg::FASTREG_ISA {

constexpr bool kFuses = true;  // whether fma_part rounds once

using portable::any_part, portable::below, portable::equal, portable::greater, portable::less,
    portable::mask_of_bits;
using portable::MaskPart, portable::select_part;
using portable::round_bfloat16, portable::select_halves;

FR_INLINE F32Part fma_part(F32Part a, F32Part b, F32Part c) { return _mm256_fmadd_ps(a, b, c); }
FR_INLINE F64Part fma_part(F64Part a, F64Part b, F64Part c) { return _mm256_fmadd_pd(a, b, c); }

FR_INLINE F32Part root_part(F32Part a) { return _mm256_sqrt_ps(a); }
FR_INLINE F64Part root_part(F64Part a) { return _mm256_sqrt_pd(a); }

// One instruction, which a compiler does not find behind a selection.
FR_INLINE F32Part maximum_part(F32Part a, F32Part b) { return _mm256_max_ps(a, b); }
FR_INLINE F32Part minimum_part(F32Part a, F32Part b) { return _mm256_min_ps(a, b); }

FR_INLINE F32Part load_half(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FR_INLINE void store_half(Half* p, F32Part x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
FR_INLINE void store_low_halves(BFloat16* p, const U32Part* parts) {  // packs by halves of 128 bits
  const __m256i packed = _mm256_packus_epi32((__m256i)parts[0], (__m256i)parts[1]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
FR_INLINE U32Part join_halves(U32Part low, U32Part high) {
  return (U32Part)_mm256_blend_epi16((__m256i)low, (__m256i)high, 0xaa);
}

// float32 is read in masked moves of the vector's width: several narrow stores would stall the wide load that
// follows.
template <int kLanes, class T>
FR_INLINE void read_first(T* buffer, const T* p, int count) {
  if constexpr (std::is_same_v<T, float>) {
    for (int i = 0; i < kParts; ++i) {
      const auto mask = mask_of_bits<float>((1u << count) - 1u, i);
      _mm256_storeu_ps(buffer + 8 * i, _mm256_maskload_ps(p + 8 * i, (__m256i)mask));
    }
  } else {
    portable::read_first<kLanes>(buffer, p, count);
  }
}
template <int kLanes, class T>
FR_INLINE void write_first(T* p, const T* buffer, int count) {
  if constexpr (std::is_same_v<T, float>) {
    for (int i = 0; i < kParts; ++i) {
      const auto mask = mask_of_bits<float>((1u << count) - 1u, i);
      _mm256_maskstore_ps(p + 8 * i, (__m256i)mask, _mm256_loadu_ps(buffer + 8 * i));
    }
  } else {
    portable::write_first<kLanes>(p, buffer, count);
  }
}

FR_INLINE U64Part multiply_low_halves(U64Part a, uint64_t b) {
  return (U64Part)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(int64_t(b)));
}

FR_INLINE Comparison compare_groups(const GroupHalves& halves, uint16_t threshold) {
  const __m256i flip = _mm256_set1_epi16(int16_t(0x8000));  // for unsigned numbers: compares are signed
  const __m256i t = _mm256_set1_epi16(int16_t(threshold ^ 0x8000));
  const __m256i low =
      _mm256_xor_si256(_mm256_unpacklo_epi64((__m256i)halves.first, (__m256i)halves.second), flip);
  const __m256i high =
      _mm256_xor_si256(_mm256_unpackhi_epi64((__m256i)halves.first, (__m256i)halves.second), flip);
  const __m256i less = _mm256_packs_epi16(_mm256_cmpgt_epi16(t, low), _mm256_cmpgt_epi16(t, high));
  const __m256i equal = _mm256_or_si256(_mm256_cmpeq_epi16(t, low), _mm256_cmpeq_epi16(t, high));
  return {uint32_t(_mm256_movemask_epi8(less)), !_mm256_testz_si256(equal, equal)};
}

}  // namespace fastreg::FASTREG_ISA
