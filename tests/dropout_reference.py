"""Dropout in plain torch and NumPy, from the definition of its bits, for tests/test_dropout*.py."""

import math

import numpy as np
import torch

import fastreg  # noqa: F401  It declares the operators, for processes that import this file first.

OP = torch.ops.fastreg.dropout.default


OP_IN_PLACE = torch.ops.fastreg.dropout_.default


OP_APPLY = torch.ops.fastreg.dropout_apply.default


MASK32 = 0xFFFFFFFF


def philox(c0, c1, c2, c3, seed):
    """Philox4x32-10 after Salmon et al. 2011, on arrays of counters; four arrays of 32-bit words."""
    c = [np.asarray(word, dtype=np.uint64) for word in np.broadcast_arrays(c0, c1, c2, c3)]
    k0, k1 = seed & MASK32, seed >> 32 & MASK32
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        low, high = np.uint64(MASK32), np.uint64(32)
        c = [(b >> high) ^ c[1] ^ np.uint64(k0), b & low, (a >> high) ^ c[3] ^ np.uint64(k1), a & low]
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c


def draws(seed, offset, count):
    """The 16 high and the 16 low random bits of the elements [offset, offset + count)."""
    index = np.uint64(offset) + np.arange(count, dtype=np.uint64)
    group, j = index // np.uint64(8), (index % np.uint64(8)).astype(np.int64)
    halves = []
    for draw in (0, 1):
        words = np.stack(philox(group & np.uint64(MASK32), group >> np.uint64(32), draw, 0, seed))
        halves.append(words[j // 2, np.arange(count)] >> (16 * (j % 2)).astype(np.uint64) & np.uint64(0xFFFF))
    return halves


def kept_reference(seed, offset, count, p):
    """Whether each element is kept: 32 random bits below (1 - p) 2^32."""
    high, low = draws(seed % 2**64, offset, count)
    return (high << np.uint64(16) | low) < np.uint64(math.floor((1 - p) * 2**32 + 0.5))


def scale_of(p):
    kept = math.floor((1 - p) * 2**32 + 0.5)
    return 2**32 / kept if kept else 0.0


def values_reference(x, kept, scale, shift=0.0, dropped=0.0):
    """One rounding to the dtype at the end, arithmetic in float32 or float64."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    value = x.to(wide) * torch.tensor(scale, dtype=wide)
    if shift:
        value = value + torch.tensor(shift, dtype=wide)
    return torch.where(kept, value, torch.tensor(dropped, dtype=wide)).to(x.dtype)
