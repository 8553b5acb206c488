// Tests of what the CPU kernels share: exp and log against the C library in a wider type, conversions of
// number formats, vectors of fewer lanes than there are, subnormal numbers, Philox against its known answers.
// The header of simd_math.h promises how far exp and log may be off.
#include <vector>

#include "../../csrc/common/flush.h"
#include "../../csrc/common/flush_mode.h"
#include "../../csrc/common/philox.h"
#include "../../csrc/common/simd.h"
#include "harness.h"

namespace fastreg::test::common_test {
namespace {

// ---- exp and log

// exp_nonpositive promises: within 2 ulp, and 0 below -87.68, which lies within 0.005 of -126.5 ln 2.
constexpr double kMaxUlp = 2;
constexpr float kAccurateFrom = -87.68f, kZeroBelow = -87.69f;

// Distances in units of the last place of the format. The one of a float is computed 250 million times.
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
  // The sweep goes from -0 to -inf by the bits of the numbers, 16 at a time and without leaving the
  // registers: 600 million numbers.
  using V = kernels::Vec<float>;
  using Words = kernels::U32Part;
  constexpr uint32_t infinity = 0x7f800000u;
  // All floats from -2^-60 to -256 are looked at. Beyond, where the result is always 1 or 0, it is every 61st
  // vector: above -2^-63 the square of r is subnormal, which costs 100 times as much as the rest.
  constexpr uint32_t tiny = 0x21800000u, huge = 0x43800000u;
  Words lane[V::kParts], hash[V::kParts] = {};
  for (int j = 0; j < V::kLanes; ++j) lane[j / V::kPartLanes][j % V::kPartLanes] = uint32_t(j) * stride;
  for (uint64_t first = 0; first + 15 * uint64_t(stride) <= infinity;
       first += 16 * uint64_t(stride) * (first < tiny || first > huge ? 61 : 1)) {
    V x;
    for (int i = 0; i < V::kParts; ++i) x.part[i] = (V::Part)((lane[i] + uint32_t(first)) | 0x80000000u);
    const V got = kernels::exp_nonpositive(x);
    // Half of the range rounds to 1, and half of the rest to 0. Neither needs a reference.
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

// log of 1 and more, and log(1 + x) for x in [0, 0.125]: both promise 2 ulp.
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

void exp_sweep() {
  if (sweep_stride == 1) exp_float(1);
  exp_float(sweep_stride == 1 ? 4099 : sweep_stride);  // a full sweep also gives the digest of a coarse one
}
const Case exp_case(exp_sweep), log_case(log_float);

void exp_double() {
  current_case = "exp/float64";
  Random random{3};
  double worst = 0, x[8], got[8];
  const int count = (sweep_stride == 1 ? 1 << 20 : 1 << 14);
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
const Case exp_double_case(exp_double);

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

  // The inputs are every number of the format, the middle between it and the next and the floats on both
  // sides of that middle, and at last random bits.
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

// The loads and stores of bfloat16 in pairs give what the plain ones give, 32 neighbours at a time, for all
// bit patterns and for floats between them, a quarter of which are ties.
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
    // Random bits in the lower half of an infinity would make it a NaN, and pack_pairs keeps only NaNs whose
    // lower half is 0.
    for (auto& half : lane)
      for (float& x : half)
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

// Loads and stores of the first `count` lanes, which lie at the very end of what may be touched.
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

void formats() {
  conversions<Half>(DType::kFloat16);
  conversions<BFloat16>(DType::kBFloat16);
  partial_vectors<float>(DType::kFloat32);
  partial_vectors<double>(DType::kFloat64);
  partial_vectors<Half>(DType::kFloat16);
  partial_vectors<BFloat16>(DType::kBFloat16);
  pairs();
}
const Case formats_case(formats);

// ---- products and signs of subnormal numbers

void products() {
  current_case = "product";
  using V = kernels::Vec<float>;
  Random random{7};
  for (const float factor : {1.f, 2.f, 1 / 0.9f, 1 / 0.3f, 4 / 3.f, 0x1.fffffep0f, 1e3f, 0x1p60f, 0.75f})
    for (int round = 0; round < 4000; ++round) {
      float x[V::kLanes], got[V::kLanes];
      for (float& each : x) {
        const uint32_t bits = random.bits(), kind = uint32_t(random.below(8));
        // Mostly subnormal, some by few bits; and all other numbers, NaN and infinities among them.
        each = bits_float(kind < 5    ? bits & 0x807fffffu
                          : kind == 5 ? (bits & 0x80000000u) | (bits & 0x7fffffffu) >> random.below(31)
                          : kind == 6 ? 0x00800000u - 4 + bits % 8
                                      : bits);
      }
      if (round == 0) x[0] = 0.f, x[1] = -0.f, x[2] = bits_float(1), x[3] = bits_float(0x7f800000u);
      kernels::store(got, product(kernels::load(x), V(factor)));
      for (int j = 0; j < V::kLanes; ++j) {
        const float want = float(double(x[j]) * double(factor));  // exact before it is rounded
        if (want == want ? float_bits(want) != float_bits(got[j]) : got[j] == got[j])
          fail("%a * %a is %a, not %a", double(x[j]), double(factor), double(got[j]), double(want));
      }
    }
}
const Case products_case(products);

template <class A>
void signs_of(DType dtype) {
  current_case = std::string("sign/") + name_of(dtype);
  using V = kernels::Vec<A>;
  const A tiny = std::numeric_limits<A>::denorm_min(), least = std::numeric_limits<A>::min();
  const A numbers[] = {A(0),   A(-0.), tiny,  -tiny,        least - tiny,  tiny - least, least,
                       -least, A(1),   A(-1), A(kInfinity), A(-kInfinity), A(kNaN),      -A(kNaN)};
  for (const A x : numbers) {
    A above[V::kLanes], below[V::kLanes];
    kernels::store(above, select(is_positive(V(x)), V(1), V(0)));
    kernels::store(below, select(is_negative(V(x)), V(1), V(0)));
    for (int j = 0; j < V::kLanes; ++j)
      if (above[j] != A(x > 0) || below[j] != A(x < 0) || is_positive(x) != (x > 0) ||
          is_negative(x) != (x < 0))
        fail("the sign of %a is %g, %g", double(x), double(above[j]), double(below[j]));
  }
}
void signs() {
  signs_of<float>(DType::kFloat32);
  signs_of<double>(DType::kFloat64);
}
const Case signs_case(signs);

// What is computed is 0 where it is subnormal, before and after it is not, and what is moved stays.
void flush_mode() {
  current_case = "flush mode";
  volatile float small = 0x1p-130f, least = 0x1p-126f, half = 0.5f;
  volatile double wide = 0x1p-1030;
  float moved, product, of_least;
  double unchanged;
  {
    const kernels::FlushMode<float> mode;
    moved = small;
    product = small * 4096.f;
    of_least = least * half;
  }
  {
    const kernels::FlushMode<double> mode;
    unchanged = wide * 4;
  }
#if defined(__SSE2__) || defined(__aarch64__)
  if (product != 0 || of_least != 0) fail("the mode leaves %a and %a", double(product), double(of_least));
#endif
  if (moved != 0x1p-130f) fail("a number that was moved is %a", double(moved));
  if (unchanged != 0x1p-1028) fail("float64 is %a", unchanged);
  if (small * 4096.f != 0x1p-118f || least * half != 0x1p-127f) fail("the mode lasts");
}
const Case flush_mode_case(flush_mode);

// ---- Philox

void philox() {
  current_case = "philox";
  struct {
    Counter counter;
    uint32_t k0, k1;
    Counter answer;
  } const known[] = {// the file kat_vectors of Random123
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
const Case philox_case(philox);

}  // namespace
}  // namespace fastreg::test::common_test
