"""Dropout, inverted and in the textbook form, Goodfellow et al. 2016, section 7.12."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fastreg as fr

from ..claims import changed, judged
from ..data import Data
from ..figures import MUTED, C, compared_curves, draw
from ..results import NotDecided, Results
from ..section import Figure, Lab, Section
from ..train import LR, MOMENTUM, Centre, Fastreg, Recipe, batches, evaluate

RECIPE = Recipe("dropout", "Dropout, inverted", "teal", dropout=0.5)
TEXTBOOK = Recipe("dropout_textbook", "Dropout, textbook", "teal", dropout=0.5, rescale="inference")
AVERAGED = 100  # masks, for the table
IMAGES = 300  # test images on which averages and folded networks are compared


def linear(data: Data) -> nn.Sequential:
    """A linear classifier trained with textbook dropout of its inputs."""
    model = nn.Sequential(
        Centre(data.x_train),
        Fastreg.dropout(0.5, "inference"),
        nn.Linear(data.x_train.shape[1], len(data.classes)),
    )
    optimizer = fr.optim.SGD(model.parameters(), lr=LR / 10, momentum=MOMENTUM)
    for batch in batches(len(data.x_train), epochs=3):
        optimizer.zero_grad()
        fr.cross_entropy(model(data.x_train[batch]), data.y_train[batch]).backward()
        optimizer.step()
    return model


@torch.no_grad()
def distances(model: nn.Module, folded: nn.Module, x: Tensor, counts: list[int]) -> list[float]:
    """How far the average logits of n masks are from the folded network's, as a share of these, for each n in
    counts.
    """
    target, total, found = folded(x), 0, []
    model.train()
    for n in range(1, counts[-1] + 1):
        total = total + model(x)
        if n in counts:
            found.append(((total / n - target).norm() / target.norm()).item())
    return found


def measure(lab: Lab) -> Iterator[dict]:
    data, run = lab.data, lab.runs[TEXTBOOK.key, "fastreg"]
    folded = fr.nn.fold_dropout(run.model)
    torch.manual_seed(lab.seed)
    with torch.no_grad():
        run.model.train()
        average = sum(run.model(data.x_test).softmax(1) for _ in range(AVERAGED)) / AVERAGED
        same = (folded(data.x_test) - run.model.eval()(data.x_test)).abs().max().item()
    wrong = 100 * (average.argmax(1) != data.y_test).double().mean().item()
    base = {"side": "fastreg", "seed": lab.seed}
    yield {"variant": "dropout_folded", **base, **evaluate(folded, data, "test"), "folded_difference": same}
    loss = nn.functional.nll_loss(average.clamp_min(1e-30).log(), data.y_test).item()
    yield {"variant": "dropout_average", **base, "test_error": wrong, "test_loss": loss}
    if lab.seed == 0:
        counts = [1, 2, 4, 8, 16, 32, 64, 128, 256, *([] if lab.quick else [512, 1024])]
        model, x = linear(data), data.x_test[:IMAGES]
        lab.keep(
            "dropout",
            counts=counts,
            linear=distances(model, fr.nn.fold_dropout(model), x, counts),
            perceptron=distances(run.model, folded, x, counts),
        )
        run.model.eval()


def averages(found: Results) -> str:
    kept = found.keep("dropout")
    counts = kept["counts"]

    def paint(axes) -> None:
        ideal = [100 * kept["linear"][0] / n**0.5 for n in counts]
        axes.plot(counts, ideal, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label="1/√n")
        for key, name, hue in (
            ("perceptron", "the perceptron", "teal"),
            ("linear", "a linear model", "rust"),
        ):
            axes.plot(counts, [100 * v for v in kept[key]], "o-", color=C[hue], ms=4.5, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(counts[::2], [str(n) for n in counts[::2]])
        ticks = [
            t
            for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
            if 0.8 * min(ideal) <= t <= 250 * max(kept["perceptron"])
        ]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.set_xlabel("masks averaged, n")
        axes.set_ylabel("distance to folded network [%]")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0.2, columnspacing=1.2)

    return draw(paint)


def exact(found: Results) -> tuple[bool, str]:
    kept = found.keep("dropout")
    first, last, n = kept["linear"][0], kept["linear"][-1], kept["counts"][-1]
    expected = first / n**0.5
    if not math.isfinite(last):
        raise NotDecided("the linear model diverged")
    return last < 1.5 * expected, (
        f"one mask is {100 * first:.0f} % away, the average of {n} masks {100 * last:.2f} %; sampling alone "
        f"leaves {100 * expected:.2f} %. The perceptron, for which folding is an approximation, stays "
        f"{100 * kept['perceptron'][-1]:.1f} % away"
    )


SECTION = Section(
    key="dropout",
    order=50,
    title="Dropout",
    colour="teal",
    formulas=(
        r"m_i \sim \mathrm{Bernoulli}(1-p)",
        r"\mathrm{inverted:}\ \tilde{h} = m\odot h\,/\,(1-p)",
        r"\mathrm{textbook:}\ \tilde{h} = m\odot h,\;\; w_{\mathrm{final}} = (1-p)\,w",
    ),
    text=f"<p>In every step each unit is left out with probability p = {RECIPE.dropout:g} (inputs: "
    f"{0.4 * RECIPE.dropout:g}), so that none can rely on another: an ensemble of networks that share their "
    "weights. The inverted form scales the units that stay while training; the textbook form trains with "
    "plain zeroing and scales the weights once, at the end, which <code>fold_dropout</code> does. That one "
    "network stands for the average over all masks: exactly for a linear model, approximately for others. "
    "fastreg keeps one bit per unit for the backward pass.</p>",
    recipes=(RECIPE, TEXTBOOK),
    measure=measure,
    variants=(
        ("dropout_folded", "Textbook, folded", "teal"),
        ("dropout_average", f"Average of {AVERAGED} masks", "teal"),
    ),
    columns=("test_error", "gap_error", "gap_loss", "test_loss", "epoch_ms"),
    claims=(
        changed(
            "Dropout narrows the gap between test and training cross-entropy",
            "dropout",
            "none",
            "gap_loss",
            -1,
        ),
        changed(
            "Dropout narrows the gap between test and training error", "dropout", "none", "gap_error", -1
        ),
        judged("On a linear model the average over masks is the folded network, up to sampling", exact),
    ),
    figures=(
        Figure(
            compared_curves(RECIPE),
            "Cross-entropy with and without dropout on training and validation data",
            "Training (dotted) and validation (solid), first seed. The bars at the right are the gap that is "
            "left.",
        ),
        Figure(
            averages,
            "Distance of the average over n masks to the folded network, against n",
            f"Logits of {IMAGES} test images: the average over n masks against the folded network, as a "
            f"share of its size.",
        ),
    ),
    code=("dropout",),
)
