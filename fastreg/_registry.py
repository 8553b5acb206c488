"""The operator library `torch.ops.fastreg`: declares operators and loads their compiled kernels.

Whatever may be missing (torch, the compiled module, a kernel for a device) is found out here, and is reported
in one sentence with its remedy.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pathlib
import pkgutil
import re
import sys
import sysconfig
import warnings
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

from . import _distribution

try:
    import torch
except ImportError as error:
    raise ImportError(
        "fastreg needs torch >= 2.10 and cannot import torch; pip install 'torch>=2.10'"
    ) from error

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
    raise ImportError(
        f"fastreg needs torch >= 2.10, got {torch.__version__}; pip install --upgrade 'torch>=2.10'"
    )

from ._checks import ArgumentError

# A reloaded module finds the operators registered, as torch.ops keeps them, and leaves them as they are.
_library: torch.library.Library = globals().get("_library") or torch.library.Library("fastreg", "DEF")
# torch takes a library's operators away when the interpreter begins to end. Functions of atexit may still
# call them then, as they may call torch's own, so that these stay until the process is gone.
for _finalizer in list(getattr(weakref.finalize, "_registry", ())):
    _alive = _finalizer.peek()
    if _alive is not None and _alive[0] is _library:
        _finalizer.atexit = False
# The name of each operator with kernels, and its definition in plain torch.
_declared: dict[str, Callable[..., Any] | None] = globals().get("_declared", {})
_registered: set[str] = globals().get("_registered", set())


def define(schema: str, plain: Callable[..., Any] | None = None) -> None:
    """Declare an operator, `name(arguments) -> results`, whose kernels the compiled modules register.

    `plain` is its definition in plain torch, a function of the operator's arguments that returns its results.
    It is what the operator does on a device without a kernel.
    """
    name = _name_of(schema)
    _declared[name] = plain
    if _register(schema, _no_kernel(name, plain), "CompositeExplicitAutograd"):
        _raise_our_errors(getattr(torch.ops.fastreg, name).default)


def declared() -> tuple[str, ...]:
    """The names of the operators that have compiled kernels."""
    return tuple(_declared)


def plain_definition(name: str) -> Callable[..., Any] | None:
    """The definition in plain torch of a declared operator; None where it has none."""
    return _declared[name]


def define_kernel(schema: str, function: Callable[..., Any]) -> None:
    """Declare an operator whose kernel is one Python function on every device.

    Autograd and torch.compile do not look into it.
    """
    _register(schema, function, "CompositeExplicitAutograd")


def define_composite(schema: str, function: Callable[..., Any]) -> None:
    """Declare an operator that is a Python function of other operators.

    Autograd looks into it. torch.compile sees one node at first, and AOTAutograd then looks into that.
    """
    _register(schema, function, "CompositeImplicitAutograd")


def load_kernels() -> ModuleType:
    """Import the module of the CPU's kernels and return it; `cuda` below holds the other.

    Importing it registers a kernel for each declared operator.
    """
    try:
        from fastreg import _C
    except ImportError as error:
        raise ImportError(
            f"fastreg's compiled kernels cannot be loaded ({_why_not_loaded(error)}); install fastreg for "
            f"this Python: {_distribution.install()}, or `make build` in a checkout"
        ) from error
    return _C


def _why_not_loaded(error: ImportError) -> str:
    """Why `_C` cannot be imported. Python's own message for the module of another Python speaks of a circular
    import.
    """
    wanted = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    folders = [pathlib.Path(folder) for folder in sys.modules["fastreg"].__path__]
    there = sorted(path.name for folder in folders for path in folder.glob("_C.*"))
    if there and wanted not in there:
        return f"this Python loads {wanted}, and {', '.join(there)} is there"
    return str(error)


def _built(prefix: str) -> list[str]:
    """The names of fastreg's modules that begin so and that this Python can load."""
    found = pkgutil.iter_modules(sys.modules["fastreg"].__path__)
    return sorted(module.name for module in found if module.name.startswith(prefix))


def _register(schema: str, function: Callable[..., Any], key: str) -> bool:
    """Register an operator unless it is registered, and say whether it was not."""
    name = _name_of(schema)
    if name in _registered:
        return False
    _registered.add(name)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, key)
    return True


def _raise_our_errors(operator: Any) -> None:
    """Let the kernels of an operator raise ArgumentError, whoever calls it, a compiled graph for example.

    A kernel throws std::invalid_argument. Up to torch 2.14 that becomes a ValueError, and from 2.15 on a
    RuntimeError.
    """
    run = operator._op

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except (ValueError, RuntimeError) as error:
            if _is_refusal(error):
                raise ArgumentError(str(error)) from None
            raise

    operator._op = call


def _is_refusal(error: ValueError | RuntimeError) -> bool:
    """Whether a kernel refused its arguments: by a text "op: ..." that no frame of Python has raised. The
    kernels' other errors, of launches, name CUDA.
    """
    below = error.__traceback__.tb_next if error.__traceback__ else None
    text = str(error)
    return (
        below is None
        and type(error) in (ValueError, RuntimeError)
        and re.match(r"\w+: ", text) is not None
        and "CUDA" not in text
    )


def _name_of(schema: str) -> str:
    return schema.split("(")[0]


def _load_cuda() -> tuple[ModuleType | None, str | None]:
    """(the module of the CUDA kernels for this torch, None), or (None, why there is none).

    Where there is none for torch's major version of CUDA, one for an older version does: it has its own
    runtime within, a newer driver runs older kernels, and streams and memory are the driver's.
    """
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is a CPU build; install a CUDA build of torch"
    major = int(torch.version.cuda.split(".")[0])
    names = (f"fastreg._C_cuda{version}" for version in range(major, 11, -1))
    name = next((name for name in names if importlib.util.find_spec(name)), None)
    rebuild = functools.partial(_distribution.rebuild, "-Ccmake.define.FASTREG_CUDA=ON")
    if name is None:
        newer = [found.removeprefix("_C_cuda") for found in _built("_C_cuda")]
        instead = (
            f" (it has those for CUDA {' and '.join(newer)}, which need a torch of that CUDA)"
            if newer
            else ""
        )
        return None, (
            f"fastreg was built without kernels for CUDA {major}, which torch {torch.__version__} uses"
            f"{instead}; with an nvcc {major}.x on PATH, rebuild it: {rebuild()}"
        )
    try:
        return importlib.import_module(name), None
    except ImportError as error:
        reason = (
            f"fastreg's CUDA kernels, {name}, cannot be loaded ({error}); "
            f"rebuild them with this torch: {rebuild()}"
        )
        warnings.warn(reason, RuntimeWarning, stacklevel=2)
        return None, reason


def _load_autograd() -> tuple[ModuleType | None, str | None]:
    """(the C++ fast path of autograd for this torch, None), or (None, why there is none)."""
    wanted = os.environ.get("FASTREG_AUTOGRAD", "")
    if wanted not in ("", "python", "cpp"):
        raise ImportError(
            f"FASTREG_AUTOGRAD must be 'python' or 'cpp', got {wanted!r}; unset it to let fastreg choose"
        )
    if wanted == "python":
        return None, "FASTREG_AUTOGRAD=python asks for Python"
    minor = torch.__version__.split(".")[:2]
    name = "fastreg._autograd_" + "_".join(minor)
    there = importlib.util.find_spec(name) is not None
    if there:
        try:
            return importlib.import_module(name), None
        except ImportError as error:
            reason = f"fastreg's C++ autograd, {name}, cannot be loaded ({error})"
    else:
        reason = f"fastreg's C++ autograd was not built for torch {torch.__version__}{_which_has_it(minor)}"
    reason += f"; rebuild it with this torch: {_distribution.rebuild()}"
    if wanted == "cpp":
        raise ImportError(f"FASTREG_AUTOGRAD=cpp: {reason}, or unset FASTREG_AUTOGRAD")
    if there:
        warnings.warn(
            f"{reason}. Until then Python does the same, slower for small tensors",
            RuntimeWarning,
            stacklevel=2,
        )
    return None, reason


def _which_has_it(minor: list[str]) -> str:
    """For which torches the C++ autograd is there, and which release of fastreg has it for a later one."""
    built = sorted([int(part) for part in name.split("_")[2:]] for name in _built("_autograd_"))
    if not built:
        return ""
    text = f", only for {', '.join('.'.join(map(str, version)) for version in built)}"
    if _distribution.origin()[0] is None and [int(part) for part in minor] > built[-1]:
        text += (
            f"; a release of fastreg that is later than torch {'.'.join(minor)} has it: "
            f"{_distribution.install()} --upgrade"
        )
    return text


# The functions of this module do the usual case of an op quickly. They return None for every other case, and
# must not be called while torch.compile traces.
fast, why_not_fast = _load_autograd()

# The CUDA kernels.
cuda, why_no_cuda = _load_cuda()


def _no_kernel(name: str, plain: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """What an operator does where no kernel is registered: its plain definition, or an error."""

    def fallback(*args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        for tensor in tensors:
            if tensor.layout != torch.strided or tensor.is_quantized:
                raise ValueError(
                    f"{name}: expected dense tensors, got {tensor.layout} of {tensor.dtype}; "
                    f"convert it with .{'dequantize' if tensor.is_quantized else 'to_dense'}()"
                )
        # A tensor on the CPU may stand beside those of the device: a seed, or one number.
        devices = {tensor.device for tensor in tensors if tensor.device.type != "cpu"}
        device = min((device.type for device in devices), default="cpu")
        if device == "cuda" and cuda is None:
            left_out = load_kernels().build_info()["no_cuda"]
            because = f" (the build left them out: {left_out})" if left_out else ""
            raise RuntimeError(
                f"{name}: expected tensors on the CPU, got a tensor on 'cuda'; {why_no_cuda}{because}, or "
                "move it with .cpu()"
            )
        if plain is not None and device != "cuda" and len(devices) == 1:
            with torch.no_grad():  # derivatives are left to autograd, as with every kernel
                return plain(*args, **kwargs)
        raise RuntimeError(
            f"{name}: expected tensors on one device, the CPU{' or a GPU' if cuda else ''}, got a tensor on "
            f"{device!r}; move it with .cpu()"
        )

    return fallback
