"""The functions as modules. Each module with a namesake in torch is a subclass of it, so that isinstance
checks and checkpoints carry over.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling
from torch.jit import is_scripting, is_tracing
from torch.overrides import has_torch_function_variadic
from torch.utils._device import DeviceContext

from ._checks import check_choice, check_number, or_torchs, scalar
from ._cross_entropy import AllIgnored, LossOptions, Reduction, Smoothing, cross_entropy, is_torchs
from ._dropout import dropout
from ._dropout_add import dropout_add
from ._dropout_family import (
    alpha_dropout,
    drop_path,
    dropout1d,
    dropout2d,
    dropout3d,
    feature_alpha_dropout,
)
from ._exchange import watched
from ._fold import fold_dropout
from ._registry import fast
from ._transforms import as_node, is_exporting, is_recorded

__all__ = [
    "AlphaDropout",
    "CrossEntropyLoss",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "DropoutAdd",
    "FeatureAlphaDropout",
    "fold_dropout",
]


def _has_override(value: Any) -> bool:
    kind = type(value)
    return (
        isinstance(value, torch.Tensor)
        and kind is not torch.Tensor
        and kind.__torch_function__ is not torch._C._disabled_torch_function_impl
    )


def _is_torchs(arguments: tuple[Any, ...]) -> bool:
    """Whether torch's own function must be called: because a mode or a subclass of Tensor is asked first, and
    knows that one, because a jit trace would record our operators without a derivative, or because ours have
    no kernel for sparse and nested tensors.
    """
    for value in arguments:
        if isinstance(value, torch.Tensor) and (value.layout != torch.strided or value.is_nested):
            return True
    if is_tracing():
        return True
    if not has_torch_function_variadic(*arguments):
        return False
    # torch.set_default_device is a mode, too, but one that leaves such functions alone.
    count = torch._C._len_torch_function_stack()
    modes = [torch._C._get_function_stack_at(i) for i in range(count)]
    return any(not isinstance(mode, DeviceContext) for mode in modes) or any(map(_has_override, arguments))


def _or_torchs(
    module: torch.nn.Module,
    ours: Callable[..., torch.Tensor],
    theirs: Callable[..., torch.Tensor],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    extras: dict[str, Any],
) -> torch.Tensor:
    """ours(*arguments, **options), or what torch's function gives where that is its business or where ours
    refuses. With `extras`, which torch does not know, it is ours alone.
    """
    for value in arguments:
        if isinstance(value, torch.fx.Proxy):
            return as_node(module, *arguments)
    if extras:
        return ours(*arguments, **options, **extras)
    if is_exporting():  # An exported program may run where fastreg is not.
        nothing_is_dropped = options.get("training") is False
        return (ours if nothing_is_dropped else theirs)(*arguments, **options)
    if _is_torchs(arguments):
        return theirs(*arguments, **options)
    if is_compiling():
        return ours(*arguments, **options)
    try:
        return ours(*arguments, **options)
    except (TypeError, ValueError) as error:
        refusal = error
    return or_torchs(refusal, theirs, *arguments, **options)


# Somebody may have put a function of his own in the place of one of these. torch's modules call that.
_TORCHS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
_TORCHS_LOSS = F.cross_entropy
# torch's modules of these have the argument, and show it, but never hand it on.
_NEVER_INPLACE = (alpha_dropout, feature_alpha_dropout)


def _dropout_or_torchs(
    module: Any,
    ours: Callable[..., torch.Tensor],
    theirs: Callable[..., torch.Tensor],
    input: torch.Tensor,
) -> torch.Tensor:
    extras = {}
    # A module that keeps torch's class has no such attribute.
    if ours is dropout and type(module) is not torch.nn.Dropout and module.rescale != "train":
        extras = {"rescale": module.rescale}
    elif theirs not in _TORCHS:
        inplace = () if ours in _NEVER_INPLACE else (module.inplace,)
        return theirs(input, module.p, module.training, *inplace)
    elif ours is dropout and fast is not None and not is_compiling():
        try:
            output = fast.dropout(input, module.p, module.training, module.inplace)
        except ValueError:
            output = None
        if output is not None:
            return output
    options = {"p": module.p, "training": module.training}
    if ours not in _NEVER_INPLACE:
        options["inplace"] = module.inplace
    if is_tracing() and not extras:  # The trace names its values after the variables of this frame.
        return theirs(input, **options)
    return _or_torchs(module, ours, theirs, (input,), options, extras)


class Dropout(torch.nn.Dropout):
    """Zeroes elements with probability `p` while training; drop-in for `torch.nn.Dropout`, on
    `fastreg.dropout`.

    Args:
        p: probability of zeroing an element, in [0, 1].
        inplace: overwrite the input.
        rescale: "train" divides by 1 - p while training; "inference" multiplies by 1 - p in evaluation, the
            textbook form that `fold_dropout` turns into scaled weights.

    Shape: any; dtypes and errors as in `fastreg.dropout`.
    """

    __constants__ = ["p", "inplace", "rescale"]  # noqa: RUF012  # torch.jit reads such a list
    # For a module that `convert` made of torch's, without a call of __init__.
    rescale: Literal["train", "inference"] = "train"

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, rescale: Literal["train", "inference"] = "train"
    ) -> None:
        check_number("Dropout", "p", scalar(p), 0, 1)
        check_choice("Dropout", "rescale", rescale, ("train", "inference"))
        super().__init__(p, inplace)
        self.rescale = rescale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply it; (*) -> (*)."""
        if is_scripting():
            if self.rescale != "train":
                raise RuntimeError("Dropout: torch.jit.script does not know rescale='inference'")
            return F.dropout(input, self.p, self.training, self.inplace)
        else:
            return _dropout_or_torchs(self, dropout, F.dropout, input)

    def extra_repr(self) -> str:
        """The arguments as in torch, and `rescale` where it is not the default."""
        return super().extra_repr() + ("" if self.rescale == "train" else f", rescale={self.rescale!r}")


class _CheckedP:
    """Checks p before torch does, because torch lets NaN and strings of digits pass."""

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        check_number(type(self).__name__, "p", scalar(p), 0, 1)
        super().__init__(p, inplace)  # type: ignore[call-arg]


class Dropout1d(_CheckedP, torch.nn.Dropout1d):
    """Zeroes channels of (N, C, L) or (C, L); drop-in for `torch.nn.Dropout1d`, on `fastreg.dropout1d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply it; (N, C, L) -> (N, C, L)."""
        if is_scripting():
            return F.dropout1d(input, self.p, self.training, self.inplace)
        else:
            return _dropout_or_torchs(self, dropout1d, F.dropout1d, input)


class Dropout2d(_CheckedP, torch.nn.Dropout2d):
    """Zeroes channels of (N, C, H, W); drop-in for `torch.nn.Dropout2d`, on `fastreg.dropout2d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply it; (N, C, H, W) -> (N, C, H, W)."""
        if is_scripting():
            return F.dropout2d(input, self.p, self.training, self.inplace)
        else:
            return _dropout_or_torchs(self, dropout2d, F.dropout2d, input)


class Dropout3d(_CheckedP, torch.nn.Dropout3d):
    """Zeroes channels of (N, C, D, H, W); drop-in for `torch.nn.Dropout3d`, on `fastreg.dropout3d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply it; (N, C, D, H, W) -> (N, C, D, H, W)."""
        if is_scripting():
            return F.dropout3d(input, self.p, self.training, self.inplace)
        else:
            return _dropout_or_torchs(self, dropout3d, F.dropout3d, input)


class AlphaDropout(_CheckedP, torch.nn.AlphaDropout):
    """Dropout that keeps mean and variance after SELU; drop-in for `torch.nn.AlphaDropout`, on
    `fastreg.alpha_dropout`. As in torch `inplace` is without effect; the function has it.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply it; (*) -> (*)."""
        if is_scripting():
            return F.alpha_dropout(input, self.p, self.training)
        else:
            return _dropout_or_torchs(self, alpha_dropout, F.alpha_dropout, input)


class FeatureAlphaDropout(_CheckedP, torch.nn.FeatureAlphaDropout):
    """Alpha dropout of whole channels of (N, C, ...); drop-in for `torch.nn.FeatureAlphaDropout`. As in torch
    `inplace` is without effect; the function has it.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply it; (N, C, ...) -> (N, C, ...)."""
        if is_scripting():
            return F.feature_alpha_dropout(input, self.p, self.training)
        else:
            return _dropout_or_torchs(self, feature_alpha_dropout, F.feature_alpha_dropout, input)


class DropPath(torch.nn.Module):
    """Stochastic depth: zeroes whole samples of a residual branch while training, on `fastreg.drop_path`.

    Args:
        p: probability of zeroing a sample, in [0, 1].
        scale_by_keep: divide the kept samples by 1 - p.

    Shape: (N, ...) -> (N, ...).

    A module that `convert` made of timm's or torchvision's keeps their attributes (`drop_prob`, `mode`) and
    does what they say.
    """

    __jit_unused_properties__ = ["p"]  # noqa: RUF012  # torch.jit reads such lists
    __constants__ = ["scale_by_keep", "mode"]  # noqa: RUF012
    # For a module that `convert` made of another, without a call of __init__.
    scale_by_keep = True
    mode = "row"

    def __init__(self, p: float = 0.5, *, scale_by_keep: bool = True) -> None:
        super().__init__()
        check_number("DropPath", "p", scalar(p), 0, 1)
        self.p, self.scale_by_keep = p, scale_by_keep

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the attributes of torchvision's module, or of an older fastreg's, which has `p` among them."""
        if "p" in state:
            state = {**{name: value for name, value in state.items() if name != "p"}, "_p": state["p"]}
        super().__setstate__(state)

    @property
    def p(self) -> float:
        """The probability of zeroing a sample; timm calls it drop_prob, which may be None."""
        own = self.__dict__
        return (own["drop_prob"] or 0.0) if "drop_prob" in own else own["_p"]

    @p.setter
    def p(self, value: float) -> None:
        # Under the name of the property, Dynamo of torch 2.10 would look for it without end.
        self.__dict__["drop_prob" if "drop_prob" in self.__dict__ else "_p"] = value

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply it; (N, ...) -> (N, ...)."""
        if is_scripting():
            probability = self.drop_prob if hasattr(self, "drop_prob") else self._p
            if not self.training or probability == 0.0:
                return input
            mode, scaled = self.mode, self.scale_by_keep
            return _drop_path_by_torch(input, probability, scaled, mode)  # type: ignore[arg-type]
        else:
            return _drop_path(self, input)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"p={self.p}, scale_by_keep={self.scale_by_keep}"


def _drop_path_by_torch(input: torch.Tensor, p: float, scaled: bool, mode: str) -> torch.Tensor:
    shape = [1 if mode == "batch" else input.shape[0]] + [1] * (input.dim() - 1)
    kept = torch.rand(shape, device=input.device) >= p
    scale = 1.0 / (1.0 - p) if scaled and p < 1.0 else 1.0
    return torch.where(kept, input * scale, torch.zeros_like(input))


def _drop_path(module: DropPath, input: torch.Tensor) -> torch.Tensor:
    if isinstance(input, torch.fx.Proxy):
        return as_node(module, input)
    p, training, scaled = module.p, module.training, module.scale_by_keep
    if training and p and is_recorded():
        return _drop_path_by_torch(input, p, scaled, module.mode)
    if module.mode == "batch":  # torchvision's: all samples or none
        return drop_path(input.unsqueeze(0), p, training, scale_by_keep=scaled).squeeze(0)
    return drop_path(input, p, training, scale_by_keep=scaled)


class DropoutAdd(torch.nn.Module):
    """The end of a residual block, dropout(input + bias) + residual in one pass, on `fastreg.dropout_add`.

    Args:
        p: probability of dropping an element of input + bias while training, in [0, 1].

    Shape: input (*, C), residual (*, C) and bias (C,) or None -> (*, C). The bias is the one that the linear
    layer before leaves out, and stays that layer's parameter.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        check_number("DropoutAdd", "p", p, 0, 1)
        self.p = p

    def forward(
        self, input: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Apply it; (*, C), (*, C) and (C,) -> (*, C)."""
        if is_scripting():
            return _dropout_add_by_torch(input, residual, self.p, bias, self.training)
        else:
            return _dropout_add(self, input, residual, bias)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"p={self.p}"


def _dropout_add_by_torch(
    input: torch.Tensor, residual: torch.Tensor, p: float, bias: torch.Tensor | None, training: bool
) -> torch.Tensor:
    dtype = torch.result_type(input, residual)
    if dtype == torch.float16 or dtype == torch.bfloat16:  # rounded once, as the operator is
        input, residual = input.float(), residual.float()
    if bias is not None:
        input = input + bias
    return (F.dropout(input, p, training) + residual).to(dtype)


def _dropout_add(
    module: DropoutAdd, input: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if any(isinstance(value, torch.fx.Proxy) for value in (input, residual, bias)):
        return as_node(module, input, residual, bias)
    if module.training and module.p and is_recorded():
        return _dropout_add_by_torch(input, residual, module.p, bias, True)
    return dropout_add(input, residual, module.p, bias, module.training)


# What `fastreg.nn.CrossEntropyLoss` has beyond torch's, and what each is where torch's loss is meant: the
# keyword-only arguments of the function, in the order in which the function in C++ takes them.
_EXTRAS: dict[str, Any] = dict(cross_entropy.__kwdefaults__ or {})
_extras_of = operator.attrgetter(*_EXTRAS)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Cross-entropy with smoothed targets; drop-in for `torch.nn.CrossEntropyLoss`, on
    `fastreg.cross_entropy`.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as in torch.
        smoothing, z_loss, all_ignored, loss_dtype: as in `fastreg.cross_entropy`.

    Shape: (C,), (N, C) or (N, C, d1, ...) and targets -> () or the targets' shape.
    """

    __constants__ = [  # noqa: RUF012  # torch.jit reads such a list
        *("ignore_index", "reduction", "label_smoothing"),
        *_EXTRAS,
    ]
    # For a module that `convert` made of torch's, without a call of __init__.
    smoothing: Smoothing = "uniform"
    z_loss: float = 0.0
    all_ignored: AllIgnored = "nan"
    loss_dtype: torch.dtype | None = None
    # torch sets it, with the annotation str.
    reduction: Reduction

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        *,
        smoothing: Smoothing = "uniform",
        z_loss: float = 0.0,
        all_ignored: AllIgnored = "nan",
        loss_dtype: torch.dtype | None = None,
    ) -> None:
        op = "CrossEntropyLoss"
        LossOptions.checked(
            op,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            smoothing=smoothing,
            z_loss=z_loss,
            all_ignored=all_ignored,
            loss_dtype=loss_dtype,
        )
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.smoothing, self.z_loss = smoothing, z_loss
        self.all_ignored, self.loss_dtype = all_ignored, loss_dtype

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of logits `input` against `target`."""
        if is_scripting():
            if self.smoothing != "uniform" or self.z_loss != 0.0 or self.all_ignored != "nan":
                raise RuntimeError("CrossEntropyLoss: torch.jit.script knows only torch's arguments")
            if self.loss_dtype is not None:
                raise RuntimeError("CrossEntropyLoss: torch.jit.script knows only torch's arguments")
            return F.cross_entropy(
                input,
                target,
                weight=self.weight,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                label_smoothing=self.label_smoothing,
            )
        else:
            return _loss_or_torchs(self, input, target)


def _loss_or_torchs(loss: CrossEntropyLoss, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    weight = loss.weight
    # The usual case first; `is_torchs` below asks the same of the weight's dtype, and more.
    usual = weight is None or (isinstance(input, torch.Tensor) and weight.dtype == input.dtype)
    is_exchanged = F.cross_entropy is not _TORCHS_LOSS
    if usual and not is_exchanged and fast is not None and not is_compiling():
        try:
            value = fast.cross_entropy(
                *(input, target, weight, None, loss.ignore_index, None, loss.reduction),
                loss.label_smoothing,
                *(_extras_of(loss) if type(loss) is not torch.nn.CrossEntropyLoss else _EXTRAS.values()),
            )
        except ValueError:  # refused again below, with torch's type
            value = None
        if value is not None:
            return value
    options: dict[str, Any] = {
        "weight": weight,
        "ignore_index": loss.ignore_index,
        "reduction": loss.reduction,
        "label_smoothing": loss.label_smoothing,
    }
    extras = {name: getattr(loss, name, default) for name, default in _EXTRAS.items()}
    changed = extras if extras != _EXTRAS else {}
    if not changed and (is_exchanged or is_tracing() or is_torchs(input, target, weight)):
        return _loss_of_torch(input, target, options)
    return _or_torchs(loss, cross_entropy, F.cross_entropy, (input, target), options, changed)


def _loss_of_torch(input: torch.Tensor, target: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    # A trace names its values, and so the inputs of a graph of ONNX, after the variables of this frame, which
    # are therefore those of torch's module.
    return F.cross_entropy(input, target, **options)


_FORWARDS = {each.__name__: each for each in (_dropout_or_torchs, _drop_path, _loss_or_torchs)}


def watch(tell: Callable[[], None] | None) -> None:
    """Let `tell()` know of each forward pass of a module that `convert` may have made, outside of compiled
    code. None ends it.
    """
    for name, forward in _FORWARDS.items():
        globals()[name] = forward if tell is None else watched(forward, tell)
