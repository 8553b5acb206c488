// Tests of the kernel of SGD: float32 and float64 against the formula of sgd_math.h in double, within a few
// roundings; 16-bit tensors against the float32 result, rounded once, to nearest or by random bits.
#include <vector>

#include "../../csrc/sgd/sgd_math.h"
#include "harness.h"

namespace fastreg::test::sgd_test {
namespace {

struct SgdCase {
  SgdArgs args;
  double scale;  // of the gradient
  bool has_momentum, first_step, has_average, first_average;
  uint64_t seed;
  uint32_t tensor_index;
  Layout param, grad, momentum;
};

constexpr int64_t kSpan = 1024;  // where the second thread begins

void step(const SgdCase& c, DType dtype, Array& w, Array& g, Array& v, Array& average) {
  StepTensor t{};
  t.dtype = dtype;
  t.draw = c.tensor_index;
  t.columns = w.numel();
  t.data[kParam] = w.data();
  t.data[kGrad] = g.data();
  t.data[kMomentum] = c.has_momentum ? v.data() : nullptr;
  t.data[kAverage] = c.has_average ? average.data() : nullptr;
  t.layout[kParam] = w.layout;
  t.layout[kGrad] = g.layout;
  t.layout[kMomentum] = v.layout;
  t.layout[kAverage] = average.layout;
  float started = c.first_step ? 0 : 1, averaged = c.first_average ? 0 : 1;
  t.counter = &started;
  t.n_averaged = &averaged;
  const int64_t n = w.numel(), middle = n > kSpan ? kSpan : 0;
  kernels::sgd_kernels.step(c.args, t, middle, n);
  if (middle) kernels::sgd_kernels.step(c.args, t, 0, middle);
}

// Float32 and float64 are within a few roundings of the formula in double. `wide` is the type of w, g and v.
void expect_sgd_near(const SgdCase& c, DType wide, const std::vector<double>& w0,
                     const std::vector<double>& g0, const std::vector<double>& v0,
                     const std::vector<double>& average0, const Array& w, const Array& v,
                     const Array& average) {
  const SgdArgs& a = c.args;
  const double epsilon = std::ldexp(1., -format_of(wide).mantissa);
  for (size_t i = 0; i < w0.size(); ++i) {
    const double sign = w0[i] > 0 ? 1 : w0[i] < 0 ? -1 : 0;
    const double decay = a.step.weight_decay > 0 ? a.step.weight_decay * w0[i] : 0;
    const double penalty = decay + (a.step.proximal ? 0 : a.step.l1 * sign);
    double grad = g0[i] / c.scale * a.step.clip * (a.step.maximize ? -1 : 1), size = std::fabs(grad);
    if (!a.decoupled) grad += penalty, size += std::fabs(penalty);
    double velocity = grad;
    if (c.has_momentum) {
      velocity = c.first_step ? grad : a.momentum * v0[i] + (1 - a.dampening) * grad;
      size += std::fabs(a.momentum * v0[i]);
      v.expect_near(int64_t(i), velocity, 8 * epsilon * size, "momentum");
    }
    double step = c.has_momentum && a.nesterov ? grad + a.momentum * velocity : velocity;
    if (a.decoupled) step += penalty, size += std::fabs(penalty);
    double want = w0[i] - a.step.lr * step;
    const double tolerance = 8 * epsilon * (std::fabs(w0[i]) + a.step.lr * (2 * size + a.step.l1));
    if (a.step.proximal && a.step.l1 > 0) {
      const double rest = std::fabs(want) - a.step.lr * a.step.l1;
      want = std::isnan(want) ? want : rest <= 0 ? 0 : std::copysign(rest, want);
      if (rest < -tolerance) w.expect(int64_t(i), 0.);  // exactly 0, not about 0
    }
    w.expect_near(int64_t(i), want, tolerance, "weight");
    if (c.has_average) {
      const double moved = c.first_average ? want : a.step.ema * average0[i] + (1 - a.step.ema) * want;
      average.expect_near(int64_t(i), moved,
                          tolerance + 8 * epsilon * (std::fabs(average0[i]) + std::fabs(want)), "average");
    }
  }
}

void sgd_case(const SgdCase& c, DType dtype, Digest& digest) {
  const int64_t n = c.param.numel;
  const DType wide = accumulation(dtype);
  Random random{uint64_t(n) * 31 + c.tensor_index};
  Array w(dtype, c.param), g(dtype, c.grad), v(dtype, c.momentum), average(dtype, c.momentum);
  Array wide_w(wide, contiguous(n)), wide_g(wide, contiguous(n)), wide_v(wide, contiguous(n)),
      wide_average(wide, contiguous(n));
  for (int64_t i = 0; i < n; ++i) {
    w.set(i, random.below(8) ? random.signed_value() : 0);
    g.set(i, random.below(8) ? random.signed_value() : 0);
    v.set(i, c.first_step ? 0 : random.signed_value());
    average.set(i, random.signed_value());
  }
  if (n > 8) {
    w.set(random.below(n), kInfinity);
    w.set(random.below(n), kNaN);
    w.set(random.below(n), -0.);
    g.set(random.below(n), -kInfinity);
    g.set(random.below(n), kNaN);
  }
  std::vector<double> w0, g0, v0, average0;
  for (int64_t i = 0; i < n; ++i) {
    w0.push_back(w.get(i));
    g0.push_back(g.get(i));
    v0.push_back(v.get(i));
    average0.push_back(average.get(i));
    wide_w.set(i, w0.back());
    wide_g.set(i, g0.back());
    wide_v.set(i, v0.back());
    wide_average.set(i, average0.back());
  }
  step(c, dtype, w, g, v, average);
  step(c, wide, wide_w, wide_g, wide_v, wide_average);
  expect_sgd_near(c, wide, w0, g0, v0, average0, wide_w, wide_v, wide_average);

  // A 16-bit tensor holds what float32 arithmetic gives, rounded once.
  Halves halves{mix_seed(c.seed, c.first_step ? 0 : 1), c.tensor_index, 1};
  const auto expect_rounded = [&](const Array& narrow, const Array& exact, int64_t i) {
    if (dtype == DType::kBFloat16 && c.args.step.stochastic_rounding && std::isfinite(exact.get(i)))
      narrow.expect(i, decode(dtype, (exact.raw(i) + halves.at(uint64_t(i))) >> 16));
    else
      narrow.expect(i, round_to(dtype, exact.get(i)));
  };
  for (int64_t i = 0; i < n; ++i) {
    expect_rounded(w, wide_w, i);
    if (c.has_average) expect_rounded(average, wide_average, i);
    if (c.has_momentum) v.expect(i, round_to(dtype, wide_v.get(i)));
  }
  w.expect_guards("weight");
  v.expect_guards("momentum");
  average.expect_guards("average");
  w.add_to(digest);
  if (c.has_momentum) v.add_to(digest);
  if (c.has_average) average.add_to(digest);
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
          c.args.step.lr = 0.1;
          c.args.momentum = momentum ? 0.9 : 0;
          c.args.dampening = variant % 4 == 1 ? 0.5 : 0;
          c.args.step.weight_decay = penalty && variant % 3 != 1 ? 0.01 : 0;
          c.args.step.l1 = penalty && variant % 3 != 2 ? 0.003 : 0;
          c.args.step.proximal = variant / 2 % 2;
          if (!penalty && c.args.step.proximal) c.args.step.l1 = 0.5;  // leaves the gradient alone
          c.scale = variant % 5 == 2 ? 64 : 1;
          c.args.step.clip = variant % 6 == 4 ? 0.75 : 1;
          c.args.step.ema =
              variant % 2 ? 0.9 : 0.6;  // of an infinity torch.lerp makes a NaN at 0.5 and below
          c.args.nesterov = momentum == 2;
          c.args.decoupled = penalty == 2;
          c.args.step.maximize = variant % 7 == 3;
          c.args.step.grad_factor = (c.args.step.maximize ? -1 : 1) / c.scale;
          c.seed = 0xfedcba9876543210u + unsigned(count);
          c.args.step.stochastic_rounding = variant / 4 % 2;
          c.args.step.seed = {c.seed, nullptr};
          c.has_momentum = momentum != 0;
          c.has_average = variant % 5 < 2;
          c.first_average = variant % 5 == 1;
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
const Case sgd_cases(sgd);

}  // namespace
}  // namespace fastreg::test::sgd_test
