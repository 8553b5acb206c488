"""The CUDA kernels of dropout_add, executed without a GPU, against the CPU operator: the same bits."""

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
    seed_at,
    structure,
    traffic,
)
from helpers import same_bits as same
from test_cuda_dropout import DropoutArgs, numbers

import fastreg  # noqa: F401

pytestmark = needs_nvcc

SEED, SCALE = 0x1234_5678_9ABC_DEF0, 1 / 0.6


DropoutAddArgs = structure(
    "DropoutAddArgs",
    """pointer residual
    Layout residual_layout
    pointer bias
    int64 columns""",
    base=DropoutArgs,
)


def run(x, residual, bias=None, p=0.4, *, misaligned=(0, 0, 0), **options):
    """(output, mask, reports) of the CUDA launcher; `misaligned` are the offsets of input and output,
    residual, and bias.
    """
    like, bits, slots = torch.empty_like(x), torch.empty((x.numel() + 7) // 8, dtype=torch.uint8), {}

    def arguments(machine):
        slots["y"], slots["mask"] = machine.room(like, "y", offset=misaligned[0]), machine.room(bits, "mask")
        return DropoutAddArgs(
            dtype_number(x.dtype),
            machine.put(x, "x", offset=misaligned[0]).at, slots["y"].at, slots["mask"].at,
            layout_of(x), layout_of(like),
            x.numel(), 1, seed_at(machine, torch.tensor([SEED])), 0, int((1 - p) * 2**32 + 0.5),
            SCALE, 0.0, 0.0,
            machine.put(residual, "residual", offset=misaligned[1]).at, layout_of(residual),
            None if bias is None else machine.put(bias, "bias", offset=misaligned[2]).at, x.shape[-1],
        )  # fmt: skip

    reports = interpreted("dropout").run("dropout_add_cuda", arguments, DropoutAddArgs, **options)
    return slots["y"].result(), slots["mask"].result(), reports


def three(shape, dtype):
    """Input, residual and bias, each with NaN, infinities and -0."""
    x = numbers(shape, dtype)
    return x, x.flatten().roll(5).view(shape), numbers(shape[-1:], dtype)


def check(x, residual, bias, **options):
    expected, expected_mask = torch.ops.fastreg.dropout_add(
        x, residual, bias, 0.4, torch.tensor([SEED]), SCALE
    )
    output, mask, _ = run(x, residual, bias, **options)
    assert torch.equal(mask, expected_mask)
    assert same(output, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
# Rows of whole words, and of an odd length, in less than a chunk and in several.
@pytest.mark.parametrize("shape", [(5, 48), (9, 129)])
def test_the_same_bits_as_on_the_cpu(shape, dtype, schedule):
    x, residual, bias = three(shape, dtype)
    check(x, residual, bias, schedule=schedule)
    check(x, residual, None, schedule=schedule)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 3, 7, 260, 1031])
def test_bias_of_any_length(columns, dtype):
    """Shorter than a word, no multiple of one, of a tile and longer."""
    check(*three((700 // columns + 1, columns), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)])
def test_unaligned(which, dtype):
    check(*three((11, 104), dtype), misaligned=[dtype.itemsize * flag for flag in which])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[::2, 1::3],
        lambda x: x[3:4].expand(x.shape),
        lambda x: x.view(7, 9, 11, 13).permute(3, 0, 2, 1),
    ],
    ids=["transposed", "steps", "expanded", "permuted"],
)
def test_strides(view, dtype):
    x, residual, _ = three((77, 117), dtype)
    for a, r in (
        (view(x), view(residual)),
        (view(x), view(residual).contiguous()),
        (view(x).contiguous(), view(residual)),
    ):
        check(a, r, numbers(a.shape[-1:], dtype), schedule="random")


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.5, 1.0])
def test_probabilities(p):
    x, residual, bias = three((31, 96), torch.bfloat16)
    expected = torch.ops.fastreg.dropout_add(x, residual, bias, p, torch.tensor([SEED]), SCALE)
    output, mask, _ = run(x, residual, bias, p)
    assert same(output, expected[0]) and torch.equal(mask, expected[1])
    if p == 1:
        assert same(output, residual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_moved(dtype):
    """The bias is asked for once per element, by full sectors, and answered by the cache; the rest is the
    floor.
    """
    x, residual, bias = three((128, 1024), dtype)
    n = x.numel()
    floor = n * 3 * dtype.itemsize + n // 8
    _, _, reports = run(x, residual)
    assert len(reports) == 1 and floor <= traffic(reports) <= 1.05 * floor, reports[0]
    _, _, reports = run(x, residual, bias)
    asked = n * dtype.itemsize
    assert floor + asked <= traffic(reports) <= 1.05 * (floor + asked), reports[0]


def test_more_than_2_31_elements():
    n, columns = 2**31 + 8 * 256 + 76, 20  # no power of two, of which 2^32 would be a multiple
    written = []

    def arguments(machine):
        x = machine.device.virtual(4 * n, "x", lambda offsets, width: (offsets // 4 % 251).astype(np.float32))
        residual = machine.device.virtual(
            4 * n, "residual", lambda offsets, width: (offsets // 4 % 127).astype(np.float32)
        )
        written.append(machine.device.virtual(4 * n, "y"))
        mask = machine.device.virtual((n + 7) // 8, "mask")
        bias, seed = machine.put(torch.arange(20.0) * 1000, "bias").at, seed_at(machine, torch.tensor([5]))
        layout = Layout(n, 1, True)
        return DropoutAddArgs(
            0, x.addr, written[0].addr, mask.addr, layout, layout, n, 1, seed, 0, 2**31, 2.0, 0.0, 0.0,
            residual.addr, layout, bias, columns,
        )  # fmt: skip

    last_block = (n - 1) // (256 * 8)
    interpreted("dropout").run("dropout_add_cuda", arguments, DropoutAddArgs, blocks=[0, last_block % 2**20])
    at, y = written[0].writes(np.float32)
    assert at.max() == n - 1 and len(set(at)) == len(at)
    dropped, kept = at % 127, 2 * (at % 251 + at % columns * 1000) + at % 127
    assert ((y == dropped) | (y == kept)).all() and 0.4 < (y == kept).mean() < 0.6


def for_the_table(dtype):
    """What tests/cuda_table.py takes: (what, dtype, elements, floor in bytes, reports, op)."""
    n = 2**17
    x = torch.randn(n).to(dtype)
    reports = run(x.view(-1, 1024), x.view(-1, 1024), x[:1024])[2]
    yield "dropout_add, forward", dtype, n, n * (3 * dtype.itemsize + 1 / 8), reports, "dropout"
