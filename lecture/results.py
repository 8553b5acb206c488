"""Everything measured, as plain data: what `results.json` holds, and what the page, its tables and claims
read.

A record is one network, trained and measured:
{"variant": "l1", "side": "fastreg", "seed": 0, "test_error": 9.7, ...}.
"""

import math
import os
import platform
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import fastreg as fr

MEASURES = {  # key: (name, unit, format)
    "train_error": ("training error", "%", ".2f"),
    "validation_error": ("validation error", "%", ".2f"),
    "test_error": ("test error", "%", ".2f"),
    "gap_error": ("gap in error", "pp", ".2f"),
    "gap_loss": ("gap in cross-entropy", "nats", ".3f"),
    "test_loss": ("test cross-entropy", "nats", ".3f"),
    "zero_weights": ("zero weights", "%", ".1f"),
    "weight_size": ("mean |weight|", "", ".4f"),
    "attacked_accuracy": ("accuracy under FGSM", "%", ".1f"),
    "robust_accuracy": ("accuracy under PGD", "%", ".1f"),
    "confidence": ("mean confidence", "%", ".1f"),
    "calibration_error": ("calibration error", "%", ".1f"),
    "epoch_ms": ("time per epoch", "ms", ".1f"),
    "time_ratio": ("time, fastreg / torch", "", ".2f"),
}


# What became of a training: DIVERGED if a number of it is not finite or its training cross-entropy is above
# that of the best constant prediction; CHANCE if its test error is below that of the constant guess by no
# more than two standard errors of counting.
LEARNED, DIVERGED, CHANCE = "learned", "diverged", "no better than the constant guess"


class NotDecided(Exception):
    """A claim rests on a training that taught the network nothing; the message says which."""


class NotMeasured(Exception):
    """A number or a network that this run does not have: what needs it is left out of the report, and says
    so.
    """


@dataclass
class Results:
    """The records of a run, and the networks of its first seed for the pictures."""

    data: Any
    settings: dict
    titles: dict[str, str]  # of the variants
    planned: int = 0  # trainings and measurements that would make it complete
    finished: int = 0
    records: list[dict] = field(default_factory=list)
    runs: dict[str, Any] = field(default_factory=dict)  # variant: fastreg's training of the first seed
    kept: dict[str, Any] = field(default_factory=dict)  # what sections keep for their pictures, by section

    def add(self, record: dict) -> None:
        """A new record, or further numbers of a network that has one."""
        key = ("variant", "side", "seed")
        for old in self.records:
            if all(old[k] == record[k] for k in key):
                old.update(record)
                record = old
                break
        else:
            self.records.append(record)
        if "test_error" in record:
            record["outcome"] = outcome(record, self.data)

    def of(self, variant: str, side: str = "fastreg") -> list[dict]:
        """The records of a variant, one per seed."""
        found = [r for r in self.records if (r["variant"], r["side"]) == (variant, side)]
        if not found:
            raise NotMeasured(variant)
        return found

    def values(self, variant: str, key: str, side: str = "fastreg") -> dict[int, float]:
        """{seed: value}"""
        found = {r["seed"]: r[key] for r in self.of(variant, side) if key in r}
        if not found:
            raise NotMeasured(f"{key} of {variant}")
        return found

    def outcome(self, variant: str, side: str = "fastreg", seed: int = 0) -> str:
        """What became of one training: LEARNED, DIVERGED or CHANCE. Networks that do not classify, and
        records that were not added, count as LEARNED.
        """
        return next((r.get("outcome", LEARNED) for r in self.of(variant, side) if r["seed"] == seed), LEARNED)

    def failure(self, variant: str, side: str = "fastreg") -> str | None:
        """In words, if in any seed this network learned nothing; it decides no claim, since to leave such
        seeds out would choose among the seeds by their outcome.
        """
        records = self.of(variant, side)
        failed = [r for r in records if r.get("outcome", LEARNED) != LEARNED]
        if not failed:
            return None
        found = [what for what in (DIVERGED, CHANCE) if any(r["outcome"] == what for r in failed)]
        return " or ".join(found) + (
            "" if len(records) == 1 else f" in {len(failed)} of {len(records)} seeds"
        )

    def failures(self) -> list[str]:
        """Every network that learned nothing in some seed, in words; the sides together where they agree."""
        said: dict[tuple[str, str], list[str]] = {}
        for variant, side in dict.fromkeys((r["variant"], r["side"]) for r in self.records):
            text = self.failure(variant, side)
            if text:
                said.setdefault((variant, text), []).append(side)
        return [
            f"{self.titles.get(variant, variant)} ({' and '.join(sides)}): {text}"
            for (variant, text), sides in said.items()
        ]

    def mean(self, variant: str, key: str, side: str = "fastreg") -> float:
        return statistics.fmean(self.values(variant, key, side).values())

    def run(self, variant: str) -> Any:
        """fastreg's training of the first seed: the one the pictures show."""
        if variant not in self.runs:
            raise NotMeasured(variant)
        return self.runs[variant]

    def keep(self, section: str) -> Any:
        if section not in self.kept:
            raise NotMeasured(section)
        return self.kept[section]

    def time_ratio(self, variant: str) -> float:
        """The median over all epochs of fastreg's time divided by that of the torch epoch beside it."""
        torch_times = self.values(variant, "epochs_ms", "torch")
        ratios = [
            ours / theirs
            for seed, epochs in self.values(variant, "epochs_ms").items()
            # Either side may have stopped earlier.
            for ours, theirs in zip(epochs, torch_times.get(seed, ()), strict=False)
        ]
        if not ratios:
            raise NotMeasured(f"times of {variant}")
        return statistics.median(ratios)

    def jsonable(self, claims: list[dict], summary: list[dict]) -> dict:
        """All of it without NaN, which JSON lacks."""
        data = self.data
        return jsonable(
            {
                "partial": self.finished < self.planned,
                "steps_finished": self.finished,
                "steps_planned": self.planned,
                "settings": self.settings,
                "data": {
                    "name": data.name,
                    "classes": data.classes,
                    "inputs": data.x_train.shape[1],
                    "train": len(data.y_train),
                    "validation": len(data.y_validation),
                    "test": len(data.y_test),
                    "prepared": data.prepared,
                    "guess_error": data.guess_error,
                    "guess_loss": data.guess_loss,
                },
                "machine": machine(),
                "claims": claims,
                "summary": summary,
                "records": self.records,
            }
        )


def outcome(record: dict, data: Any) -> str:
    """LEARNED, DIVERGED or CHANCE, from a record with a test error."""
    losses = [record[key] for key in ("train_loss", "validation_loss", "test_loss") if key in record]
    if not all(map(math.isfinite, (record["test_error"], *losses))):
        return DIVERGED
    if record.get("train_loss", 0.0) > data.guess_loss:
        return DIVERGED
    guess = data.guess_error
    noise = 2 * math.sqrt(guess * (100 - guess) / len(data.y_test))
    return LEARNED if record["test_error"] < guess - noise else CHANCE


def standard_error(values: Iterable[float]) -> float | None:
    """The standard error of the mean; one value has none."""
    values = list(values)
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def machine() -> dict:
    """What the times were measured on."""
    try:
        with open("/proc/cpuinfo") as file:
            cpu = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastreg": fr.__version__,
    }


def jsonable(value: Any) -> Any:
    """NaN and infinities have no JSON: they become null."""
    if isinstance(value, dict):
        return {key: jsonable(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
