"""Forms of the ops for tensors that are split over ranks by hand, as tensor parallelism splits a vocabulary.

DTensors need none of them: `fastreg.cross_entropy` knows how they are placed.
"""

from ._sharded_cross_entropy import cross_entropy, linear_cross_entropy

__all__ = ["cross_entropy", "linear_cross_entropy"]
