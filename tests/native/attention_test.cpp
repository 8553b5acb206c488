// Tests of attention's sweeps over a block of scores: the formulas of attention_math.h in double, with a mask
// drawn from Philox written anew.
#include <algorithm>
#include <vector>

#include "../../csrc/attention/attention_math.h"
#include "harness.h"

namespace fastreg::test::attention_test {
namespace {

constexpr int64_t kHeads = 2, kRows = 3, kFirstRow = 5;
constexpr uint64_t kSeed = 77, kThreshold = uint64_t(0.7 * 0x1p32);  // not decided by 16 bits alone

struct AttentionCase {
  DType dtype;
  int64_t columns;
  bool is_causal, normalised, has_mask, in_place;
};

// One row in double: (dropped weights, the gradient of the scores), and its largest score and sum.
struct Row {
  std::vector<double> dropped, d_scores;
  double largest, total;
};

Row reference(const AttentionCase& c, int64_t number, const std::vector<double>& scores,
              const std::vector<double>& gradients) {
  const int64_t n = c.columns, seen = c.is_causal ? std::min(n, number % kRows + 2) : n;
  const double factor = 0x1p32 / double(kThreshold);
  Halves high{kSeed, 0, 0}, low{kSeed, 1, 0};
  const auto kept = [&](int64_t j) {
    const uint64_t i = uint64_t(kFirstRow + number) * uint64_t(n + 3) + uint64_t(j);
    return uint64_t(high.at(i)) << 16 < (kThreshold & 0xffff0000u) ||
           (high.at(i) == kThreshold >> 16 && low.at(i) < (kThreshold & 0xffff));
  };
  Row row{std::vector<double>(size_t(n)), std::vector<double>(size_t(n)), -kInfinity, 0};
  std::vector<double> weights(static_cast<size_t>(n));
  for (int64_t j = 0; j < seen; ++j) row.largest = std::max(row.largest, scores[size_t(j)]);
  for (int64_t j = 0; j < seen; ++j)
    row.total += weights[size_t(j)] = std::exp(scores[size_t(j)] - row.largest);
  double sum = 0;
  for (size_t j = 0; j < size_t(seen); ++j) {
    row.dropped[j] = kept(int64_t(j)) ? weights[j] * factor : 0;
    sum += row.dropped[j] * gradients[j];
  }
  const double divisor = c.normalised ? row.total : 1;
  for (size_t j = 0; j < size_t(seen); ++j)
    row.d_scores[j] = (row.dropped[j] * gradients[j] - weights[j] * sum / row.total) / divisor;
  return row;
}

void attention_case(const AttentionCase& c, Digest& digest) {
  const int64_t n = c.columns, rows = kHeads * kRows, numel = rows * n;
  current_case = std::string("attention/") + name_of(c.dtype) + " columns " + std::to_string(n) +
                 (c.is_causal ? " causal" : "") + (c.normalised ? " normalised" : "") +
                 (c.has_mask ? " mask" : "") + (c.in_place ? " in place" : "");
  Random random{uint64_t(n) + uint64_t(c.is_causal)};
  const Layout all = contiguous(numel), each = contiguous(rows);
  Array scores(c.dtype, all), apart(c.dtype, all), again(c.dtype, all), p(c.dtype, all),
      d_apart(c.dtype, all), mask(c.dtype, contiguous(kRows * n)), largest(c.dtype, each),
      total(c.dtype, each);
  Array &dropped = c.in_place ? scores : apart, &d_scores = c.in_place ? p : d_apart;
  std::vector<double> sums(static_cast<size_t>(numel)), gradients(static_cast<size_t>(numel));
  for (int64_t i = 0; i < kRows * n; ++i) mask.set(i, random.signed_value());
  for (int64_t i = 0; i < numel; ++i) {
    scores.set(i, random.signed_value());
    again.set(i, scores.get(i));
    p.set(i, random.signed_value());
    gradients[size_t(i)] = p.get(i);
    const double more = c.has_mask ? mask.get(i % (kRows * n)) : 0;
    sums[size_t(i)] = round_to(c.dtype, scores.get(i) + more);
  }

  AttentionArgs a{};
  a.dtype = a.mask_dtype = c.dtype;
  a.scores = scores.data();
  a.dropped = dropped.data();
  a.largest = largest.data();
  a.total = total.data();
  a.normalised = c.normalised;
  a.rows = kRows;
  a.columns = n;
  a.keys = n + 3;
  a.first_row = kFirstRow;
  a.query = c.is_causal ? 1 : -1;
  a.mask = c.has_mask ? mask.data() : nullptr;
  a.mask_stride[1] = n, a.mask_stride[2] = 1;  // the heads share it
  a.seed = {kSeed, nullptr};
  a.threshold = kThreshold;
  a.factor = 0x1p32 / double(kThreshold);
  // The kernel is called for two spans, as two threads would call it.
  kernels::attention_kernels.weights(a, 0, 2);
  kernels::attention_kernels.weights(a, 2, rows);

  const double epsilon = std::ldexp(1., -format_of(c.dtype).mantissa);
  const auto compare = [&](const Array& got, auto part, bool divided, const char* what) {
    for (int64_t i = 0; i < rows; ++i) {
      const auto slice = [&](const std::vector<double>& x) {
        return std::vector<double>(x.begin() + i * n, x.begin() + (i + 1) * n);
      };
      const Row want = reference(c, i, slice(sums), slice(gradients));
      if (got.numel() == rows) {
        got.expect_near(i, part(want)[0], 16 * epsilon * std::fabs(part(want)[0]), what);
        continue;
      }
      double most = 1;
      for (const double x : slice(gradients)) most = std::max(most, std::fabs(x));
      for (int64_t j = 0; j < n; ++j)
        got.expect_near(i * n + j, part(want)[size_t(j)] / (divided ? want.total : 1), 64 * epsilon * most,
                        what);
    }
  };
  using Numbers = std::vector<double>;
  compare(largest, [](const Row& r) { return Numbers{r.largest}; }, false, "largest");
  compare(total, [](const Row& r) { return Numbers{r.total}; }, false, "total");
  compare(dropped, [](const Row& r) { return r.dropped; }, c.normalised, "dropped");
  for (const Array* array : {&dropped, &largest, &total}) {
    array->expect_guards("weights");
    array->add_to(digest);
  }

  a.scores = again.data();
  a.dropped = c.in_place ? again.data() : nullptr;
  a.gradients = p.data();
  a.d_scores = d_scores.data();
  kernels::attention_kernels.gradient(a, 0, 1);
  kernels::attention_kernels.gradient(a, 1, rows);
  compare(d_scores, [](const Row& r) { return r.d_scores; }, false, "the gradient of the scores");
  if (c.in_place) compare(again, [](const Row& r) { return r.dropped; }, false, "dropped again");
  for (const Array* array : {&d_scores, &again}) {
    array->expect_guards("gradient");
    array->add_to(digest);
  }
}

void attention() {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64})
    for (const int64_t columns : kSizes)
      for (const bool is_causal : {false, true})
        for (const bool has_mask : {false, true})
          for (const bool in_place : {false, true}) {
            const std::string name = std::string(dtype == DType::kFloat64 ? "libm " : "") + "attention/" +
                                     name_of(dtype) + "/columns " + std::to_string(columns);
            attention_case({dtype, columns, is_causal, !in_place, has_mask, in_place}, digests[name]);
          }
}
const Case attention_cases(attention);

}  // namespace
}  // namespace fastreg::test::attention_test
