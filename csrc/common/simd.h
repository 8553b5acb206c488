// Vectors for the CPU kernels: Vec<A> is always 64 bytes (16 floats or 8 doubles), made of as many machine
// vectors as the instruction set needs. One width everywhere means one order of every reduction, and only
// what is written as multiply_add() is fused. So an op without multiply_add() has the same bits on every
// instruction set, and one with it on every set that has the instruction (all but x86-64's baseline).
//
//   simd_vector.h    Vec: arithmetic, comparisons, masks, reductions
//   simd_memory.h    loads and stores of every storage type, whole or of a few lanes; loops; blocks
//   simd_math.h      exp and log
//   simd_philox.h    random bits in bulk
//
// All of it is written over the operations on one machine vector in simd_<set>.h: intrinsics where a compiler
// does not find the instruction, and the vector extensions of gcc and clang, in simd_portable.h, elsewhere.
//
// Files that include this are compiled once per instruction set, with FASTREG_ISA naming the namespace.
// Everything they define lies inside it: the linker could merge a function outside with its twin for a
// machine that is not this one.
#pragma once
#ifdef __SSE2__
// gcc 12: AVX-512 intrinsics leave a variable unset on purpose, which -Wall reports once they are inlined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
#ifdef __ARM_NEON
#include <arm_neon.h>
#endif

#define FR_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#elif defined(__SSE2__)
#include "simd_sse2.h"
#elif defined(__aarch64__)
#include "simd_neon.h"
#else
#include "simd_other.h"
#endif

#include "simd_math.h"
#include "simd_memory.h"
#include "simd_philox.h"
#include "simd_vector.h"
