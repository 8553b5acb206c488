"""What nvcc makes of the CUDA kernels (registers, spills), what the built module registers, what is said
where it is missing.
"""

import importlib
import re

import pytest
import torch
from cuda_machine import OPS, interpreted, interpreted_library, needs_nvcc

import fastreg as fr
from fastreg import _registry, _seeds
from fastreg.cli import doctor


def known(op, name, default):
    """What tests/test_cuda_<op>.py says of its kernels."""
    return getattr(importlib.import_module(f"test_cuda_{op}"), name, default)


def resources(op):
    """{kernel: (registers, bytes spilled or on the stack, bytes of static shared memory)} on sm_80, as ptxas
    says.
    """
    kernels = {}
    printed = interpreted_library(op).with_suffix(".txt").read_text()
    for entry in printed.split("entry function '")[1:]:
        registers, shared = (
            re.search(pattern, entry) for pattern in (r"Used (\d+) registers", r"(\d+) bytes smem")
        )
        spilled = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        )
        numbers = int(registers[1]), sum(map(int, spilled.groups())), int(shared[1]) if shared else 0
        kernels[entry.split("'")[0]] = numbers
    return kernels


@needs_nvcc
@pytest.mark.parametrize("op", OPS)
def test_registers_and_spills(op):
    rows = known(op, "FLOAT64_ROWS", ())
    kernels = {name: used for name, used in resources(op).items() if not any(row in name for row in rows)}
    assert len(kernels) >= 4
    assert {name: spilled for name, (_, spilled, _) in kernels.items() if spilled} == {}
    # 64 registers are for four blocks of 256 threads on a multiprocessor.
    limits = known(op, "REGISTERS", {})
    at_most = {name: max((limits[part] for part in limits if part in name), default=64) for name in kernels}
    used = {name: registers for name, (registers, _, _) in kernels.items()}
    assert {name: registers for name, registers in used.items() if registers > at_most[name]} == {}


@needs_nvcc
@pytest.mark.parametrize("op", OPS)
def test_no_float64_arithmetic_where_it_is_not_asked_for(op):
    names, rows = 0, known(op, "FLOAT64_ROWS", ())
    for module in interpreted(op).modules:
        for name, function in module.functions.items():
            wide = re.search(r"I(\w*E)?d[dLbE]|Id[,E]|ShrunkenId|ImageId", name)
            if wide or any(row in name for row in rows):
                continue
            names += 1
            doubles = [
                i.text
                for i in function.code
                if re.match(r"(add|sub|mul|fma|mad|div|rcp|sqrt|ex2|lg2)\S*\.f64", i.text)
            ]
            # What one thread does for its block are few products and differences.
            few = known(op, "FLOAT64_PRODUCTS", 0)
            assert len(doubles) <= few and all(re.match("add|sub|mul", i) for i in doubles), (name, doubles)
    assert names >= 3


def test_every_operator_has_a_cuda_kernel():
    if _registry.cuda is None:
        pytest.skip(_registry.why_no_cuda)
    missing = [
        name
        for name in _registry.declared()
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastreg::{name}", "CUDA")
    ]
    assert missing == []
    assert _registry.cuda.build_info()["nvcc"].split(".")[0] == torch.version.cuda.split(".")[0]


def test_kernels_for_an_older_cuda_serve_a_newer_torch(monkeypatch):
    if _registry.cuda is None:
        pytest.skip(_registry.why_no_cuda)
    major = int(torch.version.cuda.split(".")[0])
    monkeypatch.setattr(torch.version, "cuda", f"{major + 1}.0")
    assert _registry._load_cuda() == (_registry.cuda, None)
    monkeypatch.setattr(torch.version, "cuda", f"{major - 1}.9")  # whose driver may be older than the kernels
    assert f"without kernels for CUDA {major - 1}," in _registry._load_cuda()[1]


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (None, r"is a CPU build; install a CUDA build of torch"),
        ("11.8", r"without kernels for CUDA 11, .*nvcc 11.x.*FASTREG_CUDA=ON"),
    ],
)
def test_a_gpu_tensor_without_cuda_kernels(version, says, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", version)
    kernels, reason = _registry._load_cuda()
    monkeypatch.setattr(_registry, "cuda", kernels)
    monkeypatch.setattr(_registry, "why_no_cuda", reason)
    with pytest.raises(
        RuntimeError,
        match=rf"dropout: expected tensors on the CPU, got a tensor on 'cuda'; .*{says}.*\.cpu\(\)",
    ):
        _registry._no_kernel("dropout")(_OnGpu())


class _OnGpu(torch.Tensor):
    """As much of a GPU's tensor as there is without one."""

    device = torch.device("cuda")


def test_launch_errors_say_what_to_do():
    if _registry.cuda is None:
        pytest.skip(_registry.why_no_cuda)
    no_image, old_driver, invalid = (_registry.cuda.launch_error("dropout", code) for code in (209, 35, 1))
    assert (
        no_image.startswith("dropout: ")
        and "not built for this GPU" in no_image
        and "FASTREG_CUDA_ARCHS" in no_image
    )
    assert old_driver.startswith("dropout: ") and "driver is older" in old_driver and "update" in old_driver
    assert invalid == "dropout: invalid argument"


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((6, 1), False), ((7, 0), False), ((7, 5), True), ((8, 0), True), ((8, 6), True), ((8, 9), True),
     ((9, 0), True), ((10, 0), True), ((10, 3), True), ((12, 0), True), ((12, 1), True), ((13, 0), True)],
)  # fmt: skip
def test_doctor_knows_which_gpus_run_the_code(capability, runs):
    assert doctor._runs(capability, "75-real 80-real 86-real 90 100-real 120") is runs
    assert doctor._runs(capability, "80-real") is (capability[0] == 8)


class _Generator:
    """A GPU's generator as draw_seed knows it."""

    device = torch.device("cuda", 0)

    def __init__(self, seed):
        self.seed, self.offset = seed, 0

    def initial_seed(self):
        return self.seed

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        assert offset % 4 == 0
        self.offset = offset


def test_a_gpus_seed_is_its_generators_count(monkeypatch):
    generator, capturing, drawn = _Generator(2**63 + 5), [False], []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: drawn.append(kwargs["device"]))
    device = torch.device("cuda", 0)
    first, second = (_seeds.draw_seed(device) for _ in range(2))
    assert (
        first.dtype == torch.int64
        and first.shape == (1,)
        and first.is_cpu
        and first != second
        and generator.offset == 8
    )
    generator.set_offset(0)  # what torch.manual_seed and a checkpoint do
    assert torch.equal(_seeds.draw_seed(device), first) and not drawn
    other = _Generator(7)
    assert (
        not torch.equal(_seeds.draw_seed(device, other), first)
        and other.offset == 4
        and generator.offset == 4
    )
    capturing[0] = True  # a replay must draw anew
    _seeds.draw_seed(device)
    assert drawn == [device]
    capturing[0] = False
    _seeds.draw_seed(torch.device("cuda", 1))
    _seeds.draw_seed(device, torch.Generator())
    assert drawn == [device, torch.device("cuda", 1), device]


def test_seeds_of_neighbouring_counts_are_unrelated():
    seeds = [_seeds.mix_seed(seed, offset) for seed in (0, 1, 2**64 - 1) for offset in range(0, 4000, 4)]
    assert len(set(seeds)) == 3000 and min(seeds) < -(2**62) and max(seeds) >= 2**62
    ones = torch.tensor(
        [[seed >> bit & 1 for bit in range(64)] for seed in seeds[:1000]], dtype=torch.float64
    ).mean(0)
    assert ((ones - 0.5).abs() < 5 * 0.5 / 1000**0.5).all()
    assert _seeds.mix_seed(0, 0) == 0xE220A8397B1DCDAF - 2**64  # splitmix64's first number from 0
    if _registry.fast is not None:
        assert all(
            _registry.fast.mix_seed(s, o) == _seeds.mix_seed(s, o)
            for s in (0, 5, 2**64 - 1)
            for o in (0, 4, 2**40)
        )


def test_patch_leaves_dropout_to_the_compiler_on_a_gpu(monkeypatch):
    """Seen through a fake GPU: compiled, torch's own dropout is in the graph; eager, fastreg's runs."""
    from torch._dynamo.testing import EagerAndRecordGraphs
    from torch._subclasses import FakeTensorMode

    if _registry.cuda is None:
        pytest.skip(_registry.why_no_cuda)
    with FakeTensorMode(allow_non_fake_inputs=True), fr.patched():
        x = torch.empty(8, device="cuda")
        recorder = EagerAndRecordGraphs()
        torch.compile(lambda x: torch.nn.functional.dropout(x, 0.5), backend=recorder, fullgraph=True)(x)
    code = " ".join(graph.code for graph in recorder.graphs)
    assert "fastreg" not in code and "dropout" in code
