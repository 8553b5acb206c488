"""`fuse_loss`: a language model of transformers gets its loss from the hidden states."""

from __future__ import annotations

import inspect
import warnings
from threading import get_ident
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
        if not self.usage.on:  # The model itself is no longer fused, what is around it has not heard of it.
            return
        labels = args[self.position] if len(args) > self.position else kwargs.get("labels")
        wanted = labels is not None or kwargs.get("shift_labels") is not None
        wanted = wanted or (self.always and model.training)
        wanted = wanted and torch.is_grad_enabled()
        if is_compiling():
            self.usage.is_compiled_running = wanted
            return
        # New embeddings bring a new layer, and a replica has one of its own.
        layer = _head_of(_around(model)[-1])
        head = vars(layer).get("forward")
        if head is None or (isinstance(head, _Head) and head.layer is not layer):
            layer.forward = _Head(layer, self.usage)  # type: ignore[method-assign]
        if wanted and getattr(model, "_is_replica", False):
            warnings.warn(
                "fuse_loss: torch.nn.DataParallel gathers the logits of its replicas, which compute the loss "
                "from them as before; use DistributedDataParallel",
                RuntimeWarning,
                stacklevel=2,
            )
            wanted = False
        (self.usage.threads.add if wanted else self.usage.threads.discard)(get_ident())


class _End:
    """After it, whether it returned or raised."""

    def __init__(self, usage: Usage) -> None:
        self.usage = usage

    def __call__(self, model: nn.Module, args: tuple, output: Any) -> None:
        self.usage.is_compiled_running = False
        if self.usage.threads:
            self.usage.threads.discard(get_ident())


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
    or any function of torch; before `optimizer.step()`, after which they would be those of other weights. For
    a PeftModel give that, not the model in it; under torch.nn.DataParallel the loss is not fused.

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
        TypeError: the model has no output layer, no argument `labels`, or the layer is no Linear or one whose
            forward method somebody has replaced (accelerate does where it spreads a model over devices).
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
    around = _around(model)
    inner = around[-1]
    layer = _head_of(inner)
    names = _arguments(inner)
    if "labels" not in names:
        raise TypeError(
            f"fuse_loss: model must take labels and compute its loss, got {type(inner).__name__}, whose "
            f"forward takes {', '.join(names)}; take a class for language models (AutoModelForCausalLM)"
        )
    unfuse_loss(model)
    if "forward" in vars(layer):
        raise TypeError(
            "fuse_loss: the output layer must have the forward method of its class, got another, such as "
            "accelerate gives it to spread a model over devices; take that away first"
        )
    usage = Usage(**{name: value for name, value in options.items() if value is not None})
    layer.forward = _Head(layer, usage)  # type: ignore[method-assign]
    # A PeftModel may call the forward method of the model in it, which then does not notice the beginning.
    for module in [m for m in around[:-1] if callable(getattr(m, "get_base_model", None))] + [inner]:
        taken = _arguments(module)
        position = taken.index("labels") if "labels" in taken else names.index("labels")
        module.register_forward_pre_hook(_Begin(usage, position, always), with_kwargs=True)
        module.register_forward_hook(_End(usage), always_call=True)
    return model


def unfuse_loss(model: nn.Module) -> nn.Module:
    """Undo `fuse_loss`: the model computes logits and loss as it did before.

    Args:
        model: any model; one that is not fused stays as it is.

    Returns:
        The model, changed in place.
    """
    around = _around(model)
    for module in around:
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if not isinstance(hook, (_Begin, _End)):
                    continue
                hook.usage.on = False
                del hooks[key]
                for marks in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called):
                    marks.pop(key, None)
    for layer in around[-1].modules():
        if isinstance(vars(layer).get("forward"), _Head):
            del layer.forward
    return model


def _arguments(model: nn.Module) -> list[str]:
    return list(inspect.signature(type(model).forward).parameters)[1:]


def _around(model: Any) -> list[nn.Module]:
    """What others have put around a model of transformers, from outside, and at last the model itself."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_loss: model must be a torch.nn.Module, got {type(model).__name__}")
    found = [model]
    while True:
        for name in ("_orig_mod", "module"):
            if isinstance(inner := getattr(model, name, None), nn.Module):
                break
        else:
            if not callable(base := getattr(model, "get_base_model", None)):
                return found
            inner = base()
        if inner is model:
            return found
        model = inner
        found.append(model)


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
