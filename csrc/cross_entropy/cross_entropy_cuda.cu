// Smoothed cross-entropy on CUDA with its gradient written in the same sweep; formula in
// cross_entropy_math.h. Bytes per 16-bit logit: reads 2, writes 2, once each, where the row fits in shared
// memory (227 KiB on an H100, 163 on an A100); a longer row is read twice. float32: 4 for 2; the gradient of
// float16 is float32. Probabilities as targets are read twice. Per row: 8 of its class index, 4 of lse, 4 of
// loss; for a mean or sum another 4, for a mean another 8.
//
// Largest logit and sum of exponentials in one sweep, relative to a running reference (Milakov and Gimelshein
// 2018), which moves only when a logit lies 8 above it: to move it costs a rounding, and a row may have its
// logits in ascending order. One largest logit stays out of the sum, so that log1p(sum) keeps the last bits
// of a row in which one class has nearly all the mass. The loss is within 2 ulp of the exact one where
// several classes share the mass. Where one has nearly all of it the loss is a small exp(x - top), and the
// rounding of x - top adds as many ulp as the logits lie apart: none of 16-bit logits, whose differences are
// exact, 20 of float32 logits 20 apart.
//
// Three ways to share rows out:
//   words     classes contiguous: a warp or a block per row, 16 bytes per lane, however the row is aligned
//   elements  the same with an element per lane: class weights with smoothing, probabilities, any strides,
//   float64 tiles     few classes, or rows side by side as the pixels of (N, C, H, W): a thread per row; a
//   block brings its rows into
//             shared memory word by word and takes the gradient back
// Every sum has a fixed order: the same input gives the same bits.
//
// A class index out of range: NaN as that row's loss and gradient; without NDEBUG an assertion names the op.
#include <cassert>
#include <limits>
#include <type_traits>

#include "../common/cuda.h"
#include "cross_entropy_math.h"

namespace fastreg {
namespace {

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();
template <class A>
constexpr A kMost = std::numeric_limits<A>::max();

__device__ __forceinline__ float larger(float a, float b) {
  return fmaxf(a, b);
}  // never NaN unless both are
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
// 1 / x for x >= 1. A division of float64, as there is one in log1p, is a call, around which registers are
// spilled.
__device__ __forceinline__ float reciprocal(float x) { return 1.f / x; }
__device__ __forceinline__ double reciprocal(double x) {
  double r = double(1.f / float(x));
  for (int step = 0; step < 2; ++step) r = multiply_add(r, multiply_add(-x, r, 1.), r);
  return r;
}
__device__ __forceinline__ float log_of_one_plus(float x) { return log1pf(x); }
__device__ __forceinline__ double log_of_one_plus(double x) {
  const double sum = 1. + x;
  return log(sum) + (x - (sum - 1.)) * reciprocal(sum);  // and what of x was lost in the sum
}

template <class A>
__device__ __forceinline__ A load_as(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32:
      return A(static_cast<const float*>(p)[i]);
    case DType::kFloat64:
      return A(static_cast<const double*>(p)[i]);
    case DType::kFloat16:
      return A(load_float(static_cast<const Half*>(p)[i]));
    default:
      return A(load_float(static_cast<const BFloat16*>(p)[i]));
  }
}
template <class A>
__device__ __forceinline__ void store_as(void* p, DType dtype, int64_t i, A x) {
  switch (dtype) {
    case DType::kFloat32:
      return store_float(float(x), static_cast<float*>(p) + i);
    case DType::kFloat64:
      return store_float(double(x), static_cast<double*>(p) + i);
    case DType::kFloat16:
      return store_float(float(x), static_cast<Half*>(p) + i);
    default:
      return store_float(float(x), static_cast<BFloat16*>(p) + i);
  }
}

template <class A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int step = kLanes / 2; step; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
template <class A>
__device__ __forceinline__ A warp_max(A x) {
#pragma unroll
  for (int step = kLanes / 2; step; step /= 2) x = larger(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// ---- a sum as a pair of numbers that has twice the precision: a thread adds up hundreds of numbers, one
// after another

template <class A>
struct Pair {
  A high, low;

  __device__ __forceinline__ void add(const Pair& x) {  // Knuth 1969
    const A sum = high + x.high, part = sum - high;
    low += (high - (sum - part)) + (x.high - part) + x.low;
    high = sum;
  }
  __device__ __forceinline__ void add_smaller(
      A x) {  // Dekker 1971; a larger x is added as a plain number would be
    const A sum = high + x;
    low += x - (sum - high);
    high = sum;
  }
  __device__ __forceinline__ A value() const {
    return low == low ? high + low : high;
  }  // inf - inf is no correction
};

// ---- what is known of a row, or of a thread's part of it, after some of its classes

template <class A>
struct RunningSoftmax {
  A top, origin;
  Pair<A> others;     // sum of exp(x - origin) over all but one of the largest
  Pair<A> dot, mass;  // sums of q * (x - origin) and of q

  // Of no class. The origin is not -inf: subtracted from a logit of -inf it gives -inf.
  static __device__ __forceinline__ RunningSoftmax none() { return {-kInfinity<A>, -kMost<A>, {}, {}, {}}; }

  // Before numbers up to `largest` are added.
  __device__ __forceinline__ void raise(A largest) {
    if (largest - origin > A(8)) move(largest);
  }
  __device__ __forceinline__ void move(A to) {
    const A factor = exponential(origin - to);
    others.high *= factor;
    others.low *= factor;
    dot.add_smaller(weighted_logit(mass.value(), origin - to));
    origin = to;
  }
  // What x adds to `others`: itself, or, where it is the largest so far, the largest before it.
  __device__ __forceinline__ A part_of(A x) {
    const bool above = top < x;
    const A part = exponential((above ? top : x) - origin);
    top = above ? x : top;
    return part;
  }
  __device__ __forceinline__ void add(A x) { others.add_smaller(part_of(x)); }
  __device__ __forceinline__ void add_target(A x, A q) {
    dot.add_smaller(weighted_logit(q, x - origin));
    mass.add_smaller(q);
  }
  // Of all lanes together, the same in each.
  __device__ __forceinline__ void combine(bool with_dot) {
    const A largest = warp_max(top), reference = largest == -kInfinity<A> ? A(0) : largest;
    const unsigned holders = __ballot_sync(kAllLanes, top == largest);
    const bool left_out = int(threadIdx.x % kLanes) == __ffs(int(holders)) - 1;
    const A mine = others.value() * exponential(origin - reference);
    others = {warp_sum(mine + (left_out ? A(0) : exponential(top - reference))), A(0)};
    if (with_dot) {
      const A its_mass = mass.value();
      dot = {warp_sum(dot.value() + weighted_logit(its_mass, origin - reference)), A(0)};
      mass = {warp_sum(its_mass), A(0)};
    }
    top = largest;
    origin = reference;
  }
  // The end, for a thread that has a whole row.
  __device__ __forceinline__ void close() {
    if (top > -kInfinity<A>) move(top);
  }
};

// ---- arguments

template <class T, class G>
struct RowsWork {
  using A = typename Accumulate<T>::type;
  const T* logits;
  G* grad;  // may be the logits
  const int64_t* target;
  const void* soft;
  const A* weight;
  void* loss;
  A* lse;
  DType soft_dtype, loss_dtype;
  bool general;  // q differs from class to class beyond the target's
  int64_t rows, positions, classes, ignore_index;
  Divider per_outer;  // positions
  CrossEntropyArgs::Strides logits_stride, grad_stride, soft_stride;
  A mix, base, own, q_all, q_rest,
      z_loss;  // q of the target; all q, and all but the target's, where they need no summing
  A factor;
  const A* row_factor;     // one for each row; or
  const A* shared_factor;  // one for all; or null

  explicit RowsWork(const CrossEntropyArgs& a)
      : logits(static_cast<const T*>(a.logits)),
        grad(static_cast<G*>(a.grad)),
        target(a.target),
        soft(a.soft_target),
        weight(static_cast<const A*>(a.weight)),
        loss(nullptr),
        lse(nullptr),
        soft_dtype(a.target_dtype),
        loss_dtype(a.dtype),
        // "others" with eps = 1: a target of -inf has no mass, which base * -inf - base * -inf would not see
        general(a.soft_target || (a.base != 0 && (a.weight || a.mix + a.base == 0))),
        rows(a.outer * a.positions),
        positions(a.positions),
        classes(a.classes),
        ignore_index(a.ignore_index),
        per_outer(a.positions > 0 ? a.positions : 1),
        logits_stride(a.logits_stride),
        grad_stride(a.grad_stride),
        soft_stride(a.target_stride),
        mix(A(a.mix)),
        base(A(a.base)),
        own(A(a.mix + a.base)),
        q_all(A(a.mix + a.base * double(a.classes))),
        q_rest(A(a.base * double(a.classes - 1))),
        z_loss(A(a.z_loss)),
        factor(A(a.grad_factor)),
        row_factor(static_cast<const A*>(a.row_factor)),
        shared_factor(nullptr) {}

  __device__ __forceinline__ bool sums_dot() const { return general || base != A(0); }

  __device__ __forceinline__ int64_t offset(const CrossEntropyArgs::Strides& stride, int64_t row) const {
    const int64_t n = per_outer.divide(row);
    return n * stride.outer + (row - n * positions) * stride.position;
  }
  // soft_row: offset of the row's probabilities.
  __device__ __forceinline__ A q_at(int64_t c, int64_t its_target, int64_t soft_row) const {
    const A w = weight ? weight[c] : A(1);
    if (soft)
      return smoothed_target(load_as<A>(soft, soft_dtype, soft_row + c * soft_stride.cls), w, mix, base);
    return w * (c == its_target ? own : base);
  }
  __device__ __forceinline__ A factor_of(int64_t row) const {
    return row_factor ? row_factor[row] : shared_factor ? *shared_factor : factor;
  }
};

enum Target : int64_t { kSoft = -1, kIgnored = -2, kInvalid = -3 };

// The class index of a row, or why it has none.
template <class T, class G>
__device__ __forceinline__ int64_t target_of(const RowsWork<T, G>& w, int64_t row) {
  if (w.soft) return kSoft;
  const int64_t t = w.target[row];
  if (t == w.ignore_index) return kIgnored;
  const bool valid = t >= 0 && t < w.classes;
  assert(valid && "cross_entropy: class index out of range");
  return valid ? t : int64_t(kInvalid);
}

// What a row's gradient is made of.
template <class A>
struct RowGradient {
  A top, softmax_factor, factor, at_target;

  __device__ __forceinline__ A operator()(A x, A q) const {
    return cross_entropy_grad(exponential(x - top), q, softmax_factor, factor);
  }
};

// Loss and lse of a row, written by the thread that `writes`; and what its gradient takes.
template <class T, class G, class A = typename Accumulate<T>::type>
__device__ __forceinline__ RowGradient<A> finish_row(const RowsWork<T, G>& w, int64_t row, int64_t target,
                                                     A target_logit, RunningSoftmax<A> s, bool writes) {
  const A nan = kInfinity<A> - kInfinity<A>;
  const A others = s.top == kInfinity<A> || s.top == -kInfinity<A> ? nan : s.others.value();
  const bool hard = target >= 0;
  const A target_weight = hard && w.weight ? w.weight[target] : A(1), q_target = target_weight * w.own;
  const A shifted = hard ? target_logit - s.top : A(0);
  A q_sum = s.mass.value(), q_rest = q_sum - q_target, dot = s.dot.value();
  if (!w.general) {
    q_sum = w.weight ? q_target : w.q_all;
    q_rest = w.q_rest;
    dot += weighted_logit(target_weight * w.mix, shifted);
  }
  const A log_sum = log_of_one_plus(others), lse = s.top + log_sum, sum = A(1) + others;
  A loss = q_sum * log_sum - dot, z_slope = 0;
  if (w.z_loss != A(0)) {
    loss += w.z_loss * lse * lse;
    z_slope = A(2) * w.z_loss * lse;
  }
  A factor = w.grad ? w.factor_of(row) : A(0);
  if (target == kInvalid) loss = factor = nan;
  if (writes) {
    store_as(w.loss, w.loss_dtype, row, loss);
    if (w.lse) w.lse[row] = lse;
  }
  // At the target q_sum * p - q, whose last bits would be lost in a p of nearly 1.
  const A e = exponential(shifted), share = reciprocal(sum), p = e * share,
          missing = (others + (A(1) - e)) * share;
  const A at_target = p < A(0.5) ? q_sum * p - q_target : q_rest - q_sum * missing;
  return {s.top, (q_sum + z_slope) * factor * share, factor, factor * (at_target + z_slope * p)};
}

template <class T, class G>
__device__ __forceinline__ void write_ignored(const RowsWork<T, G>& w, int64_t row) {
  using A = typename Accumulate<T>::type;
  store_as(w.loss, w.loss_dtype, row, A(0));
  if (w.lse) w.lse[row] = A(0);
}

// ---- a warp or a block per row

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

// Elements before the first 16-byte boundary of a row.
template <class T>
__device__ __forceinline__ int64_t head_of(const T* x, int64_t classes) {
  const int64_t head = int64_t((16 - reinterpret_cast<uintptr_t>(x) % 16) % 16 / sizeof(T));
  return head < classes ? head : classes;
}

// threads: of a row, one warp of several in the block or all of the block. cached: shared memory has room for
// the row.
template <class T, class G, bool kWords>
__global__ void __launch_bounds__(kMostRowThreads<T>)
    cross_entropy_rows(const RowsWork<T, G> w, int threads, bool cached) {
  using A = typename RowsWork<T, G>::A;
  constexpr int kSize = Word<T>::kSize, kUnit = Unit<T, G>::kSize;
  __shared__ RunningSoftmax<A> of_warp[kMostRowThreads<T> / kLanes];
  const int lane = int(threadIdx.x) % threads, warp = int(threadIdx.x) / kLanes,
            in_block = int(blockDim.x) / threads;
  const int64_t k = w.classes, cache_words = (k + kSize - 1) / kSize;
  T* cache = reinterpret_cast<T*>(dynamic_shared + (cached ? int(threadIdx.x) / threads * cache_words : 0));
  const auto synchronise = [&] { threads > kLanes ? __syncthreads() : __syncwarp(); };

  for (int64_t row = int64_t(blockIdx.x) * in_block + int(threadIdx.x) / threads; row < w.rows;
       row += int64_t(gridDim.x) * in_block) {
    const T* x = w.logits + w.offset(w.logits_stride, row);
    G* g = w.grad ? w.grad + w.offset(w.grad_stride, row) : nullptr;
    const int64_t soft = w.soft ? w.offset(w.soft_stride, row) : 0, target = target_of(w, row);
    // The edges, fewer than 16 elements before and after the words, are one for each of the first lanes.
    const int64_t head = kWords ? head_of(x, k) : 0, words = kWords ? (k - head) / kSize : 0,
                  body_end = head + words * kSize;
    const int64_t edge = lane < head ? lane : body_end + lane - head;
    const bool has_edge = kWords && edge < k;

    if (target == kIgnored) {
      if (lane == 0) write_ignored(w, row);
      if (!g) continue;
      G zero;
      store_float(A(0), &zero);
      if (kWords) {
        Word<G> zeros;
#pragma unroll
        for (int i = 0; i < Word<G>::kSize; ++i) zeros.value[i] = zero;
        for (int64_t i = head + int64_t(lane) * Word<G>::kSize; i < body_end;
             i += int64_t(threads) * Word<G>::kSize)
          store_word(g + i, zeros);
        if (has_edge) g[edge] = zero;
      } else {
        for (int64_t c = lane; c < k; c += threads) g[c * w.grad_stride.cls] = zero;
      }
      continue;
    }

    RunningSoftmax<A> s = RunningSoftmax<A>::none();
    A edge_logit = 0, target_logit = target >= 0 ? A(load_float(x[target * w.logits_stride.cls])) : A(0);
    if (kWords) {
      if (has_edge) {
        edge_logit = load_float(x[edge]);
        s.raise(edge_logit);
        s.add(edge_logit);
        if (w.base != A(0)) s.add_target(edge_logit, w.base);
      }
      for (int64_t i = lane; i < words; i += threads) {
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
        s.others.add_smaller(parts);
        if (w.base != A(0)) {
          A spread = 0;
#pragma unroll
          for (int j = 0; j < kSize; ++j) spread = multiply_add(w.base, v[j] - s.origin, spread);
          s.dot.add_smaller(spread);
          s.mass.add_smaller(w.base * A(kSize));
        }
      }
    } else {
      for (int64_t c = lane; c < k; c += threads) {
        const T value = x[c * w.logits_stride.cls];
        if (cached) cache[c] = value;
        const A v = load_float(value);
        s.raise(v);
        s.add(v);
        if (w.general || w.base != A(0)) s.add_target(v, w.general ? w.q_at(c, target, soft) : w.base);
      }
    }
    s.combine(w.sums_dot());
    if (threads > kLanes) {
      if (lane % kLanes == 0) of_warp[warp] = s;
      __syncthreads();
      s = RunningSoftmax<A>::none();
      if (lane % kLanes < threads / kLanes) s = of_warp[lane % kLanes];
      s.combine(w.sums_dot());
    } else {
      __syncwarp();
    }
    const RowGradient<A> gradient = finish_row(w, row, target, target_logit, s, lane == 0);
    if (!g) {
      synchronise();  // of_warp is written again for the next row
      continue;
    }

    if (kWords) {
      const T* from = cached ? cache : x + head;
      for (int64_t i = int64_t(lane) * kUnit; i < words * kSize; i += int64_t(threads) * kUnit) {
        A v[kUnit];
        load_unit<kUnit>(from + i, v);
        Word<G> word;
#pragma unroll
        for (int j = 0; j < kUnit; ++j) store_float(gradient(v[j], w.base), &word.value[j]);
        const int64_t at = target - head - i;
        if (at >= 0 && at < kUnit) {
#pragma unroll
          for (int j = 0; j < kUnit; ++j)
            if (j == at) store_float(gradient.at_target, &word.value[j]);
        }
        store_word(g + head + i, word);
      }
      if (has_edge) store_float(edge == target ? gradient.at_target : gradient(edge_logit, w.base), g + edge);
    } else {
      for (int64_t c = lane; c < k; c += threads) {
        const A v = load_float(cached ? cache[c] : x[c * w.logits_stride.cls]);
        const A q = w.general ? w.q_at(c, target, soft) : w.base;
        store_float(c == target ? gradient.at_target : gradient(v, q), g + c * w.grad_stride.cls);
      }
    }
    synchronise();  // of_warp and the cache are written again for the next row
  }
}

// ---- a thread per row

constexpr int kTileThreads = 128, kTileClasses = 64;  // of rows that lie one after another

struct Tile {
  enum Kind {
    kDense,
    kColumns,
    kDirect
  } kind;  // rows one after another; side by side; side by side, but too long for a tile
  bool read_words, write_words;
};

// Moves a tile, `runs` runs of neighbours, in or out, a word at a time where words are aligned.
template <bool kIn, class T>
__device__ __forceinline__ void move_tile(T* global, int64_t global_stride, T* tile, uint32_t tile_stride,
                                          uint32_t runs, uint32_t length, bool aligned) {
  constexpr uint32_t kSize = Word<T>::kSize;
  const uint32_t words = aligned ? length / kSize : 0, rest = length - words * kSize;
  for (uint32_t i = threadIdx.x; i < runs * words; i += blockDim.x) {
    const uint32_t run = i / words, at = (i - run * words) * kSize;
    uint4* outside = reinterpret_cast<uint4*>(global + run * global_stride + at);
    uint4* inside = reinterpret_cast<uint4*>(tile + run * tile_stride + at);
    if (kIn)
      *inside = *outside;
    else
      __stcg(outside, *inside);
  }
  for (uint32_t i = threadIdx.x; i < runs * rest; i += blockDim.x) {
    const uint32_t run = i / rest, at = words * kSize + i - run * rest;
    T* outside = global + run * global_stride + at;
    T* inside = tile + run * tile_stride + at;
    if (kIn)
      *inside = *outside;
    else
      *outside = *inside;
  }
}

// The row of one thread, from class `begin` round to it: logit(c) reads, put(c, value) writes its gradient.
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
  const auto q_at = [&](Index c) -> A { return !kPlain && w.general ? w.q_at(c, target, soft) : w.base; };
  RunningSoftmax<A> s = RunningSoftmax<A>::none();
  for_each_class([&](Index c) {
    const A x = logit(c);
    s.raise(x);
    s.add(x);
    if (sums_dot) s.add_target(x, q_at(c));
  });
  s.close();
  const RowGradient<A> gradient =
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
  const int64_t per_outer = (w.positions + threads - 1) / threads;  // tiles

  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const int64_t n = t / per_outer, first = (t - n * per_outer) * threads;
    const uint32_t count = uint32_t(w.positions - first < threads ? w.positions - first : threads);
    const T* x = w.logits + n * w.logits_stride.outer + first * w.logits_stride.position;
    G* g = w.grad ? w.grad + n * w.grad_stride.outer + first * w.grad_stride.position : nullptr;
    const uint32_t runs = dense ? 1 : uint32_t(k), length = dense ? count * uint32_t(k) : count;
    if (staged) {
      move_tile<true>(const_cast<T*>(x), w.logits_stride.cls, in, threads, runs, length, tile.read_words);
      __syncthreads();
    }
    if (mine < count) {
      const int64_t row = n * w.positions + first + mine;
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
    if (g) move_tile<false>(g, w.grad_stride.cls, out, threads, runs, length, tile.write_words);
    __syncthreads();  // the next tile is written where this one was read
  }
}

// ---- sums over rows, in a fixed order

enum Sum { kCount, kWeights, kLosses };

template <class A>
struct SumWork {
  const int64_t* target;
  const A* weight;
  const A* loss;
  int64_t rows, classes, ignore_index;
  Pair<A>* partial;  // one for each block
  A normaliser;      // of a mean over probabilities
  A* shared;         // {normaliser, 1 / normaliser}, made before the rows and read after them
  bool mean, hard, zero;
  void* result;
  DType result_dtype;

  template <Sum kSum>
  __device__ __forceinline__ A term(int64_t row) const {
    if (kSum == kLosses) return loss[row];
    const int64_t t = target[row];
    if (t == ignore_index) return A(0);
    return kSum == kCount ? A(1) : t >= 0 && t < classes ? weight[t] : A(0);
  }
  template <Sum kSum>
  __device__ __forceinline__ void finish(A sum) const {
    if (kSum == kLosses) {
      const A n = hard && mean ? shared[0] : normaliser;
      if (mean) sum = n == A(0) && zero ? A(0) : sum / n;
      store_as(result, result_dtype, 0, sum);
    } else {
      shared[0] = sum;
      shared[1] = sum == A(0) && zero ? A(0) : A(1) / sum;
    }
  }
};

// kLast: of the blocks' sums, in one block. Where one block took all rows, it is the last one too.
template <Sum kSum, bool kLast, class A>
__global__ void __launch_bounds__(kThreads) sum_rows(const SumWork<A> w, int blocks) {
  __shared__ Pair<A> of_warp[kWarps];
  Pair<A> sum{};
  if (kLast) {
    if (int(threadIdx.x) < blocks) sum = w.partial[threadIdx.x];
  } else {
    for (int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x; row < w.rows;
         row += int64_t(gridDim.x) * kThreads)
      sum.add({w.template term<kSum>(row), A(0)});
  }
  const auto add_lanes = [&] {
#pragma unroll
    for (int step = kLanes / 2; step; step /= 2)
      sum.add({__shfl_xor_sync(kAllLanes, sum.high, step), __shfl_xor_sync(kAllLanes, sum.low, step)});
  };
  add_lanes();
  if (threadIdx.x % kLanes == 0) of_warp[threadIdx.x / kLanes] = sum;
  __syncthreads();
  if (threadIdx.x >= kLanes) return;
  sum = int(threadIdx.x) < kWarps ? of_warp[threadIdx.x] : Pair<A>{};
  add_lanes();
  if (threadIdx.x) return;
  if (kLast || blocks == 1)
    w.template finish<kSum>(sum.value());
  else
    w.partial[blockIdx.x] = sum;
}
static_assert(kSumBlocks <= kThreads);

template <Sum kSum, class A>
int launch_sum(const SumWork<A>& w, void* stream) {
  const int64_t wanted = (w.rows + 8 * kThreads - 1) / (8 * kThreads);
  const int blocks = int(wanted < kSumBlocks ? wanted : kSumBlocks);
  const int error = launch(sum_rows<kSum, false, A>, unsigned(blocks), kThreads, 0, stream, w, blocks);
  return error || blocks == 1 ? error : launch(sum_rows<kSum, true, A>, 1, kThreads, 0, stream, w, blocks);
}

// ---- launches

// One run of rows where the memory of all tensors allows it.
CrossEntropyArgs merge_rows(CrossEntropyArgs a) {
  const auto merges = [&](const CrossEntropyArgs::Strides& s) { return s.outer == s.position * a.positions; };
  if (a.outer > 1 && merges(a.logits_stride) && (!a.grad || merges(a.grad_stride)) &&
      (!a.soft_target || merges(a.target_stride))) {
    a.positions *= a.outer;
    a.outer = 1;
  }
  return a;
}

template <class T, class G>
int launch_rows(const CrossEntropyArgs& a, const RowsWork<T, G>& w, void* stream) {
  if (w.rows == 0) return cudaSuccess;
  const auto &x = a.logits_stride, &g = a.grad_stride;
  const int64_t k = a.classes;
  const size_t most = most_shared();
  constexpr int kSize = Word<T>::kSize;

  const size_t of_class = sizeof(T) + (a.grad && !std::is_same_v<T, G> ? sizeof(G) : 0);
  const bool dense = a.outer == 1 && k <= kTileClasses && !a.soft_target && x.cls == 1 && x.position == k &&
                     (!a.grad || (g.cls == 1 && g.position == k));
  const bool columns =
      x.position == 1 && x.cls != 1 && (!a.grad || g.position == 1) && a.positions >= kLanes / 2;
  if (dense || columns) {
    const auto fits = [&](int64_t threads) { return size_t(k) <= most / (size_t(threads) * of_class); };
    Tile tile{dense ? Tile::kDense : Tile::kColumns, word_aligned(a.logits), word_aligned(a.grad)};
    int64_t threads = fits(kTileThreads) ? kTileThreads : kLanes;
    if (!fits(threads)) {
      tile.kind = Tile::kDirect;
      threads = kTileThreads;
    }
    if (!dense) {
      tile.read_words = tile.read_words && x.cls % kSize == 0 && (a.outer <= 1 || x.outer % kSize == 0);
      tile.write_words =
          tile.write_words && g.cls % Word<G>::kSize == 0 && (a.outer <= 1 || g.outer % Word<G>::kSize == 0);
    }
    const int64_t tiles = a.outer * ((a.positions + threads - 1) / threads);
    return launch(cross_entropy_tiles<T, G>, blocks_for(tiles, 1), unsigned(threads),
                  tile.kind == Tile::kDirect ? 0 : size_t(threads * k) * of_class, stream, w, tile, tiles);
  }

  // Words of the logits must be words of the gradient, in every row.
  constexpr int kPhase = Word<G>::kSize;
  const auto phase = [](const void* p, size_t size) {
    return int64_t(reinterpret_cast<uintptr_t>(p) / size % kPhase);
  };
  const bool in_phase = !a.grad || (g.cls == 1 && phase(a.logits, sizeof(T)) == phase(a.grad, sizeof(G)) &&
                                    (x.position - g.position) % kPhase == 0 &&
                                    (a.outer <= 1 || (x.outer - g.outer) % kPhase == 0));
  constexpr bool kMayBeWords = sizeof(T) < 8;  // of float64 a lane's one element is as good
  const bool words = kMayBeWords && !w.general && x.cls == 1 && in_phase;
  const int64_t work = words ? k / kSize : k / 4;  // a lane has about 4 to 16 words
  const int wanted = work <= 128 ? 32 : work <= 1024 ? 128 : work <= 4096 ? 256 : 512;
  const int threads = wanted < kMostRowThreads<T> ? wanted : kMostRowThreads<T>;
  const int in_block = threads == kLanes ? 4 : 1;
  const size_t room = size_t(in_block) * size_t((k + kSize - 1) / kSize) * 16;
  const size_t reserved = 2048;  // of_warp, and what the driver takes
  const bool cached = a.grad && size_t(k) <= most && room + reserved <= most;
  const auto kernel = words ? cross_entropy_rows<T, G, kMayBeWords> : cross_entropy_rows<T, G, false>;
  return launch(kernel, blocks_for(w.rows, in_block), unsigned(threads * in_block), cached ? room : 0, stream,
                w, threads, cached);
}

template <class T, class G>
int run(const CrossEntropyLaunch& l, void* stream) {
  using A = typename Accumulate<T>::type;
  const CrossEntropyArgs a = merge_rows(l.rows);
  RowsWork<T, G> w(a);
  A* const scratch = static_cast<A*>(l.scratch);
  const bool mean = l.reduction == 1, reduced = l.reduction != 0, hard = !a.soft_target;
  w.factor = 1;
  w.lse = static_cast<A*>(l.lse);
  w.loss = l.loss;
  w.loss_dtype = l.loss_dtype;
  SumWork<A> sum{};
  if (reduced) {
    sum.target = a.target;
    sum.weight = w.weight;
    sum.rows = w.rows;
    sum.classes = a.classes;
    sum.ignore_index = a.ignore_index;
    sum.shared = scratch;
    sum.partial = reinterpret_cast<Pair<A>*>(scratch + 2);
    sum.loss = scratch + 2 + 2 * kSumBlocks;
    sum.normaliser = A(w.rows);
    sum.mean = mean;
    sum.hard = hard;
    sum.zero = l.all_ignored_zero;
    sum.result = l.loss;
    sum.result_dtype = l.loss_dtype;
    w.loss = scratch + 2 + 2 * kSumBlocks;
    w.loss_dtype = std::is_same_v<A, double> ? DType::kFloat64 : DType::kFloat32;
  }
  int error = cudaSuccess;
  if (mean && hard) {
    w.shared_factor = scratch + 1;
    error = w.weight ? launch_sum<kWeights>(sum, stream) : launch_sum<kCount>(sum, stream);
  } else if (mean) {
    w.factor = A(1. / double(w.rows));
  }
  if (!error) error = launch_rows(a, w, stream);
  if (!error && reduced) error = launch_sum<kLosses>(sum, stream);
  return error;
}

template <class T, class A>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_scale(T* values, int64_t numel, const void* factor_at, DType factor_dtype, bool aligned) {
  const A factor = load_as<A>(factor_at, factor_dtype, 0);
  if (factor == A(1)) return;
  constexpr int kSize = Word<T>::kSize;
  const int64_t words = aligned ? numel / kSize : 0, thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  for (int64_t i = thread; i < words; i += threads) {
    Word<T> word = load_word(values + i * kSize);
#pragma unroll
    for (int j = 0; j < kSize; ++j) store_float(load_float(word.value[j]) * factor, &word.value[j]);
    store_word(values + i * kSize, word);
  }
  for (int64_t i = words * kSize + thread; i < numel; i += threads)
    store_float(load_float(values[i]) * factor, values + i);
}

}  // namespace

int cross_entropy_forward_cuda(const CrossEntropyLaunch& l, void* stream) {
  return with_dtype(l.rows.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    // A float16 gradient is kept in float32: its small values would vanish before a loss scale could lift
    // them.
    using G = std::conditional_t<std::is_same_v<T, Half>, float, T>;
    return l.rows.grad == l.rows.logits ? run<T, T>(l, stream) : run<T, G>(l, stream);
  });
}

int cross_entropy_scale_cuda(const CrossEntropyScale& a, void* stream) {
  return with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool aligned = word_aligned(a.values);
    // Few blocks, each with several words for a thread: mostly they only look at the factor.
    const unsigned blocks = blocks_for(a.numel, int64_t(kThreads) * 16 * Word<T>::kSize);
    return launch(cross_entropy_scale<T, typename Accumulate<T>::type>, blocks, kThreads, 0, stream,
                  static_cast<T*>(a.values), a.numel, a.factor, a.factor_dtype, aligned);
  });
}

}  // namespace fastreg
