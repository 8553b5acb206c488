"""The CUDA kernels of the example, executed without a GPU, against the CPU operator: the same bits.

Here belong the launcher's arguments as a structure, `run`, which calls the launcher on the interpreter, and
the tests: every dtype and size in four schedules, unaligned and strided tensors, the bytes that are moved,
held against the floor, and indices beyond 2^31. Two names are taken from here by other tests, where they are
there: `for_the_table`, the op's rows of the table in docs/cuda.md, and MUTATIONS, mistakes that must be
noticed.
"""

import numpy as np
import pytest
import torch
from cuda_machine import (
    DTYPES,
    SCHEDULES,
    Layout,
    dtype_number,
    interpreted,
    layout_of,
    needs_nvcc,
    structure,
    traffic,
)
from helpers import same_bits as same

from fastreg._example import example_plain

pytestmark = needs_nvcc

ExampleArgs = structure(
    "ExampleArgs",
    """int dtype
    pointer input, output
    Layout input_layout, output_layout
    double factor""",
)


def run(x, factor=0.3, *, misaligned=0, **options):
    """(y, reports) of the CUDA launcher; `misaligned` is the offset of both tensors in bytes."""
    like, slots = torch.empty_like(x), []

    def arguments(machine):
        slots[:] = [machine.room(like, "y", offset=misaligned)]
        at = machine.put(x, "x", offset=misaligned).at
        return ExampleArgs(dtype_number(x.dtype), at, slots[0].at, layout_of(x), layout_of(like), factor)

    reports = interpreted("example").run("example_cuda", arguments, ExampleArgs, **options)
    return slots[0].result(), reports


def numbers(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if x.numel() > 20:
        x.view(-1)[[3, 8, 17]] = torch.tensor([float("nan"), float("-inf"), -0.0], dtype=torch.float64)
    return x.to(dtype)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 2048, 4099])  # less than a word, and whole words without and with a tail
def test_the_same_bits_as_on_the_cpu(n, dtype, schedule):
    x = numbers(n, dtype)
    assert same(run(x, schedule=schedule)[0], example_plain(x, 0.3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned(dtype):
    x = numbers(1027, dtype)
    assert same(run(x, misaligned=dtype.itemsize)[0], example_plain(x, 0.3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    x = numbers((14, 9, 11), dtype)
    for view in (x.transpose(0, 2), x[::2, 1:, ::3], x[:, :1].expand(14, 9, 11)):
        assert same(run(view, schedule="random")[0], example_plain(view, 0.3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_moved(dtype):
    x = numbers(2**16, dtype)
    reports, floor = run(x)[1], 2 * x.numel() * dtype.itemsize
    assert len(reports) == 1 and floor <= traffic(reports) <= 1.05 * floor, reports[0]


def test_more_than_2_31_elements():
    n, written = 2**31 + 4 * 256 * 5 + 3, []  # its last whole words are not the first block's

    def arguments(machine):
        x = machine.device.virtual(4 * n, "x", lambda offsets, width: (offsets // 4 % 251).astype(np.float32))
        written[:] = [machine.device.virtual(4 * n, "y")]
        layout = Layout(n, 1, True)
        return ExampleArgs(0, x.addr, written[0].addr, layout, layout, 2.0)

    last_block = (n // 4 - 1) // 256
    interpreted("example").run("example_cuda", arguments, ExampleArgs, blocks=[0, last_block % 2**20])
    at, values = written[0].writes(np.float32)
    assert at.max() == n - 1 and len(set(at)) == len(at)
    np.testing.assert_array_equal(values, 2 * (at % 251))


MUTATIONS = {
    "tail off by one": (
        "thread < kSize && i < numel",
        "thread < kSize && i <= numel",
        lambda: test_the_same_bits_as_on_the_cpu(4099, torch.float32, "min-pc"),
        "out-of-bounds",
    ),
    "misaligned words": (
        "word_aligned(input, output)",
        "true",
        lambda: test_unaligned(torch.float32),
        "misaligned",
    ),
}
