// Sums of squares on the CPU. Bytes per float32 element: 4, the floor.
#include <type_traits>

#include "../common/flush_mode.h"
#include "sum_of_squares_math.h"

namespace fastreg::FASTREG_ISA {
namespace {

// A square below 2^-126 counts as 0 in flush mode. Where a block's sum is so small that this could show in
// its digits, the block is added once more with its elements multiplied by 2^64.
constexpr double kLift = 0x1p64, kEnough = 0x1p-90;

// Four sums hide the latency of the addition.
template <bool kScaled, class T>
FR_INLINE double sum_block(const T* x, int64_t count) {
  using A = typename Accumulate<T>::type;
  using V = Vec<A>;
  const V scale(A(kScaled ? kLift : 1));
  constexpr int lanes = V::kLanes;
  V sums[4] = {V(0), V(0), V(0), V(0)};
  int64_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes)
    for (int k = 0; k < 4; ++k) {
      V v = load(x + i + k * lanes);
      if (kScaled) v = v * scale;
      sums[k] = sums[k] + v * v;
    }
  for_each_vector<A>(count - i, [&](int64_t j, int n) __attribute__((always_inline)) {
    V v = load(x + i + j, n);
    if (kScaled) v = v * scale;
    sums[0] = sums[0] + v * v;
  });
  return double(((sums[0] + sums[1]) + (sums[2] + sums[3])).sum());
}

double sum(const SquaresTensor& t, int64_t begin, int64_t end) {
  return with_dtype(t.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = typename Accumulate<T>::type;
    const FlushMode<A> mode;
    T buffer[kBlock];
    double total = 0;
    for (int64_t block = begin; block < end; block += kBlock) {
      const int64_t next = end - block < kBlock ? end : block + kBlock;
      const T* x = read_block(t.layout, static_cast<const T*>(t.data), block, next, buffer);
      double found = sum_block<false>(x, next - block);
      if constexpr (std::is_same_v<A, float>)
        if (found < kEnough) found = sum_block<true>(x, next - block) / (kLift * kLift);
      total += found;
    }
    return total;
  });
}

}  // namespace

extern const SquaresKernels squares_kernels;
const SquaresKernels squares_kernels = {sum};

}  // namespace fastreg::FASTREG_ISA
