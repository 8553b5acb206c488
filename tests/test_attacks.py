"""fr.fgsm and fr.pgd: the attacks by hand, what they leave behind, float16, wrong arguments."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from attack_cases import INF, NAN, assert_step, batch, reference_step
from torch import nn

import fastreg as fr


def net(norm=False, seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8 * 36, 5),
    )


def input_gradient(model, x, y, loss=None):
    leaf = x.detach().clone().requires_grad_()
    value = F.cross_entropy(model(leaf), y, reduction="sum") if loss is None else loss(model(leaf), y).sum()
    return torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("targeted", (False, True))
@pytest.mark.parametrize(
    "bounds", ((0.0, 1.0), None, (None, 0.8), (torch.tensor([0.1, 0.2, 0.3]), 1.0)), ids=str
)
def test_fgsm_is_one_step_along_the_sign(targeted, bounds):
    model, (x, y) = net(), batch()
    x = 0.3 + 0.5 * x
    lower, upper = (None, None) if bounds is None else bounds
    broad = lower.view(3, 1, 1) if isinstance(lower, torch.Tensor) else lower
    want = reference_step(x, input_gradient(model, x, y), -0.1 if targeted else 0.1, broad, upper)
    got = fr.fgsm(model, x, y, 0.1, bounds=bounds, targeted=targeted)
    assert_step(got, want, torch.float32)
    assert not got.requires_grad and got is not x


def test_eps_per_channel_and_per_sample():
    model, (x, y) = net(), batch()
    grad = input_gradient(model, x, y)
    for eps, broad in ((torch.tensor([0.0, 0.1, 0.2]), (3, 1, 1)), (torch.arange(6) * 0.05, (6, 1, 1, 1))):
        assert_step(fr.fgsm(model, x, y, eps), reference_step(x, grad, eps.view(broad), 0, 1), torch.float32)


def test_a_loss_of_ones_own():
    model, (x, y) = net(), batch()
    margin = lambda logits, y: F.multi_margin_loss(logits, y, reduction="none")  # noqa: E731
    want = reference_step(x, input_gradient(model, x, y, margin), 0.1, 0, 1)
    assert_step(fr.fgsm(model, x, y, 0.1, loss=margin), want, torch.float32)
    assert_step(fr.fgsm(model, x, y, 0.1, loss=lambda a, b: margin(a, b).mean()), want, torch.float32)
    soft = torch.rand(6, 5).softmax(1)
    want = reference_step(x, input_gradient(model, x, soft), 0.1, 0, 1)
    assert_step(fr.fgsm(model, x, soft, 0.1), want, torch.float32)


def linear(scale):
    """A model whose input gradient is known: the loss is scale * <w, x> per sample."""
    w = torch.randn(3, 4)
    return w, lambda x: (x * w.to(x.dtype) * scale).flatten(1).sum(1), lambda value, y: value


@pytest.mark.parametrize("scale", (1e-37, 1e-30, 1.0, 1e30, 1e37), ids=str)
def test_l2_step_has_exactly_the_length(scale):
    w, model, loss = linear(scale)
    x = torch.rand(5, 3, 4)
    got = fr.fgsm(model, x, None, 0.5, loss=loss, bounds=None, norm="l2")
    delta = (got - x).double().flatten(1)
    torch.testing.assert_close(
        delta.norm(dim=1), torch.full((5,), 0.5, dtype=torch.float64), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        delta, (w / w.norm() * 0.5).double().flatten().expand(5, 12), rtol=0, atol=2e-7
    )
    per_sample = fr.fgsm(
        model, x, None, torch.arange(5) * 0.1, loss=loss, bounds=None, norm="l2", targeted=True
    )
    delta = (per_sample - x).double().flatten(1).norm(dim=1)
    torch.testing.assert_close(delta, torch.arange(5).double() * 0.1, rtol=1e-6, atol=1e-7)


def test_l2_without_a_gradient_stays():
    x = torch.rand(4, 3)
    loss = lambda value, y: (value * torch.tensor([1.0, 0.0, 1.0, 0.0])).sum()  # noqa: E731
    got = fr.fgsm(lambda x: x.sum(1), x, None, 0.3, loss=loss, bounds=None, norm="l2")
    assert torch.equal(got[[1, 3]], x[[1, 3]]) and ((got - x)[[0, 2]].norm(dim=1) - 0.3).abs().max() < 1e-6


@pytest.mark.parametrize("bad", (NAN, INF, -INF), ids=str)
def test_l2_with_a_broken_gradient_stays_in_the_ball(bad):
    x = torch.rand(2, 3)
    w = torch.tensor([[bad, 100.0, -100.0], [1.0, 2.0, 2.0]])
    got = fr.fgsm(lambda x: x * w, x, None, 0.3, loss=lambda value, y: value, bounds=None, norm="l2")
    assert ((got - x).norm(dim=1) <= 0.3 + 1e-6).all() and got.isfinite().all()
    torch.testing.assert_close((got - x)[1], torch.tensor([0.1, 0.2, 0.2]))


@pytest.mark.parametrize("norm", ("linf", "l2"))
@pytest.mark.parametrize("random_start", (False, True))
def test_pgd_stays_in_ball_and_box(norm, random_start, dtype):
    model, (x, y) = net(), batch()
    model, x = model.to(dtype), x.to(dtype)
    out = fr.pgd(model, x, y, 0.2, 0.15, 4, norm=norm, random_start=random_start)
    assert out.dtype == dtype and out.min() >= 0 and out.max() <= 1 and not out.requires_grad
    delta = (out.double() - x.double()).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    slack = {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert (size <= 0.2 + slack).all() and (size >= 0.1).all()


def test_pgd_is_repeated_projected_steps():
    model, (x, y) = net(), batch()
    want = x
    for _ in range(3):
        want = reference_step(want, input_gradient(model, want, y), 0.07, 0, 1, x, 0.1).float()
    torch.testing.assert_close(fr.pgd(model, x, y, 0.1, 0.07, 3, random_start=False), want, rtol=0, atol=1e-6)
    want = fr.fgsm(model, x, y, 0.1, targeted=True)
    assert torch.equal(fr.pgd(model, x, y, 0.1, 0.1, 1, random_start=False, targeted=True), want)
    for eps in (torch.tensor([0.0, 0.1, 0.2]), torch.linspace(0, 0.2, 6)):
        out = fr.pgd(model, x, y, eps, eps / 2, 3)
        broad = eps.view(3, 1, 1) if len(eps) == 3 else eps.view(6, 1, 1, 1)
        assert ((out - x).abs() <= broad + 1e-6).all()


def test_pgd_l2_by_hand():
    model, (x, y) = net(), batch()
    want = x.double()
    for _ in range(3):
        grad = input_gradient(model, want.float(), y).double()
        moved = want + 0.3 * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1) - x
        size = moved.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        want = (x + moved * (0.5 / size).clamp(max=1)).clamp(0, 1)
    got = fr.pgd(model, x, y, 0.5, 0.3, 3, norm="l2", random_start=False)
    torch.testing.assert_close(got, want.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ("linf", "l2"))
def test_random_start(norm):
    model, (x, y) = net(), batch()

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return fr.pgd(model, x, y, 0.2, 1e-9, 1, norm=norm, generator=generator)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    state = torch.get_rng_state()
    draw(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    one = fr.pgd(model, x, y, 0.2, 1e-9, 1, norm=norm)
    torch.manual_seed(5)
    assert torch.equal(one, fr.pgd(model, x, y, 0.2, 1e-9, 1, norm=norm))
    # Uniform in the ball: |delta| / eps is uniform for linf, its d-th power for l2.
    flat, zero = torch.full((4000, 3), 0.5), torch.zeros(4000).long()
    start = fr.pgd(
        lambda x: x, flat, zero, 0.2, 0.0, 1, norm=norm, generator=torch.Generator().manual_seed(3)
    )
    delta = (start - flat) / 0.2
    share = delta.abs().flatten() if norm == "linf" else delta.norm(dim=1) ** 3
    assert (
        share.max() <= 1.00001
        and abs(share.mean() - 0.5) < 0.02
        and abs((share < 0.25).float().mean() - 0.25) < 0.03
    )
    assert delta.mean(0).abs().max() < 0.05


def trained():
    torch.manual_seed(3)
    centres = torch.rand(5, 3, 6, 6)
    y = torch.randint(5, (200,))
    x = (centres[y] + torch.randn(200, 3, 6, 6) * 0.15).clamp(0, 1)
    model = net(norm=True)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    return model.eval(), x, y


def test_attacks_work_and_more_steps_work_better():
    model, x, y = trained()
    error = lambda x: F.cross_entropy(model(x), y).item()  # noqa: E731
    clean = error(x)
    one = error(fr.fgsm(model, x, y, 0.1))
    many = error(fr.pgd(model, x, y, 0.1, 0.025, 10, random_start=False))
    noise = error((x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1))
    assert clean < 0.1 and noise < one / 2 and one > 5 * clean and many > one * 1.01
    wished = (y + 1) % 5
    assert F.cross_entropy(model(fr.fgsm(model, x, wished, 0.1, targeted=True)), wished) < F.cross_entropy(
        model(x), wished
    )
    assert error(fr.fgsm(model, x, y, 1.0, norm="l2")) > 2 * clean


def snapshot(model, x):
    return dict(
        modes=[m.training for m in model.modules()],
        flags=[p.requires_grad for p in model.parameters()],
        grads=[None if p.grad is None else p.grad.clone() for p in model.parameters()],
        state={k: v.clone() for k, v in model.state_dict().items()},
        identity=[id(t) for t in itertools.chain(model.parameters(), model.buffers())],
        versions=[t._version for t in itertools.chain(model.parameters(), model.buffers())],
        x=x.detach().clone(),
        x_grad=None if x.grad is None else x.grad.clone(),
        x_flags=(x.requires_grad, x._version),
        rng=torch.get_rng_state(),
        modes_global=(torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


ATTACKS = {
    "fgsm": lambda model, x, y: fr.fgsm(model, x, y, 0.1),
    "fgsm l2": lambda model, x, y: fr.fgsm(model, x, y, 0.1, norm="l2"),
    "pgd": lambda model, x, y: fr.pgd(model, x, y, 0.1, 0.05, 3, random_start=False),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("leaf", (False, True), ids=("", "x requires grad"))
@pytest.mark.parametrize("mode", ("train", "eval", "mixed"))
def test_no_trace_is_left(attack, leaf, mode):
    model, (x, y) = net(norm=True), batch()
    model.train(mode != "eval")
    if mode == "mixed":
        model[1].eval()
        model[0].weight.requires_grad_(False)
    F.cross_entropy(model(x), y).backward()  # so that there are gradients to spoil
    if leaf:
        x.requires_grad_()
        x.grad = torch.ones_like(x)
    before = snapshot(model, x)
    out = attack(model, x, y)
    after = snapshot(model, x)
    for key in before:
        assert same(before[key], after[key]), key
    assert not out.requires_grad and not torch.equal(out, x.detach())


def test_train_mode_uses_the_statistics_of_the_batch():
    model, (x, y) = net(norm=True).train(), batch()
    twin = copy.deepcopy(model)
    assert_step(
        fr.fgsm(model, x, y, 0.1), reference_step(x, input_gradient(twin, x, y), 0.1, 0, 1), torch.float32
    )
    assert twin[1].num_batches_tracked == 1 and model[1].num_batches_tracked == 0


def test_a_pending_backward_pass_survives_an_attack():
    model, (x, y) = net(norm=True).train(), batch()
    twin = copy.deepcopy(model)
    loss = F.cross_entropy(model(x), y)
    fr.fgsm(model, x, y, 0.1)
    fr.pgd(model, x, y, 0.1, 0.1, 2)
    loss.backward()
    F.cross_entropy(twin(x), y).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_under_no_grad_and_inference_mode(attack):
    model, (x, y) = net(norm=True), batch()
    want = attack(model, x, y)
    with torch.no_grad():
        assert torch.equal(attack(model, x, y), want) and not torch.is_grad_enabled()
    with torch.inference_mode():
        assert torch.equal(attack(model, x, y), want)
        assert torch.equal(attack(model, x.clone(), y.clone()), want)
        assert torch.is_inference_mode_enabled()


def test_under_autocast():
    model, (x, y) = net(norm=True), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fr.fgsm(model, x, y, 0.1)
        want = reference_step(x, input_gradient(copy.deepcopy(model), x, y), 0.1, 0, 1)
        loss = F.cross_entropy(model(x), y)
    assert out.dtype == torch.float32 and (out - want).abs().lt(1e-6).float().mean() > 0.99
    loss.backward()  # weights cast to bfloat16 during the attack must not have lost their graph
    assert all(p.grad is not None for p in model.parameters())


def test_frozen_parameters_and_plain_functions():
    model, (x, y) = net(), batch()
    want = fr.fgsm(model, x, y, 0.1)
    assert torch.equal(fr.fgsm(lambda x: model(x), x, y, 0.1), want)
    model.requires_grad_(False)
    assert torch.equal(fr.fgsm(model, x, y, 0.1), want)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ("shared module", "shared buffer", "script", "bound method"))
def test_shared_modules_scripts_and_methods(kind):
    # torch.func.functional_call would leave its copies of the statistics in a module that is used twice.
    norm, other = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    if kind == "shared buffer":
        other.running_mean = norm.running_mean
    model = nn.Sequential(
        nn.Linear(4, 4), norm, nn.Linear(4, 4), norm if kind == "shared module" else other
    ).train()
    if kind == "script":
        model = torch.jit.script(model)
    x, y = torch.rand(6, 4), torch.randint(4, (6,))
    before = snapshot(model, x)
    fr.fgsm(model.forward if kind == "bound method" else model, x, y, 0.1)
    after = snapshot(model, x)
    for key in before:
        if kind != "script" or key not in (
            "identity",
            "versions",
        ):  # a script hands out a new tensor object each time
            assert same(before[key], after[key]), key


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_an_exception_in_the_model_leaves_everything_restored(attack):
    class Broken(nn.Module):
        def forward(self, x):
            raise KeyError("in the model")

    model, (x, y) = nn.Sequential(net(norm=True), Broken()).train(), batch()
    before = snapshot(model, x)
    with torch.no_grad(), pytest.raises(KeyError, match="in the model"):
        attack(model, x, y)
    after = snapshot(model, x)
    assert all(same(before[key], after[key]) for key in before)


@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_compiled_models(backend):
    torch._dynamo.reset()
    model, (x, y) = net(norm=True), batch()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    before = snapshot(model, x)
    assert (fr.fgsm(compiled, x, y, 0.1) - fr.fgsm(model, x, y, 0.1)).abs().lt(1e-6).float().mean() > 0.99
    assert fr.pgd(compiled, x, y, 0.1, 0.05, 2).shape == x.shape
    before.pop("rng")
    after = snapshot(model, x)
    assert all(same(before[key], after[key]) for key in before)
    loss = fr.adversarial_loss(compiled, x, y, 0.1)
    want = fr.adversarial_loss(twin, x, y, 0.1)
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
    loss.backward()
    want.backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


class Tiny(nn.Module):
    """Two gates per element over six decades; with a loss times 1e-4, nearly half of the gradients are below
    float16's least.
    """

    def __init__(self, n):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        root = 10 ** (torch.linspace(-6.5, 0, n)[torch.randperm(n, generator=g)] / 2)
        sign = torch.randint(2, (n,), generator=g) * 2 - 1
        self.gate = nn.Parameter(root.half())
        self.other = nn.Parameter((sign * root).half())

    def forward(self, x):
        return (x * self.gate) * self.other


def test_signs_survive_float16():
    model = Tiny(2000)
    x = torch.rand(4, 2000).half()
    total = lambda value, y: value.float().sum(1) * 1e-4  # noqa: E731
    exact = input_gradient(copy.deepcopy(model).double(), x.double(), None, lambda v, y: v.sum(1) * 1e-4)
    assert (exact != 0).all()
    naive = input_gradient(model, x, None, total)
    lost = (naive == 0).float().mean()
    assert 0.3 < lost < 0.6  # what a plain float16 backward pass would leave unchanged
    got = fr.fgsm(model, x, None, 0.25, loss=total, bounds=None)
    wrong = ((got.double() - x.double()).sign() != exact.sign()).float().mean()
    assert wrong < 0.02, wrong
    got = fr.pgd(model, x, None, 0.25, 0.25, 1, loss=total, bounds=None, random_start=False)
    assert ((got.double() - x.double()).sign() != exact.sign()).float().mean() < 0.02


def test_float16_overflow_is_taken_from_a_smaller_scale():
    """Sample 0 has gradients near 10^3, which overflow when scaled; sample 1 has gradients that need the
    scale.
    """
    w = torch.ones(2, 64)
    w[:, ::2] = -1
    size = torch.tensor([[1000.0], [1e-8]])
    x = torch.rand(2, 64).half()

    def model(x):
        return (
            x * w.half() * 2 - x * w.half()
        ).float() * size  # both terms infinite: their difference has no sign

    total = lambda value, y: value.sum(1)  # noqa: E731
    got = fr.fgsm(model, x, None, 0.25, loss=total, bounds=None)
    assert torch.equal((got - x).sign(), w.half())


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "empty", "vector"))
def test_float16_layouts(layout):
    x = torch.rand(3, 4, 5, 5).half()
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "empty":
        x = x[:0]
    elif layout == "vector":
        x = x[:, 0, 0, 0]
    got = fr.fgsm(lambda x: x * 2, x, None, 0.25, loss=lambda v, y: v.sum(), bounds=None)
    assert torch.equal(got, x + 0.25) and got.stride() == torch.empty_like(x).stride()


def test_float16_cross_entropy_of_a_small_network():
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 4)).double()
    with torch.no_grad():
        wide[0].weight.mul_(0.02)
        wide[2].weight.mul_(0.02)
    model = copy.deepcopy(wide).half()
    x, y = torch.rand(64, 50), torch.randint(4, (64,))
    exact = input_gradient(copy.deepcopy(model).double(), x.half().double(), y)
    got = fr.fgsm(model, x.half(), y, 0.25, bounds=None)
    agree = ((got.double() - x.half().double()).sign() == exact.sign()).float().mean()
    mean = lambda z, y: F.cross_entropy(z.float(), y)  # noqa: E731
    naive = input_gradient(model, x.half(), y, mean).sign().double()
    assert agree > 0.99 and agree > (naive == exact.sign()).float().mean()
