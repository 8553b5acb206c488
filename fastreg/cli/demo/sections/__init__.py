"""The sections of the report, in the lecture's order."""

from . import adversarial, dropout, early_stopping, l1, l2, label_smoothing, lasso, together

SECTIONS = tuple(
    module.SECTION for module in (l2, l1, lasso, early_stopping, dropout, adversarial, label_smoothing, together)
)
