"""fastreg: fast, exact regularisation for PyTorch training."""

from . import _registry, augment, distributed, nn, optim
from ._attention import scaled_dot_product_attention
from ._cross_entropy import cross_entropy
from ._dropout import dropout, dropout_with_mask
from ._dropout_add import dropout_add
from ._dropout_family import (
    alpha_dropout,
    drop_path,
    dropout1d,
    dropout2d,
    dropout3d,
    feature_alpha_dropout,
)
from ._dropout_masks import pack_mask, unpack_mask
from ._fgsm import fgsm_step
from ._linear_cross_entropy import linear_cross_entropy
from ._patch import convert, patch, patched, unpatch
from .adversarial import FreeAdversarial, adversarial_backward, adversarial_loss, robust_accuracy
from .attacks import fgsm, pgd
from .autoencoder import TiedDecoder, pretrain_autoencoder
from .calibration import calibration_curve, calibration_error
from .early_stopping import EarlyStopping, retrain
from .multi_task import MultiTaskLoss
from .parameter_sharing import share_parameters, unshare_parameters
from .pseudo_label import pseudo_label_loss

__all__ = [
    "EarlyStopping",
    "FreeAdversarial",
    "MultiTaskLoss",
    "TiedDecoder",
    "adversarial_backward",
    "adversarial_loss",
    "alpha_dropout",
    "augment",
    "calibration_curve",
    "calibration_error",
    "convert",
    "cross_entropy",
    "distributed",
    "drop_path",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_add",
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
    "pretrain_autoencoder",
    "pseudo_label_loss",
    "retrain",
    "robust_accuracy",
    "scaled_dot_product_attention",
    "share_parameters",
    "unpack_mask",
    "unpatch",
    "unshare_parameters",
]

_C = _registry.load_kernels()
__version__ = _C.build_info()["version"]
