// Cross-entropy on CUDA with a warp or a block for each row; only cross_entropy_cuda.cu includes it.
//
//   words     classes are contiguous: 16 bytes per thread, however the row is aligned
//   elements  an element per thread: class weights with smoothing, probabilities, any strides, float64
//
// Bytes per 16-bit logit: reads 2 and writes 2, once each, where the row fits in shared memory; a longer row
// is read twice.
#pragma once
#include "../common/cuda.h"
#include "cross_entropy_row_cuda.h"

namespace fastreg {
inline namespace cross_entropy_kernels {

template <class T>
constexpr int kMostRowThreads = sizeof(T) == 8 ? 256 : 512;  // float64 takes more registers

// As many neighbours as make 16 bytes of the wider of both types.
template <class T, class G>
struct Unit {
  static constexpr int kSize = 16 / (sizeof(T) > sizeof(G) ? sizeof(T) : sizeof(G));
};
template <int N, class A>
__device__ __forceinline__ void load_unit(const Half* p, A* out) {
  if constexpr (N == 8) {
    const Word<Half> word = load_word(p);
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = load_float(word.value[i]);
  } else {
    const uint2 two = *reinterpret_cast<const uint2*>(p);
    const uint32_t bits[2] = {two.x, two.y};
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = load_float(Half{uint16_t(bits[i / 2] >> (16 * (i % 2)))});
  }
}
template <int N, class T, class A>
__device__ __forceinline__ void load_unit(const T* p, A* out) {
  static_assert(N == Word<T>::kSize);
  const Word<T> word = load_word(p);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = load_float(word.value[i]);
}

// One row, as one of its threads sees it.
template <class T, class G, bool kWords>
struct SharedRow {
  using A = typename RowsWork<T, G>::A;
  static constexpr int kSize = Word<T>::kSize, kUnit = Unit<T, G>::kSize;
  const RowsWork<T, G>& w;
  const T* x;
  G* g;
  T* cache;  // in shared memory; used where `cached`
  bool cached;
  int rank, threads;              // of this thread in the row, up to threads - 1
  int64_t target, soft;           // soft: offset of the row's probabilities
  int64_t head, words, body_end;  // the words are the elements [head, body_end)
  int64_t edge;                   // this thread's element before or after the words
  bool has_edge;

  // The edges, fewer than 16 elements before and after the words, are one for each of the first lanes.
  __device__ __forceinline__ void find_words() {
    const int64_t k = w.classes;
    const int64_t unaligned = int64_t((16 - reinterpret_cast<uintptr_t>(x) % 16) % 16 / sizeof(T));
    head = !kWords ? 0 : unaligned < k ? unaligned : k;
    words = kWords ? (k - head) / kSize : 0;
    body_end = head + words * kSize;
    edge = rank < head ? rank : body_end + rank - head;
    has_edge = kWords && edge < k;
  }

  __device__ __forceinline__ void write_zeros() const {
    G zero;
    store_float(A(0), &zero);
    if (kWords) {
      Word<G> zeros;
#pragma unroll
      for (int i = 0; i < Word<G>::kSize; ++i) zeros.value[i] = zero;
      for (int64_t i = head + int64_t(rank) * Word<G>::kSize; i < body_end;
           i += int64_t(threads) * Word<G>::kSize)
        store_word(g + i, zeros);
      if (has_edge) g[edge] = zero;
    } else {
      for (int64_t c = rank; c < w.classes; c += threads) g[c * w.grad_stride.cls] = zero;
    }
  }

  __device__ __forceinline__ void sweep_words(RunningSoftmax<A>& s, A edge_logit) const {
    const A base = w.options.base;
    if (has_edge) {
      s.raise(edge_logit);
      s.add(edge_logit);
      if (base != A(0)) s.add_target(edge_logit, base);
    }
    for (int64_t i = rank; i < words; i += threads) {
      const uint4 bits = *reinterpret_cast<const uint4*>(x + head + i * kSize);
      if (cached) reinterpret_cast<uint4*>(cache)[i] = bits;
      const Word<T> word = unpack_word<T>(bits);
      A v[kSize], largest = load_float(word.value[0]);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        v[j] = load_float(word.value[j]);
        largest = larger(largest, v[j]);
      }
      s.raise(largest);
      A parts = 0;
#pragma unroll
      for (int j = 0; j < kSize; ++j) parts += s.part_of(v[j]);
      s.rest.add_smaller(parts);
      if (base != A(0)) {
        A spread = 0;
#pragma unroll
        for (int j = 0; j < kSize; ++j) spread = multiply_add(base, v[j] - s.origin, spread);
        s.dot.add_smaller(spread);
        s.mass.add_smaller(base * A(kSize));
      }
    }
  }

  __device__ __forceinline__ void sweep_elements(RunningSoftmax<A>& s) const {
    for (int64_t c = rank; c < w.classes; c += threads) {
      const T value = x[c * w.logits_stride.cls];
      if (cached) cache[c] = value;
      const A v = load_float(value);
      s.raise(v);
      s.add(v);
      if (w.sums_dot()) s.add_target(v, w.general ? w.q_at(c, target, soft) : w.options.base);
    }
  }

  __device__ __forceinline__ void write_words(const ClassGradient<A>& gradient, A edge_logit) const {
    const A base = w.options.base;
    const T* from = cached ? cache : x + head;
    for (int64_t i = int64_t(rank) * kUnit; i < words * kSize; i += int64_t(threads) * kUnit) {
      A v[kUnit];
      load_unit<kUnit>(from + i, v);
      Word<G> word;
#pragma unroll
      for (int j = 0; j < kUnit; ++j) store_float(gradient(v[j], base), &word.value[j]);
      const int64_t at = target - head - i;
      if (at >= 0 && at < kUnit) {
#pragma unroll
        for (int j = 0; j < kUnit; ++j)
          if (j == at) store_float(gradient.at_target, &word.value[j]);
      }
      store_word(g + head + i, word);
    }
    if (has_edge) store_float(edge == target ? gradient.at_target : gradient(edge_logit, base), g + edge);
  }

  template <class Gradient>
  __device__ __forceinline__ void write_elements(const Gradient& gradient) const {
    for (int64_t c = rank; c < w.classes; c += threads) {
      const A v = load_float(cached ? cache[c] : x[c * w.logits_stride.cls]);
      const A q = w.general ? w.q_at(c, target, soft) : w.options.base;
      store_float(c == target ? gradient.at_target : gradient(v, q), g + c * w.grad_stride.cls);
    }
  }
};

// The threads that a row has: one warp of several in the block, or all of the block.
struct RowThreads {
  bool words;
  int threads, rows_in_block;
};

// Whether words of the logits are words of the gradient, in every row.
template <class T, class G>
bool words_in_phase(const CrossEntropyArgs& a) {
  constexpr int kPhase = Word<G>::kSize;
  const auto &x = a.logits_stride, &g = a.grad_stride;
  const auto phase = [](const void* p, size_t size) {
    return int64_t(reinterpret_cast<uintptr_t>(p) / size % kPhase);
  };
  return !a.grad ||
         (g.cls == 1 && phase(a.logits, sizeof(T)) == phase(a.grad, sizeof(G)) &&
          (x.inner - g.inner) % kPhase == 0 && (a.outer <= 1 || (x.outer - g.outer) % kPhase == 0));
}

template <class T, class G>
RowThreads row_threads(const CrossEntropyArgs& a, const RowsWork<T, G>& w) {
  constexpr bool kMayBeWords = sizeof(T) < 8;  // of float64 a thread's one element is as good
  const bool words = kMayBeWords && !w.general && a.logits_stride.cls == 1 && words_in_phase<T, G>(a);
  const int64_t work = words
                           ? a.classes / Word<T>::kSize
                           : a.classes / 4;  // so that a thread has about 4 to 16 words, where 512 are enough
  const int wanted = work <= 128 ? 32 : work <= 1024 ? 128 : work <= 4096 ? 256 : 512;
  const int threads = wanted < kMostRowThreads<T> ? wanted : kMostRowThreads<T>;
  return {words, threads, threads == kLanes ? 4 : 1};
}

// What all threads of a row know together; each gets the same. of_warp: shared memory, a place for each warp.
template <class A>
__device__ __forceinline__ RunningSoftmax<A> combine_threads(RunningSoftmax<A> s, bool with_dot,
                                                             RunningSoftmax<A>* of_warp, int rank,
                                                             int threads) {
  s.combine(with_dot);
  if (threads > kLanes) {
    if (rank % kLanes == 0) of_warp[rank / kLanes] = s;
    __syncthreads();
    s = RunningSoftmax<A>::none();
    if (rank % kLanes < threads / kLanes) s = of_warp[rank % kLanes];
    s.combine(with_dot);
  } else {
    __syncwarp();
  }
  return s;
}

// cached: shared memory has room for
// the row.
template <class T, class G, bool kWords>
__global__ void __launch_bounds__(kMostRowThreads<T>)
    cross_entropy_rows(const RowsWork<T, G> w, int threads, bool cached) {
  using A = typename RowsWork<T, G>::A;
  __shared__ RunningSoftmax<A> of_warp[kMostRowThreads<T> / kLanes];
  const int rank = int(threadIdx.x) % threads, in_block = int(blockDim.x) / threads;
  const int64_t cache_words = (w.classes + Word<T>::kSize - 1) / Word<T>::kSize;
  T* cache = reinterpret_cast<T*>(dynamic_shared + (cached ? int(threadIdx.x) / threads * cache_words : 0));
  const auto synchronise = [&] { threads > kLanes ? __syncthreads() : __syncwarp(); };

  for (int64_t row = int64_t(blockIdx.x) * in_block + int(threadIdx.x) / threads; row < w.rows;
       row += int64_t(gridDim.x) * in_block) {
    const T* x = w.logits + w.offset(w.logits_stride, row);
    G* g = w.grad ? w.grad + w.offset(w.grad_stride, row) : nullptr;
    SharedRow<T, G, kWords> r{
        w, x, g, cache, cached, rank, threads, target_of(w, row), w.soft ? w.offset(w.soft_stride, row) : 0};
    r.find_words();
    if (r.target == kIgnored) {
      if (rank == 0) write_ignored(w, row);
      if (g) r.write_zeros();
      continue;
    }

    RunningSoftmax<A> s = RunningSoftmax<A>::none();
    const A edge_logit = r.has_edge ? A(load_float(x[r.edge])) : A(0);
    const A target_logit = r.target >= 0 ? A(load_float(x[r.target * w.logits_stride.cls])) : A(0);
    if (kWords)
      r.sweep_words(s, edge_logit);
    else
      r.sweep_elements(s);
    s = combine_threads(s, w.sums_dot(), of_warp, rank, threads);
    const ClassGradient<A> gradient = finish_row(w, row, r.target, target_logit, s, rank == 0);
    if (g && kWords) r.write_words(gradient, edge_logit);
    if (g && !kWords) r.write_elements(gradient);
    synchronise();  // of_warp and the cache are written again for the next row
  }
}

}  // namespace cross_entropy_kernels
}  // namespace fastreg
