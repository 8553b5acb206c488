"""Every differentiable operator and every way to its derivatives, for tests/test_derivatives.py and
docs/derivatives.md.

A case is a function of one float64 tensor that gives one number, the same function in torch's operators, and
a tensor. A way is a function of a case's function and tensor that gives a tensor, or raises.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.autograd.forward_ad as forward
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.functional import hessian as double_backward_hessian
from torch.autograd.functional import jacobian as backward_jacobian
from torch.compiler import is_compiling
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fastreg as fr
from fastreg import _attention
from fastreg.augment import functional as A

Function = Callable[[Tensor], Tensor]


class Case(NamedTuple):
    ours: Function
    torchs: Function
    x: Tensor


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squares(x: Tensor) -> Tensor:
    return x.pow(2).sum()


def drawn(function: Callable[..., Tensor], *shape: int, **options: Any) -> tuple[Tensor, Tensor]:
    """(factor, shift) of a dropout of ours, which is linear, for the seed that `seeded` gives it."""
    zero = function(torch.zeros(shape, dtype=torch.float64), 0.3, seed=7, **options)
    one = function(torch.ones(shape, dtype=torch.float64), 0.3, seed=7, **options)
    return one - zero, zero


def with_mask(x: Tensor, p: float, seed: int) -> Tensor:
    return fr.dropout_with_mask(x, p, seed=seed)[0]


def seeded(name: str) -> Callable[..., Tensor]:
    """A function of fastreg that draws from a generator, as one that takes a seed."""

    def run(x: Tensor, p: float, seed: int, **options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return getattr(fr, name)(x, p, **options, training=True, generator=generator)

    return run


def added(x: Tensor, p: float, seed: int) -> Tensor:
    return fr.dropout_add(x, RESIDUAL, p, training=True, generator=torch.Generator().manual_seed(seed))


def dropout_case(function: Callable[..., Tensor], *shape: int) -> Case:
    factor, shift = drawn(function, *shape)
    return Case(
        lambda x: squares(function(x, 0.3, seed=7)), lambda x: squares(x * factor + shift), numbers(*shape)
    )


LOGITS, CLASSES, WEIGHT = numbers(4, 5), torch.tensor([0, 4, -100, 3]), numbers(5, seed=1).abs()
HIDDEN, LAYER, BIAS = numbers(4, 3, seed=2), numbers(5, 3, seed=3), numbers(5, seed=4)
SOFT = numbers(4, 5, seed=5).softmax(1)
IMAGES = numbers(1, 3, 4, 5, seed=6).sigmoid()
RESIDUAL = numbers(4, 5, seed=8)


def loss_case(*target: Any, x: Tensor = LOGITS, **options: Any) -> Case:
    return Case(
        lambda x: fr.cross_entropy(x, *target, **options), lambda x: F.cross_entropy(x, *target, **options), x
    )


def others(x: Tensor) -> Tensor:
    """Smoothing over the other classes, with z_loss."""
    log_p, kept = x.log_softmax(1), CLASSES != -100
    one_hot = F.one_hot(CLASSES.clamp(min=0), 5).double()
    q = 0.9 * one_hot + 0.1 / 4 * (1 - one_hot)
    return ((-(q * log_p).sum(1) + 0.1 * x.logsumexp(1) ** 2) * kept).sum() / kept.sum()


def layer_case(name: str, x: Tensor) -> Case:
    def layer(t: Tensor) -> dict[str, Tensor]:
        return {"hidden": HIDDEN, "weight": LAYER, "bias": BIAS, name: t}

    def torchs(t: Tensor) -> Tensor:
        parts = layer(t)
        logits = F.linear(parts["hidden"], parts["weight"], parts["bias"])
        return F.cross_entropy(logits, CLASSES, label_smoothing=0.1)

    return Case(lambda t: fr.linear_cross_entropy(**layer(t), target=CLASSES, label_smoothing=0.1), torchs, x)


def dependent_layer(loss: Callable[..., Tensor]) -> Function:
    """A loss of a hidden state that was computed from the weight, as an embedding's is that is tied to it."""
    return lambda x: loss(x.sin(), x, CLASSES.clamp(0, 3), x[:, 0])


def loss_of_layer(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), target)


def with_first_seed() -> torch.Generator | None:
    """A generator for what draws, in compiled code. Elsewhere torch's own begins anew: without a generator
    of the caller's an op may run in C++.
    """
    if is_compiling():
        return torch.Generator().manual_seed(7)
    torch.manual_seed(7)
    return None


def attention_case(
    x: Tensor,
    parts: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    mask: Callable[[Tensor], Tensor | None] = lambda x: None,
    by_blocks: bool = False,
    **options: bool,
) -> Case:
    """Attention with dropout of its weights, of `parts(x)`, which are query, key and value, and `mask(x)`. A
    query that may see no key gives 0. by_blocks: as where there are too many weights to be held.
    """

    def ours(x: Tensor) -> Tensor:
        generator, few = with_first_seed(), -1 if by_blocks else _attention._FEW
        with contextlib.nullcontext() if is_compiling() else mock.patch.object(_attention, "_FEW", few):
            return squares(
                fr.scaled_dot_product_attention(
                    *parts(x), mask(x), dropout_p=0.3, generator=generator, **options
                )
            )

    def torchs(x: Tensor) -> Tensor:
        query, key, value = parts(x)
        if options.get("enable_gqa"):
            key, value = (t.repeat_interleave(len(query) // len(t), 0) for t in (key, value))
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        allowed = torch.ones(scores.shape, dtype=torch.bool)
        allowed = allowed.tril() if options.get("is_causal") else allowed
        given = mask(x)
        if given is not None and given.dtype == torch.bool:
            allowed = allowed & given
        elif given is not None:
            scores = scores + given
        sees = allowed.any(-1, keepdim=True)
        weights = scores.masked_fill(~allowed & sees, -torch.inf).softmax(-1) * sees
        return squares(weights * drawn(seeded("dropout"), *scores.shape)[0] @ value)

    return Case(ours, torchs, x)


def of_one(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x, x.sin(), x.cos()


def shared_heads(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Four heads of query, two of key and value."""
    return x, x[:2].sin(), x[2:].cos()


# The first query sees no key.
SEES = torch.tensor([[False, False, False], [True, False, True], [True, True, True]])
TOKENS, HEADS = numbers(2, 3, 4, seed=10), numbers(4, 3, 2, seed=12)


def added_scores(x: Tensor) -> Tensor:
    """A mask for all heads and queries, which depends on x as the other arguments do."""
    return x[0, :, 0]


def pseudo_labels(x: Tensor) -> Tensor:
    confidence, label = (3 * RESIDUAL).softmax(1).max(1)
    rows = F.cross_entropy(x, label, reduction="none")
    return (rows * (confidence >= 0.5)).sum() / len(x)


def rotated_grid(x: Tensor) -> Tensor:
    """torch's grid_sample by fastreg's matrix would be a second implementation; here it is the linear map."""
    return squares(torch.einsum("oi,i->o", ROTATION, x.flatten()))


def linear_map(function: Function, *shape: int) -> Tensor:
    """The matrix of a linear function of images."""
    size = torch.Size(shape).numel()
    basis = torch.eye(size, dtype=torch.float64).view(size, *shape)
    return torch.stack([function(one).flatten() for one in basis], 1)


ROTATION = linear_map(lambda x: A.rotate(x, 13.0), *IMAGES.shape)
BLUR = linear_map(lambda x: A.gaussian_blur(x, 3), *IMAGES.shape)

PAIR = numbers(2, 1, 2, 3, seed=9)


def mixup_of(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return fr.augment.mixup(x, torch.tensor([0, 1]), num_classes=2, generator=generator)[0]


def mixed(x: Tensor) -> Tensor:
    return squares(mixup_of(x))


MIXUP = linear_map(mixup_of, *PAIR.shape)

# The names of operators that the case goes through; tests/test_derivatives.py asks that none is forgotten.
CASES: dict[str, Case] = {
    "dropout": dropout_case(seeded("dropout"), 4, 5),
    "dropout_with_mask": dropout_case(with_mask, 4, 5),
    "dropout1d": dropout_case(seeded("dropout1d"), 2, 3, 4),
    "alpha_dropout": dropout_case(seeded("alpha_dropout"), 4, 5),
    "feature_alpha_dropout": dropout_case(seeded("feature_alpha_dropout"), 2, 3, 4),
    "drop_path": dropout_case(seeded("drop_path"), 4, 5),
    "dropout_add": dropout_case(added, 4, 5),
    "scaled_dot_product_attention": attention_case(TOKENS, of_one),
    "scaled_dot_product_attention, causal": attention_case(TOKENS, of_one, is_causal=True),
    "scaled_dot_product_attention, boolean mask": attention_case(TOKENS, of_one, lambda x: SEES),
    "scaled_dot_product_attention, added mask": attention_case(
        TOKENS, of_one, lambda x: x[..., :3] * SEES[1:2]
    ),
    "scaled_dot_product_attention, to a mask that broadcasts": attention_case(
        numbers(1, 3, seed=13), lambda x: of_one(TOKENS), lambda x: x
    ),
    "scaled_dot_product_attention, shared heads": attention_case(
        HEADS, shared_heads, lambda x: SEES, enable_gqa=True
    ),
    "scaled_dot_product_attention, by blocks": attention_case(TOKENS, of_one, added_scores, by_blocks=True),
    "scaled_dot_product_attention, shared heads by blocks": attention_case(
        HEADS, shared_heads, by_blocks=True, is_causal=True, enable_gqa=True
    ),
    "cross_entropy": loss_case(CLASSES, WEIGHT, label_smoothing=0.1),
    "cross_entropy, sum of pixels": loss_case(
        torch.tensor([[[0, 4]], [[2, -100]]]), reduction="sum", x=numbers(2, 5, 1, 2)
    ),
    "cross_entropy, probabilities": loss_case(SOFT),
    "cross_entropy, others and z_loss": Case(
        lambda x: fr.cross_entropy(x, CLASSES, label_smoothing=0.1, smoothing="others", z_loss=0.1),
        others,
        LOGITS,
    ),
    "cross_entropy, to the probabilities": Case(
        lambda q: squares(fr.cross_entropy(LOGITS, q)), lambda q: squares(F.cross_entropy(LOGITS, q)), SOFT
    ),
    "linear_cross_entropy": layer_case("hidden", HIDDEN),
    "linear_cross_entropy, to the weight": layer_case("weight", LAYER),
    "linear_cross_entropy, to the bias": layer_case("bias", BIAS),
    "linear_cross_entropy, to a tied weight": Case(
        dependent_layer(fr.linear_cross_entropy), dependent_layer(loss_of_layer), LOGITS
    ),
    "pseudo_label_loss": Case(
        lambda x: fr.pseudo_label_loss(x, 3 * RESIDUAL, threshold=0.5), pseudo_labels, LOGITS
    ),
    "augment, geometry": Case(lambda x: squares(A.rotate(x, 13.0)), rotated_grid, IMAGES),
    "augment, colours": Case(
        lambda x: squares(A.adjust_brightness(x, 0.7)), lambda x: squares((0.7 * x).clamp(0, 1)), IMAGES
    ),
    "mixup": Case(mixed, lambda x: squares(MIXUP @ x.flatten()), PAIR),
    "penalty": Case(
        lambda x: fr.optim.penalty([x], l1=0.3, l2=0.7),
        lambda x: 0.3 * x.abs().sum() + 0.35 * squares(x),
        LOGITS,
    ),
    "augment, blur": Case(
        lambda x: squares(A.gaussian_blur(x, 3)), lambda x: squares(BLUR @ x.flatten()), IMAGES
    ),
}


def seed_first(x: Tensor) -> Tensor:
    """The direction of a directional derivative."""
    return numbers(*x.shape, seed=11)


def backward(f: Function, x: Tensor) -> Tensor:
    return torch.autograd.grad(f(leaf := x.clone().requires_grad_()), leaf)[0]


def grad_of_grad(f: Function, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    return torch.autograd.grad((first * seed_first(x)).sum(), leaf)[0]


def batched(f: Function, x: Tensor) -> Tensor:
    leaf, factors = x.clone().requires_grad_(), torch.tensor([1.0, 2.0, -1.0], dtype=x.dtype)
    return torch.autograd.grad(f(leaf), leaf, factors, is_grads_batched=True)[0]


def batched_by_vmap(f: Function, x: Tensor) -> Tensor:
    """As `batched`, by torch.func.vmap of a backward pass."""
    leaf, factors = x.clone().requires_grad_(), torch.tensor([1.0, 2.0, -1.0], dtype=x.dtype)
    value = f(leaf)
    return vmap(lambda factor: torch.autograd.grad(value, leaf, factor)[0])(factors)


def recorded(f: Function, x: Tensor) -> Tensor:
    """A graph of a backward pass alone, which must not keep the factor that it was recorded with."""
    leaf, factor = x.clone().requires_grad_(), torch.tensor(2.0, dtype=x.dtype)
    value = f(leaf)
    graph = make_fx(lambda factor: torch.autograd.grad(value, leaf, factor)[0])(factor)
    return graph(3 * factor)


def dual(f: Function, x: Tensor) -> Tensor:
    with forward.dual_level():
        tangent = forward.unpack_dual(f(forward.make_dual(x, seed_first(x)))).tangent
        assert tangent is not None, "the tangent was dropped"
        return tangent


def directional(f: Function, x: Tensor) -> Tensor:
    return jvp(f, (x,), (seed_first(x),))[1]


def in_checkpoint(use_reentrant: bool, times: int = 1) -> Callable[[Function, Tensor], Tensor]:
    def run(f: Function, x: Tensor) -> Tensor:
        leaf, inner = x.clone().requires_grad_(), f
        for _ in range(times):
            inner = lambda x, f=inner: checkpoint(f, x, use_reentrant=use_reentrant)  # noqa: E731
        inner(leaf).backward()
        assert leaf.grad is not None
        return leaf.grad

    return run


def second_in_checkpoint(f: Function, x: Tensor) -> Tensor:
    return grad_of_grad(lambda x: checkpoint(f, x, use_reentrant=False), x)


def under_anomaly(f: Function, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            return backward(f, x)


def without_a_graph(f: Function, x: Tensor) -> Tensor:
    with torch.no_grad():
        value = f(x.clone().requires_grad_())
    assert not value.requires_grad
    return value


def of_samples(
    way: Callable[[Function, Tensor], Tensor], randomness: str
) -> Callable[[Function, Tensor], Tensor]:
    def run(f: Function, x: Tensor) -> Tensor:
        return vmap(lambda x: way(f, x), randomness=randomness)(torch.stack([x, 0.5 * x]))

    return run


WAYS: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "backward": backward,
    "grad of grad": grad_of_grad,
    "batched gradients": batched,
    "vmap of a backward pass": batched_by_vmap,
    "recorded backward": recorded,
    "vectorised jacobian": lambda f, x: backward_jacobian(f, x, vectorize=True),
    "forward-mode jacobian": lambda f, x: backward_jacobian(f, x, vectorize=True, strategy="forward-mode"),
    "hessian": double_backward_hessian,
    "dual tensors": dual,
    "func.grad": lambda f, x: grad(f)(x),
    "func.vjp": lambda f, x: vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0],
    "func.jvp": directional,
    "func.jacrev": lambda f, x: jacrev(f)(x),
    "func.jacfwd": lambda f, x: jacfwd(f, randomness="same")(x),
    "func.hessian": lambda f, x: jacfwd(jacrev(f), randomness="same")(x),
    "vmap": of_samples(lambda f, x: f(x), "same"),
    "vmap of grad": of_samples(lambda f, x: grad(f)(x), "same"),
    "checkpoint": in_checkpoint(False),
    "reentrant checkpoint": in_checkpoint(True),
    "checkpoint in a checkpoint": in_checkpoint(False, 2),
    "grad of grad in a checkpoint": second_in_checkpoint,
    "anomaly mode": under_anomaly,
    "no_grad": without_a_graph,
}


Together = Callable[[list[Function], list[Tensor]], list[Tensor]]


def of_compiled(backend: str) -> Together:
    """Backward passes of compiled functions."""

    def run(functions: list[Function], xs: list[Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in xs]
        forward = torch.compile(
            lambda xs: [f(x) for f, x in zip(functions, xs, strict=True)], backend=backend
        )
        return list(torch.autograd.grad(sum(forward(leaves)), leaves))

    return run


def compiled(way: Callable[[Function, Tensor], Tensor], backend: str) -> Together:
    """A transform inside of compiled code."""

    def run(functions: list[Function], xs: list[Tensor]) -> list[Tensor]:
        return torch.compile(
            lambda xs: [way(f, x) for f, x in zip(functions, xs, strict=True)], backend=backend
        )(xs)

    return run


# Many functions in one: to compile each alone would take minutes.
COMPILED: dict[str, tuple[str, Together]] = {  # with the way that gives the same eagerly
    "compiled, eager": ("backward", of_compiled("eager")),
    "compiled, aot_eager": ("backward", of_compiled("aot_eager")),
    "compiled, inductor": ("backward", of_compiled("inductor")),
    "compiled func.grad": ("func.grad", compiled(WAYS["func.grad"], "aot_eager")),
    "compiled func.jvp": ("func.jvp", compiled(WAYS["func.jvp"], "aot_eager")),
    "compiled func.hessian": ("func.hessian", compiled(WAYS["func.hessian"], "aot_eager")),
    "compiled vmap of grad": ("vmap of grad", compiled(WAYS["vmap of grad"], "aot_eager")),
}
