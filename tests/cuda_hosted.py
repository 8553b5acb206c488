"""The CUDA kernels, launches and glue of every op under AddressSanitizer and UndefinedBehaviorSanitizer,
without a GPU.

Not a test module: `tests/test_cuda_hosted.py` runs it in a process of its own, `python cuda_hosted.py LIBRARY
ORDERS CASE ...`, with the sanitizers loaded first. The library holds the operators
`torch.ops.fastreg_cudahost.*`, which take CPU tensors. The case of an op is the file `cuda_hosted_<op>.py`,
whose `check(cuda)` compares the operators of `cuda` with those of the CPU; tests/test_cuda_device.py runs the
same cases on a GPU.
"""

import importlib
import os
import sys
from pathlib import Path

import torch
from helpers import ROOT, own_flags, same_bits

import fastreg

CPU = torch.ops.fastreg
CASES = sorted(
    path.stem.removeprefix("cuda_hosted_") for path in Path(__file__).parent.glob("cuda_hosted_*.py")
)


def check(case, cuda):
    """The case of one op, with the operators of `cuda`."""
    importlib.import_module(f"cuda_hosted_{case}").check(cuda)


def load(path):
    """Declare the operators again, in the namespace of the library, and load it."""
    declared = torch.library.Library("fastreg_cudahost", "DEF")
    for name in (*fastreg._registry.declared(),):
        schema = str(getattr(CPU, name).default._schema)
        declared.define(schema.replace("fastreg::", "", 1))
    torch.ops.load_library(path)
    return declared, torch.ops.fastreg_cudahost


def numbers(shape, dtype, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if x.numel() > 40:
        x.view(-1)[[3, 17, 31]] = torch.tensor([float("nan"), float("inf"), -0.0], dtype=torch.float64)
    return x.to(dtype)


def same(a, b, what):
    assert a.stride() == b.stride() and same_bits(a, b), what


def views(x):
    """The same numbers in several layouts: contiguous, off alignment by an element, transposed, in steps."""
    yield x
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    yield room[1:].view(x.shape).copy_(x)
    if x.dim() == 2:
        yield x.t().contiguous().t()
        yield torch.empty(x.shape[0], 2 * x.shape[1], dtype=x.dtype)[:, ::2].copy_(x)


def near(a, b, what, tolerance):
    torch.testing.assert_close(
        a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def main(library, orders, *cases):
    for case in cases:
        # Some declare operators that the package does not import.
        importlib.import_module(f"cuda_hosted_{case}")
    keep, cuda = load(library)
    for order in orders.split(","):
        os.environ["CUDAHOST_ORDER"] = order  # read at each launch
        for case in cases:
            # What nvcc is asked for the host's compiler has as a mode of the processor.
            source = ROOT / "csrc" / case / f"{case}_cuda.cu"
            torch.set_flush_denormal(source.exists() and "-ftz=true" in own_flags(source))
            check(case, cuda)
            print("done:", case, order, flush=True)
    del keep


if __name__ == "__main__":
    main(*sys.argv[1:])
