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

// As in flush.h.
FR_INLINE Vec<float>::Mask is_positive(const Vec<float>& a) {
  Vec<float>::Mask m;
  for (int i = 0; i < a.kParts; ++i) m.part[i] = below((U32Part)a.part[i] - 1u, 0x7f800000u);
  return m;
}
FR_INLINE Vec<float>::Mask is_negative(const Vec<float>& a) {
  Vec<float>::Mask m;
  for (int i = 0; i < a.kParts; ++i) m.part[i] = below((U32Part)a.part[i] - 0x80000001u, 0x7f800000u);
  return m;
}
FR_INLINE Vec<float>::Mask is_small(const Vec<float>& a) {
  Vec<float>::Mask m;
  for (int i = 0; i < a.kParts; ++i) m.part[i] = below((U32Part)a.part[i] & 0x7fffffffu, 0x800000u);
  return m;
}
FR_INLINE Vec<double>::Mask is_positive(const Vec<double>& a) { return a > Vec<double>(0); }
FR_INLINE Vec<double>::Mask is_negative(const Vec<double>& a) { return a < Vec<double>(0); }
FR_INLINE Vec<double>::Mask is_small(const Vec<double>& a) { return a == Vec<double>(0); }

// Whether any lane is below the normal numbers, but not 0.
FR_INLINE bool any_subnormal(const Vec<float>& a) {
  Vec<float>::Mask m;
  for (int i = 0; i < a.kParts; ++i)
    m.part[i] = below(((U32Part)a.part[i] & 0x7fffffffu) - 1u, 0x7fffffu);  // 0 has become the largest number
  return any(m);
}

// x * factor for a positive factor, the same bits, where lanes of x are subnormal. Such a lane is a whole
// number of 2^-149: it is multiplied as that number, to which 2^23 is added, so that the sum rounds at 2^-149
// if the product is subnormal. The processor would take some 150 cycles for each vector.
FR_INLINE Vec<float> product_of_small(const Vec<float>& x, const Vec<float>& factor) {
  using Part = Vec<float>::Part;
  Vec<float> result;
  const Part one = 1.f - Part{}, unit = 0x1p23f - Part{};
  for (int i = 0; i < x.kParts; ++i) {
    const U32Part sign = (U32Part)x.part[i] & 0x80000000u, magnitude = (U32Part)x.part[i] & 0x7fffffffu;
    const auto small = below(magnitude, 0x800000u);
    const Part whole = (Part)(magnitude | 0x4b000000u) - unit;
    const Part count = select_part(small, whole, one);  // of 2^-149
    const Part product = count * factor.part[i];
    const U32Part subnormal = (U32Part)fma_part(count, factor.part[i], unit) - 0x4b000000u;
    const U32Part normal = (U32Part)product - (149u << 23);
    const Part scaled =
        (Part)((U32Part)select_part(less(product, unit), (Part)subnormal, (Part)normal) | sign);
    result.part[i] = select_part(small, scaled, select_part(small, one, x.part[i]) * factor.part[i]);
  }
  return result;
}

// x * factor for a positive factor, which takes no longer where x is subnormal.
template <class A>
FR_INLINE Vec<A> product(const Vec<A>& x, const Vec<A>& factor) {
  if constexpr (kFuses && std::is_same_v<A, float>)
    if (__builtin_expect(any_subnormal(x), 0)) return product_of_small(x, factor);
  return x * factor;
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

FR_INLINE Vec<float> signed_zero(const Vec<float>& a) {
  Vec<float> b;
  for (int i = 0; i < b.kParts; ++i) b.part[i] = (Vec<float>::Part)((U32Part)a.part[i] & 0x80000000u);
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
