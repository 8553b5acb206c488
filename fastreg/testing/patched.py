"""A plugin of pytest that runs a project's tests with fastreg in the place of torch.

    pytest -p fastreg.testing.patched --fastreg-patch --fastreg-convert --fastreg-optim

--fastreg-patch: `fastreg.patch()` for the whole run, before anything of the project is imported.
--fastreg-convert: every module is converted, as by `fastreg.convert`, when it is built.
--fastreg-convert-keep-class: the same with `keep_class=True`, for projects that look up exact classes.
--fastreg-optim: `torch.optim.SGD` and `AdamW` are those of `fastreg.optim`, under every name.

Without an option nothing changes. A line at the beginning says what is exchanged, and one at the end how
often fastreg ran, so that a run in which it did nothing cannot pass for a test of it. Calls inside of
compiled code are not counted.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.compiler import is_compiling
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import _patch, nn, optim
from .._exchange import ExchangedName

__all__: tuple[str, ...] = ()  # pytest finds its hooks by name; nobody else imports anything

OPTIONS = ("patch", "convert", "convert_keep_class", "optim")
OPTIMIZERS = {"SGD": optim.SGD, "AdamW": optim.AdamW}


class Exchange:
    """What one run exchanges, and what came of it.

    Attributes:
        options: those of `OPTIONS` that were asked for.
        counts: how often something of ours ran, by what it is called in the summary.
    """

    def __init__(self, options: tuple[str, ...]) -> None:
        self.options = options
        self._keep_class = "convert_keep_class" in options
        self.counts: Counter[str] = Counter()
        self._undo: list[Callable[[], Any]] = []
        for option in options:
            getattr(self, f"_{option}")()

    def undo(self) -> None:
        """Let torch be as it was before."""
        while self._undo:
            self._undo.pop()()

    def _patch(self) -> None:
        def tell(name: str, is_ours: bool) -> None:
            self.counts["patched calls"] += is_ours
            self.counts["of these handed on to torch"] += not is_ours

        _patch.watch(tell)
        _patch.patch()
        self._undo += [lambda: _patch.watch(None), _patch.unpatch]

    def _convert_keep_class(self) -> None:
        if "convert" not in self.options:
            self._convert()

    def _convert(self) -> None:
        """A module of torch's own classes is converted at the end of its constructor. One that fastreg knows
        by the name of its class, as timm's, is converted when it becomes part of another, because its class
        may not have been imported yet.
        """

        def registered(parent: Any, name: str, module: torch.nn.Module | None) -> None:
            if module is not None and not module._modules:
                self._convert_one(module)

        for name in nn.__all__:
            kind = getattr(torch.nn, name, None)
            if kind is not None:
                self._convert_when_built(kind)
        self._undo.append(register_module_module_registration_hook(registered).remove)
        self._undo.append(lambda: nn.watch(None))
        nn.watch(lambda: self.counts.update(["calls of converted modules"]))

    def _convert_when_built(self, kind: type[torch.nn.Module]) -> None:
        build: Any = kind.__init__

        @functools.wraps(build)
        def build_converted(module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
            build(module, *args, **kwargs)
            if type(module) is kind:
                self._convert_one(module)

        # Taken from the class again, an inherited constructor is inherited as before.
        own = "__init__" in vars(kind)
        setattr(kind, "__init__", build_converted)  # noqa: B010  # a type checker knows no exchange of it
        undo = functools.partial(setattr, kind, "__init__", build) if own else None
        self._undo.append(undo or functools.partial(delattr, kind, "__init__"))

    def _convert_one(self, module: torch.nn.Module) -> None:
        if is_compiling():  # where a class cannot be changed
            return
        before = type(module), len(vars(module))
        _patch.convert(module, keep_class=self._keep_class)
        self.counts["modules converted"] += (type(module), len(vars(module))) != before

    def _optim(self) -> None:
        def stepped(optimizer: Any, *_: Any) -> None:
            for name, kind in OPTIMIZERS.items():
                if isinstance(optimizer, kind) and not is_compiling():
                    self.counts[f"steps of {name}"] += 1

        self._undo.append(register_optimizer_step_post_hook(stepped).remove)
        for name, kind in OPTIMIZERS.items():
            exchanged = ExchangedName(getattr(torch.optim, name), kind)
            exchanged.exchange(True)
            self._undo.append(functools.partial(exchanged.exchange, False))

    def summary(self) -> str:
        """What ran, in one line."""
        ours = {name: count for name, count in self.counts.items() if count}
        calls = ours.get("patched calls", 0) - ours.get("of these handed on to torch", 0)
        others = ("calls of converted modules", *(f"steps of {name}" for name in OPTIMIZERS))
        if calls <= 0 and not any(map(ours.get, others)):
            return "fastreg ran nowhere: these tests say nothing about it"
        return "fastreg: " + ", ".join(f"{name} {count:,}" for name, count in ours.items())


_running: list[Exchange] = []  # at most one in a process


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options."""
    group = parser.getgroup("fastreg")
    for option, does in zip(
        OPTIONS,
        (
            "put fastreg's functions under torch.nn.functional",
            "convert every module when it is built",
            "convert every module, and let it keep its class",
            "let SGD and AdamW of torch.optim be those of fastreg.optim",
        ),
        strict=True,
    ):
        name = f"--fastreg-{option.replace('_', '-')}"
        group.addoption(name, action="store_true", default=False, help=does)


def _begin(options: Any) -> None:
    chosen = tuple(option for option in OPTIONS if getattr(options, f"fastreg_{option}", False))
    if chosen and not _running:
        _running.append(Exchange(chosen))


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Begin before a conftest.py, and with it the project, is imported."""
    _begin(early_config.known_args_namespace)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """A worker of pytest-xdist learns of the plugin only now, still before it collects tests."""
    _begin(config.option)


def pytest_report_header() -> str | None:
    """What is exchanged."""
    return f"fastreg: {', '.join(_running[0].options)}" if _running else None


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add what a worker of pytest-xdist has counted."""
    if _running:
        _running[0].counts.update(getattr(node, "workeroutput", {}).get("fastreg", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the counts of a worker to the process that reports."""
    output = getattr(session.config, "workeroutput", None)
    if _running and output is not None:
        output["fastreg"] = dict(_running[0].counts)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How often fastreg ran."""
    if _running:
        terminalreporter.write_line(_running[0].summary())


def pytest_unconfigure() -> None:
    """Undo all of it."""
    if _running:
        _running.pop().undo()
