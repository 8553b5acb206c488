"""Distributed checkpoints of torch's optimisers, read into the ones here."""

from __future__ import annotations

import re
from typing import Any

from ._adamw import AdamW
from ._sgd import SGD

# What the optimisers here have in their state dicts, and torch's have not: options of groups, and entries of
# the state of a parameter.
_OPTIONS = "|".join(sorted(SGD._own_options.keys() | AdamW._own_options.keys()))
_ADDED = re.compile(
    rf"(.+\.)?(param_groups\.(.+\.)?({_OPTIONS})|state\.(.+\.)?(ema|n_averaged|momentum_started))"
)


def load_planner() -> Any:
    """A planner for torch.distributed.checkpoint.load that reads checkpoints of torch's SGD and AdamW, or of
    older versions of fastreg, into `fastreg.optim.SGD` and `AdamW`.

    ::

        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=path, planner=fr.optim.load_planner())

    torch's planner wants every entry of the state dict to be in the checkpoint. With this one the options
    that only fastreg has (l1, ema and the others) may be missing and stay those of the optimiser, its
    averages begin anew, and all else must be there as ever.

    Returns:
        A torch.distributed.checkpoint.DefaultLoadPlanner.
    """
    # torch.distributed.checkpoint takes longer to import than all of fastreg.
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    class Planner(DefaultLoadPlanner):
        def create_local_plan(self) -> Any:
            assert self.metadata is not None
            there = self.metadata.state_dict_metadata
            for key in [key for key in self.state_dict if key not in there and self._may_lack(key)]:
                del self.state_dict[key]
                _remove(self.original_state_dict, self.mappings[key])
            return super().create_local_plan()

        def _may_lack(self, key: str) -> bool:
            # Torch's SGD counts no steps. What has no second moments is SGD.
            if key.endswith(".step"):
                return key.removesuffix("step") + "exp_avg_sq" not in self.state_dict
            return _ADDED.fullmatch(key) is not None

    return Planner()


def _remove(state: Any, path: Any) -> None:
    """Take an entry out of nested containers: what is not loaded must not pass for what was saved. A path has
    the keys of dicts as text.
    """
    for depth, step in enumerate(path):
        key = step if isinstance(state, list) else next(key for key in state if str(key) == str(step))
        if depth == len(path) - 1:
            del state[key]
        else:
            state = state[key]
