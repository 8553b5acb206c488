"""How an optimiser's operator is declared and called: one step over lists of tensors, by a few numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.compiler import is_compiling

from ._registry import define, define_kernel

# Steps the lists by the numbers and the other options: step(lists, numbers, others).
Step = Callable[[Sequence[Sequence[torch.Tensor]], Sequence[float], Sequence[Any]], None]


def define_step(
    name: str,
    plain: Callable[..., None],
    *,
    lists: str,
    numbers: Sequence[str],
    unsigned: Sequence[str],
    options: str,
) -> Step:
    """Declare `<name>_(lists, numbers, options)`, whose definition is `plain`, and return what calls it.

    The kernels take no negative number of those that are `unsigned`, which a parameter group may be given
    later, to climb for example: a step with one goes to `plain`.

    Beside it `<name>_numbers_` is the same for a compiled step whose numbers change, under a schedule for
    example. torch.compile makes a new graph for every value of an operator's float, but not for the values in
    a tensor. It lies on the CPU, where reading it waits for no device.
    """
    floats = ", ".join(f"float {number}" for number in numbers)
    count, places = lists.count("[]"), [numbers.index(number) for number in unsigned]
    define(f"{name}_({lists}, {floats}, {options}) -> ()", plain=plain)

    def step(lists: Sequence[Any], numbers: Sequence[float], others: Sequence[Any]) -> None:
        if is_compiling() and not (_are_fixed(numbers) and min(numbers[i] for i in places) >= 0):
            by_tensor(*lists, _stacked(numbers), *others)
        elif min(numbers[i] for i in places) < 0:
            plain(*lists, *numbers, *others)
        else:
            operator(*lists, *numbers, *others)

    def kernel(*arguments: Any) -> None:
        step(arguments[:count], arguments[count].tolist(), arguments[count + 1 :])

    define_kernel(f"{name}_numbers_({lists}, Tensor numbers, {options}) -> ()", kernel)
    for each in (f"{name}_", f"{name}_numbers_"):
        torch.library.register_fake(f"fastreg::{each}", _nothing, allow_override=True)
    operator = getattr(torch.ops.fastreg, f"{name}_").default
    by_tensor = getattr(torch.ops.fastreg, f"{name}_numbers_").default
    return step


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _are_fixed(numbers: Sequence[float]) -> bool:
    """Whether torch.compile takes the numbers for constants, and not for inputs of its graph. It knows on
    which side of a bound a constant lies, but not of an input.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # its import takes half a second

    bound = 0.7071067811865475  # any number will do that no compiled code compares with
    return all(
        statically_known_true(number > bound) or statically_known_true(number <= bound) for number in numbers
    )


def _stacked(numbers: Sequence[float]) -> torch.Tensor:
    """The numbers as one tensor, which stay inputs of a compiled graph, inductor's too: as factors of a
    tensor, rather than its contents.
    """
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * number for number in numbers])
