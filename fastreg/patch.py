"""fastreg under code that knows only torch: for a block of code, for the process, or for one model.

Patched are `dropout`, `dropout1d`, `dropout2d`, `dropout3d`, `alpha_dropout`, `feature_alpha_dropout` and `cross_entropy` of
torch.nn.functional, under every name that a loaded module has for them. torch's modules (nn.Dropout, nn.CrossEntropyLoss,
nn.TransformerEncoderLayer, nn.MultiheadAttention with explicit weights) call these and so change with them. Dropout inside
scaled_dot_product_attention and in torch's RNN kernels stays torch's.
"""

import contextlib
import functools
import sys

import torch
import torch.nn.functional as F

from . import nn
from .cross_entropy import cross_entropy
from .dropout import alpha_dropout, dropout, dropout1d, dropout2d, dropout3d, feature_alpha_dropout

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _has_kernel(tensor):
    return (
        type(tensor) in _PLAIN
        and tensor.device.type == "cpu"
        and tensor.dtype in _DTYPES
        and tensor.layout == torch.strided
        and not torch._C._are_functorch_transforms_active()
    )


def _instead_of(original, ours):
    @functools.wraps(original)
    def run_dropout(input, p=0.5, training=original.__defaults__[1], inplace=False):
        run = ours if _has_kernel(input) else original
        return run(input, p, training, inplace)

    return run_dropout


_torch_cross_entropy = F.cross_entropy


@functools.wraps(_torch_cross_entropy)
def _cross_entropy(input, target, *args, **kwargs):
    plain = _has_kernel(input) and type(target) in _PLAIN and target.device == input.device
    return (cross_entropy if plain else _torch_cross_entropy)(input, target, *args, **kwargs)


_REPLACEMENTS = {
    getattr(F, ours.__name__): _instead_of(getattr(F, ours.__name__), ours)
    for ours in (dropout, dropout1d, dropout2d, dropout3d, alpha_dropout, feature_alpha_dropout)
}
_REPLACEMENTS[_torch_cross_entropy] = _cross_entropy
_changed = []  # (namespace, name, original), in the order of change


def patch():
    """Put fastreg's dropout and cross-entropy under torch.nn.functional, for the whole process, until `unpatch`.

    Every loaded module's global that is one of the patched functions is exchanged, `from torch.nn.functional import dropout`
    included; functions kept elsewhere (in a partial, a default argument) are not found. Inputs for which fastreg has no kernel
    (other devices and dtypes, tensor subclasses, functorch transforms) go to torch as before. Calling it twice does no harm.
    """
    if _changed:
        return
    for module in list(sys.modules.values()):
        namespace = getattr(module, "__dict__", None)
        if type(namespace) is not dict or namespace is globals():
            continue
        for name, value in list(namespace.items()):
            try:
                replacement = _REPLACEMENTS.get(value)
            except TypeError:  # unhashable
                continue
            if replacement is not None:
                _changed.append((namespace, name, value))
                namespace[name] = replacement


def unpatch():
    """Undo `patch`: every name refers to torch's own function again. Without a patch it does nothing."""
    while _changed:
        namespace, name, original = _changed.pop()
        namespace[name] = original


@contextlib.contextmanager
def patched():
    """`patch` for a block of code; inside another patch it changes nothing.

    >>> with fastreg.patched():
    ...     train(model)
    """
    if _changed:
        yield
        return
    patch()
    try:
        yield
    finally:
        unpatch()


_MODULES = {
    getattr(torch.nn, name): getattr(nn, name)
    for name in ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout", "CrossEntropyLoss")
}


def convert(model):
    """Exchange the dropout and cross-entropy modules of a model for fastreg's, in place.

    Modules keep their identity, name, mode, hooks and attributes; subclasses of torch's modules are left alone. Stochastic depth
    of timm (`DropPath`) and of torchvision (`StochasticDepth`, mode "row") becomes `fastreg.nn.DropPath`.

    Args:
        model: Module.

    Returns:
        The same model; if it is itself a stochastic-depth module, its replacement.

    Raises:
        TypeError: `model` is no Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if type(module) in _MODULES:
            module.__class__ = _MODULES[type(module)]
        for name, child in module.named_children():
            setattr(module, name, _stochastic_depth(child))
    return _stochastic_depth(model)


def _stochastic_depth(module):
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if kind == "timm.layers.drop.DropPath":
        new = nn.DropPath(module.drop_prob or 0.0, scale_by_keep=module.scale_by_keep)
    elif kind == "torchvision.ops.stochastic_depth.StochasticDepth" and module.mode == "row":
        new = nn.DropPath(module.p)
    else:
        return module
    return new.train(module.training)
