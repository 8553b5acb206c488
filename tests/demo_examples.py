"""Small examples for the tests of the demo."""

import numpy as np


def blobs(n=90, classes=3, shape=(8, 8), seed=0):
    """Noisy images of a few fixed patterns: learnable in a second, never perfectly."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = rng.uniform(0, 255, (classes, *shape))[y] * 0.5 + rng.uniform(0, 127, (n, *shape))
    return x.astype(np.uint8), y
