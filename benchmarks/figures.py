"""The pictures, as PNG: the ratios with their targets, time against size, and the losses of the training
runs.
"""

import io
import math
from collections.abc import Iterator

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    NullFormatter,
    NullLocator,
)

from fastreg.cli.style import BLUE, INK, MUTED, PAPER, RUST, SAND, STYLE

from .table import number, ordered

SIDES = {  # colour, width, dashes
    "torch": (RUST, 1.8, "-"),
    "compile": (SAND, 1.8, "-"),
    "fastreg": (BLUE, 2.4, "-"),
    "floor": (MUTED, 1.4, (0, (1, 1.5))),
}
NAMES = {"compile": "torch.compile", "floor": "floor"}


def pictures(results: dict) -> Iterator[tuple[str, bytes]]:
    """File name and content of each picture that the results have something for."""
    rows = results["rows"]
    if rows:
        yield "ratios.png", _draw(ratios(ordered(results)))
    if lines(rows):
        yield "times.png", _draw(times(rows, results["copy_bandwidth"]))
    if any("losses" in row for row in rows):
        yield "training.png", _draw(losses([row for row in rows if "losses" in row]))


def _draw(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, facecolor=PAPER, metadata={"Software": None})
    return file.getvalue()


def ratios(rows: list[dict]) -> Figure:
    """A bar per row against torch, a thin one below it against torch.compile, and the targets as upright
    strokes.
    """
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    labels, heights, y, before = [], {}, 0.0, None
    for row in rows:
        key = (row["work"], row["size"])
        if key in heights:
            continue
        if before != row["work"]:
            y += 0.5 if before else 0
            labels.append((y, row["work"], True))
            y, before = y + 0.85, row["work"]
        heights[key] = y
        labels.append((y, row["size"], False))
        y += 1.12
    values = [
        row[name]["median"] for row in rows for name in ("against_eager", "against_compile") if row[name]
    ]
    values += [
        target for row in rows for target in (row["targets"]["eager"], row["targets"]["compile"]) if target
    ]
    ends = [row["against_eager"][end] for row in rows for end in ("low", "high")]
    low, high = max(0.1, min(0.8, 0.85 * min(values + ends))), 2 * max(2.0, *values, *ends)
    with rc_context(STYLE):
        figure = Figure(figsize=(5 + 3.4 * len(dtypes), 1.5 + 0.25 * y), layout="constrained")
        panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
        for axes, dtype in zip(panels, dtypes, strict=True):
            axes.set_xscale("log")
            axes.set_xlim(low, high)
            axes.axvline(1, color=INK, linewidth=1, zorder=3)
            for row in (row for row in rows if row["dtype"] == dtype):
                height = heights[row["work"], row["size"]]
                above = 0.1 if row["against_compile"] else 0
                _bar(axes, height - above, 0.5, row["against_eager"], row["targets"]["eager"], BLUE)
                if row["against_compile"]:
                    _bar(axes, height + 0.32, 0.28, row["against_compile"], row["targets"]["compile"], SAND)
            axes.set_title(dtype)
            axes.set_ylim(y - 0.2, -0.6)
            axes.grid(False, axis="y")
            ticks = [
                tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low <= tick <= high
            ]
            axes.xaxis.set_major_locator(FixedLocator(ticks))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
            axes.tick_params(axis="y", pad=6)
        panels[0].set_yticks([label[0] for label in labels], [label[1] for label in labels])
        for tick, (_, _, heading) in zip(panels[0].get_yticklabels(), labels, strict=True):
            tick.set(color=INK if heading else MUTED, weight="bold" if heading else "normal", fontsize=9)
        handles = [
            panels[0].bar(0, 0, color=BLUE, label="times as fast as torch, with quartiles"),
            panels[0].bar(0, 0, color=SAND, label="times as fast as torch.compile"),
            *panels[0].plot([], [], "|", color=INK, ms=11, mew=1.8, label="target"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def _bar(axes, y, height, value, target, colour):
    """From 1 to the ratio, to the left and in red where it is a loss; the number stands behind bar, whisker
    and target.
    """
    median = value["median"]
    colour = colour if median >= 1 else RUST
    axes.barh(y, median - 1, height, left=1, color=colour, alpha=1 if height > 0.4 else 0.9, zorder=2)
    end = max(1.0, median, value["high"] if height > 0.4 else 0)
    low, high = axes.get_xlim()
    if target and target < end * (high / low) ** (0.17 if height > 0.4 else 0.11):  # as wide as the number
        end = max(end, target)
    if height > 0.4:
        axes.plot(
            [value["low"], value["high"]], [y, y], color=INK, linewidth=1, solid_capstyle="butt", zorder=4
        )
    if target:
        axes.plot(
            [target, target],
            [y - height / 2 - 0.06, y + height / 2 + 0.06],
            color=INK,
            linewidth=1.8,
            zorder=5,
        )
    axes.annotate(
        f"{number(median)}×",
        (end, y),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5 if height > 0.4 else 7,
        color=RUST if median < 1 else INK if height > 0.4 else MUTED,
        weight="bold" if height > 0.4 else "normal",
        zorder=6,
    )


def lines(rows: list[dict]) -> dict:
    """(work, dtype) -> its rows by size, where there are at least two sizes."""
    found = {}
    for row in rows:
        if row["scales"]:
            found.setdefault((row["work"], row["dtype"]), []).append(row)
    return {
        key: sorted(group, key=lambda row: row["elements"]) for key, group in found.items() if len(group) > 1
    }


def times(rows: list[dict], bandwidth: float) -> Figure:
    """Time against size, with the time that moving the bytes alone would take at the speed of a copy."""
    groups = lines(rows)
    works = list(dict.fromkeys(work for work, _ in groups))
    dtypes = list(dict.fromkeys(dtype for _, dtype in groups))
    with rc_context(STYLE):
        figure = Figure(figsize=(1 + 3.5 * len(works), 1.1 + 3 * len(dtypes)), layout="constrained")
        panels = figure.subplots(len(dtypes), len(works), squeeze=False, sharex="col")
        handles = {}
        for i, dtype in enumerate(dtypes):
            for j, work in enumerate(works):
                axes = panels[i][j]
                group = groups.get((work, dtype))
                if group is None:
                    axes.set_axis_off()
                    continue
                for side, (colour, width, dashes) in SIDES.items():
                    points = [
                        (row["elements"], row["seconds"][side]) for row in group if side in row["seconds"]
                    ]
                    if points:
                        dot = None if side == "floor" else "o"
                        (handles[side],) = axes.plot(
                            *zip(*points, strict=True),
                            color=colour,
                            linewidth=width,
                            linestyle=dashes,
                            marker=dot,
                            ms=4,
                        )
                if group[0]["moved_bytes"]:
                    bytes_of = [(row["elements"], row["moved_bytes"] / bandwidth) for row in group]
                    (handles["bandwidth"],) = axes.plot(
                        *zip(*bytes_of, strict=True),
                        color=INK,
                        linewidth=1.1,
                        linestyle=(0, (5, 3)),
                        zorder=1,
                    )
                _size_axes(axes, group)
                axes.set_title(f"{_wrapped(work)}\n{dtype}", fontsize=9.5)
                if j == 0:
                    axes.set_ylabel("time of a call")
                if i == len(dtypes) - 1:
                    axes.set_xlabel("elements")
        label = {"bandwidth": f"its bytes at a copy's speed, {bandwidth / 1e9:.1f} GB/s", **NAMES}
        order = [side for side in ("torch", "compile", "fastreg", "floor", "bandwidth") if side in handles]
        figure.legend(
            [handles[side] for side in order],
            [label.get(side, side) for side in order],
            loc="outside upper center",
            ncols=len(order) if len(works) > 2 else 2,
        )
    return figure


def _wrapped(work: str) -> str:
    """A long title on two lines."""
    if len(work) < 30:
        return work
    middle = min((i for i, c in enumerate(work) if c == " "), key=lambda i: abs(i - len(work) / 2))
    return f"{work[:middle]}\n{work[middle + 1 :]}"


def _size_axes(axes, group):
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    first, last = (math.log2(group[i]["elements"]) for i in (0, -1))
    step = max(1, round((last - first) / 5))
    axes.xaxis.set_major_locator(
        FixedLocator([2**power for power in range(round(first), round(last) + 1, step)])
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"$2^{{{math.log2(value):.0f}}}$"))
    axes.yaxis.set_major_locator(LogLocator(10))
    axes.yaxis.set_major_formatter(EngFormatter("s", sep="\N{THIN SPACE}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())


def losses(rows: list[dict]) -> Figure:
    """The loss of each training step, both sides over each other; the running mean strong, the steps
    themselves faint.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(4.8 * len(rows) + 0.4, 3.7), layout="constrained")
        for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
            steps = min(len(values) for values in row["losses"].values())
            window = max(1, steps // 15)
            for side, colour, dashes, width in (
                ("torch", RUST, "-", 3.2),
                ("fastreg", BLUE, (0, (3, 1.5)), 1.8),
            ):
                values = row["losses"][side][:steps]
                near = [values[max(0, i - window // 2) : i + window // 2 + 1] for i in range(steps)]
                mean = [sum(part) / len(part) for part in near]
                milliseconds = 1e3 * row["seconds"][side]
                axes.plot(values, color=colour, linewidth=0.8, alpha=0.25)
                axes.plot(
                    mean,
                    color=colour,
                    linestyle=dashes,
                    linewidth=width,
                    label=f"{side}, {milliseconds:.0f} ms a step",
                )
            axes.set_title(
                f"{_wrapped(row['work'].removeprefix('training step, '))}\n"
                f"{number(row['against_eager']['median'])}× as fast"
            )
            axes.set(xlabel="step", ylabel="training loss", ylim=(0, None))
            axes.legend(loc="best")
    return figure
