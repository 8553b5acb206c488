"""What the lecture says about a method, checked against the numbers of this run. Two rules decide:

- *changed*: the mean over seeds of the paired difference (same seed: same initial weights, same batches) has
  the claimed sign and exceeds two of its standard errors. With one seed there is no standard error: the sign
  decides.
- *no worse*, *the same*: the difference of the means is at most two combined standard errors plus 0.3
  percentage points. With one seed the standard error is that of counting errors among the test images.

Each function here makes a claim: a function from the results to a verdict with the numbers that led to it.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from .results import MEASURES, NotMeasured, Results, standard_error

MARGIN = 0.3  # percentage points: a smaller difference does not matter, however many seeds confirm it


@dataclass(frozen=True)
class Verdict:
    """A claim, whether it held (None: not measured), and the numbers that say so."""

    title: str
    holds: bool | None
    evidence: str


Claim = Callable[[Results], Verdict]


def judged(title: str, judge: Callable[[Results], tuple[bool, str]]) -> Claim:
    """A claim that `judge` decides: it gives whether the claim held and the evidence."""

    def claim(found):
        try:
            holds, evidence = judge(found)
            return Verdict(title, holds, re.sub(r"(?<!e)-(?=\d)", "−", evidence))
        except NotMeasured:
            return Verdict(title, None, "not measured")

    return claim


def changed(title: str, variant: str, against: str, key: str, sign: int) -> Claim:
    """`variant` has more (sign 1) or less (-1) of `key` than `against`."""

    def judge(found):
        ours, theirs = found.values(variant, key), found.values(against, key)
        seeds = sorted(ours.keys() & theirs.keys())
        if not seeds:
            raise NotMeasured
        _, unit, spec = MEASURES[key]
        unit = unit and f" {unit}"
        differences = [ours[s] - theirs[s] for s in seeds]
        mean, error = fmean(differences), standard_error(differences)
        evidence = (
            f"{found.titles[against]}: {fmean(theirs[s] for s in seeds):{spec}}{unit}, "
            f"{found.titles[variant]}: {fmean(ours[s] for s in seeds):{spec}}{unit}"
        )
        if error is None:
            evidence += "; one seed, so no estimate of the noise"
        else:
            evidence += f"; difference {mean:+{spec}}, twice its standard error {2 * error:{spec}}"
        return sign * mean > 2 * (error or 0.0), evidence

    return judged(title, judge)


def no_worse(title: str, variant: str, against: str) -> Claim:
    """The test error of `variant` is not above that of `against`, within noise."""

    def judge(found):
        difference, allowed = _difference(found, (variant, "fastreg"), (against, "fastreg"))
        return difference <= allowed, (
            f"{found.titles[variant]}: {found.mean(variant, 'test_error'):.2f} %, {found.titles[against]}: "
            f"{found.mean(against, 'test_error'):.2f} %; difference {difference:+.2f} pp, noise up to "
            f"{allowed:.2f} pp"
        )

    return judged(title, judge)


def same_on_both_sides(title: str, variants: list[str]) -> Claim:
    """torch and fastreg reach the same test error with each of the variants, within noise."""

    def judge(found):
        rows = []
        for variant in variants:
            try:
                rows.append(
                    (*_difference(found, (variant, "fastreg"), (variant, "torch")), found.titles[variant])
                )
            except NotMeasured:
                continue
        if not rows:
            raise NotMeasured
        outside = [row for row in rows if not abs(row[0]) <= row[1]]  # NaN is outside
        difference, allowed, name = max(outside or rows, key=lambda row: abs(row[0]) / row[1])
        counted = f"{len(rows) - len(outside)} of {len(rows)} trainings within noise"
        return not outside, f"{counted}; closest to its limit: {name}, {difference:+.2f} of ±{allowed:.2f} pp"

    return judged(title, judge)


def _difference(found, one, other):
    """The difference of two mean test errors over the seeds that both have, and what noise may make of it."""
    a, b = (found.values(variant, "test_error", side) for variant, side in (one, other))
    seeds = a.keys() & b.keys()
    if not seeds:
        raise NotMeasured
    a, b = [a[s] for s in seeds], [b[s] for s in seeds]
    if len(seeds) > 1:
        allowed = 2 * math.hypot(standard_error(a), standard_error(b))
    else:
        rate = (a[0] + b[0]) / 200
        allowed = 2 * 100 * math.sqrt(2 * rate * (1 - rate) / len(found.data.y_test))
    return fmean(a) - fmean(b), allowed + MARGIN
