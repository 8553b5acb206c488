// Tests of the kernel of AdamW: float32 and float64 against the formula of adamw_math.h in double, within
// some roundings; 16-bit tensors against the float32 result, rounded once, to nearest or by random bits.
#include <vector>

#include "../../csrc/adamw/adamw_math.h"
#include "harness.h"

namespace fastreg::test::adamw_test {
namespace {

constexpr int64_t kSpan = 1024;  // where the second thread begins
const char* const kNames[kSlots] = {"weight",  "gradient",   "average",
                                    "exp_avg", "exp_avg_sq", "max_exp_avg_sq"};

struct AdamwCase {
  AdamwArgs args;
  float steps, n_averaged;
  bool has[kSlots];
  uint64_t seed;
  uint32_t tensor_index;
  Layout layout[kSlots];
};

void step(AdamwCase c, DType dtype, std::vector<Array>& slots) {
  StepTensor t{};
  t.dtype = dtype;
  t.draw = c.tensor_index;
  t.columns = slots[0].numel();
  for (int s = 0; s < kSlots; ++s) {
    t.data[s] = c.has[s] ? slots[size_t(s)].data() : nullptr;
    t.layout[s] = slots[size_t(s)].layout;
  }
  t.counter = &c.steps;
  t.n_averaged = &c.n_averaged;
  const int64_t n = slots[0].numel(), middle = n > kSpan ? kSpan : 0;
  kernels::adamw_kernels.step(c.args, t, middle, n);
  if (middle) kernels::adamw_kernels.step(c.args, t, 0, middle);
}

// `old` and `now` are of the type `wide`.
void expect_adamw_near(const AdamwCase& c, DType wide, const std::vector<std::vector<double>>& old,
                       const std::vector<Array>& now) {
  const AdamwArgs& a = c.args;
  const double epsilon = 16 * std::ldexp(1., -format_of(wide).mantissa), t = double(c.steps) + 1;
  const double correction1 = 1 - std::pow(a.beta1, t), correction2 = 1 - std::pow(a.beta2, t);
  for (size_t i = 0; i < old[kParam].size(); ++i) {
    const double w = old[kParam][i], sign = w > 0 ? 1 : w < 0 ? -1 : 0, l1 = a.step.l1;
    const double g = old[kGrad][i] * a.step.grad_factor * a.step.clip + (a.step.proximal ? 0 : l1 * sign);
    const double m = a.beta1 * old[kExpAvg][i] + (1 - a.beta1) * g;
    const double v = a.beta2 * old[kExpAvgSq][i] + (1 - a.beta2) * g * g;
    const double scale = std::fabs(old[kExpAvg][i]) + std::fabs(g), at = double(i);
    now[kExpAvg].expect_near(int64_t(at), m, epsilon * scale, kNames[kExpAvg]);
    now[kExpAvgSq].expect_near(int64_t(at), v, epsilon * v, kNames[kExpAvgSq]);
    const double most = c.has[kMaxExpAvgSq] ? std::fmax(old[kMaxExpAvgSq][i], v) : v;
    if (c.has[kMaxExpAvgSq] && !std::isnan(v))
      now[kMaxExpAvgSq].expect_near(int64_t(at), most, epsilon * most, kNames[kMaxExpAvgSq]);
    const double d = std::sqrt(std::isnan(v) ? v : most) / std::sqrt(correction2) + a.eps;
    const bool decays = !a.cautious || !((m > 0 && w < 0) || (m < 0 && w > 0));
    double want = w * (decays ? 1 - a.step.lr * a.step.weight_decay : 1) - a.step.lr * m / correction1 / d;
    // A rounding of 0.999^t is many of what it lacks to 1.
    const double lost = 1 + 1 / correction2;
    const double tolerance = epsilon * (std::fabs(w) + a.step.lr * (scale / correction1 + l1) / d * lost);
    if (a.step.proximal && l1 > 0) {
      const double rest = std::fabs(want) - a.step.lr * l1 / d;
      want = std::isnan(want) ? want : rest <= 0 ? 0 : std::copysign(rest, want);
      if (rest < -tolerance) now[kParam].expect(int64_t(at), 0.);  // exactly 0, not about 0
    }
    now[kParam].expect_near(int64_t(at), want, tolerance, kNames[kParam]);
    if (!c.has[kAverage]) continue;
    const double average = old[kAverage][i];
    now[kAverage].expect_near(int64_t(at),
                              c.n_averaged == 0 ? want : a.step.ema * average + (1 - a.step.ema) * want,
                              tolerance + epsilon * (std::fabs(average) + std::fabs(want)), kNames[kAverage]);
  }
}

void adamw_case(const AdamwCase& c, DType dtype, Digest& digest) {
  const int64_t n = c.layout[kParam].numel;
  const DType wide = accumulation(dtype);
  Random random{uint64_t(n) * 31 + c.tensor_index};
  std::vector<Array> slots, exact;
  std::vector<std::vector<double>> old(kSlots);
  for (int s = 0; s < kSlots; ++s) {
    slots.emplace_back(dtype, c.layout[s]);
    exact.emplace_back(wide, contiguous(n));
    Array& slot = slots.back();
    for (int64_t i = 0; i < n; ++i) {
      const double value = random.signed_value();
      slot.set(i, s >= kExpAvgSq ? std::fabs(value) : random.below(8) ? value : 0);
    }
    // Of an infinity torch.lerp makes a NaN from the end that is nearer to it.
    if (n > 8 && s <= kGrad && c.args.beta1 > 0.5) {
      slot.set(random.below(n), kInfinity);
      slot.set(random.below(n), kNaN);
      slot.set(random.below(n), -0.);
    }
    for (int64_t i = 0; i < n; ++i) {
      old[size_t(s)].push_back(slot.get(i));
      exact.back().set(i, slot.get(i));
    }
  }
  step(c, dtype, slots);
  step(c, wide, exact);
  expect_adamw_near(c, wide, old, exact);

  // A 16-bit tensor holds what float32 arithmetic gives, rounded once.
  Halves halves{mix_seed(c.seed, uint64_t(c.steps)), c.tensor_index, 1};
  for (int s = 0; s < kSlots; ++s) {
    const Array &narrow = slots[size_t(s)], &from = exact[size_t(s)];
    narrow.expect_guards(kNames[s]);
    if (!c.has[s] || s == kGrad) continue;
    const bool stochastic = dtype == DType::kBFloat16 && c.args.step.stochastic_rounding && s <= kAverage;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = halves.at(uint64_t(i));
      if (stochastic && std::isfinite(from.get(i)))
        narrow.expect(i, decode(dtype, (from.raw(i) + bits) >> 16));
      else
        narrow.expect(i, round_to(dtype, from.get(i)));
    }
    narrow.add_to(digest);
  }
}

void adamw() {
  int count = 0;
  for (const DType dtype : kDTypes) {
    for (int form = 0; form < 4; ++form) {
      const bool amsgrad = form % 2, average = form / 2;
      const std::string name = std::string("adamw/") + name_of(dtype) + (amsgrad ? "/amsgrad" : "/plain") +
                               (average ? "/average" : "");
      for (int variant = 0; variant < 30; ++variant, ++count) {
        const int64_t n = kSizes[count % std::size(kSizes)];
        const Layout layouts[] = {contiguous(n), every_third(n), transposed(n)};
        AdamwCase c{};
        c.args.step.lr = 0.1;
        c.args.step.weight_decay = variant % 3 ? 0.01 : 0;
        c.args.step.l1 = variant % 4 < 2 ? 0 : 0.05;
        c.args.step.proximal = variant % 8 < 4;
        c.args.step.ema = variant % 2 ? 0.9 : 0.6;
        c.args.step.clip = variant % 6 == 4 ? 0.75 : 1;
        c.args.step.maximize = variant % 7 == 3;
        c.args.step.grad_factor = (c.args.step.maximize ? -1. : 1.) / (variant % 5 == 2 ? 64 : 1);
        c.args.beta1 = variant % 5 == 3 ? 0.25 : 0.9;
        c.args.beta2 = variant % 9 == 5 ? 0.5 : 0.999;
        c.args.eps = 1e-4;
        c.args.cautious = variant % 5 == 1;
        c.seed = 0xfedcba9876543210u + unsigned(count);
        c.args.step.stochastic_rounding = variant / 4 % 2;
        c.args.step.seed = {c.seed, nullptr};
        c.steps = float(variant % 4 ? variant : 0);
        c.n_averaged = float(variant % 3);
        for (int s = 0; s < kSlots; ++s) {
          c.has[s] = s == kMaxExpAvgSq ? amsgrad : s == kAverage ? average : true;
          c.layout[s] = layouts[variant % 3 == 2 ? (count + s * variant) % 3 : 0];
        }
        c.tensor_index = uint32_t(count);
        current_case = name + " n " + std::to_string(n) + " variant " + std::to_string(variant);
        adamw_case(c, dtype, digests[name]);
      }
    }
  }
}
const Case adamw_cases(adamw);

}  // namespace
}  // namespace fastreg::test::adamw_test
