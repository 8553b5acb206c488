"""The operator library `torch.ops.fastreg`: loads the compiled kernels and declares operators.

One place for everything that can be missing (torch, the compiled module, a kernel for a device), so that each is said in one
sentence with its remedy.
"""

import importlib
import importlib.util
import math
import numbers
import os
import warnings

try:
    import torch
except ImportError as error:
    raise ImportError("fastreg needs torch >= 2.10 and cannot import torch; pip install 'torch>=2.10'") from error

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
    raise ImportError(f"fastreg needs torch >= 2.10, got {torch.__version__}; pip install --upgrade 'torch>=2.10'")

from torch.compiler import is_compiling

_library = torch.library.Library("fastreg", "DEF")
_declared = []


def define(schema):
    """Declare an operator, `name(arguments) -> results`, before its kernels are loaded; returns nothing."""
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _declared.append(schema.split("(")[0])


def declared():
    """The names of the operators that have compiled kernels."""
    return tuple(_declared)


def define_kernel(schema, function):
    """Declare an operator whose kernel, on every device, is a Python function; autograd and torch.compile do not look into it."""
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(schema.split("(")[0], function, "CompositeExplicitAutograd")


def define_composite(schema, function):
    """Declare an operator that is a Python function of other operators, and gives torch.compile one node to look at."""
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(schema.split("(")[0], function, "CompositeImplicitAutograd")


def load_kernels():
    """Import the extension modules, which register a CPU and, where built, a CUDA kernel for each declared operator."""
    try:
        from fastreg import _C
    except ImportError as error:
        raise ImportError(
            f"fastreg's compiled kernels cannot be loaded ({error}); install fastreg with `pip install .` "
            "for this Python, or run `make test` in a checkout"
        ) from error
    for name in _declared:
        _library.impl(name, _no_kernel(name), "CompositeExplicitAutograd")
    return _C


def _load_cuda():
    """(the module of the CUDA kernels for this torch or None, why not)."""
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is a CPU build; install a CUDA build of torch"
    name = f"fastreg._C_cuda{torch.version.cuda.split('.')[0]}"
    rebuild = "pip install --no-build-isolation --force-reinstall --no-deps -Ccmake.define.FASTREG_CUDA=ON ."
    if importlib.util.find_spec(name) is None:
        return None, (
            f"fastreg was built without CUDA kernels for CUDA {torch.version.cuda}; with nvcc on PATH, rebuild it: {rebuild}"
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
        raise ImportError(f"FASTREG_AUTOGRAD must be 'python' or 'cpp', got {wanted!r}; unset it to let fastreg choose")
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
            warnings.warn(f"{reason}. Until then Python does the same, slower for small tensors", RuntimeWarning, stacklevel=2)
    if wanted == "cpp":
        raise ImportError(f"FASTREG_AUTOGRAD=cpp: {reason}, or unset FASTREG_AUTOGRAD")
    return None, reason


# With these functions an op tries the usual case first; they give None for every other, and never to torch.compile.
fast, why_not_fast = _load_autograd()

# The CUDA kernels.
cuda, why_no_cuda = _load_cuda()


def _no_kernel(name):
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
                f"{name}: expected tensors on the CPU, got a tensor on 'cuda'; {why_no_cuda}, or move it with .cpu()"
            )
        raise RuntimeError(
            f"{name}: expected tensors on one device, the CPU{' or a GPU' if cuda else ''}, got a tensor on {device!r}; "
            "move it with .cpu()"
        )

    return kernel


def draw_seed(device, generator=None):
    """One int64 seed from `generator` or the device's default generator, shape (1,), on `device` or on the CPU.

    A GPU's generator counts on the host: where nothing records the work for later (a CUDA graph, torch.compile), the seed is made
    of its seed and its count, without a launch.
    """
    if device.type == "cuda" and not is_compiling():
        seed = _count_seed(device, generator)
        if seed is not None:
            return seed
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=device, generator=generator)


def _count_seed(device, generator):
    if not torch.cuda.is_initialized():  # a fake GPU
        return None
    index = torch.cuda.current_device()
    if device.index not in (index, None) or torch.cuda.is_current_stream_capturing():
        return None
    if generator is None:
        generator = torch.cuda.default_generators[index]
    if generator.device != torch.device("cuda", index):  # torch says what is wrong
        return None
    offset = generator.get_offset()
    generator.set_offset(offset + 4)  # a multiple of 4, as torch's kernels leave it
    return torch.tensor([mix_seed(generator.initial_seed(), offset)])


def mix_seed(seed, offset):
    """The int64 that a generator's seed and its offset stand for: splitmix64's `offset`-th number from `seed`.

    Steele, Lea, Flood 2014, Fast splittable pseudorandom number generators.
    """
    z = (seed + 0x9E3779B97F4A7C15 * (offset + 1)) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


def forked_generators():
    """A context at whose end torch's generators, the CPU's and those of GPUs in use, are as they were."""
    # Only where CUDA is up: to read a device's state would start it.
    return torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ())


def check_number(op, name, value, low=-math.inf, high=math.inf):
    """Raise unless `value` is a real number in [low, high]; NaN is in no interval."""
    if not isinstance(value, (int, float, numbers.Real)) or isinstance(value, bool):  # NumPy's scalars are Real
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not low <= value <= high:
        interval = "finite" if (low, high) == (-math.inf, math.inf) else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{op}: {name} must be {interval}, got {value}")


def check_count(op, name, value):
    """Raise unless `value` is an integer of at least 1."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {value}")


def check_choice(op, name, value, choices):
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_tensor(op, name, value):
    """Raise unless `value` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
