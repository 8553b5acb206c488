"""What the lecture says about a method, checked against the numbers of this run. Two rules decide:

- *changed*: the mean over seeds of the paired difference (same seed: same initial weights, same batches) has
  the claimed sign and exceeds two of its standard errors. With one seed there is no standard error: the sign
  decides.
- *no worse*, *the same*: the difference of the means is at most two combined standard errors plus 0.3
  percentage points. With one seed the standard error is that of counting errors among the test images.

No claim is decided on a network that learned nothing: one whose training diverged, or that is no better than
the constant guess. A gap between two such numbers means nothing, and any two networks at chance level agree.

Each function here makes a claim: a function from the results to a verdict with the numbers that led to it.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from .results import MEASURES, NotDecided, NotMeasured, Results, standard_error

MARGIN = 0.3  # percentage points: a smaller difference does not matter, however many seeds confirm it


@dataclass(frozen=True)
class Verdict:
    """A claim, whether it held (None: not measured or not decided), and the numbers that say so."""

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
        except NotDecided as reason:
            return Verdict(title, None, f"not decided: {reason}")

    return claim


def must_have_learned(found: Results, *networks: tuple[str, str]) -> None:
    """Raise NotDecided if one of the networks, (variant, side), learned nothing in some seed."""
    failures = [
        f"{found.titles[variant]} ({side}) {text}"
        for variant, side in networks
        if (text := found.failure(variant, side))
    ]
    if failures:
        raise NotDecided("; ".join(failures))


def changed(title: str, variant: str, against: str, key: str, sign: int) -> Claim:
    """`variant` has more (sign 1) or less (-1) of `key` than `against`."""

    def judge(found):
        ours, theirs = found.values(variant, key), found.values(against, key)
        must_have_learned(found, (variant, "fastreg"), (against, "fastreg"))
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
        must_have_learned(found, (variant, "fastreg"), (against, "fastreg"))
        return difference <= allowed, (
            f"{found.titles[variant]}: {found.mean(variant, 'test_error'):.2f} %, {found.titles[against]}: "
            f"{found.mean(against, 'test_error'):.2f} %; difference {difference:+.2f} pp, noise up to "
            f"{allowed:.2f} pp"
        )

    return judged(title, judge)


def same_on_both_sides(title: str, variants: list[str]) -> Claim:
    """torch and fastreg reach the same test error with each of the variants, within noise."""

    def judge(found):
        rows, failed = [], []
        for variant in variants:
            pair = (variant, "fastreg"), (variant, "torch")
            try:
                row = (*_difference(found, *pair), found.titles[variant])
                must_have_learned(found, *pair)
            except NotMeasured:
                continue
            except NotDecided:
                failed.append(found.titles[variant])
                continue
            rows.append(row)
        if not rows and not failed:
            raise NotMeasured
        outside = [row for row in rows if not abs(row[0]) <= row[1]]  # NaN is outside
        counted = f"{len(rows) - len(outside)} of {len(rows)} trainings within noise"
        if failed and not outside:  # a difference among the others would still refute the claim
            others = f"; of the others {counted}" if rows else ""
            raise NotDecided(f"{', '.join(failed)} learned nothing on one side or both{others}")
        difference, allowed, name = max(outside or rows, key=lambda row: abs(row[0]) / row[1])
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
