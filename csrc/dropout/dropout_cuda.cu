// Dropout on CUDA, formula in dropout_math.h.
// Bytes per 16-bit element: forward reads 2, writes 2 and 1/8 of mask; backward reads 2 1/8, writes 2: the
// floor. With a residual added forward reads 2 more; the bias comes from the cache. float32: 4 for 2.
//
// A warp takes chunks of 256 elements. Each lane draws 8 decisions with one call of Philox and holds them as
// its byte of the mask. Memory is not read in that order: neighbouring lanes take neighbouring 16-byte words,
// and a lane asks the one that drew for the decisions of the word it has.
#include <type_traits>

#include "../common/cuda.h"
#include "dropout_math.h"

namespace fastreg {
inline namespace dropout_kernels {

constexpr int kChunk = 8 * kLanes;  // elements of a warp

template <class T>
struct DropoutWork {
  using A = typename Accumulate<T>::type;
  const T* input;
  T* output;  // may be the input
  uint8_t* mask;
  int64_t numel, decisions;
  Seed seed;
  uint64_t offset, threshold;
  A scale, shift, dropped;  // no shift is -0, not 0: x + -0 is x for every x, without a branch

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

  // Decisions [8 * byte, 8 * byte + 8).
  __device__ __forceinline__ uint32_t draw(uint64_t seed_value, int64_t byte) const {
    const uint32_t bits = dropout_bits_from(seed_value, offset + 8 * uint64_t(byte), threshold);
    const int64_t rest = decisions - 8 * byte;
    return rest < 8 ? bits & ((1u << rest) - 1u) : bits;
  }
};

// What is added in the same pass: the bias before dropout, the residual after it.
template <class T>
struct Addends {
  static constexpr bool kAdd = true;
  using A = typename Accumulate<T>::type;
  const T* residual;
  const T* bias;  // or null
  Divider columns;
  bool bias_words;  // a word of elements has a word of bias
  Offsets residual_at;

  explicit Addends(const DropoutAddArgs& a)
      : residual(static_cast<const T*>(a.residual)),
        bias(static_cast<const T*>(a.bias)),
        columns(a.columns),
        bias_words(a.columns % Word<T>::kSize == 0 && word_aligned(a.bias)),
        residual_at(a.residual_layout) {}

  __device__ __forceinline__ int64_t column(int64_t i) const {
    return i - columns.divide(i) * int64_t(columns.divisor);
  }
  __device__ __forceinline__ void bias_word(int64_t i, Word<T>* word) const {
    int64_t at = column(i);
    if (bias_words) {
      *word = load_word(bias + at);
    } else {
#pragma unroll
      for (int j = 0; j < Word<T>::kSize; ++j) {
        word->value[j] = bias[at];
        if (++at == int64_t(columns.divisor)) at = 0;
      }
    }
  }
  __device__ __forceinline__ T add(const DropoutWork<T>& w, T x, T bias_value, bool kept,
                                   T residual_value) const {
    A value = load_float(x);
    if (bias) value = value + A(load_float(bias_value));
    T result;
    store_float(dropout_add_element(value, kept, w.scale, A(load_float(residual_value))), &result);
    return result;
  }
};
struct NoAddends {
  static constexpr bool kAdd = false;
};

// Every element has its own decision.
template <class T, bool kDraw, bool kWords, class Add>
__global__ void __launch_bounds__(kThreads)
    dropout_elements(const DropoutWork<T> w, const Offsets input, const Offsets output, const Add addends) {
  constexpr int kSize = Word<T>::kSize, kCount = 8 / kSize;  // words per lane
  // The residual is loaded early too, except in float64, where four more words would take 76 registers.
  constexpr bool kHeld = Add::kAdd && sizeof(T) < 8;
  const int lane = threadIdx.x % kLanes;
  const uint64_t seed = kDraw ? w.seed.get() : 0;
  const int64_t chunks = (w.numel + kChunk - 1) / kChunk, bytes = (w.numel + 7) / 8;
  for (int64_t chunk = int64_t(blockIdx.x) * kWarps + threadIdx.x / kLanes; chunk < chunks;
       chunk += int64_t(gridDim.x) * kWarps) {
    const int64_t base = chunk * kChunk, byte = chunk * kLanes + lane;
    const bool words = kWords && base + kChunk <= w.numel;
    Word<T> x[kCount], residual[kHeld ? kCount : 1];
    // ---- memory is asked for before the draw, which fills the wait
    if (words) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const int64_t i = base + (j * kLanes + lane) * kSize;
        x[j] = load_word(w.input + i);
        if constexpr (kHeld) residual[j] = load_word(addends.residual + i);
      }
    }
    // ---- the lane's 8 decisions
    uint32_t bits = 0;
    if (byte < bytes) {
      bits = kDraw ? w.draw(seed, byte) : w.mask[byte];
      if (kDraw) w.mask[byte] = uint8_t(bits);
    }
    // ---- apply
    if (words) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const int word = j * kLanes + lane;
        const uint32_t mine = __shfl_sync(kAllLanes, bits, word / kCount) >> (word % kCount * kSize);
        if constexpr (Add::kAdd) {
          if constexpr (!kHeld) residual[0] = load_word(addends.residual + base + word * kSize);
          Word<T> bias{};
          if (addends.bias) addends.bias_word(base + word * kSize, &bias);
#pragma unroll
          for (int i = 0; i < kSize; ++i)
            x[j].value[i] = addends.add(w, x[j].value[i], bias.value[i], mine >> i & 1u,
                                        residual[kHeld ? j : 0].value[i]);
        } else {
#pragma unroll
          for (int i = 0; i < kSize; ++i) x[j].value[i] = w.apply(x[j].value[i], mine >> i & 1u);
        }
        store_word(w.output + base + word * kSize, x[j]);
      }
    } else {
      for (int j = 0; j < 8; ++j) {
        const int element = j * kLanes + lane;
        const uint32_t mine = __shfl_sync(kAllLanes, bits, element / 8);
        const int64_t i = base + element;
        if (i >= w.numel) continue;
        const bool kept = mine >> (element % 8) & 1u;
        const T x = w.input[kWords ? i : input[i]];
        T result;
        if constexpr (Add::kAdd)
          result = addends.add(w, x, addends.bias ? addends.bias[addends.column(i)] : T{}, kept,
                               addends.residual[kWords ? i : addends.residual_at[i]]);
        else
          result = w.apply(x, kept);
        w.output[kWords ? i : output[i]] = result;
      }
    }
  }
}

// The mask alone, a byte for each thread.
template <class T>
__global__ void __launch_bounds__(kThreads) dropout_draw(const DropoutWork<T> w) {
  const uint64_t seed = w.seed.get();
  const int64_t bytes = (w.decisions + 7) / 8;
  for (int64_t byte = int64_t(blockIdx.x) * kThreads + threadIdx.x; byte < bytes;
       byte += int64_t(gridDim.x) * kThreads)
    w.mask[byte] = uint8_t(w.draw(seed, byte));
}

// Where `inner` neighbours share a decision: a thread does a word where it lies within one run, else an
// element.
template <class T, bool kWords>
__global__ void __launch_bounds__(kThreads)
    dropout_runs(const DropoutWork<T> w, const Divider inner, const Offsets input, const Offsets output) {
  constexpr int kSize = kWords ? Word<T>::kSize : 1;
  for (int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x; n < w.numel / kSize;
       n += int64_t(gridDim.x) * kThreads) {
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

// A mask of rows, a byte for each thread. 1/8 of a byte is written for each decision, and nothing is read.
__global__ void __launch_bounds__(kThreads) dropout_mask(const DropoutMaskArgs a) {
  const uint64_t seed = a.seed.get();
  for (int64_t byte = int64_t(blockIdx.x) * kThreads + threadIdx.x; byte < (a.decisions + 7) / 8;
       byte += int64_t(gridDim.x) * kThreads) {
    const int64_t rest = a.decisions - 8 * byte;
    const int count = rest < 8 ? int(rest) : 8;
    uint32_t bits = 0;
    for (int j = 0; j < count;) {
      const DropoutPiece piece = dropout_piece(a, 8 * byte + j, count - j);
      const uint32_t drawn = dropout_bits_from(seed, piece.at, a.threshold);
      bits |= (drawn & ((1u << piece.count) - 1u)) << j;
      j += int(piece.count);
    }
    a.mask[byte] = uint8_t(bits);
  }
}

template <class T, bool kDraw, class Add>
int launch_elements(const DropoutArgs& a, bool flat, const Add& addends, void* stream) {
  const DropoutWork<T> w(a);
  const Offsets input(a.input_layout), output(a.output_layout);
  const unsigned blocks = blocks_for(w.numel, kChunk * kWarps);
  return flat ? launch(dropout_elements<T, kDraw, true, Add>, blocks, kThreads, 0, stream, w, input, output,
                       addends)
              : launch(dropout_elements<T, kDraw, false, Add>, blocks, kThreads, 0, stream, w, input, output,
                       addends);
}

bool is_flat(const DropoutArgs& a) {
  return a.input_layout.contiguous && a.output_layout.contiguous && word_aligned(a.input, a.output);
}

template <class T, bool kDraw>
int launch_dropout(const DropoutArgs& a, void* stream) {
  const bool flat = is_flat(a);
  if (a.inner == 1) return launch_elements<T, kDraw>(a, flat, NoAddends(), stream);
  const DropoutWork<T> w(a);
  const Offsets input(a.input_layout), output(a.output_layout);
  if (kDraw) {
    const int error =
        launch(dropout_draw<T>, blocks_for((a.decisions + 7) / 8, kThreads), kThreads, 0, stream, w);
    if (error) return error;
  }
  const Divider inner(a.inner);
  constexpr int kSize = Word<T>::kSize;
  if (flat && a.inner % kSize == 0)
    return launch(dropout_runs<T, true>, blocks_for(w.numel / kSize, kThreads), kThreads, 0, stream, w, inner,
                  input, output);
  return launch(dropout_runs<T, false>, blocks_for(w.numel, kThreads), kThreads, 0, stream, w, inner, input,
                output);
}

}  // namespace dropout_kernels

int dropout_forward_cuda(const DropoutArgs& a, void* stream) {
  return with_dtype(a.dtype, [&](auto* type) {
    return launch_dropout<std::remove_pointer_t<decltype(type)>, true>(a, stream);
  });
}
int dropout_apply_cuda(const DropoutArgs& a, void* stream) {
  return with_dtype(a.dtype, [&](auto* type) {
    return launch_dropout<std::remove_pointer_t<decltype(type)>, false>(a, stream);
  });
}

int dropout_mask_cuda(const DropoutMaskArgs& a, void* stream) {
  return launch(dropout_mask, blocks_for((a.decisions + 7) / 8, kThreads), kThreads, 0, stream, a);
}

int dropout_add_cuda(const DropoutAddArgs& a, void* stream) {
  return with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool flat = is_flat(a) && a.residual_layout.contiguous && word_aligned(a.residual);
    return launch_elements<T, true>(a, flat, Addends<T>(a), stream);
  });
}

}  // namespace fastreg
