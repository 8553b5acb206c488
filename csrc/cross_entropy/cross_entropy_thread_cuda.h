// Cross-entropy on CUDA with a thread for each row: few classes, or rows side by side as the pixels of
// (N, C, H, W); only cross_entropy_cuda.cu includes it.
//
// A block brings its rows into shared memory word by word and takes the gradient back the same way. Bytes per
// 16-bit logit: reads 2 and writes 2, once each; rows too long for a tile are read twice.
#pragma once
#include <type_traits>

#include "../common/cuda.h"
#include "cross_entropy_row_cuda.h"

namespace fastreg {
inline namespace cross_entropy_kernels {

constexpr int kTileThreads = 128;
constexpr int kTileClasses = 64;  // at most, where rows lie one after another

struct Tile {
  enum Kind {
    kDense,    // rows one after another
    kColumns,  // rows side by side
    kDirect    // rows side by side, too long for a tile
  } kind;
  bool read_words, write_words;
};

// Moves a tile in or out: `strips` of `length` neighbours, a word at a time where words are aligned.
template <bool kIn, class T>
__device__ __forceinline__ void move_tile(T* global, int64_t global_stride, T* tile, uint32_t tile_stride,
                                          uint32_t strips, uint32_t length, bool aligned) {
  constexpr uint32_t kSize = Word<T>::kSize;
  const uint32_t words = aligned ? length / kSize : 0, rest = length - words * kSize;
  for (uint32_t i = threadIdx.x; i < strips * words; i += blockDim.x) {
    const uint32_t strip = i / words, at = (i - strip * words) * kSize;
    uint4* outside = reinterpret_cast<uint4*>(global + strip * global_stride + at);
    uint4* inside = reinterpret_cast<uint4*>(tile + strip * tile_stride + at);
    if (kIn)
      *inside = *outside;
    else
      __stcg(outside, *inside);
  }
  for (uint32_t i = threadIdx.x; i < strips * rest; i += blockDim.x) {
    const uint32_t strip = i / rest, at = words * kSize + i - strip * rest;
    T* outside = global + strip * global_stride + at;
    T* inside = tile + strip * tile_stride + at;
    if (kIn)
      *inside = *outside;
    else
      *outside = *inside;
  }
}

// The row of one thread, whose classes it takes in turn from `begin` on: logit(c) reads, put(c, value) writes
// the gradient.
template <bool kPlain, class T, class G, class Index, class Logit, class Put>
__device__ __forceinline__ void whole_row(const RowsWork<T, G>& w, int64_t row, Index begin,
                                          const Logit& logit, const Put& put) {
  using A = typename RowsWork<T, G>::A;
  const Index k = Index(w.classes);
  const int64_t target = target_of(w, row);
  const auto for_each_class = [&](auto f) {
    Index c = begin;
    for (Index i = 0; i < k; ++i) {
      f(c);
      c = c + 1 < k ? c + 1 : 0;
    }
  };
  if (target == kIgnored) {
    write_ignored(w, row);
    if (w.grad) for_each_class([&](Index c) { put(c, A(0)); });
    return;
  }
  const int64_t soft = !kPlain && w.soft ? w.offset(w.soft_stride, row) : 0;
  const bool sums_dot = w.sums_dot();
  const auto q_at = [&](Index c) -> A {
    return !kPlain && w.general ? w.q_at(c, target, soft) : w.options.base;
  };
  RunningSoftmax<A> s = RunningSoftmax<A>::none();
  for_each_class([&](Index c) {
    const A x = logit(c);
    s.raise(x);
    s.add(x);
    if (sums_dot) s.add_target(x, q_at(c));
  });
  s.close();
  const ClassGradient<A> gradient =
      finish_row(w, row, target, target >= 0 ? logit(Index(target)) : A(0), s, true);
  if (!w.grad) return;
  for_each_class([&](Index c) {
    const A value = gradient(logit(c), q_at(c));
    put(c, int64_t(c) == target ? gradient.at_target : value);
  });
}

template <class T, class G>
__global__ void __launch_bounds__(kTileThreads)
    cross_entropy_tiles(const RowsWork<T, G> w, const Tile tile, int64_t tiles) {
  using A = typename RowsWork<T, G>::A;
  const int64_t k = w.classes;
  const uint32_t threads = blockDim.x, mine = threadIdx.x;
  const bool dense = tile.kind == Tile::kDense, staged = tile.kind != Tile::kDirect;
  T* in = reinterpret_cast<T*>(dynamic_shared);
  // The gradient takes the logits' place, or, being of another type, the one after it.
  G* out = reinterpret_cast<G*>(in + (std::is_same_v<T, G> ? 0 : int64_t(threads) * k));
  const int64_t per_outer = (w.inner + threads - 1) / threads;  // tiles

  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const int64_t n = t / per_outer, first = (t - n * per_outer) * threads;
    const uint32_t count = uint32_t(w.inner - first < threads ? w.inner - first : threads);
    const T* x = w.logits + n * w.logits_stride.outer + first * w.logits_stride.inner;
    G* g = w.grad ? w.grad + n * w.grad_stride.outer + first * w.grad_stride.inner : nullptr;
    const uint32_t strips = dense ? 1 : uint32_t(k), length = dense ? count * uint32_t(k) : count;
    if (staged) {
      move_tile<true>(const_cast<T*>(x), w.logits_stride.cls, in, threads, strips, length, tile.read_words);
      __syncthreads();
    }
    if (mine < count) {
      const int64_t row = n * w.inner + first + mine;
      T* const mine_in = in + (dense ? mine * uint32_t(k) : mine);
      G* const mine_out = out + (dense ? mine * uint32_t(k) : mine);
      const uint32_t step = dense ? 1 : threads;
      // In a tile of rows one after another the lanes begin at different classes, and so in different banks.
      const uint32_t begin = dense ? mine % uint32_t(k) : 0;
      const auto logit = [&](uint32_t c) -> A { return load_float(mine_in[c * step]); };
      const auto put = [&](uint32_t c, A value) { store_float(value, mine_out + c * step); };
      if (staged && !w.general) {
        whole_row<true>(w, row, begin, logit, put);
      } else {
        whole_row<false>(
            w, row, int64_t(begin),
            [&](int64_t c) -> A {
              return staged ? logit(uint32_t(c)) : load_float(x[c * w.logits_stride.cls + mine]);
            },
            [&](int64_t c, A value) {
              if (staged)
                put(uint32_t(c), value);
              else
                store_float(value, g + c * w.grad_stride.cls + mine);
            });
      }
    }
    if (!staged) continue;
    __syncthreads();
    if (g) move_tile<false>(g, w.grad_stride.cls, out, threads, strips, length, tile.write_words);
    __syncthreads();  // the next tile is written where this one was read
  }
}

}  // namespace cross_entropy_kernels
}  // namespace fastreg
