"""The pictures: charts as inline SVG that take their colours from the page, images of examples as `data:`
addresses.

Charts are drawn by matplotlib at the width of a phone (4.4 in), so that nothing has to shrink to fit; their
text stays text, in the page's own font. Images are enlarged by whole factors, without smoothing.
"""

import base64
import io
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from fastreg.cli.style import LIGHT, STYLE

from .results import CHANCE, DIVERGED, LEARNED, NotMeasured, Results
from .train import BINS, PLAIN, Recipe, Run

C = LIGHT
INK, MUTED, PAPER, SAND = (LIGHT[name] for name in ("ink", "muted", "paper", "sand"))
FEWEST = 10  # examples a bin of the reliability diagram must hold to be drawn: fewer say nothing
WIDTH = 4.4
Picture = Callable[[Results], str]  # what draws a chart, or gives nothing where the data have none
AT_HEIGHT = ("data", "axes fraction")  # coordinates: x as in the data, y as a share of the chart's height
WEIGHTS = LinearSegmentedColormap.from_list("weights", [C["blue"], "#f4f5f7", C["rust"]]).with_extremes(
    bad="#00000000"
)


def draw(paint: Callable, height: float = 3.1, **grid) -> str:
    """A chart: `paint(axes)` fills it; grid: arguments of Figure.subplots for several axes."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
        axes = figure.subplots(**grid)
        for each in np.ravel(axes):
            each.set_facecolor("none")
        paint(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->|<\?xml.*?\?>|<!DOCTYPE[^>]*>", "", svg, flags=re.DOTALL
    )
    svg = re.sub(r"(font: (?:\w+ )*[\d.]+px) [^;\"]*", r"\1 var(--font)", svg)
    for name, colour in LIGHT.items():  # the reader may prefer white on black
        svg = svg.replace(colour, f"var(--{name})")
    used = set(re.findall(r"(?:url\(#|href=\"#)([\w-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: m[0] if m[1] in used else "", svg)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    svg = re.sub(
        r"<svg [^>]*>",
        f'<svg class="chart" viewBox="0 0 {size[1]} {size[2]}" role="img" aria-hidden="true">',
        svg,
    )
    return re.sub(r"\s*\n\s*", "\n", svg).strip()


def note(axes: Axes, text: str, at: tuple, shift: tuple[float, float], coords="data", **style) -> None:
    """Write `text` at a place of the chart, moved by `shift` points. `style` is matplotlib's."""
    axes.annotate(text, at, shift, xycoords=coords, textcoords="offset points", **style)


def colour(recipe: Recipe) -> str:
    return LIGHT[recipe.colour]


def image(pixels: torch.Tensor, shape: tuple[int, ...]) -> str:
    """One example, [D] in [0, 1], drawn as `shape`."""
    return png((pixels.detach().reshape(shape).clamp(0, 1) * 255).round().byte().numpy())


def sign_image(sign: torch.Tensor, shape: tuple[int, ...]) -> str:
    """A picture of signs, [D] in {-1, 0, 1}: rust where the attack brightens, blue where it darkens."""
    sign = sign.detach().reshape(shape)
    if len(shape) == 3:  # the colour channels vote
        sign = sign.sum(2).sign()
    colours = np.array([[31, 95, 168], [244, 245, 247], [194, 82, 27]], dtype=np.uint8)
    return png(colours[(sign.long() + 1).numpy()])


def png(pixels: np.ndarray, largest: int = 168) -> str:
    """The `data:` address of an image, enlarged by the largest whole factor that keeps it in `largest`."""
    factor = max(1, largest // max(pixels.shape[:2]))
    pixels = pixels.repeat(factor, 0).repeat(factor, 1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def errors(found: Results, recipes: Sequence[Recipe]) -> str:
    """Test error of every training: a row per method in its colour, torch hollow, fastreg filled; range over
    the seeds.
    """
    rows = []
    for recipe in recipes:
        try:
            rows.append(
                (
                    recipe,
                    {
                        side: list(found.values(recipe.key, "test_error", side).values())
                        for side in ("torch", "fastreg")
                    },
                )
            )
        except NotMeasured:
            continue
    if not rows:
        raise NotMeasured("test errors")

    def paint(axes) -> None:
        for y, (recipe, sides) in enumerate(rows):
            for side, offset in (("torch", -0.16), ("fastreg", 0.16)):
                values, hue = sides[side], colour(recipe)
                axes.plot([min(values), max(values)], [y + offset] * 2, color=hue, alpha=0.35, linewidth=4)
                face = hue if side == "fastreg" else PAPER
                axes.plot(np.mean(values), y + offset, "o", color=hue, mfc=face, mew=1.6, ms=6.5)
        for side, face in (("torch", PAPER), ("fastreg", MUTED)):
            axes.plot([], [], "o", color=MUTED, mfc=face, mew=1.6, ms=6.5, label=side)
        axes.set_yticks(range(len(rows)), [recipe.title for recipe, _ in rows], color=INK)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.set_xlabel("test error [%]")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0, columnspacing=1.4)

    return draw(paint, 1.0 + 0.36 * len(rows))


def error_bars(*variants: tuple[str, str, str]) -> Picture:
    """Mean test error of each variant (key, title, colour), with a tick per seed."""

    def picture(found: Results) -> str:
        rows = []
        for key, title, hue in variants:
            try:
                rows.append((title, C[hue], list(found.values(key, "test_error").values())))
            except NotMeasured:
                continue
        if not rows:
            raise NotMeasured("test errors")

        def paint(axes) -> None:
            for y, (_, hue, values) in enumerate(rows):
                axes.barh(y, np.mean(values), height=0.5, color=hue, alpha=0.85)
                axes.plot(values, [y] * len(values), "|", color=INK, ms=9, mew=1)
                style = {"va": "center", "color": hue, "weight": "bold"}
                note(axes, f"{np.mean(values):.1f}", (max(values), y), (7, -0.5), **style)
            axes.set_yticks(range(len(rows)), [title for title, _, _ in rows], color=INK)
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_xlim(0, 1.18 * max(max(values) for _, _, values in rows) or 1)
            axes.grid(False, axis="y")
            axes.set_xlabel("test error [%]")

        return draw(paint, 0.8 + 0.4 * len(rows))

    return picture


def ratios(found: Results, recipes: Sequence[Recipe]) -> str:
    """Time of a training epoch, fastreg / torch."""
    rows = []
    for recipe in recipes:
        try:
            rows.append((recipe, found.time_ratio(recipe.key)))
        except NotMeasured:
            continue
    if not rows:
        raise NotMeasured("times")

    def paint(axes) -> None:
        values = [ratio for _, ratio in rows]
        axes.barh(
            range(len(rows)), values, height=0.5, color=[colour(recipe) for recipe, _ in rows], alpha=0.85
        )
        axes.axvline(1, color=INK, linewidth=1.2, zorder=3)
        for y, value in enumerate(values):
            note(axes, f"{value:.2f}", (0, y), (6, -0.5), va="center", color=PAPER, weight="bold")
        note(axes, "torch", (1, 1), (0, 4), coords=AT_HEIGHT, color=INK, ha="center")
        axes.set_yticks(range(len(rows)), [recipe.title for recipe, _ in rows], color=INK)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, max(1.2, 1.15 * max(values)))
        axes.grid(False, axis="y")
        axes.set_xlabel("time per epoch, fastreg / torch")

    return draw(paint, 1.0 + 0.36 * len(rows))


def limits(curves: Sequence[Sequence[float]], skip: int = 3, room: float = 1.3) -> tuple[float, float]:
    """An axis from 0 that shows everything after the first epochs."""
    values = [v for curve in curves for v in curve[min(skip, len(curve) - 1) :] if math.isfinite(v)]
    top = room * max(values, default=0.0) or 1.0
    return -0.02 * top, top


def compared_curves(*recipes: Recipe) -> Picture:
    """Cross-entropy of trainings on training and on validation data, with the gap that is left at the end."""

    def picture(found: Results) -> str:
        runs = [found.run(recipe.key) for recipe in (PLAIN, *recipes)]

        def paint(axes) -> None:
            last = max(len(run.epoch_ms) for run in runs)
            span = limits([run.curves["validation_loss"] for run in runs], room=1.25)
            for i, run in enumerate(runs):
                hue, place = colour(run.recipe), (1.06 + 0.11 * i) * last
                training, validation = run.curves["train_loss"], run.curves["validation_loss"]
                epochs = range(1, len(training) + 1)
                axes.plot(epochs, training, color=hue, linewidth=1.3, linestyle=(0, (2, 2)))
                outcome = found.outcome(run.recipe.key)
                name = run.recipe.title + {DIVERGED: " (diverged)", CHANCE: " (at chance)"}.get(outcome, "")
                axes.plot(epochs, validation, color=hue, label=name)
                if outcome != LEARNED or not all(v[-1] <= span[1] for v in (training, validation)):
                    continue  # the gap of such a training means nothing, or its bar would leave the chart
                axes.plot([place] * 2, [training[-1], validation[-1]], "_-", color=hue, linewidth=1.4, ms=8)
                style = {"ha": "center", "color": hue, "weight": "bold"}
                gap, top = validation[-1] - training[-1], max(validation[-1], training[-1])
                note(axes, f"{gap:.2f}".replace("-", "−"), (place, top), (0, 4), **style)
            axes.set_ylim(span)
            axes.set_xlim(1, max(2, (1.14 + 0.11 * len(recipes)) * last))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
            axes.set_xticks([tick for tick in axes.get_xticks() if 1 <= tick <= last])
            axes.set_xlabel("epoch")
            axes.set_ylabel("cross-entropy [nats]")
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0.2, columnspacing=1.4
            )

        return draw(paint)

    return picture


def hidden_units(*recipes: Recipe) -> Picture:
    """What the eight strongest hidden units of each network look for: their weights to the pixels, as
    pictures.
    """

    def picture(found: Results) -> str:
        shape = found.data.picture_shape
        runs = [found.run(recipe.key) for recipe in recipes]
        if shape[0] == 1 or any(not torch.isfinite(_first_layer(run)).all() for run in runs):
            return ""
        rows = []
        for run in runs:
            weights = _first_layer(run)
            strongest = weights[weights.norm(dim=1).argsort(descending=True)[:8]]
            strongest = strongest.reshape(len(strongest), *shape).numpy()
            strongest = strongest.mean(-1) if strongest.ndim == 4 else strongest
            tiles = np.pad(
                strongest / (np.abs(strongest).max() or 1.0), ((0, 0), (1, 1), (1, 1)), constant_values=np.nan
            )
            rows.append(
                np.concatenate([np.concatenate(tiles[:4], axis=1), np.concatenate(tiles[4:], axis=1)])
            )

        def paint(axes) -> None:
            for each, mosaic, run in zip(axes, rows, runs, strict=True):
                each.imshow(mosaic, cmap=WEIGHTS, vmin=-1, vmax=1, interpolation="none")
                each.set_title(run.recipe.title, color=colour(run.recipe))
                each.set_axis_off()

        high, wide = rows[0].shape
        return draw(paint, min(6.0, len(runs) * (0.3 + WIDTH * high / wide)), nrows=len(runs))

    return picture


def weights(run: Run) -> np.ndarray:
    """All weights of a network, biases left out."""
    return torch.cat([p.detach().flatten() for p in run.model.parameters() if p.ndim > 1]).numpy()


def weight_histograms(*recipes: Recipe) -> Picture:
    """All weights of each network on a logarithmic count and a common axis; the exactly zero ones are a spike
    of their own.
    """

    def picture(found: Results) -> str:
        runs = [found.run(recipe.key) for recipe in recipes]
        drawn = [weights(run) for run in runs]
        limit = max(np.abs(w).max() for w in drawn)
        if not np.isfinite(limit):
            return ""
        limit = 1.02 * limit or 1.0

        def paint(axes) -> None:
            for each, run, w in zip(np.ravel(axes), runs, drawn, strict=True):
                hue, count = colour(run.recipe), int((w == 0).sum())
                counts, edges = np.histogram(w[w != 0], bins=81, range=(-limit, limit))
                each.stairs(counts, edges, fill=True, color=hue, alpha=0.25)
                each.stairs(counts, edges, color=hue, linewidth=1.4)
                if count:
                    each.vlines(0, 0.7, count, color=hue, linewidth=2.5)
                    each.plot(0, count, "o", color=hue, ms=6)
                each.set_yscale("log")
                each.set_ylim(0.7, 5 * len(w))
                each.yaxis.set_major_locator(LogLocator(10, numticks=5))
                each.yaxis.set_minor_formatter(NullFormatter())
                each.tick_params(which="minor", size=0)
                text, style = f"{100 * count / len(w):.1f} % exactly 0", {"color": hue, "weight": "bold"}
                each.annotate(text, (0.03, 0.86), xycoords="axes fraction", va="center", **style)
                each.set_title(run.recipe.title, color=hue)
                each.set_ylabel("weights")
            np.ravel(axes)[-1].set_xlabel("value of the weight")

        return draw(paint, 0.5 + 1.75 * len(runs), nrows=len(runs), sharex=True)

    return picture


def reliability(recipe: Recipe) -> Picture:
    """Accuracy against confidence on test data, all seeds together; on the diagonal the network means what it
    says.
    """

    def picture(found: Results) -> str:
        points, hue = merged_bins(found, recipe.key), colour(recipe)
        points = [b for b in points if b["count"] >= FEWEST]

        def paint(axes) -> None:
            x, y = [[b[key] for b in points] for key in ("confidence", "accuracy")]
            axes.bar([(b["bin"] + 0.5) / BINS for b in points], y, 0.92 / BINS, color=hue, alpha=0.22)
            axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
            axes.plot(x, y, color=hue)
            largest = max((b["count"] for b in points), default=1)
            axes.scatter(
                x, y, s=[18 + 130 * b["count"] / largest for b in points], color=hue, zorder=3, clip_on=False
            )
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1)
            axes.set_xlabel("confidence")
            axes.set_ylabel("accuracy")
            title = f"{recipe.title}: calibration error {found.mean(recipe.key, 'calibration_error'):.1f} %"
            axes.set_title(title, color=hue)

        return draw(paint, 3.5)

    return picture


def merged_bins(found: Results, variant: str) -> list[dict]:
    """The bins of confidence of all seeds together."""
    merged = []
    for i in range(BINS):
        bins = [b for record in found.of(variant) for b in record["reliability"] if b["bin"] == i]
        count = sum(b["count"] for b in bins)
        if count:
            means = {
                key: sum(b["count"] * b[key] for b in bins) / count for key in ("accuracy", "confidence")
            }
            merged.append({"bin": i, "count": count, **means})
    return merged


def _first_layer(run: Run) -> torch.Tensor:
    """[units, inputs]"""
    return next(p.detach() for p in run.model.parameters() if p.ndim > 1)
