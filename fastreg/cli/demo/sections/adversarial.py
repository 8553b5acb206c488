"""Adversarial training, Goodfellow et al. 2016, section 7.13; Goodfellow et al. 2015; attacked harder than it was trained for."""

import torch

import fastreg as fr

from ..claims import changed
from ..figures import C, draw, image, sign_image
from ..results import NotMeasured
from ..section import Figure, Section
from ..train import EPS, PLAIN, Fastreg, Recipe

RECIPE = Recipe("adversarial", "Adversarial training", "rust", eps=EPS)
STEPS, RESTARTS = 20, 3
IMAGES = 500  # test images attacked with PGD
STRENGTHS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)  # of the attacks in the picture, in units of EPS


def robust_accuracy(model, x, y, eps, generator):
    """Share of the examples, in percent, that no restart of PGD turns."""
    model.eval()
    standing = torch.ones(len(y), dtype=torch.bool)
    for _ in range(RESTARTS):
        x_adv = fr.pgd(model, x, y, eps, alpha=2.5 * eps / STEPS, steps=STEPS)
        with torch.no_grad():
            standing &= model(x_adv).argmax(1) == y
    return 100 * standing.double().mean().item()
