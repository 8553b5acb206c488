"""Every differentiable operator on every way to its derivatives: the value that torch's own operators give,
or one clear error, never a silent zero. docs/derivatives.md shows the table.
"""

import importlib
import warnings

import pytest
import torch
from derivative_cases import CASES, COMPILED, WAYS, numbers
from helpers import ROOT

import fastreg as fr
from fastreg import _registry

# Operators that are no differentiable function of a tensor, and why, as property_cases_<op>.py says.
WITHOUT = {}
for path in sorted((ROOT / "tests").glob("property_cases_*.py")):
    WITHOUT |= getattr(importlib.import_module(path.stem), "WITHOUT_DERIVATIVE", {})
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
ERRORS = {
    (case, "forward-mode jacobian"): "random operations inside of vmap"
    for case in CASES
    if case.split(",")[0] in DRAWS
}
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


A = fr.augment.functional
IMAGES = numbers(2, 3, 4, 4).sigmoid()
SOFT = numbers(4, 5, seed=3).softmax(1)
TARGET = torch.tensor([0, 4, 1, 2])
# Tensors that an op takes as constants: {what: (a function of it, its value)}.
CONSTANTS = {
    "class weights": (lambda t: fr.cross_entropy(numbers(4, 5), TARGET, t), SOFT[0]),
    "class weights, probabilities": (lambda t: fr.cross_entropy(numbers(4, 5), SOFT, t), SOFT[0]),
    "label_smoothing": (
        lambda t: fr.cross_entropy(numbers(4, 5), TARGET, label_smoothing=t),
        torch.tensor(0.1),
    ),
    "z_loss": (lambda t: fr.cross_entropy(numbers(4, 5), TARGET, z_loss=t), torch.tensor(0.1)),
    "probabilities": (lambda t: fr.linear_cross_entropy(numbers(4, 3), numbers(5, 3), t), SOFT),
    "class weights of a layer": (
        lambda t: fr.linear_cross_entropy(numbers(4, 3), numbers(5, 3), TARGET, class_weight=t),
        SOFT[0],
    ),
    "p": (lambda t: fr.dropout(numbers(4, 5), t).sum(), torch.tensor(0.3)),
    "p of a path": (lambda t: fr.drop_path(numbers(4, 5), t).sum(), torch.tensor(0.3)),
    "scale": (
        lambda t: fr.scaled_dot_product_attention(*[numbers(2, 4, 5)] * 3, None, 0.3, scale=t).sum(),
        torch.tensor(0.3),
    ),
    "angle": (lambda t: A.rotate(IMAGES, t).sum(), torch.tensor([10.0, 20.0])),
    "brightness": (lambda t: A.adjust_brightness(IMAGES, t).sum(), torch.tensor(0.7)),
    "mean": (lambda t: A.normalize(IMAGES, t, 0.5).sum(), torch.tensor([0.5, 0.4, 0.3])),
    "std": (lambda t: A.normalize(IMAGES, 0.5, t).sum(), torch.tensor([0.5, 0.4, 0.3])),
    "equalized images": (lambda t: A.equalize(t).sum(), IMAGES),
}


@pytest.mark.parametrize("way", ["backward", "func.grad", "func.jvp", "dual tensors"])
@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_has_no_derivative_and_says_so(name, way):
    function, value = CONSTANTS[name]
    value = value.clone().requires_grad_() if way == "backward" else value
    with pytest.raises((ValueError, TypeError), match=r"must|no gradient"):
        (function if way == "backward" else lambda t: WAYS[way](function, t))(value)


def test_constants_beside_a_derivative():
    """Also where torch computes many at once, of which it knows no tangent."""
    x, weights = numbers(4, 5), SOFT[:2]

    def both(loss):
        def total(x):
            return torch.func.vmap(lambda w: loss(x, TARGET, w))(weights).sum()

        return torch.func.jvp(total, (x,), (numbers(4, 5, seed=2),))[1]

    want = both(torch.nn.functional.cross_entropy)
    torch.testing.assert_close(both(fr.cross_entropy), want, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        fr.linear_cross_entropy(numbers(4, 3), numbers(5, 3), SOFT.clone().requires_grad_())


# Arguments of every function of images at which no pixel lies where two formulas meet.
FUNCTIONS_OF_IMAGES = {
    "adjust_brightness": (0.7,),
    "adjust_contrast": (0.8,),
    "adjust_saturation": (0.8,),
    "adjust_sharpness": (0.7,),
    "affine": (13.0, (1.0, 0.5), 0.9, (3.0, 0.0), "bilinear"),
    "autocontrast": (),
    "erase": (1, 1, 2, 2, 0.3),
    "gaussian_blur": (3,),
    "horizontal_flip": (),
    "invert": (),
    "normalize": ((0.4, 0.5, 0.6), 0.2),
    "posterize": (2,),
    "resized_crop": (1, 1, 3, 2, 4),
    "rgb_to_grayscale": (),
    "rotate": (13.0,),
    "solarize": (0.5,),
    "vertical_flip": (),
    "vertical_stretch": (1.2,),
}
WITHOUT_GRADIENT = {"adjust_hue": (0.1,), "equalize": ()}  # at least backwards, and they say so


@pytest.mark.parametrize("name", FUNCTIONS_OF_IMAGES)
def test_functions_of_images(name):
    """On each way the difference quotient; posterize, which is constant in between, has the derivative 0."""
    x = torch.randperm(2 * 3 * 4 * 5, generator=torch.Generator().manual_seed(1)).double()
    x = x.view(2, 3, 4, 5) / 160 + 0.11
    v = numbers(*x.shape, seed=11)  # as `WAYS` have it

    def function(x):
        return getattr(A, name)(x, *FUNCTIONS_OF_IMAGES[name]).pow(2).sum()

    want = (function(x + 1e-6 * v) - function(x - 1e-6 * v)) / 2e-6
    assert want.abs() > 0.1 or (name == "posterize" and want == 0)
    close = dict(rtol=1e-6, atol=1e-7)
    for way in ("func.jvp", "dual tensors"):
        torch.testing.assert_close(WAYS[way](function, x), want, **close)
    for way in ("backward", "func.grad", "func.vjp", "func.jacrev", "checkpoint", "reentrant checkpoint"):
        torch.testing.assert_close((WAYS[way](function, x) * v).sum(), want, **close)
    gradient = WAYS["func.grad"]
    torch.testing.assert_close(WAYS["vmap of grad"](function, x)[0], gradient(function, x))
    if want == 0:  # a gradient that is constant has no graph, as of torch's floor
        return
    second = (gradient(function, x + 1e-6 * v) - gradient(function, x - 1e-6 * v)) / 2e-6
    torch.testing.assert_close(WAYS["grad of grad"](function, x), second, **close)


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_functions_of_images_without_a_gradient(name):
    with pytest.raises(ValueError, match=r"(has|have) no gradient"):
        WAYS["backward"](lambda x: getattr(A, name)(x, *WITHOUT_GRADIENT[name]).sum(), IMAGES)


def test_no_function_of_images_is_forgotten():
    assert set(A.__all__) == set(FUNCTIONS_OF_IMAGES) | set(WITHOUT_GRADIENT)
