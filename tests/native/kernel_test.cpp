// Tests of the CPU kernels without torch, on one instruction set: compiled together with the kernels with its
// flags and -DFASTREG_ISA=<its namespace>. Each kernel is compared with a plain loop in double, guard bytes
// tell whether it wrote beside its output, and a digest of all output bytes per group of cases is printed, so
// that instruction sets can be compared bit for bit. tests/test_native.py builds, runs and compares.
//
//   kernel_test [stride]    of the float32 that the sweep of exp looks at, only every stride-th (an odd
//   number; default 1)
//
// Lines printed: "name digest"; "libm name digest" where the bits depend on the C library's log and exp; "#
// exp ..." errors. The digests of exp and cross-entropy are for sets that fuse multiplication and addition,
// and apart from those x86-64's baseline has its own.
#include <cstdlib>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../csrc/augment/augment_math.h"
#include "../../csrc/common/simd.h"
#include "../../csrc/cross_entropy/cross_entropy_math.h"
#include "../../csrc/dropout/dropout_math.h"
#include "../../csrc/fgsm/fgsm_math.h"
#include "../../csrc/sgd/sgd_math.h"
#include "harness.h"

namespace fastreg::FASTREG_ISA {
extern const AugmentKernels augment_kernels;
extern const CrossEntropyKernels cross_entropy_kernels;
extern const DropoutKernels dropout_kernels;
extern const FgsmKernels fgsm_kernels;
extern const SgdKernels sgd_kernels;
}  // namespace fastreg::FASTREG_ISA

namespace fastreg::test {
namespace {

namespace kernels = fastreg::FASTREG_ISA;

constexpr double kInfinity = std::numeric_limits<double>::infinity(),
                 kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
// Around the widths of vectors and of a tile (1024), mostly odd.
constexpr int64_t kSizes[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 100, 1023, 1025, 2201};

DType accumulation(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }

// ---- exp

// The header of exp_nonpositive promises: within 2 ulp, 0 below -87.68, which is the float next to -126.5 ln
// 2 within 0.005.
constexpr double kMaxUlp = 2;
constexpr float kAccurateFrom = -87.68f, kZeroBelow = -87.69f;

// Distances in units of the last place of the format; those of a float are computed 250 million times.
double ulp_error(float got, double want) {
  uint64_t bits;
  memcpy(&bits, &want, 8);
  bits = (bits & 0x7ff0000000000000u) - (uint64_t(23) << 52);
  double ulp;
  memcpy(&ulp, &bits, 8);
  return std::fabs(got - want) / (ulp < 0x1p-149 ? 0x1p-149 : ulp);
}
double ulp_error(double got, long double want) {
  const int exponent = want == 0 ? -1022 : std::ilogb(want);
  return double(std::fabs(got - want) / std::ldexp(1.0L, (exponent < -1022 ? -1022 : exponent) - 52));
}

void exp_float(uint32_t stride) {
  current_case = "exp/float32";
  double worst = 0;
  float worst_at = 0;
  const auto check = [&](float x, float got) {
    if (x < kZeroBelow ? got == 0 : x < kAccurateFrom && got == 0) return;
    const double error = x < kZeroBelow ? kInfinity : ulp_error(got, std::exp(double(x)));
    if (!(error <= worst)) worst = error, worst_at = x;
    if (!(error <= kMaxUlp)) fail("exp(%a) is %a, %.3g ulp off", double(x), double(got), error);
  };
  // -0 up to -inf by their bits, 16 at a time and without leaving the registers: 600 million numbers.
  using V = kernels::Vec<float>;
  using Words = kernels::U32Part;
  constexpr uint32_t infinity = 0x7f800000u;
  // All floats from -2^-60 to -256. Beyond, where 1 and 0 are all there is, every 61st block: in particular r
  // * r is subnormal above -2^-63, which costs 100 times as much as the rest.
  constexpr uint32_t tiny = 0x21800000u, huge = 0x43800000u;
  Words lane[V::kParts], hash[V::kParts] = {};
  for (int j = 0; j < V::kLanes; ++j) lane[j / V::kPartLanes][j % V::kPartLanes] = uint32_t(j) * stride;
  for (uint64_t first = 0; first + 15 * uint64_t(stride) <= infinity;
       first += 16 * uint64_t(stride) * (first < tiny || first > huge ? 61 : 1)) {
    V x;
    for (int i = 0; i < V::kParts; ++i) x.part[i] = (V::Part)((lane[i] + uint32_t(first)) | 0x80000000u);
    const V got = kernels::exp_nonpositive(x);
    // Half of the range rounds to 1, half of the rest to 0; both need no reference.
    const uint32_t last = uint32_t(first) + 15 * stride;
    const bool one = last < 0x33000000u;  // 2^-25
    const bool zero = first > float_bits(-kZeroBelow);
    Words difference = (one || zero ? 0u : 1u) - Words{};
    for (int i = 0; i < V::kParts; ++i) {
      hash[i] = (hash[i] << 5 | hash[i] >> 27) ^ (Words)got.part[i];
      difference |= (Words)got.part[i] ^ (one ? 0x3f800000u : 0u);
    }
    uint64_t any[sizeof difference / 8];
    memcpy(any, &difference, sizeof any);
    for (size_t i = 1; i < std::size(any); ++i) any[0] |= any[i];
    if (any[0]) {
      float inputs[16], outputs[16];
      kernels::store(inputs, x);
      kernels::store(outputs, got);
      for (int j = 0; j < 16; ++j) check(inputs[j], outputs[j]);
    }
  }
  printf("# exp float32 max %.4f ulp at %a, stride %u\n", worst, double(worst_at), stride);
  digests["exp/float32/stride " + std::to_string(stride)].add(hash, sizeof hash);

  float special[16] = {0.f, -0.f, -INFINITY, NAN, -NAN, -1e-45f, -3.4028235e38f, -1.f}, got[16];
  for (int j = 8; j < 16; ++j) special[j] = -float(j);
  kernels::store(got, kernels::exp_nonpositive(kernels::load(special)));
  for (int j = 0; j < 16; ++j) {
    if (std::isnan(special[j]) ? !std::isnan(got[j]) : special[j] == 0 && got[j] != 1)
      fail("exp(%a) is %a", double(special[j]), double(got[j]));
    if (!std::isnan(special[j])) check(special[j], got[j]);
  }
}

// log of 1 and more, and log(1 + x) for x in [0, 0.125], within 2 ulp.
void log_float() {
  current_case = "log/float32";
  Digest& digest = digests["exp/float32/log"];
  const auto sweep = [&](const char* name, uint32_t first, uint32_t last, uint32_t stride, auto function,
                         auto reference) {
    double worst = 0;
    for (uint64_t bits = first; bits + 15 * uint64_t(stride) <= last; bits += 16 * uint64_t(stride)) {
      float in[16], out[16];
      for (uint32_t j = 0; j < 16; ++j) in[j] = bits_float(uint32_t(bits) + j * stride);
      kernels::store(out, function(kernels::load(in)));
      digest.add(out, sizeof out);
      for (int j = 0; j < 16; ++j) {
        const double want = reference(double(in[j])),
                     error = want == 0 ? (out[j] == 0 ? 0 : kInfinity) : ulp_error(out[j], want);
        worst = error > worst ? error : worst;
        if (!(error <= kMaxUlp))
          fail("%s(%a) is %a, %.3g ulp off", name, double(in[j]), double(out[j]), error);
      }
    }
    printf("# %s float32 max %.4f ulp\n", name, worst);
  };
  sweep(
      "log", 0x3f800000u, 0x4e800000u, 61, [](auto x) { return kernels::log_from_one(x); },
      [](double x) { return std::log(x); });
  sweep(
      "log1p", 0, 0x3e000000u, 1021, [](auto x) { return kernels::log1p_small(x); },
      [](double x) { return std::log1p(x); });
  float special[16], got[16];
  for (float& value : special) value = NAN;
  kernels::store(got, kernels::log_from_one(kernels::load(special)));
  for (float value : got)
    if (!std::isnan(value)) fail("log(NaN) is %a", double(value));
}

void exp_double(uint32_t stride) {
  current_case = "exp/float64";
  Random random{3};
  double worst = 0, x[8], got[8];
  const int count = (stride == 1 ? 1 << 20 : 1 << 14);
  Digest& digest = digests["libm exp/float64"];  // of the points that every run looks at
  for (int i = 0; i < count; i += 8) {
    for (double& value : x) value = i % 3 ? -745 * random.uniform() : -std::fabs(random.signed_value());
    if (i == 0) x[0] = -0., x[1] = 0., x[2] = -kInfinity, x[3] = kNaN, x[4] = -1e300;
    kernels::store(got, kernels::exp_nonpositive(kernels::load(x)));
    for (int j = 0; j < 8; ++j) {
      if (std::isnan(x[j])) {
        if (!std::isnan(got[j])) fail("exp(NaN) is %a", got[j]);
        continue;
      }
      if (i < 1 << 14) digest.add(got + j, 8);
      if (x[j] < -708 && got[j] == 0) continue;  // subnormal: may be flushed
      const double error = ulp_error(got[j], std::exp((long double)(x[j])));
      worst = error > worst ? error : worst;
      if (!(error <= kMaxUlp)) fail("exp(%a) is %a, %.3g ulp off", x[j], got[j], error);
    }
  }
  printf("# exp float64 max %.4f ulp, %d points\n", worst, count);
}

// ---- conversions

template <class T>
void conversions(DType dtype) {
  current_case = std::string("conversion/") + name_of(dtype);
  T narrow[16];
  float wide[16];
  Digest& digest = digests[current_case];
  const auto as_bits = [](T x) { return x.bits; };

  for (uint32_t first = 0; first < 65536; first += 16) {
    for (uint32_t j = 0; j < 16; ++j) narrow[j].bits = uint16_t(first + j);
    kernels::store(wide, kernels::load(narrow));
    for (int j = 0; j < 16; ++j) {
      const double want = decode(dtype, narrow[j].bits);
      for (const float got : {wide[j], to_float(narrow[j])})
        if (std::isnan(want) ? !std::isnan(got)
                             : encode(DType::kFloat32, got) != encode(DType::kFloat32, want))
          fail("%#x reads as %a, expected %a", narrow[j].bits, double(got), want);
    }
  }

  // Every number of the format, the middle to the next and the floats on both sides of it; then random bits.
  std::vector<float> inputs = {NAN, -NAN, 3.4028235e38f, 1e-45f, 0.f, -0.f};
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const double x = decode(dtype, bits);
    if (std::isnan(x)) continue;
    inputs.push_back(float(x));
    if (std::isinf(x)) continue;
    const double next = decode(dtype, bits + 1),
                 past_largest = std::copysign(std::ldexp(1., format_of(dtype).bias + 1), x);
    const float middle = float((x + (std::isinf(next) ? past_largest : next)) / 2);
    for (const float value : {middle, std::nextafter(middle, INFINITY), std::nextafter(middle, -INFINITY)})
      inputs.push_back(value);
  }
  Random random{5};
  for (int i = 0; i < 1 << 16; ++i) {
    const uint32_t bits = random.bits();
    inputs.push_back(float(decode(DType::kFloat32, bits)));
    inputs.push_back(float(random.signed_value()));
  }
  while (inputs.size() % 16) inputs.push_back(1);
  for (size_t i = 0; i < inputs.size(); i += 16) {
    kernels::store(narrow, kernels::load(&inputs[i]));
    for (size_t j = 0; j < 16; ++j) {
      const float x = inputs[i + j];
      const double want = round_to(dtype, x);
      T scalar;
      from_float(x, &scalar);
      for (const T got : {narrow[j], scalar}) {
        if (std::isnan(x) ? !std::isnan(decode(dtype, as_bits(got))) : as_bits(got) != encode(dtype, want))
          fail("%a becomes %#x, expected %a", double(x), as_bits(got), want);
      }
      if (!std::isnan(x)) digest.add(narrow + j, sizeof(T));
    }
  }
}

// bfloat16 by pairs gives what the plain loads and stores give, 32 neighbours at a time, for all bit patterns
// and for floats between them, a quarter of which are ties.
void pairs() {
  current_case = "pairs/bfloat16";
  Random random{7};
  for (uint32_t first = 0; first < 65536; first += 32) {
    BFloat16 in[33], out[33];  // from the second on: not even aligned to pairs
    for (uint32_t j = 0; j < 32; ++j) in[j + 1].bits = uint16_t(first + j);
    kernels::Vec<float> part[2];
    kernels::load_pairs(in + 1, part[0], part[1]);
    float lane[2][16];
    for (int odd = 0; odd < 2; ++odd) kernels::store(lane[odd], part[odd]);
    for (int j = 0; j < 32; ++j)
      if (float_bits(lane[j % 2][j / 2]) != uint32_t(in[j + 1].bits) << 16)
        fail("%#x reads as %a", in[j + 1].bits, double(lane[j % 2][j / 2]));
    for (auto& half : lane)
      for (float& x :
           half)  // infinity would become a NaN that does not end in zeros, and pack_pairs keeps no such NaN
        if (std::isfinite(x))
          x = bits_float((float_bits(x) & 0xffff0000u) | (random.below(4) ? random.bits() & 0xffff : 0x8000));
    kernels::store_pairs(out + 1, kernels::pack_pairs(kernels::load(lane[0]), kernels::load(lane[1])));
    for (int j = 0; j < 32; ++j) {
      const double x = lane[j % 2][j / 2], got = decode(DType::kBFloat16, out[j + 1].bits);
      if (std::isnan(x) ? !std::isnan(got)
                        : out[j + 1].bits != encode(DType::kBFloat16, round_to(DType::kBFloat16, x)))
        fail("%a becomes %a", x, got);
    }
  }
}

// Loads and stores of the first `count` lanes, at the very end of what may be touched.
template <class T>
void partial_vectors(DType dtype) {
  current_case = std::string("partial/") + name_of(dtype);
  using A = typename Accumulate<T>::type;
  constexpr int lanes = kernels::Vec<A>::kLanes;
  for (int count = 1; count <= lanes; ++count) {
    Array in(dtype, contiguous(count)), out(dtype, contiguous(count));
    A lane[lanes];
    for (int j = 0; j < count; ++j) in.set(j, j - 3.5);
    const auto v = kernels::load(in.data<T>(), count, A(-7));
    kernels::store(lane, v);
    for (int j = 0; j < lanes; ++j)
      if (lane[j] != A(j < count ? j - 3.5 : -7)) fail("lane %d of %d is %g", j, count, double(lane[j]));
    kernels::store(out.data<T>(), v, count);
    for (int j = 0; j < count; ++j) out.expect(j, j - 3.5);
    out.expect_guards("output");
  }
}

// ---- Philox4x32-10, as its paper has it

struct Counter {
  uint32_t word[4];
};
Counter philox_reference(Counter c, uint32_t k0, uint32_t k1) {
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

void philox() {
  current_case = "philox";
  struct {
    Counter counter;
    uint32_t k0, k1;
    Counter answer;
  } const known[] = {// kat_vectors of Random123
                     {{{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
                     {{{~0u, ~0u, ~0u, ~0u}}, ~0u, ~0u, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
                     {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
                      0xa4093822,
                      0x299f31d0,
                      {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}}};
  for (const auto& k : known) {
    const Counter c = k.counter, own = philox_reference(c, k.k0, k.k1);
    const PhiloxWords words = philox4x32(c.word[0], c.word[1], c.word[2], c.word[3], k.k0, k.k1);
    if (memcmp(&own, &k.answer, 16)) fail("the reference of this test is wrong");
    if (memcmp(&words, &k.answer, 16)) fail("philox4x32 differs from the known answer");
  }
}

// ---- dropout

struct DropoutCase {
  DType dtype;
  Layout in, out;
  bool in_place;
  int64_t inner;
  uint64_t seed, offset, threshold;
  double shift;
};

void dropout_case(const DropoutCase& c, Digest& digest) {
  const int64_t n = c.in.numel, decisions = n / c.inner, bytes = (decisions + 7) / 8;
  current_case = std::string("dropout/") + name_of(c.dtype) + " n " + std::to_string(n) + " inner " +
                 std::to_string(c.inner) + " offset " + std::to_string(c.offset) + " threshold " +
                 std::to_string(c.threshold);
  const DType type = accumulation(c.dtype);
  Random random{uint64_t(n) + c.threshold};
  Array x(c.dtype, c.in), separate(c.dtype, c.out), mask(1, contiguous(bytes));
  for (int64_t i = 0; i < n; ++i) x.set(i, random.signed_value());
  for (const double special : {0., -0., kInfinity, -kInfinity, kNaN}) x.set(random.below(n), special);
  std::vector<double> input;
  for (int64_t i = 0; i < n; ++i) input.push_back(x.get(i));

  Array& y = c.in_place ? x : separate;
  DropoutArgs a{};
  a.dtype = c.dtype;
  a.input = x.data();
  a.output = y.data();
  a.mask = mask.data<uint8_t>();
  a.input_layout = x.layout;
  a.output_layout = y.layout;
  a.decisions = decisions;
  a.inner = c.inner;
  a.seed = {c.seed, nullptr};
  a.offset = c.offset;
  a.threshold = c.threshold;
  a.scale = 1 / 0.7;
  a.shift = c.shift;
  a.dropped = c.shift != 0 ? -1.75 : 0;
  // In two pieces, as two threads would.
  if (c.inner == 1) {
    const int64_t middle = n / 2 / 8 * 8;
    kernels::dropout_kernels.forward(a, 0, middle);
    kernels::dropout_kernels.forward(a, middle, n);
  } else {
    kernels::dropout_kernels.draw(a, bytes / 2, bytes);
    kernels::dropout_kernels.draw(a, 0, bytes / 2);
    kernels::dropout_kernels.apply(a, 0, n / 3);
    kernels::dropout_kernels.apply(a, n / 3, n);
  }

  Halves high{c.seed, 0, 0}, low{c.seed, 1, 0};
  const double scale = round_to(type, a.scale), shift = round_to(type, a.shift),
               dropped = round_to(type, a.dropped);
  for (int64_t d = 0; d < 8 * bytes; ++d) {
    const uint64_t at = c.offset + uint64_t(d), number = uint64_t(high.at(at)) << 16 | low.at(at);
    const bool kept = number < c.threshold && d < decisions;  // bits after the last decision are 0
    if ((mask.raw(d / 8) >> (d % 8) & 1) != kept)
      fail("decision %lld of %lld is wrong", (long long)d, (long long)decisions);
    for (int64_t i = d * c.inner; d < decisions && i < (d + 1) * c.inner; ++i) {
      // Every step rounded to the type of the arithmetic. Twice rounded is not wrong: double has more than
      // twice its bits.
      double moved = round_to(type, input[size_t(i)] * scale);
      if (c.shift != 0) moved = round_to(type, moved + shift);
      y.expect(i, round_to(c.dtype, kept ? moved : dropped));
    }
  }
  mask.expect_guards("mask");
  y.expect_guards("output");
  mask.add_to(digest);
  y.add_to(digest);
}

void dropout() {
  const uint64_t offsets[] = {0, 3, 8 * 1000, (uint64_t(1) << 35) - 16, (uint64_t(1) << 35) - 21, 13};
  int count = 0;
  for (const DType dtype : kDTypes) {
    Digest& elements = digests[std::string("dropout/") + name_of(dtype) + "/elements"];
    Digest& runs = digests[std::string("dropout/") + name_of(dtype) + "/runs"];
    for (const int64_t n : kSizes) {
      const std::pair<Layout, Layout> layouts[] = {{contiguous(n), contiguous(n)},
                                                   {transposed(n), contiguous(n)},
                                                   {contiguous(n), every_third(n)},
                                                   {expanded(n), transposed(n)}};
      for (int which = 0; which < 4; ++which) {
        const uint64_t seed = 0x123456789abcdefu * uint64_t(count + 1);
        for (int threshold = 0; threshold < 7; ++threshold, ++count) {
          DropoutCase c{};
          c.dtype = dtype;
          c.in = layouts[which].first;
          c.out = layouts[which].second;
          c.in_place = which < 2 && count % 3 == 0;
          c.inner = 1;
          c.seed = seed;
          c.offset = offsets[count % 6];
          c.shift = count / 2 % 2 ? 0.25 : 0;
          // What one decision draws, and its neighbours: its upper 16 bits are those of the threshold, the
          // lower ones decide.
          const uint64_t at = c.offset + uint64_t(n / 2);
          const uint64_t drawn = uint64_t(Halves{seed, 0, 0}.at(at)) << 16 | Halves{seed, 1, 0}.at(at);
          const uint64_t thresholds[] = {drawn,       drawn + 1, drawn | 0xffff,   drawn & 0xffff0000u,
                                         0xb3333333u, 0,         uint64_t(1) << 32};
          c.threshold = thresholds[threshold];
          dropout_case(c, elements);
        }
      }
    }
    for (const int64_t inner : {2, 5, 16, 49, 700}) {
      for (const int64_t decisions : {1, 9, 16, 35}) {
        const int64_t n = inner * decisions;
        if (n > 7000) continue;
        DropoutCase c{};
        c.dtype = dtype;
        c.in = count % 2 ? transposed(n) : contiguous(n);
        c.out = count % 5 == 4 ? every_third(n) : contiguous(n);
        c.inner = inner;
        c.seed = uint64_t(count);
        c.offset = offsets[count % 6];
        c.threshold = 0x9999999au;
        c.shift = count % 4 == 0 ? 0.25 : 0;
        dropout_case(c, runs);
        ++count;
      }
    }
  }
}

// ---- dropout with bias and residual

struct DropoutAddCase {
  DType dtype;
  Layout in, residual, out;
  int64_t columns;  // of the bias; 0 for none
  uint64_t seed, threshold;
};

void dropout_add_case(const DropoutAddCase& c, Digest& digest) {
  const int64_t n = c.in.numel, bytes = (n + 7) / 8;
  current_case = std::string("dropout_add/") + name_of(c.dtype) + " n " + std::to_string(n) + " columns " +
                 std::to_string(c.columns) + " threshold " + std::to_string(c.threshold);
  const DType type = accumulation(c.dtype);
  Random random{uint64_t(n) + c.threshold};
  Array x(c.dtype, c.in), residual(c.dtype, c.residual), y(c.dtype, c.out), mask(1, contiguous(bytes));
  Array bias(c.dtype, contiguous(c.columns ? c.columns : 1));
  for (Array* array : {&x, &residual, &bias}) {
    for (int64_t i = 0; i < array->numel(); ++i) array->set(i, random.signed_value());
    for (const double special : {0., -0., kInfinity, -kInfinity, kNaN})
      array->set(random.below(array->numel()), special);
  }

  DropoutAddArgs a{};
  a.dtype = c.dtype;
  a.input = x.data();
  a.output = y.data();
  a.mask = mask.data<uint8_t>();
  a.input_layout = x.layout;
  a.output_layout = y.layout;
  a.decisions = n;
  a.inner = 1;
  a.seed = {c.seed, nullptr};
  a.threshold = c.threshold;
  a.scale = 1 / 0.7;
  a.residual = residual.data();
  a.residual_layout = residual.layout;
  a.bias = c.columns ? bias.data() : nullptr;
  a.columns = c.columns ? c.columns : 1;
  const int64_t middle = n / 3 / 8 * 8;  // in two pieces, as two threads would
  if (middle) kernels::dropout_kernels.add(a, 0, middle);
  kernels::dropout_kernels.add(a, middle, n);

  Halves high{c.seed, 0, 0}, low{c.seed, 1, 0};
  const double scale = round_to(type, a.scale);
  for (int64_t i = 0; i < 8 * bytes; ++i) {
    const uint64_t number = uint64_t(high.at(uint64_t(i))) << 16 | low.at(uint64_t(i));
    const bool kept = number < c.threshold && i < n;
    if ((mask.raw(i / 8) >> (i % 8) & 1) != kept)
      fail("decision %lld of %lld is wrong", (long long)i, (long long)n);
    if (i >= n) continue;
    double value = x.get(i);
    if (c.columns) value = round_to(type, value + bias.get(i % c.columns));
    value = round_to(type, round_to(type, value * scale) + residual.get(i));
    y.expect(i, round_to(c.dtype, kept ? value : residual.get(i)));
  }
  mask.expect_guards("mask");
  y.expect_guards("output");
  mask.add_to(digest);
  y.add_to(digest);
}

void dropout_add() {
  int count = 0;
  for (const DType dtype : kDTypes) {
    Digest& digest = digests[std::string("dropout_add/") + name_of(dtype)];
    for (const int64_t n : kSizes) {
      const Layout layouts[][3] = {{contiguous(n), contiguous(n), contiguous(n)},
                                   {transposed(n), contiguous(n), every_third(n)},
                                   {contiguous(n), expanded(n), contiguous(n)},
                                   {every_third(n), transposed(n), transposed(n)}};
      // Of kSizes one at most divides n, which a kernel does not ask for: rows end anywhere in a vector and
      // in a tile.
      for (const int64_t columns : {int64_t(0), int64_t(1), int64_t(3), int64_t(16), int64_t(100),
                                    int64_t(1023), int64_t(1024), int64_t(1029), n}) {
        const auto& l = layouts[count % 4];
        DropoutAddCase c{dtype,      l[0], l[1], l[2], columns, 0x123456789abcdefu * uint64_t(count + 1),
                         0xb3333333u};
        if (count % 7 == 0) c.threshold = count % 14 ? 0 : uint64_t(1) << 32;
        dropout_add_case(c, digest);
        ++count;
      }
    }
  }
}

// ---- SGD

struct SgdCase {
  SgdArgs args;
  bool has_momentum, first_step;
  uint64_t seed;
  uint32_t tensor_index;
  Layout param, grad, momentum;
};

void run_sgd(const SgdCase& c, DType dtype, Array& w, Array& g, Array& v) {
  SgdTensor t{};
  t.dtype = dtype;
  t.param = w.data();
  t.grad = g.data();
  t.momentum = c.has_momentum ? v.data() : nullptr;
  t.param_layout = w.layout;
  t.grad_layout = g.layout;
  t.momentum_layout = v.layout;
  float started = c.first_step ? 0 : 1;
  t.started = &started;
  const int64_t n = w.numel(), middle = n > kernels::kTile ? kernels::kTile : 0;
  kernels::sgd_kernels.step(c.args, t, c.tensor_index, middle, n);
  if (middle) kernels::sgd_kernels.step(c.args, t, c.tensor_index, 0, middle);
}

// Float32 and float64 within a few roundings of the formula in sgd_math.h, computed in double. `wide`: w, g,
// v are of that type.
void expect_sgd_near(const SgdCase& c, DType wide, const std::vector<double>& w0,
                     const std::vector<double>& g0, const std::vector<double>& v0, const Array& w,
                     const Array& v) {
  const SgdArgs& a = c.args;
  const double epsilon = std::ldexp(1., -format_of(wide).mantissa);
  for (size_t i = 0; i < w0.size(); ++i) {
    const double sign = w0[i] > 0 ? 1 : w0[i] < 0 ? -1 : 0;
    const double penalty = (a.weight_decay > 0 ? a.weight_decay * w0[i] : 0) + (a.proximal ? 0 : a.l1 * sign);
    double grad = g0[i] / a.grad_scale * (a.maximize ? -1 : 1), size = std::fabs(grad);
    if (!a.decoupled) grad += penalty, size += std::fabs(penalty);
    double velocity = grad;
    if (c.has_momentum) {
      velocity = c.first_step ? grad : a.momentum * v0[i] + (1 - a.dampening) * grad;
      size += std::fabs(a.momentum * v0[i]);
      v.expect_near(int64_t(i), velocity, 8 * epsilon * size, "momentum");
    }
    double step = c.has_momentum && a.nesterov ? grad + a.momentum * velocity : velocity;
    if (a.decoupled) step += penalty, size += std::fabs(penalty);
    double want = w0[i] - a.lr * step;
    const double tolerance = 8 * epsilon * (std::fabs(w0[i]) + a.lr * (2 * size + a.l1));
    if (a.proximal && a.l1 > 0) {
      const double rest = std::fabs(want) - a.lr * a.l1;
      want = std::isnan(want) ? want : rest <= 0 ? 0 : std::copysign(rest, want);
      if (rest < -tolerance) w.expect(int64_t(i), 0.);  // not about 0: weights become exactly 0
    }
    w.expect_near(int64_t(i), want, tolerance, "weight");
  }
}

void sgd_case(const SgdCase& c, DType dtype, Digest& digest) {
  const int64_t n = c.param.numel;
  const DType wide = accumulation(dtype);
  Random random{uint64_t(n) * 31 + c.tensor_index};
  Array w(dtype, c.param), g(dtype, c.grad), v(dtype, c.momentum);
  Array wide_w(wide, contiguous(n)), wide_g(wide, contiguous(n)), wide_v(wide, contiguous(n));
  for (int64_t i = 0; i < n; ++i) {
    w.set(i, random.below(8) ? random.signed_value() : 0);
    g.set(i, random.below(8) ? random.signed_value() : 0);
    v.set(i, c.first_step ? 0 : random.signed_value());
  }
  if (n > 8) {
    w.set(random.below(n), kInfinity);
    w.set(random.below(n), kNaN);
    w.set(random.below(n), -0.);
    g.set(random.below(n), -kInfinity);
    g.set(random.below(n), kNaN);
  }
  std::vector<double> w0, g0, v0;
  for (int64_t i = 0; i < n; ++i) {
    w0.push_back(w.get(i));
    g0.push_back(g.get(i));
    v0.push_back(v.get(i));
    wide_w.set(i, w0.back());
    wide_g.set(i, g0.back());
    wide_v.set(i, v0.back());
  }
  run_sgd(c, dtype, w, g, v);
  run_sgd(c, wide, wide_w, wide_g, wide_v);
  expect_sgd_near(c, wide, w0, g0, v0, wide_w, wide_v);

  // A 16-bit tensor holds what float32 arithmetic gives, rounded once.
  Halves halves{c.seed, c.tensor_index, 1};
  for (int64_t i = 0; i < n; ++i) {
    const double exact = wide_w.get(i);
    if (dtype == DType::kBFloat16 && c.args.stochastic_rounding && std::isfinite(exact))
      w.expect(i, decode(dtype, (wide_w.raw(i) + halves.at(uint64_t(i))) >> 16));
    else
      w.expect(i, round_to(dtype, exact));
    if (c.has_momentum) v.expect(i, round_to(dtype, wide_v.get(i)));
  }
  w.expect_guards("weight");
  v.expect_guards("momentum");
  w.add_to(digest);
  if (c.has_momentum) v.add_to(digest);
}

void sgd() {
  const char* momenta[] = {"plain", "heavy-ball", "nesterov"};
  const char* penalties[] = {"none", "in-gradient", "decoupled"};
  int count = 0;
  for (const DType dtype : kDTypes) {
    for (int momentum = 0; momentum < 3; ++momentum) {
      for (int penalty = 0; penalty < 3; ++penalty) {
        const std::string name =
            std::string("sgd/") + name_of(dtype) + "/" + momenta[momentum] + "/" + penalties[penalty];
        for (int variant = 0; variant < 24; ++variant, ++count) {
          const int64_t n = kSizes[count % std::size(kSizes)];
          const Layout layouts[] = {contiguous(n), every_third(n), transposed(n)};
          SgdCase c{};
          c.args.lr = 0.1;
          c.args.momentum = momentum ? 0.9 : 0;
          c.args.dampening = variant % 4 == 1 ? 0.5 : 0;
          c.args.weight_decay = penalty && variant % 3 != 1 ? 0.01 : 0;
          c.args.l1 = penalty && variant % 3 != 2 ? 0.003 : 0;
          c.args.proximal = variant / 2 % 2;
          if (!penalty && c.args.proximal) c.args.l1 = 0.5;  // leaves the gradient alone
          c.args.grad_scale = variant % 5 == 2 ? 64 : 1;
          c.args.nesterov = momentum == 2;
          c.args.decoupled = penalty == 2;
          c.args.maximize = variant % 7 == 3;
          c.seed = 0xfedcba9876543210u + unsigned(count);
          c.args.stochastic_rounding = variant / 4 % 2;
          c.args.seed = {c.seed, nullptr};
          c.has_momentum = momentum != 0;
          c.first_step = momentum && c.args.dampening != 0 && variant % 8 == 5;
          c.tensor_index = uint32_t(count);
          const bool strided = variant % 3 == 2;
          c.param = layouts[strided ? count % 3 : 0];
          c.grad = layouts[strided ? count / 3 % 3 : 0];
          c.momentum = layouts[strided ? count / 9 % 3 : 0];
          current_case = name + " n " + std::to_string(n) + " variant " + std::to_string(variant);
          sgd_case(c, dtype, digests[name]);
        }
      }
    }
  }
}

// ---- FGSM and PGD

// A number per element in one of its shapes, and the array it may live in.
struct Number {
  FgsmNumber number{};
  std::unique_ptr<Array> values;
  double at(int64_t i, DType type) const {
    return values ? values->get(i / number.inner % number.count) : round_to(type, number.value);
  }
};
Number make_number(int kind, int64_t n, DType type, double center, Random& random) {
  Number result;
  result.number.value = center;
  if (kind == 0) return result;
  // per channel, per element, per element of the last dimension
  const int64_t channels = n % 3 == 0 ? 3 : 1;
  result.number.inner = kind == 1 ? n / channels : 1;
  result.number.count = kind == 1 ? channels : kind == 2 ? n : n % 5 == 0 ? 5 : n % 31 == 0 ? 31 : 1;
  result.values = std::make_unique<Array>(type, contiguous(result.number.count));
  for (int64_t i = 0; i < result.number.count; ++i) result.values->set(i, center + 0.1 * random.uniform());
  result.number.values = result.values->data();
  return result;
}

void fgsm_case(DType dtype, bool project, int64_t n, int count, Digest& digest) {
  current_case = std::string(project ? "pgd/" : "fgsm/") + name_of(dtype) + " n " + std::to_string(n) +
                 " case " + std::to_string(count);
  const DType type = accumulation(dtype);
  Random random{uint64_t(count) * 77 + 1};
  const Layout layouts[] = {contiguous(n), every_third(n), transposed(n)};
  const auto layout = [&]() { return count % 2 ? layouts[random.below(3)] : layouts[0]; };
  Array x(dtype, layout()), grad(dtype, count % 8 == 7 ? expanded(n) : layout()), origin(dtype, layout()),
      out(dtype, layout());
  for (int64_t i = 0; i < n; ++i) {
    const double value = random.uniform() * 1.2 - 0.1;
    x.set(i, value);
    origin.set(i, value + 0.1 * (random.uniform() - 0.5));
    grad.set(i, random.below(5) ? random.signed_value() : 0);
  }
  if (n > 8) {
    x.set(random.below(n), kNaN);
    x.set(random.below(n), -kInfinity);
    x.set(random.below(n), -0.);
    grad.set(random.below(n), kNaN);
    grad.set(random.below(n), kInfinity);
    grad.set(random.below(n), -0.);
    origin.set(random.below(n), kInfinity);
  }
  const auto kind = [&]() { return count % 3 ? int(random.below(4)) : 0; };
  const Number step = make_number(kind(), n, type, 0.03, random),
               radius = make_number(kind(), n, type, 0.04, random);
  const Number lower = make_number(kind(), n, type, 0, random),
               upper = make_number(kind(), n, type, 0.9, random);
  FgsmArgs a{};
  a.dtype = dtype;
  a.x = x.data();
  a.grad = grad.data();
  a.origin = project ? origin.data() : nullptr;
  a.output = out.data();
  a.x_layout = x.layout;
  a.grad_layout = grad.layout;
  a.origin_layout = origin.layout;
  a.output_layout = out.layout;
  a.step = step.number;
  if (project) a.radius = radius.number;
  a.lower = lower.number;
  a.upper = upper.number;
  kernels::fgsm_kernels.step(a, n / 3, n);
  kernels::fgsm_kernels.step(a, 0, n / 3);

  const auto clamp = [](double value, double low, double high) {
    return value < low ? low : value > high ? high : value;
  };
  for (int64_t i = 0; i < n; ++i) {
    const double g = grad.get(i), sign = g > 0 ? 1 : g < 0 ? -1 : 0;
    double moved = sign == 0 ? x.get(i) : round_to(type, x.get(i) + sign * step.at(i, type));
    if (project) {
      const double center = origin.get(i), r = radius.at(i, type);
      moved = clamp(moved, round_to(type, center - r), round_to(type, center + r));
    }
    out.expect(i, round_to(dtype, clamp(moved, lower.at(i, type), upper.at(i, type))));
  }
  out.expect_guards("output");
  out.add_to(digest);
}

void fgsm() {
  int count = 0;
  for (const DType dtype : kDTypes)
    for (const bool project : {false, true})
      for (int repeat = 0; repeat < 6; ++repeat)
        for (const int64_t n : {1, 3, 15, 16, 17, 31, 33, 45, 100, 465, 1023, 1025, 2201, 3100}) {
          fgsm_case(dtype, project, n, count,
                    digests[std::string(project ? "pgd/" : "fgsm/") + name_of(dtype)]);
          ++count;
        }
}

// ---- cross-entropy

struct CrossEntropyCase {
  DType dtype;
  bool soft, weighted, with_grad, nd, in_place;  // in place: the gradient overwrites the logits
  int64_t outer, positions, classes;
  double mix, base, z_loss;
  int count;
};

Layout rows(int64_t outer, int64_t positions, int64_t classes,
            bool nd) {  // (outer, positions, classes), with gaps
  Layout layout{};
  layout.numel = outer * positions * classes;
  layout.dims = 3;
  layout.contiguous = false;
  layout.size[0] = outer, layout.size[1] = positions, layout.size[2] = classes;
  layout.stride[1] = nd ? 1 : classes + 3;
  layout.stride[2] = nd ? positions + 2 : 1;
  layout.stride[0] = nd ? classes * layout.stride[2] + 1 : positions * layout.stride[1];
  return layout;
}

// Logits of each sort that a formula could trip over.
void fill_row(Array& logits, int64_t row, int64_t k, int64_t target, Random& random) {
  const auto at = [&](int64_t c) { return row * k + c; };
  for (int64_t c = 0; c < k; ++c) logits.set(at(c), 3 * random.signed_value());
  const int64_t other = (target + 1) % k;
  switch (row % 15) {
    case 1:  // the target has all the mass
      return logits.set(at(target), 30);
    case 2:  // the target has none of it
      return logits.set(at(other), 100);
    case 3:
      for (int64_t c = 0; c < k; c += 2)
        if (c != target) logits.set(at(c), -kInfinity);
      return;
    case 4:
      return logits.set(at(random.below(k)), kNaN);
    case 5:
      for (int64_t c = 0; c < k; ++c) logits.set(at(c), 1.5);
      return;
    case 6:
      for (int64_t c = 0; c < k; ++c) logits.set(at(c), 60000 * (2 * random.uniform() - 1));
      return;
    case 7:
      return logits.set(at(target), -kInfinity);
    case 8:
      for (int64_t c = 0; c < k; ++c) logits.set(at(c), -kInfinity);
      return;
    case 9:
      return logits.set(at(random.below(k)), kInfinity);
    case 10:  // exponentials around the threshold under which they are flushed
      for (int64_t c = 0; c < k; ++c) logits.set(at(c), c ? -86 - 3 * random.uniform() : 0);
      return;
    case 11:  // two share the mass: the sum is just above the bound of the branch for one
      logits.set(at(other), 20);
      return logits.set(at(target), 18);
    case 13:  // ever larger: each block of a long row has a new largest one
      for (int64_t c = 0; c < k; ++c) logits.set(at(c), 0.02 * double(c) + random.uniform());
      return;
    case 14:  // whole blocks of a long row have no mass
      for (int64_t c = 0; c < k - k / 5; ++c)
        if (c != target) logits.set(at(c), -kInfinity);
      return;
  }
}

void cross_entropy_case(const CrossEntropyCase& c, const std::string& name) {
  const int64_t k = c.classes, count = c.outer * c.positions;
  current_case = name + " classes " + std::to_string(k) + " case " + std::to_string(c.count);
  const DType type = accumulation(c.dtype);
  const DType grad_type = c.dtype == DType::kFloat16 && !c.in_place ? DType::kFloat32 : c.dtype;
  const DType soft_type = c.count % 2 ? c.dtype : DType::kFloat32;
  Random random{uint64_t(c.count) + 1000};
  Array logits(c.dtype, rows(c.outer, c.positions, k, c.nd)),
      soft(soft_type, rows(c.outer, c.positions, k, c.count % 3 == 0));
  Array separate(grad_type, rows(c.outer, c.positions, k, c.count % 5 == 4 ? !c.nd : c.nd)),
      weight(type, contiguous(k));
  Array& grad = c.in_place ? logits : separate;
  Array target(8, contiguous(count)), loss(DType::kFloat64, contiguous(count)),
      lse(DType::kFloat64, contiguous(count));
  constexpr int64_t ignored = -100;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t t = random.below(k);
    target.set_raw(r, uint64_t(!c.soft && r % 15 == 12 ? ignored : t));
    fill_row(logits, r, k, t, random);
    double total = 0;
    for (int64_t i = 0; i < k; ++i) {
      soft.set(r * k + i, r % 3 == 0 ? i == t : random.below(3) ? random.uniform() : 0);
      total += soft.get(r * k + i);
    }
    for (int64_t i = 0; i < k; ++i)
      soft.set(r * k + i, total > 0 ? soft.get(r * k + i) / total : 1. / double(k));
  }
  for (int64_t i = 0; i < k; ++i) weight.set(i, random.below(5) ? 0.5 + random.uniform() : 0);
  Array row_factor(type, contiguous(count));
  for (int64_t r = 0; r < count; ++r) row_factor.set(r, random.signed_value());
  std::vector<double> inputs;
  for (int64_t i = 0; i < count * k; ++i) inputs.push_back(logits.get(i));

  const auto strides = [](const Array& x) {
    return CrossEntropyArgs::Strides{x.layout.stride[0], x.layout.stride[1], x.layout.stride[2]};
  };
  CrossEntropyArgs a{};
  a.dtype = c.dtype;
  a.target_dtype = soft_type;
  a.logits = logits.data();
  a.grad = c.with_grad ? grad.data() : nullptr;
  a.target = c.soft ? nullptr : target.data<int64_t>();
  a.soft_target = c.soft ? soft.data() : nullptr;
  a.weight = c.weighted ? weight.data() : nullptr;
  a.row_loss = loss.data<double>();
  a.row_lse = lse.data<double>();
  a.outer = c.outer;
  a.positions = c.positions;
  a.classes = k;
  a.logits_stride = strides(logits);
  a.grad_stride = strides(grad);
  a.target_stride = strides(soft);
  a.ignore_index = ignored;
  a.mix = c.mix;
  a.base = c.base;
  a.z_loss = c.z_loss;
  a.grad_factor = c.count % 2 ? 1. / 7 : 1;
  a.row_factor = c.count % 7 == 2 ? row_factor.data() : nullptr;
  const int64_t blocks = cross_entropy_blocks(a);
  kernels::cross_entropy_kernels.forward(a, blocks / 2, blocks);
  kernels::cross_entropy_kernels.forward(a, 0, blocks / 2);

  // Errors grow with the distance from the largest logit, which was rounded before exp saw it, and with the
  // length of the sums. In float64 those of the reference count, which has one sum where the kernel has
  // several.
  const bool wide = type == DType::kFloat64;
  const double epsilon = std::ldexp(1., -format_of(type).mantissa), sums = 16 + double(k) / (wide ? 1 : 32);
  const double grad_epsilon = std::ldexp(1., -1 - format_of(grad_type).mantissa);
  const double smallest =
      std::ldexp(1., 1 - format_of(grad_type).bias - format_of(grad_type).mantissa);  // subnormal
  const double flushed = wide ? 1e-300 : 1.2e-38;
  // Rows side by side are computed in the type of the sums to the end, others in double.
  const bool columns = a.logits_stride.position == 1 && a.logits_stride.cls != 1;
  const double last_bit = columns ? 4 * epsilon : 0x1p-52;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t t = int64_t(target.raw(r));
    if (!c.soft && t == ignored) {
      loss.expect(r, 0);
      lse.expect(r, 0);
      for (int64_t i = 0; c.with_grad && i < k; ++i) grad.expect(r * k + i, 0);
      continue;
    }
    int64_t largest = 0;
    bool undefined = false;
    std::vector<double> x(static_cast<size_t>(k)), q(static_cast<size_t>(k));
    double q_sum = 0, others = 0;
    for (int64_t i = 0; i < k; ++i) {
      x[size_t(i)] = inputs[size_t(r * k + i)];
      undefined = undefined || std::isnan(x[size_t(i)]);
      if (x[size_t(i)] > x[size_t(largest)]) largest = i;
      const double hit = c.soft ? soft.get(r * k + i) : i == t;
      q[size_t(i)] = (c.weighted ? weight.get(i) : 1) * (c.mix * hit + c.base);
      q_sum += q[size_t(i)];
    }
    const double top = x[size_t(largest)];
    undefined = undefined || std::isinf(top);  // inf - inf
    for (int64_t i = 0; i < k; ++i)
      if (i != largest) others += std::exp(x[size_t(i)] - top);
    const double log_sum = std::log1p(others), expected_lse = undefined ? kNaN : top + log_sum;
    double expected = c.z_loss * expected_lse * expected_lse, size = c.z_loss * (top * top + 1), farthest = 0;
    for (int64_t i = 0; i < k; ++i) {
      const double shifted = x[size_t(i)] - top;
      if (q[size_t(i)] != 0) expected += q[size_t(i)] * (log_sum - shifted);
      // Base and mix count apart: where they cancel, what each was rounded to does not.
      const double parts = (c.weighted ? weight.get(i) : 1) *
                           (c.base + std::fabs(c.mix) * (c.soft ? soft.get(r * k + i) : i == t));
      if (std::isfinite(shifted))
        size += parts * std::fabs(shifted), farthest = std::fmax(farthest, -shifted);
    }
    // Beyond a distance of 90 an exponential is 0, however wrong the distance.
    size += std::fabs(q_sum) * std::fmin(log_sum, others) * (1 + std::fmin(farthest, 90) / sums);
    // The kernel subtracts q_sum times the largest logit from the sum of all q_c x_c, in double.
    const double cancelled = undefined ? 0 : 0x1p-50 * std::fabs(q_sum * top);
    loss.expect_near(r, expected, epsilon * sums * size + std::fabs(q_sum) * double(k) * flushed + cancelled,
                     "loss");
    if (!undefined)
      lse.expect_near(r, expected_lse,
                      epsilon * (sums + 90) * std::fmin(log_sum, others) +
                          last_bit * (std::fabs(top) + log_sum) + double(k) * flushed,
                      "lse");
    if (!c.with_grad) continue;
    const double grad_factor = a.row_factor ? row_factor.get(r) : a.grad_factor;
    const double factor = (q_sum + 2 * c.z_loss * expected_lse) * grad_factor;
    for (int64_t i = 0; i < k; ++i) {
      const double p = std::exp(x[size_t(i)] - top - log_sum), hit = q[size_t(i)] * grad_factor;
      const double want = undefined ? kNaN : factor * p - hit;
      const double tolerance =
          epsilon * ((sums + std::fmin(farthest, 90)) * std::fabs(factor) * p + 4 * std::fabs(hit)) +
          grad_epsilon * std::fabs(want) + flushed * (1 + std::fabs(factor)) + smallest / 2;
      grad.expect_near(r * k + i, want, tolerance, "gradient");
    }
  }
  loss.expect_guards("loss");
  lse.expect_guards("lse");
  grad.expect_guards("gradient");
  Digest& losses = digests["libm " + name + "/loss"];
  loss.add_to(losses);
  lse.add_to(losses);
  if (c.with_grad) grad.add_to(digests[(c.dtype == DType::kFloat64 ? "libm " : "") + name + "/gradient"]);
}

void cross_entropy() {
  int count = 0;
  for (const DType dtype : kDTypes) {
    for (int kind = 0; kind < 4; ++kind) {
      const std::string name = std::string("cross_entropy/") + name_of(dtype) + "/" +
                               (kind & 1 ? "soft" : "hard") + (kind & 2 ? "-weighted" : "");
      for (const int64_t k : {1, 2, 10, 16, 33, 100, 2637}) {
        for (int smoothing = 0; smoothing < 4; ++smoothing) {
          for (const bool nd : {false, true}) {
            if (k == 1 && smoothing >= 2) continue;
            if (k == 2637 && smoothing % 2 == int(nd)) continue;
            CrossEntropyCase c{};
            c.dtype = dtype;
            c.soft = kind & 1;
            c.weighted = kind & 2;
            c.nd = nd;
            c.outer = nd && k < 1000 ? 2 : 1;
            c.positions = k < 1000 ? (nd ? 19 : 27) : (nd ? 17 : 15);  // at least each sort of row once
            c.classes = k;
            const double eps[] = {0, 0.1, 0.2, 1},
                         e = eps[smoothing];  // torch's with 0.1; "others" with 0.2 and 1
            c.base = smoothing == 1 ? e / double(k) : smoothing ? e / double(k - 1) : 0;
            c.mix = 1 - e - (smoothing >= 2 ? c.base : 0);
            c.z_loss = count % 4 == 1 ? 1e-3 : 0;
            c.with_grad = count % 5 != 3;
            c.in_place = c.with_grad && count % 6 == 1;
            c.count = count++;
            cross_entropy_case(c, name);
          }
        }
      }
    }
  }
}

// ---- augmentation

struct AugmentCase {
  PixelType in, out;
  int64_t batch, channels, height, width, out_height, out_width;
  int colour_steps;
  Interpolation interpolation;
  Padding padding;
  bool last, blurred, boxed, windowed, antialias, warped, normalise;
};

// Values of pixels, uint8 among them.
struct Pixels {
  PixelType type;
  std::unique_ptr<Array> array;
  Pixels(PixelType type, int64_t numel) : type(type) {
    if (type == PixelType::kUInt8)
      array = std::make_unique<Array>(1, contiguous(numel));
    else
      array = std::make_unique<Array>(DType(int(type)), contiguous(numel));
  }
  double get(int64_t i) const { return type == PixelType::kUInt8 ? double(array->raw(i)) : array->get(i); }
  void set(int64_t i, double x) {
    type == PixelType::kUInt8 ? array->set_raw(i, uint64_t(x)) : array->set(i, x);
  }
};

double bounded(double x, double bound) { return x < 0 ? 0 : x > bound ? bound : x; }
double keys(double x, double a) {
  x = std::fabs(x);
  return x < 1 ? ((a + 2) * x - (a + 3)) * x * x + 1 : x < 2 ? ((a * x - 5 * a) * x + 8 * a) * x - 4 * a : 0;
}
// What the formulas give, pixel by pixel: image(c, y, x) at (u, v).
template <class F>
double sampled(F image, double u, double v, int64_t height, int64_t width, const AugmentCase& c,
               double fill) {
  if (c.interpolation == Interpolation::kNearest) u = std::nearbyint(u), v = std::nearbyint(v);
  double sum = 0, inside = 0;
  for (int64_t y = int64_t(std::floor(v)) - 1; y <= int64_t(std::floor(v)) + 2; ++y)
    for (int64_t x = int64_t(std::floor(u)) - 1; x <= int64_t(std::floor(u)) + 2; ++x) {
      const auto weight = [&](double d) {
        return c.interpolation == Interpolation::kBicubic ? keys(d, -0.75)
               : std::fabs(d) < 1                         ? 1 - std::fabs(d)
                                                          : 0;
      };
      const auto found = [&](int64_t i, int64_t n) -> int64_t {
        if (c.padding == Padding::kReflect) {
          while (i < 0 || i >= n) i = i < 0 ? -1 - i : 2 * n - 1 - i;
          return i;
        }
        if (c.padding == Padding::kBorder) return i < 0 ? 0 : i >= n ? n - 1 : i;
        return i < 0 || i >= n ? -1 : i;
      };
      const double w = weight(double(x) - u) * weight(double(y) - v);
      const int64_t column = found(x, width), row = found(y, height);
      if (w == 0 || column < 0 || row < 0) continue;
      inside += w;
      sum += w * image(row, column);
    }
  if (c.padding != Padding::kFill) return sum;
  return c.interpolation == Interpolation::kNearest ? (inside < 0.5 ? fill : sum)
                                                    : inside * (sum - fill) + fill;
}

void augment_case(const AugmentCase& c, int count, Digest& digest) {
  Random random{uint64_t(count) * 31 + 5};
  const int64_t in_values = c.batch * c.channels * c.height * c.width, pixels = c.out_height * c.out_width;
  const double bound = c.in == PixelType::kUInt8 ? 255 : 1;
  Pixels images(c.in, in_values), out(c.out, c.batch * c.channels * pixels);
  for (int64_t i = 0; i < in_values; ++i)
    images.set(i, c.in == PixelType::kUInt8 ? double(random.below(256)) : random.uniform());
  std::vector<double> matrices, colour, blur, constants;
  std::vector<int64_t> boxes, windows;
  for (int64_t i = 0; i < c.batch; ++i) {
    // cosine and sine by the tangent of half the angle: C libraries differ in their last bits
    const double tangent = i % 3 ? 6 * random.uniform() - 3 : 0,
                 scale = (c.antialias ? 3 : 1) * (0.5 + random.uniform());
    const double a = scale * (1 - tangent * tangent) / (1 + tangent * tangent),
                 b = scale * 2 * tangent / (1 + tangent * tangent);
    const double height = c.windowed ? double(c.height - 1) : double(c.height),
                 width = c.windowed ? double(c.width - 1) : double(c.width);
    // Away from ties of the nearest pixel, which rounding decides.
    const double u = 0.0123 + std::floor(3 * random.uniform()), v = 0.0071 - std::floor(2 * random.uniform());
    const double cx = double(c.out_width - 1) / 2, cy = double(c.out_height - 1) / 2;
    const bool plain = i % 4 == 3;  // whole pixels, backwards
    for (const double m :
         {plain ? -1 : a, plain ? 0 : b, plain ? width : (width - 1) / 2 - a * cx - b * cy + u,
          plain ? 0 : -b, plain ? 1 : a, plain ? -1 : (height - 1) / 2 + b * cx - a * cy + v})
      matrices.push_back(m);
    for (const double factor :
         {0.5 + random.uniform(), 0.5 + random.uniform(), 0.5 + random.uniform(), random.uniform() - 0.5})
      colour.push_back(factor);
    for (const double w : {0.25, 0.5, 0.25, 0.125, 0.25, 0.25, 0.25, 0.125})
      blur.push_back(w);  // 3 across, 5 down
    for (const int64_t side : {int64_t(i), int64_t(1), int64_t(3), int64_t(c.out_width + 5)})
      boxes.push_back(side);
    for (const int64_t side : {int64_t(1), int64_t(0), c.height - 1, c.width - 1}) windows.push_back(side);
  }
  for (int64_t i = 0; i < 4 * c.channels; ++i) constants.push_back(0.25 + 0.1 * double(i));

  AugmentArgs a{};
  a.in_type = c.in;
  a.out_type = c.out;
  a.batch = c.batch;
  a.channels = c.channels;
  a.in_height = c.height;
  a.in_width = c.width;
  a.out_height = c.out_height;
  a.out_width = c.out_width;
  a.images = images.array->data();
  a.output = out.array->data();
  const auto strides = [&](int64_t* stride, int64_t height, int64_t width) {
    const int64_t planar[] = {c.channels * height * width, height * width, width, 1};
    const int64_t last[] = {c.channels * height * width, 1, width * c.channels, c.channels};
    for (int d = 0; d < 4; ++d) stride[d] = c.last ? last[d] : planar[d];
  };
  strides(a.in_stride, c.height, c.width);
  strides(a.out_stride, c.out_height, c.out_width);
  a.matrices = c.warped ? matrices.data() : nullptr;
  a.colour = colour.data();
  a.colour_steps = c.colour_steps;
  a.blur = c.blurred ? blur.data() : nullptr;
  a.blur_width = c.blurred ? 3 : 1;
  a.blur_height = c.blurred ? 5 : 1;
  a.boxes = c.boxed ? boxes.data() : nullptr;
  a.windows = c.windowed ? windows.data() : nullptr;
  a.constants = constants.data();
  a.interpolation = c.interpolation;
  a.padding = c.padding;
  a.antialias = c.antialias;
  a.normalise = c.normalise;
  const AugmentKernels& k = kernels::augment_kernels;
  const auto memory = [](int64_t bytes) {
    return std::unique_ptr<char, void (*)(void*)>(static_cast<char*>(bytes ? malloc(size_t(bytes)) : nullptr),
                                                  free);
  };
  const auto source = memory(k.source_bytes(a)), image = memory(k.image_bytes(a)),
             rows = memory(k.rows_bytes(a));
  std::vector<double> sums(static_cast<size_t>(c.out_height));
  const AugmentScratch scratch = {source.get(), image.get(), sums.data(), rows.get()};
  for (int64_t i = 0; i < c.batch; ++i) {
    const auto halves = [&](auto kernel, int64_t n) {
      kernel(a, scratch, i, n / 3, n);
      kernel(a, scratch, i, 0, n / 3);
    };
    if (source) halves(k.source, k.source_rows(a));
    if (image) halves(k.prepare, c.out_height);
    halves(k.finish, c.out_height);
  }
  out.array->expect_guards("augmented");
  out.array->add_to(digest);

  if (c.antialias || c.out == PixelType::kUInt8) return;  // tests/test_augment.py compares those with torch
  const int64_t height = c.windowed ? c.height - 1 : c.height, width = c.windowed ? c.width - 1 : c.width;
  const double narrow = c.out == PixelType::kFloat16 ? 2e-3 : c.out == PixelType::kBFloat16 ? 2e-2 : 2e-5;
  std::vector<double> image_of(static_cast<size_t>(c.channels * pixels)), blurred(image_of.size());
  const auto at = [&](std::vector<double>& from, int64_t channel, int64_t i) -> double& {
    return from[size_t(channel * pixels + i)];
  };
  for (int64_t i = 0; i < c.batch; ++i) {
    const double *m = &matrices[size_t(6 * i)], *f = &colour[size_t(4 * i)];
    for (int64_t channel = 0; channel < c.channels; ++channel)
      for (int64_t p = 0; p < pixels; ++p) {
        const double x = double(p % c.out_width), y = double(p / c.out_width);
        const auto pixel = [&](int64_t row, int64_t column) {
          const int64_t top = c.windowed;
          return images.get(i * a.in_stride[0] + channel * a.in_stride[1] + (row + top) * a.in_stride[2] +
                            column * a.in_stride[3]);
        };
        at(image_of, channel, p) =
            c.warped ? sampled(pixel, m[0] * x + m[1] * y + m[2], m[3] * x + m[4] * y + m[5], height, width,
                               c, constants[size_t(channel)])
                     : pixel(int64_t(y), int64_t(x));
      }
    const auto grey = [&](int64_t p) {
      if (c.channels == 1) return at(image_of, 0, p);
      return 0.2989 * at(image_of, 0, p) + 0.587 * at(image_of, 1, p) + 0.114 * at(image_of, 2, p);
    };
    for (double& p : image_of)
      if (c.colour_steps & kBrightness) p = bounded(p * f[0], bound);
    double mean = 0;
    for (int64_t p = 0; p < pixels && c.colour_steps & kContrast; ++p) mean += grey(p) / double(pixels);
    for (double& p : image_of)
      if (c.colour_steps & kContrast) p = bounded(p * f[1] + (1 - f[1]) * mean, bound);
    for (int64_t p = 0; p < pixels && c.colour_steps & kSaturation && c.channels == 3; ++p) {
      const double g = grey(p);
      for (int64_t channel = 0; channel < 3; ++channel) {
        double& value = at(image_of, channel, p);
        value = bounded(value * f[2] + (1 - f[2]) * g, bound);
      }
    }
    for (int64_t p = 0; p < pixels && c.colour_steps & kHue && c.channels == 3;
         ++p) {  // turned back, six sectors
      const double r = at(image_of, 0, p), g = at(image_of, 1, p), b = at(image_of, 2, p);
      const double v = std::fmax(r, std::fmax(g, b)), low = std::fmin(r, std::fmin(g, b)),
                   d = v == low ? 1 : v - low;
      double h = v == r ? (g - b) / d : v == g ? 2 + (b - r) / d : 4 + (r - g) / d;
      h = std::fmod(h + 6 * f[3] + 12, 6);
      const double part = h - std::floor(h), q = v - (v - low) * part, t = v - (v - low) * (1 - part);
      const double table[6][3] = {{v, t, low}, {q, v, low}, {low, v, t},
                                  {low, q, v}, {t, low, v}, {v, low, q}};
      for (int64_t channel = 0; channel < 3; ++channel) at(image_of, channel, p) = table[int(h)][channel];
    }
    blurred = image_of;
    if (c.blurred)
      for (int64_t channel = 0; channel < c.channels; ++channel)
        for (int64_t p = 0; p < pixels; ++p) {
          const auto folded = [](int64_t j, int64_t n) {
            while (n > 1 && (j < 0 || j >= n)) j = j < 0 ? -j : 2 * (n - 1) - j;
            return n > 1 ? j : 0;
          };
          double& sum = at(blurred, channel, p) = 0;
          for (int64_t dy = 0; dy < 5; ++dy)
            for (int64_t dx = 0; dx < 3; ++dx)
              sum += blur[size_t(dx)] * blur[size_t(3 + dy)] *
                     at(image_of, channel,
                        folded(p / c.out_width + dy - 2, c.out_height) * c.out_width +
                            folded(p % c.out_width + dx - 1, c.out_width));
        }
    for (int64_t channel = 0; channel < c.channels; ++channel)
      for (int64_t p = 0; p < pixels; ++p) {
        const double* constant = &constants[size_t(channel)];
        double want = at(blurred, channel, p), size = bound;
        if (c.normalise)
          want = want * constant[2 * c.channels] + constant[3 * c.channels], size *= constant[2 * c.channels];
        const int64_t y = p / c.out_width, x = p % c.out_width;
        if (c.boxed && y >= i && y < i + 3 && x >= 1) want = constant[c.channels];
        const int64_t where =
            i * a.out_stride[0] + channel * a.out_stride[1] + y * a.out_stride[2] + x * a.out_stride[3];
        out.array->expect_near(where, want, narrow * (1 + size), "augmented");
      }
  }
}

// The gradient of a chain without colours is its transpose: <A x - A 0, g> = <x, A' g>, all in float64.
void augment_backward_case(AugmentCase c, int count, Digest& digest) {
  Random random{uint64_t(count) * 17 + 3};
  const int64_t in_values = c.channels * c.height * c.width,
                out_values = c.channels * c.out_height * c.out_width;
  Array images(DType::kFloat64, contiguous(in_values)), grad(DType::kFloat64, contiguous(out_values));
  Array out(DType::kFloat64, contiguous(out_values)), in_grad(DType::kFloat64, contiguous(in_values));
  const double tangent = 6 * random.uniform() - 3,
               scale = (c.antialias ? 3.1 : 0.9) / (1 + tangent * tangent);
  const double m = scale * (1 - tangent * tangent), n = scale * 2 * tangent;
  const double matrix[] = {m,  n, 0.3 - n * double(c.out_height) / 2,
                           -n, m, 0.4 + n * double(c.out_width) / 2};
  const double blur[] = {0.25, 0.5, 0.25, 0.125, 0.25, 0.25, 0.25, 0.125};
  std::vector<double> constants(size_t(4 * c.channels), 0.5);
  AugmentArgs a{};
  a.in_type = a.out_type = PixelType::kFloat64;
  a.batch = 1;
  a.channels = c.channels;
  a.in_height = c.height;
  a.in_width = c.width;
  a.out_height = c.out_height;
  a.out_width = c.out_width;
  const int64_t in_stride[] = {in_values, c.height * c.width, c.width, 1},
                out_stride[] = {out_values, c.out_height * c.out_width, c.out_width, 1};
  a.matrices = matrix;
  a.blur = blur;
  a.blur_width = 3;
  a.blur_height = 5;
  a.constants = constants.data();
  a.interpolation = c.interpolation;
  a.padding = c.padding;
  a.antialias = c.antialias;
  a.normalise = true;
  const AugmentKernels& k = kernels::augment_kernels;
  const auto forward = [&] {
    a.images = images.data();
    a.output = out.data();
    memcpy(a.in_stride, in_stride, sizeof in_stride);
    memcpy(a.out_stride, out_stride, sizeof out_stride);
    std::vector<char> source(size_t(k.source_bytes(a))), rows(size_t(k.rows_bytes(a)));
    const AugmentScratch scratch = {source.empty() ? nullptr : source.data(), nullptr, nullptr, rows.data()};
    if (!source.empty()) k.source(a, scratch, 0, 0, k.source_rows(a));
    k.finish(a, scratch, 0, 0, c.out_height);
  };
  double left = 0, right = 0, size = 0;
  for (int64_t i = 0; i < in_values; ++i) images.set(i, 0);
  for (int64_t i = 0; i < out_values; ++i) grad.set(i, random.signed_value());
  forward();
  for (int64_t i = 0; i < out_values; ++i) left -= grad.get(i) * out.get(i);
  for (int64_t i = 0; i < in_values; ++i) images.set(i, random.uniform());
  forward();
  for (int64_t i = 0; i < out_values; ++i)
    left += grad.get(i) * out.get(i), size += std::fabs(grad.get(i) * out.get(i));
  a.output = in_grad.data();
  a.grad = grad.data();
  memcpy(a.grad_stride, out_stride, sizeof out_stride);
  memcpy(a.out_stride, in_stride, sizeof in_stride);
  std::vector<char> memory(size_t(k.backward_bytes(a)));
  k.backward(a, memory.data(), 0);
  for (int64_t i = 0; i < in_values; ++i) right += in_grad.get(i) * images.get(i);
  if (!(std::fabs(left - right) <= 1e-9 * (1 + size)))
    fail("the gradient is not the transpose: %.17g, %.17g", left, right);
  in_grad.expect_guards("the images' gradient");
  in_grad.add_to(digest);
}

void augment() {
  const PixelType types[][2] = {
      {PixelType::kFloat32, PixelType::kFloat32}, {PixelType::kFloat64, PixelType::kFloat64},
      {PixelType::kFloat16, PixelType::kFloat16}, {PixelType::kBFloat16, PixelType::kFloat32},
      {PixelType::kUInt8, PixelType::kFloat32},   {PixelType::kUInt8, PixelType::kUInt8}};
  const int64_t sizes[][4] = {{9, 33, 9, 33}, {2, 2, 7, 19}, {31, 17, 5, 40}, {3, 65, 33, 3}};
  int count = 0;
  for (const auto& type : types)
    for (int interpolation = 0; interpolation < 3; ++interpolation)
      for (int padding = 0; padding < 4; ++padding)
        for (int variant = 0; variant < 8; ++variant, ++count) {
          const int64_t* size = sizes[variant % 4];
          AugmentCase c{};
          c.in = type[0];
          c.out = type[1];
          c.batch = 4;
          c.channels = variant % 3 == 1 ? 1 : 3;
          c.height = size[0];
          c.width = size[1];
          c.warped = variant != 4;
          c.out_height = c.warped ? size[2] : c.height;
          c.out_width = c.warped ? size[3] : c.width;
          c.colour_steps = count % 5 == 4 ? 0 : count * 7 % 16;
          c.interpolation = Interpolation(interpolation);
          c.padding = Padding(padding);
          c.last = variant == 2 || variant == 7;
          c.blurred = count % 3 == 0;
          c.boxed = count % 4 == 1;
          c.windowed = c.warped && variant == 5;
          c.antialias = c.warped && variant == 6;
          c.normalise = c.out != PixelType::kUInt8 && count % 2;
          current_case = "augment/" + std::to_string(count);
          augment_case(c, count,
                       digests["augment/" + std::to_string(int(c.in)) + "-" + std::to_string(int(c.out))]);
          if (variant % 4 == 0 && c.in == PixelType::kFloat32) {
            current_case = "augment backward/" + std::to_string(count);
            c.antialias = variant == 4;
            augment_backward_case(c, count, digests["augment/backward"]);
          }
        }
}

}  // namespace
}  // namespace fastreg::test

int main(int argc, char** argv) {
  using namespace fastreg;
  using namespace fastreg::test;
  const uint32_t stride = argc > 1 ? uint32_t(strtoul(argv[1], nullptr, 10)) : 1;
  if (stride % 2 == 0) {
    fprintf(stderr, "usage: kernel_test [odd stride of the sweep of exp]\n");
    return 2;
  }
  if (stride == 1) exp_float(1);
  exp_float(stride == 1 ? 4099 : stride);  // the coarse sweep has a digest that every run can be compared by
  log_float();
  exp_double(stride);
  conversions<Half>(DType::kFloat16);
  conversions<BFloat16>(DType::kBFloat16);
  partial_vectors<float>(DType::kFloat32);
  partial_vectors<double>(DType::kFloat64);
  partial_vectors<Half>(DType::kFloat16);
  partial_vectors<BFloat16>(DType::kBFloat16);
  pairs();
  philox();
  dropout();
  dropout_add();
  sgd();
  fgsm();
  cross_entropy();
  augment();
  for (const auto& [name, digest] : digests)
    printf("%s %016llx\n", name.c_str(), (unsigned long long)digest.hash);
  if (failures) fprintf(stderr, "%d failures\n", failures);
  return failures ? 1 : 0;
}
