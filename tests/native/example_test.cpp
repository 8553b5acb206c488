// Tests of the example's kernel against its formula, y = factor * x, rounded as the kernel rounds.
//
// Here belongs what needs no torch: each case runs a kernel on arrays amid guard bytes, in every dtype, on
// odd sizes and layouts and in two spans, compares each element with a plain loop in double, and adds the
// output's bits to a digest, which must be the same on all instruction sets. tests/test_native.py builds and
// runs it.
#include "../../csrc/example/example_math.h"
#include "harness.h"

namespace fastreg::test::example_test {
namespace {

void example_case(DType dtype, int64_t n, int count, Digest& digest) {
  current_case = std::string("example/") + name_of(dtype) + " n " + std::to_string(n);
  const DType type = accumulation(dtype);
  Random random{uint64_t(count) * 31 + 7};
  const Layout layouts[] = {contiguous(n), every_third(n), transposed(n)};
  Array input(dtype, layouts[count % 3]), output(dtype, layouts[count / 3 % 3]);
  for (int64_t i = 0; i < n; ++i) input.set(i, random.signed_value());
  if (n > 8) {
    input.set(random.below(n), kNaN);
    input.set(random.below(n), -kInfinity);
    input.set(random.below(n), -0.);
  }
  ExampleArgs a{};
  a.dtype = dtype;
  a.input = input.data();
  a.output = output.data();
  a.input_layout = input.layout;
  a.output_layout = output.layout;
  a.factor = 0.3;
  kernels::example_kernels.scale(a, n / 3, n);
  kernels::example_kernels.scale(a, 0, n / 3);

  const double factor = round_to(type, a.factor);
  for (int64_t i = 0; i < n; ++i) output.expect(i, round_to(dtype, round_to(type, factor * input.get(i))));
  output.expect_guards("output");
  output.add_to(digest);
}

void example() {
  int count = 0;
  for (const DType dtype : kDTypes)
    for (const int64_t n : kSizes)
      for (int layouts = 0; layouts < 9; ++layouts)
        example_case(dtype, n, count++, digests[std::string("example/") + name_of(dtype)]);
}
const Case example_cases(example);

}  // namespace
}  // namespace fastreg::test::example_test
