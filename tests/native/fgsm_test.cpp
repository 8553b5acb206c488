// Tests of the kernels of FGSM and PGD against the formulas of fgsm_math.h, every step rounded as the kernel
// rounds it, with steps, radii and bounds of each shape that the operator takes.
#include "../../csrc/fgsm/fgsm_math.h"
#include "harness.h"

namespace fastreg::test::fgsm_test {
namespace {

// A parameter in one of its shapes, and the array that its values lie in.
struct Parameter {
  FgsmParameter parameter{};
  std::unique_ptr<Array> values;
  double at(int64_t i, DType type) const {
    return values ? values->get(i / parameter.inner % parameter.count) : round_to(type, parameter.value);
  }
};
Parameter make_parameter(int kind, int64_t n, DType type, double center, Random& random) {
  Parameter result;
  result.parameter.value = center;
  if (kind == 0) return result;
  // per channel, per element, per element of the last dimension
  const int64_t channels = n % 3 == 0 ? 3 : 1;
  result.parameter.inner = kind == 1 ? n / channels : 1;
  result.parameter.count = kind == 1 ? channels : kind == 2 ? n : n % 5 == 0 ? 5 : n % 31 == 0 ? 31 : 1;
  result.values = std::make_unique<Array>(type, contiguous(result.parameter.count));
  for (int64_t i = 0; i < result.parameter.count; ++i) result.values->set(i, center + 0.1 * random.uniform());
  result.parameter.values = result.values->data();
  return result;
}

void fgsm_case(DType dtype, bool project, int64_t n, int count, Digest& digest) {
  current_case = std::string(project ? "pgd/" : "fgsm/") + name_of(dtype) + " n " + std::to_string(n) +
                 " case " + std::to_string(count);
  // Tensors in several layouts, hostile numbers among them, and parameters of every kind.
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
  const Parameter step = make_parameter(kind(), n, type, 0.03, random),
                  radius = make_parameter(kind(), n, type, 0.04, random);
  const Parameter lower = make_parameter(kind(), n, type, 0, random),
                  upper = make_parameter(kind(), n, type, 0.9, random);
  // The kernel, in two spans.
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
  a.step = step.parameter;
  if (project) a.radius = radius.parameter;
  a.lower = lower.parameter;
  a.upper = upper.parameter;
  kernels::fgsm_kernels.step(a, n / 3, n);
  kernels::fgsm_kernels.step(a, 0, n / 3);

  // The formula, rounded as the kernel rounds.
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
const Case fgsm_cases(fgsm);

}  // namespace
}  // namespace fastreg::test::fgsm_test
