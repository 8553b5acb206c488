"""Forms of the ops for tensors that are split over ranks by hand, as tensor parallelism splits a vocabulary.

DTensors need none of them: `fastreg.dropout` and `fastreg.cross_entropy` know how they are placed. For
images `Augment.sample` takes `seed=` and `offset=` or `index=`.
"""

from ._dropout_by_hand import dropout
from ._sharded_cross_entropy import cross_entropy, linear_cross_entropy

__all__ = ["cross_entropy", "dropout", "linear_cross_entropy"]
