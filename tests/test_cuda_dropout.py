"""The CUDA kernels of dropout, executed without a GPU, against the CPU operator: the same bits."""

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

import fastreg  # noqa: F401

pytestmark = needs_nvcc

DropoutArgs = structure(
    "DropoutArgs",
    """int dtype
    pointer input, output, mask
    Layout input_layout, output_layout
    int64 decisions, inner
    Seed seed
    uint64 offset, threshold
    double scale, shift, dropped""",
)
DropoutMaskArgs = structure(
    "DropoutMaskArgs",
    """pointer mask
    int64 decisions, columns, row
    Seed seed
    uint64 first, threshold""",
)


def run(
    x,
    p=0.4,
    *,
    inner=1,
    offset=0,
    scale=1 / 0.6,
    shift=0.0,
    dropped=0.0,
    mask=None,
    misaligned=0,
    in_place=False,
    **options,
):
    """(output, mask, reports) of the CUDA launcher: forward, or of a given mask."""
    seed = torch.tensor([0x1234_5678_9ABC_DEF0])
    like = torch.empty_like(x)
    decisions = x.numel() // inner
    slots = {}

    def arguments(machine):
        slots["x"] = machine.put(x, "x", offset=misaligned, readonly=not in_place)
        slots["y"] = slots["x"] if in_place else machine.room(like, "y", offset=misaligned)
        bits = torch.empty((decisions + 7) // 8, dtype=torch.uint8)
        slots["mask"] = machine.room(bits, "mask") if mask is None else machine.put(mask, "mask")
        return DropoutArgs(
            dtype_number(x.dtype), slots["x"].at, slots["y"].at, slots["mask"].at,
            layout_of(x), layout_of(x if in_place else like),
            decisions, inner, seed_at(machine, seed), offset, int((1 - p) * 2**32 + 0.5),
            scale, shift, dropped,
        )  # fmt: skip

    launcher = "dropout_forward_cuda" if mask is None else "dropout_apply_cuda"
    reports = interpreted("dropout").run(launcher, arguments, DropoutArgs, **options)
    return slots["y"].result(changed=True), slots["mask"].result(), reports


def on_cpu(x, p=0.4, *, inner=1, offset=0, scale=1 / 0.6, shift=0.0, dropped=0.0):
    return torch.ops.fastreg.dropout(
        x, p, torch.tensor([0x1234_5678_9ABC_DEF0]), offset, inner, scale, shift, dropped
    )


def numbers(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = x.view(-1)
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"), -0.0)):
        if flat.numel() > 40:
            flat[7 * i + 3] = value
    return x.to(dtype)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("decisions", "columns", "row"),
    [(1, 1, 1), (2051, 2051, 2051), (2048, 64, 100), (2051, 3, 7), (2051, 1, 9), (2051, 300, 301)],
)  # one; one row; rows of whole bytes; several in a byte; each its own; rows of several bytes
def test_a_mask_of_rows(decisions, columns, row, schedule):
    """As a part of a larger tensor has it. Each byte is written once, and nothing is read."""
    seed, p, first = torch.tensor([99]), 0.3, 2**61 + 5
    slots = {}

    def arguments(machine):
        slots["mask"] = machine.room(torch.empty((decisions + 7) // 8, dtype=torch.uint8), "mask")
        return DropoutMaskArgs(
            slots["mask"].at,
            decisions,
            columns,
            row,
            seed_at(machine, seed),
            first,
            int((1 - p) * 2**32 + 0.5),
        )

    reports = interpreted("dropout").run("dropout_mask_cuda", arguments, DropoutMaskArgs, schedule=schedule)
    want = torch.ops.fastreg.dropout_mask(torch.empty(0), decisions, p, seed, first, columns, row)
    assert torch.equal(slots["mask"].result(changed=True), want)
    assert traffic(reports, without=("seed",)) == 32 * -(-want.numel() // 32)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
# One element, a warp's chunk of 256 and one less, and many chunks with a rest.
@pytest.mark.parametrize("n", [1, 255, 256, 5003])
def test_the_same_bits_as_on_the_cpu(n, dtype, schedule):
    x = numbers(n, dtype)
    expected, expected_mask = on_cpu(x)
    output, mask, _ = run(x, schedule=schedule)
    assert torch.equal(mask, expected_mask)
    assert same(output, expected)
    again, _, _ = run(x, mask=mask, schedule=schedule)
    assert same(again, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("misaligned", [8, 2])
def test_unaligned(dtype, misaligned):
    misaligned = max(misaligned, dtype.itemsize)
    x = numbers(1027, dtype)
    output, mask, _ = run(x, misaligned=misaligned)
    expected, expected_mask = on_cpu(x)
    assert torch.equal(mask, expected_mask) and same(output, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[::2, 1::3],
        lambda x: x[3:, 5:],
        lambda x: x.view(7, 9, 11, 13)[:, :, 2:, ::2].permute(3, 0, 2, 1),
    ],
    ids=["transposed", "steps", "rows", "permuted"],
)
def test_strides(view, dtype):
    x = view(numbers((77, 117), dtype))
    output, mask, _ = run(x, schedule="random")
    expected, expected_mask = on_cpu(x)
    assert torch.equal(mask, expected_mask) and same(output, expected)


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 1 - 2**-20, 1.0])
@pytest.mark.parametrize("offset", [0, 3, 2**40 + 5])
def test_probabilities_and_offsets(p, offset):
    x = numbers(3001, torch.float32)
    output, mask, _ = run(x, p, offset=offset)
    expected, expected_mask = on_cpu(x, p, offset=offset)
    assert torch.equal(mask, expected_mask) and same(output, expected)


@pytest.mark.parametrize("dtype", DTYPES)
# Elements of a decision: a part of a word, words, what fits no word, and more than a warp has lanes.
@pytest.mark.parametrize("inner", [2, 8, 27, 64])
def test_decisions_of_several_elements(inner, dtype):
    x = numbers((37, inner), dtype)
    for view in (x, x.t().contiguous().t()):
        output, mask, _ = run(view, inner=inner)
        expected, expected_mask = on_cpu(view, inner=inner)
        assert torch.equal(mask, expected_mask) and same(output, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_alpha_and_in_place(dtype):
    x = numbers(2049, dtype)
    options = dict(scale=0.9, shift=0.25, dropped=-1.25)
    expected, expected_mask = on_cpu(x, **options)
    for in_place in (False, True):
        output, mask, _ = run(x, in_place=in_place, **options)
        assert torch.equal(mask, expected_mask) and same(output, expected)


def test_ties_of_the_upper_bits_are_settled_by_the_lower():
    """A tie comes once in 65,536 decisions: enough elements for some, and a threshold that the lower bits
    decide.
    """
    x = torch.ones(400_003, dtype=torch.bfloat16)
    p = 1 - (0x80008000 / 2**32)
    expected, expected_mask = on_cpu(x, p)
    output, mask, _ = run(x, p)
    assert torch.equal(mask, expected_mask) and torch.equal(output, expected)
    assert not torch.equal(mask, on_cpu(x, 1 - 0x80000000 / 2**32)[1]) or not torch.equal(
        mask, on_cpu(x, 1 - 0x80010000 / 2**32)[1]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_moved(dtype):
    n = 2**17
    x = numbers(n, dtype)
    _, mask, forward = run(x)
    _, _, backward = run(x, mask=mask)
    floor = n * (2 * dtype.itemsize) + n // 8
    for reports in (forward, backward):
        assert len(reports) == 1
        assert floor <= traffic(reports) <= 1.05 * floor, reports[0]


def test_more_than_2_31_elements():
    n = 2**31 + 8 * 256 + 77
    written = []

    def arguments(machine):
        x = machine.device.virtual(4 * n, "x", lambda offsets, width: (offsets // 4 % 251).astype(np.float32))
        y, mask = machine.device.virtual(4 * n, "y"), machine.device.virtual((n + 7) // 8, "mask")
        written[:] = [y, mask]
        layout, seed = Layout(n, 1, True), seed_at(machine, torch.tensor([5]))
        return DropoutArgs(0, x.addr, y.addr, mask.addr, layout, layout, n, 1, seed, 0, 2**31, 1.0, 0.0, 0.0)

    last_block = (n - 1) // (256 * 8)
    interpreted("dropout").run("dropout_forward_cuda", arguments, DropoutArgs, blocks=[0, last_block % 2**20])
    y_at, y = written[0].writes(np.float32)
    mask_at, mask = written[1].writes(np.uint8)
    assert y_at.max() == n - 1 and mask_at.max() == (n - 1) // 8 and len(set(y_at)) == len(y_at)
    kept = np.array([mask_of_byte >> bit & 1 for mask_of_byte in mask for bit in range(8)], bool)
    kept_at = (8 * mask_at[:, None] + np.arange(8)).reshape(-1)
    kept = dict(zip(kept_at.tolist(), kept.tolist(), strict=True))
    assert all(
        value == (at % 251 if kept[at] else 0) for at, value in zip(y_at.tolist(), y.tolist(), strict=True)
    )
    tail = mask[mask_at >= (n - 77) // 8]
    order = mask_at[mask_at >= (n - 77) // 8].argsort()
    expected = torch.ops.fastreg.dropout(
        torch.ones(n % 8 + 72 if n % 8 else 80), 0.5, torch.tensor([5]), n // 8 * 8 - 72
    )[1]
    assert torch.equal(torch.from_numpy(tail[order][-len(expected) :]), expected)


def for_the_table(dtype):
    """What tests/cuda_table.py takes: (what, dtype, elements, floor in bytes, reports, op)."""
    n, size = 2**17, dtype.itemsize
    x = torch.randn(n).to(dtype)
    _, mask, forward = run(x)
    yield "dropout, forward", dtype, n, n * (2 * size + 1 / 8), forward, "dropout"
    backward = run(x, mask=mask)[2]
    yield "dropout, backward", dtype, n, n * (2 * size + 1 / 8), backward, "dropout"
    channels = run(x, inner=64)[2]
    yield "dropout2d, forward", dtype, n, n * (2 * size + 2 / 8 / 64), channels, "dropout"


# What tests/test_cuda_mutations.py breaks: the text of the kernel, what stands there instead, which test must
# fail, and what it must say.
MUTATIONS = {
    "tail off by one": (
        "if (i >= w.numel) continue;",
        "if (i > w.numel) continue;",
        lambda: test_the_same_bits_as_on_the_cpu(5003, torch.float32, "min-pc"),
        "out-of-bounds",
    ),
    "misaligned vector load": (
        "word_aligned(a.input, a.output)",
        "true",
        lambda: test_unaligned(torch.float32, 8),
        "misaligned",
    ),
    "int32 index": (
        "base = chunk * kChunk,",
        "base = int32_t(chunk * kChunk),",
        test_more_than_2_31_elements,
        "",
    ),
}
