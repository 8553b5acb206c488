"""Policies: each sample draws operations and their strengths, as TrivialAugmentWide (Müller, Hutter 2021) and
RandAugment (Cubuk, Zoph, Shlens, Le 2020) do.

Names, strengths and pixels of the operations are torchvision's. A sample pays only for what it drew: one
operator has the steps that change values, a step for each sample (_tone_op.py), and those that move pixels
are resampled by the fused pass.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from .._checks import check_count, check_number
from .._registry import define_kernel
from .._transforms import is_hidden
from . import _op, _tones
from ._geometry import Geometry
from ._op import Interpolation
from ._params import Params, Settings, policy_outside
from ._plain import picked
from ._plain_draw import number_dtype
from ._tone_op import GEOMETRIC, OPERATIONS, toned

SIGNED = 9  # those from the second to this one have a sign
_DRAWN = len(OPERATIONS) - 1
# The numbers of a sample's Philox draws: one for each step that is on by chance, and from the last on one for
# each round. csrc/augment/augment_draw.h takes those before them.
GREY_DRAW, JITTER_DRAW, BLUR_DRAW, _FIRST_ROUND_DRAW = 44, 45, 46, 48


@dataclasses.dataclass(frozen=True)
class Policy:
    """What samples draw from. A sample draws `rounds` operations, which follow one another. Each has `bins`
    strengths, of which number `magnitude` is taken; where that is None one is drawn.
    """

    rounds: int
    magnitude: int | None
    bins: int
    interpolation: Interpolation = "nearest"
    fill: float | tuple[float, ...] | None = None

    def strengths(self, height: int, width: int) -> Tensor:
        """(operations, bins) float64: the strengths of each operation, without a sign. They are computed in
        float32, as torchvision's tables are.

        A strength is a slope of shears, pixels of translations, degrees of a rotation, a factor less 1 of
        tones, the bits that posterize keeps, and solarize's threshold as a share of white.
        """
        wide = self.magnitude is None  # TrivialAugmentWide
        far = (32.0, 32.0) if wide else (150.0 / 331.0 * width, 150.0 / 331.0 * height)
        shear, turn, tone, lost_bits = (0.99, 135.0, 0.99, 6) if wide else (0.3, 30.0, 0.9, 4)
        ends = [0.0, shear, shear, *far, turn, tone, tone, tone, tone]
        single: Any = {"dtype": torch.float32}  # whatever torch's default dtype is
        rows = [torch.linspace(0.0, end, self.bins, **single) for end in ends]
        bits = 8 - (torch.arange(self.bins, **single) / ((self.bins - 1) / lost_bits)).round()
        nothing = torch.zeros(self.bins, **single)
        rows += [bits, torch.linspace(1.0, 0.0, self.bins, **single), nothing, nothing]
        return torch.stack([row.double() for row in rows])


def checked_policy(
    op: str, rounds: int, magnitude: int | None, bins: int, interpolation: Any, fill: Any, name: str
) -> Policy:
    """A policy of what a caller gave; `name` is what the rounds are called."""
    check_count(op, name, rounds, low=0)
    check_count(op, "num_magnitude_bins", bins, low=2)
    if magnitude is not None:
        check_count(op, "magnitude", magnitude, low=0)
        if magnitude >= bins:
            raise ValueError(f"{op}: magnitude must be less than num_magnitude_bins {bins}, got {magnitude}")
    for value in fill if isinstance(fill, (list, tuple)) else [fill]:
        if value is not None:
            check_number(op, "fill", value, finite=True)
    return Policy(rounds, magnitude, bins, interpolation, tuple(fill) if isinstance(fill, list) else fill)


@functools.lru_cache(maxsize=64)
def _kept_strengths(policy: Policy, height: int, width: int, device: torch.device) -> Tensor:
    """They are some twenty small operators, and a copy to a GPU, which would be waited for each time."""
    return policy.strengths(height, width).to(device, number_dtype(device))


def draw(policy: Policy, seed: Tensor, index: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(operations (B, rounds) int64, magnitudes (B, rounds)) of the samples of these global indices.

    Of the four words of a round's draw, the first chooses the operation, the second the strength, the third
    the sign. A word times n over 2^32 is a number below n.
    """
    device = index.device
    words = _op.augment_words(seed, index.contiguous(), _FIRST_ROUND_DRAW, policy.rounds)
    operations = words[..., 0] * _DRAWN >> 32
    # A tensor without values, of a graph that is made, must not be kept.
    strengths_of = _kept_strengths.__wrapped__ if is_hidden() else _kept_strengths
    strengths = strengths_of(policy, height, width, device)
    bins = words[..., 1] * policy.bins >> 32
    if policy.magnitude is not None:
        bins = torch.full_like(bins, policy.magnitude)
    magnitudes = strengths[operations, bins]
    signed = (operations > 0) & (operations <= SIGNED) & (words[..., 2] < 1 << 31)
    return operations, torch.where(signed, -magnitudes, magnitudes)


def draw_chance(number: int, chance: float, seed: Tensor, index: Tensor) -> Tensor:
    """(B,) bool: which samples have a step that is on by chance, by the number of its draw."""
    return _op.augment_words(seed, index.contiguous(), number, 1)[:, 0, 0] < chance * 2.0**32


def matrices_of(operations: Tensor, magnitudes: Tensor, height: int, width: int) -> Tensor:
    """(B, 2, 3), the matrices of one round; of operations that move nothing, the identity. Shears leave the
    upper left corner where it is, as torchvision's: it lies half a pixel from the first pixel's centre, from
    which coordinates count.

    A sample has one operation, so that only one of the parts below is not 0.
    """
    zero = torch.zeros_like(magnitudes)

    def only(name: str, value: Tensor) -> Tensor:
        return torch.where(operations == OPERATIONS.index(name), value, zero)

    turned: Tensor = _op.matrices_of(
        magnitudes, (height, width), (height, width), angle=-only("Rotate", magnitudes)
    )
    slant_x, slant_y = only("ShearX", magnitudes), only("ShearY", magnitudes)
    shift_x, shift_y = (only(f"Translate{axis}", magnitudes).trunc() for axis in "XY")
    rows = ((zero, slant_x, 0.5 * slant_x - shift_x), (slant_y, zero, 0.5 * slant_y - shift_y))
    return turned + torch.stack([torch.stack(row, 1) for row in rows], 1)


def steps_of(params: Params, height: int, width: int) -> list[Geometry]:
    """The resampling of each round, of all samples."""
    steps = []
    operations, magnitudes = params.operations, params.magnitudes
    assert operations is not None and magnitudes is not None
    for i in range(operations.shape[1]):
        strengths = magnitudes[:, i].to(number_dtype(operations.device))
        matrices = matrices_of(operations[:, i], strengths, height, width)
        steps.append(Geometry((height, width), (height, width), matrices))
    return steps


def _geometric(images: Tensor, operations: Tensor, magnitudes: Tensor, params: Params) -> Tensor:
    """The operations that move pixels, in one resampling."""
    padding, fill = policy_outside(params.settings)
    return _op.augment_batch(
        "augment", images, matrices=matrices_of(operations, magnitudes, *images.shape[2:]),
        interpolation=params.settings.policy_interpolation, padding=padding, fill=fill,
    )  # fmt: skip


def _static(params: Params) -> tuple[int, bool, list[float]]:
    """The settings of a policy as arguments of its operator."""
    fill = params.settings.policy_fill
    values = [] if fill is None else list(fill) if isinstance(fill, (list, tuple)) else [fill]
    number = _op.INTERPOLATIONS.index(params.settings.policy_interpolation)
    return number, fill is not None, [float(v) for v in values]


def _from_static(operations, magnitudes, interpolation: int, has_fill: bool, fill: list[float]) -> Params:
    settings = Settings(
        policy_interpolation=_op.INTERPOLATIONS[interpolation],
        policy_fill=(tuple(fill) if len(fill) > 1 else fill[0]) if has_fill else None,
    )
    return Params(operations=operations, magnitudes=magnitudes, settings=settings)


def _own(result: Tensor, given: Tensor) -> Tensor:
    """The result of an operator in memory of its own: torch forbids an operator to return its input, which
    the identity would do.
    """
    shared = result.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    return result.clone() if shared else result


def _operator(images: Tensor, *given: Any) -> Tensor:
    return _own(_all_rounds(images, _from_static(*given)), images)


def _operator_backward(grad: Tensor, images: Tensor, *given: Any) -> Tensor:
    # What calls an operator from below autograd, FlopCounterMode for example, has switched autograd off. Here
    # it is switched on again.
    key, keys = torch._C.DispatchKey, torch._C.DispatchKeySet
    views, autograd = keys(key.ADInplaceOrView), keys(key.AutogradFunctionality)
    include = torch._C._dispatch_tls_local_include_set() | views
    exclude = torch._C._dispatch_tls_local_exclude_set() - views - autograd
    with (
        torch._C._ForceDispatchKeyGuard(include, exclude),
        torch.enable_grad(),
    ):
        leaf = images.detach().requires_grad_()
        output = _all_rounds(leaf, _from_static(*given))
        (gradient,) = torch.autograd.grad(output, leaf, grad)
    return _own(gradient, grad)


# Which operation gets which samples depends on what they drew, on which a graph of torch.compile cannot
# branch: there a policy is one node.
_ARGUMENTS = (
    "Tensor images, Tensor operations, Tensor magnitudes, int interpolation, bool has_fill, float[] fill"
)
define_kernel(f"augment_policy({_ARGUMENTS}) -> Tensor", _operator)
define_kernel(f"augment_policy_backward(Tensor grad, {_ARGUMENTS}) -> Tensor", _operator_backward)


@torch.library.register_fake("fastreg::augment_policy", allow_override=True)
def _(images, *given):
    return torch.empty_like(images)


@torch.library.register_fake("fastreg::augment_policy_backward", allow_override=True)
def _(grad, images, *given):
    return torch.empty_like(images)


class _Policy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, operations, magnitudes, *static):
        ctx.save_for_backward(images, operations, magnitudes)
        ctx.static = static
        return torch.ops.fastreg.augment_policy(images, operations, magnitudes, *static)

    @staticmethod
    def backward(ctx, grad):
        gradient = torch.ops.fastreg.augment_policy_backward(grad, *ctx.saved_tensors, *ctx.static)
        return gradient, *(None,) * (2 + len(ctx.static))


def operated(images: Tensor, params: Params) -> Tensor:
    """Images (B, C, H, W) after the operations that their samples drew."""
    if not is_hidden():
        return _all_rounds(images, params)
    given = (images, params.operations, params.magnitudes, *_static(params))
    if images.requires_grad and torch.is_grad_enabled():
        result: Tensor = _Policy.apply(*given)
        return result
    return torch.ops.fastreg.augment_policy(*given)


def _all_rounds(images: Tensor, params: Params) -> Tensor:
    """Images (B, C, H, W) after the operations that their samples drew. Of floats on a GPU this waits for the
    draw, to know which operation gets which samples.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(f"augment: a policy takes images of 1 or 3 channels, got {images.shape[1]}")
    operations, magnitudes = params.operations, params.magnitudes
    assert operations is not None and magnitudes is not None
    magnitudes = magnitudes.to(number_dtype(images.device))
    result = images
    for i in range(operations.shape[1]):
        result = _one_round(result, operations[:, i], magnitudes[:, i], params)
    return images.clone() if result is images else result


def _in_two_passes(images: Tensor, operations: Tensor, strengths: Tensor, params: Params) -> Tensor:
    """One operation of each sample, without a look at who drew what, for which a GPU would have to be waited
    for: the steps of values leave images that are moved as they are, and the matrices of all others are the
    identity, which gives bytes back.
    """
    return _geometric(toned(images, operations, strengths), operations, strengths, params)


def _one_round(images: Tensor, operations: Tensor, strengths: Tensor, params: Params) -> Tensor:
    """One operation of each sample. Images that are moved are resampled together, and take their places among
    the others.
    """
    if images.dtype == torch.uint8 and images.device.type != "cpu":
        return _in_two_passes(images, operations, strengths, params)
    moved = [i for i, number in enumerate(operations.tolist()) if number in GEOMETRIC]
    if moved and len(moved) == len(images):
        return _geometric(images, operations, strengths, params)
    result = toned(images, operations, strengths)
    if not moved:
        return result
    at = torch.tensor(moved, device=images.device)
    placed = _geometric(picked(images, at), operations[at], strengths[at], params)
    if result.dtype != torch.uint8 or result.device.type != "cpu":
        return _tones.laid_out(result.index_copy(0, at, placed), images)
    for place, image in zip(moved, placed.unbind(), strict=True):  # index_copy would go byte by byte
        result[place] = image
    return result
