"""The trainings with a norm penalty, which the sections on L2 and on L1 compare with each other."""

from .train import Recipe

L2 = Recipe("l2", "L2 penalty", "blue", l2=3e-3)
L1 = Recipe("l1", "L1 penalty", "violet", l1=1e-3)
# AdamW shrinks the weights by lr times its decay a step, and its lr is a hundredth of SGD's.
L2_ADAMW = Recipe("l2_adamw", "L2 penalty, AdamW", "blue", l2=0.3, adamw=True)
L1_ADAMW = Recipe("l1_adamw", "L1 penalty, AdamW", "violet", l1=1e-4, adamw=True)
