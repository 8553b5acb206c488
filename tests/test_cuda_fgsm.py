"""The CUDA kernels of the FGSM and PGD steps, executed without a GPU, against the CPU operators: the same
bits.
"""

import cuda_table
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

import fastreg  # noqa: F401

pytestmark = needs_nvcc

FgsmParameter = structure("FgsmParameter", "double value\npointer values\nint64 inner, count")
FgsmArgs = structure(
    "FgsmArgs",
    """int dtype
    pointer x, grad, origin, output
    Layout x_layout, grad_layout, origin_layout, output_layout
    FgsmParameter step, radius, lower, upper""",
    FgsmParameter=FgsmParameter,
)


def run(x, grad, origin=None, *, step=0.03, radius=0.1, lower=0.0, upper=1.0, misaligned=0, **options):
    """(x', reports) of the CUDA launcher. A number is a float or a tensor of the type of accumulation that
    broadcasts to x.
    """
    like = torch.empty_like(x)
    output = []

    def arguments(machine):
        def parameter(value, name):
            if not isinstance(value, torch.Tensor):
                return FgsmParameter(value, None, 1, 1)
            shape = [1] * (x.dim() - value.dim()) + list(value.shape)
            varying = [d for d in range(x.dim()) if shape[d] != 1]
            inner = x.shape[varying[-1] + 1 :].numel() if varying else x.numel() + 1
            return FgsmParameter(0.0, machine.put(value, name).at, inner, value.numel())

        output[:] = [machine.room(like, "output", misaligned)]
        return FgsmArgs(
            dtype_number(x.dtype),
            machine.put(x, "x", misaligned).at, machine.put(grad, "grad", misaligned).at,
            None if origin is None else machine.put(origin, "origin", misaligned).at, output[0].at,
            layout_of(x), layout_of(grad), Layout() if origin is None else layout_of(origin), layout_of(like),
            parameter(step, "step"), parameter(radius, "radius"),
            parameter(lower, "lower"), parameter(upper, "upper"),
        )  # fmt: skip

    reports = interpreted("fgsm").run("fgsm_step_cuda", arguments, FgsmArgs, **options)
    return output[0].result(), reports


def on_cpu(x, grad, origin=None, *, step=0.03, radius=0.1, lower=0.0, upper=1.0):
    values = [step, lower, upper] if origin is None else [step, radius, lower, upper]
    numbers = [0.0 if isinstance(v, torch.Tensor) else v for v in values]
    given = [v if isinstance(v, torch.Tensor) else None for v in values]
    if origin is None:
        return torch.ops.fastreg.fgsm_step(x, grad, *numbers, *given)
    return torch.ops.fastreg.pgd_step(x, grad, origin, *numbers, *given)


def images(shape, dtype, seed=0):
    """(x, gradient, origin), with a few NaN, infinities and zeros."""
    generator = torch.Generator().manual_seed(seed)
    x, grad, origin = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    grad = grad - 0.5
    if x.numel() > 60:
        x.view(-1)[[1, 30]] = torch.tensor([float("nan"), float("inf")], dtype=torch.float64)
        grad.view(-1)[[5, 31, 44, 50]] = torch.tensor(
            [float("nan"), -float("inf"), 0.0, -0.0], dtype=torch.float64
        )
    return x.to(dtype), grad.to(dtype), origin.to(dtype)


@pytest.mark.parametrize("project", [False, True], ids=["fgsm", "pgd"])
@pytest.mark.parametrize("dtype", DTYPES)
# One element, no whole word of 16-bit numbers, and several blocks with a rest.
@pytest.mark.parametrize("n", [1, 7, 4099])
def test_the_same_bits_as_on_the_cpu(n, dtype, project):
    x, grad, origin = images(n, dtype)
    origin = origin if project else None
    expected = on_cpu(x, grad, origin)
    for schedule in SCHEDULES:
        assert same(run(x, grad, origin, schedule=schedule)[0], expected)
    assert same(run(x, grad, origin, misaligned=dtype.itemsize)[0], expected)


@pytest.mark.parametrize("project", [False, True], ids=["fgsm", "pgd"])
@pytest.mark.parametrize("dtype", DTYPES)
# Channels of whole words, and of an odd number of pixels.
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_numbers_per_channel_sample_and_element(size, dtype, project):
    x, grad, origin = images((5, 3, *size), dtype)
    origin = origin if project else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    per_channel = torch.tensor([0.02, 0.05, 0.01], dtype=wide).view(3, 1, 1)
    per_sample = torch.linspace(0.01, 0.1, 5, dtype=wide).view(5, 1, 1, 1)
    per_element = torch.rand(size, generator=torch.Generator().manual_seed(1), dtype=wide)
    for options in (
        dict(step=per_channel, lower=-per_channel, upper=1 - per_channel),
        dict(step=per_sample, radius=2 * per_sample),
        dict(step=per_channel, upper=per_element),
        dict(step=torch.full((1,), 0.5, dtype=wide), radius=per_channel),
    ):
        if not project:
            options.pop("radius", None)
        expected = on_cpu(x, grad, origin, **options)
        assert same(run(x, grad, origin, **options)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    x, grad, origin = images((4, 6, 10, 12), dtype)
    x, grad, origin = (
        x.permute(0, 2, 3, 1),
        grad[:, :, :, ::1].permute(0, 2, 3, 1),
        origin.permute(0, 2, 3, 1).contiguous(),
    )
    assert same(run(x, grad, origin)[0], on_cpu(x, grad, origin))
    x, grad = x[1::2, :, ::3], grad[:2, :, :4]
    assert same(run(x, grad)[0], on_cpu(x, grad))


@pytest.mark.parametrize("project", [False, True], ids=["fgsm", "pgd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_moved(dtype, project):
    x, grad, origin = images((8, 3, 64, 64), dtype)
    per_channel = torch.tensor(
        [0.02, 0.05, 0.01], dtype=torch.float64 if dtype == torch.float64 else torch.float32
    ).view(3, 1, 1)
    for options in ({}, dict(lower=-per_channel, upper=1 - per_channel)):
        _, reports = run(x, grad, origin if project else None, **options)
        image = [
            row
            for (name, _), row in reports[0].traffic.rows.items()
            if name in ("x", "grad", "origin", "output")
        ]  # bounds, read again and again, come from the cache
        floor = (4 if project else 3) * x.numel() * dtype.itemsize
        assert len(reports) == 1
        assert floor <= 32 * sum(row["sectors"] for row in image) <= 1.05 * floor, reports[0]
        if not options:
            assert traffic(reports) <= 1.05 * floor, reports[0]


def test_more_than_2_31_elements():
    n = 2**31 + 4097
    written = []

    def arguments(machine):
        def fill(offsets, width):
            return (offsets // 4 % 251).astype(np.float32)

        x, grad, output = (machine.device.virtual(4 * n, name, fill) for name in ("x", "grad", "output"))
        written[:] = [output]
        layout, one = Layout(n, 1, True), FgsmParameter(1.0, None, 1, 1)
        return FgsmArgs(
            0, x.addr, grad.addr, None, output.addr, layout, layout, Layout(), layout,
            one, one, FgsmParameter(-1e9, None, 1, 1), FgsmParameter(1e9, None, 1, 1),
        )  # fmt: skip

    last = (n // 4 - 1) // 256
    interpreted("fgsm").run("fgsm_step_cuda", arguments, FgsmArgs, blocks=[0, last % 2**20])
    at, values = written[0].writes(np.float32)
    assert at.max() == n - 1 and len(set(at)) == len(at)
    np.testing.assert_array_equal(values, at % 251 + (at % 251 > 0))


def for_the_table(dtype):
    """What tests/cuda_table.py takes: (what, dtype, elements, floor in bytes, reports, op)."""
    n, size = 2**17, dtype.itemsize
    x = torch.randn(n).to(dtype)
    yield "fgsm_step", dtype, n, 3 * n * size, run(x, x)[1], "fgsm"
    yield "pgd_step", dtype, n, 4 * n * size, run(x, x, x)[1], "fgsm"


def test_a_row_of_the_table_in_the_docs():
    """tests/cuda_table.py makes it; a step reads two tensors and writes one."""
    cells = cuda_table.row(*next(for_the_table(torch.float32))).strip("| ").split(" | ")
    assert cells[:3] == ["fgsm_step", "float32", "12"] and 12 <= float(cells[3]) <= 12.6
    assert 8 <= int(cells[4]) <= 64 and 90 <= int(cells[6].rstrip("%")) <= 100
