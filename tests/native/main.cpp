// Tests of the CPU kernels without torch, on one instruction set: this file and every *_test.cpp here,
// compiled together with the kernels with that set's flags and -DFASTREG_ISA=<its namespace>. Each kernel is
// compared with a plain loop in double, guard bytes tell whether it wrote beside its output, and a digest of
// all output bytes of a group of cases is printed, so that instruction sets can be compared bit for bit.
// tests/test_native.py builds, runs and compares.
//
//   kernel_test [stride]    the sweep of exp looks at every stride-th float32 (an odd number; default 1)
//
// Lines printed: "name digest", "libm name digest" where the bits depend on the C library's log and exp, and
// "# ..." for the worst errors. The digests of exp and of cross-entropy are the same on all sets that fuse
// multiplication and addition; x86-64's baseline, which does not, has its own.
#include <cstdlib>

#include "harness.h"

int main(int argc, char** argv) {
  using namespace fastreg::test;
  if (argc > 1) sweep_stride = uint32_t(strtoul(argv[1], nullptr, 10));
  if (sweep_stride % 2 == 0) {
    fprintf(stderr, "usage: kernel_test [odd stride of the sweep of exp]\n");
    return 2;
  }
  for (const Case* test = Case::last; test; test = test->before) test->body();
  for (const auto& [name, digest] : digests)
    printf("%s %016llx\n", name.c_str(), (unsigned long long)digest.hash);
  if (failures) fprintf(stderr, "%d failures\n", failures);
  return failures ? 1 : 0;
}
