"""Every differentiable operator on every way to its derivatives: the value that torch's own operators give,
or one clear error, never a silent zero. docs/derivatives.md shows the table.
"""

import warnings

import pytest
import torch
from derivative_cases import CASES, COMPILED, WAYS, numbers
from helpers import ROOT

import fastreg as fr
from fastreg import _registry

# Operators that are no differentiable function of a tensor, and why.
WITHOUT = {
    "cross_entropy_": "a part of linear_cross_entropy",
    "cross_entropy_scale_": "a part of the backward pass",
    "dropout_apply": "a part of the backward pass",
    "dropout_mask": "draws",
    "augment_backward": "a part of the backward pass",
    "augment_draw": "gives parameters",
    "augment_matrices": "gives parameters",
    "augment_gaussian": "gives parameters",
    "example": "there to be copied",
    "fgsm_step": "a step of an attack, which starts from a detached image",
    "pgd_step": "a step of an attack, which starts from a detached image",
    "adamw_": "a step of an optimiser",
    "sgd_": "a step of an optimiser",
    "sum_of_squares": "a part of the step of an optimiser",
}
# torch's vmap, by which a forward-mode jacobian goes, refuses whatever draws a random number. The sentence is
# torch's.
DRAWS = (
    "dropout",
    "dropout1d",
    "alpha_dropout",
    "feature_alpha_dropout",
    "drop_path",
    "dropout_add",
    "scaled_dot_product_attention",
    "mixup",
)
ERRORS = {(case, "forward-mode jacobian"): "random operations inside of vmap" for case in DRAWS}
PAGE = ROOT / "docs" / "derivatives.md"


def check(case, way, got):
    """Compare with torch's value."""
    want = WAYS[way](CASES[case].torchs, CASES[case].x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12, msg=lambda text: f"{case}, {way}: {text}")
    assert got.abs().max() > 0, f"{case}, {way}: a value of zero shows nothing"


def outcome(case, way):
    """ "✓" or "error", after a comparison with torch's value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if (case, way) in ERRORS:
            with pytest.raises(RuntimeError, match=ERRORS[case, way]):
                WAYS[way](CASES[case].ours, CASES[case].x)
            return "error"
        check(case, way, WAYS[way](CASES[case].ours, CASES[case].x))
    return "✓"


def outcome_compiled(way):
    """The same for all cases at once."""
    like, run = COMPILED[way]
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = run([case.ours for case in CASES.values()], [case.x for case in CASES.values()])
        for case, got in zip(CASES, results, strict=True):
            check(case, like, got)
    torch._dynamo.reset()
    return "✓"


@pytest.mark.parametrize("case", CASES)
def test_the_value_or_a_clear_error(case):
    found = {way: outcome(case, way) for way in WAYS} | dict.fromkeys(COMPILED, "✓")
    assert table_row(case, found) in PAGE.read_text().splitlines(), "run python tests/derivatives_table.py"


@pytest.mark.parametrize("way", COMPILED)
def test_the_value_where_it_is_compiled(way):
    outcome_compiled(way)


def table_row(case, found):
    return f"| {case} | " + " | ".join(found[way] for way in (*WAYS, *COMPILED)) + " |"


def test_no_operator_is_forgotten():
    covered = {case.split(",")[0] for case in CASES}
    ops = {name for name in _registry.declared() if name.rstrip("_") == name or name in WITHOUT}
    assert ops <= covered | set(WITHOUT), ops - covered - set(WITHOUT)
    assert not covered & set(WITHOUT)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_gradients_of_samples(randomness):
    """As for differential privacy: the gradient of each sample's loss, with dropout in the model."""
    weight, x, target = numbers(3, 5), numbers(6, 5, seed=1), torch.tensor([0, 1, 2, 0, 1, 2])

    def loss(weight, x, target):
        return fr.cross_entropy(fr.dropout(x, 0.5) @ weight.t(), target)

    torch.manual_seed(3)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness=randomness)
    gradients = each(weight, x, target)
    kept = (gradients != 0).any(1)  # an input that is dropped leaves its column without a gradient
    masks = {tuple(row.tolist()) for row in kept}
    assert len(masks) == 1 if randomness == "same" else len(masks) > 1
    for gradient, row, t, k in zip(gradients, x, target, kept, strict=True):
        leaf = weight.clone().requires_grad_()
        torch.nn.functional.cross_entropy((row * k / 0.5) @ leaf.t(), t).backward()
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-9, atol=1e-12)


def test_a_class_out_of_range_is_refused_where_values_can_be_seen():
    with pytest.raises(ValueError, match=r"target must be in \[0, 5\).*got 9 at element 1"):
        torch.func.grad(lambda x: fr.cross_entropy(x, torch.tensor([0, 9, 1, 2])))(numbers(4, 5))
