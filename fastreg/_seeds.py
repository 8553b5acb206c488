"""Randomness: one int64 seed is drawn per call, and every random number is a function of it and of an index."""

import torch
from torch.compiler import is_compiling


def draw_seed(device, generator=None):
    """One int64 seed from `generator` or the device's default generator, shape (1,), on `device` or on the
    CPU.

    A GPU's generator counts on the host: where nothing records the work for later (a CUDA graph,
    torch.compile), the seed is made of its seed and its count, without a launch.
    """
    if device.type == "cuda" and not is_compiling():
        seed = _count_seed(device, generator)
        if seed is not None:
            return seed
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=device, generator=generator)


def _count_seed(device, generator):
    if not torch.cuda.is_initialized():  # a fake GPU
        return None
    index = torch.cuda.current_device()
    if device.index not in (index, None) or torch.cuda.is_current_stream_capturing():
        return None
    if generator is None:
        generator = torch.cuda.default_generators[index]
    if generator.device != torch.device("cuda", index):  # torch says what is wrong
        return None
    offset = generator.get_offset()
    generator.set_offset(offset + 4)  # a multiple of 4, as torch's kernels leave it
    return torch.tensor([mix_seed(generator.initial_seed(), offset)])


def mix_seed(seed, offset):
    """The int64 that a generator's seed and its offset stand for: splitmix64's `offset`-th number from
    `seed`.

    Steele, Lea, Flood 2014, Fast splittable pseudorandom number generators.
    """
    z = (seed + 0x9E3779B97F4A7C15 * (offset + 1)) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


def forked_generators():
    """A context at whose end torch's generators, the CPU's and those of GPUs in use, are as they were."""
    # Only where CUDA is up: to read a device's state would start it.
    return torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ())
