// Attention's sweeps over a block of scores on the CPU. The formulas are in attention_math.h.
// Bytes per float32 score: forward reads and writes 4 each; backward reads and writes 8 each, the floor of a
// sweep. The block is in the cache, where the matrix product before has left it, and a row is in the first
// level of it from the first loop over the row to the last.
#include <type_traits>

#include "../common/flush.h"
#include "../common/flush_mode.h"
#include "../dropout/dropout_draw_cpu.h"
#include "attention_math.h"

namespace fastreg::FASTREG_ISA {
namespace {

// One row of a block.
template <class A>
struct Row {
  A *scores, *dropped, *d_scores;
  const A* gradients;
  int64_t head, row;  // its numbers in the block
  int64_t seen;       // how many columns its query may see
  uint64_t first;     // the number of the decision about its first weight
};

template <class A>
FR_INLINE Row<A> row_of(const AttentionArgs& a, int64_t number) {
  Row<A> r;
  const int64_t start = number * a.columns;
  r.scores = static_cast<A*>(a.scores) + start;
  r.dropped = a.dropped ? static_cast<A*>(a.dropped) + start : nullptr;
  r.d_scores = a.gradients ? static_cast<A*>(a.d_scores) + start : nullptr;
  r.gradients = a.gradients ? static_cast<const A*>(a.gradients) + start : nullptr;
  r.head = number / a.rows;
  r.row = number % a.rows;
  r.seen = a.query >= 0 && a.query + r.row + 1 < a.columns ? a.query + r.row + 1 : a.columns;
  r.first = uint64_t(a.first_row + number) * uint64_t(a.keys);
  return r;
}

template <class A, class T>
FR_INLINE void read_mask(const T* mask, int64_t stride, int64_t count, A* out) {
  if (stride == 1)
    for (int64_t j = 0; j < count; ++j) out[j] = A(to_float(mask[j]));
  else
    for (int64_t j = 0; j < count; ++j) out[j] = A(to_float(mask[j * stride]));
}

// What is added to the scores in columns [begin, begin + count) of a row, as contiguous memory.
template <class A>
const A* mask_block(const AttentionArgs& a, const Row<A>& r, int64_t begin, int64_t count, A* buffer) {
  const int64_t stride = a.mask_stride[2];
  const int64_t offset = r.head * a.mask_stride[0] + r.row * a.mask_stride[1] + begin * stride;
  if (a.mask_is_bool) {
    const auto* seen = static_cast<const uint8_t*>(a.mask) + offset;
    const A out_of_sight = -A(HUGE_VAL);
    for (int64_t j = 0; j < count; ++j) buffer[j] = seen[j * stride] ? A(0) : out_of_sight;
    return buffer;
  }
  if (a.mask_dtype == a.dtype && stride == 1) return static_cast<const A*>(a.mask) + offset;
  with_dtype(a.mask_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    read_mask(static_cast<const T*>(a.mask) + offset, stride, count, buffer);
  });
  return buffer;
}

// Adds the mask to the scores that are seen, where there is one.
template <class A>
FR_INLINE void add_mask(const AttentionArgs& a, const Row<A>& r) {
  if (!a.mask) return;
  A buffer[kBlock];
  for (int64_t block = 0; block < r.seen; block += kBlock) {
    const int64_t n = r.seen - block < kBlock ? r.seen - block : kBlock;
    const A* more = mask_block(a, r, block, n, buffer);
    for_each_vector<A>(n, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      store(r.scores + block + i, load(r.scores + block + i, lanes) + load(more + i, lanes), lanes);
    });
  }
}

// f(column, lanes, which of the lanes are kept) over the columns that are seen.
template <class A, class F>
FR_INLINE void for_each_weight(const AttentionArgs& a, const Row<A>& r, F f) {
  using V = Vec<A>;
  for (int64_t block = 0; block < r.seen; block += kBlock) {
    const int64_t n = r.seen - block < kBlock ? r.seen - block : kBlock;
    uint8_t bits[kBlock / 8 + 1];
    draw_bytes(a.seed.get(), a.threshold, r.first + uint64_t(block), (n + 7) / 8, bits);
    for_each_vector<A>(n, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      uint32_t kept = bits[i / 8];
      if (V::kLanes == 16 && lanes > 8) kept |= uint32_t(bits[i / 8 + 1]) << 8;
      f(block + i, lanes, V::from_bits(kept));
    });
  }
}

template <class A>
void weights_of_row(const AttentionArgs& a, int64_t number) {
  using V = Vec<A>;
  const Row<A> r = row_of<A>(a, number);
  constexpr A kLowest = std::is_same_v<A, float> ? A(-0x1.fffffep127) : A(-0x1.fffffffffffffp1023);
  add_mask(a, r);
  V most(kLowest);  // not -inf, from which -inf could not be subtracted
  for_each_vector<A>(r.seen, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    most = maximum(load(r.scores + i, lanes, kLowest), most);
  });
  const A largest = most.max();
  const V minus(largest), factor{A(a.factor)};
  V sum(0);
  for_each_weight(a, r, [&](int64_t i, int lanes, auto kept) __attribute__((always_inline)) {
    const V weight = exp_nonpositive(load(r.scores + i, lanes, -A(HUGE_VAL)) - minus);
    sum = sum + weight;
    store(r.dropped + i, select(kept, weight * factor, V(0)), lanes);
  });
  memset(r.dropped + r.seen, 0, size_t(a.columns - r.seen) * sizeof(A));
  const A found = sum.sum(), total = found < 1 ? A(1) : found;  // 0 if all are -inf; NaN stays
  static_cast<A*>(a.largest)[number] = largest;
  static_cast<A*>(a.total)[number] = total;
  if (!a.normalised) return;
  const V inverse(1 / total);
  for_each_vector<A>(r.seen, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    store(r.dropped + i, load(r.dropped + i, lanes) * inverse, lanes);
  });
}

// It goes over the row twice: once for the sum of D * P and the weights, where a minus marks those that are
// dropped, and once for the results.
template <class A>
void gradient_of_row(const AttentionArgs& a, int64_t number) {
  using V = Vec<A>;
  const Row<A> r = row_of<A>(a, number);
  add_mask(a, r);
  const A total = static_cast<const A*>(a.total)[number];
  const V minus(static_cast<const A*>(a.largest)[number]), factor{A(a.factor)}, zero(0);
  // With `normalised`, P has not been divided by the sum yet.
  const V dropped_factor(a.normalised ? A(a.factor) / total : A(a.factor));
  const auto weight = [&](int64_t i, int lanes) __attribute__((always_inline)) {
    return exp_nonpositive(load(r.scores + i, lanes, -A(HUGE_VAL)) - minus);
  };
  if (r.dropped) memset(r.dropped + r.seen, 0, size_t(a.columns - r.seen) * sizeof(A));
  if (!r.gradients)
    return for_each_weight(a, r, [&](int64_t i, int lanes, auto kept) __attribute__((always_inline)) {
      store(r.dropped + i, select(kept, weight(i, lanes) * factor, zero), lanes);
    });
  A* const marked = r.dropped ? r.dropped : r.d_scores;
  V sum(0);
  for_each_weight(a, r, [&](int64_t i, int lanes, auto kept) __attribute__((always_inline)) {
    const V w = weight(i, lanes);
    sum = sum + select(kept, w * dropped_factor * load(r.gradients + i, lanes), zero);
    store(marked + i, select(kept, w, zero - w), lanes);
  });
  const V share(sum.sum() / total);
  for_each_vector<A>(r.seen, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    const V w = load(marked + i, lanes);
    const auto kept = zero < w;
    const V product = select(kept, w * dropped_factor * load(r.gradients + i, lanes), zero);
    if (r.dropped) store(r.dropped + i, select(kept, w * factor, zero), lanes);
    store(r.d_scores + i, flush_result(product - maximum(w, zero - w) * share), lanes);
  });
  memset(r.d_scores + r.seen, 0, size_t(a.columns - r.seen) * sizeof(A));
}

template <class A, class F>
void for_each_row(int64_t begin, int64_t end, F f) {
  const FlushMode<A> mode;
  for (int64_t number = begin; number < end; ++number) f(A(), number);
}
template <class F>
void for_each_row(const AttentionArgs& a, int64_t begin, int64_t end, F f) {
  a.dtype == DType::kFloat64 ? for_each_row<double>(begin, end, f) : for_each_row<float>(begin, end, f);
}

void weights(const AttentionArgs& a, int64_t begin, int64_t end) {
  for_each_row(a, begin, end, [&](auto type, int64_t i) { weights_of_row<decltype(type)>(a, i); });
}

void gradient(const AttentionArgs& a, int64_t begin, int64_t end) {
  for_each_row(a, begin, end, [&](auto type, int64_t i) { gradient_of_row<decltype(type)>(a, i); });
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {weights, gradient};

}  // namespace fastreg::FASTREG_ISA
