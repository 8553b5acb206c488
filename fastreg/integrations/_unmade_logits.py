"""Logits that are not made: what stands for hidden @ weight.T + bias between the last layer of a language
model and its loss, and gives the loss by `linear_cross_entropy`.

Between the two, models reshape the logits, cut off a token, scale them, add a bias or ask for float32. Each
of these has a counterpart on the hidden states, which is what happens here. A step that has none, such as a
tanh, is an error while the model runs. Afterwards, in the model's output, it makes the logits: whoever looks
at them gets what the layer gives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from .._cross_entropy import cross_entropy
from .._linear_cross_entropy import linear_cross_entropy
from .._transforms import autocast_dtype


class Usage:
    """What the stand-ins of one model share: the options of the loss, and whether the model is running, which
    one thread may do with gradients and another without.
    """

    def __init__(self, **options: Any) -> None:
        self.options, self.on = options, True
        self.threads: set[int] = set()
        self.is_compiled_running = False

    @property
    def running(self) -> bool:
        """Whether the model computes a loss at the moment, in this thread."""
        if is_compiling():
            return self.is_compiled_running or len(self.threads) > 0
        return self.is_compiled_running or get_ident() in self.threads


class UnmadeLogits:
    """Stands for linear(hidden, weight, bias), (..., C), where hidden is (..., H)."""

    def __init__(
        self, usage: Usage, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        self._usage, self._hidden, self._weight, self._bias = usage, hidden, weight, bias
        self.dtype = dtype
        self._autocast = autocast_dtype(hidden.device.type)
        self._versions = None if is_compiling() else [_version(part) for part in (hidden, weight, bias)]

    # ---- what a tensor says of itself
    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._hidden.shape[:-1], self._weight.shape[0]))

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    @property
    def ndim(self) -> int:
        return self._hidden.dim()

    @property
    def requires_grad(self) -> bool:
        return self._hidden.requires_grad or self._weight.requires_grad

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        return True

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"UnmadeLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    # ---- steps that have a counterpart on the hidden states
    def _like(
        self, hidden: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> UnmadeLogits:
        self._check_unchanged()
        bias = self._bias if bias is None else bias
        other = UnmadeLogits(self._usage, hidden, self._weight, bias, dtype or self.dtype)
        other._autocast = self._autocast
        return other

    def reshape(self, *shape: Any, **options: Any) -> Any:
        """Any shape that leaves the classes together."""
        shape = shape or tuple(options.values())
        wanted = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if isinstance(wanted, torch.dtype):
            return self._made_by(Tensor.view, (wanted,), {})
        *rows, classes = wanted if len(wanted) else (0,)
        if classes not in (-1, self.shape[-1]) or (classes == -1 and -1 in rows):
            return self._made_by(Tensor.reshape, tuple(wanted), {})
        hidden = self._hidden
        if classes == -1 and _product(rows) != _product(hidden.shape[:-1]):
            return self._made_by(Tensor.reshape, tuple(wanted), {})
        return self._like(hidden.reshape(*rows, hidden.shape[-1]))

    view = reshape

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        if end_dim % self.ndim == self.ndim - 1 and start_dim % self.ndim != self.ndim - 1:
            return self._made_by(Tensor.flatten, (start_dim, end_dim), {})
        return self._like(self._hidden.flatten(start_dim, end_dim))

    def contiguous(self, **options: Any) -> UnmadeLogits:
        return self

    def to(self, *args: Any, **options: Any) -> Any:
        """Another dtype: the loss, which is computed in float32 anyway, is given in it."""
        target = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **options)
        if target.device != self.device or not target.is_floating_point():
            return self._made_by(Tensor.to, args, options)
        return self._like(self._hidden, dtype=target.dtype)

    def float(self) -> UnmadeLogits:
        return self._like(self._hidden, dtype=torch.float32)

    def __getitem__(self, index: Any) -> Any:
        """Rows: any index that takes all classes."""
        parts = index if isinstance(index, tuple) else (index,)
        used = sum(_dims_of(part) for part in parts)
        with_dots = any(part is Ellipsis for part in parts)
        reaches_classes = parts and (used == self.ndim or (with_dots and parts[-1] is not Ellipsis))
        if reaches_classes and not (isinstance(parts[-1], slice) and parts[-1] == slice(None)):
            return self._made_by(Tensor.__getitem__, (index,), {})
        if used > self.ndim:
            return self._made_by(Tensor.__getitem__, (index,), {})
        return self._like(self._hidden[index])

    def __mul__(self, factor: Any) -> Any:
        if not isinstance(factor, (int, float)):
            return self._made_by(Tensor.__mul__, (factor,), {})
        return self._like(self._hidden * factor, None if self._bias is None else self._bias * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        if not isinstance(divisor, (int, float)):
            return self._made_by(Tensor.__truediv__, (divisor,), {})
        return self._like(self._hidden / divisor, None if self._bias is None else self._bias / divisor)

    def __add__(self, bias: Any) -> Any:
        """A bias per class, as the decoders of BART and Marian add one."""
        if (
            not isinstance(bias, Tensor)
            or bias.numel() != self.shape[-1]
            or bias.shape[-1:] != self.shape[-1:]
        ):
            return self._made_by(Tensor.__add__, (bias,), {})
        dtype = torch.promote_types(self.dtype, bias.dtype)
        bias = bias.reshape(-1).to(self._weight.dtype)
        return self._like(self._hidden, bias if self._bias is None else self._bias + bias, dtype)

    __radd__ = __add__

    # ---- the loss
    def loss(self, target: Tensor, weight: Tensor | None = None, **options: Any) -> Any:
        """`linear_cross_entropy` of rows, (N, C) or (C,), with the options that the model or a loss function
        asks for and, before them, those that `fuse_loss` got.
        """
        self._check_unchanged()
        options |= self._usage.options
        if self.ndim > 2:  # torch has the classes in dimension 1, which are not the last one
            return self._made_by(cross_entropy, (target, weight), options)
        if options.get("loss_dtype") is None and autocast_dtype(self.device.type) is None:
            options["loss_dtype"] = self.dtype
        return linear_cross_entropy(
            self._hidden, self._weight, target, self._bias, class_weight=weight, **options
        )

    # ---- everything else
    def tensor(self) -> Tensor:
        """The logits themselves, (..., C), made."""
        self._check_unchanged()
        # The autocast of the model's run is over by now.
        on = self._autocast is not None
        with torch.autocast(self.device.type, self._autocast, enabled=on):
            return F.linear(self._hidden, self._weight, self._bias).to(self.dtype)

    def _check_unchanged(self) -> None:
        """The logits that the model gave are made of the weights that it had then."""
        if self._versions is None or is_compiling():
            return
        if self._versions != [_version(part) for part in (self._hidden, self._weight, self._bias)]:
            raise RuntimeError(
                "fuse_loss: the weights of the output layer were changed since the model ran, and its logits "
                "are not made yet; take output.logits.tensor() before optimizer.step()"
            )

    def _check_kept(self, name: str) -> None:
        """Nothing that is done to made logits in place would be seen by whoever looks at them next."""
        self._check(name)
        raise RuntimeError(
            f"fuse_loss: {name} would change, or watch, logits that are made anew whenever somebody looks at "
            "them; take logits = output.logits.tensor() first"
        )

    def __setitem__(self, index: Any, value: Any) -> None:
        self._check_kept("__setitem__")

    def _made_by(self, function: Callable[..., Any], args: tuple, options: dict[str, Any]) -> Any:
        """function(logits, *args, **options) after the model's run; while it runs, an error."""
        self._check(getattr(function, "__name__", str(function)))
        return function(self.tensor(), *args, **options)

    def _check(self, name: str) -> None:
        if self._usage.running:
            raise RuntimeError(
                f"fuse_loss: between its last layer and its loss a model must only reshape, slice, scale or "
                f"convert the logits or add a bias per class, got {name}, which needs them; "
                "call unfuse_loss(model)"
            )

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("input")
        if function is F.cross_entropy and isinstance(first, UnmadeLogits):
            return _cross_entropy_of(*args, **kwargs)
        step = _STEPS.get(function)
        if step is not None and isinstance(first, UnmadeLogits) and args and not kwargs:
            return getattr(first, step)(*args[1:])
        name = getattr(function, "__name__", str(function))
        if isinstance(first, UnmadeLogits) and _is_in_place(name):
            first._check_kept(name)
        return function(*tree_map(partial(_made, name), args), **tree_map(partial(_made, name), kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"'UnmadeLogits' object has no attribute {name!r}")
        if _is_in_place(name):
            self._check_kept(name)
        self._check(name)
        return getattr(self.tensor(), name)


_STEPS: dict[Any, str] = {torch.reshape: "reshape", torch.flatten: "flatten", torch.mul: "__mul__"}
_STEPS |= {torch.div: "__truediv__", torch.true_divide: "__truediv__", torch.add: "__add__"}


def _made(name: str, value: Any) -> Any:
    """A tensor in place of a stand-in for one."""
    if not isinstance(value, UnmadeLogits):
        return value
    value._check(name)
    return value.tensor()


def _cross_entropy_of(
    input: UnmadeLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """torch.nn.functional.cross_entropy, argument by argument."""
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    return input.loss(target, weight, **options)


def _operator(name: str) -> Callable[..., Any]:
    def of_tensor(self: UnmadeLogits, *args: Any) -> Any:
        made = tree_map(partial(_made, name), args)
        return self._made_by(getattr(Tensor, name), made, {})

    return of_tensor


# What Python looks for only in the class.
for _name in (
    "sub",
    "rsub",
    "rtruediv",
    "pow",
    "rpow",
    "matmul",
    "floordiv",
    "rfloordiv",
    "mod",
    "rmod",
    "neg",
    "pos",
    "abs",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
):
    setattr(UnmadeLogits, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ("iter", "array", "contains", "bool"):
    setattr(UnmadeLogits, f"__{_name}__", _operator(f"__{_name}__"))
UnmadeLogits.__hash__ = object.__hash__  # type: ignore[method-assign]


def _is_in_place(name: str) -> bool:
    """Whether a method of tensors changes them, or waits for their gradient."""
    return (name.endswith("_") and not name.endswith("__")) or name in ("retain_grad", "register_hook")


def _version(part: Tensor | None) -> int | None:
    """How often a tensor was changed in place; None where nobody counts."""
    return None if part is None or part.is_inference() else part._version


def _product(sizes: Any) -> Any:
    """The product of sizes, which may be symbolic."""
    result = 1
    for size in sizes:
        result = result * size
    return result


def _dims_of(index: Any) -> int:
    """How many dimensions of a tensor a part of an index takes."""
    if index is None or index is Ellipsis:
        return 0
    if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
        return index.dim()
    if str(getattr(index, "dtype", "")) == "bool":  # a mask of NumPy
        return getattr(index, "ndim", 1)
    return 1
