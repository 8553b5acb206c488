// Philox4x32-10, a counter-based generator: 128 random bits, a group of four words, from a 128-bit counter
// and a 64-bit key, with no state. Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3.
// SC 2011.
//
// In fastreg the key is the seed and the counter is (group: 64 bits, draw: 32 bits, purpose: 32 bits). What
// an element draws depends on the seed and its own index, on nothing else.
//
// Limits: any seed; 2^64 groups, which serve 2^67 elements with 16 bits each; 2^32 draws. The bits are exact.
// tests/native/common_test.cpp tests them against the known answers of Random123.
#pragma once
#include "device.h"

namespace fastreg {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u, kPhiloxW0 = 0x9E3779B9u,
                   kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// Two uses of one seed must not see the same bits, so that each use has a number of its own.
enum class Purpose : uint32_t { kDropout = 0, kStochasticRounding = 1, kAugment = 2 };

// The seed of a call: a value, or where one lies in the memory of the device, so that a replayed CUDA graph
// reads the seed of that replay, and no launch waits for the host.
struct Seed {
  uint64_t value;
  const uint64_t* at;  // null: value
  FR_HD uint64_t get() const { return at ? *at : value; }
};

struct PhiloxWords {
  uint32_t word[4];
};

FR_HD PhiloxWords philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t(kPhiloxM0) * c0, p1 = uint64_t(kPhiloxM1) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// The eight 16-bit values of a group, element j of the group taking value j: low half of word 0, high half of
// word 0, ...
FR_HD uint16_t philox_half(const PhiloxWords& words, int j) {
  return uint16_t(words.word[j >> 1] >> (16 * (j & 1)));
}

FR_HD PhiloxWords philox_group(uint64_t seed, uint64_t group, uint32_t draw, Purpose purpose) {
  return philox4x32(uint32_t(group), uint32_t(group >> 32), draw, uint32_t(purpose), uint32_t(seed),
                    uint32_t(seed >> 32));
}

}  // namespace fastreg
