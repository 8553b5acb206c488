// What the steps of the optimisers share on the CPU: stores that round at random, and the walk over the
// blocks of strided tensors. The update itself stands in <op>_cpu.cpp.
#pragma once
#include "optimizer_math.h"
#include "simd.h"

namespace fastreg::FASTREG_ISA {

// Prefetches what a loop over all slots reads some cache lines later. The processor does so by itself, but
// not beyond the end of a page, which is 1024 float32. The beginning of a tensor is prefetched by
// fetch_beginning in optimizer_op.h, while the tensor before it is stepped.
template <class T>
FR_INLINE void fetch_ahead(T* const* slots, int64_t i, int64_t count) {
  i += kAhead / int64_t(sizeof(T));
  if (i >= count) return;
  for (int s = 0; s < kSlots; ++s)
    if (slots[s]) __builtin_prefetch(slots[s] + i);
}

// ---- stochastic rounding. bfloat16 keeps the upper half of a float32: adding 16 random bits to the lower
// half and cutting it off rounds up with the probability of the remainder, so that the expected value is
// exact (Gupta et al. 2015). Element i of the whole takes value i % 8 of group i / 8, in the draw of its
// tensor and under the seed of the step; a NaN or infinity passes unchanged. Without random bits all of this
// rounds to nearest.

template <class T, class V>
FR_INLINE void store_rounded(T* out, const V& v, int lanes, const uint16_t* random) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (random) {
      float lane[16];
      store(lane, v);
      for (int j = 0; j < lanes; ++j) {
        const uint32_t u = float_bits(lane[j]);
        if ((u & 0x7f800000u) == 0x7f800000u)
          from_float(lane[j], out + j);
        else
          out[j].bits = uint16_t((u + random[j]) >> 16);
      }
      return;
    }
  }
  store(out, v, lanes);
}

// The same rounding, of pairs of bfloat16.
FR_INLINE void store_rounded(BFloat16* out, const Vec<float>& even, const Vec<float>& odd,
                             const uint16_t* random) {
  if (!random) return store_pairs(out, pack_pairs(even, odd));
  Pairs pairs;
  for (int i = 0; i < Vec<float>::kParts; ++i) {
    U32Part r;
    memcpy(&r, random + i * FR_VECTOR_BYTES / 2, sizeof r);
    const U32Part e = (U32Part)even.part[i], o = (U32Part)odd.part[i], exponent = 0x7f800000u - U32Part{};
    const U32Part low = (e + ((e & exponent) == exponent ? U32Part{} : r & 0xffffu)) >> 16;
    const U32Part high = o + ((o & exponent) == exponent ? U32Part{} : r >> 16);
    pairs.part[i] = low | (high & 0xffff0000u);
  }
  store_pairs(out, pairs);
}

// The random bits of elements [begin, end) of a tensor, at most a block, in or behind the beginning of `out`.
constexpr int64_t kBits = kBlock + 64;
inline const uint16_t* random_bits(uint64_t seed, const StepTensor& t, int64_t begin, int64_t end,
                                   uint16_t* out) {
  const auto neighbours = [&](int64_t index, int64_t count, uint16_t* to) {
    philox_bulk(seed, uint64_t(index) / 8, (index % 8 + count + 7) / 8, t.draw, Purpose::kStochasticRounding,
                to);
    return to + index % 8;
  };
  if (t.columns >= t.layout[kParam].numel) return neighbours(t.first + begin, end - begin, out);
  uint16_t row[kBits];
  for (int64_t i = begin; i < end;) {
    const int64_t column = i % t.columns, rest = t.columns - column;
    const int64_t count = end - i < rest ? end - i : rest;
    const uint16_t* const bits = neighbours(t.first + i / t.columns * t.row + column, count, row);
    memcpy(out + (i - begin), bits, size_t(count) * sizeof *bits);
    i += count;
  }
  return out;
}

// ---- blocks

// Calls vectors(slots, count, random bits or null) for contiguous pieces of elements [begin, end), where
// slots[s] is the memory of slot s, or null.
template <class T, class Vectors>
FR_INLINE void step_blocks(const StepArgs& a, const StepTensor& t, int64_t begin, int64_t end,
                           Vectors vectors) {
  const bool stochastic = std::is_same_v<T, BFloat16> && a.stochastic_rounding;
  T buffer[kSlots][kBlock];
  uint16_t random[kBits];
  const uint64_t seed = stochastic ? seed_of_step(a.seed, steps_done(t.counter, t.step)) : 0;
  bool in_place = !stochastic;
  for (int s = 0; s < kSlots; ++s) in_place = in_place && (!t.data[s] || t.layout[s].contiguous);
  const int64_t block_size = in_place ? end - begin : kBlock;  // without buffers, one block
  for (int64_t block = begin; block < end; block += block_size) {
    const int64_t next = end - block < block_size ? end : block + block_size;
    T* slots[kSlots];
    for (int s = 0; s < kSlots; ++s)
      slots[s] = !t.data[s] ? nullptr
                            : const_cast<T*>(read_block(t.layout[s], static_cast<const T*>(t.data[s]), block,
                                                        next, buffer[s]));
    vectors(slots, next - block, stochastic ? random_bits(seed, t, block, next, random) : nullptr);
    for (int s = 0; s < kSlots; ++s)
      if (s != kGrad && t.data[s])
        write_block(t.layout[s], static_cast<T*>(t.data[s]), block, next, slots[s]);
  }
}

}  // namespace fastreg::FASTREG_ISA
