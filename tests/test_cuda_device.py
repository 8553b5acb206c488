"""On a GPU: `pytest -m cuda`. Every operator against the CPU's, public functions, CUDA graphs, streams,
compute-sanitizer.

Without a GPU these tests are skipped; tests/test_cuda_*.py execute the same kernels on the CPU.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import cuda_hosted
import pytest
import torch
import torch.nn.functional as F

import fastreg as fr
from fastreg import _registry

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(_registry.cuda is None, reason=f"no CUDA kernels: {_registry.why_no_cuda}"),
]


class OnGpu:
    """torch.ops.fastreg with every tensor taken to the GPU and every result, changed arguments included,
    brought back.
    """

    def __getattr__(self, name):
        operator = getattr(torch.ops.fastreg, name)
        written = [
            argument.is_out or argument.alias_info is not None
            for argument in operator.default._schema.arguments
        ]

        def run(*args):
            there = [self._take(argument) for argument in args]
            result = operator(*there)
            for argument, moved, changed in zip(args, there, written, strict=False):
                if changed:
                    for old, new in zip(
                        *([t] if isinstance(t, torch.Tensor) else t for t in (argument, moved)), strict=True
                    ):
                        old.copy_(new)
            return self._bring(result)

        return run

    def _take(self, value):
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage().cuda()
            return torch.empty(0, dtype=value.dtype, device="cuda").set_(
                storage, value.storage_offset(), value.shape, value.stride()
            )
        return [self._take(item) for item in value] if isinstance(value, list) else value

    def _bring(self, value):
        if isinstance(value, torch.Tensor):
            return value.cpu()
        return tuple(map(self._bring, value)) if isinstance(value, tuple) else value


@pytest.mark.parametrize("case", cuda_hosted.CASES)
def test_operators(case):
    cuda_hosted.check(case, OnGpu())


def seeded(f, *args, **kwargs):
    torch.manual_seed(5)
    return f(*args, **kwargs)


@pytest.mark.parametrize(
    "f", [fr.dropout, fr.dropout1d, fr.alpha_dropout, fr.drop_path], ids=lambda f: f.__name__
)
def test_dropout_forward_and_backward_agree_with_each_other(f):
    x = torch.ones(64, 33, 7, device="cuda", requires_grad=True)
    y = seeded(f, x, 0.3, True)
    y.sum().backward()
    assert torch.equal(seeded(f, x, 0.3, True), y) and not torch.equal(f(x, 0.3, True), y)
    kept = x.grad != 0
    assert 0.5 < kept.float().mean() < 0.9 and torch.equal(kept, y.detach() > 0)


def test_checkpointing_draws_the_same_again():
    x = torch.randn(1000, device="cuda", requires_grad=True)
    plain = seeded(fr.dropout, x, 0.5)
    (expected,) = torch.autograd.grad(plain.sum(), x)
    kept = seeded(torch.utils.checkpoint.checkpoint, lambda x: fr.dropout(x, 0.5), x, use_reentrant=False)
    assert torch.equal(kept, plain) and torch.equal(torch.autograd.grad(kept.sum(), x)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_cross_entropy_against_torch(dtype):
    logits = torch.randn(37, 1001, device="cuda", dtype=dtype, requires_grad=True)
    target = torch.randint(0, 1001, (37,), device="cuda")
    ours, theirs = (f(logits, target, label_smoothing=0.1) for f in (fr.cross_entropy, F.cross_entropy))
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12}.get(dtype, 1e-2)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(*grads, rtol=10 * tolerance, atol=tolerance / 100)
    target[3] = 1001  # not looked at without a wait: the loss says it
    assert fr.cross_entropy(logits, target, reduction="none").isnan().nonzero().flatten().tolist() == [3]


def test_a_training_run_ends_as_on_the_cpu():
    ends = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.Tanh(), torch.nn.Linear(50, 5))
        x, y = torch.randn(64, 20), torch.randint(0, 5, (64,))
        model, x, y = model.to(device), x.to(device), y.to(device)
        optimizer = fr.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, l1=1e-4)
        for _ in range(50):
            optimizer.zero_grad()
            fr.cross_entropy(model(x), y, label_smoothing=0.1).backward()
            optimizer.step()
        ends.append(torch.nn.utils.parameters_to_vector(model.parameters()).cpu())
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("cls", "options"),
    [(fr.optim.SGD, {"momentum": 0.9}), (fr.optim.AdamW, {"capturable": True, "ema": 0.9, "max_norm": 1.0})],
    ids=["SGD", "AdamW"],
)
def test_a_graph_replays_with_new_masks_and_new_numbers(cls, options):
    weight = torch.ones(2**16, device="cuda", requires_grad=True)
    lr = torch.tensor(0.5, device="cuda")
    optimizer = cls([weight], lr=lr, **options)
    weight.grad = torch.zeros_like(weight)

    def step():
        weight.grad.copy_(fr.dropout(torch.ones_like(weight), 0.5).detach())
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    masks = []
    for rate in (0.5, 0.0):
        lr.fill_(rate)
        before = weight.detach().clone()
        graph.replay()
        masks.append(weight.grad.clone())
        assert torch.equal(weight.detach(), before) is (rate == 0.0)
    assert not torch.equal(*masks) and all(0.45 < (m > 0).float().mean() < 0.55 for m in masks)


def test_a_gradient_for_the_loss_and_for_its_gradient_together():
    """The kernel that scales the saved gradient in place runs after the second derivative has read it."""
    results = []
    for device in ("cuda", "cpu"):
        x = torch.linspace(-2, 3, 35, dtype=torch.float64, device=device).view(5, 7).requires_grad_()
        loss = fr.cross_entropy(x, torch.tensor([0, 6, 2, 1, 3], device=device), label_smoothing=0.1)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (0.5 * loss + gradient.square().sum()).backward()
        results.append(x.grad.cpu())
    torch.testing.assert_close(*results)


AUGMENT = {"hflip": 0.5, "rotate": 15, "crop": (0.5, 1.0), "size": 24, "brightness": 0.3, "contrast": 0.3,
           "saturation": 0.3, "blur": (3, (0.1, 2.0)), "erase": 0.5, "mean": 0.5, "std": 0.25,
           "antialias": True}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_augmentation_is_the_cpus(dtype):
    x = (torch.rand(9, 3, 30, 33) * (255 if dtype == torch.uint8 else 1)).to(dtype)
    aug = fr.augment.Augment(**AUGMENT)
    ours, theirs = (
        fr.augment.apply(x.to(d), aug.sample(x.to(d), seed=4)).cpu().float() for d in ("cuda", "cpu")
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2 if dtype == torch.float16 else 1e-5)
    if dtype == torch.float32:
        grads = []
        for device in ("cuda", "cpu"):
            leaf = x.to(device).requires_grad_()
            fr.augment.apply(leaf, aug.sample(leaf, seed=4)).square().sum().backward()
            grads.append(leaf.grad.cpu())
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_policies_are_the_cpus(channels, memory):
    x = (torch.rand(400, channels, 30, 33) * 255).to(torch.uint8).contiguous(memory_format=memory)
    for aug in (fr.augment.Augment.trivial(), fr.augment.Augment.rand(3)):
        ours, theirs = (fr.augment.apply(x.to(d), aug.sample(x.to(d), seed=4)).cpu() for d in ("cuda", "cpu"))
        assert torch.equal(ours, theirs)


def test_a_graph_replays_augmentation_with_new_parameters():
    x, aug = torch.rand(4, 3, 32, 32, device="cuda"), fr.augment.Augment(**AUGMENT)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        aug(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = aug(x)
    results = []
    for _ in range(2):
        graph.replay()
        results.append(y.clone())
    assert not torch.equal(*results) and all(r.isfinite().all() for r in results)


def test_augmentations_gradient_says_that_it_is_not_deterministic():
    x = torch.rand(2, 3, 8, 8, device="cuda", requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match=r"augment: .* no fixed order.*warn_only"):
            fr.augment.Augment(rotate=15)(x).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_work_goes_to_the_current_stream():
    stream = torch.cuda.Stream()
    x = torch.randn(2**22, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        y = x.clone()
        z = fr.dropout(y, 0.5)  # would read y before it is there, on any other stream
    stream.synchronize()
    assert ((z == 0) | (z == 2 * x)).all()


def test_patched_takes_tensors_of_the_gpu():
    x = torch.randn(4096, device="cuda", requires_grad=True)
    with fr.patched():
        F.dropout(x, 0.5)  # the first call looks the operator up
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            F.dropout(x, 0.5).sum().backward()
    kernels = [event.name for event in profile.events() if "dropout" in event.name]
    assert len(kernels) == 2 and all("fastreg" in name for name in kernels)


def test_nothing_waits_for_the_gpu():
    x = torch.randn(64, 100, device="cuda", requires_grad=True)
    target = torch.randint(0, 100, (64,), device="cuda")
    optimizer = fr.optim.SGD([x], lr=0.1, momentum=0.9)
    images, aug = torch.rand(4, 3, 32, 32, device="cuda", requires_grad=True), fr.augment.Augment(**AUGMENT)
    pictures, policy = images.detach().mul(255).to(torch.uint8), fr.augment.Augment.trivial()
    policy(pictures)  # its strengths go to the GPU once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            optimizer.zero_grad()
            fr.cross_entropy(fr.dropout(x, 0.2), target, label_smoothing=0.1, z_loss=1e-4).backward()
            optimizer.step()
            aug(images).sum().backward()
            policy(pictures)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_under_compute_sanitizer(tool):
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "pytest",
        "-q",
    ]
    tests = [f"{Path(__file__)}::test_operators", "-p", "no:cacheprovider"]
    result = subprocess.run([*command, *tests], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
