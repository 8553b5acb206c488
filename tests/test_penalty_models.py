"""Penalties on the models and optimisers that people have: wrapped, parametrised and lazy models, optimisers
that know no l1, keys that nothing reads, and a proximal l1 that means what it says under momentum.
"""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize

import fastreg as fr
from fastreg.optim import SGD, penalty, penalty_groups, prior_scale, sparsity


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm((2, 4)), nn.Linear(4, 2))


def factors(model, groups):
    """{name: l1} of the groups' parameters, by the model's own names."""
    found = {id(p): group["l1"] for group in groups for p in group["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters()}


WRAPPED = {
    "compiled": lambda m: torch.compile(m),
    "compiled twice": lambda m: torch.compile(nn.Sequential(torch.compile(m)))._orig_mod[0],
    "averaged": torch.optim.swa_utils.AveragedModel,
    "averaged and compiled": lambda m: torch.optim.swa_utils.AveragedModel(torch.compile(m)),
    "data parallel": nn.DataParallel,
    "checkpoint wrapper": checkpoint_wrapper,
    "compiled in place": lambda m: m.compile() or m,
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_patterns_find_the_parameters_of_wrapped_models(kind):
    overrides = {"0.*": dict(l1=0.5), "2.bias": dict(l1=0.25)}
    plain = net()
    want = list(factors(plain, penalty_groups(plain, l1=0.1, overrides=overrides)).values())
    assert want == [0.5, 0.5, 0.0, 0.0, 0.1, 0.25]
    model = WRAPPED[kind](net())
    assert list(factors(model, penalty_groups(model, l1=0.1, overrides=overrides)).values()) == want
    raw = {name: dict(l1=0.7) for name, _ in model.named_parameters() if name.endswith("2.weight")}
    assert list(factors(model, penalty_groups(model, l1=0.1, overrides=raw)).values())[4] == 0.7
    with pytest.raises(ValueError, match=r"overrides pattern '3\.\*' matches no parameter"):
        penalty_groups(model, overrides={"3.*": dict(l1=0.5)})


def test_a_compiled_part_and_a_module_that_is_called_module():
    inner = nn.ModuleDict({"module": net(), "part": torch.compile(net())})
    found = factors(
        inner, penalty_groups(inner, overrides={"module.0.*": dict(l1=1), "part.0.*": dict(l1=2)})
    )
    assert found["module.0.weight"] == 1 and found["part._orig_mod.0.weight"] == 2
    assert found["module.2.weight"] == found["part._orig_mod.2.weight"] == 0
    with pytest.raises(ValueError, match="matches no parameter"):
        penalty_groups(inner, overrides={"0.*": dict(l1=1)})


class Own(nn.Module):
    """A parametrisation with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, 2))

    def forward(self, w):
        return w * self.scale.mean()


def test_parametrised_weights_keep_name_and_rule():
    model = net()
    parametrizations.weight_norm(model[0])
    parametrizations.orthogonal(model[2])
    parametrize.register_parametrization(model[2], "bias", Own())
    parametrize.register_parametrization(model[1], "weight", nn.Identity())
    groups = penalty_groups(model, l1=0.1, overrides={"0.weight": dict(l1=0.5)})
    assert factors(model, groups) == {
        "0.bias": 0.0,
        "0.parametrizations.weight.original0": 0.5,
        "0.parametrizations.weight.original1": 0.5,
        "1.bias": 0.0,
        "1.parametrizations.weight.original": 0.0,  # a norm's, though it has two dimensions
        "2.parametrizations.weight.original": 0.1,
        "2.parametrizations.bias.original": 0.0,
        "2.parametrizations.bias.0.scale": 0.1,
    }
    for pattern in ("2.parametrizations.weight.original", "2.weight", "2.w*"):
        found = factors(model, penalty_groups(model, overrides={pattern: dict(l1=3)}))
        assert found["2.parametrizations.weight.original"] == 3 and sum(found.values()) == 3
    assert torch.optim.swa_utils.AveragedModel(model) and penalty_groups(copy.deepcopy(model), l1=0.1)


def test_lazy_models_and_what_is_no_model_are_refused_by_name():
    for lazy in (nn.Sequential(nn.LazyLinear(3)), nn.LazyBatchNorm1d()):
        for op, function in (
            ("penalty_groups", penalty_groups),
            ("penalty_groups", penalty),
            ("sparsity", sparsity),
        ):
            with pytest.raises(
                ValueError, match=f"^{op}: .*of a lazy layer has no shape yet; run the model once"
            ):
                function(lazy)
        lazy(torch.ones(2, 4))
        penalty_groups(lazy)
    for wrong in (net().parameters(), list(net().parameters()), None):
        with pytest.raises(
            TypeError, match=r"^penalty_groups: model must be a torch.nn.Module, .*give the model"
        ):
            penalty_groups(wrong)
    with pytest.raises(TypeError, match=r"^sparsity: each parameter must be a torch.Tensor, got dict"):
        sparsity(penalty_groups(net()))


# --------------------------------------------------------------------------------------------------
# what is counted


def test_the_penalty_of_a_model_is_that_of_its_groups():
    model = net()
    model[2].weight.requires_grad_(False)
    want = 0.1 * model[0].weight.abs().sum() + 0.1 * model[0].weight.square().sum()
    for source in (model, penalty_groups(model, l1=0.1, l2=0.2), SGD(penalty_groups(model, l1=0.1, l2=0.2))):
        torch.testing.assert_close(penalty(source, l1=0.1, l2=0.2), want)
    everything = sum(0.1 * p.abs().sum() + 0.1 * p.square().sum() for p in model.parameters())
    torch.testing.assert_close(penalty(model.parameters(), l1=0.1, l2=0.2), everything)
    assert penalty(model).item() == 0 and penalty(nn.ReLU(), l1=1.0).item() == 0


def test_an_optimiser_counts_what_it_penalises():
    model = net()
    groups = penalty_groups(model, l1=100.0, l2=0.2)
    l2 = penalty(penalty_groups(model, l2=0.2))
    both = penalty(penalty_groups(model, l1=100.0, l2=0.2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(penalty(SGD(groups)), both)
        torch.testing.assert_close(
            penalty(torch.optim.SGD(penalty_groups(model, l2=0.2), weight_decay=9.0)), l2
        )
    for make in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad):
        with pytest.warns(UserWarning, match=f"penalty: {make.__name__} does not apply the l1 of its groups"):
            torch.testing.assert_close(penalty(make(groups)), l2)
    with pytest.warns(UserWarning, match="does not apply the weight_decay"):
        assert penalty(torch.optim.Rprop(penalty_groups(model, l2=0.2))).item() == 0

    class Mine(SGD):
        pass

    optimizer = Mine(groups)
    torch.testing.assert_close(penalty(optimizer), both)
    model[0].weight.requires_grad_(False)
    torch.testing.assert_close(penalty(optimizer), penalty(model[2].weight, l1=100.0, l2=0.2))
    assert penalty(optimizer).item() < both.item()


@pytest.mark.parametrize("kind", ("SGD", "AdamW"))
def test_a_key_of_an_optimiser_that_wraps_ours_is_its_own(kind):
    """As SAM's, which hands its own groups on and steps from the ascended weights."""

    class Sharpness(torch.optim.Optimizer):
        def __init__(self, params, base, rho, **options):
            super().__init__(params, dict(rho=rho, adaptive=False, **options))
            self.base = base(self.param_groups, **options)
            self.param_groups = self.base.param_groups

        def step(self, closure):
            with torch.enable_grad():
                closure()
            moves = [(p, self.param_groups[0]["rho"] * p.grad) for p in self.param_groups[0]["params"]]
            with torch.no_grad():
                for p, move in moves:
                    p.add_(move)
                with torch.enable_grad():
                    closure()
                for p, move in moves:
                    p.sub_(move)
            self.base.step()

    results = []
    for module in (torch.optim, fr.optim):
        p = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        optimizer = Sharpness([p], getattr(module, kind), rho=0.1, lr=0.1)

        def closure(p=p, optimizer=optimizer):
            optimizer.base.zero_grad()
            p.pow(4).sum().backward()

        for _ in range(3):
            optimizer.step(closure)
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("key", ("L1", "lambda_", "l2", "weight_deacy", "banana"))
def test_a_key_that_nothing_reads_is_refused(key):
    model = net()
    with pytest.raises(
        ValueError, match=rf"SGD: a parameter group has '{key}', which nothing reads; expected lr, .*l1,"
    ):
        SGD([dict(params=model.parameters(), **{key: 0})])
    if key != "l2":  # which penalty_groups translates
        groups = penalty_groups(model, l1=0.1, overrides={"2.*": {key: 0}})
        with pytest.raises(ValueError, match=f"'{key}', which nothing reads"):
            SGD(groups)
    optimizer = SGD(model[:2].parameters())
    with pytest.raises(ValueError, match=f"'{key}'"):
        optimizer.add_param_group(dict(params=model[2].parameters(), **{key: 0}))
    # Afterwards they are the program's own, and survive a checkpoint.
    optimizer.param_groups[0][key] = 3
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0][key] == 3
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()


def test_keys_that_others_read_are_taken():
    model = net()
    given = dict(
        initial_lr=0.1, max_lr=1.0, swa_lr=0.1, name="body", lr_scale=0.5, params=list(model.parameters())
    )
    optimizer = SGD([given], lr=0.1)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9, last_epoch=1)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
    SGD(optimizer.param_groups)
    SGD(torch.optim.SGD(model.parameters(), lr=0.1).param_groups)
    SGD(model.named_parameters())
    SGD([dict(params=list(model.named_parameters()), lr=0.1)])


# --------------------------------------------------------------------------------------------------
# the same lambda whatever the momentum


def lasso():
    """min over w of |Xw - y|^2 / (2 N) + l1 |w|_1, in float64."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=g, dtype=torch.float64)
    true = torch.tensor([2.0, -1.0, 0.5, 0.0, 0.0, 0.0, 0.1, 0.0], dtype=torch.float64)
    return x, x @ true + 0.1 * torch.randn(200, generator=g, dtype=torch.float64)


def solved(steps=3000, lr=0.02, **options):
    x, y = lasso()
    w = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    optimizer = SGD([w], lr=lr, **options)
    for _ in range(steps):
        w.grad = x.t() @ (x @ w.detach() - y) / len(y)
        optimizer.step()
    return w.detach(), optimizer


def gradient_of_the_error(w):
    x, y = lasso()
    return x.t() @ (x @ w - y) / len(y)


@pytest.mark.parametrize(
    "options",
    (
        dict(),
        dict(momentum=0.9),
        dict(momentum=0.9, nesterov=True),
        dict(momentum=0.9, dampening=0.5),
        dict(momentum=0.5, decoupled=True),
        dict(momentum=0.9, decoupled=True, weight_decay=0.3),
        dict(momentum=0.9, weight_decay=0.3),
    ),
    ids=str,
)
def test_proximal_l1_means_lambda_under_momentum(options):
    """At the minimum of E + l1 |w|_1 + l2 / 2 |w|_2^2, dE/dw + l2 w = -l1 sign(w), or lies within l1 at 0."""
    l1, l2 = 0.2, options.get("weight_decay", 0.0)
    w, _ = solved(l1=l1, l1_mode="proximal", scale_penalty=True, **options)
    pull = gradient_of_the_error(w) + l2 * w
    torch.testing.assert_close(pull[w != 0], -l1 * w[w != 0].sign(), rtol=0, atol=1e-9)
    assert (pull[w == 0].abs() <= l1).all() and 0 < (w == 0).sum() < 8
    without, _ = solved(l1=l1, l1_mode="proximal", **options)
    assert torch.equal(w, without) == ("momentum" not in options)


def test_the_switch_follows_the_momentum_and_survives_a_checkpoint():
    w, optimizer = solved(l1=0.2, l1_mode="proximal", momentum=0.9, scale_penalty=True)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = SGD([nn.Parameter(w.clone())], lr=1.0)
    again.load_state_dict(torch.load(file))
    assert again.param_groups[0]["scale_penalty"] is True and again.param_groups[0]["l1"] == 0.2
    for momentum in (0.0, 0.5):  # as a schedule does it
        p = nn.Parameter(torch.ones(3))
        optimizer = SGD([p], lr=0.1, momentum=0.9, l1=0.2, l1_mode="proximal", scale_penalty=True)
        optimizer.param_groups[0]["momentum"] = momentum
        p.grad = torch.zeros(3)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.1 * 0.2 / (1 - momentum)))
    torch.testing.assert_close(penalty(optimizer), 0.2 * p.detach().abs().sum())
    for wrong in (dict(momentum=1.0), dict(momentum=0.9, dampening=1.5)):
        with pytest.raises(ValueError, match=r"SGD: scale_penalty needs momentum in \[0, 1\)"):
            SGD([p], lr=0.1, scale_penalty=True, **wrong)


def test_the_switch_under_compile_and_on_a_subgradient():
    p, q = (nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
    options = dict(lr=0.1, momentum=0.9, l1=0.1, l1_mode="proximal", scale_penalty=True)
    eager, traced = SGD([p], **options), SGD([q], **options)
    step = torch.compile(traced.step, backend="aot_eager")
    for _ in range(2):
        p.grad, q.grad = torch.ones(5), torch.ones(5)
        eager.step()
        step()
    torch.testing.assert_close(p, q)
    # What goes through the momentum is stretched by it already.
    p, q = (nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
    for w, scaled in ((p, True), (q, False)):
        optimizer = SGD([w], lr=0.1, momentum=0.9, l1=0.1, weight_decay=0.1, scale_penalty=scaled)
        for _ in range(3):
            w.grad = torch.ones(5)
            optimizer.step()
    assert torch.equal(p, q)


def test_prior_scale_takes_a_tensor_of_one():
    for value in (torch.tensor(1e-4, dtype=torch.float64), torch.tensor([1e-4], dtype=torch.float64)):
        got = prior_scale(value, num_samples=100)
        assert got == prior_scale(1e-4, num_samples=100) and isinstance(got, float)
    with pytest.raises(TypeError, match="prior_scale: value must be one number, got Tensor of shape"):
        prior_scale(torch.ones(2))
    assert fr.optim.prior_scale(torch.tensor(0.0)) == float("inf")
