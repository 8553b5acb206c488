"""The errors of exp, log(1 + x) and 1 / x in cross_entropy_softmax_cuda.h, which states them, over the range
that a softmax needs.

The interpreter rounds ex2.approx, of which exp of float32 is made, to nearest; a GPU's own ex2 need not be as
close, and what that adds is not measured here.
"""

import ctypes

import numpy as np
import pytest
import torch
from cuda_machine import CSRC, Interpreted, built, compile_ptx, needs_nvcc
from cudacheck import hostrun

pytestmark = needs_nvcc

HEADER = CSRC / "cross_entropy" / "cross_entropy_softmax_cuda.h"
SOURCE = """
#include "%s"
using namespace fastreg;
#define LAUNCHER(f, T)                                                                          \\
  __global__ void f##_##T##_kernel(const T* x, T* y, int64_t n) {                               \\
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;                           \\
    if (i < n) y[i] = f(x[i]);                                                                  \\
  }                                                                                             \\
  extern "C" int f##_##T(const T* x, T* y, int64_t n, void* stream) {                           \\
    const unsigned blocks = unsigned((n + 255) / 256);                                          \\
    f##_##T##_kernel<<<blocks, 256, 0, static_cast<cudaStream_t>(stream)>>>(x, y, n);           \\
    return int(cudaGetLastError());                                                             \\
  }
LAUNCHER(exponential, float)
LAUNCHER(exponential, double)
LAUNCHER(log_of_one_plus, float)
LAUNCHER(log_of_one_plus, double)
LAUNCHER(reciprocal, float)
LAUNCHER(reciprocal, double)
"""
EXACT = {"exponential": np.exp, "log_of_one_plus": np.log1p, "reciprocal": lambda x: 1 / x}
# (function, type): the bound in units of the last place, as in the table of the header
BOUNDS = {
    ("exponential", "float"): 2,
    ("exponential", "double"): 1,
    ("log_of_one_plus", "float"): 1,
    ("log_of_one_plus", "double"): 2,
    ("reciprocal", "float"): 0.5,
    ("reciprocal", "double"): 1,
}


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    source = tmp_path_factory.mktemp("softmax") / "softmax_math.cu"
    source.write_text(SOURCE % HEADER)
    inputs = [source, hostrun.SHIM, *CSRC.glob("common/*.h"), *CSRC.glob("cross_entropy/*.h")]
    return Interpreted(built("softmax-math.so", inputs, lambda out: compile_ptx(source, out)))


def values(function, dtype):
    """Numbers all over the range: even by value and by exponent, and the ends."""
    pick = np.random.default_rng(0)
    if function == "exponential":  # of logits less a reference that is at most 8 below the largest
        least = -87.3 if dtype == np.float32 else -708.3  # the results below are subnormal
        x = np.concatenate((pick.uniform(least, 8, 20000), -(2.0 ** pick.uniform(-60, 6, 5000)), [0, 8]))
    elif function == "log_of_one_plus":
        x = np.concatenate((2.0 ** pick.uniform(-100, 40, 20000), pick.uniform(0, 2, 5000), [0]))
    else:
        x = np.concatenate((2.0 ** pick.uniform(0, 40, 20000), [1]))
    return x.astype(dtype)


def computed(functions, function, type_, x):
    """What the kernel of a function makes of x."""
    slots = []

    def arguments(machine):
        given = torch.from_numpy(x)
        slots[:] = machine.put(given, "x"), machine.room(given, "y")
        return ctypes.c_void_p(slots[0].at), ctypes.c_void_p(slots[1].at), ctypes.c_int64(len(x))

    functions.call(f"{function}_{type_}", arguments)
    return slots[1].result().numpy()


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="needs a type wider than float64")
@pytest.mark.parametrize(("function", "type_"), BOUNDS)
def test_the_worst_error(functions, function, type_):
    dtype = np.float32 if type_ == "float" else np.float64
    x = values(function, dtype)
    y, exact = computed(functions, function, type_, x), EXACT[function](x.astype(np.longdouble))
    unit = np.spacing(np.abs(exact.astype(dtype)))
    worst = float((np.abs(y.astype(np.longdouble) - exact) / unit).max())
    assert worst <= BOUNDS[function, type_]


@pytest.mark.parametrize("type_", ["float", "double"])
def test_the_ends_of_the_range(functions, type_):
    x = np.array([-np.inf, -1e4, 0, np.nan], dtype=np.float32 if type_ == "float" else np.float64)
    np.testing.assert_array_equal(computed(functions, "exponential", type_, x), [0, 0, 1, np.nan])
    np.testing.assert_array_equal(computed(functions, "log_of_one_plus", type_, x[2:]), [0, np.nan])
