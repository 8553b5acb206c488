// Loads and stores of a Vec in every storage type, whole or of its first lanes, loops over vectors, and
// strided tensors block by block. Every address may be unaligned. Included by simd.h.
#pragma once
#include "simd_vector.h"

namespace fastreg::FASTREG_ISA {

// ---- whole vectors

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
FR_INLINE Vec<float> load(const BFloat16* p) {
  Vec<float> v;
  for (int i = 0; i < v.kParts; ++i) {
    U16Part raw;
    memcpy(&raw, p + i * v.kPartLanes, sizeof raw);
    v.part[i] = (F32Part)(__builtin_convertvector(raw, U32Part) << 16);
  }
  return v;
}
FR_INLINE Vec<float> load(const Half* p) {
  Vec<float> v;
  for (int i = 0; i < v.kParts; ++i) v.part[i] = load_half(p + i * v.kPartLanes);
  return v;
}
FR_INLINE void store(float* p, const Vec<float>& v) { store_parts(p, v); }
FR_INLINE void store(double* p, const Vec<double>& v) { store_parts(p, v); }
FR_INLINE void store(BFloat16* p, const Vec<float>& v) {
  U32Part rounded[Vec<float>::kParts];
  for (int i = 0; i < v.kParts; ++i) rounded[i] = round_bfloat16(v.part[i]);
  store_low_halves(p, rounded);
}
FR_INLINE void store(Half* p, const Vec<float>& v) {
  for (int i = 0; i < v.kParts; ++i) store_half(p + i * v.kPartLanes, v.part[i]);
}

// ---- bfloat16 in pairs: 32 neighbours as a vector of the even ones and a vector of the odd ones. A pair is
// one 32-bit lane, so that neither side needs a permutation. It serves elementwise work, which does not ask
// which lane is which.

struct Pairs {
  U32Part part[Vec<float>::kParts];
};
FR_INLINE void load_pairs(const BFloat16* p, Vec<float>& even, Vec<float>& odd) {
  for (int i = 0; i < Vec<float>::kParts; ++i) {
    U32Part raw;
    memcpy(&raw, p + i * FR_VECTOR_BYTES / 2, sizeof raw);
    even.part[i] = (F32Part)(raw << 16);
    odd.part[i] = (F32Part)(raw & 0xffff0000u);
  }
}
// Rounds to nearest. A NaN stays one if its lower half is 0, as it is in every NaN that comes from bfloat16
// or from arithmetic on it.
FR_INLINE Pairs pack_pairs(const Vec<float>& even, const Vec<float>& odd) {
  Pairs pairs;
  for (int i = 0; i < Vec<float>::kParts; ++i) {
    const U32Part e = (U32Part)even.part[i], o = (U32Part)odd.part[i];
    const U32Part low = (e + 0x7fffu + ((e >> 16) & 1u)) >> 16, high = o + 0x7fffu + ((o >> 16) & 1u);
    pairs.part[i] = join_halves(low, high);
  }
  return pairs;
}
// Neighbour j of `yes` where bit j is set, of `no` elsewhere.
FR_INLINE Pairs select_pairs(uint32_t bits, const Pairs& yes, const Pairs& no) {
  Pairs result;
  for (int i = 0; i < Vec<float>::kParts; ++i)
    result.part[i] = select_halves(bits, i, yes.part[i], no.part[i]);
  return result;
}
FR_INLINE Pairs all_pairs(BFloat16 x) {
  Pairs pairs;
  for (U32Part& part : pairs.part) part = x.bits * 0x10001u - U32Part{};
  return pairs;
}
FR_INLINE Pairs load_pairs(const BFloat16* p) {  // as they are
  Pairs pairs;
  for (int i = 0; i < Vec<float>::kParts; ++i)
    memcpy(&pairs.part[i], p + i * FR_VECTOR_BYTES / 2, FR_VECTOR_BYTES);
  return pairs;
}
FR_INLINE void store_pairs(BFloat16* p, const Pairs& pairs) {  // part by part, as above
  for (int i = 0; i < Vec<float>::kParts; ++i)
    memcpy(p + i * FR_VECTOR_BYTES / 2, &pairs.part[i], FR_VECTOR_BYTES);
}

// ---- the first `count` lanes; the rest read as `fill` and are not written

template <class T>
FR_INLINE auto load(const T* p, int count, typename Accumulate<T>::type fill = 0) {
  using V = Vec<typename Accumulate<T>::type>;
  if (count == V::kLanes) return load(p);
  T buffer[V::kLanes];
  read_first<V::kLanes>(buffer, p, count);
  return select(V::first(count), load(buffer), V(fill));
}
template <class T, class V>
FR_INLINE void store(T* p, const V& v, int count) {
  if (count == V::kLanes) return store(p, v);
  T buffer[V::kLanes];
  store(buffer, v);
  write_first<V::kLanes>(p, buffer, count);
}

// ---- loops

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

// ---- blocks: strided tensors pass through a buffer. A kernel reads a block into it, computes on contiguous
// memory and writes the block back; what is contiguous already is used where it lies.

constexpr int64_t kBlock = 1024;  // elements: some buffers of float64 fit in the L1 cache

template <class T>
FR_INLINE const T* read_block(const Layout& layout, const T* base, int64_t begin, int64_t end, T* buffer) {
  if (layout.contiguous) return base + begin;
  for_each_run(layout, begin, end, [&](int64_t position, int64_t offset, int64_t stride, int64_t count) {
    for (int64_t j = 0; j < count; ++j) buffer[position - begin + j] = base[offset + j * stride];
  });
  return buffer;
}
// Where the result of a block is to be computed, before write_block.
template <class T>
FR_INLINE T* block_to_write(const Layout& layout, T* base, int64_t begin, T* buffer) {
  return layout.contiguous ? base + begin : buffer;
}
template <class T>
FR_INLINE void write_block(const Layout& layout, T* base, int64_t begin, int64_t end, const T* buffer) {
  if (layout.contiguous) return;
  for_each_run(layout, begin, end, [&](int64_t position, int64_t offset, int64_t stride, int64_t count) {
    for (int64_t j = 0; j < count; ++j) base[offset + j * stride] = buffer[position - begin + j];
  });
}

}  // namespace fastreg::FASTREG_ISA
