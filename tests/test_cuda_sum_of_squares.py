"""The CUDA kernels of the sum of squares, executed without a GPU."""

import ctypes

import pytest
import torch
from cuda_machine import (
    DTYPES,
    SCHEDULES,
    dtype_number,
    interpreted,
    layout_of,
    needs_nvcc,
    structure,
    traffic,
)

pytestmark = needs_nvcc

SquaresTensor = structure(
    "SquaresTensor",
    """int dtype
    pointer data
    Layout layout""",
)
LAUNCHER = "_ZN7fastreg19sum_of_squares_cudaEPKNS_13SquaresTensorEmPdPvNS_5DTypeES4_"
FLOAT64_PRODUCTS = 18  # partial sums: one addition for each chunk, and those of one block at the end


def run(tensors, wide=False, misaligned=0, **options):
    slots = []

    def arguments(machine):
        table = (SquaresTensor * len(tensors))()
        for entry, t in zip(table, tensors, strict=True):
            at = machine.put(t, "tensor", misaligned).at
            entry.dtype, entry.data, entry.layout = dtype_number(t.dtype), at, layout_of(t)
        partials = machine.room(torch.empty(20_000, dtype=torch.float64), "partials")
        result = torch.zeros((), dtype=torch.float64 if wide else torch.float32)
        slots.append(machine.room(result, "result"))
        dtype = dtype_number(result.dtype)
        return (
            table,
            ctypes.c_size_t(len(table)),
            ctypes.c_void_p(partials.at),
            ctypes.c_void_p(slots[0].at),
            ctypes.c_int(dtype),
        )

    reports = interpreted("sum_of_squares").call(LAUNCHER, arguments, **options)
    return slots[0].result(), reports


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum(dtype):
    """Whole chunks and rests, unaligned, strided, more tensors than a launch holds; every schedule gives the
    same bits.
    """
    tensors = [torch.randn(17 * i % 300).to(dtype) for i in range(150)] + [
        torch.randn(3 * 4096 + 7).to(dtype)
    ]
    tensors += [torch.randn(40, 60).to(dtype)[::2, 1::3], torch.randn(70, 50).to(dtype).t()]
    want = sum(t.double().square().sum() for t in tensors)
    results = [run(tensors, dtype == torch.float64, schedule=schedule)[0] for schedule in SCHEDULES]
    assert len({float(result) for result in results}) == 1
    torch.testing.assert_close(results[0].double(), want, rtol=1e-6, atol=0)
    unaligned, _ = run([torch.randn(9000).to(dtype).fill_(0.5)], misaligned=dtype.itemsize)
    assert float(unaligned) == 9000 / 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_moved(dtype):
    n = 2**17
    _, reports = run([torch.ones(n).to(dtype)])
    assert len(reports) == 2
    assert n * dtype.itemsize <= traffic(reports) <= 1.05 * n * dtype.itemsize


def for_the_table(dtype):
    """What tests/cuda_table.py takes: (what, dtype, elements, floor in bytes, reports, op)."""
    n = 2**17
    yield "sum of squares", dtype, n, n * dtype.itemsize, run([torch.ones(n).to(dtype)])[1], "sum_of_squares"
