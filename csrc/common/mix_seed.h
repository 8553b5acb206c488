// Seeds made of a seed and a count, for CPU and CUDA.
#pragma once
#include "device.h"

namespace fastreg {

// splitmix64's `count`-th number from `seed` (Steele, Lea, Flood 2014), as mix_seed in fastreg/_seeds.py.
FR_HD uint64_t mix_seed(uint64_t seed, uint64_t count) {
  uint64_t z = seed + 0x9E3779B97F4A7C15u * (count + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

}  // namespace fastreg
