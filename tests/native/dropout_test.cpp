// Tests of the kernels of dropout: the mask against Philox written anew, each element against the formula of
// dropout_math.h in double, rounded at every step as the kernel rounds.
#include <utility>
#include <vector>

#include "../../csrc/dropout/dropout_math.h"
#include "harness.h"

namespace fastreg::test::dropout_test {
namespace {

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
  // The kernel is called for two spans, as two threads would call it.
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
      // Every step is rounded to the type of the arithmetic. Rounding twice does no harm here: double has
      // more than twice the bits of float.
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
    Digest& channels = digests[std::string("dropout/") + name_of(dtype) + "/runs"];
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
          // The thresholds are what one decision draws and its neighbours: that decision's upper 16 bits
          // equal those of the threshold, so that the lower ones decide.
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
        dropout_case(c, channels);
        ++count;
      }
    }
  }
}
const Case dropout_cases(dropout);

// ---- a mask of rows

void dropout_masks() {
  Digest& digest = digests["dropout/mask of rows"];
  for (const int64_t decisions : kSizes)
    for (const int64_t columns : {1, 3, 8, 41, 2000})
      for (const uint64_t first : {uint64_t(0), (uint64_t(1) << 35) - 21}) {
        current_case =
            "dropout/mask of rows, " + std::to_string(decisions) + " by " + std::to_string(columns);
        const int64_t bytes = (decisions + 7) / 8, row = columns + 5;
        Array mask(1, contiguous(bytes));
        DropoutMaskArgs a{};
        a.mask = mask.data<uint8_t>();
        a.decisions = decisions;
        a.columns = columns;
        a.row = row;
        a.seed = {uint64_t(decisions), nullptr};
        a.first = first;
        a.threshold = 0x99999999u;
        kernels::dropout_kernels.mask(a, 0, bytes / 2);
        kernels::dropout_kernels.mask(a, bytes / 2, bytes);
        Halves high{uint64_t(decisions), 0, 0}, low{uint64_t(decisions), 1, 0};
        for (int64_t d = 0; d < 8 * bytes; ++d) {
          const uint64_t at = first + uint64_t(d / columns * row + d % columns);
          const bool kept =
              d < decisions && (uint64_t(high.at(at)) << 16 | low.at(at)) < uint64_t(a.threshold);
          if ((mask.raw(d / 8) >> (d % 8) & 1) != kept) fail("decision %lld is wrong", (long long)d);
        }
        mask.expect_guards("mask");
        mask.add_to(digest);
      }
}
const Case dropout_mask_cases(dropout_masks);

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
  const int64_t middle = n / 3 / 8 * 8;  // two spans, as of two threads
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
      // Most of these do not divide n, and a kernel does not ask for it: the bias starts anew anywhere in a
      // vector and in a block.
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
const Case dropout_add_cases(dropout_add);

}  // namespace
}  // namespace fastreg::test::dropout_test
