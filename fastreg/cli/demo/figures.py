"""The report's pictures, each as a `data:` address, so that the page needs no other file.

Charts are SVG drawn by matplotlib at the width of a phone (4.4 in), so that nothing has to shrink to fit; their
text stays text, in the page's own font. Images of examples are enlarged by whole factors, without smoothing.
"""

import base64
import io
import re

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image

import fastreg as fr

from ..style import BLUE, INK, MUTED, PAPER, RUST, SAND, STYLE
from .train import BINS, Run

FEWEST = 10  # examples a bin of the reliability diagram must hold to be drawn: fewer say nothing
PAGE_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def _draw(paint, height: float = 3.1) -> str:
    """A chart: `paint(axes)` fills it."""
    with rc_context(STYLE):
        figure = Figure(figsize=(4.4, height), layout="constrained")
        paint(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = re.sub(r"font: ((?:\w+ )*[\d.]+px) [^;\"]*", rf"font: \1 {PAGE_FONT}", file.getvalue())
    svg = svg[svg.index("<svg") :]
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def image(pixels: torch.Tensor, shape: tuple[int, ...]) -> str:
    """One example, [D] in [0, 1], drawn as `shape`."""
    pixels = (pixels.detach().reshape(shape).clamp(0, 1) * 255).round().byte().numpy()
    return _png(pixels)


def sign_image(sign: torch.Tensor, shape: tuple[int, ...]) -> str:
    """A picture of signs, [D] in {-1, 0, 1}: rust where the attack brightens, blue where it darkens."""
    sign = sign.detach().reshape(shape)
    if len(shape) == 3:  # the colour channels vote
        sign = sign.sum(2).sign()
    colours = np.array([[31, 95, 168], [244, 245, 247], [194, 82, 27]], dtype=np.uint8)
    return _png(colours[(sign.long() + 1).numpy()])


def _png(pixels: np.ndarray) -> str:
    factor = max(1, 168 // max(pixels.shape[:2]))
    pixels = pixels.repeat(factor, 0).repeat(factor, 1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def errors(rows: list[dict]) -> str:
    """Test error of every method, torch beside fastreg. rows: {"title", "torch": [...], "fastreg": [...]}."""

    def paint(axes):
        for y, row in enumerate(rows):
            for side, colour, offset in (("torch", RUST, 0.17), ("fastreg", BLUE, -0.17)):
                values = row[side]
                if values:
                    mean = np.mean(values)
                    axes.plot([min(values), max(values)], [y + offset] * 2, color=colour, alpha=0.35, linewidth=4)
                    face = colour if side == "fastreg" else PAPER
                    axes.plot(mean, y + offset, "o", color=colour, mfc=face, mew=1.6, ms=6.5)
        for side, colour, face in (("torch", RUST, PAPER), ("fastreg", BLUE, BLUE)):
            axes.plot([], [], "o", color=colour, mfc=face, mew=1.6, ms=6.5, label=side)
        axes.set_yticks(range(len(rows)), [row["title"] for row in rows], color=INK)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.set_xlabel("test error [%]")
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2)

    return _draw(paint, 3.9)


def ratios(rows: list[dict]) -> str:
    """Time of a training epoch, fastreg / torch. rows: {"title", "ratio"}."""

    def paint(axes):
        values = [row["ratio"] for row in rows]
        axes.barh(range(len(rows)), values, height=0.55, color=[BLUE if v <= 1 else SAND for v in values])
        axes.axvline(1, color=RUST, linewidth=1.4, zorder=1)
        for y, value in enumerate(values):
            axes.annotate(f"{value:.2f}", (0, y), (6, -0.5), textcoords="offset points", va="center",
                          color=PAPER if value <= 1 else INK, weight="bold")  # fmt: skip
        axes.annotate("torch", (1, 1), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points",
                      color=RUST, ha="center")  # fmt: skip
        axes.set_yticks(range(len(rows)), [row["title"] for row in rows], color=INK)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, max(1.2, 1.15 * max(values)))
        axes.grid(False, axis="y")
        axes.set_xlabel("time per epoch, fastreg / torch")

    return _draw(paint, 3.9)


def learning_curve(run: Run, quantity: str, early: Run | None) -> str:
    """Training and validation `quantity` ("error" or "loss") against the epoch, with what early stopping did."""

    def paint(axes):
        epochs = range(1, len(run.curves[f"train_{quantity}"]) + 1)
        training, validation = run.curves[f"train_{quantity}"], run.curves[f"validation_{quantity}"]
        axes.plot(epochs, training, color=SAND)
        axes.plot(epochs, validation, color=BLUE)
        top = 1.3 * max(validation[min(3, len(validation) - 1) :])
        top = top if np.isfinite(top) and top > 0 else 1.0
        axes.set_ylim(-0.03 * top, top)
        axes.set_xlim(1, max(2, len(epochs)))
        named = len(epochs) // 3  # where the curves are named: from here on, above everything they do
        for name, curve, colour in (("training", training, MUTED), ("validation", validation, BLUE)):
            peak = max(curve[named : 2 * named + 1])
            axes.annotate(
                name, (named + 1, peak), (0, 5), textcoords="offset points", color=colour, weight="bold",
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
            )  # fmt: skip
        if early is not None and early.best_epoch is not None:
            best = early.best_epoch + 1
            axes.plot(best, validation[best - 1], "o", color=RUST, ms=7, zorder=4)
            axes.axvline(best, color=RUST, linewidth=1.2, zorder=1)
            marks = [(best, f"kept: {best}")]
            if early.stop_epoch is not None:
                stop = early.stop_epoch + 1
                axes.axvline(stop, color=RUST, linewidth=1.2, linestyle=(0, (3, 3)), zorder=1)
                marks.append((stop, f"stopped: {stop}"))
            for x, text in marks:
                left = x > 0.75 * len(epochs)
                axes.annotate(text, (x, 1), (-4 if left else 4, -4), xycoords=("data", "axes fraction"),
                              textcoords="offset points", color=RUST, ha="right" if left else "left", va="top",
                              rotation=90)  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.set_xlabel("epoch")
        axes.set_ylabel({"error": "error [%]", "loss": "cross-entropy [nats]"}[quantity])

    return _draw(paint)


def compared_curves(plain: Run, method: Run) -> str:
    """Cross-entropy of two trainings, on training and on validation data, with the gap that is left at the end."""

    def paint(axes):
        top, last = 0.0, len(plain.curves["train_loss"])
        for run, colour, place in ((plain, RUST, 1.06), (method, BLUE, 1.17)):
            training, validation = run.curves["train_loss"], run.curves["validation_loss"]
            epochs = range(1, len(training) + 1)
            axes.plot(epochs, training, color=colour, linewidth=1.3, linestyle=(0, (2, 2)))
            axes.plot(epochs, validation, color=colour, label=run.recipe.title)
            axes.plot([place * last] * 2, [training[-1], validation[-1]], "_-", color=colour, linewidth=1.4, ms=8)
            axes.annotate(f"{validation[-1] - training[-1]:.2f}", (place * last, validation[-1]), (0, 4),
                          textcoords="offset points", ha="center", color=colour, weight="bold")  # fmt: skip
            top = max(top, *validation[min(3, len(validation) - 1) :])
        top = top if np.isfinite(top) and top > 0 else 1.0
        axes.set_ylim(-0.02 * top, 1.4 * top)
        axes.set_xlim(1, max(2, 1.25 * last))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.set_xticks([tick for tick in axes.get_xticks() if 1 <= tick <= last])
        axes.set_xlabel("epoch")
        axes.set_ylabel("cross-entropy [nats]")
        axes.legend(loc="upper right")

    return _draw(paint)


def hidden_units(runs: list[Run], shape: tuple[int, ...]) -> str:
    """What the eight strongest hidden units of each network look for: their weights to the pixels, as pictures."""
    if shape[0] == 1 or any(not torch.isfinite(_first_layer(run)).all() for run in runs):
        return ""
    rows = []
    for run in runs:
        weights = _first_layer(run)
        strongest = weights[weights.norm(dim=1).argsort(descending=True)[:8]]
        strongest = strongest.reshape(len(strongest), *shape).numpy()
        strongest = strongest.mean(-1) if strongest.ndim == 4 else strongest
        tiles = np.pad(strongest / (np.abs(strongest).max() or 1.0), ((0, 0), (1, 1), (1, 1)), constant_values=np.nan)
        rows += [np.concatenate(tiles[:4], axis=1), np.concatenate(tiles[4:], axis=1)]
    mosaic = np.concatenate(rows)
    colours = LinearSegmentedColormap.from_list("weights", [BLUE, "#f4f5f7", RUST]).with_extremes(bad=PAPER)

    def paint(axes):
        axes.imshow(mosaic, cmap=colours, vmin=-1, vmax=1, interpolation="none")
        tall = mosaic.shape[0] / len(runs)
        axes.set_yticks([tall * (i + 0.5) for i in range(len(runs))], [r.recipe.title.replace(" ", "\n") for r in runs])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_xticks([])
        axes.grid(False)
        axes.spines[:].set_visible(False)

    return _draw(paint, 3.1 * min(2.0, mosaic.shape[0] / mosaic.shape[1]))


def weight_histogram(run: Run, other: Run | None, colour: str) -> str:
    """All weights of a network on a logarithmic count; the exactly zero ones are drawn as a spike of their own."""
    weights = _weights(run)
    if not np.isfinite(weights).any():
        return ""
    zeros = 100 * np.mean(weights == 0)
    limit = max(np.abs(_weights(r)).max() for r in (run, other) if r is not None)
    limit = limit if np.isfinite(limit) and limit > 0 else 1.0

    def paint(axes):
        counts, edges = np.histogram(weights[weights != 0], bins=81, range=(-limit, limit))
        axes.stairs(counts, edges, fill=True, color=colour, alpha=0.25)
        axes.stairs(counts, edges, color=colour, linewidth=1.4)
        count = int((weights == 0).sum())
        if count:
            axes.vlines(0, 0.7, count, color=RUST, linewidth=2.5)
            axes.plot(0, count, "o", color=RUST, ms=6)
        axes.set_yscale("log")
        axes.set_ylim(0.7, 5 * len(weights))
        axes.yaxis.set_major_locator(LogLocator(10, numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(which="minor", size=0)
        axes.annotate(
            f"{zeros:.1f} % exactly 0", (0.0, count or counts.max()), (10, 0), textcoords="offset points",
            color=RUST if count else MUTED, weight="bold", va="center",
        )  # fmt: skip
        axes.set_xlabel("weight")
        axes.set_ylabel("number of weights")
        axes.set_title(run.recipe.title)

    return _draw(paint)


def reliability(runs: list[Run], title: str, colour: str) -> str:
    """Accuracy against confidence on test data, all seeds together; on the diagonal the network means what it says."""
    logits, target = torch.cat([r.logits for r in runs]), torch.cat([r.data.y_test for r in runs])
    error = 100 * fr.calibration_error(logits, target, BINS).item()
    count, y, x = fr.calibration_curve(logits, target, BINS)
    enough = count >= FEWEST
    count, y, x, middle = (values[enough].tolist() for values in (count, y, x, (torch.arange(BINS) + 0.5) / BINS))

    def paint(axes):
        axes.bar(middle, y, 0.92 / BINS, color=colour, alpha=0.22)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.plot(x, y, color=colour)
        largest = max(count, default=1)
        axes.scatter(x, y, s=[18 + 130 * n / largest for n in count], color=colour, zorder=3, clip_on=False)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
        axes.set_title(f"{title}: calibration error {error:.1f} %")

    return _draw(paint, 3.5)


def _weights(run: Run) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in run.model.parameters() if p.ndim > 1]).numpy()


def _first_layer(run: Run) -> torch.Tensor:
    """[units, inputs]"""
    return next(p.detach() for p in run.model.parameters() if p.ndim > 1)
