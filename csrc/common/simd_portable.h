// One machine vector, of FR_VECTOR_BYTES bytes, and what is done with it, in the vector extensions of gcc and
// clang. Each simd_<set>.h defines FR_VECTOR_BYTES, includes this and gives every function here, its own or
// by `using portable::...`, to the files above it. All of them compute the same bits.
#pragma once
#include <cmath>
#include <type_traits>

#include "device.h"

namespace fastreg::FASTREG_ISA {

template <class A>
struct Register {
  static constexpr int kLanes = FR_VECTOR_BYTES / sizeof(A);
  typedef A Part __attribute__((vector_size(FR_VECTOR_BYTES)));
  using Int = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef Int IntPart __attribute__((vector_size(FR_VECTOR_BYTES)));
};
typedef float F32Part __attribute__((vector_size(FR_VECTOR_BYTES)));
typedef double F64Part __attribute__((vector_size(FR_VECTOR_BYTES)));
typedef int32_t I32Part __attribute__((vector_size(FR_VECTOR_BYTES)));
typedef uint32_t U32Part __attribute__((vector_size(FR_VECTOR_BYTES)));
typedef uint64_t U64Part __attribute__((vector_size(FR_VECTOR_BYTES)));
typedef uint16_t U16Part __attribute__((vector_size(FR_VECTOR_BYTES / 2)));  // as many lanes as a U32Part
constexpr int kParts = 64 / FR_VECTOR_BYTES;                                 // machine vectors of a Vec

// Some groups of Philox, one in each 64-bit lane: their words 0 and 1, and their words 2 and 3.
constexpr int kGroupLanes = FR_VECTOR_BYTES / 8;
struct GroupHalves {
  U64Part first, second;
};
// The 8 * kGroupLanes 16-bit values of such groups, in their order, against a threshold: bit j of `less` says
// that value j is below it, and `ties` whether any value equals it.
struct Comparison {
  uint64_t less;
  bool ties;
};

namespace portable {

// ---- masks: a truth value per lane, as lanes of all ones or zeros

template <class A>
using MaskPart = typename Register<A>::IntPart;

template <class P>
FR_INLINE auto less(P a, P b) {
  return a < b;
}
template <class P>
FR_INLINE auto greater(P a, P b) {
  return a > b;
}
template <class P>
FR_INLINE auto equal(P a, P b) {
  return a == b;
}
FR_INLINE I32Part below(U32Part a, uint32_t limit) { return (I32Part)(a < limit); }
template <class M, class P>
FR_INLINE P select_part(M m, P yes, P no) {
  return m ? yes : no;
}
// Lane j of part i is true where bit i * lanes + j is set.
template <class A>
FR_INLINE MaskPart<A> mask_of_bits(uint32_t bits, int i) {
  using Int = typename Register<A>::Int;
  constexpr int lanes = Register<A>::kLanes;
  MaskPart<A> lane_bit;
  for (int j = 0; j < lanes; ++j) lane_bit[j] = Int(1) << j;
  const MaskPart<A> spread = Int(bits) - MaskPart<A>{};
  return (spread & (lane_bit << (i * lanes))) != 0;
}
template <class A>
FR_INLINE bool any_part(const MaskPart<A>* parts) {
  using Int = typename Register<A>::Int;
  MaskPart<A> all = parts[0];
  for (int i = 1; i < kParts; ++i) all = all | parts[i];
  Int lane[Register<A>::kLanes], result = 0;
  memcpy(lane, &all, sizeof lane);
  for (Int l : lane) result |= l;
  return result != 0;
}

// ---- arithmetic

// a * b + c; two roundings, since there is no such instruction.
template <class P>
FR_INLINE P fma_part(P a, P b, P c) {
  return a * b + c;
}
template <class P>
FR_INLINE P root_part(P a) {
  for (size_t j = 0; j < sizeof(P) / sizeof(a[0]); ++j) a[j] = std::sqrt(a[j]);
  return a;
}
// a where a > b (a < b), else b.
FR_INLINE F32Part maximum_part(F32Part a, F32Part b) { return a > b ? a : b; }
FR_INLINE F32Part minimum_part(F32Part a, F32Part b) { return a < b ? a : b; }

// ---- 16-bit numbers

// As to_float and from_float of device.h, lane by lane the same bits. Written for whole vectors because a
// compiler makes of a loop over lanes, which have branches, as much code as there are lanes.
FR_INLINE F32Part load_half(const Half* p) {
  U16Part raw;
  memcpy(&raw, p, sizeof raw);
  const U32Part x = __builtin_convertvector(raw, U32Part), sign = (x & 0x8000u) << 16;
  const I32Part rest = (I32Part)(x & 0x7fffu), shifted = rest << 13;
  const I32Part whole = (I32Part)(__builtin_convertvector(rest, F32Part) * 0x1p-24f);
  I32Part magnitude = rest < 0x400 ? whole : shifted + 0x38000000;
  magnitude = rest >= 0x7c00 ? shifted | 0x7f800000 : magnitude;
  return (F32Part)(magnitude | (I32Part)sign);
}
FR_INLINE void store_half(Half* p, F32Part x) {
  const U32Part u = (U32Part)x, sign = (u >> 16) & 0x8000u;
  const I32Part magnitude = (I32Part)(u & 0x7fffffffu);
  const I32Part normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const I32Part subnormal = (I32Part)((F32Part)magnitude + 0.5f) - 0x3f000000;
  I32Part h = magnitude < 0x38800000 ? subnormal : normal;
  h = magnitude >= 0x477ff000 ? 0x7c00 - I32Part{} : h;
  h = magnitude > 0x7f800000 ? 0x7e00 - I32Part{} : h;
  const U16Part raw = __builtin_convertvector((U32Part)h | sign, U16Part);
  memcpy(static_cast<void*>(p), &raw, sizeof raw);
}
// x rounded to bfloat16, in the lower half of each lane; a NaN becomes the quiet one.
FR_INLINE U32Part round_bfloat16(F32Part x) {
  const U32Part u = (U32Part)x, rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return x == x ? rounded : (0x7fc0u - U32Part{});
}
// The lower halves of the lanes of all parts, one after the other.
FR_INLINE void store_low_halves(BFloat16* p, const U32Part* parts) {
  for (int i = 0; i < kParts; ++i) {
    const U16Part raw = __builtin_convertvector(parts[i], U16Part);
    memcpy(p + i * Register<float>::kLanes, &raw, sizeof raw);
  }
}
// The upper half of each lane of `high`, and the lower half of each of `low`, whose upper half is 0.
FR_INLINE U32Part join_halves(U32Part low, U32Part high) { return low | (high & 0xffff0000u); }
// Half j of part i: that of `yes` where bit i * halves + j is set, that of `no` elsewhere.
FR_INLINE U32Part select_halves(uint32_t bits, int i, U32Part yes, U32Part no) {
  typedef uint16_t Halves __attribute__((vector_size(FR_VECTOR_BYTES)));
  constexpr int halves = FR_VECTOR_BYTES / 2;
  Halves lane_bit;
  for (int j = 0; j < halves; ++j) lane_bit[j] = uint16_t(1u << (j % 16));
  const uint16_t of_part = uint16_t(bits >> (i * halves));
  const Halves spread = of_part - Halves{};
  return (U32Part)((spread & lane_bit) == lane_bit ? (Halves)yes : (Halves)no);
}

// ---- the first elements of a vector

// memcpy of fewer than kRoom bytes without a call: two moves that may overlap.
template <size_t kRoom>
FR_INLINE void copy_few(void* to, const void* from, size_t bytes) {
  const auto both_ends = [&](auto chunk) __attribute__((always_inline)) {
    constexpr size_t size = sizeof chunk;
    const size_t last = bytes - size;
    memcpy(to, from, size);
    memcpy(static_cast<char*>(to) + last, static_cast<const char*>(from) + last, size);
  };
  struct Chunk32 {
    char byte[32];
  };
  struct Chunk16 {
    char byte[16];
  };
  if constexpr (kRoom > 32)
    if (bytes >= 32) return both_ends(Chunk32());
  if (bytes >= 16) return both_ends(Chunk16());
  if (bytes >= 8) return both_ends(uint64_t());
  if (bytes >= 4) return both_ends(uint32_t());
  if (bytes >= 2) memcpy(to, from, 2);
}
// `count` elements of p to or from a buffer of kLanes.
template <int kLanes, class T>
FR_INLINE void read_first(T* buffer, const T* p, int count) {
  memset(static_cast<void*>(buffer), 0, kLanes * sizeof(T));
  copy_few<kLanes * sizeof(T)>(buffer, p, size_t(count) * sizeof(T));
}
template <int kLanes, class T>
FR_INLINE void write_first(T* p, const T* buffer, int count) {
  copy_few<kLanes * sizeof(T)>(p, buffer, size_t(count) * sizeof(T));
}

// ---- random bits

// 32 x 32 -> 64 bits; the high halves of a are ignored.
FR_INLINE U64Part multiply_low_halves(U64Part a, uint64_t b) { return (a & 0xffffffffu) * b; }

FR_INLINE Comparison compare_groups(const GroupHalves& halves, uint16_t threshold) {
  Comparison result{0, false};
  for (int g = 0; g < kGroupLanes; ++g)
    for (int j = 0; j < 8; ++j) {
      const uint16_t value = uint16_t((j < 4 ? halves.first[g] : halves.second[g]) >> (16 * (j & 3)));
      result.less |= uint64_t(value < threshold) << (8 * g + j);
      result.ties |= value == threshold;
    }
  return result;
}

}  // namespace portable
}  // namespace fastreg::FASTREG_ISA
