// Decisions of dropout in bulk on the CPU, for every kernel that drops: bit i of what is drawn tells whether
// decision `first` + i is kept. Where they come from stands in dropout_math.h.
#pragma once
#include "../common/simd.h"
#include "dropout_math.h"

namespace fastreg::FASTREG_ISA {

// Mask bytes of `count` groups from `group` on, counted globally.
FR_INLINE void draw_groups(uint64_t seed, uint64_t threshold, uint64_t group, int64_t count, uint8_t* out) {
  if (threshold == 0 || threshold >> 32) {
    memset(out, threshold ? 0xff : 0, size_t(count));
    return;
  }
  const PhiloxKeys keys(seed);
  const bool exact = (threshold & 0xffff) == 0;  // 16 bits decide all
  for (int64_t g = 0; g < count; g += kGroupLanes) {
    const uint64_t at = group + uint64_t(g);
    const Comparison c =
        compare_groups(philox_groups(keys, at, 0, Purpose::kDropout), uint16_t(threshold >> 16));
    uint8_t bytes[8];
    memcpy(bytes, &c.less, 8);
    if (c.ties && !exact)
      for (int j = 0; j < kGroupLanes; ++j) bytes[j] = dropout_bits(seed, at + uint64_t(j), threshold);
    if (count - g >= kGroupLanes)
      memcpy(out + g, bytes, kGroupLanes);
    else
      memcpy(out + g, bytes, size_t(count - g));
  }
}

// `count` mask bytes, at most kBlock, from decision `first` on. Where that is not a multiple of 8, a byte
// holds decisions of two groups.
FR_INLINE void draw_bytes(uint64_t seed, uint64_t threshold, uint64_t first, int64_t count, uint8_t* out) {
  const unsigned shift = unsigned(first % 8);
  if (shift == 0) return draw_groups(seed, threshold, first / 8, count, out);
  uint8_t bytes[kBlock + 1];
  draw_groups(seed, threshold, first / 8, count + 1, bytes);
  for (int64_t i = 0; i < count; ++i) out[i] = uint8_t(bytes[i] >> shift | bytes[i + 1] << (8 - shift));
}

}  // namespace fastreg::FASTREG_ISA
