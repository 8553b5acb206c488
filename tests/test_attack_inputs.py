"""Attacks on what other people's programs hand in: images outside of the bounds, models with checkpoints,
models that give dicts, tuples or probabilities, loaders that yield something else than pairs.
"""

import collections
import copy
import dataclasses
import functools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.data import DataLoader, TensorDataset

import fastreg as fr
from fastreg import attacks

EPS = 8 / 255


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3)).eval()


def batch(count=8):
    torch.manual_seed(1)
    return torch.rand(count, 3, 2, 2), torch.randint(3, (count,))


def every_attack(model, x, y, **options):
    """{name: what it gives}, all of them without random numbers."""
    l2 = fr.fgsm(model, x, y, EPS, norm="l2", **options)
    return {
        "fgsm": fr.fgsm(model, x, y, EPS, **options),
        "fgsm l2": l2,
        "pgd": fr.pgd(model, x, y, EPS, EPS / 2, 3, random_start=False, **options),
        "pgd l2": fr.pgd(model, x, y, EPS, EPS, 3, norm="l2", random_start=False, **options),
    }


# --------------------------------------------------------------------------------------------------
# bounds

CALLS = {
    "fgsm": lambda m, x, y, **o: fr.fgsm(m, x, y, EPS, **o),
    "fgsm_random": lambda m, x, y, **o: fr.fgsm(m, x, y, EPS, random_start=True, **o),
    "pgd": lambda m, x, y, **o: fr.pgd(m, x, y, EPS, EPS, 2, **o),
    "pgd_l2": lambda m, x, y, **o: fr.pgd(m, x, y, EPS, EPS, 2, norm="l2", **o),
    "adversarial_loss": lambda m, x, y, **o: fr.adversarial_loss(m, x, y, EPS, **o),
    "adversarial_backward": lambda m, x, y, **o: fr.adversarial_backward(m, x, y, EPS, **o),
    "robust_accuracy": lambda m, x, y, **o: fr.robust_accuracy(m, (x, y), EPS, steps=2, **o),
    "FreeAdversarial": lambda m, x, y, **o: next(fr.FreeAdversarial(EPS, **o)(x)),
}


@pytest.mark.parametrize("name", CALLS)
def test_images_outside_of_the_bounds_are_refused_with_bounds_and_range(name):
    model, (x, y) = net(), batch()
    normalised = 2 * x - 1
    normalised[0, 0, 0, 0], normalised[0, 0, 0, 1] = -0.9375, 0.875
    normalised.clamp_(-0.9375, 0.875)
    op = name.split("_")[0] if name.startswith(("fgsm", "pgd")) else name
    with pytest.raises(ValueError, match=rf"^{op}: .* from 0 to 1, got values from -0.9375 to 0.875; .*std"):
        CALLS[name](model, normalised, y)
    for bounds in ((-1, 1), (torch.tensor(-1.0), None), None, (torch.full((3,), -1.0), torch.ones(3))):
        CALLS[name](model, normalised, y, bounds=bounds)
    per_channel = (torch.tensor([-1.0, -1.0, 0.0]), 1.0)
    with pytest.raises(ValueError, match=f"{op}: x must lie within bounds, from -1 to 1"):
        CALLS[name](model, normalised, y, bounds=per_channel)
    with pytest.raises(ValueError, match=r"got values from 0 to 255"):
        CALLS[name](
            model,
            (x * 255)
            .round()
            .index_fill(0, torch.tensor([0]), 0)
            .clamp(0, 255)
            .index_fill(0, torch.tensor([1]), 255),
            y,
        )


def test_robust_accuracy_looks_at_examples_that_are_wrong_already():
    model, (x, _) = net(), batch()
    wrong = (model(x).argmax(1) + 1) % 3
    x[0, 0, 0, 0] = 1.5
    with pytest.raises(ValueError, match=r"robust_accuracy: x must lie within bounds"):
        fr.robust_accuracy(model, (x, wrong), EPS)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("bounds", ((0.0, 1.0), (None, 0.5), (torch.tensor([0.0, 0.2, 0.4]), 0.6)), ids=str)
def test_where_nobody_may_look_no_element_moves_by_more_than_eps(monkeypatch, dtype, bounds):
    """As on a GPU: elements inside move as they would, those outside towards the bounds or not at all."""
    model, (x, y) = net().to(dtype), batch(64)
    x = (3 * x - 1).to(dtype)
    monkeypatch.setattr(attacks, "may_look", lambda x: False)
    found = every_attack(model, x, y, bounds=bounds)
    torch.manual_seed(3)
    found["random"] = fr.pgd(model, x, y, EPS, EPS, 2, bounds=bounds)
    found["random l2"] = fr.pgd(model, x, y, EPS, EPS, 2, bounds=bounds, norm="l2")
    found["fast"] = fr.fgsm(model, x, y, EPS, bounds=bounds, random_start=True)
    lower, upper = (
        torch.as_tensor(default if bound is None else bound).double().view(-1, 1, 1)
        for bound, default in zip(bounds, (-torch.inf, torch.inf), strict=True)
    )
    wide = x.double()
    room = 2 * torch.finfo(dtype).eps * wide.abs().clamp(min=1)
    for name, adversarial in found.items():
        assert ((adversarial.double() - wide).abs() <= EPS + room).all(), name
        below, above = torch.minimum(lower, wide), torch.maximum(upper, wide)
        assert ((adversarial.double() >= below - room) & (adversarial.double() <= above + room)).all(), name
        assert not torch.equal(adversarial, x), name
    inside = x.clamp(0.45, 0.5)
    found = every_attack(model, inside, y, bounds=bounds)
    monkeypatch.undo()
    for name, want in every_attack(model, inside, y, bounds=bounds).items():
        assert torch.equal(found[name], want), name


def test_robust_accuracy_where_nobody_may_look(monkeypatch):
    """Of images inside it is the same, also where only some of a batch are attacked; outside it is one."""
    model, (x, y) = net(), batch(64)

    def accuracy(x):
        return fr.robust_accuracy(model, (x, y), EPS, steps=2, generator=torch.Generator().manual_seed(1))

    want = accuracy(x)
    monkeypatch.setattr(attacks, "may_look", lambda x: False)
    assert accuracy(x) == want and 0 < want < 1
    assert 0 <= accuracy(3 * x - 1) <= 1


def test_free_moves_by_eps_at_most_where_nobody_may_look(monkeypatch):
    monkeypatch.setattr(attacks, "may_look", lambda x: False)
    model, (x, y) = net(), batch()
    x = 3 * x - 1
    for adversarial in fr.FreeAdversarial(EPS, replays=3)(x):
        assert (adversarial - x).abs().max() <= EPS + 1e-6
        F.cross_entropy(model(adversarial), y).backward()


def test_rounding_at_the_bounds_is_no_error_and_no_move():
    """Images that were normalised in float32, bounds in float64."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    model, (x, y) = net(), batch(64)
    x = (x.round() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    bounds = ((0 - mean.double()) / std.double(), (1 - mean.double()) / std.double())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        still = fr.fgsm(model.to(dtype), x.to(dtype), y, 0.0, bounds=bounds)
        assert torch.equal(still, x.to(dtype))


# --------------------------------------------------------------------------------------------------
# checkpoints


class Checkpointed(nn.Module):
    """Layers in a checkpoint, with a BatchNorm and a checkpoint in the checkpoint."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant  # None: no checkpoint at all
        self.first, self.norm, self.last = nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def run(self, function, x):
        return (
            function(x) if self.reentrant is None else checkpoint(function, x, use_reentrant=self.reentrant)
        )

    def block(self, x):
        return torch.tanh(self.run(lambda z: self.norm(z), x) * 2)

    def forward(self, x):
        return self.last(self.run(self.block, self.first(x.flatten(1))))


def traces(model, *tensors):
    kept = [*model.parameters(), *tensors]
    return [
        *(None if t.grad is None else t.grad.clone() for t in kept),
        *(buffer.clone() for buffer in model.buffers()),
        *(buffer._version for buffer in model.buffers()),
        *(module.training for module in model.modules()),
    ]


def equal(a, b):
    return all(
        torch.equal(p, q) if isinstance(p, torch.Tensor) else p == q for p, q in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("reentrant", (True, False))
@pytest.mark.parametrize("kind", ("module", "function", "frozen", "pending gradients"))
def test_attacks_on_checkpoints_give_what_the_plain_model_gives_and_leave_no_trace(reentrant, kind):
    model, plain = Checkpointed(reentrant).train(), Checkpointed(None).train()
    (x, y), apply = batch(), torch.utils.checkpoint.CheckpointFunction.apply
    if kind == "frozen":
        model.requires_grad_(False)
    if kind == "pending gradients":
        F.cross_entropy(model(x), y).backward()
        x.requires_grad_()
        x.grad = torch.ones_like(x)
    want = every_attack(plain.eval() if kind == "function" else plain, x, y)
    if kind == "function":  # Its module is not shielded, and so stands in evaluation mode.
        model.eval()
    before = traces(model, x)
    got = every_attack((lambda x: model(x)) if kind == "function" else model, x, y)
    assert equal(traces(model, x), before)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-6, msg=name)
    fr.pgd(model, x, y, EPS, EPS, 2, restarts=2)
    fr.robust_accuracy(model, (x.detach(), y), EPS, steps=2)
    assert equal(traces(model, x), before)
    assert torch.utils.checkpoint.CheckpointFunction.apply == apply


@pytest.mark.parametrize("dropout", (0.0, 0.5))
def test_adversarial_training_of_checkpoints_has_the_gradients_of_the_plain_model(dropout):
    (x, y) = batch()
    results = []
    for reentrant in (None, True, False):
        model = Checkpointed(reentrant)
        model.norm = nn.Dropout(dropout)
        torch.manual_seed(5)
        loss = fr.adversarial_loss(model, x, y, EPS)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b)


def test_checkpointed_statistics_move_as_in_two_training_passes():
    (x, y), by_hand = batch(), Checkpointed(None).train()
    adversarial = fr.fgsm(by_hand, x, y, EPS)
    by_hand(x), by_hand(adversarial)
    model = Checkpointed(False).train()
    fr.adversarial_loss(model, x, y, EPS)
    torch.testing.assert_close(model.norm.running_mean, by_hand.norm.running_mean)
    assert model.norm.num_batches_tracked == 2


def test_sequential_checkpoints_and_float16():
    layers, (x, y) = net(), batch()
    chain = lambda x: checkpoint_sequential(layers, 2, x, use_reentrant=True)  # noqa: E731
    assert torch.equal(fr.fgsm(chain, x, y, EPS), fr.fgsm(layers, x, y, EPS))
    half = copy.deepcopy(layers).half()
    chain = lambda x: checkpoint_sequential(half, 2, x, use_reentrant=True)  # noqa: E731
    assert torch.equal(fr.fgsm(chain, x.half(), y, EPS), fr.fgsm(half, x.half(), y, EPS))
    assert all(p.grad is None for p in (*layers.parameters(), *half.parameters()))


def test_a_checkpoint_of_another_make_is_refused_by_name():
    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError(
                "When use_reentrant=True, torch.utils.checkpoint is incompatible with .grad() or passing an "
                "`inputs` parameter to .backward()."
            )

    model, (x, y) = net(), batch()
    with pytest.raises(RuntimeError, match=r"^fgsm: the model's checkpoints .* use_reentrant=False"):
        fr.fgsm(lambda x: model(Other.apply(x)), x, y, EPS)


# --------------------------------------------------------------------------------------------------
# what models give

Output = collections.namedtuple("Output", ("logits", "hidden"))


@dataclasses.dataclass
class Data:
    logits: torch.Tensor


class ModelOutput(collections.OrderedDict):
    """As transformers has it: a dict whose values are attributes, too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


WRAPPED = {
    "dict": (lambda z: {"logits": z}, lambda o: o["logits"]),
    "tuple": (lambda z: (z, z), lambda o: o[0]),
    "list": (lambda z: [z], lambda o: o[0]),
    "namedtuple": (lambda z: Output(z, z), lambda o: o.logits),
    "dataclass": (Data, lambda o: o.logits),
    "dict of another name": (lambda z: {"size": 1, "out": z}, lambda o: o["out"]),
    "ModelOutput": (lambda z: ModelOutput(logits=z), lambda o: o.logits),
}


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = net(), wrap

    def forward(self, x):
        return self.wrap(self.inner(x))


@pytest.mark.parametrize("kind", WRAPPED)
def test_models_that_give_no_tensor_are_attacked_by_loss_and_counted_by_predict(kind):
    wrap, unwrap = WRAPPED[kind]
    model, (x, y) = Wrapped(wrap), batch(60)
    loss = lambda output, y: F.cross_entropy(unwrap(output), y, reduction="none")  # noqa: E731
    want = every_attack(model.inner, x, y)
    for name, got in every_attack(model, x, y, loss=loss).items():
        torch.testing.assert_close(got, want[name], rtol=0, atol=1e-6, msg=name)
    torch.testing.assert_close(
        fr.adversarial_loss(model, x, y, EPS, loss=loss), fr.adversarial_loss(model.inner, x, y, EPS)
    )
    torch.testing.assert_close(
        fr.adversarial_backward(model, x, y, EPS, loss=loss), fr.adversarial_backward(model.inner, x, y, EPS)
    )
    y = model.inner(x).argmax(1)

    def accuracy(model, **options):
        return fr.robust_accuracy(
            model, (x, y), 0.1, steps=3, generator=torch.Generator().manual_seed(1), **options
        )

    exact = accuracy(model.inner)
    assert 0 < exact < 1
    assert accuracy(model, predict=unwrap) == exact
    assert accuracy(model, predict=unwrap, loss=loss) == exact
    assert accuracy(model, predict=lambda output: unwrap(output).argmax(1), loss=loss) == exact


@pytest.mark.parametrize("kind", WRAPPED)
def test_without_loss_the_error_names_op_and_remedy(kind):
    wrap, _ = WRAPPED[kind]
    model, (x, y) = Wrapped(wrap), batch()
    for name, call in CALLS.items():
        if name == "FreeAdversarial":
            continue
        op = name.split("_")[0] if name.startswith(("fgsm", "pgd")) else name
        remedy = "predict=lambda" if op == "robust_accuracy" else "loss=lambda"
        with pytest.raises(TypeError, match=f"^{op}: the model must give a tensor of logits, got .*{remedy}"):
            call(model, x, y)
    with pytest.raises(TypeError, match=r"^pgd: the model must give a tensor"):
        fr.pgd(model, x, y, EPS, EPS, 1, restarts=2)
    with pytest.raises(TypeError, match=r"predict must give logits .* pass loss="):
        fr.robust_accuracy(model, (x, y), EPS, predict=lambda output: net()(x).argmax(1))


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("name", ["fgsm", "robust_accuracy"])
def test_the_remedy_of_the_error_works_as_it_stands_there(kind, name):
    model, (x, y) = Wrapped(WRAPPED[kind][0]), batch()
    with pytest.raises(TypeError) as error:
        CALLS[name](model, x, y)
    option, remedy = re.search(r"pass (\w+)=(.*), or a function", str(error.value)).groups()
    torch.manual_seed(0)
    got = CALLS[name](model, x, y, **{option: eval(remedy)})
    torch.manual_seed(0)
    assert torch.equal(torch.as_tensor(got), torch.as_tensor(CALLS[name](model.inner, x, y)))


def test_one_logit_is_no_class_and_predict_says_what_it_means():
    torch.manual_seed(0)
    model, (x, _) = nn.Sequential(nn.Flatten(), nn.Linear(12, 1)), batch(60)
    y = (model(x).view(-1) > 0).long()
    with pytest.raises(ValueError, match=r"robust_accuracy: expected logits .* two classes, .* predict="):
        fr.robust_accuracy(model, (x, y), EPS)
    by_sample = functools.partial(F.binary_cross_entropy_with_logits, reduction="none")
    loss = lambda z, y: by_sample(z.view(-1), y.float())  # noqa: E731
    sign = lambda z: (z.view(-1) > 0).long()  # noqa: E731
    eps, weight = 0.1, model[1].weight.detach().abs().sum()
    want = ((model(x).view(-1).abs()) > eps * weight).float().mean().item()
    got = fr.robust_accuracy(model, (x, y), eps, loss=loss, predict=sign, bounds=None)
    assert 0 < want < 1 and abs(got - want) <= 1 / 60
    assert fr.robust_accuracy(model, (x, y), EPS, restarts=0, predict=sign) == 1


def test_probabilities_and_percentages_are_no_logits():
    model, (x, y) = net(), batch()
    for scale in (1, 100):
        given = lambda x, scale=scale: scale * model(x).softmax(1)  # noqa: E731
        with pytest.raises(ValueError, match=f"robust_accuracy: .* sum to {scale}, as probabilities"):
            fr.robust_accuracy(given, (x, y), EPS, steps=1)
    probabilities = lambda x: model(x).softmax(1)  # noqa: E731
    nll = lambda p, y: F.nll_loss(p.log(), y, reduction="none")  # noqa: E731

    def accuracy(model, **options):
        return fr.robust_accuracy(model, (x, y), EPS, generator=torch.Generator().manual_seed(1), **options)

    assert accuracy(probabilities, loss=nll) == accuracy(model)
    assert accuracy(probabilities, restarts=0) == accuracy(model, restarts=0)
    assert accuracy(lambda x: model(x).log_softmax(1)) == accuracy(model)


# --------------------------------------------------------------------------------------------------
# what loaders yield


def test_batches_that_are_no_pairs_are_refused_with_a_remedy():
    model, (x, y) = net(), batch()
    for data, message in (
        (
            [{"image": x, "label": y}],
            r"must be a pair \(x, y\), got a dict with 'image', 'label'; .*b\['image'\]",
        ),
        (
            [(x, y, y)],
            r"must be a pair \(x, y\), got a tuple of 3; give \(\(x, y\) for x, y, \*_ in loader\)",
        ),
        ([x], r"must be a pair \(x, y\), got Tensor"),
        (x, "data must be a pair .* got Tensor"),
        ({"x": x, "y": y}, "data must be a pair .* got dict"),
        (3, "data must be a pair .* got int"),
        ((x.numpy(), y.numpy()), r"x must be a torch.Tensor, got ndarray; convert it with torch.as_tensor"),
        ((x, y.tolist()), "must be a pair"),
        ((x, y.numpy()), "y must be a torch.Tensor, got ndarray"),
    ):
        with pytest.raises(TypeError, match=f"^robust_accuracy: .*{message}"):
            fr.robust_accuracy(model, data, EPS)
    loader = DataLoader(TensorDataset(x, y, y), batch_size=3)
    got = fr.robust_accuracy(model, ((a, b) for a, b, *_ in loader), EPS, restarts=0)
    assert got == fr.robust_accuracy(model, (x, y), EPS, restarts=0)
    assert got == fr.robust_accuracy(model, [(x[:4], y[:4]), (x[4:], y[4:])], EPS, restarts=0)


def test_labels_that_are_no_classes_are_refused():
    model, (x, y) = net(), batch()
    for wrong in (y[:, None], F.one_hot(y, 3), y.float(), y[:, None].repeat(1, 4), y > 0):
        with pytest.raises(ValueError, match=r"robust_accuracy: y must be class indices \(B,\) or prob"):
            fr.robust_accuracy(model, (x, wrong), EPS)
    with pytest.raises(ValueError, match=r"y must be class indices .* DataLoader"):
        fr.robust_accuracy(model, TensorDataset(x, y), EPS)
    with pytest.raises(ValueError, match=r"must have one shape"):
        fr.robust_accuracy(model, (x, torch.rand(8, 4)), EPS)
    for wrong in (3, -1, 255):
        with pytest.raises(ValueError, match=rf"class indices in \[0, 3\) or -100, got {wrong}; "):
            fr.robust_accuracy(model, (x, y.index_fill(0, torch.tensor([2]), wrong)), EPS)


def test_soft_labels_are_classified_by_their_largest_and_climbed_as_they_are():
    model, (x, _) = net(), batch(60)
    soft = F.one_hot(model(x).argmax(1), 3) * 0.7 + 0.1

    def accuracy(y, **options):
        generator = torch.Generator().manual_seed(1)
        return fr.robust_accuracy(model, (x, y), 0.1, steps=3, restarts=2, generator=generator, **options)

    smoothed = lambda z, y: F.cross_entropy(z, F.one_hot(y, 3) * 0.7 + 0.1, reduction="sum")  # noqa: E731
    assert 0 < accuracy(soft) == accuracy(soft.argmax(1), loss=smoothed) < 1


def test_examples_without_a_label_are_left_out():
    model, (x, y) = net(), batch(60)
    known = torch.rand(60) > 0.4
    marked = y.where(known, -100)

    def accuracy(x, y):
        return fr.robust_accuracy(model, (x, y), EPS, restarts=0, batch_size=7)

    assert accuracy(x, marked) == accuracy(x[known], y[known])
    attacked = fr.robust_accuracy(model, DataLoader(TensorDataset(x, marked), 9), EPS, steps=2)
    assert 0 < attacked <= accuracy(x, marked)
    with pytest.raises(ValueError, match=r"expected examples, got none"):
        accuracy(x, torch.full_like(y, -100))


def test_frozen_models_and_lists_of_numbers_are_refused_by_name():
    model, (x, y) = net().requires_grad_(False), batch()
    with pytest.raises(ValueError, match=r"^adversarial_backward: the loss depends on no parameter"):
        fr.adversarial_backward(model, x, y, EPS)
    for eps in ([0.1, 0.1, 0.1], (0.1, 0.1, 0.1), np.full(3, 0.1)):
        with pytest.raises(
            TypeError, match=r"^fgsm: eps must be a number or a tensor, got .*torch.as_tensor"
        ):
            fr.fgsm(model, x, y, eps)
    assert torch.equal(fr.fgsm(model, x, y, torch.as_tensor([EPS] * 3)), fr.fgsm(model, x, y, EPS))


def test_lazy_models_are_told_to_run_first():
    x, y = batch()
    for name, call in CALLS.items():
        if name != "FreeAdversarial":
            model = nn.Sequential(nn.Flatten(), nn.LazyLinear(3), nn.LazyBatchNorm1d())
            if name.startswith("adversarial"):  # Their first pass is the caller's training.
                call(model, x, y)
                continue
            op = name if name.startswith("robust") else name.split("_")[0]
            with pytest.raises(ValueError, match=f"^{op}: 1.weight of a lazy layer .* run the model once"):
                call(model, x, y)
