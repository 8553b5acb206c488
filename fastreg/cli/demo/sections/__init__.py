"""The sections of the report, in the lecture's order."""

from . import (
    adversarial,
    augmentation,
    dropout,
    early_stopping,
    l1,
    l2,
    label_smoothing,
    lasso,
    multi_task,
    parameter_sharing,
    semi_supervised,
    together,
)

SECTIONS = (
    l2.SECTION,
    l1.SECTION,
    lasso.SECTION,
    early_stopping.SECTION,
    dropout.SECTION,
    augmentation.SECTION,
    adversarial.SECTION,
    label_smoothing.SECTION,
    semi_supervised.SECTION,
    multi_task.SECTION,
    parameter_sharing.SECTION,
    together.SECTION,
)
