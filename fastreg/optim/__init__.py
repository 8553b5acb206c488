"""Optimisers that apply both norm penalties in one pass over memory, and the penalties by themselves."""

from ._adamw import AdamW
from ._checkpoint import load_planner
from ._penalties import penalty, penalty_groups, prior_scale, sparsity
from ._sgd import SGD

__all__ = ["SGD", "AdamW", "load_planner", "penalty", "penalty_groups", "prior_scale", "sparsity"]

# Their home is this module, for pickles and in messages, wherever they are written.
for _name in __all__:
    globals()[_name].__module__ = __name__
