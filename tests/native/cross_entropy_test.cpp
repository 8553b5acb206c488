// Tests of the kernel of cross-entropy: loss, lse and gradient against the formulas of cross_entropy_math.h
// in double, for rows that lie one after the other and side by side, hard and soft targets, all smoothings,
// and logits of every sort that a formula could trip over.
#include <vector>

#include "../../csrc/cross_entropy/cross_entropy_math.h"
#include "harness.h"

namespace fastreg::test::cross_entropy_test {
namespace {

struct CrossEntropyCase {
  DType dtype;
  bool soft, weighted, with_grad, nd, in_place;  // in place: the gradient overwrites the logits
  int64_t outer, inner, classes;
  double mix, base, z_loss;
  int count;
};

// Of shape (outer, inner, classes), with gaps in memory between rows.
Layout rows(int64_t outer, int64_t inner, int64_t classes, bool nd) {
  Layout layout{};
  layout.numel = outer * inner * classes;
  layout.dims = 3;
  layout.contiguous = false;
  layout.size[0] = outer, layout.size[1] = inner, layout.size[2] = classes;
  layout.stride[1] = nd ? 1 : classes + 3;
  layout.stride[2] = nd ? inner + 2 : 1;
  layout.stride[0] = nd ? classes * layout.stride[2] + 1 : inner * layout.stride[1];
  return layout;
}

// Logits of each sort that a formula could trip over. A row is one distribution over k classes.
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

constexpr int64_t kIgnored = -100;

DType grad_dtype(const CrossEntropyCase& c) {
  return c.dtype == DType::kFloat16 && !c.in_place ? DType::kFloat32 : c.dtype;
}
DType soft_dtype(const CrossEntropyCase& c) { return c.count % 2 ? c.dtype : DType::kFloat32; }
Layout logits_layout(const CrossEntropyCase& c, bool nd) { return rows(c.outer, c.inner, c.classes, nd); }

struct Tensors {
  Array logits, soft, separate, weight, target, loss, lse, row_factor;
  Array& grad;
  std::vector<double> inputs;  // the logits before the kernel runs, which may overwrite them

  explicit Tensors(const CrossEntropyCase& c)
      : logits(c.dtype, logits_layout(c, c.nd)),
        soft(soft_dtype(c), logits_layout(c, c.count % 3 == 0)),
        separate(grad_dtype(c), logits_layout(c, c.count % 5 == 4 ? !c.nd : c.nd)),
        weight(accumulation(c.dtype), contiguous(c.classes)),
        target(8, contiguous(c.outer * c.inner)),
        loss(DType::kFloat64, contiguous(c.outer * c.inner)),
        lse(accumulation(c.dtype), contiguous(c.outer * c.inner)),
        row_factor(accumulation(c.dtype), contiguous(c.outer * c.inner)),
        grad(c.in_place ? logits : separate) {
    const int64_t k = c.classes, count = c.outer * c.inner;
    Random random{uint64_t(c.count) + 1000};
    for (int64_t r = 0; r < count; ++r) {
      const int64_t t = random.below(k);
      target.set_raw(r, uint64_t(!c.soft && r % 15 == 12 ? kIgnored : t));
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
    for (int64_t r = 0; r < count; ++r) row_factor.set(r, random.signed_value());
    for (int64_t i = 0; i < count * k; ++i) inputs.push_back(logits.get(i));
  }
};

CrossEntropyArgs arguments(const CrossEntropyCase& c, Tensors& t) {
  const auto strides = [](const Array& x) {
    return CrossEntropyArgs::Strides{x.layout.stride[0], x.layout.stride[1], x.layout.stride[2]};
  };
  CrossEntropyArgs a{};
  a.dtype = c.dtype;
  a.target_dtype = soft_dtype(c);
  a.logits = t.logits.data();
  a.grad = c.with_grad ? t.grad.data() : nullptr;
  a.target = c.soft ? nullptr : t.target.data<int64_t>();
  a.soft_target = c.soft ? t.soft.data() : nullptr;
  a.weight = c.weighted ? t.weight.data() : nullptr;
  a.row_loss = t.loss.data<double>();
  a.row_lse = t.lse.data();
  a.outer = c.outer;
  a.inner = c.inner;
  a.classes = c.classes;
  a.logits_stride = strides(t.logits);
  a.grad_stride = strides(t.grad);
  a.target_stride = strides(t.soft);
  a.ignore_index = kIgnored;
  a.mix = c.mix;
  a.base = c.base;
  a.z_loss = c.z_loss;
  a.grad_factor = c.count % 2 ? 1. / 7 : 1;
  a.row_factor = c.count % 7 == 2 ? t.row_factor.data() : nullptr;
  return a;
}

// What the formula gives for a row, and what its tolerances are made of.
struct ExpectedRow {
  std::vector<double> x, q;  // logits, and the weight of each class in the target
  bool undefined = false;    // a NaN, or inf - inf
  double top = 0, q_sum = 0, others = 0, log_sum = 0, lse = 0, loss = 0;
  double size = 0, farthest = 0;  // the sum of the loss's terms without signs; how far the least logit is

  ExpectedRow(const CrossEntropyCase& c, const Tensors& t, int64_t r)
      : x(static_cast<size_t>(c.classes)), q(static_cast<size_t>(c.classes)) {
    const int64_t k = c.classes, target = int64_t(t.target.raw(r));
    const auto hit = [&](int64_t i) { return c.soft ? t.soft.get(r * k + i) : i == target; };
    const auto weight = [&](int64_t i) { return c.weighted ? t.weight.get(i) : 1; };
    int64_t largest = 0;
    for (int64_t i = 0; i < k; ++i) {
      x[size_t(i)] = t.inputs[size_t(r * k + i)];
      undefined = undefined || std::isnan(x[size_t(i)]);
      if (x[size_t(i)] > x[size_t(largest)]) largest = i;
      q[size_t(i)] = weight(i) * (c.mix * hit(i) + c.base);
      q_sum += q[size_t(i)];
    }
    top = x[size_t(largest)];
    undefined = undefined || std::isinf(top);
    for (int64_t i = 0; i < k; ++i)
      if (i != largest) others += std::exp(x[size_t(i)] - top);
    log_sum = std::log1p(others);
    lse = undefined ? kNaN : top + log_sum;
    loss = c.z_loss * lse * lse;
    size = c.z_loss * (top * top + 1);
    for (int64_t i = 0; i < k; ++i) {
      const double shifted = x[size_t(i)] - top;
      if (q[size_t(i)] != 0) loss += q[size_t(i)] * (log_sum - shifted);
      // Base and mix count apart: where they cancel, what each was rounded to does not.
      const double parts = weight(i) * (c.base + std::fabs(c.mix) * hit(i));
      if (std::isfinite(shifted))
        size += parts * std::fabs(shifted), farthest = std::fmax(farthest, -shifted);
    }
  }
};

// Errors grow with the distance from the largest logit, which was rounded before exp saw it, and with the
// length of the sums. In float64 it is the reference whose errors count, since it has one sum where the
// kernel has several.
void expect_row(const CrossEntropyCase& c, const CrossEntropyArgs& a, const Tensors& t, int64_t r) {
  const ExpectedRow row(c, t, r);
  const int64_t k = c.classes;
  const DType type = accumulation(c.dtype);
  const bool wide = type == DType::kFloat64;
  const double epsilon = std::ldexp(1., -format_of(type).mantissa), sums = 16 + double(k) / (wide ? 1 : 32);
  const double flushed = wide ? 1e-300 : 1.2e-38;
  // Rows side by side, and those of few classes, are computed in the type of the sums to the end, others in
  // double.
  const bool columns = (a.logits_stride.inner == 1 && a.logits_stride.cls != 1) || k <= 48;
  const double last_bit = columns ? 4 * epsilon : epsilon;

  // Beyond a distance of 90 an exponential is 0, however wrong the distance.
  const double size = row.size + std::fabs(row.q_sum) * std::fmin(row.log_sum, row.others) *
                                     (1 + std::fmin(row.farthest, 90) / sums);
  // The kernel subtracts q_sum times the largest logit from the sum of all q_c x_c, in double.
  const double cancelled = row.undefined ? 0 : 0x1p-50 * std::fabs(row.q_sum * row.top);
  t.loss.expect_near(r, row.loss,
                     epsilon * sums * size + std::fabs(row.q_sum) * double(k) * flushed + cancelled, "loss");
  if (!row.undefined)
    t.lse.expect_near(r, row.lse,
                      epsilon * (sums + 90) * std::fmin(row.log_sum, row.others) +
                          last_bit * (std::fabs(row.top) + row.log_sum) + double(k) * flushed,
                      "lse");
  if (!c.with_grad) return;

  const Format grad_format = format_of(grad_dtype(c));
  const double grad_epsilon = std::ldexp(1., -1 - grad_format.mantissa);
  const double smallest = std::ldexp(1., 1 - grad_format.bias - grad_format.mantissa);  // subnormal
  const double grad_factor = a.row_factor ? t.row_factor.get(r) : a.grad_factor;
  const double factor = (row.q_sum + 2 * c.z_loss * row.lse) * grad_factor;
  for (int64_t i = 0; i < k; ++i) {
    const double p = std::exp(row.x[size_t(i)] - row.top - row.log_sum), hit = row.q[size_t(i)] * grad_factor;
    const double want = row.undefined ? kNaN : factor * p - hit;
    const double tolerance =
        epsilon * ((sums + std::fmin(row.farthest, 90)) * std::fabs(factor) * p + 4 * std::fabs(hit)) +
        grad_epsilon * std::fabs(want) + flushed * (1 + std::fabs(factor)) + smallest / 2;
    t.grad.expect_near(r * k + i, want, tolerance, "gradient");
  }
}

void cross_entropy_case(const CrossEntropyCase& c, const std::string& name) {
  const int64_t k = c.classes, count = c.outer * c.inner;
  current_case = name + " classes " + std::to_string(k) + " case " + std::to_string(c.count);
  Tensors t(c);
  const CrossEntropyArgs a = arguments(c, t);
  const int64_t tiles = cross_entropy_tiles(a);
  kernels::cross_entropy_kernels.forward(a, tiles / 2, tiles);
  kernels::cross_entropy_kernels.forward(a, 0, tiles / 2);
  for (int64_t r = 0; r < count; ++r) {
    if (!c.soft && int64_t(t.target.raw(r)) == kIgnored) {
      t.loss.expect(r, 0);
      t.lse.expect(r, 0);
      for (int64_t i = 0; c.with_grad && i < k; ++i) t.grad.expect(r * k + i, 0);
    } else {
      expect_row(c, a, t, r);
    }
  }
  t.loss.expect_guards("loss");
  t.lse.expect_guards("lse");
  t.grad.expect_guards("gradient");
  Digest& losses = digests["libm " + name + "/loss"];
  t.loss.add_to(losses);
  t.lse.add_to(losses);
  if (c.with_grad) t.grad.add_to(digests[(c.dtype == DType::kFloat64 ? "libm " : "") + name + "/gradient"]);
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
            c.inner = k < 1000 ? (nd ? 19 : 27) : (nd ? 17 : 15);  // at least each sort of row once
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
const Case cross_entropy_cases(cross_entropy);

}  // namespace
}  // namespace fastreg::test::cross_entropy_test
