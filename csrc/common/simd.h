// Vectors for the CPU kernels: Vec<A> is always 64 bytes (16 floats or 8 doubles), made of as many machine
// vectors as the instruction set needs. One width everywhere means one order of every reduction, and no
// multiply and add is fused but those written as multiply_add(): an op without multiply_add() has the same
// bits on every instruction set, one with it on every set that has the instruction (all but x86-64's
// baseline). Built on the vector extensions of gcc and clang; intrinsics only where a compiler cannot see the
// instruction.
//
// Files that include this are compiled once per instruction set, with FASTREG_ISA naming the namespace.
// Everything they define lies inside it: a function outside could be merged by the linker with its twin for a
// machine that is not this one.
#pragma once
#include <cmath>

#include "device.h"
#include "philox.h"
#ifdef __SSE2__
#pragma GCC diagnostic push  // gcc 12: AVX-512 intrinsics leave a variable unset on purpose, which -Wall
                             // finds once they are inlined
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

#if defined(__AVX512F__)
#define FR_VECTOR_BYTES 64
#elif defined(__AVX2__)
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
  // One truth value per lane: bits in a register of their own with AVX-512, lanes of all ones or zeros
  // elsewhere.
#ifdef __AVX512F__
  using MaskPart = std::conditional_t<sizeof(A) == 4, __mmask16, __mmask8>;
#else
  using MaskPart = IntPart;
#endif
  struct Mask {
    MaskPart part[kParts];
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
#ifdef __AVX512F__
#define FR_COMPARISON(op, name)                                                                \
  friend FR_INLINE Mask operator op(const Vec& a, const Vec& b) {                              \
    if constexpr (sizeof(A) == 4)                                                              \
      return {{_mm512_cmp_ps_mask((__m512)a.part[0], (__m512)b.part[0], _CMP_##name##_OQ)}};   \
    else                                                                                       \
      return {{_mm512_cmp_pd_mask((__m512d)a.part[0], (__m512d)b.part[0], _CMP_##name##_OQ)}}; \
  }
#else
#define FR_COMPARISON(op, name)                                                     \
  friend FR_INLINE Mask operator op(const Vec& a, const Vec& b) {                   \
    Mask c;                                                                         \
    for (int i = 0; i < kParts; ++i) c.part[i] = (IntPart)(a.part[i] op b.part[i]); \
    return c;                                                                       \
  }
#endif
  // clang-format off
  FR_ARITHMETIC(+) FR_ARITHMETIC(-) FR_ARITHMETIC(*) FR_ARITHMETIC(/)
  FR_COMPARISON(<, LT) FR_COMPARISON(>, GT) FR_COMPARISON(==, EQ)
  // clang-format on
#undef FR_ARITHMETIC
#undef FR_COMPARISON
      friend FR_INLINE Vec select(const Mask& m, const Vec& yes, const Vec& no) {
    Vec c;
#ifdef __AVX512F__
    if constexpr (sizeof(A) == 4)
      c.part[0] = (Part)_mm512_mask_blend_ps(m.part[0], (__m512)no.part[0], (__m512)yes.part[0]);
    else
      c.part[0] = (Part)_mm512_mask_blend_pd(m.part[0], (__m512d)no.part[0], (__m512d)yes.part[0]);
#else
    for (int i = 0; i < kParts; ++i) c.part[i] = m.part[i] ? yes.part[i] : no.part[i];
#endif
    return c;
  }

  // Lanes whose bit is set, lane j by bit j.
  static FR_INLINE Mask from_bits(uint32_t bits) {
    Mask m;
#ifdef __AVX512F__
    m.part[0] = MaskPart(bits);
#else
    IntPart lane_bit;
    for (int j = 0; j < kPartLanes; ++j) lane_bit[j] = Int(1) << j;
    for (int i = 0; i < kParts; ++i) {
      const IntPart spread = Int(bits) - IntPart{};
      m.part[i] = (spread & (lane_bit << (i * kPartLanes))) != 0;
    }
#endif
    return m;
  }
  static FR_INLINE Mask first(int count) { return from_bits((1u << count) - 1u); }

  friend FR_INLINE bool any(const Mask& m) {
#ifdef __AVX512F__
    return m.part[0] != 0;
#else
    IntPart all = m.part[0];
    for (int i = 1; i < kParts; ++i) all = all | m.part[i];
    Int lane[kPartLanes], result = 0;
    memcpy(lane, &all, sizeof lane);
    for (Int l : lane) result |= l;
    return result != 0;
#endif
  }

  template <class F>
  FR_INLINE A fold(F f) const {  // pairs at distance 8, 4, 2, 1: the same tree on every instruction set
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
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#if defined(__AVX512F__)
FR_INLINE Vec<float>::Part fma_part(Vec<float>::Part a, Vec<float>::Part b, Vec<float>::Part c) {
  return _mm512_fmadd_ps(a, b, c);
}
FR_INLINE Vec<double>::Part fma_part(Vec<double>::Part a, Vec<double>::Part b, Vec<double>::Part c) {
  return _mm512_fmadd_pd(a, b, c);
}
#elif defined(__FMA__)
FR_INLINE Vec<float>::Part fma_part(Vec<float>::Part a, Vec<float>::Part b, Vec<float>::Part c) {
  return _mm256_fmadd_ps(a, b, c);
}
FR_INLINE Vec<double>::Part fma_part(Vec<double>::Part a, Vec<double>::Part b, Vec<double>::Part c) {
  return _mm256_fmadd_pd(a, b, c);
}
#else
FR_INLINE Vec<float>::Part fma_part(Vec<float>::Part a, Vec<float>::Part b, Vec<float>::Part c) {
  return vfmaq_f32(c, a, b);
}
FR_INLINE Vec<double>::Part fma_part(Vec<double>::Part a, Vec<double>::Part b, Vec<double>::Part c) {
  return vfmaq_f64(c, a, b);
}
#endif
#else
template <class Part>
FR_INLINE Part fma_part(Part a, Part b, Part c) {
  return a * b + c;
}
#endif
template <class A>
FR_INLINE Vec<A> multiply_add(const Vec<A>& a, const Vec<A>& b, const Vec<A>& c) {
  Vec<A> d;
  for (int i = 0; i < d.kParts; ++i) d.part[i] = fma_part(a.part[i], b.part[i], c.part[i]);
  return d;
}

// a where a > b (a < b), else b: a NaN in a is passed over, one in b stays. One instruction, which a compiler
// does not find behind select.
template <class A>
FR_INLINE Vec<A> maximum(const Vec<A>& a, const Vec<A>& b) {
  return select(a > b, a, b);
}
template <class A>
FR_INLINE Vec<A> minimum(const Vec<A>& a, const Vec<A>& b) {
  return select(a < b, a, b);
}
#if defined(__AVX512F__)
FR_INLINE Vec<float>::Part maximum(Vec<float>::Part a, Vec<float>::Part b) { return _mm512_max_ps(a, b); }
FR_INLINE Vec<float>::Part minimum(Vec<float>::Part a, Vec<float>::Part b) { return _mm512_min_ps(a, b); }
#elif defined(__AVX2__)
FR_INLINE Vec<float>::Part maximum(Vec<float>::Part a, Vec<float>::Part b) { return _mm256_max_ps(a, b); }
FR_INLINE Vec<float>::Part minimum(Vec<float>::Part a, Vec<float>::Part b) { return _mm256_min_ps(a, b); }
#elif defined(__SSE2__)
FR_INLINE Vec<float>::Part maximum(Vec<float>::Part a, Vec<float>::Part b) { return _mm_max_ps(a, b); }
FR_INLINE Vec<float>::Part minimum(Vec<float>::Part a, Vec<float>::Part b) { return _mm_min_ps(a, b); }
#endif
#ifdef __SSE2__
template <>
FR_INLINE Vec<float> maximum(const Vec<float>& a, const Vec<float>& b) {
  Vec<float> c;
  for (int i = 0; i < c.kParts; ++i) c.part[i] = maximum(a.part[i], b.part[i]);
  return c;
}
template <>
FR_INLINE Vec<float> minimum(const Vec<float>& a, const Vec<float>& b) {
  Vec<float> c;
  for (int i = 0; i < c.kParts; ++i) c.part[i] = minimum(a.part[i], b.part[i]);
  return c;
}
#endif

// ---- loads and stores, converting from and to the storage type; all of them unaligned
// Part by part: a memcpy of all 64 bytes goes through the stack in halves, and the load that follows waits
// for both.
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
#if defined(__AVX512F__)
    v.part[i] = (Vec<float>::Part)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    v.part[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * v.kPartLanes)));
#else
    for (int j = 0; j < v.kPartLanes; ++j) v.part[i][j] = to_float(p[i * v.kPartLanes + j]);
#endif
  }
  return v;
}
FR_INLINE void store(float* p, const Vec<float>& v) { store_parts(p, v); }
FR_INLINE void store(double* p, const Vec<double>& v) { store_parts(p, v); }
FR_INLINE void store(BFloat16* p, const Vec<float>& v) {
  U32Part rounded[Vec<float>::kParts];
  for (int i = 0; i < v.kParts; ++i) {
    const U32Part u = (U32Part)v.part[i];
    rounded[i] = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
#ifdef __AVX512F__
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v.part[i], (__m512)v.part[i], _CMP_UNORD_Q);
    rounded[i] = (U32Part)_mm512_mask_mov_epi32((__m512i)rounded[i], nan, _mm512_set1_epi32(0x7fc0));
#else
    rounded[i] = v.part[i] == v.part[i] ? rounded[i] : (0x7fc0u - U32Part{});
#endif
  }
#if FR_VECTOR_BYTES == 32  // packs by halves of 128 bits
  const __m256i packed = _mm256_packus_epi32((__m256i)rounded[0], (__m256i)rounded[1]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
#else
  for (int i = 0; i < v.kParts; ++i) {
    const U16Part raw = __builtin_convertvector(rounded[i], U16Part);
    memcpy(p + i * v.kPartLanes, &raw, sizeof raw);
  }
#endif
}
FR_INLINE void store(Half* p, const Vec<float>& v) {
  for (int i = 0; i < v.kParts; ++i) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph((__m512)v.part[i], _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i * v.kPartLanes),
                     _mm256_cvtps_ph(v.part[i], _MM_FROUND_TO_NEAREST_INT));
#else
    for (int j = 0; j < v.kPartLanes; ++j) from_float(v.part[i][j], p + i * v.kPartLanes + j);
#endif
  }
}

// ---- bfloat16 by pairs: 32 neighbours as a vector of the even ones and a vector of the odd ones. A pair is
// one 32-bit lane, so that neither side needs a permutation, for elementwise work that does not ask which
// lane is which.
struct Pairs {
  U32Part part[Vec<float>::kParts];
};
FR_INLINE void load_pairs(const BFloat16* p, Vec<float>& even, Vec<float>& odd) {
  for (int i = 0; i < Vec<float>::kParts; ++i) {
    U32Part raw;
    memcpy(&raw, p + i * FR_VECTOR_BYTES / 2, sizeof raw);
    even.part[i] = (Vec<float>::Part)(raw << 16);
    odd.part[i] = (Vec<float>::Part)(raw & 0xffff0000u);
  }
}
// Rounds; a NaN stays one if its lower half is 0, as that of every NaN is that came from bfloat16 or from
// arithmetic on it.
FR_INLINE Pairs pack_pairs(const Vec<float>& even, const Vec<float>& odd) {
  Pairs pairs;
  for (int i = 0; i < Vec<float>::kParts; ++i) {
    const U32Part e = (U32Part)even.part[i], o = (U32Part)odd.part[i];
    const U32Part low = (e + 0x7fffu + ((e >> 16) & 1u)) >> 16, high = o + 0x7fffu + ((o >> 16) & 1u);
#if FR_VECTOR_BYTES == 32
    pairs.part[i] = (U32Part)_mm256_blend_epi16((__m256i)low, (__m256i)high, 0xaa);
#else
    pairs.part[i] = low | (high & 0xffff0000u);
#endif
  }
  return pairs;
}
// Neighbour j of `yes` where bit j is set, of `no` elsewhere.
FR_INLINE Pairs select_pairs(uint32_t bits, const Pairs& yes, const Pairs& no) {
  Pairs result;
#if FR_VECTOR_BYTES == 64
  result.part[0] = (U32Part)_mm512_mask_mov_epi16((__m512i)no.part[0], bits, (__m512i)yes.part[0]);
#else
  typedef uint16_t Halves __attribute__((vector_size(FR_VECTOR_BYTES)));
  constexpr int kHalves = FR_VECTOR_BYTES / 2;
  Halves lane_bit;
  for (int j = 0; j < kHalves; ++j) lane_bit[j] = uint16_t(1u << (j % 16));
  for (int i = 0; i < Vec<float>::kParts; ++i) {
    const Halves spread = uint16_t(bits >> (i * kHalves)) - Halves{};
    result.part[i] = (U32Part)((spread & lane_bit) == lane_bit ? (Halves)yes.part[i] : (Halves)no.part[i]);
  }
#endif
  return result;
}
FR_INLINE Pairs all_pairs(BFloat16 x) {
  Pairs pairs;
  for (U32Part& part : pairs.part) part = x.bits * 0x10001u - U32Part{};
  return pairs;
}
FR_INLINE Pairs load_pairs(const BFloat16* p) {  // as they are
  Pairs pairs;
  memcpy(&pairs, p, sizeof pairs);
  return pairs;
}
FR_INLINE void store_pairs(BFloat16* p, const Pairs& pairs) { memcpy(p, &pairs, sizeof pairs); }

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

// `count` elements of p to or from a buffer of one vector, in one move of the buffer's width where the
// machine has masked moves: several narrow stores would stall the wide load that follows.
template <class T, class V>
FR_INLINE void read_first(T* buffer, const T* p, int count, V) {
#ifdef __AVX512BW__
  const __mmask16 mask = __mmask16((1u << count) - 1u);
  if constexpr (sizeof(T) == 2)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer), _mm256_maskz_loadu_epi16(mask, p));
  else if constexpr (sizeof(T) == 4)
    _mm512_storeu_ps(buffer, _mm512_maskz_loadu_ps(mask, p));
  else
    _mm512_storeu_pd(buffer, _mm512_maskz_loadu_pd(__mmask8(mask), p));
#else
#ifdef __AVX2__
  if constexpr (std::is_same_v<T, float>) {
    const auto mask = V::first(count);
    for (int i = 0; i < V::kParts; ++i)
      _mm256_storeu_ps(buffer + 8 * i, _mm256_maskload_ps(p + 8 * i, (__m256i)mask.part[i]));
    return;
  }
#endif
  memset(static_cast<void*>(buffer), 0, V::kLanes * sizeof(T));
  copy_few<V::kLanes * sizeof(T)>(buffer, p, size_t(count) * sizeof(T));
#endif
}
template <class T, class V>
FR_INLINE void write_first(T* p, const T* buffer, int count, V) {
#ifdef __AVX512BW__
  const __mmask16 mask = __mmask16((1u << count) - 1u);
  if constexpr (sizeof(T) == 2)
    _mm256_mask_storeu_epi16(p, mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(buffer)));
  else if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, mask, _mm512_loadu_ps(buffer));
  else
    _mm512_mask_storeu_pd(p, __mmask8(mask), _mm512_loadu_pd(buffer));
#else
#ifdef __AVX2__
  if constexpr (std::is_same_v<T, float>) {
    const auto mask = V::first(count);
    for (int i = 0; i < V::kParts; ++i)
      _mm256_maskstore_ps(p + 8 * i, (__m256i)mask.part[i], _mm256_loadu_ps(buffer + 8 * i));
    return;
  }
#endif
  copy_few<V::kLanes * sizeof(T)>(p, buffer, size_t(count) * sizeof(T));
#endif
}

// The first `count` lanes; the rest read as `fill` and are not written.
template <class T>
FR_INLINE auto load(const T* p, int count, typename Accumulate<T>::type fill = 0) {
  using V = Vec<typename Accumulate<T>::type>;
  if (count == V::kLanes) return load(p);
  T buffer[V::kLanes];
  read_first(buffer, p, count, V());
  return select(V::first(count), load(buffer), V(fill));
}
template <class T, class V>
FR_INLINE void store(T* p, const V& v, int count) {
  if (count == V::kLanes) return store(p, v);
  T buffer[V::kLanes];
  store(buffer, v);
  write_first(p, buffer, count, v);
}

// f(position, lanes) over [0, n): whole vectors, then the rest once.
template <class A, class F>
FR_INLINE void for_each_vector(int64_t n, F f) {
  constexpr int lanes = Vec<A>::kLanes;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) f(i, lanes);
  if (i < n) f(i, int(n - i));
}

// two(position) over [begin, end) for two whole vectors at a time, then one(position, lanes) for the rest.
template <class A, class F, class G>
FR_INLINE void for_each_two(int64_t begin, int64_t end, F two, G one) {
  constexpr int lanes = Vec<A>::kLanes;
  int64_t i = begin;
  for (; i + 2 * lanes <= end; i += 2 * lanes) two(i);
  for (; i + lanes <= end; i += lanes) one(i, lanes);
  if (i < end) one(i, int(end - i));
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

// ---- exp of x <= 0, all that a softmax needs: within 2 ulp of correctly rounded, 0 below -87.68 (where
// float32 would be subnormal), NaN kept. 2^n * P(r) with n = round(x / ln 2), r = x - n ln 2 in two pieces
// (Cody and Waite), P of degree 6, fitted to the least relative error on |r| <= ln 2 / 2. Adding `round`
// leaves n + 127 in the lowest bits of the sum, which a shift by 23 turns into 2^n; n = -127 gives the float
// 0, so that neither an upper clamp nor a mask is needed.
FR_INLINE Vec<float> exp_nonpositive(const Vec<float>& x) {
  using V = Vec<float>;
  const V round(0x1.8p23f + 127.f);
  const V y = maximum(V(-88.f), x);
  const V shifted = multiply_add(y, V(1.44269504f), round);
  const V n = shifted - round;
  const V r = multiply_add(n, V(2.12194440e-4f), multiply_add(n, V(-0.693359375f), y));
  V p(1.3814612757e-3f);
  p = multiply_add(p, r, V(8.3687100559e-3f));
  p = multiply_add(p, r, V(4.1668388993e-2f));
  p = multiply_add(p, r, V(1.6666521132e-1f));
  p = multiply_add(p, r, V(4.9999994040e-1f));
  p = multiply_add(p, r, V(1.f));
  p = multiply_add(p, r, V(1.f));
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

// ---- log of what a softmax sums up, within 2 ulp of correctly rounded (Cephes logf; libm for double)
// log(1 + x) for x in [-0.2929, 0.4142], as x - x^2 / 2 + x^3 P(x).
FR_INLINE Vec<float> log1p_reduced(const Vec<float>& x, const Vec<float>& exponent) {
  using V = Vec<float>;
  const V square = x * x;
  V p(7.0376836292e-2f);
  p = multiply_add(p, x, V(-1.1514610310e-1f));
  p = multiply_add(p, x, V(1.1676998740e-1f));
  p = multiply_add(p, x, V(-1.2420140846e-1f));
  p = multiply_add(p, x, V(1.4249322787e-1f));
  p = multiply_add(p, x, V(-1.6668057665e-1f));
  p = multiply_add(p, x, V(2.0000714765e-1f));
  p = multiply_add(p, x, V(-2.4999993993e-1f));
  p = multiply_add(p, x, V(3.3333331174e-1f));
  V y = p * x * square;
  y = multiply_add(exponent, V(-2.12194440e-4f), y);
  y = multiply_add(square, V(-0.5f), y);
  return multiply_add(exponent, V(0.693359375f), x + y);
}
FR_INLINE Vec<float> log1p_small(const Vec<float>& x) {
  return log1p_reduced(x, Vec<float>(0.f));
}  // x in [0, 0.125]
// x >= 1, finite or NaN, which stays. The exponent is taken where the mantissa is at least sqrt(1/2).
FR_INLINE Vec<float> log_from_one(const Vec<float>& x) {
  using V = Vec<float>;
  V mantissa, exponent;
  for (int i = 0; i < V::kParts; ++i) {
    const V::IntPart bits = (V::IntPart)x.part[i] - 0x3f3504f3;  // of sqrt(1/2)
    exponent.part[i] = __builtin_convertvector(bits >> 23, V::Part);
    mantissa.part[i] = (V::Part)((bits & 0x7fffff) + 0x3f3504f3);
  }
  return select(x == x, log1p_reduced(mantissa - V(1.f), exponent), x);
}
FR_INLINE Vec<double> log1p_small(const Vec<double>& x) {
  double lane[8];
  memcpy(lane, x.part, 64);
  for (double& value : lane) value = std::log1p(value);
  return load(lane);
}
FR_INLINE Vec<double> log_from_one(const Vec<double>& x) {
  double lane[8];
  memcpy(lane, x.part, 64);
  for (double& value : lane) value = std::log(value);
  return load(lane);
}

// ---- random bits in bulk
typedef uint64_t U64Part __attribute__((vector_size(FR_VECTOR_BYTES)));
constexpr int kGroupLanes = FR_VECTOR_BYTES / 8;

FR_INLINE U64Part multiply_low_halves(U64Part a,
                                      uint64_t b) {  // 32 x 32 -> 64 bits; the high halves of a are ignored
#if defined(__AVX512F__)
  return (U64Part)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(int64_t(b)));
#elif defined(__AVX2__)
  return (U64Part)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(int64_t(b)));
#elif defined(__SSE2__)
  return (U64Part)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(int64_t(b)));
#elif defined(__ARM_NEON)
  return (U64Part)vmull_u32(vmovn_u64((uint64x2_t)a), vdup_n_u32(uint32_t(b)));
#else
  return (a & 0xffffffffu) * b;
#endif
}

// philox_group(seed of the keys, group + lane, draw, purpose) of kGroupLanes groups: their first halves
// (words 0 and 1) and second ones. Counter words live in the low halves of 64-bit lanes, where the multiplier
// wants them; the high halves hold garbage that no step looks at, which saves the masks and shuffles of a
// packed layout.
struct GroupHalves {
  U64Part first, second;
};
struct PhiloxKeys {  // of every round, in vectors made once: in the loop that would cost as much as the
                     // arithmetic
  U64Part key[kPhiloxRounds][2];
  explicit FR_INLINE PhiloxKeys(uint64_t seed) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (auto& round : key) {
      round[0] = uint64_t(k0) - U64Part{};
      round[1] = uint64_t(k1) - U64Part{};
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
  }
};
FR_INLINE GroupHalves philox_groups(const PhiloxKeys& keys, uint64_t group, uint32_t draw, Purpose purpose) {
  U64Part lane;
  for (int j = 0; j < kGroupLanes; ++j) lane[j] = uint64_t(j);
  U64Part c0 = lane + group, c1 = c0 >> 32, c2 = uint64_t(draw) - U64Part{},
          c3 = uint64_t(purpose) - U64Part{};
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const U64Part p0 = multiply_low_halves(c0, kPhiloxM0), p1 = multiply_low_halves(c2, kPhiloxM1);
    c0 = (p1 >> 32) ^ c1 ^ keys.key[round][0];
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ keys.key[round][1];
    c3 = p0;
  }
  return {(c0 & 0xffffffffu) | (c1 << 32), (c2 & 0xffffffffu) | (c3 << 32)};
}

// philox_half(philox_group(seed, group + g, draw, purpose), j) -> out[8 * g + j] for g < count; out has room
// for a multiple of kGroupLanes groups.
FR_INLINE void philox_bulk(uint64_t seed, uint64_t group, int64_t count, uint32_t draw, Purpose purpose,
                           uint16_t* out) {
  const PhiloxKeys keys(seed);
  for (int64_t g = 0; g < count; g += kGroupLanes) {
    const GroupHalves halves = philox_groups(keys, group + uint64_t(g), draw, purpose);
    uint64_t both[2 * kGroupLanes];
    for (int j = 0; j < kGroupLanes; ++j) {
      both[2 * j] = halves.first[j];
      both[2 * j + 1] = halves.second[j];
    }
    memcpy(out + 8 * g, both, sizeof both);
  }
}

// For the 8 * kGroupLanes 16-bit values of such groups, in their order: bit j of `less` is value j <
// threshold; `ties` tells whether any value equals it.
struct Comparison {
  uint64_t less;
  bool ties;
};
FR_INLINE Comparison compare_groups(const GroupHalves& halves, uint16_t threshold) {
#if defined(__AVX512BW__)
  // Unpacking takes even lanes and odd lanes together; permuting first keeps the groups in order.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), t = _mm512_set1_epi16(int16_t(threshold));
  const __m512i first = _mm512_permutexvar_epi64(order, (__m512i)halves.first);
  const __m512i second = _mm512_permutexvar_epi64(order, (__m512i)halves.second);
  const __m512i low = _mm512_unpacklo_epi64(first, second), high = _mm512_unpackhi_epi64(first, second);
  const uint64_t less = uint64_t(_mm512_cmplt_epu16_mask(low, t)) | uint64_t(_mm512_cmplt_epu16_mask(high, t))
                                                                        << 32;
  return {less, (_mm512_cmpeq_epi16_mask(low, t) | _mm512_cmpeq_epi16_mask(high, t)) != 0};
#elif defined(__AVX2__)
  const __m256i flip = _mm256_set1_epi16(int16_t(0x8000));  // compares are signed
  const __m256i t = _mm256_set1_epi16(int16_t(threshold ^ 0x8000));
  const __m256i low =
      _mm256_xor_si256(_mm256_unpacklo_epi64((__m256i)halves.first, (__m256i)halves.second), flip);
  const __m256i high =
      _mm256_xor_si256(_mm256_unpackhi_epi64((__m256i)halves.first, (__m256i)halves.second), flip);
  const __m256i less = _mm256_packs_epi16(_mm256_cmpgt_epi16(t, low), _mm256_cmpgt_epi16(t, high));
  const __m256i equal = _mm256_or_si256(_mm256_cmpeq_epi16(t, low), _mm256_cmpeq_epi16(t, high));
  return {uint32_t(_mm256_movemask_epi8(less)), !_mm256_testz_si256(equal, equal)};
#elif defined(__SSE2__)
  const __m128i flip = _mm_set1_epi16(int16_t(0x8000)), t = _mm_set1_epi16(int16_t(threshold ^ 0x8000));
  const __m128i low = _mm_xor_si128(_mm_unpacklo_epi64((__m128i)halves.first, (__m128i)halves.second), flip);
  const __m128i high = _mm_xor_si128(_mm_unpackhi_epi64((__m128i)halves.first, (__m128i)halves.second), flip);
  const __m128i less = _mm_packs_epi16(_mm_cmpgt_epi16(t, low), _mm_cmpgt_epi16(t, high));
  const __m128i equal = _mm_or_si128(_mm_cmpeq_epi16(t, low), _mm_cmpeq_epi16(t, high));
  return {uint64_t(_mm_movemask_epi8(less)), _mm_movemask_epi8(equal) != 0};
#else
  Comparison result{0, false};
  for (int g = 0; g < kGroupLanes; ++g)
    for (int j = 0; j < 8; ++j) {
      const uint16_t value = uint16_t((j < 4 ? halves.first[g] : halves.second[g]) >> (16 * (j & 3)));
      result.less |= uint64_t(value < threshold) << (8 * g + j);
      result.ties |= value == threshold;
    }
  return result;
#endif
}

}  // namespace fastreg::FASTREG_ISA
