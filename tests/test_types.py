"""Types: every public name is annotated, a type checker takes typical code, and it refuses wrong code.

mypy reads `tests/types/good.py` and `tests/types/bad.py` with the options of pyproject.toml, as it would read
a user's files; `make lint` checks the package itself.
"""

import importlib
import inspect
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import fastreg as fr

ROOT = Path(__file__).parents[1]
INTEGRATIONS = sorted(path.stem for path in (ROOT / "fastreg/integrations").glob("[!_]*.py"))


# ------------------------------------------------------------------------------------------------------------
# annotations


def is_ours(value):
    return getattr(value, "__module__", "").split(".")[0] == "fastreg"


def names_of(module):
    return getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])


def public_callables():
    """{name: function, method or class} of all that a user can call by a public name."""
    modules = {"fastreg": fr}
    for name in INTEGRATIONS:
        try:
            modules[f"integrations.{name}"] = importlib.import_module(f"fastreg.integrations.{name}")
        except ImportError:  # the framework is not installed
            continue
    found = {}
    while modules:
        prefix, module = modules.popitem()
        for name in names_of(module):
            value, label = getattr(module, name), f"{prefix}.{name}"
            if isinstance(value, types.ModuleType) and is_ours_module(value):
                modules[label] = value
            elif inspect.isclass(value) and is_ours(value):
                found |= {f"{label}.{key}": method for key, method in methods_of(value)}
            elif callable(value) and is_ours(value):
                found[label] = value
    return found


def is_ours_module(module):
    return module.__name__.startswith("fastreg.")


def methods_of(cls):
    """The methods that a class of ours and its bases of ours define: public ones, its constructor, and what
    calling it does.
    """
    if issubclass(cls, tuple):  # a NamedTuple: its fields are annotated by necessity
        return
    ours = [base for base in cls.__mro__ if base.__module__.startswith("fastreg")]
    for key, value in {key: value for base in reversed(ours) for key, value in vars(base).items()}.items():
        if key.startswith("_") and key not in ("__init__", "__call__"):
            continue
        if isinstance(value, property):
            value = value.fget
        value = getattr(value, "__func__", value)
        if inspect.isfunction(value) and value.__module__.startswith("fastreg"):
            yield key, value


def gaps_of(function):
    """The parameters without annotation, and "return"."""
    signature = inspect.signature(function)
    missing = [
        p.name
        for i, p in enumerate(signature.parameters.values())
        if p.annotation is p.empty and not (i == 0 and p.name in ("self", "cls"))
    ]
    return missing + ["return"] * (signature.return_annotation is signature.empty)


CALLABLES = public_callables()


def test_the_walk_finds_every_kind_of_name():
    kinds = (
        "fastreg.fgsm",
        "fastreg.EarlyStopping.step",
        "fastreg.nn.Dropout.forward",
        "fastreg.optim.SGD.step",
    )
    kinds += ("fastreg.augment.functional.rotate", "fastreg.FreeAdversarial.__call__", "fastreg.patched")
    assert not set(kinds) - CALLABLES.keys()


@pytest.mark.parametrize("name", sorted(CALLABLES))
def test_public_functions_and_methods_are_annotated(name):
    gaps = gaps_of(CALLABLES[name])
    assert not gaps, f"{name}: no annotation of {', '.join(gaps)}"


def test_the_package_says_that_it_is_typed():
    assert (Path(fr.__file__).parent / "py.typed").is_file()


# ------------------------------------------------------------------------------------------------------------
# a user's files

GOOD, BAD = ROOT / "tests/types/good.py", ROOT / "tests/types/bad.py"


@pytest.fixture(scope="module")
def found():
    """{file: {line: messages}} of mypy's errors in the two files; `make lint` shows those in the package."""
    pytest.importorskip("mypy", reason="mypy is not installed; pip install '.[test]'")
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml"]
    command += ["--python-executable", sys.executable, "--no-error-summary", "--no-pretty"]
    done = subprocess.run([*command, str(GOOD), str(BAD)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stderr, done.stdout + done.stderr
    errors = {GOOD: {}, BAD: {}}
    for line in done.stdout.splitlines():
        match = re.match(r"(.*):(\d+): error: (.*)", line)
        if match and ROOT / match[1] in errors:
            errors[ROOT / match[1]].setdefault(int(match[2]), []).append(match[3])
    return errors


def test_typical_code_is_taken(found):
    assert not found[GOOD]


def test_wrong_code_is_refused(found):
    lines = BAD.read_text().splitlines()
    marked = {number for number, line in enumerate(lines, 1) if line.endswith("# error")}
    assert len(marked) > 30
    refused = found[BAD]
    assert {number: refused[number] for number in refused.keys() - marked} == {}
    assert {number: lines[number - 1] for number in marked - refused.keys()} == {}
