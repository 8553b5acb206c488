// Tests of the sum of squares: against a sum in double, and the same bits on every instruction set.
#include "../../csrc/sum_of_squares/sum_of_squares_math.h"
#include "harness.h"

namespace fastreg::test::sum_of_squares_test {
namespace {

void sum_of_squares() {
  for (const DType dtype : kDTypes) {
    const std::string name = std::string("sum_of_squares/") + name_of(dtype);
    for (const int64_t n : kSizes) {
      for (const Layout& layout : {contiguous(n), every_third(n), transposed(n)}) {
        current_case = name + " n " + std::to_string(n);
        Random random{uint64_t(n)};
        Array x(dtype, layout), result(DType::kFloat64, contiguous(1));
        double want = 0;
        for (int64_t i = 0; i < n; ++i) {
          x.set(i, random.signed_value());
          want += x.get(i) * x.get(i);
        }
        const SquaresTensor t{dtype, x.data(), x.layout};
        result.set(0, kernels::squares_kernels.sum(t, 0, n));
        const double epsilon = std::ldexp(1., -format_of(accumulation(dtype)).mantissa);
        result.expect_near(0, want, 32 * epsilon * want, "sum");
        result.add_to(digests[name]);
      }
    }
  }
}
const Case sum_of_squares_cases(sum_of_squares);

}  // namespace
}  // namespace fastreg::test::sum_of_squares_test
