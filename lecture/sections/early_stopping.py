"""Early stopping and both uses of what it finds, Goodfellow et al. 2016, section 7.8."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from matplotlib.ticker import MaxNLocator
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

import fastreg as fr

from ..claims import changed, no_worse
from ..figures import AT_HEIGHT, C, draw, limits, note
from ..results import NotMeasured, Results
from ..section import Figure, Lab, Section
from ..train import PLAIN, Fastreg, Recipe, Torch, batch_size, descend, evaluate, network, passes

RECIPE = Recipe("early", "Early stopping", "ochre", patience=8)


def measure(lab: Lab) -> Iterator[dict]:
    """Train anew on training and validation data together, for as many epochs as the best one took."""
    data = lab.data
    parts = [(data.x_train, data.y_train), (data.x_validation, data.y_validation)]
    for side in (Torch, Fastreg):
        stopped = lab.runs[RECIPE.key, side.name]
        if stopped.best_epoch is None:  # no validation error was ever finite
            continue
        epochs, size = stopped.best_epoch + 1, batch_size(len(data.x_train))

        def make(side=side):
            model = network(side, RECIPE, data)
            return model, side.optimizer(model, RECIPE)

        def train_epoch(model, optimizer, loader, side=side):
            model.train()
            for _ in range(passes(len(data.x_train))):  # every image as often as before
                for x, y in loader:
                    descend(side, model, optimizer, side.loss(model, x, y, RECIPE))

        if side is Fastreg:
            model, _ = fr.retrain(make, train_epoch, *parts, epochs=epochs, seed=lab.seed, batch_size=size)
        else:
            torch.manual_seed(lab.seed)
            model, optimizer = make()
            loader = DataLoader(ConcatDataset([TensorDataset(*part) for part in parts]), size, shuffle=True)
            for _ in range(epochs):
                train_epoch(model, optimizer, loader)
        yield {
            "variant": "early_retrained",
            "side": side.name,
            "seed": lab.seed,
            "best_epoch": epochs,
            **evaluate(model, data, "test"),
        }


def learning_curve(quantity: Literal["error", "loss"]) -> Callable[[Results], str]:
    """Training and validation error or cross-entropy against the epoch, with what early stopping did."""

    def picture(found: Results) -> str:
        run = found.run(PLAIN.key)
        try:
            early = found.run(RECIPE.key)
        except NotMeasured:
            early = None

        def paint(axes) -> None:
            training, validation = run.curves[f"train_{quantity}"], run.curves[f"validation_{quantity}"]
            epochs = range(1, len(training) + 1)
            axes.plot(
                epochs, training, color=C["grey"], linewidth=1.3, linestyle=(0, (2, 2)), label="training"
            )
            axes.plot(epochs, validation, color=C["grey"], label="validation")
            axes.set_ylim(limits([validation]))
            axes.set_xlim(1, max(2, len(epochs)))
            if early is not None and early.best_epoch is not None:
                best, hue = early.best_epoch + 1, C["ochre"]
                axes.plot(best, validation[best - 1], "o", color=hue, ms=7, zorder=4)
                axes.axvline(best, color=hue, linewidth=1.2, zorder=1)
                marks = [(best, f"kept: {best}")]
                if early.stop_epoch is not None:
                    stop = early.stop_epoch + 1
                    axes.axvline(stop, color=hue, linewidth=1.2, linestyle=(0, (3, 3)), zorder=1)
                    marks.append((stop, f"stopped: {stop}"))
                for x, text in marks:
                    left = x > 0.75 * len(epochs)
                    side = "right" if left else "left"
                    style = {"color": hue, "ha": side, "va": "top", "rotation": 90}
                    note(axes, text, (x, 1), (-4 if left else 4, -4), coords=AT_HEIGHT, **style)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
            axes.set_xlabel("epoch")
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0.2, columnspacing=1.4
            )
            axes.set_ylabel({"error": "error [%]", "loss": "cross-entropy [nats]"}[quantity])

        return draw(paint)

    return picture


SECTION = Section(
    key="early-stopping",
    order=40,
    title="Early stopping",
    colour="ochre",
    formulas=(
        r"t^* = \mathrm{arg\,min}_t\; E_{\mathrm{val}}(w_t)",
        r"w \leftarrow w_{t^*}",
        r"\mathrm{or:\ train\ anew\ on\ train + val\ for}\ t^*\ \mathrm{epochs}",
    ),
    text="<p>Training goes on while the validation error falls; when it has not fallen for "
    f"{RECIPE.patience} epochs, training ends. There are two uses of the epoch found: the weights of that "
    "epoch come back, or the network is trained anew for as many epochs on training and validation data "
    "together, so that no example is wasted.</p>",
    recipes=(RECIPE,),
    measure=measure,
    variants=(("early_retrained", "Trained anew", "ochre"),),
    columns=("test_error", "test_loss", "best_epoch", "epoch_ms"),
    measures={"best_epoch": ("epochs used", "", ",.0f")},
    table_note="Trained anew: on training and validation data together, for the epochs that early stopping "
    "found.",
    claims=(
        no_worse(
            "Early stopping is no worse on test images than training to the last epoch", "early", "none"
        ),
        changed(
            "Training anew with the validation data lowers the test error",
            "early_retrained",
            "early",
            "test_error",
            -1,
        ),
    ),
    figures=(
        Figure(
            learning_curve("error"),
            "Training and validation error against the epoch, with the epoch kept and the epoch stopped at",
            "The first seed, trained to the end without early stopping; the marks show what early stopping "
            "did.",
        ),
        Figure(
            learning_curve("loss"),
            "Training and validation cross-entropy against the epoch, with the same marks",
            "Where the validation cross-entropy rises and the error does not, the network gets no more "
            "images wrong, but surer of its mistakes.",
        ),
    ),
    code=("early_stopping",),
)
