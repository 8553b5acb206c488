"""What the benchmarks of the optimisers share: shapes of models, parameters with their gradients, and torch's
sides with the lines that people write beside an optimiser.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

DECAY, MAX_NORM = 0.999, 1.0


def resnet50() -> list[tuple[int, ...]]:
    """The shapes of the 161 parameters of a ResNet-50 (He et al. 2016), in the order of torchvision's."""

    def convolution(inputs, outputs, kernel):
        """The weight, then weight and bias of its batch norm."""
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]

    shapes, inputs = convolution(3, 64, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += (
                convolution(inputs, width, 1)
                + convolution(width, width, 3)
                + convolution(width, 4 * width, 1)
            )
            if block == 0:
                shapes += convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def transformer() -> list[tuple[int, ...]]:
    """The shapes of four layers of a transformer of width 512."""
    layer = [(1536, 512), (1536,), (512, 512), (512,), (2048, 512), (2048,), (512, 2048), (512,)]
    return (layer + 4 * [(512,)]) * 4


def tensors(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[list[torch.Tensor]]:
    """Parameters and gradients of these shapes."""
    shapes = list(shapes)
    return [[torch.randn(shape, device=device).to(dtype) for shape in shapes] for _ in range(2)]


def parameters(start: list[torch.Tensor], gradients: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    """Copies of `start` as parameters that have copies of `gradients`."""
    copies = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    for parameter, gradient in zip(copies, gradients, strict=True):
        parameter.grad = gradient.clone()
    return copies


def with_l1(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, l1: float) -> None:
    """A step with the usual line for L1."""
    with torch.no_grad():
        for p in parameters:
            p.grad.add_(p.sign(), alpha=l1)  # type: ignore[union-attr]
    optimizer.step()


def with_clipping_and_average(
    ours: Callable[..., torch.optim.Optimizer],
    theirs: Callable[..., torch.optim.Optimizer],
    start: list[torch.Tensor],
    gradients: list[torch.Tensor],
) -> dict[str, Callable[[], Any]]:
    """The sides of a step that clips and averages; `theirs` takes torch's `fused`."""
    copies = parameters(start, gradients)
    model = torch.nn.ParameterList(copies)
    optimizer = theirs(copies, fused=True)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY)
    )

    def three_calls() -> None:
        torch.nn.utils.clip_grad_norm_(copies, MAX_NORM)
        optimizer.step()
        average.update_parameters(model)

    return {
        "fastreg": ours(parameters(start, gradients), ema=DECAY, max_norm=MAX_NORM).step,
        "torch": three_calls,
        "floor": theirs(parameters(start, gradients), fused=True).step,
    }
