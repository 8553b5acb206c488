"""To let code that is not ours do something else for a while, and afterwards what it did before.

A function of Python keeps its identity: what is exchanged is its code. Whoever holds it, under whatever name,
in a table, a partial or a pickle, holds what he held before, and torch.compile, whose guards look at the
code, sees the exchange. What is no function of Python is exchanged among the globals of the loaded modules.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

from torch.compiler import is_compiling


class ExchangedCode:
    """A function of a module that can be made to call `replacement`, which takes its arguments by position.

    Attributes:
        original: a function that always does what `function` does while nothing is exchanged.

    Raises:
        RuntimeError: `function` does not have exactly these `arguments`.
    """

    def __init__(
        self,
        function: Any,
        arguments: tuple[str, ...],
        make: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> None:
        code, name = function.__code__, function.__name__
        own = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if own != arguments or code.co_freevars:
            raise RuntimeError(
                f"fastreg knows {function.__module__}.{name} with the arguments {arguments}, here it has "
                f"{own}; upgrade fastreg"
            )
        self.function = function
        self.original = types.FunctionType(code, function.__globals__, name, function.__defaults__)
        for attribute in ("__module__", "__qualname__", "__doc__", "__annotations__", "__kwdefaults__"):
            setattr(self.original, attribute, getattr(function, attribute))
        # The name under which the function's module has the replacement. It stays there, because a call that
        # has begun still looks it up.
        qualified = function.__qualname__.replace(".", "_")  # a method's name is that of many
        self._name, self._make = f"_fastreg_{qualified}", make
        self._replacement = make(self.original)
        listed = ", ".join(arguments)
        taken = ", ".join((*arguments[: code.co_argcount], "*", *arguments[code.co_argcount :]))
        made: dict[str, Any] = {}
        exec(f"def {name}({taken.removesuffix(', *')}):\n    return {self._name}({listed})", made)
        self._codes = code, made[name].__code__.replace(co_filename=__file__)

    @property
    def is_exchanged(self) -> bool:
        """Whether the function calls the replacement now."""
        return self.function.__code__ is self._codes[True]

    def exchange(self, to: bool) -> None:
        """Let the function do the one or the other."""
        if to:
            self.function.__globals__[self._name] = self._replacement
            self.function.__wrapped__ = self.original  # inspect reads its source
        elif hasattr(self.function, "__wrapped__"):
            del self.function.__wrapped__
        self.function.__code__ = self._codes[to]

    def watch(self, tell: Callable[[str, bool], None] | None) -> None:
        """From now on let `tell(name, is_ours)` know of every call while the function is exchanged: once with
        True, and with False where the replacement hands it on to the original. None ends it.
        """
        name, original = self.original.__name__, self.original
        if tell is None:
            self._replacement = self._make(original)
        else:
            handed_on = watched(original, lambda: tell(name, False))
            self._replacement = watched(self._make(handed_on), lambda: tell(name, True))
        if self._name in self.function.__globals__:
            self.function.__globals__[self._name] = self._replacement


def watched(function: Callable[..., Any], tell: Callable[[], None]) -> Callable[..., Any]:
    """`function`, where `tell` is called before each call. Compiled code does not tell."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not is_compiling():
            tell()
        return function(*args, **kwargs)

    return run


class ExchangedName:
    """A value that gives way to another one under every name that it has among the globals of modules."""

    def __init__(self, old: Any, new: Any) -> None:
        self._values = old, new
        self._searched: tuple[int, str] = 0, ""  # how many modules there were, and the last of them
        self._found: list[dict[str, Any]] = []

    def exchange(self, to: bool) -> None:
        """Let the names refer to the one or the other. Modules are searched where there are new ones."""
        modules = len(sys.modules), next(reversed(sys.modules))
        old, new = self._values if to else self._values[::-1]
        if modules != self._searched:
            held = [namespace for namespace in self._found if any(v is old for v in namespace.values())]
            self._searched, self._found = modules, self._search()
            known = set(map(id, self._found))
            self._found += [
                namespace for namespace in held if id(namespace) not in known
            ]  # of unloaded modules
        for namespace in self._found:
            for name in [name for name, value in list(namespace.items()) if value is old]:
                namespace[name] = new

    def _search(self) -> list[dict[str, Any]]:
        found, (old, new) = [], self._values
        for name, module in list(sys.modules.items()):
            namespace = getattr(module, "__dict__", None)
            if type(namespace) is not dict or name.startswith(("torch._C", "fastreg")):
                continue
            # By identity, because to compare other things that a module holds may run any code.
            if any(value is old or value is new for value in list(namespace.values())):
                found.append(namespace)
        return found
