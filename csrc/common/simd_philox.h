// Random bits in bulk: Philox of several groups at once, the same bits as philox_group gives for each
// (philox.h). Included by simd.h. tests/native/dropout_test.cpp and sgd_test.cpp test it through the kernels,
// against Philox written anew from its paper.
#pragma once
#include "philox.h"
#include "simd_vector.h"

namespace fastreg::FASTREG_ISA {

// The keys of every round, in vectors made once: in the loop that would cost as much as the arithmetic.
struct PhiloxKeys {
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

// philox_group(seed of the keys, group + lane, draw, purpose) of kGroupLanes groups. The words of a counter
// live in the low halves of 64-bit lanes, where the multiplier wants them. The high halves hold garbage that
// no step looks at, which saves the masks and shuffles of a packed layout.
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

}  // namespace fastreg::FASTREG_ISA
