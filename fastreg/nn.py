"""Modules over the functions: each is a subclass of its torch namesake, so that isinstance checks and
checkpoints carry over.
"""

import torch

from ._checks import check_choice, check_number
from ._cross_entropy import cross_entropy
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

    rescale = "train"

    def __init__(self, p=0.5, inplace=False, *, rescale="train"):
        check_number("Dropout", "p", p, 0, 1)
        check_choice("Dropout", "rescale", rescale, ("train", "inference"))
        super().__init__(p, inplace)
        self.rescale = rescale

    def forward(self, input):
        """Apply it; (*) -> (*)."""
        return dropout(input, self.p, self.training, self.inplace, rescale=self.rescale)

    def extra_repr(self):
        """The arguments as in torch, and `rescale` where it is not the default."""
        return super().extra_repr() + ("" if self.rescale == "train" else f", rescale={self.rescale!r}")


class _CheckedP:
    """torch's own check lets NaN and strings of digits pass."""

    def __init__(self, p=0.5, inplace=False):
        check_number(type(self).__name__, "p", p, 0, 1)
        super().__init__(p, inplace)


class Dropout1d(_CheckedP, torch.nn.Dropout1d):
    """Zeroes channels of (N, C, L) or (C, L); drop-in for `torch.nn.Dropout1d`, on `fastreg.dropout1d`."""

    def forward(self, input):
        """Apply it; (N, C, L) -> (N, C, L)."""
        return dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(_CheckedP, torch.nn.Dropout2d):
    """Zeroes channels of (N, C, H, W); drop-in for `torch.nn.Dropout2d`, on `fastreg.dropout2d`."""

    def forward(self, input):
        """Apply it; (N, C, H, W) -> (N, C, H, W)."""
        return dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(_CheckedP, torch.nn.Dropout3d):
    """Zeroes channels of (N, C, D, H, W); drop-in for `torch.nn.Dropout3d`, on `fastreg.dropout3d`."""

    def forward(self, input):
        """Apply it; (N, C, D, H, W) -> (N, C, D, H, W)."""
        return dropout3d(input, self.p, self.training, self.inplace)


class AlphaDropout(_CheckedP, torch.nn.AlphaDropout):
    """Dropout that keeps mean and variance after SELU; drop-in for `torch.nn.AlphaDropout`, on
    `fastreg.alpha_dropout`.
    """

    def forward(self, input):
        """Apply it; (*) -> (*)."""
        return alpha_dropout(input, self.p, self.training, self.inplace)


class FeatureAlphaDropout(_CheckedP, torch.nn.FeatureAlphaDropout):
    """Alpha dropout of whole channels of (N, C, ...); drop-in for `torch.nn.FeatureAlphaDropout`."""

    def forward(self, input):
        """Apply it; (N, C, ...) -> (N, C, ...)."""
        return feature_alpha_dropout(input, self.p, self.training, self.inplace)


class DropPath(torch.nn.Module):
    """Stochastic depth: zeroes whole samples of a residual branch while training, on `fastreg.drop_path`.

    Args:
        p: probability of zeroing a sample, in [0, 1].
        scale_by_keep: divide the kept samples by 1 - p.

    Shape: (N, ...) -> (N, ...).
    """

    def __init__(self, p=0.5, *, scale_by_keep=True):
        super().__init__()
        check_number("DropPath", "p", p, 0, 1)
        self.p, self.scale_by_keep = p, scale_by_keep

    def forward(self, input):
        """Apply it; (N, ...) -> (N, ...)."""
        return drop_path(input, self.p, self.training, scale_by_keep=self.scale_by_keep)

    def extra_repr(self):
        """The arguments."""
        return f"p={self.p}, scale_by_keep={self.scale_by_keep}"


class DropoutAdd(torch.nn.Module):
    """The end of a residual block, dropout(input + bias) + residual in one pass, on `fastreg.dropout_add`.

    Args:
        p: probability of dropping an element of input + bias while training, in [0, 1].

    Shape: input (*, C), residual (*, C) and bias (C,) or None -> (*, C). The bias is the one that the linear
    layer before leaves out; it stays that layer's parameter.
    """

    def __init__(self, p=0.5):
        super().__init__()
        check_number("DropoutAdd", "p", p, 0, 1)
        self.p = p

    def forward(self, input, residual, bias=None):
        """Apply it; (*, C), (*, C) and (C,) -> (*, C)."""
        return dropout_add(input, residual, self.p, bias, self.training)

    def extra_repr(self):
        """The arguments."""
        return f"p={self.p}"


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Cross-entropy with smoothed targets; drop-in for `torch.nn.CrossEntropyLoss`, on
    `fastreg.cross_entropy`.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as in torch.
        smoothing, z_loss, all_ignored, loss_dtype: as in `fastreg.cross_entropy`.

    Shape: (C,), (N, C) or (N, C, d1, ...) and targets -> () or the targets' shape.
    """

    smoothing, z_loss, all_ignored, loss_dtype = "uniform", 0.0, "nan", None

    def __init__(
        self,
        weight=None,
        size_average=None,
        ignore_index=-100,
        reduce=None,
        reduction="mean",
        label_smoothing=0.0,
        *,
        smoothing="uniform",
        z_loss=0.0,
        all_ignored="nan",
        loss_dtype=None,
    ):
        op = "CrossEntropyLoss"
        check_choice(op, "reduction", reduction, ("none", "mean", "sum"))
        check_choice(op, "smoothing", smoothing, ("uniform", "others"))
        check_choice(op, "all_ignored", all_ignored, ("nan", "zero"))
        check_number(op, "label_smoothing", label_smoothing, 0, 1)
        check_number(op, "z_loss", z_loss, 0)
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.smoothing, self.z_loss, self.all_ignored, self.loss_dtype = (
            smoothing,
            z_loss,
            all_ignored,
            loss_dtype,
        )

    def forward(self, input, target):
        """The loss of logits `input` against `target`."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            smoothing=self.smoothing,
            z_loss=self.z_loss,
            all_ignored=self.all_ignored,
            loss_dtype=self.loss_dtype,
        )


_WEIGHTED = (
    torch.nn.Linear,
    torch.nn.Conv1d,
    torch.nn.Conv2d,
    torch.nn.Conv3d,
    torch.nn.ConvTranspose1d,
    torch.nn.ConvTranspose2d,
    torch.nn.ConvTranspose3d,
)
# f(a x) = a f(x) for a > 0: the factor passes through on its way to the weights.
_HOMOGENEOUS = (
    torch.nn.Identity,
    torch.nn.ReLU,
    torch.nn.LeakyReLU,
    torch.nn.Flatten,
    torch.nn.Unflatten,
    torch.nn.MaxPool1d,
    torch.nn.MaxPool2d,
    torch.nn.MaxPool3d,
    torch.nn.AvgPool1d,
    torch.nn.AvgPool2d,
    torch.nn.AvgPool3d,
    torch.nn.AdaptiveAvgPool1d,
    torch.nn.AdaptiveAvgPool2d,
    torch.nn.AdaptiveAvgPool3d,
)
_HOMOGENEOUS_FUNCTIONS = (torch.relu, torch.nn.functional.relu, torch.flatten, torch.nn.functional.leaky_relu)
_HOMOGENEOUS_METHODS = (
    "relu",
    "flatten",
    "view",
    "reshape",
    "permute",
    "transpose",
    "contiguous",
    "squeeze",
    "unsqueeze",
)


class _Tracer(torch.fx.Tracer):
    """Sees our modules as torch.fx sees torch's: as one call each."""

    def is_leaf_module(self, module, name):
        return type(module).__module__ == __name__ or super().is_leaf_module(module, name)


def fold_dropout(model):
    """Turn a model trained with textbook dropout into one without: w <- (1 - p) * w once, and the layer is
    gone.

    Every `Dropout(rescale="inference")` is followed through ReLU, pooling, reshaping and other functions with
    f(a x) = a f(x) to the Linear and Conv layers that read it, whose weights (not biases) are multiplied by 1
    - p; a dropout straight after an Embedding scales the embedding. In evaluation the result computes what
    `model` does.

    Args:
        model: Module whose forward torch.fx can trace. It is left as it is.

    Returns:
        A deep copy in evaluation mode with those layers replaced by Identity.

    Raises:
        ValueError: where folding would be wrong: a function that is not homogeneous (BatchNorm, sigmoid, an
            addition) lies between, the model's output depends on the dropout directly, a layer's weight is
            used elsewhere too, or the model cannot be traced.

    Source: Goodfellow, Bengio, Courville 2016, section 7.12 (weight scaling inference rule).
    """
    import copy

    try:
        model = copy.deepcopy(model).eval()
    except RuntimeError as error:  # weights that pruning or the old weight_norm have computed
        raise ValueError(
            f"fold_dropout: cannot copy the model ({error}); make computed weights plain parameters first"
        ) from error
    textbook = {m for m in model.modules() if isinstance(m, Dropout) and m.rescale == "inference" and m.p > 0}
    if not textbook:
        return model
    if model in textbook:
        raise ValueError(
            "fold_dropout: the model is a lone Dropout; there is no weight to scale; put a Linear or Conv "
            "layer after it"
        )
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        raise ValueError(
            f"fold_dropout: cannot trace the model's forward ({error}); fold it layer by layer"
        ) from error
    modules = dict(model.named_modules(remove_duplicate=False))  # a module may have two names
    names = {module: name for name, module in modules.items()}
    calls, owners = {}, {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[modules[node.target]] = calls.get(modules[node.target], 0) + 1
    for module in modules.values():
        for p in module.parameters(recurse=False):
            owners.setdefault(p, set()).add(module)
    read = {
        node.target for node in graph.nodes if node.op == "get_attr"
    }  # parameters that the forward itself uses
    for name, p in model.named_parameters(remove_duplicate=False):
        if name in read:
            owners[p].add(None)

    scales = {}  # weighted layer -> factor
    for node in graph.nodes:
        if node.op == "call_module" and modules[node.target] in textbook:
            keep = 1 - modules[node.target].p
            for layer in _readers_of(node, modules):
                if layer._parameters.get("weight") is None:
                    raise ValueError(
                        f"fold_dropout: the weight of {names[layer]!r} is computed (a parametrization); make "
                        f"it a "
                        "plain parameter first, with torch.nn.utils.parametrize.remove_parametrizations"
                    )
                if calls[layer] > 1 or len(owners[layer.weight]) > 1:
                    raise ValueError(
                        f"fold_dropout: the weight of {names[layer]!r} is used in several places and cannot "
                        f"be scaled for one; "
                        "give the dropout a layer of its own"
                    )
                scales[layer] = scales.get(layer, 1.0) * keep
    with torch.no_grad():
        for layer, factor in scales.items():
            layer.weight.mul_(factor)
    for name, module in modules.items():
        if module in textbook:
            parent, _, leaf = name.rpartition(".")
            setattr(modules[parent], leaf, torch.nn.Identity())
    return model


def _readers_of(dropout_node, modules):
    """The weighted layers into which the output of this node flows; the Embedding before it where it comes
    straight from one.
    """
    before = dropout_node.all_input_nodes[0]
    layer = modules[before.target] if before.op == "call_module" else None
    if isinstance(layer, torch.nn.Embedding) and layer.max_norm is None and len(before.users) == 1:
        return [layer]
    found, open_nodes = [], list(dropout_node.users)
    while open_nodes:
        node = open_nodes.pop()
        module = modules[node.target] if node.op == "call_module" else None
        if isinstance(module, _WEIGHTED):
            found.append(module)
        elif (
            isinstance(module, (*_HOMOGENEOUS, torch.nn.Dropout))
            or (node.op == "call_function" and node.target in _HOMOGENEOUS_FUNCTIONS)
            or (node.op == "call_method" and node.target in _HOMOGENEOUS_METHODS)
        ):
            open_nodes.extend(node.users)
        elif node.op == "call_method" and node.target in ("size", "dim"):
            continue  # tells the shape, whatever the values
        elif node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device"):
            continue
        else:
            what = (
                "the model's output"
                if node.op == "output"
                else type(module).__name__
                if module
                else node.target
            )
            raise ValueError(
                f"fold_dropout: the dropout {dropout_node.target!r} reaches {what} before a Linear or Conv "
                f"layer, "
                "where its factor cannot be moved into weights; place it directly before such a layer"
            )
    return found
