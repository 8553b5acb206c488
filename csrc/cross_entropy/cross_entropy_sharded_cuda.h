// Cross-entropy of a rank's classes on CUDA, a warp or a block for each row; formula and arguments as in
// cross_entropy_sharded.h; only cross_entropy_cuda.cu includes it. Bytes per 16-bit logit: 2 read before the
// message, 2 read and 2 written after it.
#pragma once
#include "../common/cuda.h"
#include "cross_entropy_row_cuda.h"
#include "cross_entropy_sharded.h"
#include "cross_entropy_warp_cuda.h"

namespace fastreg {
inline namespace cross_entropy_kernels {

// A row as one of its threads sees it: its target is that of TargetHere.
template <class T, class G, bool kWords>
__device__ __forceinline__ SharedRow<T, G, kWords> sharded_row(const RowsWork<T, G>& w, int64_t row, int rank,
                                                               int threads) {
  SharedRow<T, G, kWords> r{w,
                            w.logits + row * w.logits_stride.inner,
                            w.grad ? w.grad + row * w.grad_stride.inner : nullptr,
                            nullptr,
                            false,
                            rank,
                            threads,
                            w.soft ? int64_t(kElsewhere) : w.target[row],
                            w.soft ? row * w.soft_stride.inner : 0};
  r.find_words();
  return r;
}

template <class T, bool kWords, class A = typename Accumulate<T>::type>
__global__ void __launch_bounds__(kMostRowThreads<T>)
    cross_entropy_sharded_sums(const RowsWork<T, T> w, A* sums, int threads) {
  __shared__ RunningSoftmax<A> of_warp[kMostRowThreads<T> / kLanes];
  const int rank = int(threadIdx.x) % threads, in_block = int(blockDim.x) / threads;
  for (int64_t row = int64_t(blockIdx.x) * in_block + int(threadIdx.x) / threads; row < w.rows;
       row += int64_t(gridDim.x) * in_block) {
    SharedRow<T, T, kWords> r = sharded_row<T, T, kWords>(w, row, rank, threads);
    const int64_t target = r.target;
    if (target == kUncounted) {
      if (rank == 0)
        for (int64_t i = 0; i < kSums; ++i) sums[i * w.rows + row] = A(0);
      continue;
    }
    const bool massless = w.options.target_mass == A(0);
    if (!massless) r.target = kElsewhere;  // the sweep leaves out what it takes for the target
    RunningSoftmax<A> s = RunningSoftmax<A>::none();
    if (kWords)
      r.sweep_words(s, r.has_edge ? A(load_float(r.x[r.edge])) : A(0));
    else
      r.sweep_elements(s);
    s = combine_threads(s, w.sums_dot(), of_warp, rank, threads);
    if (rank == 0) {
      const A at_target =
          target >= 0 && !massless ? A(load_float(r.x[target * w.logits_stride.cls])) - s.origin : A(0);
      sums[row] = s.top;
      sums[w.rows + row] = s.rest.value();
      sums[2 * w.rows + row] = w.soft ? s.dot.value() : at_target;
      sums[3 * w.rows + row] = w.soft ? s.mass.value() : s.dot.value();
    }
    threads > kLanes ? __syncthreads() : __syncwarp();  // of_warp is written again for the next row
  }
}

// What SharedRow writes for a class whose target is a probability.
template <class A>
struct SoftClassGradient {
  SoftGradient<A> gradient;
  A top, at_target;  // the latter of no class

  __device__ __forceinline__ A operator()(A x, A q) const { return gradient(exponential(x - top), q); }
};

template <class T, class G, bool kWords, class A = typename Accumulate<T>::type>
__global__ void __launch_bounds__(kMostRowThreads<T>)
    cross_entropy_sharded_gradient(const RowsWork<T, G> w, const A* whole_rows, int threads) {
  const int rank = int(threadIdx.x) % threads, in_block = int(blockDim.x) / threads;
  for (int64_t row = int64_t(blockIdx.x) * in_block + int(threadIdx.x) / threads; row < w.rows;
       row += int64_t(gridDim.x) * in_block) {
    const SharedRow<T, G, kWords> r = sharded_row<T, G, kWords>(w, row, rank, threads);
    if (r.target == kUncounted) {
      r.write_zeros();
      continue;
    }
    const WholeRow<A> whole(whole_rows, w.rows, row);
    const RowSums<A> sums = whole.sums();
    RowTarget<A> t{};
    if (r.target >= 0) {
      t.shifted = A(load_float(r.x[r.target * w.logits_stride.cls])) - whole.top;
      t.exp_shifted = exponential(t.shifted);
      t.q = (w.weight ? w.weight[r.target] : A(1)) * w.options.target_mass;
    }
    // The gradient may overwrite the logits, and every thread of the row reads that of the target.
    threads > kLanes ? __syncthreads() : __syncwarp();
    const RowGradient<A> g = pulled_gradient(sums, t, whole.pull, whole.factor, TimesReciprocal{});
    if (w.soft) {
      const A of_sum = whole.factor * reciprocal(sums.sum);
      r.write_elements(SoftClassGradient<A>{{g.softmax_factor, whole.factor, whole.mass, whole.rest, sums.sum,
                                             of_sum * whole.mass, of_sum * whole.pull},
                                            whole.top,
                                            A(0)});
    } else {
      const ClassGradient<A> gradient{whole.top, g.softmax_factor, whole.factor, g.at_target};
      if (kWords)
        r.write_words(gradient, r.has_edge ? A(load_float(r.x[r.edge])) : A(0));
      else
        r.write_elements(gradient);
    }
  }
}

template <class T>
int launch_sharded_sums(const ShardedArgs& a, void* stream) {
  const RowsWork<T, T> w(a);
  const RowThreads t = row_threads<T, T>(a, w);
  const auto kernel =
      t.words ? cross_entropy_sharded_sums<T, (sizeof(T) < 8)> : cross_entropy_sharded_sums<T, false>;
  return launch(kernel, blocks_for(w.rows, t.rows_in_block), unsigned(t.threads * t.rows_in_block), 0, stream,
                w, static_cast<typename Accumulate<T>::type*>(a.sums), t.threads);
}

template <class T, class G>
int launch_sharded_gradient(const ShardedArgs& a, void* stream) {
  const RowsWork<T, G> w(a);
  const RowThreads t = row_threads<T, G>(a, w);
  const auto kernel = t.words ? cross_entropy_sharded_gradient<T, G, (sizeof(T) < 8)>
                              : cross_entropy_sharded_gradient<T, G, false>;
  return launch(kernel, blocks_for(w.rows, t.rows_in_block), unsigned(t.threads * t.rows_in_block), 0, stream,
                w, static_cast<const typename Accumulate<T>::type*>(a.whole), t.threads);
}

}  // namespace cross_entropy_kernels
}  // namespace fastreg
