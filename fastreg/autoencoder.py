"""Semi-supervised learning by representation: learn to encode unlabelled data, then classify from the code.

    min over encoder f, decoder g of the mean of |g(f(corrupt(x))) - x|^2,    corrupt: dropout on the input

Denoising autoencoder: Vincent, Larochelle, Bengio, Manzagol 2008; Goodfellow, Bengio, Courville 2016,
sections 14.5 and 15.1.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ._checks import check_count, check_generator, check_number
from ._dropout import dropout
from ._losses import trained_loss
from ._seeds import forked_generators
from ._types import Loss

__all__ = ["TiedDecoder", "pretrain_autoencoder"]


class TiedDecoder(torch.nn.Module):
    """The decoder that mirrors an encoder of Linear layers with their own weights transposed, and biases of
    its own.

    For an encoder x -> a2(W2 a1(W1 x + b1) + b2) it computes code -> W1^T a1(W2^T code + c2) + c1: half the
    weights to learn, and none that could grow without its mirror (Vincent et al. 2010, section 3.1).

    Args:
        encoder: Sequential, nested or not, of Linear layers, activations without parameters, dropout,
            Identity, and Flatten.

    Shape: (..., features of the code) -> (..., features of the input), flat where the encoder begins with
        Flatten.

    Raises:
        ValueError: a layer that has no such mirror; it is named.
    """

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        between: list[torch.nn.Module] = []  # activations since the last Linear
        layers: list[tuple[torch.nn.Linear, torch.nn.Module]] = []
        for name, module in _chain(encoder):
            if isinstance(module, torch.nn.Linear):
                layers.insert(0, (module, torch.nn.Sequential(*between) if layers else torch.nn.Identity()))
                between = []
            elif type(module).__module__ == torch.nn.modules.activation.__name__ and not list(
                module.parameters()
            ):
                between.append(module)
            elif not isinstance(
                module, (torch.nn.modules.dropout._DropoutNd, torch.nn.Identity, torch.nn.Flatten)
            ):
                raise ValueError(
                    f"TiedDecoder: expected Linear layers, activations, dropout and Flatten, got "
                    f"{type(module).__name__} at {name or 'the top'!r}; give pretrain_autoencoder a decoder "
                    f"of your own"
                )
        if not layers:
            raise ValueError(
                "TiedDecoder: expected an encoder with Linear layers, got none; give a decoder of your own"
            )
        self.layers = torch.nn.ModuleList(layer for layer, _ in layers)
        self.activations = torch.nn.ModuleList(activation for _, activation in layers)
        self.biases = torch.nn.ParameterList(layer.weight.new_zeros(layer.in_features) for layer, _ in layers)

    def forward(self, code: torch.Tensor) -> torch.Tensor:
        """Reconstruct the input."""
        for layer, activation, bias in zip(self.layers, self.activations, self.biases, strict=True):
            weight: Any = layer.weight
            code = activation(torch.nn.functional.linear(code, weight.t(), bias))
        return code


def _chain(module: torch.nn.Module, name: str = "") -> list[tuple[str, torch.nn.Module]]:
    """The layers of nested Sequentials in order, with their names."""
    if not isinstance(module, torch.nn.Sequential):
        return [(name, module)]
    return [
        pair for key, child in module.named_children() for pair in _chain(child, f"{name}.{key}".lstrip("."))
    ]


@torch.inference_mode(False)  # It trains even where the caller has switched gradients off.
@torch.enable_grad()
def pretrain_autoencoder(
    encoder: torch.nn.Module,
    data: torch.Tensor | Dataset | DataLoader,
    decoder: torch.nn.Module | None = None,
    *,
    epochs: int = 20,
    batch_size: int = 100,
    corruption: float = 0.5,
    loss: Loss | None = None,
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.nn.Module, list[float]]:
    """Train an encoder on unlabelled data to keep what is needed to restore its input; a classifier then
    starts from its code.

    ::

        encoder = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
        encoder, history = fr.pretrain_autoencoder(encoder, unlabelled)
        model = nn.Sequential(encoder, nn.Linear(128, 10))  # train it on the labelled data

    Args:
        encoder: Module, called as encoder(x); trained in place. Frozen parameters stay as they are.
        data: what to learn from: a tensor [N, ...], a Dataset or a DataLoader, whose items are x or tuples
            that begin with x (labels are not looked at); floating point. Batches go to the device of the
            encoder's first parameter.
        decoder: Module from the code to the reconstruction, with as many elements per sample as x, in
            whatever shape; trained in place with the encoder. None: `TiedDecoder(encoder)`; make that
            yourself to keep it.
        epochs: passes over the data, at least 1.
        batch_size: samples per step, for a tensor or a Dataset, shuffled anew in each epoch; a DataLoader has
            its own.
        corruption: probability p of zeroing an element of the encoder's input, by `fastreg.dropout` (which
            scales the others by 1 / (1 - p)); 0 is the plain autoencoder, which needs a code smaller than its
            input.
        loss: loss(reconstruction, x) -> tensor, both [B, elements], with one number or one value per sample
            as in `fgsm`, of which the mean is taken; `torch.nn.functional.mse_loss` if None.
            `binary_cross_entropy_with_logits` suits pixels in [0, 1].
        optimizer: callable(parameters) -> optimiser; `torch.optim.Adam` with its defaults if None, except
            for an eps of 1e-4 where parameters are float16, in which the default is 0.
        generator: torch.Generator on the CPU. A seed for all that is random is drawn from it; without it
            that starts from the state that torch's generators are in.

    Returns:
        (encoder, history): the encoder itself, and a list of the mean loss of each epoch (floats).

    Nothing else changes: training or evaluation mode of each submodule, `.grad`, and torch's generators, CPU
    and CUDA, are put back. Works under no_grad. Where training fails, the parameters and buffers are put back
    as well.

    Raises:
        ValueError: no data, a reconstruction of another size, numbers out of range, nothing to train, a loss
            that is not finite or is neither one number nor one value per sample, an encoder that
            `TiedDecoder` does not take.
        TypeError: an argument of the wrong kind, data that are not floating point.

    Source: Vincent et al. 2008, Extracting and composing robust features with denoising autoencoders; Hinton
    and Salakhutdinov 2006.
    """
    op = "pretrain_autoencoder"
    check_count(op, "epochs", epochs)
    check_count(op, "batch_size", batch_size)
    check_number(op, "corruption", corruption, 0, 1)
    _check_modules(op, encoder, decoder)
    check_generator(op, generator)
    batches = _batches(op, data, batch_size)
    decoder = TiedDecoder(encoder) if decoder is None else decoder
    both = torch.nn.ModuleList([encoder, decoder])
    parameters = [p for p in both.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            f"{op}: encoder and decoder have no parameter that requires a gradient; unfreeze them"
        )
    loss = torch.nn.functional.mse_loss if loss is None else loss
    device = next(both.parameters()).device
    history: list[float] = []

    with _restored(both), _seeded(generator):
        both.train()
        steps = (_adam if optimizer is None else optimizer)(parameters)
        for epoch in range(epochs):
            total: Any = 0
            count = 0
            for batch in batches():
                x = _inputs(op, batch, device)
                value = _restoration(op, encoder, decoder, x, corruption, loss)
                steps.zero_grad()
                value.backward()
                with torch.device("cpu"):  # torch 2.10's Adam counts on the default device, whatever that is
                    steps.step()
                total, count = total + value.detach() * len(x), count + len(x)
            history.append(float(total) / count if count else math.nan)
            if not math.isfinite(history[-1]):
                what = f"the loss is {history[-1]}" if count else "there are no data"
                raise ValueError(
                    f"{op}: {what} in epoch {epoch}; look for NaN in the data or lower the learning rate"
                )
    return encoder, history


def _check_modules(op: str, encoder: Any, decoder: Any) -> None:
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        if module is None and name == "decoder":
            continue
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"{op}: {name} must be a torch.nn.Module, got {type(module).__name__}")
        if any(torch.nn.parameter.is_lazy(p) for p in module.parameters()):
            raise ValueError(f"{op}: a lazy layer has no shape yet; run encoder and decoder once first")


def _restoration(
    op: str,
    encoder: torch.nn.Module,
    decoder: torch.nn.Module,
    x: torch.Tensor,
    corruption: float,
    loss: Loss,
) -> torch.Tensor:
    """The mean loss of the batch x, restored from its corrupted form."""
    reconstruction = decoder(encoder(dropout(x, corruption)))
    if reconstruction.numel() != x.numel():
        raise ValueError(
            f"{op}: the reconstruction needs the elements of x, {tuple(x.shape)}, got "
            f"{tuple(reconstruction.shape)}"
        )
    return trained_loss(op, loss, reconstruction.reshape(len(x), -1), x.reshape(len(x), -1), len(x))


def _batches(op: str, given: Any, batch_size: int) -> Callable[[], Iterable[Any]]:
    """A function that gives the batches of one epoch."""
    data: Any = given  # torch gives a Dataset no length in its types
    if isinstance(given, DataLoader):
        return lambda: data
    if not isinstance(given, (torch.Tensor, Dataset)):
        raise TypeError(f"{op}: data must be a tensor, a Dataset or a DataLoader, got {type(data).__name__}")
    if isinstance(given, IterableDataset):
        return lambda: DataLoader(data, batch_size)
    if (isinstance(given, torch.Tensor) and given.dim() < 2) or len(data) == 0:
        raise ValueError(
            f"{op}: data must be at least one sample, [N, ...], got {tuple(getattr(data, 'shape', [0]))}"
        )
    if isinstance(data, torch.Tensor):
        return lambda: (
            data[i.to(data.device)] for i in torch.randperm(len(data), device="cpu").split(batch_size)
        )
    return lambda: DataLoader(data, batch_size, shuffle=True)


def _inputs(op: str, batch: Any, device: torch.device) -> torch.Tensor:
    """The inputs of a batch, on the device of the model."""
    x = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(
            f"{op}: data must be floating-point tensors, or tuples that begin with one, got {got}; convert "
            f"with .float()"
        )
    x = x.detach().to(device)
    # A tensor that was made in inference mode cannot be saved for the backward pass.
    return x.clone() if x.is_inference() else x


@contextlib.contextmanager
def _seeded(generator: torch.Generator | None) -> Iterator[None]:
    """torch's generators start from a seed drawn from `generator`, if there is one, and are put back at the
    end.
    """
    seed = None
    if generator is not None:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with forked_generators():
        if seed is not None:
            for each in (
                torch.default_generator,
                *(torch.cuda.default_generators if torch.cuda.is_initialized() else ()),
            ):
                each.manual_seed(seed)
        yield


@contextlib.contextmanager
def _restored(model: torch.nn.Module) -> Iterator[None]:
    """Modes and gradients are put back at the end, and after an error parameters and buffers as well."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    for p, _ in gradients:
        p.grad = None
    try:
        yield
    except BaseException:
        model.load_state_dict(before)
        raise
    finally:
        for module, training in modes:
            module.training = training
        for p, grad in gradients:
            p.grad = grad


def _adam(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """torch's Adam; with its eps a float16 parameter that gets no gradient would become 0 / 0."""
    eps = 1e-4 if any(p.dtype == torch.float16 for p in parameters) else 1e-8
    return torch.optim.Adam(parameters, eps=eps)
