// Arithmetic without numbers below the smallest normal one, for kernels that store zeros in their place
// anyway (flush.h). A processor takes some 150 cycles for a product with such a number in it, or as its
// result, where it takes four for another. In this mode it takes zeros instead, in no time. What is loaded
// and stored without arithmetic stays as it is.
//
// The CUDA kernels of the optimisers and of augmentation are compiled with -ftz=true, which means the same.
#pragma once
#include "simd.h"

namespace fastreg::FASTREG_ISA {

// Of the thread that made it, as long as it lives and if it is on. A is the type of the arithmetic: float64
// stays as it is.
template <class A>
class FlushMode {
 public:
  explicit FlushMode(bool on = true) : before_(get()) { set(on ? before_ | kBits : before_); }
  ~FlushMode() { set(before_); }
  FlushMode(const FlushMode&) = delete;
  FlushMode& operator=(const FlushMode&) = delete;

 private:
  // The clobber keeps the compiler from moving loads and stores, and what is computed between them, across.
#if defined(__SSE2__)
  using Word = unsigned;
  static constexpr Word kBits = 0x8040;  // flush to zero, denormals are zero
  static Word get() { return _mm_getcsr(); }
  static void set(Word word) {
    asm volatile("" ::: "memory");
    _mm_setcsr(word);
    asm volatile("" ::: "memory");
  }
#elif defined(__aarch64__)
  using Word = uint64_t;
  static constexpr Word kBits = Word(1) << 24;  // FZ, which is both
  static Word get() {
    Word word;
    asm volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static void set(Word word) { asm volatile("msr fpcr, %0" ::"r"(word) : "memory"); }
#else
  using Word = unsigned;
  static constexpr Word kBits = 0;
  static Word get() { return 0; }
  static void set(Word) {}
#endif
  Word before_;
};
template <>
class FlushMode<double> {
 public:
  explicit FlushMode(bool = true) {}  // so that the compiler does not call it unused
};

}  // namespace fastreg::FASTREG_ISA
