// Vec<A>: 64 bytes of float or double, its arithmetic and its masks. Included by simd.h.
#pragma once
#include <cstring>

#include "device.h"

namespace fastreg::FASTREG_ISA {

template <class A>
struct Vec {
  using Scalar = A;
  using Part = typename Register<A>::Part;
  using Int = typename Register<A>::Int;
  using IntPart = typename Register<A>::IntPart;
  static constexpr int kLanes = 64 / sizeof(A), kParts = 64 / FR_VECTOR_BYTES, kPartLanes = kLanes / kParts;
  // One truth value per lane.
  struct Mask {
    MaskPart<A> part[kParts];
  };
  Part part[kParts];

  Vec() = default;
  FR_INLINE Vec(A x) {
    for (int i = 0; i < kParts; ++i) part[i] = x - Part{};
  }
#define FR_ARITHMETIC(op)                                                \
  friend FR_INLINE Vec operator op(const Vec& a, const Vec& b) {         \
    Vec c;                                                               \
    for (int i = 0; i < kParts; ++i) c.part[i] = a.part[i] op b.part[i]; \
    return c;                                                            \
  }
#define FR_COMPARISON(op, compare)                                              \
  friend FR_INLINE Mask operator op(const Vec& a, const Vec& b) {               \
    Mask c;                                                                     \
    for (int i = 0; i < kParts; ++i) c.part[i] = compare(a.part[i], b.part[i]); \
    return c;                                                                   \
  }
  // clang-format off
  FR_ARITHMETIC(+) FR_ARITHMETIC(-) FR_ARITHMETIC(*) FR_ARITHMETIC(/)
  FR_COMPARISON(<, less) FR_COMPARISON(>, greater) FR_COMPARISON(==, equal)
  // clang-format on
#undef FR_ARITHMETIC
#undef FR_COMPARISON
          friend FR_INLINE Vec select(const Mask& m, const Vec& yes, const Vec& no) {
    Vec c;
    for (int i = 0; i < kParts; ++i) c.part[i] = select_part(m.part[i], yes.part[i], no.part[i]);
    return c;
  }

  // Lane j is true where bit j is set.
  static FR_INLINE Mask from_bits(uint32_t bits) {
    Mask m;
    for (int i = 0; i < kParts; ++i) m.part[i] = mask_of_bits<A>(bits, i);
    return m;
  }
  static FR_INLINE Mask first(int count) { return from_bits((1u << count) - 1u); }

  friend FR_INLINE bool any(const Mask& m) { return any_part<A>(m.part); }

  // f of all lanes, of those at distance 8, 4, 2 and 1 in turn (half as many of float64): the same tree on
  // every instruction set.
  template <class F>
  FR_INLINE A fold(F f) const {
    constexpr int kQuarterLanes = kLanes / 4;
    typedef A Quarter __attribute__((vector_size(16)));
    Quarter quarter[4];
    memcpy(quarter, part, 64);
    const Quarter last = f(f(quarter[0], quarter[2]), f(quarter[1], quarter[3]));
    A lane[kQuarterLanes];
    memcpy(lane, &last, 16);
    for (int distance = kQuarterLanes / 2; distance > 0; distance /= 2)
      for (int j = 0; j < distance; ++j) lane[j] = f(lane[j], lane[j + distance]);
    return lane[0];
  }
  FR_INLINE A sum() const {
    return fold([](auto a, auto b) __attribute__((always_inline)) { return a + b; });
  }
  FR_INLINE A max() const {
    return fold([](auto a, auto b) __attribute__((always_inline)) { return a < b ? b : a; });
  }
};

// a * b + c with one rounding where the machine has the instruction, with two on x86-64's baseline.
template <class A>
FR_INLINE Vec<A> multiply_add(const Vec<A>& a, const Vec<A>& b, const Vec<A>& c) {
  Vec<A> d;
  for (int i = 0; i < d.kParts; ++i) d.part[i] = fma_part(a.part[i], b.part[i], c.part[i]);
  return d;
}

template <class A>
FR_INLINE Vec<A> square_root(const Vec<A>& a) {
  Vec<A> b;
  for (int i = 0; i < b.kParts; ++i) b.part[i] = root_part(a.part[i]);
  return b;
}

FR_INLINE Vec<float> magnitude(const Vec<float>& a) {
  Vec<float> b;
  for (int i = 0; i < b.kParts; ++i)
    b.part[i] = (Vec<float>::Part)((Vec<float>::IntPart)a.part[i] & 0x7fffffff);
  return b;
}

// a where a > b (a < b), else b: a NaN in a is passed over, one in b stays.
template <class A>
FR_INLINE Vec<A> maximum(const Vec<A>& a, const Vec<A>& b) {
  return select(a > b, a, b);
}
template <class A>
FR_INLINE Vec<A> minimum(const Vec<A>& a, const Vec<A>& b) {
  return select(a < b, a, b);
}
template <>
FR_INLINE Vec<float> maximum(const Vec<float>& a, const Vec<float>& b) {
  Vec<float> c;
  for (int i = 0; i < c.kParts; ++i) c.part[i] = maximum_part(a.part[i], b.part[i]);
  return c;
}
template <>
FR_INLINE Vec<float> minimum(const Vec<float>& a, const Vec<float>& b) {
  Vec<float> c;
  for (int i = 0; i < c.kParts; ++i) c.part[i] = minimum_part(a.part[i], b.part[i]);
  return c;
}

}  // namespace fastreg::FASTREG_ISA
