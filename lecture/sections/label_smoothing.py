"""Label smoothing in both conventions, Goodfellow et al. 2016, section 7.5.1; Szegedy et al. 2016."""

from ..claims import changed
from ..figures import FEWEST, reliability
from ..section import Figure, Section
from ..train import PLAIN, Recipe

RECIPE = Recipe("smoothing", "Label smoothing", "rose", smoothing=0.02)
OTHERS = Recipe("smoothing_others", "Smoothing, others only", "rose", smoothing=0.02, convention="others")
SECTION = Section(
    key="label-smoothing",
    order=80,
    title="Label smoothing",
    colour="rose",
    formulas=(
        r"J = -\sum_i q_i \log p_i",
        r"\mathrm{uniform:}\ q_i = (1-\varepsilon)\,[i=y] + \varepsilon/k",
        r"\mathrm{others:}\ q_y = 1-\varepsilon,\;\; q_{i\neq y} = \varepsilon/(k-1)",
    ),
    text="<p>The target leaves a little probability to the other classes, so that no finite logit is ever "
    "large enough to be certain, and the network becomes less confident. Two conventions are in use: the "
    "mass ε goes to all k classes, as in torch, or to the others only, as in the textbook. Whether "
    "confidence then matches accuracy is what the calibration error (ECE) measures; too much smoothing "
    f"overshoots. Here ε = {RECIPE.smoothing:g}.</p>",
    recipes=(RECIPE, OTHERS),
    columns=("test_error", "test_loss", "confidence", "calibration_error", "epoch_ms"),
    claims=(
        changed("Label smoothing makes the network less confident", "smoothing", "none", "confidence", -1),
        changed(
            "Label smoothing brings confidence closer to accuracy",
            "smoothing",
            "none",
            "calibration_error",
            -1,
        ),
    ),
    figures=(
        Figure(
            reliability(PLAIN),
            "Reliability diagram without label smoothing",
            "Below the diagonal the network is surer than it is right.",
        ),
        Figure(
            reliability(RECIPE),
            "Reliability diagram with label smoothing",
            "Test images of all seeds in ten bins of confidence; the size of a dot is the number of images, "
            f"bins with fewer than {FEWEST} are left out.",
        ),
    ),
    code=("smoothed",),
)
