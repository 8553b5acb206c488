"""Randomness: one int64 seed is drawn per call, and every random number is a function of that seed and of an
index.

The function is Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, Parallel random numbers: as easy as 1, 2, 3).
The kernels compute it in csrc/common/philox.h. Here it stands in plain torch, for devices without kernels and
for tests: valid for every counter and key, equal to the kernels in every bit (tests/test_seeds.py).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from enum import IntEnum
from typing import Any

import torch
from torch.compiler import is_compiling
from torch.utils.checkpoint import CheckpointPolicy

from ._checks import is_int
from ._recomputation import drawn
from ._registry import define_composite
from ._transforms import is_exporting, is_transformed


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> torch.Tensor:
    """One int64 seed from `generator` or the default generator of the device, shape (1,), on `device` or on
    the CPU.

    A CUDA generator counts on the host. Where nothing records the work for later (a CUDA graph or
    torch.compile), the seed is made of its seed and its count, without a launch. A device that has no
    generator of its own draws from the CPU's.

    In a checkpoint that is computed again it is the seed of the forward pass, whatever generator was given.
    """
    return drawn(generator, lambda: _draw_seed(device, generator))


def _draw_seed(device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
    if device.type == "cuda" and not is_compiling():
        seed = _count_seed(device, generator)
        if seed is not None:
            return seed
    if is_compiling() and generator is None and device.type in ("cpu", "cuda") and not is_exporting():
        return torch.ops.fastreg.traced_seed(device)
    if device.type in ("cpu", "cuda", "meta"):
        return torch.randint(-(2**63), 2**63 - 1, (1,), device=device, generator=generator)
    if not is_compiling() and not _has_generator(device.type):
        return torch.randint(-(2**63), 2**63 - 1, (1,), device="cpu", generator=generator)
    # Not every device draws integers from a range of more than 32 bits.
    upper, lower = torch.randint(0, 2**32, (2,), device=device, generator=generator).split(1)
    return (upper << 32) | lower


def draw_seed_for(p: float, device: torch.device, generator: torch.Generator | None = None) -> torch.Tensor:
    """`draw_seed` of an op that drops with probability `p`. Where vmap does not let anybody draw, 1 needs no
    seed: nothing is left to chance then, and torch's dropout draws nothing.
    """
    if p != 1 or is_compiling():
        return draw_seed(device, generator)
    try:
        return draw_seed(device, generator)
    except RuntimeError:
        if not is_transformed():
            raise
    return torch.zeros(1, dtype=torch.int64, device="cpu")


def _draw_traced(device: torch.device) -> torch.Tensor:
    """A seed in compiled code.

    With a memory budget below 1 AOTAutograd computes parts of the forward pass again in the backward pass,
    random numbers among them, which would be others. It keeps the state of the generator for those that are
    marked as of a checkpoint. The marks are what nodes inherit while it records them.
    """
    inherited = torch.fx.traceback.current_meta
    before = dict(inherited)
    if _recomputes_anything(before.get("custom")):
        inherited.update(recompute=CheckpointPolicy.MUST_RECOMPUTE, ac_graph_id=before.get("ac_graph_id", 0))
    try:
        # With a generator, even if it is None: inductor has random numbers of its own in the place of others.
        return torch.randint(-(2**63), 2**63 - 1, (1,), device=device, generator=None)
    finally:
        inherited.clear()
        inherited.update(before)


def _recomputes_anything(annotations: Any) -> bool:
    """Whether AOTAutograd may compute random numbers of the forward pass again, everywhere or in a region
    that is annotated so.
    """
    config = importlib.import_module("torch._functorch.config")
    of_region = annotations.get("_region_activation_memory_budget", 1) if isinstance(annotations, dict) else 1
    return of_region < 1 or config.activation_memory_budget < 1 or config.aggressive_recomputation


define_composite("traced_seed(Device device) -> Tensor", _draw_traced)


def seed_tensor(op: str, seed: int | torch.Tensor) -> torch.Tensor:
    """A seed that the caller gave as an operator takes it: one int64, taken modulo 2^64 from an int."""
    if is_int(seed, int):
        return torch.tensor([(seed + 2**63) % 2**64 - 2**63], device="cpu")
    if not isinstance(seed, torch.Tensor):
        raise TypeError(f"{op}: seed must be an int or an int64 tensor, got {type(seed).__name__}")
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(
            f"{op}: seed must be an int or one int64, got {seed.dtype} of shape {tuple(seed.shape)}; "
            "draw it with torch.randint(-(2**63), 2**63 - 1, (1,))"
        )
    return seed


@functools.cache
def _has_generator(device_type: str) -> bool:
    try:
        torch.Generator(device=device_type)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _count_seed(device: torch.device, generator: torch.Generator | None) -> torch.Tensor | None:
    """The seed that a CUDA generator's seed and count give, on the CPU; None where it has to be drawn."""
    if not torch.cuda.is_initialized():  # a fake GPU
        return None
    index = torch.cuda.current_device()
    if device.index not in (index, None) or torch.cuda.is_current_stream_capturing():
        return None
    if generator is None:
        generator = torch.cuda.default_generators[index]
    if generator.device != torch.device("cuda", index):  # torch.randint says what is wrong
        return None
    offset = generator.get_offset()
    generator.set_offset(offset + 4)  # a multiple of 4, as torch's kernels leave it
    return torch.tensor([mix_seed(generator.initial_seed(), offset)], device="cpu")


def mix_seed(seed: int, offset: int) -> int:
    """The int64 that a seed and an offset or count stand for: splitmix64's `offset`-th number from `seed`.

    Steele, Lea, Flood 2014, Fast splittable pseudorandom number generators.
    """
    z = (seed + 0x9E3779B97F4A7C15 * (offset + 1)) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


def mixed_seed(seed: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """`mix_seed` of two tensors of one int64, which are not read on the host."""

    def shifted(z: torch.Tensor, bits: int) -> torch.Tensor:  # as unsigned
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    z = seed + (0x9E3779B97F4A7C15 - 2**64) * (offset + 1)
    z = (z ^ shifted(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ shifted(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ shifted(z, 31)


def forked_generators() -> contextlib.AbstractContextManager[None]:
    """A context at whose end torch's generators, the CPU's and those of GPUs in use, are as they were."""
    # To read the state of a GPU's generator would initialize CUDA.
    return torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ())


# --- Philox in plain torch. A 32-bit number is an int64 tensor with values in [0, 2^32).


class Purpose(IntEnum):
    """What random numbers are drawn for. Two uses of one seed have different numbers, so that they never see
    the same bits; the values are those of `Purpose` in csrc/common/philox.h.
    """

    DROPOUT = 0
    STOCHASTIC_ROUNDING = 1
    AUGMENT = 2


_LOW_16, _LOW_32 = 0xFFFF, 0xFFFFFFFF


def _multiply(constant: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(upper, lower) 32 bits of the 64-bit product of two 32-bit numbers.

    The product of two int64 tensors wraps around, as in `mixed_seed`; all of its 64 bits are right.
    """
    product = constant * x
    return product >> 32 & _LOW_32, product & _LOW_32


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    key: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10: the four words that a counter of four words and a key of two words give.

    All are int64 tensors with values in [0, 2^32); their shapes broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        upper0, lower0 = _multiply(0xD2511F53, c0)
        upper1, lower1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = upper1 ^ c1 ^ k0, lower1, upper0 ^ c3 ^ k1, lower0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW_32, (k1 + 0xBB67AE85) & _LOW_32
    return c0, c1, c2, c3


def random_words(
    seed: torch.Tensor,
    first: int,
    count: int,
    device: torch.device,
    *,
    draw: int = 0,
    purpose: Purpose = Purpose.DROPOUT,
) -> torch.Tensor:
    """Words [first, first + count) of a seed: int64 of shape (count,) on `device`, values in [0, 2^32).

    Word i is word i % 4 of group i // 4. A group is what Philox makes of the counter (lower and upper 32 bits
    of the group's index, draw, purpose) and the key (lower and upper 32 bits of the seed).

    Args:
        seed: int64 tensor of one element, on any device; its value is not read on the host.
        first: index of the first word, at least 0; below 2^65, so that the group's index fits an int64.
        count: number of words.
        draw: number of the draw, where an index needs more than one.
        purpose: what the words are for.
    """
    seed = seed.reshape(()).to(device)
    first_group, last_group = first // 4, (first + count + 3) // 4
    group = torch.arange(last_group - first_group, device=device) + first_group
    words = philox4x32(
        (
            group & _LOW_32,
            (group >> 32) & _LOW_32,
            torch.full_like(group, draw),
            torch.full_like(group, int(purpose)),
        ),
        (seed & _LOW_32, (seed >> 32) & _LOW_32),
    )
    start = first - 4 * first_group
    return torch.stack(words, 1).view(-1)[start : start + count]


def random_halves(
    seed: torch.Tensor,
    first: int,
    count: int,
    device: torch.device,
    *,
    draw: int = 0,
    purpose: Purpose = Purpose.DROPOUT,
) -> torch.Tensor:
    """Halves of words [first, first + count): int64 of shape (count,) on `device`, values in [0, 2^16).

    Half i is the lower half of word i // 2 where i is even, and the upper half where i is odd.
    Arguments as in `random_words`.
    """
    first_word, last_word = first // 2, (first + count + 1) // 2
    words = random_words(seed, first_word, last_word - first_word, device, draw=draw, purpose=purpose)
    start = first - 2 * first_word
    return torch.stack((words & _LOW_16, words >> 16), 1).view(-1)[start : start + count]
