"""Parameter groups, the penalty's value, its prior and the sparsity.

Proven here: `penalty_groups` puts every trainable parameter into exactly one group, leaves biases and norms
unpenalised, follows the overrides, and feeds both fastreg's and torch's optimisers; `penalty` is the sum by
hand with the gradient l2 w + l1 sign(w), and SGD with the factors is SGD on loss + penalty; `prior_scale` is
its own inverse and its prior's posterior mode is where loss + penalty is least; `sparsity` counts exact
zeros.
"""

import math
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import fastreg as fr
from fastreg.optim import penalty, penalty_groups, prior_scale, sparsity


class Net(nn.Module):
    """Every kind of parameter a rule speaks of, a tied weight, a module under two names and a frozen weight
    among them.
    """

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.conv = nn.Conv2d(3, 4, 3)
        self.batchnorm = nn.BatchNorm2d(4)
        self.layernorm = nn.LayerNorm((2, 4))  # its weight has two dimensions
        self.rnn = nn.GRU(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.encoder = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.again = self.encoder[1]
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(4))
        self.position_bias = nn.Parameter(torch.ones(3, 4))
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)


def options_of(groups, model):
    """{name: options of its group}, asserting that a parameter is in one group alone."""
    found = {}
    for group in groups:
        for p in group["params"]:
            assert id(p) not in found
            found[id(p)] = {k: v for k, v in group.items() if k != "params"}
    return {
        name: found[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if id(p) in found
    }


class TestPenaltyGroups:
    def test_rule(self):
        """Weights get the penalty; biases, norms and everything of fewer than two dimensions get none."""
        model = Net()
        options = options_of(penalty_groups(model, l1=0.1, l2=0.2), model)
        penalised = {name for name, o in options.items() if o == {"l1": 0.1, "weight_decay": 0.2}}
        assert penalised == {
            "embed.weight",
            "conv.weight",
            "rnn.weight_ih_l0",
            "rnn.weight_hh_l0",
            "attention.in_proj_weight",
            "attention.out_proj.weight",
            "encoder.0.weight",
            "encoder.1.weight",
            "again.weight",
            "head.weight",
        }
        assert all(
            o == {"l1": 0.0, "weight_decay": 0.0} for name, o in options.items() if name not in penalised
        )

    @pytest.mark.parametrize(
        "overrides", [None, {"*": dict(l1=1)}, {"conv.*": dict(lr=1), "*.bias": dict(l2=3)}]
    )
    def test_each_trainable_parameter_once(self, overrides):
        model = Net()
        groups = penalty_groups(model, l1=0.1, l2=0.2, overrides=overrides)
        listed = [id(p) for g in groups for p in g["params"]]
        assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
        assert id(model.frozen) not in listed and "frozen" in dict(model.named_parameters())

    def test_overrides(self):
        """By name pattern, biases and norms included; what an override leaves out stays by the rule; later
        patterns win.
        """
        model = Net()
        overrides = {
            "encoder.*": dict(l1=0.5, lr=0.01),
            "encoder.1.*": dict(l2=0.7),
            "batchnorm.weight": dict(weight_decay=0.9),
            "*.0.weight": dict(l1=0.6, l1_mode="proximal"),
        }
        options = options_of(penalty_groups(model, l1=0.1, l2=0.2, overrides=overrides), model)
        assert options["encoder.0.weight"] == dict(l1=0.6, weight_decay=0.2, lr=0.01, l1_mode="proximal")
        assert options["encoder.0.bias"] == dict(l1=0.5, weight_decay=0.0, lr=0.01)
        assert options["encoder.1.weight"] == dict(l1=0.5, weight_decay=0.7, lr=0.01)
        assert options["batchnorm.weight"] == dict(l1=0.0, weight_decay=0.9)
        assert options["conv.weight"] == dict(l1=0.1, weight_decay=0.2)
        backwards = dict(reversed(overrides.items()))
        assert options_of(penalty_groups(model, overrides=backwards), model)["encoder.0.weight"]["l1"] == 0.5

    def test_overrides_are_left_as_they_were(self):
        overrides = {"*": dict(l2=0.5)}
        penalty_groups(nn.Linear(2, 2), overrides=overrides)
        assert overrides == {"*": dict(l2=0.5)}

    def test_any_name_of_a_shared_parameter(self):
        """A tied weight answers to each of its names, and a module under two names to both."""
        for pattern in ("embed.weight", "head.weight"):
            model = Net()
            options = options_of(penalty_groups(model, overrides={pattern: dict(l1=0.5)}), model)
            assert options["embed.weight"]["l1"] == options["head.weight"]["l1"] == 0.5
        for pattern in ("again.weight", "encoder.1.weight"):
            model = Net()
            options = options_of(penalty_groups(model, overrides={pattern: dict(l1=0.5)}), model)
            assert options["again.weight"]["l1"] == options["encoder.1.weight"]["l1"] == 0.5

    def test_same_options_same_group(self):
        """Few groups: one call of the kernel serves all that share their options."""
        groups = penalty_groups(Net(), l1=0.1, l2=0.2, overrides={"conv.weight": dict(l1=0.1)})
        assert {(g["l1"], g["weight_decay"]) for g in groups} == {(0.0, 0.0), (0.1, 0.2)} and len(groups) == 2

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (dict(l1=-1), "l1 must be finite and at least 0, got -1"),
            (dict(l2=math.nan), "l2 must be finite and at least 0, got nan"),
            (dict(l2=math.inf), "l2 must be finite"),
            (
                dict(overrides={"head.weigth": dict(l1=1)}),
                "overrides pattern 'head.weigth' matches no parameter; see",
            ),
            (dict(overrides={"head.*": dict(l2=-1)}), "weight_decay must be finite and at least 0, got -1"),
            (dict(overrides={"head.*": dict(l1=math.nan)}), "l1 must be finite"),
        ],
    )
    def test_errors(self, arguments, text):
        with pytest.raises(ValueError, match=f"penalty_groups: {text}"):
            penalty_groups(Net(), **arguments)
        with pytest.raises(TypeError, match="l1 must be a number, got str"):
            penalty_groups(Net(), l1="0.1")

    def test_no_trainable_parameter(self):
        assert penalty_groups(nn.ReLU(), l1=1.0) == []
        assert penalty_groups(nn.Linear(2, 2).requires_grad_(False), l1=1.0) == []

    def test_straight_into_optimisers(self):
        """fastreg's SGD takes all of it; torch's takes the unknown key too and uses weight_decay."""
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        groups = penalty_groups(model, l1=0.1, l2=0.2, overrides={"2.weight": dict(lr=0.5)})
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for cls, l1 in ((fr.optim.SGD, 0.1), (torch.optim.SGD, 0.0), (torch.optim.AdamW, None)):
            optimizer = cls([dict(g) for g in groups], lr=0.25)
            for name, p in model.named_parameters():
                p.grad = torch.zeros_like(p)
                p.data.copy_(before[name])
            optimizer.step()
            for name, p in model.named_parameters():
                w = before[name]
                lr = 0.5 if name == "2.weight" else 0.25
                if l1 is None or name not in ("0.weight", "2.weight"):
                    assert l1 is None or torch.equal(p.detach(), w)
                else:
                    torch.testing.assert_close(p.detach(), w - lr * (0.2 * w + l1 * w.sign()))


def by_hand(tensors, l1, l2):
    return sum(l1 * w.double().abs().sum() + l2 / 2 * w.double().square().sum() for w in tensors)


class TestPenalty:
    def test_value(self, dtype):
        """The sum by hand in float64, from a tensor or tensors; float32 for 16-bit parameters,
        float64 for float64.
        """
        tensors = [
            torch.randn(40, 30).to(dtype),
            torch.randn(7).to(dtype),
            torch.randn(()).to(dtype),
            torch.zeros(0, 3).to(dtype),
        ]
        module = nn.ParameterList([nn.Parameter(t) for t in tensors])
        expected = by_hand(tensors, 0.1, 0.3)
        for source in (tensors, iter(tensors), module.parameters(), tuple(module)):
            value = penalty(source, l1=0.1, l2=0.3)
            assert value.shape == () and value.dtype == (
                torch.float64 if dtype == torch.float64 else torch.float32
            )
            torch.testing.assert_close(value.double().detach(), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            penalty(tensors[0], l1=0.1, l2=0.3).double(), by_hand(tensors[:1], 0.1, 0.3), rtol=1e-6, atol=0
        )
        one = nn.Parameter(torch.tensor([3.0, -4.0]))
        assert (
            penalty(one, l1=1.0).item() == 7
            and penalty(one, l2=1.0).item() == 12.5
            and penalty(one).item() == 0
        )

    def test_gradient(self, dtype):
        """l2 w + l1 sign(w), and 0 at 0."""
        w = torch.randn(50).to(dtype)
        w[::5] = 0
        p = nn.Parameter(w.clone())
        penalty(p, l1=0.25, l2=0.5).backward()
        expected = (0.5 * w.double() + 0.25 * w.double().sign()).to(dtype)
        torch.testing.assert_close(p.grad, expected)
        assert (p.grad[::5] == 0).all()

    def test_gradcheck(self):
        w = torch.randn(6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda w: penalty(w, l1=0.3, l2=0.7), w)

    def test_many_parameters_are_one_node_of_the_graph(self):
        """For a small tensor autograd costs as much as the sums. Derivatives are those of the formula: of
        several dtypes, the second, batches of them, with tensors that are saved elsewhere.
        """
        dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        tensors = [torch.randn(5, 3).to(dtype) for dtype in dtypes for _ in range(10)]
        params = [nn.Parameter(t, requires_grad=i % 10 < 9) for i, t in enumerate(tensors)]
        groups = [
            dict(params=params[::2], l1=0.3, weight_decay=0.0),
            dict(params=params[1::2], l1=0.1, weight_decay=0.2),
        ]
        wanted = [p for p in params if p.requires_grad]
        doubles = [t.double().requires_grad_() for t in tensors]
        expected = by_hand(doubles[::2], 0.3, 0.0) + by_hand(doubles[1::2], 0.1, 0.2)
        expecteds = torch.autograd.grad(
            expected, [d for d, p in zip(doubles, params, strict=True) if p.requires_grad]
        )
        with torch.autograd.graph.save_on_cpu():
            value = penalty(groups)
        assert {node.name() for node, _ in value.grad_fn.next_functions if node} == {
            "torch::autograd::AccumulateGrad"
        }
        torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=0)
        for got, want, p in zip(
            torch.autograd.grad(value, wanted, retain_graph=True), expecteds, wanted, strict=True
        ):
            assert got.dtype == p.dtype
            torch.testing.assert_close(got, want.to(p.dtype))
        batch = torch.autograd.grad(
            value, wanted, torch.tensor([1.0, 2.0]).double(), retain_graph=True, is_grads_batched=True
        )
        for got, want, p in zip(batch, expecteds, wanted, strict=True):
            torch.testing.assert_close(got, torch.stack([want, 2 * want]).to(p.dtype))
        first = torch.autograd.grad(value, wanted, create_graph=True)
        seconds = torch.autograd.grad(
            sum(g.double().square().sum() for g in first), wanted, allow_unused=True
        )
        for p, want, second in zip(wanted, expecteds, seconds, strict=True):
            factor = 0.2 * (any(p is q for q in groups[1]["params"]))
            assert (second is None and not factor) or torch.allclose(
                second.double(), 2 * want * factor, rtol=1e-2
            )
        w = torch.randn(6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(lambda w: penalty(w, l1=0.3, l2=0.7), w)

    def test_groups_and_optimisers(self):
        """Each group brings its own factors; the arguments serve those that bring none."""
        a, b, c = (nn.Parameter(torch.randn(5)) for _ in range(3))
        groups = [dict(params=[a], l1=0.1, weight_decay=0.2), dict(params=b, l1=0.3), dict(params=[("c", c)])]
        expected = by_hand([a], 0.1, 0.2) + by_hand([b], 0.3, 0.6) + by_hand([c], 0.5, 0.6)
        torch.testing.assert_close(
            penalty(groups, l1=0.5, l2=0.6).double(), expected.detach() + 0, check_dtype=False
        )
        torch.testing.assert_close(penalty(groups[0]).double(), by_hand([a], 0.1, 0.2))
        optimizer = fr.optim.SGD(
            [dict(params=[a], l1=0.1), dict(params=[b])], lr=0.1, weight_decay=0.2, l1=0.4
        )
        expected = by_hand([a], 0.1, 0.2) + by_hand([b], 0.4, 0.2)
        torch.testing.assert_close(penalty(optimizer).double(), expected)
        torch.testing.assert_close(penalty(optimizer.param_groups, l1=9.0).double(), expected)
        torch.testing.assert_close(
            penalty(torch.optim.SGD([a], weight_decay=0.2)).double(), by_hand([a], 0.0, 0.2)
        )
        model = Net()
        penalised = [p for g in penalty_groups(model, l1=0.1, l2=0.2) if g["l1"] for p in g["params"]]
        value = penalty(penalty_groups(model, l1=0.1, l2=0.2))
        torch.testing.assert_close(value.double(), by_hand(penalised, 0.1, 0.2), rtol=1e-6, atol=0)

    def test_shared_parameters_once(self):
        p = nn.Parameter(torch.ones(4))
        assert penalty([p, p], l1=1.0).item() == 4
        assert penalty([dict(params=[p], l1=1.0), dict(params=[p], l1=1.0)]).item() == 4
        model = Net()
        unique = {id(q): q for q in model.parameters()}.values()
        torch.testing.assert_close(
            penalty(model.parameters(), l1=1.0).double(), by_hand(unique, 1.0, 0.0), rtol=1e-6, atol=0
        )

    def test_float16_does_not_overflow(self):
        """The squares of 300s are beyond float16, and so is the sum of 70000 ones."""
        p = nn.Parameter(torch.full((70_000,), 300.0, dtype=torch.float16))
        assert math.isclose(penalty(p, l2=2.0).item(), 70_000 * 300**2, rel_tol=1e-6)
        penalty(p, l1=1.0).backward()
        assert (p.grad == 1).all()

    def test_factor_zero_costs_nothing(self):
        """An inf in an unpenalised parameter is no NaN in the penalty."""
        bias = nn.Parameter(torch.tensor([math.inf, 1.0]))
        weight = nn.Parameter(torch.ones(2))
        groups = [
            dict(params=[bias], l1=0.0, weight_decay=0.0),
            dict(params=[weight], l1=0.5, weight_decay=0.0),
        ]
        assert penalty(groups).item() == 1.0
        assert penalty(bias, l1=1.0).item() == math.inf

    def test_nothing(self):
        for source in ([], nn.ReLU(), dict(params=[], l1=1.0), torch.zeros(0)):
            value = penalty(source, l1=1.0)
            assert value.shape == () and value.item() == 0

    def test_mixed_dtypes(self):
        value = penalty(
            [torch.ones(2), torch.ones(3, dtype=torch.float64), torch.ones(4, dtype=torch.bfloat16)], l1=1.0
        )
        assert value.item() == 9 and value.dtype == torch.float64

    def test_errors(self):
        with pytest.raises(ValueError, match="penalty: l1 must be finite and at least 0, got -1"):
            penalty([], l1=-1)
        with pytest.raises(ValueError, match="penalty: l2 must be finite and at least 0, got nan"):
            penalty([], l2=math.nan)
        with pytest.raises(TypeError, match=r"penalty: each parameter must be a .*Tensor, got float"):
            penalty([1.0], l1=1.0)

    def test_compiles(self):
        torch._dynamo.reset()
        p = nn.Parameter(torch.randn(9))
        compiled = torch.compile(lambda p: penalty(p, l1=0.1, l2=0.2), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(p), penalty(p, l1=0.1, l2=0.2))

    @settings(deadline=None, max_examples=40)
    @given(
        st.sampled_from([0.0, 0.01, 0.3]),
        st.sampled_from([0.0, 0.02, 0.4]),
        st.sampled_from([0.0, 0.9]),
        st.booleans(),
        st.integers(0, 2**31),
    )
    def test_sgd_descends_loss_plus_penalty(self, l1, l2, momentum, nesterov, seed):
        """SGD(l1, weight_decay) on E goes the same way as torch's SGD on E + penalty."""
        make = torch.Generator().manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=make, dtype=torch.float64))
        start, x = (
            [p.detach().clone() for p in model.parameters()],
            torch.randn(8, 4, generator=make, dtype=torch.float64),
        )
        results = []
        for cls in (fr.optim.SGD, torch.optim.SGD):
            for p, w in zip(model.parameters(), start, strict=True):
                p.data.copy_(w)
            groups, ours = penalty_groups(model, l1=l1, l2=l2), cls is fr.optim.SGD
            bare = [{"params": g["params"]} for g in groups]
            optimizer = cls(
                groups if ours else bare, lr=0.05, momentum=momentum, nesterov=nesterov and momentum > 0
            )
            for _ in range(4):
                optimizer.zero_grad()
                loss = model(x).square().mean()
                (loss if ours else loss + penalty(groups)).backward()
                optimizer.step()
            results.append([p.detach().clone() for p in model.parameters()])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


positive = st.floats(1e-300, 1e300)
samples = st.integers(1, 10**12)


class TestPriorScale:
    def test_values(self):
        assert prior_scale(0.25) == 2.0
        assert prior_scale(0.25, num_samples=4) == 1.0
        assert prior_scale(0.25, "laplace") == 4.0
        assert prior_scale(0.25, "laplace", num_samples=4) == 1.0
        assert prior_scale(2.0, inverse=True) == 0.25
        assert prior_scale(4.0, "laplace", inverse=True) == 0.25
        assert prior_scale(0.5, num_samples=4, inverse=True) == 1.0

    @settings(deadline=None, max_examples=300)
    @given(positive, st.sampled_from(["gaussian", "laplace"]), samples)
    def test_round_trip(self, value, prior, num_samples):
        """Factor to scale and back, over 600 decades, wherever the scale itself is a normal number."""
        scale = prior_scale(value, prior, num_samples=num_samples)
        assert scale >= 0
        if sys.float_info.min < scale < math.inf:
            back = prior_scale(scale, prior, num_samples=num_samples, inverse=True)
            assert math.isclose(back, value, rel_tol=1e-14)

    @settings(deadline=None, max_examples=300)
    @given(st.floats(0, math.inf), st.sampled_from(["gaussian", "laplace"]), samples, st.booleans())
    def test_never_raises_in_range(self, value, prior, num_samples, inverse):
        """Every number from 0 to inf has an answer, falling as the value grows."""
        scale = prior_scale(value, prior, num_samples=num_samples, inverse=inverse)
        assert 0 <= scale <= math.inf
        assert prior_scale(value * 4, prior, num_samples=num_samples, inverse=inverse) <= scale

    def test_ends(self):
        for prior in ("gaussian", "laplace"):
            for inverse in (False, True):
                assert prior_scale(0, prior, inverse=inverse) == math.inf
                assert prior_scale(math.inf, prior, inverse=inverse) == 0

    def test_errors(self):
        for value in (-1.0, math.nan):
            with pytest.raises(ValueError, match="prior_scale: value"):
                prior_scale(value)
        with pytest.raises(TypeError, match="prior_scale: value"):
            prior_scale("1")
        for num_samples in (0, -1, math.nan):
            with pytest.raises(ValueError, match="prior_scale: num_samples"):
                prior_scale(1.0, num_samples=num_samples)
        with pytest.raises(ValueError, match="prior must be one of 'gaussian', 'laplace', got 'normal'"):
            prior_scale(1.0, "normal")

    @pytest.mark.parametrize("prior", ["gaussian", "laplace"])
    def test_map_estimate(self, prior):
        """The least mean NLL + penalty, found by SGD, is the posterior's mode, found on a grid with torch's
        distributions.
        """
        torch.manual_seed(3)
        y, noise, factor = 0.4 + 0.7 * torch.randn(12, dtype=torch.float64), 0.7, 0.3
        sigma = prior_scale(factor, prior, num_samples=len(y))
        density = {"gaussian": torch.distributions.Normal, "laplace": torch.distributions.Laplace}[prior](
            0.0, sigma
        )
        grid = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
        log_posterior = torch.distributions.Normal(grid[:, None], noise).log_prob(y).sum(
            1
        ) + density.log_prob(grid)
        mode = grid[log_posterior.argmax()]
        likeliest = grid[torch.distributions.Normal(grid[:, None], noise).log_prob(y).sum(1).argmax()]
        assert abs(mode - likeliest) > 0.02  # the prior does something

        w = nn.Parameter(torch.zeros((), dtype=torch.float64))
        options = dict(weight_decay=factor) if prior == "gaussian" else dict(l1=factor, l1_mode="proximal")
        optimizer = fr.optim.SGD([w], lr=0.1, **options)
        for _ in range(400):
            optimizer.zero_grad()
            (-torch.distributions.Normal(w, noise).log_prob(y).mean()).backward()
            optimizer.step()
        assert abs(w.item() - mode) < 2e-4

    def test_penalty_is_minus_log_prior(self):
        """num_samples * penalty differs from -log prior by a constant alone."""
        w = torch.linspace(-3, 3, 7, dtype=torch.float64)
        for prior, distribution, key in (
            ("gaussian", torch.distributions.Normal, "l2"),
            ("laplace", torch.distributions.Laplace, "l1"),
        ):
            scale = prior_scale(0.05, prior, num_samples=40)
            negative = -distribution(w.new_zeros(()), w.new_tensor(scale)).log_prob(w)
            ours = torch.stack([40 * penalty(x, **{key: 0.05}) for x in w])
            torch.testing.assert_close(negative - negative[3], ours - ours[3], rtol=1e-12, atol=1e-12)


def test_adamw_takes_the_groups_and_gives_the_penalty():
    """penalty of AdamW is that of its groups, and its groups are those of the rule."""
    model = Net()
    optimizer = fr.optim.AdamW(penalty_groups(model, l1=0.1, l2=0.2), lr=1e-3)
    assert torch.equal(penalty(optimizer), penalty(penalty_groups(model, l1=0.1, l2=0.2)))
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    groups = penalty_groups(model, l1=0.1, l2=0.2)
    free = {id(p) for g in groups if g["l1"] == 0 for p in g["params"]} | {id(model.frozen)}
    assert moved == {name for name, p in model.named_parameters() if id(p) not in free}


class TestSparsity:
    def test_counts_exact_zeros(self, dtype):
        w = torch.tensor([0.0, -0.0, 1.0, torch.finfo(dtype).tiny, math.nan], dtype=dtype)
        assert sparsity(w) == sparsity([w]) == 0.4
        assert sparsity([w, torch.ones(5, dtype=dtype)]) == 0.2
        assert isinstance(sparsity(w), float)

    def test_module_and_shared_parameters(self):
        model = Net()
        with torch.no_grad():
            model.embed.weight.zero_()
        total = sum(p.numel() for p in model.parameters())
        zeros = sum(int((p == 0).sum()) for p in model.parameters())
        assert zeros >= model.embed.weight.numel() and sparsity(model) == zeros / total
        p = nn.Parameter(torch.zeros(3))
        assert sparsity([p, p, torch.ones(3)]) == 0.5
        assert sparsity(iter([p, torch.ones(3)])) == 0.5

    def test_nothing(self):
        assert sparsity([]) == sparsity(nn.ReLU()) == sparsity(torch.zeros(0)) == 0.0

    def test_after_proximal_training(self):
        """What it is for: the proximal form leaves zeros that the subgradient form does not."""
        shares = []
        for mode in ("proximal", "subgradient"):
            torch.manual_seed(1)
            model = nn.Linear(30, 1, bias=False)
            x = torch.randn(200, 30)
            y = x[:, :3].sum(1, keepdim=True)
            optimizer = fr.optim.SGD(model.parameters(), lr=0.05, l1=0.2, l1_mode=mode)
            for _ in range(200):
                optimizer.zero_grad()
                (model(x) - y).square().mean().backward()
                optimizer.step()
            shares.append(sparsity(model))
        assert shares[0] == 0.9 and shares[1] == 0.0


@pytest.fixture(scope="module")
def diabetes():
    """442 patients: ten measurements, standardised (442, 10), and the progress of their disease (442,)."""
    datasets = pytest.importorskip("sklearn.datasets", reason='needs pip install "torch-fastreg[test]"')
    x, y = datasets.load_diabetes(return_X_y=True)
    return torch.tensor((x - x.mean(0)) / x.std(0)), torch.tensor(y)


class TestLasso:
    """A linear model with least squares and L1 against scikit-learn's coordinate descent, on its diabetes
    data.
    """

    @pytest.mark.parametrize("momentum", (0.0, 0.9))
    @pytest.mark.parametrize("l1", (0.1, 1.0, 3.0, 10.0, 30.0, 50.0))
    def test_the_solution_is_scikit_learns(self, l1, momentum, diabetes):
        from sklearn.linear_model import Lasso

        x, y = diabetes
        lasso = Lasso(alpha=l1, tol=1e-12, max_iter=100_000).fit(x.numpy(), y.numpy())
        model = nn.Linear(10, 1, dtype=torch.float64)
        # With momentum the steps grow by 1 / (1 - momentum) and the threshold does not, as SGD's docstring
        # says.
        groups = fr.optim.penalty_groups(model, l1=l1 / (1 - momentum))
        optimizer = fr.optim.SGD(
            groups, lr=0.24 if momentum == 0 else 0.1, momentum=momentum, l1_mode="proximal"
        )

        def error():
            return 0.5 * (model(x).squeeze(1) - y).square().mean()

        for _ in range(5000 if momentum == 0 else 1500):
            optimizer.zero_grad()
            error().backward()
            optimizer.step()
        w, want = model.weight.detach().squeeze(0), torch.tensor(lasso.coef_)
        assert (w - want).abs().max() < 1e-3 and abs(model.bias.item() - lasso.intercept_) < 1e-3
        assert torch.equal(w != 0, want != 0)
        objective = error() + penalty(model.weight, l1=l1)
        best = 0.5 * (y - x @ want - lasso.intercept_).square().mean() + l1 * want.abs().sum()
        assert abs(objective.item() / best.item() - 1) < 1e-8
        # And by itself: -dE/dw is l1 sign(w) where w is not 0, and at most l1 where it is.
        gradient = -(x.T @ (model(x).squeeze(1) - y)).detach() / len(y)
        assert ((gradient - l1 * w.sign()).abs()[w != 0] < 1e-3).all() and (gradient.abs() <= l1 + 1e-3).all()

    def test_the_path_loses_coefficients(self, diabetes):
        """From the least squares on, more and more coefficients are 0; at max |x^T y| / n all are."""
        x, y = diabetes
        limit = (x.T @ (y - y.mean())).abs().max().item() / len(y)
        counts = []
        for l1 in (0.0, 0.1 * limit, 0.5 * limit, 0.99 * limit, 1.01 * limit):
            model = nn.Linear(10, 1, dtype=torch.float64)
            optimizer = fr.optim.SGD(fr.optim.penalty_groups(model, l1=l1), lr=0.24, l1_mode="proximal")
            for _ in range(600):
                optimizer.zero_grad()
                (0.5 * (model(x).squeeze(1) - y).square().mean()).backward()
                optimizer.step()
            counts.append(int((model.weight != 0).sum()))
        assert counts[0] == 10 and counts[-2:] == [1, 0] and counts == sorted(counts, reverse=True)


def test_prior_scale_of_a_gaussian_likelihood():
    """Ridge regression with torch's mse_loss: the posterior mode of noise s and the prior that the docstring
    names.
    """
    torch.manual_seed(0)
    n, noise, factor = 50, 0.3, 0.02
    x, y = torch.randn(n, 4, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    sigma = prior_scale(factor / (2 * noise**2), num_samples=n)
    # log p(w | data) = -|y - x w|^2 / (2 s^2) - |w|^2 / (2 sigma^2) + const, whose mode solves a linear
    # system.
    mode = torch.linalg.solve(
        x.T @ x / noise**2 + torch.eye(4, dtype=torch.float64) / sigma**2, x.T @ y / noise**2
    )
    w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = fr.optim.SGD([w], lr=0.1, weight_decay=factor)
    for _ in range(500):
        optimizer.zero_grad()
        nn.functional.mse_loss(x @ w, y).backward()
        optimizer.step()
    torch.testing.assert_close(w.detach(), mode, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(mode, torch.linalg.lstsq(x, y[:, None]).solution[:, 0], rtol=1e-3)
    back = prior_scale(sigma, num_samples=n, inverse=True) * 2 * noise**2
    assert math.isclose(back, factor, rel_tol=1e-12)


def test_l1_against_l2_on_the_digits(digits):
    """The weights of two networks that are right equally often: under L1 more are 0, and those that are left
    are larger.
    """
    x, y = digits
    found = {}
    for name, options in (("l2", dict(l2=3e-3)), ("l1", dict(l1=5e-4))):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = fr.optim.SGD(
            fr.optim.penalty_groups(model, **options), lr=0.1, momentum=0.9, l1_mode="proximal"
        )
        for batch in (b for _ in range(8) for b in torch.randperm(4000).split(100)):
            optimizer.zero_grad()
            fr.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        accuracy = (model(x[4000:]).argmax(1) == y[4000:]).double().mean().item()
        found[name] = model[0].weight.detach(), accuracy
    (w2, accuracy2), (w1, accuracy1) = found["l2"], found["l1"]
    assert abs(accuracy1 - accuracy2) < 0.03 and min(accuracy1, accuracy2) > 0.88
    assert sparsity(w1) > 0.1 and sparsity(w2) < 0.01
    for small in (1e-4, 1e-3):
        assert (w1.abs() < small).double().mean() > 1.5 * (w2.abs() < small).double().mean()
    assert w1[w1 != 0].abs().mean() > 1.2 * w2[w2 != 0].abs().mean()
    assert w1.abs().max() > w2.abs().max()
