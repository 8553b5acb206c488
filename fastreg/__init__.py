"""fastreg: fast, exact regularisation for PyTorch training."""

from . import _library, augment, nn, optim
from .cross_entropy import cross_entropy
from .dropout import (
    alpha_dropout,
    drop_path,
    dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    dropout_with_mask,
    feature_alpha_dropout,
    pack_mask,
    unpack_mask,
)
from .early_stopping import EarlyStopping, retrain
from .fgsm import adversarial_loss, fgsm, fgsm_step, pgd
from .linear_cross_entropy import linear_cross_entropy
from .patch import convert, patch, patched, unpatch

__all__ = [
    "EarlyStopping",
    "adversarial_loss",
    "alpha_dropout",
    "augment",
    "convert",
    "cross_entropy",
    "drop_path",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_with_mask",
    "feature_alpha_dropout",
    "fgsm",
    "fgsm_step",
    "linear_cross_entropy",
    "nn",
    "optim",
    "pack_mask",
    "patch",
    "patched",
    "pgd",
    "retrain",
    "unpack_mask",
    "unpatch",
]

_C = _library.load_kernels()
__version__ = _C.build_info()["version"]
