"""L2 penalty (weight decay), Goodfellow et al. 2016, section 7.1.1."""

import math

import numpy as np

import fastreg as fr

from ..claims import changed
from ..figures import INK, C, compared_curves, draw
from ..penalties import L1, L2, L2_ADAMW
from ..results import Results
from ..section import Figure, Section


def priors(found: Results) -> str:
    """The densities of weights that L2 and L1 stand for, at the strengths of this report."""
    n = len(found.data.y_train)
    sigma = fr.optim.prior_scale(L2.l2, "gaussian", num_samples=n)
    scale = fr.optim.prior_scale(L1.l1, "laplace", num_samples=n)
    w = np.linspace(-2.2, 2.2, 501) * max(sigma, scale)

    def paint(axes) -> None:
        density, penalty = axes
        gaussian, laplace = (w / sigma) ** 2 / 2, np.abs(w) / scale
        for minus_log, norm, hue, name in (
            (gaussian, sigma * math.sqrt(2 * math.pi), C["blue"], f"Gaussian, σ = {sigma:.2g}"),
            (laplace, 2 * scale, C["violet"], f"Laplace, σ = {scale:.2g}"),
        ):
            density.plot(w, np.exp(-minus_log) / norm, color=hue)
            density.fill_between(w, np.exp(-minus_log) / norm, color=hue, alpha=0.12, linewidth=0)
            penalty.plot(w, minus_log, color=hue, label=name)
        density.set_title("prior p(w)", color=INK)
        penalty.set_title("penalty −log p(w)", color=INK)
        for each in axes:
            each.set_yticks([])
            each.set_ylim(bottom=0)
            each.set_xlabel("w")
        penalty.set_ylim(0, 4.2)
        density.figure.legend(
            *penalty.get_legend_handles_labels(), loc="outside lower center", ncols=2, labelcolor=INK
        )

    return draw(paint, 3.1, ncols=2)


SECTION = Section(
    key="l2",
    order=10,
    title="L2 penalty",
    colour="blue",
    formulas=(
        r"\tilde{E}(w) = E(w) + \dfrac{\lambda}{2}\,\Vert w\Vert_2^2",
        r"w \leftarrow (1-\varepsilon\lambda)\,w - \varepsilon\nabla E(w)",
        r"p(w) = \mathcal{N}(0,\,\sigma^2),\quad \sigma = 1/\sqrt{\lambda N}",
    ),
    text="<p>The size of the weights is added to the error, so that every step also shrinks each weight by "
    "the same fraction: large weights lose much, small ones almost nothing. Minimising the sum over N "
    "examples is the MAP estimate under a Gaussian prior of the weights with mean zero. Biases are left "
    f"alone. Here λ = {L2.l2:g}.</p><p>AdamW shrinks the weights beside its step, which no longer depends on "
    f"how large the gradients are; its λ = {L2_ADAMW.l2:g} is a speed, not the factor of a penalty.</p>",
    recipes=(L2, L2_ADAMW),
    columns=("test_error", "gap_error", "gap_loss", "weight_size", "epoch_ms"),
    claims=(
        changed("L2 narrows the gap between test and training cross-entropy", "l2", "none", "gap_loss", -1),
        changed("L2 narrows the gap between test and training error", "l2", "none", "gap_error", -1),
        changed("AdamW's decay narrows the gap in cross-entropy", "l2_adamw", "none", "gap_loss", -1),
    ),
    figures=(
        Figure(
            compared_curves(L2),
            "Cross-entropy with and without L2 on training and validation data",
            "Training (dotted) and validation (solid), first seed. The bars at the right are the gap that is "
            "left.",
        ),
        Figure(
            priors,
            "A Gaussian and a Laplace density, and their negative logarithms",
            "The priors that the λ of this and of the next section stand for, for a likelihood that is the "
            "product over the training examples. The penalty is the negative logarithm of the prior: L2 is "
            "flat at zero, L1 has an edge there.",
        ),
    ),
    code=("optimizer",),
)
