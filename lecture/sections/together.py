"""The methods of the sections before, combined."""

import dataclasses

from ..claims import changed, no_worse
from ..figures import compared_curves, hidden_units
from ..section import Figure, Section
from ..train import EPS, PLAIN, Recipe

RECIPE = Recipe(
    "all", "All together", "ink", l2=1e-3, l1=3e-4, dropout=0.2, smoothing=0.02, eps=EPS, patience=8
)
AVERAGED = dataclasses.replace(RECIPE, key="all_averaged", title="All together, averaged", ema=0.98)
SECTION = Section(
    key="together",
    order=120,
    title="All together",
    colour="ink",
    formulas=(
        r"\tilde{E} = \dfrac{1}{2}J(x,y) + \dfrac{1}{2}J(x_{\mathrm{adv}},y)",
        r"{}+ \lambda_1\Vert w\Vert_1 + \dfrac{\lambda_2}{2}\Vert w\Vert_2^2",
    ),
    text="<p>The methods do different things, so they can be combined, most of them weaker than alone: "
    f"λ<sub>2</sub> = {RECIPE.l2:g}, λ<sub>1</sub> = {RECIPE.l1:g}, dropout p = {RECIPE.dropout:g}, label "
    f"smoothing {RECIPE.smoothing:g}, adversarial ε = {RECIPE.eps:g}, patience {RECIPE.patience}.</p>"
    f"<p>The second of the two measures, and stops by, a moving average of the weights with decay "
    f"{AVERAGED.ema:g}, which takes out the noise of the last steps.</p>",
    recipes=(RECIPE, AVERAGED),
    columns=("test_error", "gap_loss", "attacked_accuracy", "calibration_error", "zero_weights", "epoch_ms"),
    claims=(
        changed("All together lower the test error", "all", "none", "test_error", -1),
        no_worse("Averaged weights make no more errors than the last ones", "all_averaged", "all"),
        changed("All together raise the accuracy under attack", "all", "none", "attacked_accuracy", +1),
    ),
    figures=(
        Figure(
            compared_curves(RECIPE),
            "Cross-entropy with all methods and with none on training and validation data",
            "Training (dotted) and validation (solid), first seed. The bars at the right are the gap that is "
            "left.",
        ),
        Figure(
            hidden_units(PLAIN, RECIPE),
            "Weights of eight hidden units with all methods and with none",
            "What the eight strongest hidden units look for: their weights to the pixels, positive in rust, "
            "negative in blue, each network scaled to its largest.",
        ),
    ),
    code=("loss",),
)
