// The machine vector of AVX-512 (F, BW, DQ, VL): 64 bytes, a whole Vec. Masks are bits in registers of their
// own.
#pragma once
#define FR_VECTOR_BYTES 64
#include "simd_portable.h"

namespace fastreg::FASTREG_ISA {

constexpr bool kFuses = true;  // whether fma_part rounds once

using portable::join_halves, portable::store_low_halves;

// ---- masks

template <class A>
using MaskPart = std::conditional_t<sizeof(A) == 4, __mmask16, __mmask8>;

FR_INLINE __mmask16 less(F32Part a, F32Part b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
FR_INLINE __mmask16 greater(F32Part a, F32Part b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
FR_INLINE __mmask16 equal(F32Part a, F32Part b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
FR_INLINE __mmask8 less(F64Part a, F64Part b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
FR_INLINE __mmask8 greater(F64Part a, F64Part b) { return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ); }
FR_INLINE __mmask8 equal(F64Part a, F64Part b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
FR_INLINE __mmask16 below(U32Part a, uint32_t limit) {
  return _mm512_cmplt_epu32_mask((__m512i)a, _mm512_set1_epi32(int(limit)));
}

FR_INLINE F32Part select_part(__mmask16 m, F32Part yes, F32Part no) {
  return _mm512_mask_blend_ps(m, no, yes);
}
FR_INLINE F64Part select_part(__mmask8 m, F64Part yes, F64Part no) {
  return _mm512_mask_blend_pd(m, no, yes);
}
template <class A>
FR_INLINE MaskPart<A> mask_of_bits(uint32_t bits, int) {
  return MaskPart<A>(bits);
}
template <class A>
FR_INLINE bool any_part(const MaskPart<A>* parts) {
  return parts[0] != 0;
}

// ---- arithmetic

FR_INLINE F32Part fma_part(F32Part a, F32Part b, F32Part c) { return _mm512_fmadd_ps(a, b, c); }
FR_INLINE F64Part fma_part(F64Part a, F64Part b, F64Part c) { return _mm512_fmadd_pd(a, b, c); }

FR_INLINE F32Part root_part(F32Part a) { return _mm512_sqrt_ps(a); }
FR_INLINE F64Part root_part(F64Part a) { return _mm512_sqrt_pd(a); }

// One instruction, which a compiler does not find behind a selection.
FR_INLINE F32Part maximum_part(F32Part a, F32Part b) { return _mm512_max_ps(a, b); }
FR_INLINE F32Part minimum_part(F32Part a, F32Part b) { return _mm512_min_ps(a, b); }

// ---- 16-bit numbers

FR_INLINE F32Part load_half(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FR_INLINE void store_half(Half* p, F32Part x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
FR_INLINE U32Part round_bfloat16(F32Part x) {
  const U32Part u = (U32Part)x, rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return (U32Part)_mm512_mask_mov_epi32((__m512i)rounded, nan, _mm512_set1_epi32(0x7fc0));
}
FR_INLINE U32Part select_halves(uint32_t bits, int, U32Part yes, U32Part no) {
  return (U32Part)_mm512_mask_mov_epi16((__m512i)no, bits, (__m512i)yes);
}

// ---- the first elements of a vector, in one masked move of its width: several narrow stores would stall the
// wide load that follows

template <int, class T>
FR_INLINE void read_first(T* buffer, const T* p, int count) {
  const __mmask16 mask = __mmask16((1u << count) - 1u);
  if constexpr (sizeof(T) == 2)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer), _mm256_maskz_loadu_epi16(mask, p));
  else if constexpr (sizeof(T) == 4)
    _mm512_storeu_ps(buffer, _mm512_maskz_loadu_ps(mask, p));
  else
    _mm512_storeu_pd(buffer, _mm512_maskz_loadu_pd(__mmask8(mask), p));
}
template <int, class T>
FR_INLINE void write_first(T* p, const T* buffer, int count) {
  const __mmask16 mask = __mmask16((1u << count) - 1u);
  if constexpr (sizeof(T) == 2)
    _mm256_mask_storeu_epi16(p, mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(buffer)));
  else if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, mask, _mm512_loadu_ps(buffer));
  else
    _mm512_mask_storeu_pd(p, __mmask8(mask), _mm512_loadu_pd(buffer));
}

// ---- random bits

FR_INLINE U64Part multiply_low_halves(U64Part a, uint64_t b) {
  return (U64Part)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(int64_t(b)));
}

FR_INLINE Comparison compare_groups(const GroupHalves& halves, uint16_t threshold) {
  // Unpacking takes even lanes and odd lanes together; permuting first keeps the groups in order.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), t = _mm512_set1_epi16(int16_t(threshold));
  const __m512i first = _mm512_permutexvar_epi64(order, (__m512i)halves.first);
  const __m512i second = _mm512_permutexvar_epi64(order, (__m512i)halves.second);
  const __m512i low = _mm512_unpacklo_epi64(first, second), high = _mm512_unpackhi_epi64(first, second);
  const uint64_t less = uint64_t(_mm512_cmplt_epu16_mask(low, t)) | uint64_t(_mm512_cmplt_epu16_mask(high, t))
                                                                        << 32;
  return {less, (_mm512_cmpeq_epi16_mask(low, t) | _mm512_cmpeq_epi16_mask(high, t)) != 0};
}

}  // namespace fastreg::FASTREG_ISA
