"""One file per op, `bench_<op>.py`, with its cases, their checks and their targets; `_timing.py` measures
them.

`fastreg bench` runs them all, each file runs alone (`python benchmarks/bench_dropout.py --quick`), and an
installed fastreg has them as `fastreg.benchmarks`. A new file is found by its name.
"""

import importlib
import pkgutil


def ops():
    """The ops that have a benchmark, by name. The example, which is there to be copied, is not listed."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    found = {name.removeprefix("bench_") for name in names if name.startswith("bench_")}
    return sorted(found - {"example"})


def load(op):
    """The module of one op: `cases(scale)` gives its cases at "full", "quick" or "tiny" scale."""
    return importlib.import_module(f"{__name__}.bench_{op}")
