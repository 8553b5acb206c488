"""Folding of textbook dropout into the weights that follow it: w <- (1 - p) * w, once after training, instead
of a factor 1 - p in every evaluation (Goodfellow, Bengio, Courville 2016, section 7.12).
"""

from __future__ import annotations

import copy
from collections import Counter

import torch

_WEIGHTED = (
    torch.nn.Linear,
    torch.nn.Conv1d,
    torch.nn.Conv2d,
    torch.nn.Conv3d,
    torch.nn.ConvTranspose1d,
    torch.nn.ConvTranspose2d,
    torch.nn.ConvTranspose3d,
)
# Modules with f(a x) = a f(x) for a > 0, through which the factor passes on its way to the weights.
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


def fold_dropout(model: torch.nn.Module) -> torch.nn.Module:
    """Turn a model trained with textbook dropout into one without dropout: w <- (1 - p) * w, once.

    Every `Dropout(rescale="inference")` is followed through ReLU, pooling, reshaping and other functions with
    f(a x) = a f(x) to the Linear and Conv layers that read it, whose weights (not biases) are multiplied by
    1 - p; a dropout straight after an Embedding scales the embedding. In evaluation the result computes what
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
    model = _copy_in_evaluation(model)
    textbook = {module for module in model.modules() if _is_textbook(module)}
    if not textbook:
        return model
    if model in textbook:
        raise ValueError(
            "fold_dropout: the model is a lone Dropout; there is no weight to scale; put a Linear or Conv "
            "layer after it"
        )
    graph = _trace(model)
    modules = dict(model.named_modules(remove_duplicate=False))  # a module may have two names
    uses = _Uses(model, graph, modules)

    scales: dict[torch.nn.Module, float] = {}  # layer with weights -> factor
    for node in graph.nodes:
        if node.op == "call_module" and modules[node.target] in textbook:
            for layer in _readers_of(node, modules):
                uses.check_single(layer)
                scales[layer] = scales.get(layer, 1.0) * (1 - modules[node.target].p)
    with torch.no_grad():
        for layer, factor in scales.items():
            layer.get_parameter("weight").mul_(factor)

    for name, module in modules.items():
        if module in textbook:
            parent, _, leaf = name.rpartition(".")
            setattr(modules[parent], leaf, torch.nn.Identity())
    return model


def _is_textbook(module: torch.nn.Module) -> bool:
    """Whether a module multiplies by 1 - p in evaluation: fastreg.nn.Dropout alone has a `rescale`."""
    return (
        isinstance(module, torch.nn.Dropout)
        and getattr(module, "rescale", None) == "inference"
        and module.p > 0
    )


def _copy_in_evaluation(model: torch.nn.Module) -> torch.nn.Module:
    try:
        return copy.deepcopy(model).eval()
    except RuntimeError as error:  # weights that pruning or the old weight_norm have computed
        raise ValueError(
            f"fold_dropout: cannot copy the model ({error}); make computed weights plain parameters first"
        ) from error


class _Tracer(torch.fx.Tracer):
    """Sees the modules of fastreg.nn as torch.fx sees torch's: as one call each."""

    def is_leaf_module(self, module: torch.nn.Module, name: str) -> bool:
        return type(module).__module__ == "fastreg.nn" or super().is_leaf_module(module, name)


def _trace(model: torch.nn.Module) -> torch.fx.Graph:
    try:
        return _Tracer().trace(model)
    except Exception as error:
        raise ValueError(
            f"fold_dropout: cannot trace the model's forward ({error}); fold it layer by layer"
        ) from error


class _Uses:
    """What uses each weight. A weight that has a single use can be scaled for it."""

    def __init__(
        self, model: torch.nn.Module, graph: torch.fx.Graph, modules: dict[str, torch.nn.Module]
    ) -> None:
        self.names = {module: name for name, module in modules.items()}
        self.calls = Counter(modules[node.target] for node in graph.nodes if node.op == "call_module")
        self.owners: dict[torch.nn.Parameter, set[torch.nn.Module | None]] = {}
        for module in modules.values():
            for p in module.parameters(recurse=False):
                self.owners.setdefault(p, set()).add(module)
        # The model's forward may use a parameter itself, too.
        read = {node.target for node in graph.nodes if node.op == "get_attr"}
        for name, p in model.named_parameters(remove_duplicate=False):
            if name in read:
                self.owners[p].add(None)

    def check_single(self, layer: torch.nn.Module) -> None:
        """Raise unless the weight is a parameter of this layer alone and the layer runs once."""
        name = self.names[layer]
        if layer._parameters.get("weight") is None:
            raise ValueError(
                f"fold_dropout: the weight of {name!r} is computed (a parametrization); make it a plain "
                "parameter first, with torch.nn.utils.parametrize.remove_parametrizations"
            )
        if self.calls[layer] > 1 or len(self.owners[layer.get_parameter("weight")]) > 1:
            raise ValueError(
                f"fold_dropout: the weight of {name!r} is used in several places and cannot be scaled for "
                "one; give the dropout a layer of its own"
            )


def _module_of(node: torch.fx.Node, modules: dict[str, torch.nn.Module]) -> torch.nn.Module | None:
    """The module that a node of the graph calls, if it calls one."""
    return modules[str(node.target)] if node.op == "call_module" else None


def _readers_of(dropout_node: torch.fx.Node, modules: dict[str, torch.nn.Module]) -> list[torch.nn.Module]:
    """The layers whose weights take the factor of a dropout: those into which its output flows, or the
    Embedding before it where its input comes straight from one.
    """
    before = dropout_node.all_input_nodes[0]
    layer = _module_of(before, modules)
    if isinstance(layer, torch.nn.Embedding) and layer.max_norm is None and len(before.users) == 1:
        return [layer]
    found: list[torch.nn.Module] = []
    open_nodes = list(dropout_node.users)
    while open_nodes:
        node = open_nodes.pop()
        module = _module_of(node, modules)
        if isinstance(module, _WEIGHTED):
            found.append(module)
        elif (
            isinstance(module, (*_HOMOGENEOUS, torch.nn.Dropout))
            or (node.op == "call_function" and node.target in _HOMOGENEOUS_FUNCTIONS)
            or (node.op == "call_method" and node.target in _HOMOGENEOUS_METHODS)
        ):
            open_nodes.extend(node.users)
        elif node.op == "call_method" and node.target in ("size", "dim"):
            continue  # the shape does not depend on the factor
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
