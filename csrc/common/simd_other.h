// The machine vector where there is no instruction set that this directory knows: what the compiler makes of
// it.
#pragma once
#define FR_VECTOR_BYTES 16
#include "simd_portable.h"

namespace fastreg::FASTREG_ISA {
using namespace portable;
constexpr bool kFuses = false;
}  // namespace fastreg::FASTREG_ISA
