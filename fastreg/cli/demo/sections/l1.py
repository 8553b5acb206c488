"""L1 penalty, Goodfellow et al. 2016, section 7.1.2."""

from ..claims import changed
from ..figures import hidden_units, weight_histograms
from ..section import Figure, Section
from ..train import Recipe
from . import l2

RECIPE = Recipe("l1", "L1 penalty", "violet", l1=1e-3)
SECTION = Section(
    key="l1",
    title="L1 penalty",
    colour="violet",
    formulas=(
        r"\tilde{E}(w) = E(w) + \lambda\,\Vert w\Vert_1",
        r"w \leftarrow \mathrm{sign}(w)\,\max(|w| - \varepsilon\lambda,\;0)",
        r"p(w) = e^{-|w|/\sigma}/(2\sigma),\quad \sigma = 1/(\lambda N)",
    ),
    text=f"<p>Every weight is pulled towards zero with the same force, however small it has become, and the proximal step "
    f"leaves it at exactly zero once it gets there. Few weights remain, and these are larger than L2 would "
    f"leave them. It is the "
    f"MAP estimate under a Laplace prior, which has its edge at zero. Here λ = {RECIPE.l1:g}.</p>",
    recipes=(l2.RECIPE, RECIPE),
    columns=("test_error", "gap_loss", "zero_weights", "weight_size", "epoch_ms"),
    table_note="Biases are not counted; the mean absolute value is that of the weights that are not zero.",
    claims=(
        changed("L1 makes more weights exactly zero than L2", "l1", "l2", "zero_weights", +1),
        changed("The weights that L1 leaves are larger than those of L2", "l1", "l2", "weight_size", +1),
    ),
    figures=(
        Figure(
            weight_histograms(RECIPE, l2.RECIPE),
            "Histograms of the weights with the L1 and with the L2 penalty",
            "All weights after training, first seed, on a logarithmic scale; the spike is the exact zeros.",
        ),
        Figure(
            hidden_units(RECIPE, l2.RECIPE),
            "Weights of eight hidden units with L1 and with L2",
            "What the eight strongest hidden units look for: their weights to the pixels, positive in rust, "
            "negative in blue, "
            "each network scaled to its largest.",
        ),
    ),
    code=("optimizer", "step"),
)
