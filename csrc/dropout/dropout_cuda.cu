// Dropout on CUDA, formula in dropout_math.h.
// Bytes per 16-bit element: forward reads 2, writes 2 and 1/8 of mask; backward reads 2 1/8, writes 2: the floor. float32: 4
// for 2.
//
// A warp takes tiles of 256 elements, a group of 8 decisions for each lane, which draws them with one call of Philox and holds
// them as its mask byte. Memory is not read in that order: lane after lane takes 16-byte word after word, and a lane asks the one
// that drew for the word it has.
#include <type_traits>

#include "../common/cuda.h"
#include "dropout_math.h"

namespace fastreg {
namespace {

constexpr int kTile = 8 * kLanes;

template <class T>
struct DropoutWork {
  using A = typename Accumulate<T>::type;
  const T* input;
  T* output;  // may be the input
  uint8_t* mask;
  int64_t numel, decisions;
  Seed seed;
  uint64_t offset, threshold;
  A scale, shift, dropped;  // shift -0, not 0, for none: x + -0 is x, for every x, and there is no branch

  explicit DropoutWork(const DropoutArgs& a)
      : input(static_cast<const T*>(a.input)),
        output(static_cast<T*>(a.output)),
        mask(a.mask),
        numel(a.input_layout.numel),
        decisions(a.decisions),
        seed(a.seed),
        offset(a.offset),
        threshold(a.threshold),
        scale(A(a.scale)),
        shift(A(a.shift == 0 ? -0. : a.shift)),
        dropped(A(a.dropped)) {}

  __device__ __forceinline__ T apply(T x, bool kept) const {
    T result;
    store_float(dropout_element<true>(A(load_float(x)), kept, scale, shift, dropped), &result);
    return result;
  }

  // Decisions [8 * byte, 8 * byte + 8). Where the offset is not a multiple of 8, they straddle two groups.
  __device__ __forceinline__ uint32_t draw(uint64_t seed_value, int64_t byte) const {
    const uint64_t group = offset / 8 + uint64_t(byte);
    const unsigned skip = unsigned(offset % 8);
    uint32_t bits = dropout_bits(seed_value, group, threshold);
    if (skip) bits = (bits >> skip | uint32_t(dropout_bits(seed_value, group + 1, threshold)) << (8 - skip)) & 0xffu;
    const int64_t rest = decisions - 8 * byte;
    return rest < 8 ? bits & ((1u << rest) - 1u) : bits;
  }
};

// Every element has its own decision.
template <class T, bool kDraw, bool kWords>
__global__ void __launch_bounds__(kThreads)
    dropout_elements(const DropoutWork<T> w, const Positions input, const Positions output) {
  constexpr int kSize = Word<T>::kSize, kCount = 8 / kSize;  // words per lane
  const int lane = threadIdx.x % kLanes;
  const uint64_t seed = kDraw ? w.seed.get() : 0;
  const int64_t tiles = (w.numel + kTile - 1) / kTile, bytes = (w.numel + 7) / 8;
  for (int64_t tile = int64_t(blockIdx.x) * kWarps + threadIdx.x / kLanes; tile < tiles; tile += int64_t(gridDim.x) * kWarps) {
    const int64_t base = tile * kTile, byte = tile * kLanes + lane;
    const bool words = kWords && base + kTile <= w.numel;
    Word<T> x[kCount];
    if (words) {  // asked for before the draw, which fills the wait
#pragma unroll
      for (int j = 0; j < kCount; ++j) x[j] = load_word(w.input + base + (j * kLanes + lane) * kSize);
    }
    uint32_t bits = 0;
    if (byte < bytes) {
      bits = kDraw ? w.draw(seed, byte) : w.mask[byte];
      if (kDraw) w.mask[byte] = uint8_t(bits);
    }
    if (words) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const int word = j * kLanes + lane;
        const uint32_t mine = __shfl_sync(kAllLanes, bits, word / kCount) >> (word % kCount * kSize);
#pragma unroll
        for (int i = 0; i < kSize; ++i) x[j].value[i] = w.apply(x[j].value[i], mine >> i & 1u);
        store_word(w.output + base + word * kSize, x[j]);
      }
    } else {
      for (int j = 0; j < 8; ++j) {
        const int element = j * kLanes + lane;
        const uint32_t mine = __shfl_sync(kAllLanes, bits, element / 8);
        const int64_t i = base + element;
        if (i < w.numel) w.output[kWords ? i : output[i]] = w.apply(w.input[kWords ? i : input[i]], mine >> (element % 8) & 1u);
      }
    }
  }
}

// The mask alone, a byte for each thread.
template <class T>
__global__ void __launch_bounds__(kThreads) dropout_draw(const DropoutWork<T> w) {
  const uint64_t seed = w.seed.get();
  const int64_t bytes = (w.decisions + 7) / 8;
  for (int64_t byte = int64_t(blockIdx.x) * kThreads + threadIdx.x; byte < bytes; byte += int64_t(gridDim.x) * kThreads)
    w.mask[byte] = uint8_t(w.draw(seed, byte));
}

// `inner` neighbours share a decision: a word at once where it lies within one, else an element.
template <class T, bool kWords>
__global__ void __launch_bounds__(kThreads)
    dropout_runs(const DropoutWork<T> w, const Divider inner, const Positions input, const Positions output) {
  constexpr int kSize = kWords ? Word<T>::kSize : 1;
  for (int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x; n < w.numel / kSize; n += int64_t(gridDim.x) * kThreads) {
    const int64_t i = n * kSize, decision = inner.divide(i);
    const bool kept = w.mask[decision / 8] >> (decision % 8) & 1;
    if (kWords) {
      Word<T> x = load_word(w.input + i);
#pragma unroll
      for (int j = 0; j < Word<T>::kSize; ++j) x.value[j] = w.apply(x.value[j], kept);
      store_word(w.output + i, x);
    } else {
      w.output[output[i]] = w.apply(w.input[input[i]], kept);
    }
  }
}

template <class T, bool kDraw>
int run(const DropoutArgs& a, void* stream) {
  const DropoutWork<T> w(a);
  const Positions input(a.input_layout), output(a.output_layout);
  const bool flat = a.input_layout.contiguous && a.output_layout.contiguous && word_aligned(a.input, a.output);
  if (a.inner == 1) {
    const unsigned blocks = blocks_for(w.numel, kTile * kWarps);
    return flat ? launch(dropout_elements<T, kDraw, true>, blocks, kThreads, 0, stream, w, input, output)
                : launch(dropout_elements<T, kDraw, false>, blocks, kThreads, 0, stream, w, input, output);
  }
  if (kDraw) {
    const int error = launch(dropout_draw<T>, blocks_for((a.decisions + 7) / 8, kThreads), kThreads, 0, stream, w);
    if (error) return error;
  }
  const Divider inner(a.inner);
  constexpr int kSize = Word<T>::kSize;
  if (flat && a.inner % kSize == 0)
    return launch(dropout_runs<T, true>, blocks_for(w.numel / kSize, kThreads), kThreads, 0, stream, w, inner, input, output);
  return launch(dropout_runs<T, false>, blocks_for(w.numel, kThreads), kThreads, 0, stream, w, inner, input, output);
}

}  // namespace

int dropout_forward_cuda(const DropoutArgs& a, void* stream) {
  return with_type(a.dtype, [&](auto* type) { return run<std::remove_pointer_t<decltype(type)>, true>(a, stream); });
}
int dropout_apply_cuda(const DropoutArgs& a, void* stream) {
  return with_type(a.dtype, [&](auto* type) { return run<std::remove_pointer_t<decltype(type)>, false>(a, stream); });
}

}  // namespace fastreg
