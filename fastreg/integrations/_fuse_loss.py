"""`fuse_loss`: a language model of transformers gets its loss from the hidden states."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from .._checks import check_choice, check_number
from .._transforms import autocast_dtype
from ._unmade_logits import UnmadeLogits, Usage


class _Head:
    """The forward method of the last layer. It belongs to the layer, so that copies and pickles of a model
    have one of their own.
    """

    def __init__(self, layer: nn.Linear, usage: Usage) -> None:
        self.layer, self.usage = layer, usage

    def __call__(self, input: Tensor) -> Any:
        weight, bias = self.layer.weight, self.layer.bias
        if not self.usage.running:
            return F.linear(input, weight, bias)
        dtype = autocast_dtype(input.device.type) or input.dtype
        return UnmadeLogits(self.usage, input, weight, bias, dtype)


class _Begin:
    """Before the model runs: whether it will compute a loss."""

    def __init__(self, usage: Usage, position: int, always: bool) -> None:
        self.usage, self.position, self.always = usage, position, always

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        labels = args[self.position] if len(args) > self.position else kwargs.get("labels")
        wanted = labels is not None or kwargs.get("shift_labels") is not None
        wanted = wanted or (self.always and model.training)
        if not is_compiling() and "forward" not in vars(layer := _head_of(model)):
            # New embeddings bring a new layer.
            layer.forward = _Head(layer, self.usage)  # type: ignore[method-assign]
        self.usage.running = wanted and torch.is_grad_enabled()


class _End:
    """After it, whether it returned or raised."""

    def __init__(self, usage: Usage) -> None:
        self.usage = usage

    def __call__(self, model: nn.Module, args: tuple, output: Any) -> None:
        self.usage.running = False


def fuse_loss(
    model: nn.Module,
    *,
    label_smoothing: float | None = None,
    smoothing: Literal["uniform", "others"] | None = None,
    z_loss: float | None = None,
    always: bool = False,
) -> nn.Module:
    """Let a language model of transformers compute its loss by `fastreg.linear_cross_entropy`, which never
    holds the logits.

    ::

        model = AutoModelForCausalLM.from_pretrained(...)
        fuse_loss(model, label_smoothing=0.1)
        Trainer(model, arguments, train_dataset=...).train()

    It does not matter how the model forms its loss: labels, their shift, ignored tokens, num_items_in_batch
    and further terms are the model's own affair, as before. Only its last layer gives something that stands
    for the logits, and the cross-entropy of it is the fused one. Causal, masked and encoder-decoder models
    have it, with tied weights, biases and logits that are scaled.

    Where no gradients are recorded (evaluation, generation) and where there are no labels, the model is what
    it was. `output.logits` of a fused run makes the logits when they are looked at: `output.logits.tensor()`,
    or any function of torch.

    Args:
        model: of transformers, by itself or in torch.compile, DistributedDataParallel or a PeftModel, whose
            output layer is a `torch.nn.Linear`.
        label_smoothing, smoothing, z_loss: as in `fastreg.cross_entropy`; None: what the model asks for.
            Trainer's own `label_smoothing_factor` takes the labels away from the model, so that its loss is
            not the fused one.
        always: in training without labels, too, which is what `Trainer(compute_loss_func=loss(...))` needs.

    Returns:
        The model, changed in place; `unfuse_loss` undoes it. Called again, the new options hold.

    Raises:
        TypeError: the model has no output layer, no argument `labels`, or the layer is no Linear.
        ValueError: an option out of range.
        RuntimeError: from the model's run, where a step between layer and loss needs the logits (Gemma 2
            sends them through a tanh); it names the step.

    The weight of the layer must be whole while the loss is computed: with FSDP let it belong to the root.

    Source: Hsu et al. 2024, Liger kernel, for the loss by chunks.
    """
    options = {"label_smoothing": label_smoothing, "smoothing": smoothing, "z_loss": z_loss}
    if label_smoothing is not None:
        check_number("fuse_loss", "label_smoothing", label_smoothing, 0, 1)
    if smoothing is not None:
        check_choice("fuse_loss", "smoothing", smoothing, ("uniform", "others"))
    if z_loss is not None:
        check_number("fuse_loss", "z_loss", z_loss, 0, torch.finfo(torch.float64).max)
    inner = _inner(model)
    layer = _head_of(inner)
    names = list(inspect.signature(type(inner).forward).parameters)[1:]
    if "labels" not in names:
        raise TypeError(
            f"fuse_loss: model must take labels and compute its loss, got {type(inner).__name__}, whose "
            f"forward takes {', '.join(names)}; take a class for language models (AutoModelForCausalLM)"
        )
    unfuse_loss(inner)
    usage = Usage(**{name: value for name, value in options.items() if value is not None})
    layer.forward = _Head(layer, usage)  # type: ignore[method-assign]
    inner.register_forward_pre_hook(_Begin(usage, names.index("labels"), always), with_kwargs=True)
    inner.register_forward_hook(_End(usage), always_call=True)
    return model


def unfuse_loss(model: nn.Module) -> nn.Module:
    """Undo `fuse_loss`: the model computes logits and loss as it did before.

    Args:
        model: any model; one that is not fused stays as it is.

    Returns:
        The model, changed in place.
    """
    inner = _inner(model)
    for hooks in (inner._forward_pre_hooks, inner._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, (_Begin, _End))]:
            del hooks[key]
            for marks in (inner._forward_pre_hooks_with_kwargs, inner._forward_hooks_always_called):
                marks.pop(key, None)
    for layer in inner.modules():
        if isinstance(vars(layer).get("forward"), _Head):
            del layer.forward
    return model


def _inner(model: Any) -> nn.Module:
    """The model of transformers in what others have put around it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_loss: model must be a torch.nn.Module, got {type(model).__name__}")
    while True:
        for name in ("_orig_mod", "module"):
            if isinstance(inner := getattr(model, name, None), nn.Module):
                break
        else:
            if not callable(base := getattr(model, "get_base_model", None)):
                return model
            inner = base()
        if inner is model:
            return model
        model = inner


def _head_of(model: nn.Module) -> nn.Linear:
    """The layer that gives the logits."""
    get = getattr(model, "get_output_embeddings", None)
    layer = get() if callable(get) else None
    if layer is None:
        raise TypeError(
            f"fuse_loss: model must be a language model of transformers with an output layer, got "
            f"{type(model).__name__}, which has none; take a class for language models "
            "(AutoModelForCausalLM, AutoModelForMaskedLM)"
        )
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise TypeError(
            f"fuse_loss: the output layer must be a torch.nn.Linear, got {type(layer).__name__}; leave it "
            "out of what adapts or quantises the model"
        )
    return layer
