"""Wrong arguments of cross-entropy are errors that name the op, what was expected and what came."""

import numpy
import pytest
import torch
from cross_entropy_reference import INF

import fastreg as fr


def x24():
    return torch.randn(2, 4)


T2 = torch.tensor([0, 1])
WRONG = {
    "class too large": (
        ValueError,
        r"target must be in \[0, 4\).*got 4 at element 1",
        lambda: (x24(), torch.tensor([0, 4])),
        {},
    ),
    "class negative": (ValueError, r"got -1 at element 0", lambda: (x24(), torch.tensor([-1, 0])), {}),
    "class far": (ValueError, "target must be in", lambda: (x24(), torch.tensor([0, 2**40])), {}),
    "int8 -100 is ignore_index, uint8 156 is not": (
        ValueError,
        "got 156",
        lambda: (x24(), torch.tensor([0, 156], dtype=torch.uint8)),
        {},
    ),
    "batch sizes": (
        ValueError,
        r"target must have shape \(2,\).*got \(3,\)",
        lambda: (x24(), torch.tensor([0, 1, 2])),
        {},
    ),
    "spatial sizes": (
        ValueError,
        "target must have shape",
        lambda: (torch.randn(2, 4, 3), torch.zeros(2, 4).long()),
        {},
    ),
    "labels in a column of floats": (
        ValueError,
        r"got \(2, 1\); class indices must be int64 of shape \(2,\), convert them with \.long\(\)",
        lambda: (x24(), torch.zeros(2, 1)),
        {},
    ),
    "target like probabilities, but int": (
        ValueError,
        "target must have shape",
        lambda: (x24(), torch.zeros(2, 4).long()),
        {},
    ),
    "float indices": (ValueError, r"int64.*\.long\(\)", lambda: (x24(), torch.tensor([0.0, 1.0])), {}),
    "one index for a batch": (ValueError, "target must have shape", lambda: (x24(), torch.tensor(1)), {}),
    "indices for one row": (
        ValueError,
        r"target must have shape \(\)",
        lambda: (torch.randn(4), torch.tensor([1])),
        {},
    ),
    "soft shape": (ValueError, "target must have shape", lambda: (x24(), torch.rand(2, 5)), {}),
    "bool target": (TypeError, "got torch.bool", lambda: (x24(), torch.tensor([True, False])), {}),
    "bool mask": (TypeError, "got torch.bool", lambda: (x24(), torch.ones(2, 4).bool()), {}),
    "complex target": (TypeError, "got torch.complex64", lambda: (x24(), torch.ones(2, 4).cfloat()), {}),
    "integer logits": (ValueError, r"got torch.int64; .*\.float\(\)", lambda: (x24().long(), T2), {}),
    "complex logits": (ValueError, "got torch.complex64", lambda: (x24().cfloat(), T2), {}),
    "float8 logits": (ValueError, "got torch.float8", lambda: (x24().to(torch.float8_e5m2), T2), {}),
    "no dimension": (ValueError, "without dimensions", lambda: (torch.tensor(1.0), torch.tensor(0)), {}),
    "no class": (ValueError, "at least one class", lambda: (torch.randn(2, 0), T2), {}),
    "input no tensor": (TypeError, "input must be a torch.Tensor, got list", lambda: ([[1.0, 2.0]], T2), {}),
    "target no tensor": (TypeError, "target must be a torch.Tensor, got list", lambda: (x24(), [0, 1]), {}),
    "weight no tensor": (
        TypeError,
        "weight must be a torch.Tensor",
        lambda: (x24(), T2),
        dict(weight=[1.0] * 4),
    ),
    "weight length": (
        ValueError,
        r"shape \(4,\), got \(5,\)",
        lambda: (x24(), T2),
        dict(weight=torch.ones(5)),
    ),
    "weight matrix": (
        ValueError,
        "weight must have one value",
        lambda: (x24(), T2),
        dict(weight=torch.ones(4, 1)),
    ),
    "weight int": (TypeError, "got torch.int64", lambda: (x24(), T2), dict(weight=torch.ones(4).long())),
    "weight complex": (
        TypeError,
        "got torch.complex64",
        lambda: (x24(), T2),
        dict(weight=torch.ones(4).cfloat()),
    ),
    "weight learned": (
        ValueError,
        "detach",
        lambda: (x24(), T2),
        dict(weight=torch.ones(4, requires_grad=True)),
    ),
    "target elsewhere": (
        ValueError,
        "target must be on cpu",
        lambda: (x24(), torch.zeros(2, device="meta").long()),
        {},
    ),
    "weight elsewhere": (
        ValueError,
        "weight must be on cpu",
        lambda: (x24(), T2),
        dict(weight=torch.ones(4, device="meta")),
    ),
    "smoothing NaN": (
        ValueError,
        "label_smoothing must be in",
        lambda: (x24(), T2),
        dict(label_smoothing=float("nan")),
    ),
    "smoothing negative": (
        ValueError,
        "label_smoothing must be in",
        lambda: (x24(), T2),
        dict(label_smoothing=-0.1),
    ),
    "smoothing 2": (
        ValueError,
        r"label_smoothing must be in \[0, 1\], got 2",
        lambda: (x24(), T2),
        dict(label_smoothing=2),
    ),
    "smoothing text": (
        TypeError,
        "label_smoothing must be a number",
        lambda: (x24(), T2),
        dict(label_smoothing="0.1"),
    ),
    "reduction": (
        ValueError,
        "reduction must be one of 'none', 'mean', 'sum'",
        lambda: (x24(), T2),
        dict(reduction="avg"),
    ),
    "smoothing kind": (ValueError, "smoothing must be one of", lambda: (x24(), T2), dict(smoothing="other")),
    "all_ignored": (
        ValueError,
        "all_ignored must be one of",
        lambda: (x24(), T2),
        dict(all_ignored="ignore"),
    ),
    "others alone": (
        ValueError,
        "at least two classes",
        lambda: (torch.randn(2, 1), torch.zeros(2).long()),
        dict(smoothing="others", label_smoothing=0.1),
    ),
    "z_loss negative": (ValueError, "z_loss must be", lambda: (x24(), T2), dict(z_loss=-1e-4)),
    "z_loss inf": (ValueError, "z_loss must be", lambda: (x24(), T2), dict(z_loss=INF)),
    "z_loss NaN": (ValueError, "z_loss must be", lambda: (x24(), T2), dict(z_loss=float("nan"))),
    "ignored class of probabilities": (
        ValueError,
        "ignore_index must be negative",
        lambda: (x24(), torch.rand(2, 4)),
        dict(ignore_index=2),
    ),
    "ignore_index float": (
        TypeError,
        "ignore_index must be an int",
        lambda: (x24(), T2),
        dict(ignore_index=1.5),
    ),
    "loss_dtype": (ValueError, "loss_dtype must be", lambda: (x24(), T2), dict(loss_dtype=torch.float16)),
    "loss_dtype int": (ValueError, "loss_dtype must be", lambda: (x24(), T2), dict(loss_dtype=torch.int32)),
}


@pytest.mark.parametrize("requires_grad", (False, True), ids=("", "grad"))
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name, requires_grad):
    error, message, arguments, options = WRONG[name]
    x, target = arguments()
    if requires_grad and isinstance(x, torch.Tensor) and x.is_floating_point():
        x.requires_grad_()
    with pytest.raises(error, match=message) as caught:
        fr.cross_entropy(x, target, **options)
    assert str(caught.value).startswith("cross_entropy: ")


def test_wrong_probabilities_that_want_a_gradient():
    soft = torch.rand(2, 4, requires_grad=True)
    with pytest.raises(ValueError, match="loss_dtype must be"):
        fr.cross_entropy(x24(), soft, loss_dtype=torch.int32)
    with pytest.raises(ValueError, match="input must be float32"):
        fr.cross_entropy(x24().long(), soft)


def test_the_raw_operator_checks_for_itself():
    op = torch.ops.fastreg.cross_entropy.default
    for arguments, message in (
        ((torch.randn(4), torch.tensor(0)), r"\(N, C, ...\)"),
        ((x24(), torch.tensor([0, 1, 2])), "class indices"),
        ((x24(), torch.rand(2, 5)), "shape of input"),
        ((x24(), T2, torch.ones(3)), "weight must have one value"),
        ((x24(), T2, torch.ones(4).double()), "weight must"),
        ((x24(), T2, None, 1, -100, 1.5), "label_smoothing"),
        ((x24(), T2, None, 1, -100, 0.0, False, -1.0), "z_loss"),
        ((torch.randn(2, 4, 3, 2).transpose(2, 3), torch.zeros(2, 2, 3).long()), "merge"),
        ((x24(), torch.tensor([0, 9])), "target must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*arguments)


@pytest.mark.parametrize(
    "value", [torch.tensor(1), torch.tensor([1]), numpy.array(1), numpy.int64(1)], ids=repr
)
def test_ignore_index_is_any_integer_that_torch_takes(value):
    x = torch.randn(2, 4)
    expected = torch.nn.functional.cross_entropy(x, T2, ignore_index=value)
    torch.testing.assert_close(fr.cross_entropy(x, T2, ignore_index=value), expected)


def test_ignore_index_that_torch_refuses():
    for value in (torch.tensor([1, 2]), torch.tensor(True), numpy.array([1.5])):
        with pytest.raises(TypeError, match="ignore_index must be an int"):
            fr.cross_entropy(x24(), T2, ignore_index=value)


def test_errors_are_of_torchs_type_by_name():
    two = torch.tensor([0.5, 0.5])
    for function in (fr.dropout, torch.nn.functional.dropout):
        with pytest.raises(RuntimeError):
            function(torch.ones(3), two)
    x = x24().to(torch.float8_e4m3fn)
    for function in (fr.cross_entropy, torch.nn.functional.cross_entropy):
        with pytest.raises(NotImplementedError):
            function(x, torch.ones(2, 4))
