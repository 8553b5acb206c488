// What the tests of the kernels share, written without the code under test: number formats in double
// arithmetic, tensors amid guard bytes, the generator of their inputs, digests, failures.
#pragma once
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <string>

#include "../../csrc/common/device.h"

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

namespace fastreg::FASTREG_ISA {}

namespace fastreg::test {

namespace kernels = fastreg::FASTREG_ISA;

// ---- cases: each file registers its own, and main.cpp runs all of them
struct Case {
  inline static const Case* last = nullptr;  // a constant, so that it is there before any case is constructed
  explicit Case(void (*body)()) : body(body), before(last) { last = this; }
  void (*const body)();
  const Case* const before;
};

// The sweep of exp looks at every `sweep_stride`-th float32; an odd number, the argument of the program.
inline uint32_t sweep_stride = 1;

constexpr double kInfinity = std::numeric_limits<double>::infinity(),
                 kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
// Sizes around the widths of vectors and of a block (1024 elements), mostly odd.
constexpr int64_t kSizes[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 100, 1023, 1025, 2201};

// The type that a kernel computes in.
inline DType accumulation(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }

// ---- failures: the first few in full, all of them counted
inline std::string current_case;
inline int failures = 0;

__attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  if (++failures > 20) return;
  fprintf(stderr, "%s: ", current_case.c_str());
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
}

// ---- inputs: Knuth's linear congruential generator, the same numbers on every machine
struct Random {
  uint64_t state;
  uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state >> 32);
  }
  int64_t below(int64_t n) { return int64_t(uint64_t(bits()) * uint64_t(n) >> 32); }
  double uniform() { return (bits() + 0.5) * 0x1p-32; }
  double signed_value() {  // over a few binades, none so large that a sum of them overflows float16
    const double fraction =
        uniform() + 0.5;  // apart: compilers differ in which argument of a call they evaluate first
    const double magnitude = std::ldexp(fraction, int(below(6)) - 4);
    return bits() & 1 ? magnitude : -magnitude;
  }
};

// ---- number formats
struct Format {
  int size, mantissa, bias;  // bytes; bits after the leading 1; exponent bias
};
inline Format format_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return {8, 52, 1023};
    case DType::kFloat32:
      return {4, 23, 127};
    case DType::kFloat16:
      return {2, 10, 15};
    case DType::kBFloat16:
      return {2, 7, 127};
  }
  return {};
}
inline const char* name_of(DType dtype) {
  const char* names[] = {"float32", "float64", "float16", "bfloat16"};
  return names[int(dtype)];
}

inline double power_of_two(int exponent) {  // of a normal double; ldexp costs ten times as much
  const uint64_t bits = uint64_t(exponent + 1023) << 52;
  double x;
  memcpy(&x, &bits, 8);
  return x;
}
inline int exponent_of(double x) {  // of a normal double, as ilogb has it
  uint64_t bits;
  memcpy(&bits, &x, 8);
  return int(bits >> 52 & 0x7ff) - 1023;
}
// To nearest, ties to even. The products with powers of two are exact, so that nearbyint alone rounds; a
// float64 argument keeps all its bits.
inline double round_to(DType dtype, double x) {
  if (dtype == DType::kFloat64 || x == 0 || !std::isfinite(x)) return x;
  const Format f = format_of(dtype);
  const int lowest = 1 - f.bias, exponent = exponent_of(x) > lowest ? exponent_of(x) : lowest;
  const double rounded =
      std::nearbyint(x * power_of_two(f.mantissa - exponent)) * power_of_two(exponent - f.mantissa);
  return exponent_of(rounded) > f.bias ? std::copysign(std::numeric_limits<double>::infinity(), x) : rounded;
}
inline uint64_t quiet_nan(DType dtype) {
  const Format f = format_of(dtype);
  return ((uint64_t(2) * unsigned(f.bias) + 1) << 1 | 1) << (f.mantissa - 1);
}
// The bits of a number that has the format already.
inline uint64_t encode(DType dtype, double x) {
  const Format f = format_of(dtype);
  const uint64_t sign = uint64_t(std::signbit(x)) << (8 * f.size - 1), top = uint64_t(2 * f.bias + 1)
                                                                             << f.mantissa;
  if (std::isnan(x)) return quiet_nan(dtype);
  if (std::isinf(x)) return sign | top;
  x = std::fabs(x);
  if (dtype == DType::kFloat64) {
    uint64_t bits;
    memcpy(&bits, &x, 8);
    return sign | bits;
  }
  if (x < power_of_two(1 - f.bias)) return sign | uint64_t(x * power_of_two(f.bias - 1 + f.mantissa));
  const int exponent = exponent_of(x);
  const uint64_t below_one = uint64_t(exponent + f.bias - 1)
                             << f.mantissa;  // the leading 1 of the mantissa adds the last unit
  return sign | (below_one + uint64_t(x * power_of_two(f.mantissa - exponent)));
}
inline double decode(DType dtype, uint64_t bits) {
  double x;
  if (dtype == DType::kFloat64) {
    memcpy(&x, &bits, 8);
    return x;
  }
  const Format f = format_of(dtype);
  const uint64_t mantissa = bits & ((uint64_t(1) << f.mantissa) - 1);
  const int field = int(bits >> f.mantissa) & (2 * f.bias + 1);
  if (field == 2 * f.bias + 1)
    x = mantissa ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  else
    x = double(mantissa + (field ? uint64_t(1) << f.mantissa : 0)) *
        power_of_two((field ? field : 1) - f.bias - f.mantissa);
  return bits >> (8 * f.size - 1) & 1 ? -x : x;
}

// ---- layouts
inline Layout contiguous(int64_t n) {
  Layout layout{};
  layout.numel = layout.size[0] = n;
  layout.dims = 1;
  layout.stride[0] = 1;
  return layout;
}
inline Layout every_third(int64_t n) {
  Layout layout = contiguous(n);
  layout.contiguous = false;
  layout.stride[0] = 3;
  return layout;
}
inline Layout expanded(int64_t n) {  // one element seen n times
  Layout layout = every_third(n);
  layout.stride[0] = 0;
  return layout;
}
inline Layout transposed(int64_t n) {  // columns of the tallest matrix of n elements, with gaps between them
  int64_t columns = 1;
  for (int64_t d = 1; d * d <= n; ++d)
    if (n % d == 0) columns = d;
  Layout layout = every_third(n);
  layout.dims = 2;
  layout.size[0] = columns, layout.size[1] = n / columns;
  layout.stride[0] = 1, layout.stride[1] = columns + 2;
  return layout;
}

// ---- digests: FNV-1a of bytes, by name
struct Digest {
  uint64_t hash = 0xcbf29ce484222325u;
  void add(const void* bytes, size_t count) {
    for (size_t i = 0; i < count; ++i) hash = (hash ^ static_cast<const uint8_t*>(bytes)[i]) * 0x100000001b3u;
  }
};
inline std::map<std::string, Digest> digests;

// ---- a tensor amid guard bytes, one element off the alignment that memory comes with. Under
// AddressSanitizer there are no guards, so that the end of the tensor is the end of what may be touched.
class Array {
 public:
  static constexpr uint8_t kGuard = 0xa5;

  Array(DType dtype, const Layout& layout) : Array(format_of(dtype).size, layout) {
    dtype_ = dtype;
    typed_ = true;
  }
  Array(int element_size, const Layout& layout) : layout(layout), size_(element_size) {
    int64_t span = 1;
    for (int d = 0; d < layout.dims; ++d) span += (layout.size[d] - 1) * layout.stride[d];
    const size_t room = kSanitized ? 0 : 128;
    begin_ = room + size_t(size_);
    bytes_ = begin_ + size_t(span) * size_t(size_) + room;
    memory_ = std::make_unique<uint8_t[]>(bytes_);
    memset(memory_.get(), kGuard, bytes_);
  }

  template <class T = void>
  T* data() {
    return reinterpret_cast<T*>(memory_.get() + begin_);
  }
  int64_t numel() const { return layout.numel; }
  uint8_t* element(int64_t i) const {
    if (layout.contiguous) return memory_.get() + begin_ + i * size_;
    int64_t offset = 0;
    for (int d = layout.dims - 1; d >= 0; --d) {
      offset += i % layout.size[d] * layout.stride[d];
      i /= layout.size[d];
    }
    return memory_.get() + begin_ + offset * size_;
  }
  uint64_t raw(int64_t i) const {
    uint64_t bits = 0;
    memcpy(&bits, element(i), size_t(size_));
    return bits;
  }
  void set_raw(int64_t i, uint64_t bits) { memcpy(element(i), &bits, size_t(size_)); }
  double get(int64_t i) const { return decode(dtype_, raw(i)); }
  void set(int64_t i, double x) { set_raw(i, encode(dtype_, round_to(dtype_, x))); }

  // The element has exactly the bits of `want`; a NaN is any NaN.
  void expect(int64_t i, double want) const {
    const uint64_t expected = encode(dtype_, want);
    if (raw(i) == expected || (std::isnan(want) && std::isnan(get(i)))) return;
    fail("element %lld of %lld is %.17g (%llx), expected %.17g (%llx)", (long long)i, (long long)numel(),
         get(i), (unsigned long long)raw(i), want, (unsigned long long)expected);
  }
  void expect_near(int64_t i, double want, double tolerance, const char* what) const {
    const double got = get(i);
    if (got == want || std::fabs(got - want) <= tolerance || (std::isnan(want) && std::isnan(got))) return;
    fail("%s: element %lld of %lld is %.17g, expected %.17g within %.3g", what, (long long)i,
         (long long)numel(), got, want, tolerance);
  }
  void expect_guards(const char* what) const {  // nothing but the elements was written
    std::unique_ptr<bool[]> inside = std::make_unique<bool[]>(bytes_);
    for (int64_t i = 0; i < numel(); ++i)
      memset(&inside[size_t(element(i) - memory_.get())], 1, size_t(size_));
    for (size_t i = 0; i < bytes_; ++i)
      if (!inside[i] && memory_[i] != kGuard)
        return fail("%s: byte %lld was written, which lies outside of all elements", what,
                    (long long)(i) - (long long)(begin_));
  }
  // In logical order. One NaN stands for all: which one a machine makes of inf - inf differs between x86 and
  // ARM.
  void add_to(Digest& digest) const {
    for (int64_t i = 0; i < numel(); ++i) {
      const uint64_t bits = typed_ && std::isnan(get(i)) ? quiet_nan(dtype_) : raw(i);
      digest.add(&bits, size_t(size_));
    }
  }

  const Layout layout;

 private:
  DType dtype_ = DType::kFloat32;
  bool typed_ = false;
  int size_;
  size_t begin_, bytes_;
  std::unique_ptr<uint8_t[]> memory_;
};

// ---- Philox4x32-10, written from its paper
struct Counter {
  uint32_t word[4];
};
inline Counter philox_reference(Counter c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xd2511f53ull * c.word[0], b = 0xcd9e8d57ull * c.word[2];
    c = {{uint32_t(b >> 32) ^ c.word[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c.word[3] ^ k1, uint32_t(a)}};
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return c;
}
// The 16 bits of element i, remembering the last group.
struct Halves {
  uint64_t seed;
  uint32_t draw, purpose;
  uint64_t group = ~uint64_t(0);
  Counter words{};
  uint32_t at(uint64_t i) {
    if (group != i / 8) {
      group = i / 8;
      words = philox_reference({{uint32_t(group), uint32_t(group >> 32), draw, purpose}}, uint32_t(seed),
                               uint32_t(seed >> 32));
    }
    return words.word[i % 8 / 2] >> (i % 2 * 16) & 0xffff;
  }
};

}  // namespace fastreg::test
