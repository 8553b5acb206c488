"""The losses of other libraries as sides of `fastreg bench`: what stands in for them here has their
arguments, and runs on a CPU.
"""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

for package in ("matplotlib", "rich"):
    pytest.importorskip(package, reason='the benchmark needs pip install "torch-fastreg[bench]"')

from fastreg.benchmarks import _timing, bench_cross_entropy, bench_linear_cross_entropy, peers  # noqa: E402


class Liger:
    """Its loss writes the gradient into the logits."""

    def __init__(self, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, reduction="mean"):
        self.smoothing = label_smoothing

    def __call__(self, _input, target):
        loss = F.cross_entropy(_input.clone(), target, label_smoothing=self.smoothing)
        _input.detach().zero_()
        return loss


class LigerLinear(Liger):
    def __call__(self, lin_weight, _input, target, bias=None):
        return F.cross_entropy(F.linear(_input, lin_weight, bias), target, label_smoothing=self.smoothing)


class Apex:
    @staticmethod
    def apply(logits, labels, smoothing=0.0, padding_idx=0, half_to_float=False):
        losses = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing, reduction="none")
        return losses.masked_fill(labels == padding_idx, 0).to(
            torch.float32 if half_to_float else logits.dtype
        )


def transformer_engine(
    inp, target, label_smoothing=0.0, reduce_loss=False, dist_process_group=None, ignore_idx=-100
):
    assert inp.dim() == 3 and target.shape == inp.shape[:2]
    loss = F.cross_entropy(
        inp.float().flatten(0, 1), target.flatten(), label_smoothing=label_smoothing, reduction="none"
    )
    return loss.mean() if reduce_loss else loss


STAND_INS = {
    "liger_kernel.transformers": dict(
        LigerCrossEntropyLoss=Liger, LigerFusedLinearCrossEntropyLoss=LigerLinear
    ),
    "apex.contrib.xentropy": dict(SoftmaxCrossEntropyLoss=Apex),
    "flash_attn.losses.cross_entropy": dict(CrossEntropyLoss=torch.nn.CrossEntropyLoss),
    "transformer_engine.pytorch.cross_entropy": dict(parallel_cross_entropy=transformer_engine),
}
BENCHES = {
    "rows": (bench_cross_entropy, peers.LOSSES),
    "linear": (bench_linear_cross_entropy, peers.LINEAR_LOSSES),
}


@pytest.fixture
def installed(monkeypatch):
    """The libraries, on a device that says it is a GPU."""
    for name, contents in STAND_INS.items():
        parts = name.split(".")
        for k in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:k]), types.ModuleType(".".join(parts[:k])))
        vars(sys.modules[name]).update(contents)
    found = peers.losses
    gpu = types.SimpleNamespace(is_cuda=True)

    def anywhere(known, smoothing, y):
        functions = found(known, smoothing, gpu)
        for name, (module, make) in known.items():
            made = make(sys.modules[module], smoothing) if module in sys.modules else None
            assert name in functions and made
            functions[name] = lambda *inputs, made=made: made(*inputs, y)
        return functions

    monkeypatch.setattr(peers, "losses", anywhere)


def rows(bench):
    """The rows of a tiny run that have classes in the last dimension."""
    cases = [case for case in bench.cases("tiny") if case.size.count("×") != 3]
    return [_timing.measure_case(case, "cpu", seconds=0.01, compiled=False) for case in cases]


@pytest.mark.parametrize("bench", BENCHES)
def test_a_library_with_torchs_loss_is_a_side(bench, installed):
    module, known = BENCHES[bench]
    for row in rows(module):
        assert set(known) <= set(row["against_others"]) and row["notes"] == []
        assert all(row["seconds"][name] > 0 for name in known)


@pytest.mark.parametrize("bench", BENCHES)
def test_without_a_gpu_there_is_none(bench):
    module, known = BENCHES[bench]
    assert not any(set(known) & set(row["seconds"]) for row in rows(module))


def wrong(smoothing):
    return lambda *inputs: inputs[-3 if len(inputs) > 2 else 0].float().square().mean()


@pytest.mark.parametrize("bench", BENCHES)
def test_a_library_with_another_loss_is_not_timed(bench, installed, monkeypatch):
    module, known = BENCHES[bench]
    for name, (path, _) in list(known.items()):
        monkeypatch.setitem(known, name, (path, lambda library, smoothing: wrong(smoothing)))
    for row in rows(module):
        assert not set(known) & set(row["seconds"])
        assert len(row["notes"]) == len(known) and all("off by" in note for note in row["notes"])
