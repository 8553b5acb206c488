"""fastreg for code that knows only torch: in a `with` block, in the whole process, or in one model.

Patched are `dropout`, `dropout1d`, `dropout2d`, `dropout3d`, `alpha_dropout`, `feature_alpha_dropout`,
`cross_entropy` and, where it drops anything, `scaled_dot_product_attention` of torch.nn.functional, under
every name that a loaded module has for them. torch's modules (nn.Dropout, nn.CrossEntropyLoss,
nn.TransformerEncoderLayer, nn.MultiheadAttention) call these functions and so change with them. The dropout
in torch's RNN kernels, and that of attention under torch.compile, stay torch's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

# torch.jit.script compiles a patched function from the source of torch's own function, but looks up here the
# names that it uses.
from torch.nn.functional import _VF, _Reduction, warnings  # type: ignore[attr-defined]  # noqa: F401  # isort: skip

from . import nn
from ._checks import DTYPES
from ._cross_entropy import cross_entropy
from ._dropout import dropout
from ._dropout_family import alpha_dropout, dropout1d, dropout2d, dropout3d, feature_alpha_dropout
from ._registry import cuda, fast
from ._transforms import is_transformed

_PLAIN = (torch.Tensor, torch.nn.Parameter)
# While this is False the replacements call torch's functions, so that the patch also ends for a replacement
# that a partial or a graph keeps.
_patched = False


def _has_kernel(tensor: Any) -> bool:
    return (
        type(tensor) in _PLAIN
        and (tensor.is_cpu or (tensor.is_cuda and cuda is not None))
        and tensor.dtype in DTYPES
        and tensor.layout == torch.strided
        and not tensor.is_nested
    )


def _is_replaced() -> bool:
    # Under transforms the operators have no rules, and a jit trace would record them without a derivative.
    return _patched and not is_transformed() and not torch.jit.is_tracing()


# In both replacements the usual case comes first: what `fast` takes meets all the conditions that follow.


def _instead_of(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in the place of one of torch's functions for dropout."""
    usual = fast.dropout if fast is not None and ours is dropout else None
    defaults: Any = ours.__defaults__  # of p, training and inplace

    # A subclass of Tensor, a Proxy of torch.fx and a mode are given torch's function, because that is the one
    # in their tables.
    @functools.wraps(original)
    def run_dropout(input, p=0.5, training=defaults[1], inplace=False):
        if usual is not None and _patched and not is_compiling():
            output = usual(input, p, training, inplace)
            if output is not None:
                return output
        if (
            _has_kernel(input)
            and isinstance(p, (float, int))
            and _is_replaced()
            # Compiled for a GPU, torch's dropout becomes part of the kernels of its neighbours. That moves
            # fewer bytes than any kernel of its own.
            and not (input.is_cuda and is_compiling())
        ):
            return ours(input, p, training, inplace)
        if has_torch_function_unary(input):
            return handle_torch_function(original, (input,), input, p=p, training=training, inplace=inplace)
        return original(input, p, training, inplace)

    return run_dropout


def _instead_of_cross_entropy(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in the place of torch's cross_entropy."""

    @functools.wraps(original)
    def run_cross_entropy(
        input,
        target,
        weight=None,
        size_average=None,
        ignore_index=-100,
        reduce=None,
        reduction="mean",
        label_smoothing=0.0,
    ):
        if fast is not None and _patched and not is_compiling():
            loss = fast.cross_entropy(
                input,
                target,
                weight,
                size_average,
                ignore_index,
                reduce,
                reduction,
                label_smoothing,
                "uniform",
                0.0,
                "nan",
                None,
            )
            if loss is not None:
                return loss
        options = {
            "weight": weight,
            "size_average": size_average,
            "ignore_index": ignore_index,
            "reduce": reduce,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
        }
        if (
            _has_kernel(input)
            and type(target) in _PLAIN
            and target.device == input.device
            and (weight is None or (_has_kernel(weight) and not weight.requires_grad))
            and _is_replaced()
        ):
            return ours(input, target, **options)
        if has_torch_function_variadic(input, target, weight):
            return handle_torch_function(original, (input, target, weight), input, target, **options)
        return original(input, target, **options)

    return run_cross_entropy


def _instead_of_attention(original: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in the place of torch's scaled_dot_product_attention."""

    @functools.wraps(original)
    def run_attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
    ):
        if (
            dropout_p
            and not is_compiling()
            and _is_replaced()
            and isinstance(dropout_p, (float, int))
            and not enable_gqa
            and (scale is None or scale > 0)
            and _fits_attention(query, key, value, attn_mask, is_causal)
        ):
            return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale)
        return original(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    return run_attention


def _fits_attention(query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool) -> bool:
    """Whether `_attention` takes this. All else is left to torch: it says what is wrong, or knows heads
    without any width.
    """
    return (
        all(
            _has_kernel(t) and t.is_cpu and t.dim() >= 2 and t.dtype == query.dtype
            for t in (query, key, value)
        )
        and query.shape[-1] > 0
        and (
            attn_mask is None
            or (
                type(attn_mask) in _PLAIN
                and attn_mask.is_cpu
                and attn_mask.dtype in (torch.bool, torch.float32, query.dtype)
                and not is_causal
            )
        )
    )


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """dropout(softmax(query @ key.T * scale + mask)) @ value, as torch itself computes it on a CPU."""
    if torch.is_autocast_enabled("cpu"):
        lower = torch.get_autocast_dtype("cpu")
        query, key, value = (t if t.dtype == torch.float64 else t.to(lower) for t in (query, key, value))
    dtype = query.dtype
    with torch.autocast("cpu", enabled=False):
        if dtype in (torch.float16, torch.bfloat16):
            query, key, value = query.float(), key.float(), value.float()
        # Each side takes the root of the scale, so that the product keeps its range.
        factor = (scale if scale is not None else query.shape[-1] ** -0.5) ** 0.5
        weights = (query * factor) @ (key * factor).transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones(weights.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is None:
            weights = torch.softmax(weights, -1)
        else:
            if attn_mask.dtype == torch.bool:
                weights = weights.masked_fill(attn_mask.logical_not(), -torch.inf)
            else:
                weights = weights + attn_mask
            weights = torch.ops.aten._safe_softmax(weights, -1)  # gives 0 for a query that may see no key
        return (dropout(weights, dropout_p) @ value).to(dtype)


_TORCH = types.SimpleNamespace()
_REPLACEMENTS = {F.scaled_dot_product_attention: _instead_of_attention(F.scaled_dot_product_attention)}
for _ours in (dropout, dropout1d, dropout2d, dropout3d, alpha_dropout, feature_alpha_dropout, cross_entropy):
    _original = getattr(F, _ours.__name__)
    setattr(_TORCH, _ours.__name__, _original)
    _REPLACEMENTS[_original] = (_instead_of_cross_entropy if _ours is cross_entropy else _instead_of)(
        _original, _ours
    )
_ORIGINALS = {replacement: original for original, replacement in _REPLACEMENTS.items()}
# torch.jit.script knows attention by its object, because it has no source in Python.
torch.jit._builtins._register_builtin(
    _REPLACEMENTS[F.scaled_dot_product_attention], "aten::scaled_dot_product_attention"
)
# Namespaces in which a name was changed; a module may leave sys.modules before `unpatch`.
_changed: list[dict[str, Any]] = []
_blocks = 0  # open `patched` blocks that began without a patch of the process


Table = dict[Callable[..., Any], Callable[..., Any]]  # function -> what takes its place


def _exchange(table: Table) -> list[dict[str, Any]]:
    """Exchange functions by `table` in every loaded module; gives the namespaces that held one."""
    found = []
    for name, module in list(sys.modules.items()):
        namespace = getattr(module, "__dict__", None)
        if type(namespace) is not dict or namespace is globals() or name.startswith("torch._C"):
            continue
        if _exchange_in(namespace, table):
            found.append(namespace)
    return found


def _exchange_in(namespace: dict[str, Any], table: Table) -> list[str]:
    """Exchange functions by `table` in a namespace; gives their names."""
    # Only functions are looked up, because hashing other things that a module holds may run any code.
    functions = types.FunctionType, types.BuiltinFunctionType
    names = [name for name, value in list(namespace.items()) if type(value) in functions and value in table]
    for name in names:
        namespace[name] = table[namespace[name]]
    return names


def _tell_dynamo(patched: bool) -> None:
    """Let torch.compile see the replacements, which would be hidden by the three places in it that know
    torch's functions by name.

    Its table of functions that go into a graph unopened holds names and is read when it is first needed. A
    replacement found there under a name of torch.nn.functional would be traced with tensors for which fastreg
    has no kernel, and be cached as torch's. While the patch lasts, that entry therefore names torch's own
    function, wherever that is. Attention must be opened, so that its dropout is found. And an
    nn.CrossEntropyLoss that is made inside compiled code is never called.
    """
    # every torch.optim.Optimizer imports them too
    rules = importlib.import_module("torch._dynamo.trace_rules")
    classes = importlib.import_module("torch._dynamo.variables.user_defined").UserDefinedClassVariable
    for table in rules.torch_name_rule_map:
        for name in (*vars(_TORCH), "multi_head_attention_forward"):
            names = f"torch.nn.functional.{name}", f"{__name__}._TORCH#{name}"  # no such attribute: no rule
            old, new = names if patched else names[::-1]
            if old in table:
                table[new] = table.pop(old)
    rules.clear_lru_cache()
    if patched and hasattr(classes, "_call_cross_entropy_loss"):
        _dynamo_loss.append(classes._call_cross_entropy_loss)
        classes._call_cross_entropy_loss = _loss_in_dynamo
    elif not patched and _dynamo_loss:
        classes._call_cross_entropy_loss = _dynamo_loss.pop()


_dynamo_loss: list[Any] = []  # torch.compile's own method while it is exchanged


def _loss_in_dynamo(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    """Makes the nn.CrossEntropyLoss that compiled code asks for, on our function."""
    from torch._dynamo.variables.base import VariableTracker
    from torch._dynamo.variables.misc import LambdaVariable

    options = (
        dict(zip(list(inspect.signature(_TORCH.cross_entropy).parameters)[2:], args, strict=False)) | kwargs
    )
    function = VariableTracker.build(tx, _REPLACEMENTS[_TORCH.cross_entropy])
    return LambdaVariable(lambda input, target: function.call_function(tx, [input, target], options))


def patch() -> None:
    """Put fastreg's dropout and cross-entropy under torch.nn.functional, for the whole process, until
    `unpatch`.

    On a CPU, attention with dropout computes what torch computes, with fastreg's dropout in it. On a GPU it
    stays torch's, and so does all dropout under torch.compile, which fuses it into the operations around it.
    `fastreg.dropout` by name is always ours.

    The patched functions are exchanged among the globals of every loaded module, also after `from
    torch.nn.functional import dropout`. Functions kept elsewhere (in a partial, a default argument) are not
    found.
    Inputs for which fastreg has no kernel (other devices and dtypes, tensor subclasses, weights that require
    a gradient) and transforms (functorch, forward-mode derivatives, torch.jit) go to torch as before. Calling
    it twice does no harm.
    """
    global _patched
    if _patched:
        return
    # Both keep the functions that they find at their first call, which must be torch's.
    torch.overrides.get_testing_overrides()
    torch.overrides.get_overridable_functions()
    _tell_dynamo(True)
    _patched = True
    _changed.extend(_exchange(_REPLACEMENTS))


def unpatch() -> None:
    """Undo `patch`: every name refers to torch's own function again. Without a patch it does nothing.

    A replacement kept elsewhere while patched calls torch's function from now on.
    """
    global _patched
    if not _patched:
        return
    _patched = False
    for namespace in _changed:
        _exchange_in(namespace, _ORIGINALS)
    _changed.clear()
    _exchange(_ORIGINALS)  # modules imported since
    _tell_dynamo(False)


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """`patch` for a block of code; inside another patch it changes nothing.

    >>> with fastreg.patched():
    ...     train(model)
    """
    global _blocks
    if _patched and not _blocks:
        yield
        return
    patch()
    _blocks += 1  # threads may leave their blocks in any order
    try:
        yield
    finally:
        _blocks -= 1
        if not _blocks:
            unpatch()


_MODULES = {
    getattr(torch.nn, name): getattr(nn, name)
    for name in (
        "Dropout",
        "Dropout1d",
        "Dropout2d",
        "Dropout3d",
        "AlphaDropout",
        "FeatureAlphaDropout",
        "CrossEntropyLoss",
    )
}


_Model = TypeVar("_Model", bound=torch.nn.Module)


def convert(model: _Model) -> _Model:
    """Exchange the dropout and cross-entropy modules of a model for fastreg's, in place.

    Modules keep their identity, name, mode, hooks and attributes; subclasses of torch's modules are left
    alone. Stochastic depth of timm (`DropPath`) and of torchvision (`StochasticDepth`, mode "row") becomes
    `fastreg.nn.DropPath`.

    Args:
        model: Module.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is no Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        kind = f"{type(module).__module__}.{type(module).__name__}"
        if type(module) in _MODULES:
            module.__class__ = _MODULES[type(module)]
        elif kind == "timm.layers.drop.DropPath":
            module.p = module.drop_prob or 0.0  # type: ignore[assignment]
            module.__class__ = nn.DropPath
        elif kind == "torchvision.ops.stochastic_depth.StochasticDepth" and module.mode == "row":
            module.scale_by_keep = True  # type: ignore[assignment]
            module.__class__ = nn.DropPath
    return model
