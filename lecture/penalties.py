"""The two trainings with a norm penalty, which the sections on L2 and on L1 compare with each other."""

from .train import Recipe

L2 = Recipe("l2", "L2 penalty", "blue", l2=3e-3)
L1 = Recipe("l1", "L1 penalty", "violet", l1=1e-3)
