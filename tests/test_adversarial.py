"""Training on adversarial examples and robust accuracy, against float64 references, and what each costs in
passes.

Proven: `adversarial_loss` and its gradients are those computed by hand, and `adversarial_backward` has the
same; the passes of each method are counted; `FreeAdversarial` is the paper's loop; fast adversarial training
is FGSM from a random start with a step of 1.25 eps; restarts keep the worst; robust accuracy is exact where
it is known (linear models); each makes a network harder to fool on the digits; a collapse of robust accuracy
is stopped and undone.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastreg as fr


def net(norm=False):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8 * 36, 5),
    )


def batch(n=7, dtype=torch.float32):
    return torch.rand(n, 3, 6, 6).to(dtype), torch.randint(5, (n,))


class Passes:
    """How often the last layer of a model runs forward, and how often a gradient goes back through it and
    into its weight.
    """

    def __init__(self, model):
        self.forward = self.back = self.weights = 0
        layer = model[-1]
        layer.register_forward_hook(self._forward)
        layer.weight.register_hook(self._weights)

    def _forward(self, layer, inputs, output):
        self.forward += 1
        if output.requires_grad:
            output.register_hook(self._back)

    def _back(self, grad):
        self.back += 1

    def _weights(self, grad):
        self.weights += 1

    def __call__(self):
        return self.forward, self.back, self.weights


# --------------------------------------------------------------------------------------------------
# adversarial_loss
def by_hand(model, x, y, eps, weight, loss=F.cross_entropy, norm="linf"):
    """(1 - weight) J(x) + weight J(x'), in the dtype of the model."""
    leaf = x.detach().clone().requires_grad_()
    clean = loss(model(leaf), y)
    (grad,) = torch.autograd.grad(clean, leaf, retain_graph=True)
    length = grad.flatten(1).norm(dim=1).view(-1, *(1,) * (x.dim() - 1))
    adversarial = (x.detach() + eps * (grad.sign() if norm == "linf" else grad / length)).clamp(0, 1)
    return (1 - weight) * clean + weight * loss(model(adversarial), y)


@pytest.mark.parametrize("weight", (0.25, 0.5, 0.9))
@pytest.mark.parametrize("norm", (False, True), ids=("", "BatchNorm"))
def test_adversarial_loss_is_the_formula(weight, norm):
    model, (x, y) = net(norm), batch()
    twin = copy.deepcopy(model)
    x.requires_grad_()
    loss = fr.adversarial_loss(model, x, y, 0.1, weight=weight)
    want = by_hand(twin, x, y, 0.1, weight)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    loss.backward()
    want.backward()
    assert x.grad is None
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_adversarial_loss_at_the_ends():
    model, (x, y) = net(), batch()
    x.requires_grad_()
    assert fr.adversarial_loss(model, x, y, 0.1, weight=0) == fr.cross_entropy(model(x), y)
    adversarial = fr.fgsm(model, x, y, 0.1)
    torch.testing.assert_close(
        fr.adversarial_loss(model, x, y, 0.1, weight=1), F.cross_entropy(model(adversarial), y)
    )
    for weight in (0, 0.5, 1):
        x.grad = None
        fr.adversarial_loss(model, x, y, 0.1, weight=weight).backward()
        assert x.grad is None


def test_weight_one_lets_no_nan_of_the_clean_loss_in():
    loss = lambda z, y: (z - 0.5).log().mean()  # noqa: E731  NaN at x = 0.25, finite at 0.75
    x = torch.tensor([[0.5]])
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(1), model.bias.fill_(0.25)
    assert fr.adversarial_loss(model, x, None, 0.1, weight=1, loss=loss).isfinite()


@pytest.mark.parametrize("narrow", (torch.float16, torch.bfloat16), ids=str)
def test_adversarial_loss_gives_no_gradient_to_x_in_low_precision(narrow):
    model, (x, y) = net().to(narrow), batch(dtype=narrow)
    x.requires_grad_()
    loss = fr.adversarial_loss(model, x, y, 0.1)
    loss.backward()
    assert x.grad is None and all(p.grad is not None for p in model.parameters())
    want = by_hand(copy.deepcopy(model).float(), x.detach().float(), y, 0.1, 0.5)
    assert abs(loss.item() - want.item()) < 0.05


def test_adversarial_loss_of_ones_own_l2_and_no_grad():
    model, (x, y) = net(), batch()
    margin = lambda logits, y: F.multi_margin_loss(logits, y)  # noqa: E731
    torch.testing.assert_close(
        fr.adversarial_loss(model, x, y, 0.1, loss=margin, weight=0.3),
        by_hand(model, x, y, 0.1, 0.3, margin),
        rtol=1e-5,
        atol=1e-6,
    )
    per_channel = torch.tensor([0.0, 0.1, 0.2])
    with torch.no_grad():
        inside = fr.adversarial_loss(model, x, y, per_channel, norm="linf")
    outside = fr.adversarial_loss(model, x, y, per_channel, norm="linf")
    assert not inside.requires_grad and outside.requires_grad
    torch.testing.assert_close(inside, outside.detach())
    out = fr.adversarial_loss(model, x, y, 0.5, norm="l2")
    want = 0.5 * F.cross_entropy(model(x), y) + 0.5 * F.cross_entropy(
        model(fr.fgsm(model, x, y, 0.5, norm="l2")), y
    )
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)


def test_adversarial_loss_under_autocast():
    model, (x, y) = net(norm=True), batch()
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fr.adversarial_loss(model, x, y, 0.1)
    loss.backward()
    assert loss.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = by_hand(twin, x, y, 0.1, 0.5, lambda z, y: F.cross_entropy(z.float(), y))
    want.backward()
    torch.testing.assert_close(loss, want, rtol=0.01, atol=0.01)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def goes_twice_through_distributed_data_parallel():
    """Whether torch can. Until some version it copies the statistics of a BatchNorm before each forward pass,
    and the first one's backward pass misses what they were.
    """
    wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    x = torch.rand(6, 4)
    try:
        (wrapped(x) + wrapped(x)).square().sum().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return False
    return True


def test_adversarial_loss_through_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        if not goes_twice_through_distributed_data_parallel():
            pytest.skip("this torch cannot run a BatchNorm twice before a backward pass")
        model, (x, y) = net(norm=True), batch()
        twin = copy.deepcopy(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            fr.fgsm(wrapped, x, y, 0.1)
            loss, want = fr.adversarial_loss(wrapped, x, y, 0.1), by_hand(twin, x, y, 0.1, 0.5)
            loss.backward()
            want.backward()
            torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()


def test_attacks_leave_distributed_data_parallel_alone(tmp_path):
    """With a static graph it would take an attack's backward pass, which reaches no parameter, for that of
    the training, and average no gradient again."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        (x, y), averaged = batch(), []

        def hook(state, bucket):
            averaged.append(bucket.buffer().numel())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        for attack in (fr.fgsm, lambda m, x, y, eps: fr.pgd(m, x, y, eps, eps / 2, 2)):
            wrapped = nn.parallel.DistributedDataParallel(net(norm=True), static_graph=True)
            wrapped.register_comm_hook(None, hook)
            for owner in (wrapped, nn.Sequential(wrapped)):
                for _ in range(3):
                    adversarial = attack(owner, x, y, 0.1)
                    assert not averaged
                    F.cross_entropy(owner(adversarial), y).backward()
                    assert sum(averaged) == sum(p.numel() for p in wrapped.parameters())
                    averaged.clear()
            assert "forward" not in vars(wrapped)
    finally:
        torch.distributed.destroy_process_group()


def test_adversarial_training_makes_the_model_harder_to_fool():
    centres = torch.rand(5, 3, 6, 6)
    y = torch.randint(5, (100,))
    x = (centres[y] + torch.randn(100, 3, 6, 6) * 0.15).clamp(0, 1)
    errors = {}
    for weight in (0, 0.5):
        model = net(norm=False)
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(40):
            optimiser.zero_grad()
            fr.adversarial_loss(model, x, y, 0.1, weight=weight).backward()
            optimiser.step()
        errors[weight] = F.cross_entropy(model(fr.fgsm(model, x, y, 0.1)), y).item()
    assert errors[0.5] < errors[0] / 2


# -------------------------------------------------------------------------------------------------


# adversarial_backward
@pytest.mark.parametrize("weight", (0.2, 0.5, 0.9))
@pytest.mark.parametrize("norm", ("linf", "l2"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_backward_gives_the_gradients_of_the_by_hand(weight, norm, dtype):
    model, (x, y) = net().to(dtype), batch()
    x = x.to(dtype).requires_grad_()
    twin = copy.deepcopy(model).double()
    for _ in range(2):  # gradients add up, as with backward()
        loss = fr.adversarial_backward(model, x, y, 0.1, weight=weight, norm=norm)
        want = by_hand(twin, x.detach().double(), y, 0.1, weight, norm=norm)
        want.backward()
    assert loss.shape == () and not loss.requires_grad and x.grad is None
    tolerance = dict(rtol=1e-10, atol=1e-12) if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.double(), want.detach(), **tolerance)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, **tolerance)


def test_backward_is_adversarial_loss_with_batch_norm_a_loss_of_ones_own_and_a_scale():
    model, (x, y) = net(norm=True), batch()
    x, twin = x.clamp(0.1, 0.8), copy.deepcopy(model)
    options = dict(
        weight=0.3, loss=lambda z, y: F.multi_margin_loss(z, y), bounds=(0.1, torch.tensor([0.8, 0.9, 1.0]))
    )
    scaled = []
    loss = fr.adversarial_backward(
        model, x, y, 0.1, scale=lambda value: scaled.append(value) or 8 * value, **options
    )
    want = fr.adversarial_loss(twin, x, y, 0.1, **options)
    want.backward()
    torch.testing.assert_close(loss, want.detach())
    torch.testing.assert_close(sum(scaled).detach(), loss)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, 8 * b.grad, rtol=1e-4, atol=1e-6)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_what_each_method_costs():
    """(forward passes, backward passes, backward passes that reach the weights) of one batch."""
    x, y = batch()
    free = fr.FreeAdversarial(0.1, replays=3)

    def replay(model):
        for x_adv in free(x):
            F.cross_entropy(model(x_adv), y).backward()

    fast = dict(weight=1, random_start=True)
    for method, want in (
        (lambda model: F.cross_entropy(model(x), y).backward(), (1, 1, 1)),
        (lambda model: fr.adversarial_backward(model, x, y, 0.1), (2, 2, 2)),
        # The gradient of the weight is added up before it arrives; the clean graph is walked a second time
        # for the input.
        (lambda model: fr.adversarial_loss(model, x, y, 0.1).backward(), (2, 3, 1)),
        (lambda model: fr.adversarial_loss(model, x, y, 0.1, **fast).backward(), (2, 2, 1)),
        (lambda model: fr.adversarial_loss(model, x, y, 0.1, random_start=True).backward(), (3, 3, 1)),
        (replay, (3, 3, 3)),  # one of each per step, as in plain training
        (lambda model: fr.fgsm(model, x, y, 0.1), (1, 1, 0)),
        (lambda model: fr.fgsm(model, x, y, 0.1, random_start=True), (1, 1, 0)),
        (lambda model: fr.pgd(model, x, y, 0.1, 0.02, 5), (5, 5, 0)),
        (
            lambda model: fr.pgd(model, x, y, 0.1, 0.02, 5, restarts=2),
            (12, 10, 0),
        ),  # and two looks at the results
        (lambda model: fr.robust_accuracy(model, (x, y), 0.0, steps=4, restarts=0), (1, 0, 0)),
    ):
        model = net()
        passes = Passes(model)
        method(model)
        assert passes() == want


def test_backward_through_float16_with_a_scaler():
    """With scaler.scale the smallest gradients keep their signs; the scaler's step is the unscaled one."""
    model, (x, y) = net().half(), batch()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    fr.adversarial_backward(model, x.half(), y, 0.1, scale=scaler.scale)
    twin = copy.deepcopy(model).double()
    twin.zero_grad()
    by_hand(twin, x.half().double(), y, 0.1, 0.5).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad.double() / 2**12, b.grad, rtol=0.05, atol=0.02)


# ----------------------------------------------------------------------------------------------------- fast:
# random start
@pytest.mark.parametrize("norm", ("linf", "l2"))
@pytest.mark.parametrize("targeted", (False, True))
def test_fgsm_from_a_random_start(norm, targeted):
    """One projected step of 1.25 eps from a uniform point of the ball."""
    model, (x, y) = net().double(), batch()
    x = x.double()
    mean, std = torch.tensor([0.4, 0.5, 0.6]).double(), torch.tensor([0.2, 0.3, 0.4]).double()
    eps, bounds = (0.1 / std, ((0 - mean) / std, (1 - mean) / std)) if norm == "linf" else (0.8, (0.0, 1.0))
    generator = torch.Generator().manual_seed(1)
    got = fr.fgsm(
        model, x, y, eps, norm=norm, targeted=targeted, random_start=True, bounds=bounds, generator=generator
    )
    generator.manual_seed(1)
    want = fr.pgd(
        model, x, y, eps, 1.25 * eps, 1, norm=norm, targeted=targeted, bounds=bounds, generator=generator
    )
    assert torch.equal(got, want)
    assert not torch.equal(got, fr.fgsm(model, x, y, eps, norm=norm, targeted=targeted, bounds=bounds))
    if norm == "linf":
        radius = (0.1 / std).view(3, 1, 1)
        low, high = (((edge - mean) / std).view(3, 1, 1) for edge in (0, 1))
        assert ((got - x).abs() <= radius + 1e-12).all()
        inside = ((x - low).abs() > radius) & ((high - x).abs() > radius)
        # A start u eps moves to clamp(u + 1.25, -1, 1) eps, u uniform in [-1, 1]: onto the surface in 5 of 8
        # cases.
        surface = ((got - x).abs() / radius)[inside] > 1 - 1e-9
        assert 0.55 < surface.double().mean() < 0.7


def test_fast_adversarial_loss_is_the_loss_of_those_examples():
    model, (x, y) = net(), batch()
    for weight in (0.5, 1):
        loss = fr.adversarial_loss(
            model, x, y, 0.1, weight=weight, random_start=True, generator=torch.Generator().manual_seed(2)
        )
        found = fr.fgsm(model, x, y, 0.1, random_start=True, generator=torch.Generator().manual_seed(2))
        want = (1 - weight) * F.cross_entropy(model(x), y) + weight * F.cross_entropy(model(found), y)
        torch.testing.assert_close(loss, want)


# --------------------------------------------------------------------------------------------------
# restarts
@pytest.mark.parametrize("targeted", (False, True))
@pytest.mark.parametrize("norm", ("linf", "l2"))
def test_restarts_keep_the_worst_per_sample(targeted, norm):
    model, (x, y) = net(), batch(20)
    options = dict(eps=0.3, alpha=0.1, steps=2, targeted=targeted, norm=norm)
    got = fr.pgd(model, x, y, **options, restarts=4, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    runs = torch.stack([fr.pgd(model, x, y, **options, generator=generator) for _ in range(4)])
    losses = torch.stack([F.cross_entropy(model(run), y, reduction="none") for run in runs])
    worst = losses.argmin(0) if targeted else losses.argmax(0)
    assert len(worst.unique()) > 1
    assert torch.equal(got, runs[worst, torch.arange(20)])


def test_restarts_with_a_loss_of_ones_own():
    model, (x, y) = net(), batch()
    pixels = lambda z, y: F.cross_entropy(z, y, reduction="none")[:, None].expand(-1, 4)  # noqa: E731
    a = fr.pgd(model, x, y, 0.1, 0.05, 2, restarts=3, loss=pixels, generator=torch.Generator().manual_seed(1))
    b = fr.pgd(model, x, y, 0.1, 0.05, 2, restarts=3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(a, b)
    with pytest.raises(
        ValueError,
        match=r"pgd: with restarts the loss must give one value per sample, \(7, ...\), got shape \(\)",
    ):
        fr.pgd(model, x, y, 0.1, 0.05, 2, restarts=2, loss=F.cross_entropy)
    with pytest.raises(
        ValueError, match="2 restarts from the same point find the same; use random_start=True"
    ):
        fr.pgd(model, x, y, 0.1, 0.05, 2, restarts=2, random_start=False)
    with pytest.raises(ValueError, match="pgd: restarts must be at least 1, got 0"):
        fr.pgd(model, x, y, 0.1, 0.05, 2, restarts=0)
    nan = lambda z, y: F.cross_entropy(z, y, reduction="none") * math.nan  # noqa: E731
    assert fr.pgd(model, x, y, 0.1, 0.05, 2, restarts=2, loss=nan).isfinite().all()


# --------------------------------------------------------------------------------------------------
# what a loss receives and gives
def accuracy(*args, **options):
    return torch.tensor(fr.robust_accuracy(args[0], args[1:3], *args[3:], **options))


def gradients(model, *args, **options):
    model.zero_grad()
    fr.adversarial_backward(model, *args, **options)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


TAKE_A_LOSS = {
    "fgsm": fr.fgsm,
    "pgd": lambda *args, **options: fr.pgd(*args, 0.05, 2, random_start=False, **options),
    "adversarial_loss": fr.adversarial_loss,
    "adversarial_backward": gradients,
    "robust_accuracy": accuracy,
}


@pytest.mark.parametrize("op", TAKE_A_LOSS)
def test_a_loss_may_give_one_number_or_one_value_per_sample(op):
    model, (x, y) = net().eval(), batch(12)
    want = TAKE_A_LOSS[op](model, x, y, 0.1)
    seen = []

    def loss(output, target):
        seen.append((output.shape, target.shape))
        return F.cross_entropy(output, target, reduction="none")

    forms = {
        "(B,)": loss,
        "(B, 3)": lambda z, y: loss(z, y)[:, None].expand(-1, 3),
        "()": lambda z, y: loss(z, y).mean(),
        "(1,)": lambda z, y: loss(z, y).mean()[None],
    }
    for form, each in forms.items():
        torch.manual_seed(0)
        got = TAKE_A_LOSS[op](model, x, y, 0.1, loss=each)
        assert got.shape == want.shape, form
        if op != "robust_accuracy":  # its attack starts at random
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=form)
    assert all(output[1:] == (5,) and output[:1] == target for output, target in seen)


def test_a_loss_of_several_values_is_summed_by_attacks_and_averaged_by_objectives():
    model, (x, y) = net().eval(), batch(12)
    ones = lambda z, y: F.cross_entropy(z, y, reduction="none")  # noqa: E731
    assert fr.adversarial_loss(model, x, y, 0.1, weight=0, loss=ones) == ones(model(x), y).mean()
    # 12 samples in one batch are attacked as each of them alone.
    alone = torch.cat([fr.fgsm(model, x[i : i + 1], y[i : i + 1], 0.1, loss=ones) for i in range(12)])
    torch.testing.assert_close(fr.fgsm(model, x, y, 0.1, loss=ones), alone)


@pytest.mark.parametrize("op", TAKE_A_LOSS)
def test_a_loss_that_gives_something_else_is_refused(op):
    model, (x, y) = net().eval(), batch(12)
    with torch.no_grad():
        y = model(x).argmax(1)  # right, so that robust_accuracy has something to attack
    with pytest.raises(
        ValueError, match=rf"{op}: loss must give one number or one value per sample, \(12, .*60"
    ):
        TAKE_A_LOSS[op](model, x, y, 0.1, loss=lambda z, y: z.flatten())
    with pytest.raises(TypeError, match=f"{op}: loss must give a tensor, got float"):
        TAKE_A_LOSS[op](model, x, y, 0.1, loss=lambda z, y: F.cross_entropy(z, y).item())


# --------------------------------------------------------------------------------------------------
# bounds
def test_fgsm_step_takes_bounds_as_one_argument_or_as_two():
    x, g = torch.rand(3, 4), torch.randn(3, 4)
    low, high = torch.rand(3, 1) / 2, torch.rand(3, 1) / 2 + 0.5
    for bounds in ((0, 1), [0.2, 0.8], (low, high), (None, 0.9), (low, None), (None, None)):
        assert torch.equal(fr.fgsm_step(x, g, 0.1, bounds=bounds), fr.fgsm_step(x, g, 0.1, *bounds))
    assert torch.equal(fr.fgsm_step(x, g, 0.1, bounds=None), fr.fgsm_step(x, g, 0.1))
    for both in (dict(lower=0), dict(upper=1), dict(lower=0, upper=1)):
        with pytest.raises(ValueError, match="fgsm_step: give bounds or lower and upper, not both"):
            fr.fgsm_step(x, g, 0.1, **both, bounds=(0, 1))


@pytest.mark.parametrize("bounds", [1.0, (0.0,), (0, 0.5, 1), "01", torch.zeros(2)], ids=str)
def test_bounds_that_are_no_pair_are_refused_everywhere(bounds):
    model, (x, y) = net(), batch()
    for op, call in {
        "fgsm_step": lambda **options: fr.fgsm_step(x, x, 0.1, **options),
        "fgsm": lambda **options: fr.fgsm(model, x, y, 0.1, **options),
        "pgd": lambda **options: fr.pgd(model, x, y, 0.1, 0.1, 1, **options),
        "adversarial_loss": lambda **options: fr.adversarial_loss(model, x, y, 0.1, **options),
        "adversarial_backward": lambda **options: fr.adversarial_backward(model, x, y, 0.1, **options),
        "robust_accuracy": lambda **options: fr.robust_accuracy(model, (x, y), 0.1, **options),
        "FreeAdversarial": lambda **options: fr.FreeAdversarial(0.1, **options),
    }.items():
        with pytest.raises(ValueError, match=rf"{op}: bounds must be \(lower, upper\) or None, got"):
            call(bounds=bounds)


# --------------------------------------------------------------------------------------------------
# free
def test_free_is_the_papers_loop():
    """delta lives on over batches of several lengths; sign steps of eps, clamped to the ball; one optimiser
    step per pass.
    """
    model = net().double()
    twin = copy.deepcopy(model)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    eps = torch.tensor([0.05, 0.1, 0.2]).double()
    free, delta, radius = (
        fr.FreeAdversarial(eps, replays=3, bounds=(0.1, 0.9)),
        torch.zeros(9, 3, 6, 6).double(),
        eps.view(3, 1, 1),
    )
    for n in (6, 4, 9):
        x, y = batch(n)
        x = x.double().clamp(0.1, 0.9)
        count = 0
        for x_adv in free(x):
            ours.zero_grad()
            F.cross_entropy(model(x_adv), y).backward()
            ours.step()
            count += 1
        assert count == 3
        for _ in range(3):
            leaf = (x + delta[:n]).clamp(0.1, 0.9).requires_grad_()
            theirs.zero_grad()
            F.cross_entropy(twin(leaf), y).backward()
            theirs.step()
            delta[:n] = torch.minimum(torch.maximum(delta[:n] + radius * leaf.grad.sign(), -radius), radius)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert (delta.abs() == radius).any() and (delta == 0).any()


def test_free_begins_anew_with_other_inputs_and_says_what_is_missing():
    free = fr.FreeAdversarial(0.1, replays=2)
    for x in (torch.rand(4, 5), torch.rand(4, 5).double(), torch.rand(4, 6), torch.rand(0, 6)):
        first = next(iter(free(x)))
        assert torch.equal(first, x) and first.requires_grad and first.dtype == x.dtype
        for x_adv in free(x):
            x_adv.sum().backward()
    with pytest.raises(
        ValueError,
        match=r"FreeAdversarial: expected a gradient of the input, got none; call loss.backward\(\)",
    ):
        for _ in free(torch.rand(4, 5)):
            pass
    for wrong, message in (
        (dict(eps=-0.1), r"FreeAdversarial: eps must be in \[0, inf\], got -0.1"),
        (dict(eps=math.nan), "FreeAdversarial: eps"),
        (dict(eps=0.1, replays=0), "FreeAdversarial: replays must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            fr.FreeAdversarial(**wrong)
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        next(iter(free(torch.zeros(2, 2, dtype=torch.uint8))))
    with pytest.raises(ValueError, match="lower must not exceed upper"):
        next(iter(fr.FreeAdversarial(0.1, bounds=(1, 0))(torch.rand(2, 2))))


# --------------------------------------------------------------------------------------------------
# robust accuracy
class Margin(nn.Module):
    """Two classes, logits (0, w x + b): within eps the margin falls by eps |w| in the dual norm, so
    robustness is known.
    """

    def __init__(self, w, b):
        super().__init__()
        self.w, self.b = nn.Parameter(w), nn.Parameter(b)

    def forward(self, x):
        z = x.flatten(1) @ self.w + self.b
        return torch.stack([torch.zeros_like(z), z], 1)


@pytest.mark.parametrize("norm", ("linf", "l2"))
@pytest.mark.parametrize("channels", (False, True))
@pytest.mark.parametrize("loader", (False, True))
def test_robust_accuracy_of_a_linear_model_is_exact(norm, channels, loader):
    if norm == "l2" and channels:
        eps = torch.tensor([0.3])
    else:
        eps = torch.tensor([0.01, 0.02, 0.03]) if channels else {"linf": 0.02, "l2": 0.15}[norm]
    w, b = torch.randn(12).double(), torch.randn(()).double() * 0.1
    x, y = torch.randn(203, 3, 2, 2).double(), torch.randint(2, (203,))
    margin = (x.flatten(1) @ w + b) * (2 * y - 1)
    y = torch.where(margin < -1, 1 - y, y)  # most are right
    margin = (x.flatten(1) @ w + b) * (2 * y - 1)
    per_pixel = torch.as_tensor(eps).double().reshape(-1, 1, 1).expand(3, 2, 2).flatten()
    reach = (per_pixel * w.abs()).sum() if norm == "linf" else per_pixel[0] * w.norm()
    want = (margin > reach).double().mean().item()
    nearly = (
        (margin > 0.999 * reach).double().mean().item()
    )  # in l2 the attack comes close to the worst point, not onto it
    assert 0.2 < want <= nearly < (margin > 0).double().mean().item() < 1
    model = Margin(w, b)
    data = (
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=50) if loader else (x, y)
    )
    # 203 samples: the last batch has 3, as many as x has channels.
    got = fr.robust_accuracy(model, data, eps, norm=norm, alpha=eps / 2, bounds=None, batch_size=100)
    assert want <= got <= nearly and isinstance(got, float)
    clean = fr.robust_accuracy(model, data, eps, norm=norm, bounds=None, restarts=0)
    assert clean == pytest.approx((margin > 0).double().mean().item(), abs=1e-12)


def test_normalised_inputs_with_bounds_and_eps_per_channel_are_attacked_as_the_pixels_are():
    mean, std = torch.tensor([0.4, 0.5, 0.6]).double(), torch.tensor([0.2, 0.3, 0.4]).double()
    on_normalised, (x, y) = net().double(), batch(40)

    def normalise(x):
        return (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)

    def on_pixels(x):
        return on_normalised(normalise(x))

    x, eps, bounds = x.double(), 0.1 / std, ((0 - mean) / std, (1 - mean) / std)
    y = on_pixels(x).argmax(1)

    def seeded():
        return torch.Generator().manual_seed(1)

    for want, got in (
        (fr.fgsm(on_pixels, x, y, 0.1), fr.fgsm(on_normalised, normalise(x), y, eps, bounds=bounds)),
        (
            fr.fgsm(on_pixels, x, y, 0.1, random_start=True, generator=seeded()),
            fr.fgsm(
                on_normalised, normalise(x), y, eps, bounds=bounds, random_start=True, generator=seeded()
            ),
        ),
        (
            fr.pgd(on_pixels, x, y, 0.1, 0.02, 4, restarts=2, generator=seeded()),
            fr.pgd(
                on_normalised,
                normalise(x),
                y,
                eps,
                0.02 / std,
                4,
                restarts=2,
                bounds=bounds,
                generator=seeded(),
            ),
        ),
    ):
        torch.testing.assert_close(normalise(want), got, rtol=1e-9, atol=1e-9)
    want = fr.robust_accuracy(on_pixels, (x, y), 0.02, steps=5, generator=seeded())
    got = fr.robust_accuracy(
        on_normalised, (normalise(x), y), 0.02 / std, steps=5, bounds=bounds, generator=seeded()
    )
    assert 0 < got == want < 1


def test_robust_accuracy_falls_with_restarts_and_leaves_the_model_alone():
    model, (x, y) = net(norm=True), batch(60)
    model[1].eval()
    y = model(x).argmax(1)
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    seen = []
    handle = model.register_forward_pre_hook(lambda m, _: seen.append(m.training or m[0].training))
    values = [
        fr.robust_accuracy(
            model, (x, y), 0.1, alpha=0.005, steps=1, restarts=n, generator=torch.Generator().manual_seed(1)
        )
        for n in (0, 1, 2, 8)
    ]
    handle.remove()
    assert values == sorted(values, reverse=True) and values[0] > values[1] > values[3]
    assert not any(seen) and [m.training for m in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError):  # also after an error
        fr.robust_accuracy(model, (x[:, :2], y), 0.1)
    assert [m.training for m in model.modules()] == modes
    function = lambda x: model(x)  # noqa: E731  no Module: called in the mode it is in
    assert 0 <= fr.robust_accuracy(function, (x, y), 0.1, steps=1) <= 1


def test_robust_accuracy_refuses():
    model, (x, y) = net(), batch()
    for data, options, error, message in (
        ((x, y[:3]), {}, ValueError, "x and y must have the same length, got 7 and 3"),
        ((x[:0], y[:0]), {}, ValueError, "expected examples, got none"),
        ([], {}, ValueError, "expected examples, got none"),
        ((x, y), dict(steps=0), ValueError, "robust_accuracy: steps must be at least 1"),
        ((x, y), dict(restarts=-1), ValueError, "robust_accuracy: restarts must be at least 1"),
        ((x, y), dict(norm="l1"), ValueError, "norm must be one of"),
        ((x, y), dict(batch_size=0), ValueError, "batch_size must be at least 1"),
        ((x.byte(), y), {}, TypeError, "x must be a floating-point tensor"),
    ):
        with pytest.raises(error, match=message):
            fr.robust_accuracy(model, data, 0.1, **options)
    with pytest.raises(ValueError, match=r"eps must be finite and at least 0, got -0\.1"):
        fr.robust_accuracy(model, (x, y), -0.1)
    for weight in (0, 1):
        with pytest.raises(ValueError, match=r"weight must be between 0 and 1, got .*; use adversarial_loss"):
            fr.adversarial_backward(model, x, y, 0.1, weight=weight)
    with pytest.raises(ValueError, match="adversarial_backward: the loss does not depend on x"):
        fr.adversarial_backward(model, x, y, 0.1, loss=lambda z, y: model[0].weight.sum())
    assert model[4].weight.grad is None


# --------------------------------------------------------------------------------------------------
# the digits
def trained(digits, epochs, backward, replay=lambda x: [x]):
    x, y = digits
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = fr.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for batch in (b for _ in range(epochs) for b in torch.randperm(2000).split(100)):
        for inputs in replay(x[batch]):
            optimizer.zero_grad()
            backward(model, inputs, y[batch])
            optimizer.step()
    return model


def test_each_training_makes_the_network_harder_to_fool(digits):
    x, y = digits
    plain = lambda model, x, y: fr.cross_entropy(model(x), y).backward()  # noqa: E731
    fast = dict(weight=1, random_start=True)
    methods = {
        "plain": (8, plain),
        "both": (8, lambda *args: fr.adversarial_backward(*args, 0.1)),
        "fast": (8, lambda *args: fr.adversarial_loss(*args, 0.1, **fast).backward()),
        "free": (2, plain, fr.FreeAdversarial(0.1, replays=4)),
    }
    test, robust = (x[4000:4300], y[4000:4300]), {}
    for name, arguments in methods.items():
        model = trained(digits, *arguments)
        robust[name] = fr.robust_accuracy(model, test, 0.1, steps=20, restarts=2)
        assert fr.robust_accuracy(model, test, 0.1, restarts=0) > 0.85
        assert fr.robust_accuracy(model, test, 0.1, steps=1) >= robust[name]
    assert (
        robust["plain"] < 0.45
        and min(robust[name] for name in ("both", "fast", "free")) > robust["plain"] + 0.15
    )


def test_a_collapse_of_robust_accuracy_stops_training_and_is_undone(digits):
    """Fast training whose attack goes blind after three epochs, as in catastrophic overfitting: eps falls to
    0 unnoticed.
    """
    x, y = digits
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = fr.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    stopper, scores = fr.EarlyStopping(model, mode="max", patience=50, collapse=0.1), []
    for epoch in range(30):
        for batch in torch.randperm(2000).split(50):
            optimizer.zero_grad()
            fr.adversarial_loss(
                model, x[batch], y[batch], 0.1 * (epoch < 5), weight=1, random_start=True
            ).backward()
            optimizer.step()
        scores.append(
            fr.robust_accuracy(
                model, (x[:200], y[:200]), 0.1, steps=10, generator=torch.Generator().manual_seed(0)
            )
        )
        if stopper.step(scores[-1]):
            break
    assert 5 <= epoch < 29 and scores[-1] < stopper.best - 0.1 and "by over 0.1" in stopper.reason
    stopper.restore()
    again = fr.robust_accuracy(
        model, (x[:200], y[:200]), 0.1, steps=10, generator=torch.Generator().manual_seed(0)
    )
    assert again == stopper.best == max(scores)
