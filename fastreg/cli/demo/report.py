"""The page `report/index.html`: one file, no scripts, no links to anything else."""

import inspect
import math
import textwrap
from html import escape

import torch

from . import figures
from .train import EPS, RECIPES, Fastreg, Run, Torch

RECIPE = {recipe.key: recipe for recipe in RECIPES}
STYLE = """
:root { color-scheme: light; --ink: #1c2733; --muted: #667382; --line: #e3e7ec; --wash: #f5f7f9; --blue: #1f5fa8;
  --rust: #b5481a; }
* { box-sizing: border-box }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100% }
main { max-width: 1000px; margin: 0 auto; padding: 3.5rem 1.5rem 4rem }
h1 { font-size: 2.1rem; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 .7rem }
h2 { font-size: 1.35rem; line-height: 1.3; letter-spacing: -.01em; margin: 0 0 .4rem }
p { margin: 0 0 1rem; max-width: 44em }
.lead { font-size: 1.08rem; color: var(--muted) }
section { margin-top: 3rem; padding-top: 2.2rem; border-top: 1px solid var(--line) }
.partial { background: #fdf3ec; border-left: 4px solid var(--rust); padding: .8rem 1rem; margin: 1.5rem 0 }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 1px; background: var(--line);
  border: 1px solid var(--line); margin-top: 2rem }
.tiles div { background: #fff; padding: 1rem 1.1rem }
.tiles b { display: block; font-size: 1.55rem; line-height: 1.25; letter-spacing: -.02em; white-space: nowrap }
.tiles span { color: var(--muted); font-size: .85rem; line-height: 1.35; display: block; margin-top: .15rem }
.claims { list-style: none; margin: 1.2rem 0 0; padding: 0 }
.claims li { display: grid; grid-template-columns: 6.5rem 1fr; gap: .2rem 1rem; padding: .7rem 0;
  border-bottom: 1px solid var(--line) }
.claims li:last-child { border-bottom: 0 }
.verdict { font-weight: 650; white-space: nowrap }
.held { color: var(--blue) } .not-held { color: var(--rust) } .unmeasured { color: var(--muted) }
.evidence { color: var(--muted); font-size: .88rem; line-height: 1.45; display: block }
.wide { overflow-x: auto; margin: 1.2rem 0 }
table { border-collapse: collapse; font-size: .88rem; line-height: 1.35; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: .5rem .55rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
thead th { color: var(--muted); font-weight: 500; vertical-align: bottom; border-bottom-color: var(--muted) }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff; font-weight: 600; padding-left: 0 }
thead th.group { text-align: center; border-bottom: 1px solid var(--line) }
td.best { color: var(--blue); font-weight: 650 }
td small { color: var(--muted); font-size: .82em }
.formula { font: italic 1.12rem/1.9 Georgia, "Times New Roman", serif; background: var(--wash); padding: .7rem 1.1rem;
  margin: 1rem 0 }
.formula span { display: inline-block; margin-right: 1.6em }
.formula i { font-style: normal } .formula sub, .formula sup { line-height: 0; font-size: .7em }
.facts { display: flex; flex-wrap: wrap; gap: .3rem 2rem; margin: 1rem 0; padding: 0; list-style: none; font-size: .95rem }
.facts b { font-variant-numeric: tabular-nums }
.facts span { color: var(--muted) }
.pictures { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem 2rem; margin-top: 1.4rem }
figure { margin: 0; break-inside: avoid }
figure img { display: block; width: 100%; height: auto }
figcaption, .note { color: var(--muted); font-size: .85rem; line-height: 1.45; margin-top: .5rem; max-width: 52em }
.attack { display: grid; grid-template-columns: repeat(4, minmax(0, 150px)); gap: .6rem 2.2rem; margin-top: 1.4rem }
.attack .head { font-size: .85rem; line-height: 1.35; color: var(--muted); align-self: end }
.attack figure { position: relative }
.attack img { image-rendering: pixelated; border: 1px solid var(--line) }
.attack figcaption { margin: .3rem 0 .8rem; font-size: .85rem; color: var(--ink) }
.attack .wrong { color: var(--rust) }
.attack [data-sign]::before { content: attr(data-sign); position: absolute; left: -1.65rem; top: 30%; width: 1.1rem;
  text-align: center; color: var(--muted); font-size: 1.2rem }
details { margin-top: 1.4rem }
summary { cursor: pointer; color: var(--blue); font-size: .92rem }
.code { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }
.code h3 { font-size: .85rem; color: var(--muted); font-weight: 500; margin: .8rem 0 .3rem }
pre { margin: 0; background: var(--wash); padding: .8rem 1rem; overflow-x: auto; font: 12.5px/1.55 ui-monospace,
  SFMono-Regular, Menlo, Consolas, monospace }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .9em }
@media screen and (max-width: 760px) {
  main { padding: 1.8rem 1.1rem 3rem }
  h1 { font-size: 1.65rem }
  section { margin-top: 2.2rem; padding-top: 1.6rem }
  .tiles { grid-template-columns: 1fr 1fr }
  .tiles b { font-size: 1.3rem }
  .pictures, .code { grid-template-columns: minmax(0, 1fr) }
  .claims li { grid-template-columns: 1fr }
  .attack { gap: .5rem 1.1rem }
  .attack .head, .attack figcaption { font-size: .72rem }
  .attack [data-sign]::before { left: -1.05rem; font-size: .95rem; width: 1rem }
  .formula { font-size: 1rem; padding: .6rem .8rem }
  th, td { padding: .45rem .4rem }
  td small { display: none }
}
@media print {
  body { font-size: 10.5pt } main { max-width: none; padding: 0 }
  section { margin-top: 1.5rem; padding-top: 1.2rem } tr, li, .formula, .facts { break-inside: avoid } h2 { break-after: avoid }
  details { display: none } .wide { overflow: visible } table { font-size: 7.5pt } th, td { padding: 3pt }
}
"""


def page(results: dict, runs: list[Run]) -> str:
    """The whole page from the measured numbers and, for the pictures, the runs themselves."""
    return _Page(results, runs).html()


class _Page:
    def __init__(self, results: dict, runs: list[Run]):
        self.results, self.runs = results, runs
        self.summary = {row["recipe"]: row for row in results["summary"]}
        self.shape = runs[0].data.picture_shape if runs else ()

    def html(self) -> str:
        title = "What regularisation does to one network"
        body = [
            self.opening(title),
            self.claims(),
            self.table(),
            self.penalties(),
            self.dropout(),
            self.smoothing(),
            self.attack(),
            self.early_stopping(),
            self.together(),
            self.method(),
        ]
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title} · fastreg</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
        )

    # What the sections are made of

    def run(self, recipe: str) -> Run | None:
        """fastreg's run of the first seed: the one the pictures show."""
        return next((r for r in self.runs if r.recipe.key == recipe and r.side is Fastreg), None)

    def value(self, recipe: str, key: str, side: str = "fastreg") -> float:
        return self.summary[recipe].get(side, {}).get(key, math.nan)

    def facts(self, recipe: str, *keys: str) -> str:
        """Before and after: the numbers without regularisation beside those with `recipe`."""
        items = []
        for key in keys:
            name, unit, digits = MEASURES[key]
            before, after = self.value("none", key), self.value(recipe, key)
            items.append(f"<li><span>{name}</span> {_number(before, digits)} → <b>{_number(after, digits)}</b> {unit}</li>")
        return f'<ul class="facts">{"".join(items)}</ul>'

    def pictures(self, *figure: tuple[str, str, str]) -> str:
        shown = [
            f'<figure><img src="{source}" alt="{escape(alt)}"><figcaption>{caption}</figcaption></figure>'
            for source, alt, caption in figure
            if source
        ]
        if not shown:
            return '<p class="note">No picture: this training had not finished.</p>'
        return f'<div class="pictures">{"".join(shown)}</div>'

    # The sections

    def opening(self, title: str) -> str:
        data, settings = self.results["data"], self.results["settings"]
        layers = "–".join(str(n) for n in (data["inputs"], *settings["hidden"], len(data["classes"])))
        seeds = "one seed" if settings["seeds"] == 1 else f"{settings['seeds']} seeds"
        partial = ""
        if self.results["partial"]:
            partial = (
                f'<p class="partial"><b>Partial report.</b> The run was interrupted after '
                f"{self.results['runs_finished']} of {self.results['runs_planned']} trainings; "
                "everything below is what these measured.</p>"
            )
        claims = [claim["holds"] for claim in self.results["claims"]]
        measured = sum(holds is not None for holds in claims)
        ratios = sorted(row["time_ratio"] for row in self.results["summary"] if row["time_ratio"] is not None)
        span = f"{ratios[0]:.2f}–{ratios[-1]:.2f}" if ratios else "–"
        tiles = (
            (f"{sum(holds is True for holds in claims)} of {measured}", "claims held on this run"),
            (self.change("test_error", 1), "test error [%], plain → all methods together"),
            (self.change("attacked_accuracy", 0), "accuracy under attack [%], plain → all together"),
            (span, "time of an epoch, fastreg / torch, over the methods"),
        )
        return (
            f"<header><h1>{title}</h1>"
            f'<p class="lead">A {layers} perceptron learns from {data["train"]:,} images and meets {data["test"]:,} '
            f"new ones: {escape(data['name'])}. It is trained without regularisation and with each method, in plain "
            f"PyTorch and with fastreg, from the same initial weights and batches, {seeds}.</p>{partial}"
            f'<div class="tiles">{"".join(f"<div><b>{b}</b><span>{text}</span></div>" for b, text in tiles)}</div></header>'
        )

    def change(self, key: str, digits: int) -> str:
        return f"{_number(self.value('none', key), digits)} → {_number(self.value('all', key), digits)}"

    def claims(self) -> str:
        verdicts = {True: ("held", "✓ held"), False: ("not-held", "✗ not held"), None: ("unmeasured", "– not measured")}
        items = []
        for claim in self.results["claims"]:
            kind, text = verdicts[claim["holds"]]
            evidence = f'<span class="evidence">{escape(claim["evidence"])}</span>' if claim["holds"] is not None else ""
            items.append(f'<li><span class="verdict {kind}">{text}</span><span>{claim["title"]}{evidence}</span></li>')
        return (
            '<section id="claims"><h2>What the textbook says, and what happened here</h2>'
            "<p>Each claim is decided by the numbers of this run. A change counts if its mean over the seeds is larger "
            "than twice its standard error; two errors are the same if they differ by no more than twice their combined "
            f"standard error plus 0.3 percentage points.</p><ul class='claims'>{''.join(items)}</ul></section>"
        )

    def table(self) -> str:
        columns = ("train_error", "validation_error", "test_error", "gap_error", "zero_weights", "attacked_accuracy")
        best = {}
        for key in ("test_error", "attacked_accuracy"):
            values = [v for v in (self.value(r, key) for r in self.summary) if math.isfinite(v)]
            best[key] = (max if key == "attacked_accuracy" else min)(values, default=None)
        rows = []
        for recipe, row in self.summary.items():
            cells = []
            for key in columns:
                value = self.value(recipe, key)
                kind = ' class="best"' if value == best.get(key) else ""
                spread = row.get("fastreg", {}).get("test_error_sd") if key == "test_error" else None
                spread = "" if spread is None else f" <small>± {spread:.2f}</small>"
                cells.append(f"<td{kind}>{_number(value, MEASURES[key][2])}{spread}</td>")
                if key == "test_error":
                    cells.append(f"<td>{_number(self.value(recipe, key, 'torch'), 2)}</td>")
            ratio = math.nan if row["time_ratio"] is None else row["time_ratio"]
            cells += [f"<td>{_number(self.value(recipe, 'epoch_ms', side), 1)}</td>" for side in ("torch", "fastreg")]
            rows.append(f"<tr><th>{row['title']}</th>{''.join(cells)}<td><b>{_number(ratio, 2)}</b></td></tr>")
        errors = ratios = ""
        if self.runs:
            by_recipe = [
                {
                    "title": recipe.title,
                    **{
                        side: [r["test_error"] for r in self.results["runs"] if (r["recipe"], r["side"]) == (recipe.key, side)]
                        for side in ("torch", "fastreg")
                    },
                }
                for recipe in RECIPES
            ]
            errors = figures.errors(by_recipe)
            timed = [{"title": r["title"], "ratio": r["time_ratio"]} for r in self.summary.values() if r["time_ratio"]]
            ratios = figures.ratios(timed) if timed else ""
        return (
            '<section id="numbers"><h2>All numbers</h2>'
            "<p>Means over the seeds, of fastreg’s runs unless the column says torch; ± is the standard deviation. "
            "The gap is test error minus training error.</p>"
            '<div class="wide"><table><thead><tr><th rowspan="2">Method</th><th class="group" colspan="4">error [%]</th>'
            '<th rowspan="2">gap<br>[pp]</th><th rowspan="2">zero<br>weights<br>[%]</th>'
            '<th rowspan="2">accuracy<br>under<br>attack [%]</th><th class="group" colspan="3">time per epoch [ms]</th></tr>'
            "<tr><th style='text-align:right;position:static;font-weight:500'>training</th><th>valida-<br>tion</th>"
            "<th>test</th><th>test,<br>torch</th><th>torch</th><th>fastreg</th><th>ratio</th></tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table></div>"
            + self.pictures(
                (errors, "Test error of every method with torch and with fastreg", "Mean and range over the seeds."),
                (
                    ratios,
                    "Time of an epoch with fastreg relative to torch",
                    "Median over all epochs. Torch and fastreg train in turn, epoch by epoch.",
                ),
            )
            + "</section>"
        )

    def penalties(self) -> str:
        l1, l2, none = self.run("l1"), self.run("l2"), self.run("none")
        return (
            '<section id="penalties"><h2>L2 and L1 penalties</h2>'
            "<p>Both add the size of the weights to the objective. The gradient of the square fades as a weight "
            "shrinks, so L2 makes weights small but not zero. L1 pulls with the same force down to the end, and the "
            "proximal step puts every weight that it reaches at exactly zero. Biases are left alone.</p>"
            + _formula(
                "<i>L2:</i> Ẽ(w) = E(w) + <i>½</i> λ<sub>2</sub> ‖w‖²",
                f"λ<sub>2</sub> = <i>{RECIPE['l2'].l2:g}</i>",
            )
            + self.facts("l2", "zero_weights", "gap_loss", "test_error")
            + _formula(
                "<i>L1:</i> Ẽ(w) = E(w) + λ<sub>1</sub> ‖w‖<sub>1</sub>",
                "w ← <i>sign</i>(w) <i>max</i>(|w| − ηλ<sub>1</sub>, <i>0</i>)",
                f"λ<sub>1</sub> = <i>{RECIPE['l1'].l1:g}</i>",
            )
            + self.facts("l1", "zero_weights", "gap_loss", "test_error")
            + self.pictures(
                (
                    l1 and figures.weight_histogram(l1, l2, figures.BLUE),
                    "Histogram of the weights with the L1 penalty",
                    "All weights after training; the scale is logarithmic, the spike are the exact zeros.",
                ),
                (
                    l2 and figures.weight_histogram(l2, l1, figures.BLUE),
                    "Histogram of the weights with the L2 penalty",
                    "On the same axes, for comparison.",
                ),
                (
                    none and l2 and figures.compared_curves(none, l2),
                    "Cross-entropy with and without L2 on training and validation data",
                    GAP,
                ),
                (
                    l1 and l2 and figures.hidden_units([l1, l2], self.shape),
                    "Weights of eight hidden units with L1 and with L2",
                    UNITS,
                ),
            )
            + _code("optimizer", "step")
            + "</section>"
        )

    def dropout(self) -> str:
        none, dropout = self.run("none"), self.run("dropout")
        return (
            '<section id="dropout"><h2>Dropout</h2>'
            "<p>In every training step each hidden unit is left out with probability p and the others are scaled up, so "
            "that no unit can rely on another. fastreg keeps one bit per unit for the backward pass.</p>"
            + _formula(
                "h̃ = m ⊙ h / (<i>1</i> − p)",
                "m<sub>i</sub> ~ <i>Bernoulli</i>(<i>1</i> − p)",
                f"p = <i>{RECIPE['dropout'].dropout:g}</i>, <i>inputs {0.4 * RECIPE['dropout'].dropout:g}</i>",
            )
            + self.facts("dropout", "gap_loss", "gap_error", "test_error", "attacked_accuracy")
            + self.pictures(
                (
                    none and dropout and figures.compared_curves(none, dropout),
                    "Cross-entropy with and without dropout on training and validation data",
                    GAP,
                ),
                (
                    none and dropout and figures.hidden_units([none, dropout], self.shape),
                    "Weights of eight hidden units with and without dropout",
                    UNITS,
                ),
            )
            + _code("dropout")
            + "</section>"
        )

    def smoothing(self) -> str:
        plain, smooth = ([r for r in self.runs if r.recipe.key == k and r.side is Fastreg] for k in ("none", "smoothing"))
        return (
            '<section id="smoothing"><h2>Label smoothing</h2>'
            "<p>The target leaves a little probability to the other classes, so that no finite logit is ever large "
            "enough to be certain. The network becomes less confident; whether confidence then matches accuracy is what "
            "the reliability diagram shows. Too much smoothing overshoots the diagonal.</p>"
            + _formula(
                "q<sub>i</sub> = (<i>1</i> − ε) [i = y] + ε / k",
                "J = −∑<sub>i</sub> q<sub>i</sub> <i>log</i> p<sub>i</sub>",
                f"ε = <i>{RECIPE['smoothing'].smoothing:g}</i>",
            )
            + self.facts("smoothing", "confidence", "calibration_error", "test_loss", "test_error")
            + self.pictures(
                (
                    plain and figures.reliability(plain, "Plain", figures.RUST),
                    "Reliability diagram without label smoothing",
                    "Below the diagonal the network is surer than it is right.",
                ),
                (
                    smooth and figures.reliability(smooth, "Smoothed", figures.BLUE),
                    "Reliability diagram with label smoothing",
                    "Test images of all seeds in ten bins of confidence; the size of a dot is the number of images, bins "
                    f"with fewer than {figures.FEWEST} are left out.",
                ),
            )
            + _code("loss")
            + "</section>"
        )

    def attack(self) -> str:
        plain, trained = self.run("none"), self.run("adversarial")
        return (
            '<section id="attack"><h2>Adversarial training</h2>'
            f"<p>A step of {EPS:g} per pixel along the sign of the gradient changes what the network reads, not what a "
            "person reads. Training on such images beside the clean ones teaches the network to stand its ground. Every "
            "network is attacked through its own gradient.</p>"
            + _formula(
                "x′ = <i>clamp</i>(x + ε <i>sign</i> ∇<sub>x</sub> J(x, y), <i>0</i>, <i>1</i>)",
                "J̃ = <i>½</i> J(x, y) + <i>½</i> J(x′, y)",
                f"ε = <i>{EPS:g}</i>",
            )
            + self.facts("adversarial", "attacked_accuracy", "test_error", "gap_loss")
            + (self.examples(plain, trained) if plain else self.pictures())
            + _code("attack", "loss")
            + "</section>"
        )

    def examples(self, plain: Run, trained: Run | None) -> str:
        """Three test images that the plain network reads rightly until it is attacked."""
        data, model = plain.data, plain.model
        attacked = Fastreg.attack(model, data.x_test, data.y_test, EPS)
        with torch.no_grad():
            clean_p, attacked_p = model(data.x_test).softmax(1), model(attacked).softmax(1)
        fooled = (clean_p.argmax(1) == data.y_test) & (attacked_p.argmax(1) != data.y_test)
        chosen, classes = [], len(data.classes)
        for y in sorted({0, classes // 3, 2 * classes // 3}):
            chosen += (fooled & (data.y_test == y)).nonzero()[:1, 0].tolist()
        if not chosen:
            return '<p class="note">No picture: the attack changed none of the readings tried.</p>'
        cells = [
            '<span class="head">test image</span>',
            f'<span class="head">{EPS:g} × sign of the gradient</span>',
            '<span class="head">sum: the attacked image</span>',
            '<span class="head">attacked, for the adversarially trained network</span>' if trained else "<span></span>",
        ]
        for index in chosen:
            x, y, shape = data.x_test[index], data.y_test[index], data.picture_shape
            sign = self.sign(model, data, index)
            with torch.no_grad():
                sign_p = model((sign[None] + 1) / 2).softmax(1)[0]
            cells += [
                self.reading(figures.image(x, shape), clean_p[index], y, ""),
                self.reading(figures.sign_image(sign, shape), sign_p, y, "+"),
                self.reading(figures.image(attacked[index], shape), attacked_p[index], y, "="),
            ]
            if trained:
                own = Fastreg.attack(trained.model, x[None], y[None], EPS)
                with torch.no_grad():
                    cells.append(self.reading(figures.image(own[0], shape), trained.model(own).softmax(1)[0], y, ""))
            else:
                cells.append("<span></span>")
        return (
            f'<div class="attack">{"".join(cells)}</div><p class="note">Below each picture: what the network reads in it '
            "and how confidently, rust where it is wrong. The sign picture is read alone, at full contrast; rust pixels "
            "are brightened, blue ones darkened. Shown is the first test image of a class that fools the plain network.</p>"
        )

    def sign(self, model, data, index: int) -> torch.Tensor:
        x = data.x_test[index : index + 1].clone().requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(model(x), data.y_test[index : index + 1])
        return torch.autograd.grad(loss, x)[0][0].sign()

    def reading(self, source: str, probabilities: torch.Tensor, y: torch.Tensor, sign: str) -> str:
        confidence, predicted = probabilities.max(0)
        name = escape(self.results["data"]["classes"][predicted])
        kind = "" if predicted == y else ' class="wrong"'
        return (
            f'<figure data-sign="{sign}"><img src="{source}" alt="read as {name}"><figcaption{kind}>“{name}”, '
            f"{100 * confidence:.1f} %</figcaption></figure>"
        )

    def early_stopping(self) -> str:
        none, early = self.run("none"), self.run("early")
        kept = [r["best_epoch"] for r in self.results["runs"] if r["recipe"] == "early" and r["side"] == "fastreg"]
        stops = [r["stop_epoch"] for r in self.results["runs"] if r["recipe"] == "early" and r["side"] == "fastreg"]
        epochs = ""
        if kept:
            last = self.results["settings"]["epochs"]
            pairs = [f"{k} of {s or last}" for k, s in zip(kept, stops, strict=True)]
            epochs = f"<li><span>epoch kept, of those trained (per seed)</span> <b>{', '.join(pairs)}</b></li>"
        facts = self.facts("early", "test_error", "test_loss", "gap_loss").replace("</ul>", epochs + "</ul>")
        return (
            '<section id="early-stopping"><h2>Early stopping</h2>'
            "<p>Training goes on while the validation error falls; when it has not fallen for a while, the weights of its "
            "best epoch come back.</p>"
            + _formula(
                f"<i>stop when</i> E<sub>val</sub> <i>has not fallen for {RECIPE['early'].patience} epochs</i>",
                "w ← w <i>at its lowest</i> E<sub>val</sub>",
            )
            + facts
            + self.pictures(
                (
                    none and figures.learning_curve(none, "error", early),
                    "Training and validation error against the epoch, with the epoch kept and the epoch stopped at",
                    "The first seed, trained to the end without early stopping; the marks show what early stopping did.",
                ),
                (
                    none and figures.learning_curve(none, "loss", early),
                    "Training and validation cross-entropy against the epoch, with the same marks",
                    "Where the validation cross-entropy rises and the error does not, the network gets no more images wrong, "
                    "but surer of its mistakes.",
                ),
            )
            + _code("early_stopping")
            + "</section>"
        )

    def together(self) -> str:
        recipe = RECIPE["all"]
        return (
            '<section id="together"><h2>All together</h2>'
            "<p>The methods do different things, so they can be combined, most of them weaker than alone: "
            f"λ<sub>2</sub> = {recipe.l2:g}, λ<sub>1</sub> = {recipe.l1:g}, p = {recipe.dropout:g}, label smoothing "
            f"{recipe.smoothing:g}, adversarial ε = {recipe.eps:g}, patience {recipe.patience}.</p>"
            + self.facts("all", "test_error", "gap_loss", "attacked_accuracy", "calibration_error", "zero_weights")
            + "</section>"
        )

    def method(self) -> str:
        data, settings, machine = (self.results[key] for key in ("data", "settings", "machine"))
        load = f", load {machine['load'][0]:.1f} when the report was written" if machine["load"] else ""
        return (
            '<section id="method"><h2>How this was measured</h2>'
            f"<p>{data['train']:,} training, {data['validation']:,} validation and {data['test']:,} test examples, split "
            f"alike within every class; {settings['epochs']} epochs of SGD, learning rate {settings['lr']:g}, momentum "
            f"{settings['momentum']:g}, batches of up to {settings['batch']}; seeds 0 to {settings['seeds'] - 1}. The "
            "strengths of the methods were set beforehand in trials on the 5,000 digits, so that each effect shows. Zero "
            "weights are counted without the biases, cross-entropy is measured without smoothing. A time is that of the "
            "training steps alone, and its ratio the median over pairs of neighbouring epochs.</p>"
            f'<p class="note">{escape(machine["cpu"])}, {machine["cores"]} cores, {machine["threads"]} threads{load}; '
            f"{escape(machine['system'])}, Python {machine['python']}, torch {machine['torch']}, fastreg "
            f"{machine['fastreg']}. All numbers, of every seed and every epoch, are in <code>results.json</code> beside "
            "this page.</p></section>"
        )


MEASURES = {  # name, unit, digits
    "train_error": ("training error", "%", 2),
    "validation_error": ("validation error", "%", 2),
    "test_error": ("test error", "%", 2),
    "gap_error": ("gap in error", "pp", 2),
    "gap_loss": ("gap in cross-entropy", "nats", 2),
    "test_loss": ("test cross-entropy", "nats", 2),
    "zero_weights": ("zero weights", "%", 1),
    "attacked_accuracy": ("accuracy under attack", "%", 1),
    "confidence": ("mean confidence", "%", 1),
    "calibration_error": ("calibration error", "%", 1),
}
GAP = "Training (dotted) and validation (solid), first seed. The bars at the right are the gap that is left."
UNITS = (
    "What the eight strongest hidden units look for: their weights to the pixels, positive in rust, negative in blue, each "
    "network scaled to its largest. First seed."
)


def _formula(*equations: str) -> str:
    """Equations in italics, numbers and words upright; a narrow page breaks between them."""
    return f'<div class="formula">{"".join(f"<span>{equation}</span>" for equation in equations)}</div>'


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _code(*names: str) -> str:
    """The code that ran, torch beside fastreg."""
    columns = []
    for side in (Torch, Fastreg):
        parts = [textwrap.dedent(inspect.getsource(getattr(side, name))) for name in names]
        text = "\n".join(part.replace("@staticmethod\n", "") for part in parts)
        columns.append(f"<div><h3>{side.name}</h3><pre>{escape(text)}</pre></div>")
    return (
        f'<details><summary>The code that ran, torch beside fastreg</summary><div class="code">{"".join(columns)}</div></details>'
    )
