"""`fastreg bench`. One file per op, `bench_<op>.py`, holds the cases, their checks and their targets;
`_timing.py` measures them, `command.py` runs them, and `table.py`, `view.py` and `figures.py` show what came
out.

Each file of an op also runs alone (`python benchmarks/bench_dropout.py --quick`). A new one is found by its
name. An installed fastreg has all of it as `fastreg.benchmarks`.
"""

import importlib
import pkgutil
from types import ModuleType


def ops() -> list[str]:
    """The ops that have a benchmark, by name. The example, which is there to be copied, is not listed."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    found = {name.removeprefix("bench_") for name in names if name.startswith("bench_")}
    return sorted(found - {"example"})


def load(op: str) -> ModuleType:
    """The module of one op: `cases(scale)` gives its cases at "full", "quick" or "tiny" scale."""
    return importlib.import_module(f"{__name__}.bench_{op}")
