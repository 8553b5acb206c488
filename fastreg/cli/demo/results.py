"""Everything measured, as plain data: what `results.json` holds and the page shows."""

import math
import os
import platform
import statistics
from dataclasses import asdict

import numpy as np
import torch

import fastreg as fr

from . import claims
from .data import Data
from .train import BATCH, BINS, EPS, HIDDEN, LR, MOMENTUM, RECIPES, Run

TITLES = {recipe.key: recipe.title for recipe in RECIPES}
SHOWN = (
    *("train_error", "validation_error", "test_error", "gap_error", "train_loss", "test_loss", "gap_loss"),
    *("zero_weights", "attacked_accuracy", "confidence", "calibration_error"),
)


def assemble(data: Data, runs: list[Run], settings: dict, planned: int) -> dict:
    """The results of all finished runs; `planned` runs would have made it complete."""
    records = [_record(run) for run in runs]
    return {
        "partial": len(runs) < planned,
        "runs_finished": len(runs),
        "runs_planned": planned,
        "settings": settings | {"lr": LR, "momentum": MOMENTUM, "hidden": HIDDEN, "batch": BATCH, "attack_eps": EPS},
        "recipes": [asdict(recipe) for recipe in RECIPES],
        "data": {
            "name": data.name,
            "classes": data.classes,
            "inputs": data.x_train.shape[1],
            "train": len(data.y_train),
            "validation": len(data.y_validation),
            "test": len(data.y_test),
        },
        "machine": machine(),
        "claims": [asdict(claim) for claim in claims.check(records, len(data.y_test), TITLES)],
        "summary": summary(records),
        "runs": records,
    }


def _record(run: Run) -> dict:
    return {
        "recipe": run.recipe.key,
        "side": run.side.name,
        "seed": run.seed,
        **run.measured,
        "best_epoch": None if run.best_epoch is None else run.best_epoch + 1,
        "stop_epoch": None if run.stop_epoch is None else run.stop_epoch + 1,
        "epochs_ms": run.epoch_ms,
        "curves": run.curves,
        "reliability": _reliability(run),
    }


def _reliability(run: Run) -> list[dict]:
    """The reliability diagram's bins that are not empty."""
    curve = fr.calibration_curve(run.logits, run.data.y_test, BINS)
    rows = zip(*(values.tolist() for values in curve), strict=True)
    return [
        {"bin": i, "count": int(count), "accuracy": accuracy, "confidence": confidence}
        for i, (count, accuracy, confidence) in enumerate(rows)
        if count
    ]


def summary(records: list[dict]) -> list[dict]:
    """One row per method: mean and standard deviation over the seeds for each side, and the ratio of their times.

    The ratio is the median over all epochs of fastreg's time divided by that of the torch epoch beside it."""
    rows = []
    for recipe, title in TITLES.items():
        row = {"recipe": recipe, "title": title}
        both = {side: [r for r in records if r["recipe"] == recipe and r["side"] == side] for side in ("torch", "fastreg")}
        for side, own in both.items():
            if own:
                values = {key: [r[key] for r in own] for key in SHOWN}
                row[side] = {key: statistics.fmean(v) for key, v in values.items()}
                row[side]["test_error_sd"] = float(np.std(values["test_error"], ddof=1)) if len(own) > 1 else None
                row[side]["epoch_ms"] = statistics.median(ms for r in own for ms in r["epochs_ms"])
        times = {(r["side"], r["seed"]): r["epochs_ms"] for own in both.values() for r in own}
        ratios = [
            ours / theirs
            for (side, seed), epochs in times.items()
            if side == "fastreg" and ("torch", seed) in times
            for ours, theirs in zip(epochs, times["torch", seed], strict=False)  # either may have stopped earlier
        ]
        row["time_ratio"] = statistics.median(ratios) if ratios else None
        rows.append(row)
    return rows


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


def jsonable(value):
    """NaN and infinities have no JSON: they become null."""
    if isinstance(value, dict):
        return {key: jsonable(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
