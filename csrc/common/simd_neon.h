// The machine vector of aarch64: 16 bytes, with fused multiplication and addition.
#pragma once
#define FR_VECTOR_BYTES 16
#include "simd_portable.h"

namespace fastreg::FASTREG_ISA {

constexpr bool kFuses = true;  // whether fma_part rounds once

using portable::any_part, portable::below, portable::equal, portable::greater, portable::less,
    portable::mask_of_bits;
using portable::compare_groups;
using portable::join_halves, portable::select_halves;
using portable::load_half, portable::store_half;
using portable::MaskPart, portable::select_part;
using portable::maximum_part, portable::minimum_part;
using portable::read_first, portable::write_first;
using portable::round_bfloat16, portable::store_low_halves;

FR_INLINE F32Part fma_part(F32Part a, F32Part b, F32Part c) { return vfmaq_f32(c, a, b); }
FR_INLINE F64Part fma_part(F64Part a, F64Part b, F64Part c) { return vfmaq_f64(c, a, b); }

FR_INLINE F32Part root_part(F32Part a) { return vsqrtq_f32(a); }
FR_INLINE F64Part root_part(F64Part a) { return vsqrtq_f64(a); }

FR_INLINE U64Part multiply_low_halves(U64Part a, uint64_t b) {
  return (U64Part)vmull_u32(vmovn_u64((uint64x2_t)a), vdup_n_u32(uint32_t(b)));
}

}  // namespace fastreg::FASTREG_ISA
