// The example on the CPU. The formula is in example_math.h.
// Bytes per float32 element: x is read and y is written, 8, which is the floor.
//
// Here belongs the loop over raw pointers. This file is compiled once per instruction set, each time into the
// namespace of that set; what it includes must be inlined, so that no function of a wide set is linked into
// the code of a narrow one. It starts no threads: its caller gives each thread a span of elements.
#include <type_traits>

#include "../common/simd.h"
#include "example_math.h"

namespace fastreg::FASTREG_ISA {
namespace {

// A strided tensor passes through a buffer, one block after the other; a contiguous one is read and written
// in place. The block's last vector may be a part of one.
template <class T>
void scale_blocks(const ExampleArgs& a, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  const Vec<A> factor{A(a.factor)};
  T input_buffer[kBlock], output_buffer[kBlock];
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t n = end - block < kBlock ? end - block : kBlock;
    const T* x = read_block(a.input_layout, static_cast<const T*>(a.input), block, block + n, input_buffer);
    T* y = block_to_write(a.output_layout, static_cast<T*>(a.output), block, output_buffer);
    for_each_vector<A>(n, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      store(y + i, example_element(load(x + i, lanes), factor), lanes);
    });
    write_block(a.output_layout, static_cast<T*>(a.output), block, block + n, y);
  }
}

void scale(const ExampleArgs& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype,
             [&](auto* type) { scale_blocks<std::remove_pointer_t<decltype(type)>>(a, begin, end); });
}

}  // namespace

extern const ExampleKernels example_kernels;
const ExampleKernels example_kernels = {scale};

}  // namespace fastreg::FASTREG_ISA
