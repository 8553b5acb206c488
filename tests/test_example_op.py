"""The example of an op, y = factor * x.

Here belong the tests of the public function, against a reference in float64 of a few lines: every dtype, odd
sizes, layouts, derivatives, torch.compile, devices without a kernel, and what is refused. The kernels have
tests of their own: tests/native/example_test.cpp on every instruction set, tests/test_cuda_example.py on CUDA
without a GPU.
"""

import math

import pytest
import torch
from helpers import same_bits as same

from fastreg import _example
from fastreg._example import example, example_plain

pytestmark = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("fastreg::example", "CPU"),
    reason="an installed fastreg has no kernels of the example; an editable install of a checkout has them",
)
# One element, less than a vector, odd sizes around a block of 1024, and one that takes several threads.
SHAPES = ((), (0,), (1,), (5,), (7, 37), (1023,), (3, 5, 2, 64), (2, 33_001))


def reference(x, factor):
    """factor * x, exact in float64, rounded to the type that is computed in and then to the result's."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.double() * torch.tensor(factor, dtype=wide).double()).to(wide).to(x.dtype)


def numbers(shape, dtype):
    x = torch.randn(shape, dtype=torch.float64)
    if x.numel() > 30:
        x.view(-1)[[1, 9, 20, 29]] = torch.tensor([math.nan, math.inf, -0.0, 1e-40], dtype=torch.float64)
    return x.to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("factor", [0.3, -2.0, 0.0])
def test_the_formula(shape, factor, dtype):
    x = numbers(shape, dtype)
    before = x.clone()
    y = example(x, factor)
    assert same(y, reference(x, factor)) and same(y, example_plain(x, factor))
    assert same(x, before)


@pytest.mark.parametrize("factor", [math.inf, -math.inf, 1e300, 3])
def test_factors(factor):
    x = numbers((100,), torch.float64)
    assert same(example(x, factor), reference(x, factor))


def test_layouts(dtype):
    x = numbers((6, 8, 10, 12), dtype)
    for view in (x.transpose(0, 3), x[::2, :, 3:], x[:, :1].expand(6, 8, 10, 12), x.flatten()[1:]):
        assert same(example(view, 0.3), reference(view, 0.3))
    y = example(x.contiguous(memory_format=torch.channels_last), 0.3)
    assert same(y, reference(x, 0.3)) and y.is_contiguous(memory_format=torch.channels_last)


def test_any_number_of_threads_gives_the_same_bits():
    x, threads = numbers((300_001,), torch.float32), torch.get_num_threads()
    try:
        results = []
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append(example(x, 0.3))
    finally:
        torch.set_num_threads(threads)
    assert same(*results)


def test_derivatives():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: example(x, 0.3), (x,))
    assert torch.autograd.gradgradcheck(lambda x: example(x, 0.3), (x,))
    assert not example(x.detach(), 0.3).requires_grad


def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.fastreg.example.default, (torch.randn(7, 37).to(dtype), 0.3))


def test_torch_compile():
    torch._dynamo.reset()
    x = torch.randn(33, requires_grad=True)
    compiled = torch.compile(lambda x: example(x, 0.3), backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert same(y, example(x, 0.3))
    assert same(torch.autograd.grad(y.sum(), x)[0], torch.full((33,), 0.3))


def test_a_device_without_a_kernel_runs_the_plain_definition():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        y = example(torch.empty(3, 4, device="mps"), 0.3)
    assert y.shape == (3, 4) and y.device.type == "mps"
    assert example(torch.empty(3, 4, device="meta"), 0.3).device.type == "meta"


@pytest.mark.parametrize(
    ("input", "factor", "error", "says"),
    [
        (torch.ones(3), math.nan, ValueError, "example: factor must be finite, got nan"),
        (torch.ones(3), "2", TypeError, "example: factor must be a number, got str"),
        ([1.0], 2.0, TypeError, "example: input must be a torch.Tensor, got list"),
        (torch.ones(3).int(), 2.0, ValueError, "example: input must be float32, .* got Int; convert"),
    ],
    ids=["NaN", "no number", "no tensor", "dtype"],
)
def test_what_is_refused(input, factor, error, says):
    with pytest.raises(error, match=says):
        example(input, factor)


def test_the_operator_checks_by_itself():
    with pytest.raises(ValueError, match="example: factor must be a number, got NaN"):
        _example._example(torch.ones(3), math.nan)
