// Sums of squares on the CPU. Bytes per float32 element: 4, the floor.
#include <type_traits>

#include "../common/simd.h"
#include "sum_of_squares_math.h"

namespace fastreg::FASTREG_ISA {
namespace {

// Four sums hide the latency of the addition.
template <class T>
FR_INLINE double sum_block(const T* x, int64_t count) {
  using A = typename Accumulate<T>::type;
  using V = Vec<A>;
  constexpr int lanes = V::kLanes;
  V sums[4] = {V(0), V(0), V(0), V(0)};
  int64_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes)
    for (int k = 0; k < 4; ++k) {
      const V v = load(x + i + k * lanes);
      sums[k] = sums[k] + v * v;
    }
  for_each_vector<A>(count - i, [&](int64_t j, int n) __attribute__((always_inline)) {
    const V v = load(x + i + j, n);
    sums[0] = sums[0] + v * v;
  });
  return double(((sums[0] + sums[1]) + (sums[2] + sums[3])).sum());
}

double sum(const SquaresTensor& t, int64_t begin, int64_t end) {
  return with_dtype(t.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T buffer[kBlock];
    double total = 0;
    for (int64_t block = begin; block < end; block += kBlock) {
      const int64_t next = end - block < kBlock ? end : block + kBlock;
      total +=
          sum_block(read_block(t.layout, static_cast<const T*>(t.data), block, next, buffer), next - block);
    }
    return total;
  });
}

}  // namespace

extern const SquaresKernels squares_kernels;
const SquaresKernels squares_kernels = {sum};

}  // namespace fastreg::FASTREG_ISA
