"""L1 penalty, Goodfellow et al. 2016, section 7.1.2."""

from ..claims import changed
from ..figures import hidden_units, weight_histograms
from ..penalties import L1, L1_ADAMW, L2
from ..section import Figure, Section

SECTION = Section(
    key="l1",
    order=20,
    title="L1 penalty",
    colour="violet",
    formulas=(
        r"\tilde{E}(w) = E(w) + \lambda\,\Vert w\Vert_1",
        r"w \leftarrow \mathrm{sign}(w)\,\max(|w| - \varepsilon\lambda,\;0)",
        r"p(w) = e^{-|w|/\sigma}/(2\sigma),\quad \sigma = 1/(\lambda N)",
    ),
    text="<p>Every weight is pulled towards zero with the same force, however small it has become, and the "
    "proximal step leaves it at exactly zero once it gets there. Few weights remain, and these are larger "
    "than L2 would leave them. It is the MAP estimate under a Laplace prior, which has its edge at zero. "
    f"Here λ = {L1.l1:g}.</p><p>AdamW divides each step by the size d that the weight's gradients have had, "
    "and its proximal step divides the threshold by the same d: the weights go to the minimum of the same "
    f"error, and get there faster, so that λ = {L1_ADAMW.l1:g} does.</p>",
    recipes=(L2, L1, L1_ADAMW),
    columns=("test_error", "gap_loss", "zero_weights", "weight_size", "epoch_ms"),
    table_note="Biases are not counted; the mean absolute value is that of the weights that are not zero.",
    claims=(
        changed("L1 makes more weights exactly zero than L2", "l1", "l2", "zero_weights", +1),
        changed("With AdamW, too, L1 makes weights exactly zero", "l1_adamw", "none", "zero_weights", +1),
        changed("The weights that L1 leaves are larger than those of L2", "l1", "l2", "weight_size", +1),
    ),
    figures=(
        Figure(
            weight_histograms(L1, L2),
            "Histograms of the weights with the L1 and with the L2 penalty",
            "All weights after training, first seed, on a logarithmic scale; the spike is the exact zeros.",
        ),
        Figure(
            hidden_units(L1, L2),
            "Weights of eight hidden units with L1 and with L2",
            "What the eight strongest hidden units look for: their weights to the pixels, positive in rust, "
            "negative in blue, each network scaled to its largest.",
        ),
    ),
    code=("optimizer", "step"),
)
