"""The bits of dropout's masks at p = 0.5 as a stream for a battery of tests of randomness, and small tests of
them here.

    python tests/mask_statistics.py seeds --bytes 8G | RNG_test stdin32 -tlmin 64MB -tlmax 8GB

writes them for PractRand's RNG_test, or whatever reads random bytes; without --bytes, the tests below are
run. A stream joins masks that a training has beside each other, so that what they have in common shows:

    elements  one seed, one index after another: a single large tensor
    seeds     the seeds 0, 1, 2, ..., 4,096 elements each
    offsets   one seed, 4,096 elements at every 2^35th index, where only the upper half of the counter differs
    calls     `fr.dropout` of 4,096 elements again and again, after one torch.manual_seed
    layers    eight layers of one network, a bit of each in turn, after torch.manual_seed(0, 1, 2, ...)
    xor       the masks of the seeds 0 and 1, 2 and 3, ..., combined by exclusive or
"""

import argparse
import itertools
import math
import os
import sys

import numpy as np
import torch

import fastreg as fr

BLOCK = 4096
LARGE = 2**18


def masks_of(count, arguments):
    x = torch.ones(count, dtype=torch.bfloat16)
    for seed, offset in arguments:
        yield fr.dropout_with_mask(x, 0.5, seed=seed, offset=offset)[1].numpy()


def elements():
    yield from masks_of(LARGE, ((20261129, i * LARGE) for i in itertools.count()))


def seeds():
    yield from masks_of(BLOCK, ((i, 0) for i in itertools.count()))


def offsets():
    """Below 2^63 there are 2^28 such indices, 2^40 bits."""
    yield from masks_of(BLOCK, ((7, i << 35) for i in range(2**28)))


def calls():
    torch.manual_seed(20261129)
    x = torch.ones(BLOCK)
    while True:
        yield np.packbits(fr.dropout(x, 0.5).numpy() != 0, bitorder="little")


def layers():
    x = torch.ones(2**16)
    for step in itertools.count():
        torch.manual_seed(step)
        together = np.stack([fr.dropout(x, 0.5).numpy() != 0 for _ in range(8)], 1)
        yield np.packbits(together, bitorder="little")


def xor():
    one, other = itertools.tee(masks_of(BLOCK, ((i, 0) for i in itertools.count())))
    for a, b in zip(itertools.islice(one, 0, None, 2), itertools.islice(other, 1, None, 2), strict=False):
        yield a ^ b


STREAMS = {f.__name__: f for f in (elements, seeds, offsets, calls, layers, xor)}


def take(name, count):
    """The first `count` bytes of a stream."""
    parts, have = [], 0
    for part in STREAMS[name]():
        parts.append(part)
        have += part.size
        if have >= count:
            return np.concatenate(parts)[:count]
    return np.concatenate(parts)


# --- A small battery. Each test gives a number that is normal with variance 1 where the bits are random.


def of_chi_square(counts, expected):
    """Wilson and Hilferty 1931: the cube root of a chi-square over its freedom is nearly normal."""
    free = counts.size - 1
    chi = float(((counts - expected) ** 2 / expected).sum())
    return ((chi / free) ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free))


def battery(data):
    """{test: its z} of uint8 bytes."""
    bits = np.unpackbits(data, bitorder="little").astype(np.int8)
    n, signs = bits.size, bits.astype(np.int8) * 2 - 1
    found = {"ones": signs.sum(dtype=np.int64) / math.sqrt(n)}
    for lag in (1, 2, 3, 4, 8, 16, 32, 64, 128, 1024, 4096, 8192, 32768):
        found[f"lag {lag}"] = (signs[lag:] * signs[:-lag]).sum(dtype=np.int64) / math.sqrt(n - lag)
    found["bytes"] = of_chi_square(np.bincount(data, minlength=256), data.size / 256)
    pairs = data[: data.size // 2 * 2].view(np.uint16)
    found["pairs of bytes"] = of_chi_square(np.bincount(pairs, minlength=2**16), pairs.size / 2**16)
    for place in range(8):
        ones = (data >> place & 1).sum(dtype=np.int64)
        found[f"bit {place} of a byte"] = (2 * ones - data.size) / math.sqrt(data.size)
    ends = np.flatnonzero(np.diff(bits))
    runs = np.bincount(np.minimum(np.diff(ends), 20), minlength=21)[1:]
    expected = runs.sum() * np.array([2.0**-k for k in range(1, 20)] + [2.0**-19])
    found["lengths of runs"] = of_chi_square(runs, expected)
    weights = bits[: n // 4096 * 4096].reshape(-1, 4096).sum(1, dtype=np.int64)
    spread = ((weights - 2048) ** 2).sum() / 1024
    found["ones of 4096"] = (spread - weights.size) / math.sqrt(2 * weights.size)
    return {name: float(z) for name, z in found.items()}


def counts(p, calls=64, size=2**20):
    """{test: z} of how many elements are kept at any p: over all, over pairs of neighbours in index and over
    pairs of neighbours in seed.
    """
    keep = int((1.0 - p) * 2**32 + 0.5) / 2**32
    kept = torch.zeros(calls, size, dtype=torch.bool)
    x = torch.ones(size, dtype=torch.bfloat16)
    for i in range(calls):
        kept[i] = fr.unpack_mask(fr.dropout_with_mask(x, p, seed=i)[1], (size,))

    def z(hits, trials, chance):
        return (float(hits) - trials * chance) / math.sqrt(trials * chance * (1 - chance))

    index, seed = (kept[:, 1:] & kept[:, :-1]), (kept[1:] & kept[:-1])
    # Neighbouring pairs share an element, which adds to the variance: 1 + 2 keep / (1 + keep) times.
    wider = math.sqrt(1 + 2 * keep / (1 + keep))
    return {
        f"p = {p}: kept": z(kept.sum(), kept.numel(), keep),
        f"p = {p}: both of two elements": z(index.sum(), index.numel(), keep**2) / wider,
        f"p = {p}: both of two seeds": z(seed.sum(), seed.numel(), keep**2) / wider,
    }


PROBABILITIES = (0.5, 0.1, 0.3, 1 / 3, 0.9, 2**-16, 1 - 2**-12, 0.123456789)


def small(size=2**22):
    """{what was tested: z} of `size` bytes of each stream, and of the counts at other p."""
    found = {f"{name}: {test}": z for name in STREAMS for test, z in battery(take(name, size)).items()}
    for p in PROBABILITIES:
        found.update(counts(p))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("stream", nargs="?", choices=STREAMS)
    parser.add_argument("--bytes", default="0", help="how many to write, as 1000000, 64M or 8G")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.stream:
        found = small()
        for test, z in sorted(found.items(), key=lambda item: -abs(item[1])):
            print(f"{z:8.3f}  {test}")
        return
    left = int(given.bytes.rstrip("KMG")) * 1024 ** (
        " KMG".index(given.bytes[-1]) if given.bytes[-1] in "KMG" else 0
    )
    out = sys.stdout.buffer
    try:
        for part in STREAMS[given.stream]():
            out.write(part[:left].data)
            left -= min(left, part.size)
            if not left:
                break
        out.flush()
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
