"""What the lecture says about each method, checked against the numbers of this run.

A record is one finished training: {"recipe": "l1", "side": "fastreg", "seed": 0, "test_error": 9.7, ...}.
Two rules decide:

- *changes*: the mean over seeds of the paired difference (same seed: same initial weights, same batches) has the
  claimed sign and exceeds two of its standard errors. With one seed there is no standard error: the sign decides.
- *the same within noise*: the difference of the means is at most two combined standard errors plus 0.3 percentage
  points. With one seed the standard error is that of counting errors among the test images.
"""

import math
from dataclasses import dataclass
from statistics import fmean

import numpy as np

MARGIN = 0.3  # percentage points; differences below it interest nobody, however many seeds confirm them


@dataclass(frozen=True)
class Claim:
    """One claim, whether it held (None: not measured), and the numbers that say so."""

    title: str
    holds: bool | None
    evidence: str


def check(records: list[dict], test_examples: int, titles: dict[str, str]) -> list[Claim]:
    """All claims, judged on fastreg's runs (and the last one on both sides')."""

    def changed(title, recipe, against, key, sign, unit, digits=1):
        pairs = _pairs(records, recipe, against, key)
        if not pairs:
            return Claim(title, None, "not measured")
        differences = [b - a for a, b in pairs]
        mean, error = fmean(differences), _standard_error(differences)
        evidence = (
            f"{titles[against]} {fmean(a for a, _ in pairs):.{digits}f}{unit}, "
            f"{titles[recipe]} {fmean(b for _, b in pairs):.{digits}f}{unit}"
        )
        if error is None:
            evidence += "; one seed, so no estimate of the noise"
        else:
            evidence += f"; difference {mean:+.{digits}f}, twice its standard error {2 * error:.{digits}f}"
        return Claim(title, sign * mean > 2 * (error or 0.0), evidence)

    return [
        changed("L1 makes more weights exactly zero than L2", "l1", "l2", "zero_weights", +1, " %"),
        changed("L2 narrows the gap between test and training cross-entropy", "l2", "none", "gap_loss", -1, " nats", 2),
        changed("L2 narrows the gap between test and training error", "l2", "none", "gap_error", -1, " pp"),
        changed(
            "Dropout narrows the gap between test and training cross-entropy",
            *("dropout", "none", "gap_loss", -1, " nats", 2),
        ),
        changed("Dropout narrows the gap between test and training error", "dropout", "none", "gap_error", -1, " pp"),
        changed("Label smoothing makes the network less confident", "smoothing", "none", "confidence", -1, " %"),
        changed(
            "Label smoothing brings confidence closer to accuracy (calibration error)",
            *("smoothing", "none", "calibration_error", -1, " %"),
        ),
        changed(
            "Adversarial training raises accuracy under attack",
            *("adversarial", "none", "attacked_accuracy", +1, " %"),
        ),
        _early_stopping(records, test_examples),
        _same_error(records, test_examples, titles),
    ]


def _early_stopping(records, test_examples):
    title = "Early stopping is no worse on test images than training to the last epoch"
    last, early = _values(records, "none", "fastreg"), _values(records, "early", "fastreg")
    seeds = last.keys() & early.keys()
    if not seeds:
        return Claim(title, None, "not measured")
    last, early = [last[s] for s in seeds], [early[s] for s in seeds]
    difference, allowed = fmean(early) - fmean(last), _allowed(last, early, test_examples)
    evidence = (
        f"test error {fmean(early):.2f} % at the restored epoch, {fmean(last):.2f} % at the last; "
        f"difference {difference:+.2f} pp, noise up to {allowed:.2f} pp"
    )
    return Claim(title, difference <= allowed, evidence)


def _same_error(records, test_examples, titles):
    title = "fastreg and torch reach the same test error"
    rows = []
    for recipe, name in titles.items():
        ours, theirs = _values(records, recipe, "fastreg"), _values(records, recipe, "torch")
        seeds = ours.keys() & theirs.keys()
        if seeds:
            ours, theirs = [ours[s] for s in seeds], [theirs[s] for s in seeds]
            rows.append((fmean(ours) - fmean(theirs), _allowed(ours, theirs, test_examples), name))
    if not rows:
        return Claim(title, None, "not measured")
    outside = [row for row in rows if not abs(row[0]) <= row[1]]  # NaN is outside
    difference, allowed, name = max(outside or rows, key=lambda row: abs(row[0]) / row[1])
    counted = f"{len(rows) - len(outside)} of {len(rows)} methods within noise"
    return Claim(title, not outside, f"{counted}; closest to its limit: {name}, {difference:+.2f} of ±{allowed:.2f} pp")


def _values(records, recipe, side, key="test_error"):
    return {r["seed"]: r[key] for r in records if r["recipe"] == recipe and r["side"] == side}


def _pairs(records, recipe, against, key):
    """(against, recipe) for every seed in which fastreg trained both."""
    a, b = _values(records, against, "fastreg", key), _values(records, recipe, "fastreg", key)
    return [(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]


def _standard_error(values):
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def _allowed(a, b, test_examples):
    """Two combined standard errors of two mean error rates in percent, plus MARGIN."""
    if len(a) > 1:
        return 2 * math.hypot(_standard_error(a), _standard_error(b)) + MARGIN
    rate = (a[0] + b[0]) / 200
    return 2 * 100 * math.sqrt(2 * rate * (1 - rate) / test_examples) + MARGIN
