// Vectors for the CPU kernels: Vec<A> is always 64 bytes (16 floats or 8 doubles), made of as many machine vectors as the
// instruction set needs. One width everywhere means one order of every reduction: results have the same bits on every
// instruction set. Built on the vector extensions of gcc and clang; intrinsics only where a compiler cannot see the instruction.
//
// Files that include this are compiled once per instruction set, with FASTREG_ISA naming the namespace. Everything they define
// lies inside it: a function outside could be merged by the linker with its twin for a machine that is not this one.
#pragma once
#include <cmath>

#include "device.h"
#include "philox.h"
#ifdef __SSE2__
#include <immintrin.h>
#endif
#ifdef __ARM_NEON
#include <arm_neon.h>
#endif

#ifdef __AVX2__
#define FR_VECTOR_BYTES 32
#else
#define FR_VECTOR_BYTES 16
#endif
#define FR_INLINE inline __attribute__((always_inline))

namespace fastreg::FASTREG_ISA {

template <class A>
struct Vec {
  using Scalar = A;
  static constexpr int kLanes = 64 / sizeof(A), kParts = 64 / FR_VECTOR_BYTES, kPartLanes = kLanes / kParts;
  typedef A Part __attribute__((vector_size(FR_VECTOR_BYTES)));
  using Int = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef Int IntPart __attribute__((vector_size(FR_VECTOR_BYTES)));
  struct Mask {
    IntPart part[kParts];
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
#define FR_COMPARISON(op)                                                           \
  friend FR_INLINE Mask operator op(const Vec& a, const Vec& b) {                   \
    Mask c;                                                                         \
    for (int i = 0; i < kParts; ++i) c.part[i] = (IntPart)(a.part[i] op b.part[i]); \
    return c;                                                                       \
  }
  // clang-format off
  FR_ARITHMETIC(+) FR_ARITHMETIC(-) FR_ARITHMETIC(*) FR_ARITHMETIC(/)
  FR_COMPARISON(<) FR_COMPARISON(>) FR_COMPARISON(==)
  // clang-format on
#undef FR_ARITHMETIC
#undef FR_COMPARISON
      friend FR_INLINE Vec select(const Mask& m, const Vec& yes, const Vec& no) {
    Vec c;
    for (int i = 0; i < kParts; ++i) c.part[i] = m.part[i] ? yes.part[i] : no.part[i];
    return c;
  }

  // Lanes whose bit is set, lane j by bit j.
  static FR_INLINE Mask from_bits(uint32_t bits) {
    Mask m;
    IntPart lane_bit;
    for (int j = 0; j < kPartLanes; ++j) lane_bit[j] = Int(1) << j;
    for (int i = 0; i < kParts; ++i) {
      const IntPart spread = Int(bits >> (i * kPartLanes)) - IntPart{};
      m.part[i] = (spread & lane_bit) == lane_bit;
    }
    return m;
  }
  static FR_INLINE Mask first(int count) { return from_bits((1u << count) - 1u); }

  template <class F>
  FR_INLINE A fold(F f) const {  // pairs at distance 8, 4, 2, 1: the same tree on every instruction set
    Part half[kParts];
    memcpy(half, part, 64);
    for (int n = kParts / 2; n > 0; n /= 2)
      for (int i = 0; i < n; ++i) half[i] = f(half[i], half[i + n]);
    A lane[kPartLanes];
    memcpy(lane, half, FR_VECTOR_BYTES);
    for (int distance = kPartLanes / 2; distance > 0; distance /= 2)
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

// ---- loads and stores, converting from and to the storage type; all of them unaligned
// Part by part: a memcpy of all 64 bytes goes through the stack in halves, and the load that follows waits for both.
template <class A>
FR_INLINE Vec<A> load_parts(const A* p) {
  Vec<A> v;
  for (int i = 0; i < v.kParts; ++i) memcpy(&v.part[i], p + i * v.kPartLanes, FR_VECTOR_BYTES);
  return v;
}
template <class A>
FR_INLINE void store_parts(A* p, const Vec<A>& v) {
  for (int i = 0; i < v.kParts; ++i) memcpy(p + i * v.kPartLanes, &v.part[i], FR_VECTOR_BYTES);
}
FR_INLINE Vec<float> load(const float* p) { return load_parts(p); }
FR_INLINE Vec<double> load(const double* p) { return load_parts(p); }
typedef uint16_t U16Part __attribute__((vector_size(FR_VECTOR_BYTES / 2)));
typedef uint32_t U32Part __attribute__((vector_size(FR_VECTOR_BYTES)));

FR_INLINE Vec<float> load(const BFloat16* p) {
  Vec<float> v;
  for (int i = 0; i < v.kParts; ++i) {
    U16Part raw;
    memcpy(&raw, p + i * v.kPartLanes, sizeof raw);
    v.part[i] = (Vec<float>::Part)(__builtin_convertvector(raw, U32Part) << 16);
  }
  return v;
}
FR_INLINE Vec<float> load(const Half* p) {
  Vec<float> v;
  for (int i = 0; i < v.kParts; ++i) {
#ifdef __F16C__
    v.part[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * v.kPartLanes)));
#else
    for (int j = 0; j < v.kPartLanes; ++j) v.part[i][j] = to_float(p[i * v.kPartLanes + j]);
#endif
  }
  return v;
}
FR_INLINE void store(float* p, const Vec<float>& v) { store_parts(p, v); }
FR_INLINE void store(double* p, const Vec<double>& v) { store_parts(p, v); }
FR_INLINE void store_bfloat16_bits(BFloat16* p, int part, U32Part rounded) {
#ifdef __AVX2__
  const __m256i packed = _mm256_packus_epi32((__m256i)rounded, (__m256i)rounded);
  const __m128i raw = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  const U16Part raw = __builtin_convertvector(rounded, U16Part);
#endif
  memcpy(p + part * Vec<float>::kPartLanes, &raw, sizeof raw);
}
FR_INLINE void store(BFloat16* p, const Vec<float>& v) {
  for (int i = 0; i < v.kParts; ++i) {
    const U32Part u = (U32Part)v.part[i];
    U32Part rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    rounded = v.part[i] == v.part[i] ? rounded : (0x7fc0u - U32Part{});
    store_bfloat16_bits(p, i, rounded);
  }
}
FR_INLINE void store(Half* p, const Vec<float>& v) {
  for (int i = 0; i < v.kParts; ++i) {
#ifdef __F16C__
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i * v.kPartLanes), _mm256_cvtps_ph(v.part[i], _MM_FROUND_TO_NEAREST_INT));
#else
    for (int j = 0; j < v.kPartLanes; ++j) from_float(v.part[i][j], p + i * v.kPartLanes + j);
#endif
  }
}

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

// The first `count` lanes; the rest read as `fill` and are not written.
template <class T>
FR_INLINE auto load(const T* p, int count, typename Accumulate<T>::type fill = 0) {
  using V = Vec<typename Accumulate<T>::type>;
  if (count == V::kLanes) return load(p);
  T buffer[V::kLanes] = {};
  copy_few<sizeof buffer>(buffer, p, size_t(count) * sizeof(T));
  return select(V::first(count), load(buffer), V(fill));
}
template <class T, class V>
FR_INLINE void store(T* p, const V& v, int count) {
  if (count == V::kLanes) return store(p, v);
  T buffer[V::kLanes];
  store(buffer, v);
  copy_few<sizeof buffer>(p, buffer, size_t(count) * sizeof(T));
}

// f(position, lanes) over [0, n): whole vectors, then the rest once.
template <class A, class F>
FR_INLINE void for_each_vector(int64_t n, F f) {
  constexpr int lanes = Vec<A>::kLanes;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) f(i, lanes);
  if (i < n) f(i, int(n - i));
}

// ---- strided tensors pass through a tile: read it here, compute on contiguous memory, write it back
constexpr int64_t kTile = 1024;

template <class T>
FR_INLINE const T* read_tile(const Layout& layout, const T* base, int64_t begin, int64_t end, T* tile) {
  if (layout.contiguous) return base + begin;
  for_each_run(layout, begin, end, [&](int64_t position, int64_t offset, int64_t stride, int64_t count) {
    for (int64_t j = 0; j < count; ++j) tile[position - begin + j] = base[offset + j * stride];
  });
  return tile;
}
template <class T>
FR_INLINE T* tile_to_write(const Layout& layout, T* base, int64_t begin, T* tile) {
  return layout.contiguous ? base + begin : tile;
}
template <class T>
FR_INLINE void write_tile(const Layout& layout, T* base, int64_t begin, int64_t end, const T* tile) {
  if (layout.contiguous) return;
  for_each_run(layout, begin, end, [&](int64_t position, int64_t offset, int64_t stride, int64_t count) {
    for (int64_t j = 0; j < count; ++j) base[offset + j * stride] = tile[position - begin + j];
  });
}

// a where a > b, else b: a NaN in a is passed over. One instruction, which a compiler does not find behind select.
template <class A>
FR_INLINE Vec<A> maximum(const Vec<A>& a, const Vec<A>& b) {
  return select(a > b, a, b);
}
template <>
FR_INLINE Vec<float> maximum(const Vec<float>& a, const Vec<float>& b) {
#if defined(__SSE2__)
  Vec<float> c;
  for (int i = 0; i < c.kParts; ++i) {
#if defined(__AVX2__)
    c.part[i] = _mm256_max_ps(a.part[i], b.part[i]);
#else
    c.part[i] = _mm_max_ps(a.part[i], b.part[i]);
#endif
  }
  return c;
#else
  return select(a > b, a, b);
#endif
}

// ---- exp of x <= 0, all that a softmax needs: within 2 ulp of correctly rounded, 0 below -87.68 (where float32 would be
// subnormal), NaN kept.
// 2^n * P(r) with n = round(x / ln 2), r = x - n ln 2 in two pieces (Cody and Waite), P of degree 7 (Cephes expf). Adding `round`
// leaves n + 127 in the lowest bits of the sum, which a shift by 23 turns into 2^n; n = -127 gives the float 0, so that neither
// an upper clamp nor a mask is needed.
FR_INLINE Vec<float> exp_nonpositive(const Vec<float>& x) {
  using V = Vec<float>;
  const V round(0x1.8p23f + 127.f);
  const V y = maximum(V(-88.f), x);
  const V shifted = y * V(1.44269504f) + round;
  const V n = shifted - round;
  const V r = (y - n * V(0.693359375f)) - n * V(-2.12194440e-4f);
  V p(1.9875691500e-4f);
  p = p * r + V(1.3981999507e-3f);
  p = p * r + V(8.3334519073e-3f);
  p = p * r + V(4.1665795894e-2f);
  p = p * r + V(1.6666665459e-1f);
  p = p * r + V(5.0000001201e-1f);
  p = p * (r * r) + r + V(1.f);
  V result;
  for (int i = 0; i < V::kParts; ++i) result.part[i] = p.part[i] * (V::Part)((U32Part)shifted.part[i] << 23);
  return result;
}
FR_INLINE Vec<double> exp_nonpositive(const Vec<double>& x) {
  double lane[8];
  memcpy(lane, x.part, 64);
  for (double& value : lane) value = std::exp(value);
  return load(lane);
}

// ---- random bits in bulk
typedef uint64_t U64Part __attribute__((vector_size(FR_VECTOR_BYTES)));
constexpr int kGroupLanes = FR_VECTOR_BYTES / 8;

FR_INLINE U64Part multiply_low_halves(U64Part a, uint64_t b) {  // 32 x 32 -> 64 bits; the high halves of a are ignored
#if defined(__AVX2__)
  return (U64Part)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(int64_t(b)));
#elif defined(__SSE2__)
  return (U64Part)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(int64_t(b)));
#elif defined(__ARM_NEON)
  return (U64Part)vmull_u32(vmovn_u64((uint64x2_t)a), vdup_n_u32(uint32_t(b)));
#else
  return (a & 0xffffffffu) * b;
#endif
}

// philox_half(philox_group(seed, group + g, draw, purpose), j) -> out[8 * g + j] for g < count; out has room for a multiple of
// kGroupLanes groups. Counter words live in the low halves of 64-bit lanes, where the multiplier wants them; the high halves
// hold garbage that no step looks at, which saves the masks and shuffles of a packed layout.
FR_INLINE void philox_bulk(uint64_t seed, uint64_t group, int64_t count, uint32_t draw, Purpose purpose, uint16_t* out) {
  U64Part lane;
  for (int j = 0; j < kGroupLanes; ++j) lane[j] = uint64_t(j);
  for (int64_t g = 0; g < count; g += kGroupLanes) {
    U64Part c0 = lane + (group + uint64_t(g)), c1 = c0 >> 32, c2 = uint64_t(draw) - U64Part{}, c3 = uint64_t(purpose) - U64Part{};
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const U64Part p0 = multiply_low_halves(c0, kPhiloxM0), p1 = multiply_low_halves(c2, kPhiloxM1);
      c0 = (p1 >> 32) ^ c1 ^ uint64_t(k0);
      c1 = p1;
      c2 = (p0 >> 32) ^ c3 ^ uint64_t(k1);
      c3 = p0;
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    const U64Part first = (c0 & 0xffffffffu) | (c1 << 32), second = (c2 & 0xffffffffu) | (c3 << 32);
    uint64_t a[kGroupLanes], b[kGroupLanes], both[2 * kGroupLanes];
    memcpy(a, &first, sizeof a);
    memcpy(b, &second, sizeof b);
    for (int j = 0; j < kGroupLanes; ++j) {
      both[2 * j] = a[j];
      both[2 * j + 1] = b[j];
    }
    memcpy(out + 8 * g, both, sizeof both);
  }
}

// For 32 values: bit j of `less` is value[j] < threshold, bit j of `equal` is value[j] == threshold.
struct Comparison {
  uint32_t less, equal;
};
FR_INLINE Comparison compare32(const uint16_t* value, uint16_t threshold) {
#if defined(__SSE2__)
  const __m128i flip = _mm_set1_epi16(int16_t(0x8000)), t = _mm_set1_epi16(int16_t(threshold ^ 0x8000));  // compares are signed
  Comparison result{0, 0};
  for (int i = 0; i < 2; ++i) {
    const __m128i* p = reinterpret_cast<const __m128i*>(value) + 2 * i;
    const __m128i a = _mm_xor_si128(_mm_loadu_si128(p), flip), b = _mm_xor_si128(_mm_loadu_si128(p + 1), flip);
    const __m128i less = _mm_packs_epi16(_mm_cmpgt_epi16(t, a), _mm_cmpgt_epi16(t, b));
    const __m128i equal = _mm_packs_epi16(_mm_cmpeq_epi16(t, a), _mm_cmpeq_epi16(t, b));
    result.less |= uint32_t(_mm_movemask_epi8(less)) << (16 * i);
    result.equal |= uint32_t(_mm_movemask_epi8(equal)) << (16 * i);
  }
  return result;
#else
  Comparison result{0, 0};
  for (int j = 0; j < 32; ++j) {
    result.less |= uint32_t(value[j] < threshold) << j;
    result.equal |= uint32_t(value[j] == threshold) << j;
  }
  return result;
#endif
}

// Calls f with a null pointer of the storage type: how a kernel meets the dtype of its tensors.
template <class F>
FR_INLINE void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kFloat64:
      return f(static_cast<double*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Half*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
  }
}

}  // namespace fastreg::FASTREG_ISA
