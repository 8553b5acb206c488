"""The operator library `torch.ops.fastreg`: loads the compiled kernels and declares operators.

One place for everything that can be missing (torch, the compiled module, a kernel for a device), so that each
is said in one sentence with its remedy.
"""

import importlib
import importlib.util
import os
import warnings

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

_library = torch.library.Library("fastreg", "DEF")
_declared = {}


def define(schema, plain=None):
    """Declare an operator, `name(arguments) -> results`, before its kernels are loaded; returns nothing.

    `plain` is its definition in plain torch, with the operator's arguments and results: what it does on a
    device without a kernel.
    """
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.split("(")[0]
    _declared[name] = plain
    _library.impl(name, _no_kernel(name, plain), "CompositeExplicitAutograd")


def declared():
    """The names of the operators that have compiled kernels."""
    return tuple(_declared)


def define_kernel(schema, function):
    """Declare an operator whose kernel, on every device, is a Python function; autograd and torch.compile do
    not look into it.
    """
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(schema.split("(")[0], function, "CompositeExplicitAutograd")


def define_composite(schema, function):
    """Declare an operator that is a Python function of other operators, and gives torch.compile one node to
    look at.
    """
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(schema.split("(")[0], function, "CompositeImplicitAutograd")


def load_kernels():
    """Import the extension modules, which register a CPU and, where built, a CUDA kernel for each declared
    operator.
    """
    try:
        from fastreg import _C
    except ImportError as error:
        raise ImportError(
            f"fastreg's compiled kernels cannot be loaded ({error}); install fastreg with `pip install .` "
            "for this Python, or run `make test` in a checkout"
        ) from error
    return _C


def _load_cuda():
    """(the module of the CUDA kernels for this torch or None, why not)."""
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is a CPU build; install a CUDA build of torch"
    name = f"fastreg._C_cuda{torch.version.cuda.split('.')[0]}"
    rebuild = "pip install --no-build-isolation --force-reinstall --no-deps -Ccmake.define.FASTREG_CUDA=ON ."
    if importlib.util.find_spec(name) is None:
        return None, (
            f"fastreg was built without CUDA kernels for CUDA {torch.version.cuda}; with nvcc on PATH, "
            f"rebuild it: {rebuild}"
        )
    try:
        return importlib.import_module(name), None
    except ImportError as error:
        reason = f"fastreg's CUDA kernels, {name}, cannot be loaded ({error}); rebuild them with this torch: {rebuild}"
        warnings.warn(reason, RuntimeWarning, stacklevel=2)
        return None, reason


def _load_autograd():
    """(the C++ fast path of autograd for this torch or None, why not)."""
    wanted = os.environ.get("FASTREG_AUTOGRAD", "")
    if wanted not in ("", "python", "cpp"):
        raise ImportError(
            f"FASTREG_AUTOGRAD must be 'python' or 'cpp', got {wanted!r}; unset it to let fastreg choose"
        )
    if wanted == "python":
        return None, "FASTREG_AUTOGRAD=python asks for Python"
    name = "fastreg._autograd_" + "_".join(torch.__version__.split(".")[:2])
    rebuild = "rebuild it with this torch: pip install --no-build-isolation --force-reinstall --no-deps ."
    if importlib.util.find_spec(name) is None:
        reason = f"fastreg's C++ autograd was not built for torch {torch.__version__}; {rebuild}"
    else:
        try:
            return importlib.import_module(name), None
        except ImportError as error:
            reason = f"fastreg's C++ autograd, {name}, cannot be loaded ({error}); {rebuild}"
        if wanted != "cpp":
            warnings.warn(
                f"{reason}. Until then Python does the same, slower for small tensors",
                RuntimeWarning,
                stacklevel=2,
            )
    if wanted == "cpp":
        raise ImportError(f"FASTREG_AUTOGRAD=cpp: {reason}, or unset FASTREG_AUTOGRAD")
    return None, reason


# With these functions an op tries the usual case first; they give None for every other, and never to
# torch.compile.
fast, why_not_fast = _load_autograd()

# The CUDA kernels.
cuda, why_no_cuda = _load_cuda()


def _no_kernel(name, plain=None):
    def kernel(*args, **kwargs):
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        for tensor in tensors:
            if tensor.layout != torch.strided or tensor.is_quantized:
                raise ValueError(
                    f"{name}: expected dense tensors, got {tensor.layout} of {tensor.dtype}; "
                    f"convert it with .{'dequantize' if tensor.is_quantized else 'to_dense'}()"
                )
        device = min({t.device.type for t in tensors} - {"cpu"}, default="cuda")
        if device == "cuda" and cuda is None:
            raise RuntimeError(
                f"{name}: expected tensors on the CPU, got a tensor on 'cuda'; {why_no_cuda}, or move it "
                f"with .cpu()"
            )
        if plain is not None and len({t.device for t in tensors if t.device.type != "cpu"}) == 1:
            return plain(*args, **kwargs)
        raise RuntimeError(
            f"{name}: expected tensors on one device, the CPU{' or a GPU' if cuda else ''}, got a tensor on "
            f"{device!r}; "
            "move it with .cpu()"
        )

    return kernel
