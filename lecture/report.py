"""The page `report/index.html`: one file, no scripts, no links to anything else."""

import inspect
import math
import statistics
import textwrap
from html import escape
from pathlib import Path

from fastreg.cli.style import PALETTE

from . import figures
from .claims import Claim, Verdict, same_on_both_sides
from .formula import formula
from .results import DIVERGED, LEARNED, MEASURES, NotMeasured, Results, machine, standard_error
from .section import Figure, Section
from .train import PLAIN, Fastreg, Recipe, Torch, batch_size, passes

TITLE = "What regularisation does to one network"
SIDES = ("torch", "scikit-learn", "fastreg")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def recipes(sections: tuple[Section, ...]) -> list[Recipe]:
    """All trainings that the sections rest on, each once, in their order."""
    return list({recipe.key: recipe for section in sections for recipe in section.trained}.values())


def titles(sections: tuple[Section, ...]) -> dict[str, str]:
    """What the variants of the sections are called."""
    return {key: title for section in sections for key, title, _ in section.rows}


def same(sections: tuple[Section, ...]) -> Claim:
    """The claim over all sections."""
    return same_on_both_sides(
        "fastreg and torch reach the same test error with every method", [r.key for r in recipes(sections)]
    )


def verdicts(found: Results, sections: tuple[Section, ...]) -> dict[str, list[Verdict]]:
    """What became of the claims, by section; those of the whole report under "overview"."""
    judged = {section.key: [claim(found) for claim in section.claims] for section in sections}
    return judged | ({"overview": [same(sections)(found)]} if recipes(sections) else {})


def summary(found: Results, sections: tuple[Section, ...]) -> list[dict]:
    """Mean and standard error of every number of every network, for each side."""
    rows = []
    for key, title in titles(sections).items():
        for side in SIDES:
            try:
                records = found.of(key, side)
            except NotMeasured:
                continue
            row = {"variant": key, "title": title, "side": side, "seeds": len(records)}
            for name in {
                name: None for record in records for name in record if name not in ("variant", "side", "seed")
            }:
                values = [r[name] for r in records if isinstance(r.get(name), (int, float))]
                if values:
                    row[name] = {"mean": statistics.fmean(values), "standard_error": standard_error(values)}
            rows.append(row)
    return rows


def page(found: Results, sections: tuple[Section, ...]) -> str:
    """The whole page from the measured numbers and, for the pictures, the networks of the first seed."""
    judged = verdicts(found, sections)
    body = [
        contents(sections),
        "<main>",
        opening(found, sections, judged),
        overview(found, sections, judged),
        *(chapter(found, section, number, judged[section.key]) for number, section in enumerate(sections, 1)),
        method(found),
        "</main>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{TITLE} · fastreg</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<style>{style()}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def style() -> str:
    """The page's style sheet: the colours on white and on black, then page.css."""
    white, black = ("".join(f"--{name}: {pair[i]}; " for name, pair in PALETTE.items()) for i in (0, 1))
    return (
        f":root {{ color-scheme: light dark; --font: {FONT}; {white}}}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {black}}} }}\n"
        + Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    )


def contents(sections: tuple[Section, ...]) -> str:
    entries = [
        ("overview", "Overview", "muted"),
        *((s.key, s.title, s.colour) for s in sections),
        ("method", "How measured", "muted"),
    ]
    links = "".join(
        f'<li><a href="#{key}" style="--c: var(--{hue})">{title}</a></li>' for key, title, hue in entries
    )
    return f'<nav aria-label="Contents"><b>fastreg demo</b><ol>{links}</ol></nav>'


def opening(found: Results, sections: tuple[Section, ...], judged: dict) -> str:
    data, settings = found.data, found.settings
    layers = "–".join(str(n) for n in (data.x_train.shape[1], *settings["hidden"], len(data.classes)))
    seeds = "one seed" if settings["seeds"] == 1 else f"{settings['seeds']} seeds"
    partial = ""
    if found.finished < found.planned:
        partial = (
            '<p class="partial"><b>Partial report.</b> The run was interrupted after '
            f"{found.finished} of {found.planned} trainings and measurements; everything below is what these "
            "gave.</p>"
        )
    failures = found.failures()
    learned_nothing = ""
    if failures:
        learned_nothing = (
            '<div class="partial" id="learned-nothing"><p><b>Some networks learned nothing.</b> No claim is '
            f"decided on them (–). {_guess(found)}</p><ul>"
            + "".join(f"<li>{escape(text)}</li>" for text in failures)
            + "</ul></div>"
        )
    verdicts = [v for verdict in judged.values() for v in verdict]
    decided = [v.holds for v in verdicts if v.holds is not None]
    ratios = []
    for recipe in recipes(sections):
        try:
            ratios.append(found.time_ratio(recipe.key))
        except NotMeasured:
            continue
    left = len(verdicts) - len(decided)
    undecided = f", {left} could not be decided" if left else ""
    tiles = [(f"{sum(decided)} of {len(decided)}", f"claims held on this run{undecided}")]
    if any(recipe.key == "all" for recipe in recipes(sections)):
        tiles += [
            (_change(found, "test_error", ".1f"), "test error [%], plain → all methods together"),
            (_change(found, "attacked_accuracy", ".0f"), "accuracy under attack [%], plain → all together"),
        ]
    if ratios:
        tiles.append(
            (f"{min(ratios):.2f}–{max(ratios):.2f}", "time of an epoch, fastreg / torch, over the methods")
        )
    shown = "".join(f"<div><b>{number}</b><span>{text}</span></div>" for number, text in tiles)
    return (
        f'<header id="top"><h1>{TITLE}</h1>'
        f'<p class="lead">A {layers} perceptron learns from {len(data.y_train):,} images and meets '
        f"{len(data.y_test):,} new ones: {escape(data.name)}. It is trained without regularisation and with "
        "each method, in plain PyTorch and with fastreg, from the same initial weights and batches, "
        f"{seeds}.</p>{_prepared(data)}{partial}{learned_nothing}"
        f'<div class="tiles">{shown}</div></header>'
    )


def _prepared(data) -> str:
    """What was done to the examples before anything learned from them."""
    return f'<p class="note">The data: {escape("; ".join(data.prepared))}.</p>' if data.prepared else ""


def _guess(found: Results) -> str:
    """What the constant guess reaches, and how it is used."""
    data = found.data
    return (
        f"The constant guess, always the commonest class, has a test error of {data.guess_error:.1f} %, the "
        f"best constant prediction a training cross-entropy of {data.guess_loss:.2f} nats: a training whose "
        "cross-entropy ends above that, or is not finite, diverged; a network whose test error is not below "
        "that of the guess by two standard errors is no better than it."
    )


def _change(found, key, spec):
    try:
        return " → ".join(_number(found.mean(variant, key), spec) for variant in (PLAIN.key, "all"))
    except NotMeasured:
        return "–"


def overview(found: Results, sections: tuple[Section, ...], judged: dict) -> str:
    items = []
    for section in sections:
        items += [
            _claim(v, f'<a href="#{section.key}">{v.title}</a>', section.colour, False)
            for v in judged[section.key]
        ]
    items += [_claim(v, v.title, "ink", True) for v in judged.get("overview", ())]
    measured = {(record["variant"], record["side"]) for record in found.records}
    drawn = [recipe for recipe in recipes(sections) if (recipe.key, "fastreg") in measured]
    errors = Figure(
        lambda found: figures.errors(found, drawn),
        "Test error of every method with torch and with fastreg",
        "Mean and range over the seeds, torch hollow, fastreg filled.",
    )
    ratios = Figure(
        lambda found: figures.ratios(found, drawn),
        "Time of an epoch with fastreg relative to torch",
        "Median over all epochs. Torch and fastreg train in turn, epoch by epoch.",
    )
    shown = figures_of(found, errors, ratios) if drawn else ""
    return (
        '<section id="overview"><h2>What the lecture says, and what happened here</h2>'
        "<p>Each claim is decided by the numbers of this run. A change counts if its mean over the seeds is "
        "larger than twice its standard error; two errors are the same if they differ by no more than twice "
        "their combined standard error plus 0.3 percentage points. A claim that rests on a network that "
        "learned nothing is not decided (–).</p>"
        f"<ul class='claims summary'>{''.join(items)}</ul>{shown}</section>"
    )


def chapter(found: Results, section: Section, number: int, judged: list[Verdict]) -> str:
    """One method: formula, explanation, table, pictures, what they show, and the code."""
    formulas = "".join(formula(tex) for tex in section.formulas)
    items = "".join(_claim(v, f"<b>{v.title}</b>", section.colour, True) for v in judged)
    return (
        f'<section id="{section.key}" style="--c: var(--{section.colour})">'
        f"<h2><small>{number}</small>{section.title}</h2>"
        f'<div class="formulas">{formulas}</div>{section.text}{table(found, section)}'
        f'{figures_of(found, *section.figures)}<ul class="claims">{items}</ul>{_code(section.code)}</section>'
    )


def table(found: Results, section: Section) -> str:
    """Mean ± standard error over the seeds of every variant, torch beside fastreg."""
    measures = MEASURES | section.measures
    heads = "".join(
        f"<th>{name}<i>{unit}</i></th>" for name, unit, _ in (measures[key] for key in section.columns)
    )
    rows = []
    for key, title, hue in section.rows:
        sides = [
            side for side in SIDES if any((r["variant"], r["side"]) == (key, side) for r in found.records)
        ]
        for i, side in enumerate(sides):
            cells = "".join(
                _cell(found, key, side, column, measures[column][2]) for column in section.columns
            )
            if i == 0:  # on a narrow screen the name stands above, elsewhere beside
                rows.append(f'<tr class="name"><th colspan="{len(section.columns) + 1}">{title}</th></tr>')
            head = f'<th class="name" rowspan="{len(sides)}">{title}</th>' if i == 0 else ""
            failed = "" if found.failure(key, side) is None else f"<em>{_failure(found, key, side)}</em>"
            inner = ' class="inner"' if i + 1 < len(sides) else ""
            rows.append(
                f'<tr{inner} style="--r: var(--{hue})">{head}<td class="side {side}">{side}{failed}</td>'
                f"{cells}</tr>"
            )
    if not rows:
        return '<p class="note">No numbers: nothing of this section had been measured.</p>'
    note = f'<p class="note">{section.table_note}</p>' if section.table_note else ""
    head = f'<thead><tr><th class="name"></th><th></th>{heads}</tr></thead>'
    return f'<div class="wide"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>{note}'


def _failure(found, key, side):
    """Beside the side's name in the table: what became of the networks, in two words."""
    outcomes = [r.get("outcome", LEARNED) for r in found.of(key, side)]
    count = sum(each != LEARNED for each in outcomes)
    seeds = "" if count == len(outcomes) else f" ({count} of {len(outcomes)})"
    return ("diverged" if DIVERGED in outcomes else "at chance") + seeds


def _cell(found, key, side, column, spec):
    try:
        values = [v for v in found.values(key, column, side).values() if v is not None]
    except NotMeasured:
        values = []
    if not values:
        return "<td>–</td>"
    spread = ""
    if column == "epoch_ms":
        values = [statistics.median(ms for r in found.of(key, side) for ms in r["epochs_ms"])]
        if side == "fastreg":
            spread = f" <small>{found.time_ratio(key):.2f}×</small>"
    else:
        error = standard_error(values)
        if error is not None and math.isfinite(error) and error > 0:
            shown = f"{error:{spec}}"
            if float(shown.replace(",", "")) == 0:  # smaller than the last digit
                shown = f"&lt; {shown[:-1]}1"
            spread = f" <small>± {shown}</small>"
    return f"<td>{_number(statistics.fmean(values), spec)}{spread}</td>"


def figures_of(found: Results, *shown) -> str:
    drawn = []
    for figure in shown:
        try:
            picture = figure.draw(found)
        except NotMeasured:
            continue
        if picture:
            caption = f"<figcaption>{figure.caption}</figcaption>"
            drawn.append(
                f'<figure role="group" aria-label="{escape(figure.alt)}">{picture}{caption}</figure>'
            )
    if not drawn:
        return '<p class="note">No picture: what it would show had not been measured.</p>' if shown else ""
    return f'<div class="pictures">{"".join(drawn)}</div>'


def method(found: Results) -> str:
    data, settings, here = found.data, found.settings, machine()
    load = f", load {here['load'][0]:.1f} when the report was written" if here["load"] else ""
    return (
        '<section id="method"><h2>How this was measured</h2>'
        f"<p>{len(data.y_train):,} training, {len(data.y_validation):,} validation and {len(data.y_test):,} "
        f"test examples, split "
        f"alike within every class; {settings['epochs']} epochs of SGD, learning rate {settings['lr']:g}, "
        f"momentum "
        f"{settings['momentum']:g}, batches of {batch_size(len(data.y_train))}"
        f"{_passes(len(data.y_train))}, gradients clipped at a norm of {settings['clip']:g}; "
        f"{_seeds(settings['seeds'])}. "
        "The strengths of the methods were set beforehand in trials on the "
        "5,000 digits, so that "
        "each effect shows. Cross-entropy is measured without smoothing. A time is that of the training "
        "steps alone, and its "
        f"ratio (×, fastreg / torch) the median over pairs of neighbouring epochs. {_guess(found)}</p>"
        f'<p class="note">{escape(here["cpu"])}, {_plural(here["cores"], "core")}, '
        f"{_plural(here['threads'], 'thread')}{load}; "
        f"{escape(here['system'])}, Python {here['python']}, torch {here['torch']}, fastreg "
        f"{here['fastreg']}. All numbers, of "
        "every seed and every epoch, are in <code>results.json</code> beside this page.</p></section>"
    )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _passes(examples: int) -> str:
    """Where the examples are few, an epoch is more than one pass."""
    count = passes(examples)
    return f", {count} passes over the training examples in an epoch" if count > 1 else ""


def _seeds(count: int) -> str:
    if count == 1:
        return "one seed, 0, so no estimate of the noise"
    return f"seeds 0 to {count - 1}, ± is the standard error of the mean over them"


def _claim(verdict: Verdict, title: str, hue: str, evidence: bool) -> str:
    kind = {True: "held", False: "not-held", None: "undecided"}[verdict.holds]
    shown = f"<span>{escape(verdict.evidence)}</span>" if evidence else ""
    return f'<li class="{kind}" style="--c: var(--{hue})">{title}{shown}</li>'


def _number(value: float, spec: str) -> str:
    return f"{value:{spec}}".replace("-", "−") if math.isfinite(value) else "–"


def _code(names: tuple[str, ...]) -> str:
    """The code that ran, torch beside fastreg."""
    if not names:
        return ""
    columns = []
    for side in (Torch, Fastreg):
        parts = [textwrap.dedent(inspect.getsource(getattr(side, name))) for name in names]
        text = "\n".join(part.replace("@staticmethod\n", "") for part in parts)
        columns.append(f"<div><h3>{side.name}</h3><pre>{escape(text)}</pre></div>")
    return (
        "<details><summary>The code that ran, torch beside fastreg</summary>"
        f'<div class="code">{"".join(columns)}</div></details>'
    )
