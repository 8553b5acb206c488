"""What tests/test_early_stopping*.py and tests/test_retrain.py share."""

import math

from hypothesis import strategies as st
from torch import nn

INF, NAN = math.inf, math.nan


def run(stopper, scores):
    """Index at which the stopper stops, None if it never does."""
    return next((i for i, score in enumerate(scores) if stopper.step(score)), None)


score_lists = st.lists(st.one_of(st.integers(-3, 3).map(float), st.floats()), max_size=30)


class Tied(nn.Module):
    def __init__(self, words=7, width=4):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.out = nn.Linear(width, words)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.embed(x))


def snapshot(stopper):
    return stopper.state_dict()["snapshot"]


class Bag:
    """Anything with a state_dict; keeps what it is given, as many a hand-written EMA does."""

    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


OPTION_SETS = st.fixed_dictionaries(
    dict(
        mode=st.sampled_from(["min", "max"]),
        patience=st.integers(0, 5),
        min_delta=st.sampled_from([0.0, 0.5, 1.0]),
        relative=st.booleans(),
        warmup=st.integers(0, 4),
        nan=st.sampled_from(["skip", "stop"]),
    )
)
