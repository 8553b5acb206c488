"""`fr.optim.SGD` takes what torch's takes, where numbers stand, and loads state dicts as torch's does."""

import copy
import io

import numpy as np
import pytest
import torch

import fastreg as fr

T = torch.tensor
BASE = {"lr": 0.1, "momentum": 0.5}
NUMBERS = {
    "1": 1,
    "np.float64": np.float64(0.25),
    "np.float32": np.float32(0.25),
    "np.int64": np.int64(1),
    "tensor": T(0.25),
    "float64 tensor": T(0.25, dtype=torch.float64),
    "bfloat16 tensor": T(0.25, dtype=torch.bfloat16),
    "float16 tensor": T(0.25, dtype=torch.float16),
    "int tensor": T(1),
    "zero": T(0.0),
    "learned": T(0.25, requires_grad=True),
}


def trained(SGD, options, group=None, later=None, dtype=torch.float32):
    """The parameter after three steps; `later` is written into its group before the second."""
    p = torch.nn.Parameter(T([2.0, -1.0], dtype=dtype))
    optimizer = SGD([{"params": [p], **(group or {})}], **options)
    for i in range(3):
        if i == 1:
            optimizer.param_groups[0].update(later or {})
        p.grad = p.detach() * (i + 1) + 1
        optimizer.step()
    return p.detach()


def assert_same(options, **more):
    want, got = (trained(SGD, options, **more) for SGD in (torch.optim.SGD, fr.optim.SGD))
    rtol, atol = (2e-2, 1e-2) if want.dtype == torch.bfloat16 else (1e-6, 1e-6)
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", ["lr", "momentum", "dampening", "weight_decay"])
def test_numbers(name, number):
    value = NUMBERS[number]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert_same({**BASE, name: value}, dtype=dtype)
    assert_same(BASE, group={name: value})
    assert_same(BASE, later={name: value})


@pytest.mark.parametrize("value", [-0.25, T(-0.25), np.float32(-0.25)], ids=["float", "tensor", "numpy"])
@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_negative_numbers_are_for_groups(name, value):
    for SGD in (torch.optim.SGD, fr.optim.SGD):
        with pytest.raises(ValueError):
            SGD([torch.nn.Parameter(torch.ones(2))], **{**BASE, name: value})
    for dtype in (torch.float32, torch.float64):
        assert_same(BASE, group={name: value}, dtype=dtype)
        assert_same(BASE, later={name: value}, dtype=dtype)
        assert_same({"lr": 0.1}, later={name: value}, dtype=dtype)


def test_a_negative_rate_has_no_proximal_step():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = fr.optim.SGD([p], lr=0.1, l1=0.1, l1_mode="proximal")
    optimizer.param_groups[0]["lr"], p.grad = -0.1, torch.ones(2)
    with pytest.raises(ValueError, match="SGD: lr must be at least 0 with a proximal l1"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(2))


def test_default_dtype_of_tensors():
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert_same({"lr": T(0.5)}, dtype=torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)


class TestStateDicts:
    def optimizer(self, SGD=fr.optim.SGD, **options):
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        optimizer = SGD([p], **{"lr": 0.01, "momentum": 0.5, "dampening": 0.5, **options})
        p.grad = torch.ones_like(p)
        optimizer.step()
        return optimizer

    def test_what_is_loaded_is_what_was_saved(self):
        optimizer = self.optimizer(l1=0.1, l1_mode="proximal")
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.param_groups[0].update(lr=1.0, l1=0.5, note="mine")
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 2.0)  # writes initial_lr
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=5)
        optimizer.load_state_dict(saved)
        loaded = optimizer.state_dict()
        assert loaded["param_groups"] == saved["param_groups"]
        assert loaded["state"][0].keys() == saved["state"][0].keys()
        for name, value in saved["state"][0].items():
            assert torch.equal(loaded["state"][0][name], value)
            assert loaded["state"][0][name].dtype == value.dtype

    def test_a_scheduler_starts_from_the_rate_that_was_loaded(self):
        rates = []
        for SGD in (torch.optim.SGD, fr.optim.SGD):
            optimizer = self.optimizer(SGD)
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer.param_groups[0]["lr"] = 0.001
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 2.0)
            optimizer.load_state_dict(saved)
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
            rates.append(optimizer.param_groups[0]["lr"])
        assert rates == [0.01, 0.01]

    def test_torchs_state_dict_keeps_our_own_options(self):
        saved = self.optimizer(torch.optim.SGD, lr=0.3).state_dict()
        own = {"l1": 0.2, "l1_mode": "proximal", "decoupled": True, "stochastic_rounding": True}
        optimizer = self.optimizer(**own)
        optimizer.param_groups[0]["initial_lr"] = 7.0
        optimizer.load_state_dict(saved)
        group = optimizer.param_groups[0]
        assert group["lr"] == 0.3 and "initial_lr" not in group
        assert {name: group[name] for name in own} == own

    def test_hooks_see_what_torchs_see(self):
        seen = []
        for SGD in (torch.optim.SGD, fr.optim.SGD):
            saved = self.optimizer(torch.optim.SGD).state_dict()
            optimizer = self.optimizer(SGD)
            optimizer.register_load_state_dict_pre_hook(lambda o, d: seen.append(set(d["param_groups"][0])))
            optimizer.register_load_state_dict_post_hook(lambda o: seen.append(set(o.param_groups[0])))
            optimizer.load_state_dict(saved)
        own = {"l1", "l1_mode", "decoupled", "scale_penalty", "stochastic_rounding", "ema", "ema_warmup"}
        own.add("rounding_seed")
        assert seen[0] == seen[2] == seen[1] and seen[3] == seen[1] | own

    def test_pickled(self):
        optimizer = self.optimizer(l1=0.3)
        buffer = io.BytesIO()
        torch.save(optimizer, buffer)
        buffer.seek(0)
        for twin in (torch.load(buffer, weights_only=False), copy.deepcopy(optimizer)):
            assert twin.param_groups[0]["l1"] == 0.3
            assert twin.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
