// Smoothed cross-entropy on CUDA with its gradient written in the same sweep: launches, and the sums over
// rows; formula in cross_entropy_math.h. Bytes per 16-bit logit: reads 2, writes 2, once each, where the row
// fits in shared memory (227 KiB on an H100, 163 on an A100); a longer row is read twice. float32: 4 for 2;
// the gradient of float16 is float32. Probabilities as targets are read twice. Per row: 8 of its class index,
// 4 of lse, 4 of loss; for a mean or sum another 4, for a mean another 8.
//
// Rows are shared out in two ways:
//   cross_entropy_warp_cuda.h    a warp or a block for each row
//   cross_entropy_thread_cuda.h  a thread for each row: few classes, or rows side by side
// cross_entropy_sharded_cuda.h has the rows of a rank that has some of the classes.
// Every sum has a fixed order: the same input gives the same bits.
//
// The loss is within 2 ulp of the exact one where several classes share the mass. Where one has nearly all of
// it the loss is a small exp(x - top), and the rounding of x - top adds as many ulp as the logits lie apart:
// none for 16-bit logits, whose differences are exact, 20 for float32 logits 20 apart.
//
// A class index out of range: NaN as that row's loss and gradient; without NDEBUG an assertion names the op.
#include <type_traits>

#include "../common/cuda.h"
#include "cross_entropy_math.h"
#include "cross_entropy_row_cuda.h"
#include "cross_entropy_sharded_cuda.h"
#include "cross_entropy_thread_cuda.h"
#include "cross_entropy_warp_cuda.h"

namespace fastreg {
inline namespace cross_entropy_kernels {

// ---- sums over rows, in a fixed order

enum Sum { kCount, kWeights, kLosses };

template <class A>
struct SumWork {
  const int64_t* target;
  const A* weight;
  const A* loss;
  int64_t rows, classes, ignore_index;
  Compensated<A>* partial;  // one for each block
  A normaliser;             // of a mean over probabilities
  A* shared;                // {normaliser, 1 / normaliser}, made before the rows and read after them
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

// kLast: one block adds up the sums of the others. Where one block took all rows, it is the last one too.
template <Sum kSum, bool kLast, class A>
__global__ void __launch_bounds__(kThreads) sum_rows(const SumWork<A> w, int blocks) {
  __shared__ Compensated<A> of_warp[kWarps];
  Compensated<A> sum{};
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
  sum = int(threadIdx.x) < kWarps ? of_warp[threadIdx.x] : Compensated<A>{};
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

// Takes the rows of all batch elements as one sequence where the strides of every tensor allow it.
CrossEntropyArgs merge_rows(CrossEntropyArgs a) {
  const auto merges = [&](const CrossEntropyArgs::Strides& s) { return s.outer == s.inner * a.inner; };
  if (a.outer > 1 && merges(a.logits_stride) && (!a.grad || merges(a.grad_stride)) &&
      (!a.soft_target || merges(a.target_stride))) {
    a.inner *= a.outer;
    a.outer = 1;
  }
  return a;
}

// Whether a thread is to take a row, as a block has it in a tile or side by side with its neighbours.
template <class T, class G>
bool fits_threads(const CrossEntropyArgs& a, bool dense) {
  const auto &x = a.logits_stride, &g = a.grad_stride;
  if (dense)
    return a.outer == 1 && a.classes <= kTileClasses && !a.soft_target && x.cls == 1 &&
           x.inner == a.classes && (!a.grad || (g.cls == 1 && g.inner == a.classes));
  return x.inner == 1 && x.cls != 1 && (!a.grad || g.inner == 1) && a.inner >= kLanes / 2;
}

template <class T, class G>
int launch_threads(const CrossEntropyArgs& a, const RowsWork<T, G>& w, bool dense, void* stream) {
  const auto &x = a.logits_stride, &g = a.grad_stride;
  const int64_t k = a.classes;
  const size_t most = most_shared(), of_class = sizeof(T) + (a.grad && !std::is_same_v<T, G> ? sizeof(G) : 0);
  const auto fits = [&](int64_t threads) { return size_t(k) <= most / (size_t(threads) * of_class); };
  Tile tile{dense ? Tile::kDense : Tile::kColumns, word_aligned(a.logits), word_aligned(a.grad)};
  int64_t threads = fits(kTileThreads) ? kTileThreads : kLanes;
  if (!fits(threads)) {
    tile.kind = Tile::kDirect;
    threads = kTileThreads;
  }
  if (!dense) {
    constexpr int kReads = Word<T>::kSize, kWrites = Word<G>::kSize;
    tile.read_words = tile.read_words && x.cls % kReads == 0 && (a.outer <= 1 || x.outer % kReads == 0);
    tile.write_words = tile.write_words && g.cls % kWrites == 0 && (a.outer <= 1 || g.outer % kWrites == 0);
  }
  const int64_t tiles = a.outer * ((a.inner + threads - 1) / threads);
  return launch(cross_entropy_tiles<T, G>, blocks_for(tiles, 1), unsigned(threads),
                tile.kind == Tile::kDirect ? 0 : size_t(threads * k) * of_class, stream, w, tile, tiles);
}

template <class T, class G>
int launch_warps(const CrossEntropyArgs& a, const RowsWork<T, G>& w, void* stream) {
  constexpr int kSize = Word<T>::kSize;
  const auto [words, threads, in_block] = row_threads<T, G>(a, w);
  const int64_t k = a.classes;
  const size_t room = size_t(in_block) * size_t((k + kSize - 1) / kSize) * 16, most = most_shared();
  const size_t reserved = 2048;  // of_warp, and what the driver takes
  const bool cached = a.grad && size_t(k) <= most && room + reserved <= most;
  const auto kernel = words ? cross_entropy_rows<T, G, (sizeof(T) < 8)> : cross_entropy_rows<T, G, false>;
  return launch(kernel, blocks_for(w.rows, in_block), unsigned(threads * in_block), cached ? room : 0, stream,
                w, threads, cached);
}

template <class T, class G>
int launch_rows(const CrossEntropyArgs& a, const RowsWork<T, G>& w, void* stream) {
  if (w.rows == 0) return cudaSuccess;
  const bool dense = fits_threads<T, G>(a, true);
  return dense || fits_threads<T, G>(a, false) ? launch_threads(a, w, dense, stream)
                                               : launch_warps(a, w, stream);
}

template <class T, class G>
int launch_forward(const CrossEntropyLaunch& l, void* stream) {
  using A = typename Accumulate<T>::type;
  const CrossEntropyArgs a = merge_rows(l.rows);
  RowsWork<T, G> w(a);
  A* const scratch = static_cast<A*>(l.scratch);
  const bool mean = l.reduction.kind == CrossEntropyReduction::kMean, hard = !a.soft_target;
  const bool reduced = l.reduction.kind != CrossEntropyReduction::kNone;
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
    sum.partial = reinterpret_cast<Compensated<A>*>(scratch + 2);
    sum.loss = scratch + 2 + 2 * kSumBlocks;
    sum.normaliser = A(w.rows);
    sum.mean = mean;
    sum.hard = hard;
    sum.zero = l.reduction.all_ignored_zero;
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
  const auto scaled = [&](A x) { return scaled_gradient(x, factor); };
  for (int64_t i = thread; i < words; i += threads) {
    Word<T> word = load_word(values + i * kSize);
#pragma unroll
    for (int j = 0; j < kSize; ++j) store_float(scaled(load_float(word.value[j])), &word.value[j]);
    store_word(values + i * kSize, word);
  }
  for (int64_t i = words * kSize + thread; i < numel; i += threads)
    store_float(scaled(load_float(values[i])), values + i);
}

}  // namespace cross_entropy_kernels

int cross_entropy_forward_cuda(const CrossEntropyLaunch& l, void* stream) {
  return with_dtype(l.rows.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    // A float16 gradient is kept in float32: its small values would vanish before a loss scale could lift
    // them.
    using G = std::conditional_t<std::is_same_v<T, Half>, float, T>;
    return l.rows.grad == l.rows.logits ? launch_forward<T, T>(l, stream) : launch_forward<T, G>(l, stream);
  });
}

int cross_entropy_sharded_sums_cuda(const ShardedArgs& a, void* stream) {
  return with_dtype(a.dtype, [&](auto* type) {
    return launch_sharded_sums<std::remove_pointer_t<decltype(type)>>(a, stream);
  });
}

int cross_entropy_sharded_gradient_cuda(const ShardedArgs& a, void* stream) {
  return with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using G = std::conditional_t<std::is_same_v<T, Half>, float, T>;
    return a.grad == a.logits ? launch_sharded_gradient<T, T>(a, stream)
                              : launch_sharded_gradient<T, G>(a, stream);
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
