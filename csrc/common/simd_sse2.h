// The machine vector of SSE2, x86-64's baseline: 16 bytes. It has no fused multiplication and addition, so
// that the digests of what uses multiply_add() are its own.
#pragma once
#define FR_VECTOR_BYTES 16
#include "simd_portable.h"

namespace fastreg::FASTREG_ISA {

constexpr bool kFuses = false;  // whether fma_part rounds once

using portable::any_part, portable::below, portable::equal, portable::greater, portable::less,
    portable::mask_of_bits;
using portable::fma_part;
using portable::join_halves, portable::select_halves;
using portable::load_half, portable::store_half;
using portable::MaskPart, portable::select_part;
using portable::read_first, portable::write_first;
using portable::round_bfloat16, portable::store_low_halves;

FR_INLINE F32Part root_part(F32Part a) { return _mm_sqrt_ps(a); }
FR_INLINE F64Part root_part(F64Part a) { return _mm_sqrt_pd(a); }

// One instruction, which a compiler does not find behind a selection.
FR_INLINE F32Part maximum_part(F32Part a, F32Part b) { return _mm_max_ps(a, b); }
FR_INLINE F32Part minimum_part(F32Part a, F32Part b) { return _mm_min_ps(a, b); }

FR_INLINE U64Part multiply_low_halves(U64Part a, uint64_t b) {
  return (U64Part)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(int64_t(b)));
}

FR_INLINE Comparison compare_groups(const GroupHalves& halves, uint16_t threshold) {
  const __m128i flip = _mm_set1_epi16(int16_t(0x8000));  // for unsigned numbers: compares are signed
  const __m128i t = _mm_set1_epi16(int16_t(threshold ^ 0x8000));
  const __m128i low = _mm_xor_si128(_mm_unpacklo_epi64((__m128i)halves.first, (__m128i)halves.second), flip);
  const __m128i high = _mm_xor_si128(_mm_unpackhi_epi64((__m128i)halves.first, (__m128i)halves.second), flip);
  const __m128i less = _mm_packs_epi16(_mm_cmpgt_epi16(t, low), _mm_cmpgt_epi16(t, high));
  const __m128i equal = _mm_or_si128(_mm_cmpeq_epi16(t, low), _mm_cmpeq_epi16(t, high));
  return {uint64_t(_mm_movemask_epi8(less)), _mm_movemask_epi8(equal) != 0};
}

}  // namespace fastreg::FASTREG_ISA
