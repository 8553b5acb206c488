// Dropout: y = kept ? scale * x + shift : dropped, kept with probability 1 - p.
//
//   inverted dropout (Srivastava et al. 2014, torch's)   scale 1 / (1 - p), shift 0, dropped 0
//   textbook dropout (Goodfellow et al. 2016, 7.12)      scale 1; later, weights are multiplied by 1 - p
//   alpha dropout (Klambauer et al. 2017)                keeps mean and variance of a SELU's output
//
// and, in one pass, what a residual block does with it: y = kept ? scale * (x + bias) + residual : residual.
//
// One decision may cover `inner` neighbouring elements: a channel (dropout2d) or a sample (drop_path).
// Decision i is made by 16 bits of Philox group i / 8. Those leave one in 65,536 open, which 16 further bits
// settle, so that P(kept) = threshold / 2^32 exactly. The mask holds one bit per decision: bit i % 8 of byte
// i / 8, 1 = kept.
#pragma once
#include "../common/device.h"
#include "../common/isa.h"
#include "../common/philox.h"

namespace fastreg {

struct DropoutArgs {
  DType dtype;
  const void* input;
  void* output;
  uint8_t* mask;
  Layout input_layout, output_layout;
  int64_t decisions, inner;  // numel == decisions * inner
  Seed seed;
  uint64_t offset;     // global index of the first decision
  uint64_t threshold;  // kept if 32 random bits are below it, 0 ... 2^32
  double scale, shift, dropped;
};

// Here inner is 1, and shift and dropped are not looked at.
struct DropoutAddArgs : DropoutArgs {
  const void* residual;
  Layout residual_layout;
  const void* bias;  // or null; contiguous, bias[i % columns] belongs to element i
  int64_t columns;
};

FR_HD uint64_t dropout_threshold(double p) { return uint64_t((1. - p) * 0x1p32 + 0.5); }

// A mask alone, of decisions that are rows of a larger tensor's, as a part of a sharded tensor has them:
// decision i is number first + i / columns * row + i % columns there.
struct DropoutMaskArgs {
  uint8_t* mask;
  int64_t decisions, columns, row;
  Seed seed;
  uint64_t first, threshold;
};

// The mask byte of decisions [8 * group, 8 * group + 8), counted globally.
FR_HD uint8_t dropout_bits(uint64_t seed, uint64_t group, uint64_t threshold) {
  if (threshold >> 32) return 0xff;
  const PhiloxWords high = philox_group(seed, group, 0, Purpose::kDropout);
  const uint32_t upper = uint32_t(threshold >> 16), lower = uint32_t(threshold & 0xffff),
                 both = upper << 16 | upper;
  // `ties` is not zero where one of the eight values is `upper`: the usual search for a zero in a word.
  uint32_t bits = 0, ties = 0;
  for (int w = 0; w < 4; ++w) {
    const uint32_t two = high.word[w], difference = two ^ both;
    bits |= uint32_t(two << 16 < upper << 16) << (2 * w);
    bits |= uint32_t(two < upper << 16) << (2 * w + 1);
    ties |= (difference - 0x00010001u) & ~difference & 0x80008000u;
  }
  if (ties && lower) {
    const PhiloxWords low = philox_group(seed, group, 1, Purpose::kDropout);
    for (int j = 0; j < 8; ++j)
      bits |= uint32_t(philox_half(high, j) == upper && philox_half(low, j) < lower) << j;
  }
  return uint8_t(bits);
}

// The same for decisions [first, first + 8), which lie in two groups where `first` is not a multiple of 8.
FR_HD uint8_t dropout_bits_from(uint64_t seed, uint64_t first, uint64_t threshold) {
  const uint32_t bits = dropout_bits(seed, first / 8, threshold);
  const unsigned skip = unsigned(first % 8);
  if (!skip) return uint8_t(bits);
  return uint8_t(bits >> skip | uint32_t(dropout_bits(seed, first / 8 + 1, threshold)) << (8 - skip));
}

// The part of decisions [i, i + most) that lies in one row: where it begins in the whole, and how many they
// are.
struct DropoutPiece {
  uint64_t at;
  int64_t count;
};
FR_HD DropoutPiece dropout_piece(const DropoutMaskArgs& a, int64_t i, int64_t most) {
  const int64_t row = i / a.columns, column = i - row * a.columns, rest = a.columns - column;
  return {a.first + uint64_t(row) * uint64_t(a.row) + uint64_t(column), rest < most ? rest : most};
}

// Of numbers, as a GPU has them, where subnormal ones take no longer. simd_vector.h has that of vectors.
template <class A>
FR_HD A product(A x, A factor) {
  return x * factor;
}

template <bool kShift, class V, class M>
FR_HD V dropout_element(V x, M kept, V scale, V shift, V dropped) {
  if (kShift) return select(kept, product(x, scale) + shift, dropped);
  return select(kept, product(x, scale), dropped);  // not x * scale + 0, which would turn -0 into 0
}

template <class V, class M>
FR_HD V dropout_add_element(V x, M kept, V scale, V residual) {
  return select(kept, product(x, scale) + residual, residual);
}

struct DropoutKernels {
  void (*draw)(const DropoutArgs&, int64_t begin, int64_t end);   // mask bytes [begin, end)
  void (*apply)(const DropoutArgs&, int64_t begin, int64_t end);  // elements [begin, end) by the mask
  // Both draw and apply, for inner == 1, elements [begin, end); begin is a multiple of 8.
  void (*forward)(const DropoutArgs&, int64_t begin, int64_t end);
  void (*add)(const DropoutAddArgs&, int64_t begin, int64_t end);
  void (*mask)(const DropoutMaskArgs&, int64_t begin, int64_t end);  // mask bytes [begin, end)
};
FR_DECLARE_KERNELS(DropoutKernels, dropout_kernels)

// On a CUDA stream, in dropout_cuda.cu; each gives a cudaError_t.
int dropout_forward_cuda(const DropoutArgs&, void* stream);  // draws the mask and applies it
int dropout_apply_cuda(const DropoutArgs&, void* stream);    // applies a mask that is there
int dropout_add_cuda(const DropoutAddArgs&, void* stream);   // draws the mask, applies it and adds
int dropout_mask_cuda(const DropoutMaskArgs&, void* stream);

}  // namespace fastreg
