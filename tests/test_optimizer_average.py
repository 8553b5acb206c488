"""The moving average of SGD and AdamW: torch.optim.swa_utils.AveragedModel's numbers, its use, and what keeps
it.
"""

import copy
import io
import threading

import pytest
import torch
from helpers import same_values
from optimizer_reference import BOTH
from sgd_reference import parameter, scaler_with
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastreg as fr

both = pytest.mark.parametrize("cls", BOTH.values(), ids=BOTH)


def network(dtype=torch.float64):
    """Two layers that share a weight, one that is frozen, and a norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    model[4].bias.requires_grad_(False)
    return model.to(dtype)


def train(model, optimizer, steps=5, after=None, first=0, lacks=()):
    """Steps on random data. `lacks` are (step, name): parameters that have no gradient then."""
    dtype = next(model.parameters()).dtype
    for n in range(first, first + steps):
        torch.manual_seed(100 + n)
        optimizer.zero_grad()
        model(torch.randn(8, 4, dtype=dtype)).float().square().mean().backward()
        for name, p in model.named_parameters():
            if (n, name) in lacks:
                p.grad = None
        optimizer.step()
        if after:
            after(n)
    return optimizer


def torchs_average(model, optimizer, decay, **more):
    """What AveragedModel has after the same training."""
    kept = []

    def update(_):
        if not kept:
            kept.append(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)))
        kept[0].update_parameters(model)

    train(model, optimizer, after=update, **more)
    return list(kept[0].module.parameters())


def averages(model, optimizer):
    """The parameters as they are in evaluation."""
    with optimizer.averaged():
        return [p.detach().clone() for p in model.parameters()]


@both
class TestNumbers:
    @pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
    def test_against_averaged_model(self, cls, decay):
        """Tied and frozen weights included."""
        reference, model = network(), network()
        want = torchs_average(reference, cls(reference.parameters(), lr=0.05), decay)
        optimizer = train(model, cls(model.parameters(), lr=0.05, ema=decay))
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert same_values(p.detach(), q.detach())  # the average changes no step
        for got, q in zip(averages(model, optimizer), want, strict=True):
            torch.testing.assert_close(got, q.detach(), rtol=1e-14, atol=1e-15)
        assert all(state["n_averaged"] == 5 for state in optimizer.state.values())
        assert len(optimizer.state) == 6  # the shared weight once, the frozen bias not

    def test_parameters_without_a_gradient(self, cls):
        """One whose first gradient comes late, one that lacks some, and one that never has one."""
        lacks = [(0, "0.bias"), (1, "0.bias"), (3, "0.bias"), (2, "4.weight")]
        lacks += [(n, "1.bias") for n in range(5)]
        reference, model = network(), network()
        want = torchs_average(reference, cls(reference.parameters(), lr=0.05), 0.7, lacks=lacks)
        optimizer = train(model, cls(model.parameters(), lr=0.05, ema=0.7), lacks=lacks)
        for got, q in zip(averages(model, optimizer), want, strict=True):
            torch.testing.assert_close(got, q.detach(), rtol=1e-14, atol=1e-15)
        kind = torch.optim.SGD if cls is fr.optim.SGD else torch.optim.AdamW
        theirs = kind(model.parameters(), lr=0.05)
        theirs.load_state_dict(optimizer.state_dict())  # which torch's class goes on from
        train(model, theirs, first=5)

    def test_per_group(self, cls):
        model = network()
        groups = [{"params": [model[0].weight], "ema": 0.5}, {"params": [model[4].weight]}]
        optimizer = train(model, cls(groups, lr=0.05))
        assert "ema" in optimizer.state[model[0].weight]
        assert "ema" not in optimizer.state.get(model[4].weight, {})
        before = model[4].weight.detach().clone()
        with optimizer.averaged():
            assert torch.equal(model[4].weight, before)

    @pytest.mark.parametrize(("warmup", "power"), [(True, 2 / 3), (0.75, 0.75)])
    def test_warm_up(self, cls, warmup, power):
        """The decay of update n is min(ema, 1 - (1 + n)^-power): 0, then 1 - 2^-power and so on."""
        model, want = network(), []
        optimizer = cls(model.parameters(), lr=0.05, ema=0.6, ema_warmup=warmup)

        def update(n):
            weights = [p.detach().clone() for p in model.parameters()]
            decay = min(0.6, 1 - (1 + n) ** -power)
            old = want or weights
            want[:] = [decay * a + (1 - decay) * w for a, w in zip(old, weights, strict=True)]

        train(model, optimizer, after=update)
        for got, q in zip(averages(model, optimizer), want, strict=True):
            torch.testing.assert_close(got, q, rtol=1e-14, atol=1e-15)

    def test_warm_up_of_a_group_without_gradients(self, cls):
        """By its own count: a second update with 2^(-2/3) of the weight, which has been changed by hand."""
        p, other = parameter(torch.zeros(2)), parameter(torch.ones(2))
        optimizer = cls([{"params": [p]}, {"params": [other]}], lr=0.1, ema=0.9, ema_warmup=True)
        for value in (0.0, 1.0):
            with torch.no_grad():
                p.fill_(value)
            other.grad = torch.ones(2)
            optimizer.step()
        torch.testing.assert_close(optimizer.state[p]["ema"], torch.full((2,), 2 ** (-2 / 3)))
        assert optimizer.state[p]["n_averaged"] == 2

    @pytest.mark.parametrize("power", [True, 0.75])
    def test_warm_up_is_timms(self, cls, power):
        ema = pytest.importorskip("timm.utils.model_ema", reason='needs pip install "torch-fastreg[test]"')
        model = network()
        model[2].weight = nn.Parameter(model[2].weight.detach().clone())  # timm averages a tied one twice
        more = {} if power is True else dict(warmup_power=power)
        theirs = ema.ModelEmaV3(model, decay=0.6, use_warmup=True, **more)
        optimizer = cls(model.parameters(), lr=0.05, ema=0.6, ema_warmup=power)
        train(model, optimizer, after=lambda n: theirs.update(model, step=n + 1))
        for got, q in zip(averages(model, optimizer), theirs.module.parameters(), strict=True):
            torch.testing.assert_close(got, q.detach(), rtol=1e-14, atol=1e-15)

    def test_a_tied_weight_is_averaged_once(self, cls):
        """timm (1.0.31) does it once for each of its names, so that two names forget twice as fast."""
        ema = pytest.importorskip("timm.utils.model_ema", reason='needs pip install "torch-fastreg[test]"')
        model = network()
        model.requires_grad_(False)[0].weight.requires_grad_()
        optimizer = cls([model[0].weight], lr=1e-9, weight_decay=0.0, ema=0.5)
        theirs = ema.ModelEmaV3(model, decay=0.5)
        for value in (0.0, 1.0):
            with torch.no_grad():
                model[0].weight.fill_(value)
            model[0].weight.grad = torch.zeros(4, 4, dtype=torch.float64)
            optimizer.step()
            theirs.update(model, step=int(value) + 1)
        assert theirs.module[0].weight[0, 0] == 0.75 and optimizer.state[model[0].weight]["ema"][0, 0] == 0.5

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_narrow(self, cls, dtype):
        """Of the weights before they are rounded, rounded once a step."""
        p = parameter(torch.randn(200).to(dtype))
        optimizer = cls([p], lr=0.05, ema=0.75)
        average = None
        for n in range(3):
            twin = parameter(p.detach().float())
            other = cls([twin], lr=0.05)
            for name, value in optimizer.state[p].items():
                other.state[twin][name] = value.clone() if value.dim() == 0 else value.float()
            p.grad = torch.randn(200).to(dtype)
            twin.grad = p.grad.float()
            other.step()
            optimizer.step()
            exact = twin.detach() if n == 0 else torch.lerp(average.float(), twin.detach(), 0.25)
            average = exact.to(dtype)
            close = dict(rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
            torch.testing.assert_close(optimizer.state[p]["ema"], average, **close)
            average = optimizer.state[p]["ema"].clone()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_narrow_without_a_gradient(self, cls, dtype):
        """Averaged in float32 and rounded once, too."""
        p, before, after = parameter(torch.ones(200, dtype=dtype)), *torch.randn(2, 200).to(dtype)
        optimizer = cls([p], lr=0.05, ema=0.75)
        for value in (before, after):
            with torch.no_grad():
                p.copy_(value)
            optimizer.step()
        want = torch.lerp(before.float(), after.float(), 0.25).to(dtype)
        assert torch.equal(optimizer.state[p]["ema"], want)

    @pytest.mark.parametrize("fused", [None, True])
    def test_skipped_steps(self, cls, fused):
        """An overflow leaves the average, of parameters without a gradient too."""
        p, idle = parameter(torch.ones(3)), parameter(torch.ones(2))
        optimizer, scaler = cls([p, idle], lr=0.05, ema=0.5, fused=fused), scaler_with(4.0)
        for bad in (True, False, True, False):
            p.grad = torch.full((3,), torch.inf if bad else 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.state[p]["n_averaged"] == 2 == optimizer.state[idle]["n_averaged"]
        assert torch.isfinite(optimizer.state[p]["ema"]).all()
        assert torch.equal(optimizer.state[idle]["ema"], torch.ones(2))


@both
class TestUse:
    def trained(self, cls, **options):
        model = network()
        return model, train(model, cls(model.parameters(), lr=0.05, ema=0.5, **options))

    def test_the_block(self, cls):
        """Averages inside, the very weights and averages after; also of a block that raises, and nested."""
        model, optimizer = self.trained(cls)
        weights = [p.detach().clone() for p in model.parameters()]
        kept = {p: state["ema"].clone() for p, state in optimizer.state.items()}
        places = [p.data_ptr() for p in model.parameters()]
        with pytest.raises(KeyError), optimizer.averaged():
            with optimizer.averaged():
                pass
            for p in model.parameters():
                assert torch.equal(p, kept.get(p, p)) and (p not in kept or p.requires_grad)
            assert model[2].weight is model[0].weight
            raise KeyError
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
        assert all(torch.equal(state["ema"], kept[p]) for p, state in optimizer.state.items())
        assert places == [p.data_ptr() for p in model.parameters()]

    def test_what_a_block_refuses(self, cls):
        model, optimizer = self.trained(cls)
        saved, before = optimizer.state_dict(), copy.deepcopy(optimizer.state_dict())
        with optimizer.averaged():
            with pytest.raises(RuntimeError, match="step must not run inside averaged"):
                optimizer.step()
            with pytest.raises(RuntimeError, match="load_state_dict must not run inside averaged"):
                optimizer.load_state_dict(saved)
            with pytest.raises(RuntimeError, match="copies must not be made inside averaged"):
                copy.deepcopy(optimizer)
            with pytest.raises(RuntimeError, match="must not run inside averaged"):
                optimizer.copy_averaged_to(model)
        train(model, optimizer, first=5)
        assert optimizer.state_dict()["param_groups"] == before["param_groups"]

    def test_state_dict_inside(self, cls):
        """That of outside: what is saved during an evaluation resumes."""
        _, optimizer = self.trained(cls)
        outside = copy.deepcopy(optimizer.state_dict())
        with optimizer.averaged():
            inside = optimizer.state_dict()
        for i, state in outside["state"].items():
            assert state.keys() == inside["state"][i].keys()
            assert all(torch.equal(value, inside["state"][i][name]) for name, value in state.items())

    def test_no_averages(self, cls):
        model = network()
        optimizer = cls(model.parameters(), lr=0.1)
        for use in (lambda: optimizer.averaged().__enter__(), lambda: optimizer.copy_averaged_to(model)):
            with pytest.raises(ValueError, match=r"averages need a parameter group with ema.*ema=0.999"):
                use()
        optimizer = cls(model.parameters(), lr=0.1, ema=0.9)  # no step yet: the weights are the average
        with optimizer.averaged():
            assert all(
                torch.equal(p, q) for p, q in zip(model.parameters(), network().parameters(), strict=True)
            )

    def test_copied(self, cls):
        """Into the model itself, into a copy, and into a copy of another dtype."""
        model, optimizer = self.trained(cls)
        want, twin, narrow = averages(model, optimizer), network(), network(torch.float32)
        for target in (twin, narrow):
            with torch.no_grad():
                for p in target.parameters():
                    p.zero_()
            with pytest.raises(ValueError, match="give the trained model as source="):
                optimizer.copy_averaged_to(target)
            optimizer.copy_averaged_to(target, source=model)
            for got, q in zip(target.parameters(), want, strict=True):
                assert torch.equal(got.detach(), q.to(got.dtype))
        optimizer.copy_averaged_to(model)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), want, strict=True))
        with pytest.raises(ValueError, match="every parameter of model must be one of this optimiser"):
            optimizer.copy_averaged_to(nn.Linear(3, 3), source=model)
        wrong = network()
        wrong[4] = nn.Linear(4, 3)
        with pytest.raises(ValueError, match=r"must have the shape of its average, \(2, 4\), got \(3, 4\)"):
            optimizer.copy_averaged_to(wrong, source=model)

    def test_copied_by_name(self, cls):
        model = network()
        optimizer = train(model, cls(model.named_parameters(), lr=0.05, ema=0.5))
        twin = network()
        optimizer.copy_averaged_to(twin)
        for got, q in zip(twin.parameters(), averages(model, optimizer), strict=True):
            assert torch.equal(got, q)

    def test_what_is_frozen_may_be_unknown_to_the_optimiser(self, cls):
        model, twin = network(), network()
        known = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        optimizer = train(model, cls(known, lr=0.05, ema=0.5))
        optimizer.copy_averaged_to(twin)
        for got, q in zip(twin.parameters(), averages(model, optimizer), strict=True):
            assert torch.equal(got, q)

    @pytest.mark.parametrize("warmup", [False, True])
    def test_resumed(self, cls, warmup):
        """Saved in the middle, and loaded into another model: the same bits afterwards."""
        model, optimizer = self.trained(cls, ema_warmup=warmup)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        other = network()
        other.load_state_dict(saved["model"])
        again = cls(other.parameters(), lr=9.0)
        again.load_state_dict(saved["optimizer"])
        train(model, optimizer, first=5)
        train(other, again, first=5)
        for a, b in zip(averages(model, optimizer), averages(other, again), strict=True):
            assert torch.equal(a, b)
        assert again.param_groups[0]["ema"] == 0.5 and again.param_groups[0]["ema_warmup"] == warmup

    def test_switched_on_later(self, cls):
        """The first step with it makes it."""
        model = network()
        optimizer = train(model, cls(model.parameters(), lr=0.05))
        optimizer.param_groups[0]["ema"] = 0.5
        train(model, optimizer, steps=1, first=5)
        for p, state in optimizer.state.items():
            assert torch.equal(state["ema"], p.detach()) and state["n_averaged"] == 1

    @pytest.mark.parametrize("inside", [True, False])
    def test_early_stopping(self, cls, inside):
        """A stopper that is asked inside the block keeps the averages as the model's weights; one outside,
        the weights and averages, which are then copied.
        """
        model = network()
        optimizer = cls(model.parameters(), lr=0.05, ema=0.5)
        stopper, best = fr.EarlyStopping(model, optimizer, patience=2), None
        for n, score in enumerate((3.0, 1.0, 2.0, 2.0)):
            train(model, optimizer, steps=1, first=n)
            if inside:
                with optimizer.averaged():
                    stop = stopper.step(score)
            else:
                stop = stopper.step(score)
            if n == 1:
                best = averages(model, optimizer)
        assert stop
        stopper.restore()
        if not inside:
            optimizer.copy_averaged_to(model)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), best, strict=True))
        train(model, optimizer, first=9)


@both
@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (dict(ema=1.0), ValueError, r"ema must be None or a decay in \[0, 1\), got 1.0"),
        (dict(ema=-0.1), ValueError, r"ema must be None or a decay in \[0, 1\), got -0.1"),
        (dict(ema=float("nan")), ValueError, "ema must be finite, got nan"),
        (dict(ema="0.9"), TypeError, "ema must be a number, got str"),
        (dict(ema=0.9, ema_warmup=-1.0), ValueError, "ema_warmup must be finite and at least 0, got -1"),
        (dict(ema=0.9, ema_warmup="yes"), TypeError, "ema_warmup must be a number, got str"),
    ],
)
def test_errors(cls, options, error, text):
    a, b = parameter(torch.ones(2)), parameter(torch.ones(2))
    with pytest.raises(error, match=f"{cls.__name__}: {text}"):
        cls([a], lr=0.1, **options)
    optimizer = cls([a], lr=0.1)
    with pytest.raises(error, match=text):
        optimizer.add_param_group({"params": [b], **options})
    optimizer.param_groups[0].update(options)
    a.grad = torch.ones(2)
    with pytest.raises(error, match=text):
        optimizer.step()
    assert torch.equal(a.detach(), torch.ones(2))


# ---- beside what others do


@both
class TestBesideOthers:
    def test_frozen_after_a_step(self, cls):
        """Its average goes on towards the weight, as AveragedModel's does, and on the fast path too."""
        results = []
        for own in (True, False):
            model = network()
            optimizer = cls(model.parameters(), lr=0.05, **({"ema": 0.5} if own else {}))
            other = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))

            def update(n, model=model, optimizer=optimizer, other=other):
                other.update_parameters(model)
                if n == 1:
                    optimizer.zero_grad()
                    model[0].requires_grad_(False)

            train(model, optimizer, steps=6, after=update)
            results.append(averages(model, optimizer) if own else list(other.module.parameters()))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("more", [{"ema": 0.9}, {"max_norm": 1.0}], ids=str)
    def test_a_scaler_without_gradients(self, cls, more):
        """Of two optimisers with one scaler, one has no gradient this time: torch's scaler tells it 0."""
        a, b = (nn.Parameter(torch.ones(3)) for _ in range(2))
        idle, busy = (cls([p], lr=0.1, fused=True, **more) for p in (a, b))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        scaler.scale(b.sum()).backward()
        for optimizer in (idle, busy):
            scaler.step(optimizer)
        scaler.update()
        assert torch.equal(a, torch.ones(3)) and (b < 1).all()

    @pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
    def test_autocast_keeps_no_casts_of_other_weights(self, cls, outer):
        model, x = nn.Linear(8, 8), torch.randn(3, 8)
        optimizer = cls(model.parameters(), lr=0.5, ema=0.9)
        for _ in range(3):
            model(x).square().mean().backward()
            optimizer.step()
        with outer(), torch.autocast("cpu", torch.bfloat16):
            raw = model(x)
            with optimizer.averaged():
                inside = model(x)
            after = model(x)
        with torch.autocast("cpu", torch.bfloat16), optimizer.averaged():
            want = model(x)
        assert torch.equal(inside, want) and not torch.equal(inside, raw) and torch.equal(after, raw)

    def test_hooks_of_state_dicts_see_what_is_outside(self, cls):
        p = parameter(torch.ones(3))
        optimizer = cls([p], lr=0.1, ema=0.9)
        p.grad = torch.ones(3)
        optimizer.step()
        outside = copy.deepcopy(optimizer.state_dict())
        optimizer.register_state_dict_post_hook(lambda _, found: {"renamed": found["state"][0]})
        with optimizer.averaged():
            inside = optimizer.state_dict()["renamed"]
        assert torch.equal(inside["ema"], outside["state"][0]["ema"])
        assert torch.equal(optimizer.state_dict()["renamed"]["ema"], inside["ema"])

    def test_blocks_in_two_threads(self, cls):
        """The last that leaves exchanges back."""
        p = parameter(torch.ones(3))
        optimizer = cls([p], lr=0.1, ema=0.9)
        for _ in range(2):
            p.grad = torch.ones(3)
            optimizer.step()
        weight, average = p.detach().clone(), optimizer.state[p]["ema"].clone()
        entered, leave, seen = threading.Event(), threading.Event(), []

        def evaluate():
            with optimizer.averaged():
                entered.set()
                leave.wait(30)
                seen.append(p.detach().clone())

        thread = threading.Thread(target=evaluate)
        with optimizer.averaged():
            thread.start()
            assert entered.wait(30)
        assert torch.equal(p, average)  # the thread is still inside
        leave.set()
        thread.join()
        assert torch.equal(seen[0], average) and torch.equal(p, weight)

    def test_an_exchange_that_fails_is_undone(self, cls):
        p, q = parameter(torch.ones(3)), parameter(torch.ones(2))
        optimizer = cls([p, q], lr=0.1, ema=0.9)
        for _ in range(2):
            p.grad, q.grad = torch.ones(3), torch.ones(2)
            optimizer.step()
        before, average = p.detach().clone(), optimizer.state[p]["ema"].clone()
        optimizer.state[q]["ema"] = torch.ones(7)
        with pytest.raises(RuntimeError), optimizer.averaged():
            pass
        assert torch.equal(p, before) and torch.equal(optimizer.state[p]["ema"], average)
        optimizer.state[q]["ema"] = torch.ones(2)
        optimizer.step()  # it is outside

    @pytest.mark.parametrize(
        "wrap", [torch.compile, nn.DataParallel, AveragedModel], ids=lambda f: f.__name__
    )
    def test_names_without_wrappers(self, cls, wrap):
        model = network()
        optimizer = train(model, cls(model.parameters(), lr=0.05, ema=0.5))
        want = averages(model, optimizer)
        for source, target in ((wrap(model), network()), (model, wrap(network()))):
            if wrap is AveragedModel and source is not model:
                continue  # it holds a copy, whose parameters are not the optimiser's
            optimizer.copy_averaged_to(target, source=source)
            for got, average in zip(target.parameters(), want, strict=True):
                assert torch.equal(got.detach(), average)


def test_a_momentum_that_has_not_begun_is_none_for_torch():
    """A first step that was skipped leaves nothing, also to torch's class, which would take zeros for a
    momentum and dampen its first gradient.
    """
    options = dict(lr=0.1, momentum=0.9, dampening=0.5)
    p = parameter(torch.ones(4))
    ours = fr.optim.SGD([p], max_norm=1.0, **options)
    p.grad = torch.full((4,), float("nan"))
    ours.step()
    state = copy.deepcopy(ours.state_dict())
    assert state["state"][0]["momentum_buffer"] is None
    results = []
    for cls, load in ((torch.optim.SGD, True), (torch.optim.SGD, False), (fr.optim.SGD, True)):
        q = parameter(torch.ones(4))
        optimizer = cls([q], **options)
        if load:
            optimizer.load_state_dict(copy.deepcopy(state))
        for _ in range(2):
            q.grad = torch.linspace(-1, 1, 4)
            optimizer.step()
        results.append(q.detach())
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[2], results[1], rtol=1e-6, atol=1e-7)


def test_max_norm_in_a_group_says_where_it_belongs():
    with pytest.raises(ValueError, match=r"constructor alone\. Under ZeroRedundancyOptimizer"):
        fr.optim.AdamW([{"params": [parameter(torch.ones(2))], "max_norm": 1.0}], max_norm=1.0)
