"""CUDA kernels without a GPU: the compiled kernels and their own launch code, executed on the CPU, for
tests/test_cuda_*.py.

Two ways, both from the very `csrc/*/*_cuda.cu`:

- `interpreted(...)`: nvcc compiles them to PTX, the interpreter in tests/cudacheck executes it, watches every
  access and counts the traffic. Without nvcc these tests are skipped and say so.
- `hosted_library(...)`: the host's compiler compiles them, every CUDA thread a fiber, and the glue of
  `csrc/*/*_op.cpp` beside them, with sanitizers; the operators come out as `torch.ops.fastreg_cudahost`,
  which take CPU tensors.

A launcher takes its arguments as a C++ struct. `structure(...)` declares the same in ctypes, and
tests/test_cuda_structures.py compares each with what the compiler makes of the C++ header.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from cudacheck import hostrun, ptxrun
from helpers import DTYPES, ROOT, own_flags

CSRC = ROOT / "csrc"
OPS = sorted(path.parent.name for path in CSRC.glob("*/*_cuda.cu"))  # that have CUDA kernels
CUDACHECK = Path(__file__).with_name("cudacheck")
TORCH = Path(torch.__file__).parent
SCHEDULES = ("min-pc", "serial", "serial-reverse", "random")  # a missing barrier shows in one of them
CACHE = Path(tempfile.gettempdir()) / f"fastreg-cuda-tests-{os.getuid()}"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


# ---- the arguments of the launchers, as in the headers of csrc


STRUCTURES = {}  # every structure that the tests declare, by its name in C++


def structure(name, fields, base=ctypes.Structure, **more_types):
    """A C++ struct of csrc in ctypes, from lines of "type name, name, ..."; it inherits from `base`."""
    types = {
        "double": ctypes.c_double,
        "int64": ctypes.c_int64,
        "uint64": ctypes.c_uint64,
        "int": ctypes.c_int,
        "bool": ctypes.c_bool,
        "pointer": ctypes.c_void_p,
        "dims": ctypes.c_int64 * 16,
        **STRUCTURES,
        **more_types,
    }
    pairs = []
    for line in fields.strip().splitlines():
        kind, names = line.strip().split(" ", 1)
        pairs += [(field.strip(), types[kind]) for field in names.split(",")]
    assert name not in STRUCTURES, f"{name} is declared twice; import it from where it was declared"
    STRUCTURES[name] = type(name, (base,), {"_fields_": pairs})
    return STRUCTURES[name]


Layout = structure("Layout", "int64 numel\nint dims\nbool contiguous\ndims size, stride")
Seed = structure("Seed", "uint64 value\npointer at")


def layout_of(tensor):
    """The Layout of a tensor, no dimensions merged."""
    return Layout(
        tensor.numel(),
        tensor.dim(),
        tensor.is_contiguous() or tensor.numel() == 0,
        (ctypes.c_int64 * 16)(*tensor.shape),
        (ctypes.c_int64 * 16)(*tensor.stride()),
    )


def seed_at(machine, tensor):
    """A seed in the memory of the machine."""
    return Seed(0, machine.put(tensor, "seed").at)


def dtype_number(dtype):
    return DTYPES.index(dtype)


# ---- built once, whatever test process asks first


def built(name, inputs, build):
    """The file `name`, made by build(path) where no earlier test run made it of the same inputs."""
    digest = hashlib.sha256()
    for path in sorted(inputs):
        digest.update(path.name.encode() + path.read_bytes())
    CACHE.mkdir(mode=0o700, exist_ok=True)
    target = CACHE / f"{digest.hexdigest()[:16]}-{name}"
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.with_suffix(".partial")
            build(partial)
            partial.rename(target)
    return target


def sources(*ops):
    return [path for op in (*ops, "common") for path in (CSRC / op).glob("*") if path.suffix in (".h", ".cu")]


# ---- the PTX


@functools.cache
def _runtime():
    """The one stand-in for the CUDA runtime of this process."""
    return hostrun.Runtime(_shim())


def _shim():
    inputs = [hostrun.SHIM, Path(hostrun.__file__)]
    return built(hostrun.SONAME, inputs, hostrun.build_shim)


def compile_ptx(source, out, debug=False, flags=()):
    """A library of one `*_cuda.cu` with its PTX inside, linked with the interpreter's CUDA runtime. What nvcc
    prints goes into a file beside it, with the suffix .txt.
    """
    _runtime()
    flags = ("--fmad=false", *own_flags(source), *(() if debug else ("-DNDEBUG",)), *flags)
    out.with_suffix(".txt").write_text(hostrun.build_library([source], out, _shim(), flags))


class Interpreted:
    """The kernels and launchers of one op."""

    def __init__(self, library):
        self.runtime = _runtime()
        self.runtime.modules.clear()
        self.library = ctypes.CDLL(str(library), mode=os.RTLD_LOCAL | os.RTLD_DEEPBIND)
        self.modules = list(self.runtime.modules)

    def run(self, launcher, arguments, structure, **options):
        """Call a launcher of csrc, `name(const Arguments&, stream)`; `arguments(machine)` makes the
        structure.
        """
        symbol = f"_ZN7fastreg{len(launcher)}{launcher}ERKNS_{len(structure.__name__)}{structure.__name__}EPv"
        return self.call(symbol, lambda machine: (ctypes.byref(arguments(machine)),), **options)

    def call(self, symbol, arguments, schedule="min-pc", **options):
        """Call a launcher by its symbol, with what `arguments(machine)` gives and a null stream, on a machine
        whose memory holds what that puts there and nothing else. Gives the reports of its kernels, of which
        none may hold an error."""
        runtime = self.runtime
        runtime.modules[:], runtime.reports[:], runtime.error = self.modules, [], None
        runtime.device, runtime.options = ptxrun.Device(), {"schedule": schedule, **options}
        error = getattr(self.library, symbol)(*arguments(Machine(runtime.device)), None)
        if runtime.error:
            raise runtime.error
        assert error == 0, f"{symbol} gives CUDA error {error}"
        for report in runtime.reports:
            assert not report.errors(), report
        return list(runtime.reports)


class Machine:
    """The memory of the interpreted GPU."""

    def __init__(self, device):
        self.device = device

    def put(self, tensor, name, offset=0, readonly=True):
        """A tensor with its storage, `offset` bytes off alignment; writing to it is a fault if `readonly`."""
        storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        buffer = self.device.put(storage.numpy().copy(), name, offset=offset, readonly=readonly)
        return Slot(buffer, tensor, fresh=False)

    def room(self, like, name, offset=0):
        """Memory for a tensor of that form; reading it before it is written is a fault."""
        nbytes = max(like.untyped_storage().nbytes(), 1)
        return Slot(self.device.empty(nbytes, np.uint8, name, offset=offset), like, fresh=True)


class Slot:
    """A tensor in the interpreted memory; `fresh` where it held nothing before the launch."""

    def __init__(self, buffer, like, fresh):
        self.buffer, self.like, self.fresh = buffer, like, fresh
        self.at = buffer.addr + like.storage_offset() * like.element_size()

    def _view(self, storage, dtype):
        like, nbytes = self.like, self.like.untyped_storage().nbytes()
        if not like.numel():
            return like.to(dtype)
        flat = torch.from_numpy(np.ascontiguousarray(storage).reshape(-1)[:nbytes].copy())
        return flat.view(dtype).as_strided(like.shape, like.stride(), like.storage_offset())

    def result(self, changed=None):
        """The tensor as the launch left it. Every element must have been written by it where the memory was
        fresh, or where `changed` says so of a tensor that is changed in place.
        """
        size = self.like.element_size()
        nbytes = self.like.untyped_storage().nbytes() // size * size
        must = self.fresh if changed is None else changed
        written = self.buffer.written() if must else self.buffer.initialised()
        written = np.repeat(written[:nbytes].reshape(-1, size).all(1), size)
        missing = (
            self._view(written.view(np.uint8), torch.uint8 if size == 1 else _UNSIGNED[size]) == 0
        ).sum()
        assert missing == 0, (
            f"{missing} of {self.like.numel()} elements of {self.buffer.name} were never written"
        )
        return self._view(self.buffer.numpy(), self.like.dtype)


_UNSIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def traffic(reports, without=()):
    """Bytes that the launches move in sectors of 32 bytes, before any cache, without the buffers named in
    `without`.
    """
    skipped = ("(params)", *without)
    rows = [
        row for report in reports for (name, _), row in report.traffic.rows.items() if name not in skipped
    ]
    return 32 * sum(row["sectors"] for row in rows)


def interpreted_library(op, debug=False):
    """Also compiled for sm_80, unless `debug`, so that the file beside it says which registers are used."""
    source, name = CSRC / op / f"{op}_cuda.cu", f"{op}-{'debug' if debug else 'ptx'}.so"
    flags = () if debug else ("-gencode=arch=compute_80,code=sm_80", "-Xptxas=-v")
    inputs = [*sources(op), Path(hostrun.__file__), Path(__file__)]
    return built(name, inputs, lambda path: compile_ptx(source, path, debug, flags))


@functools.cache
def interpreted(op, debug=False):
    """The kernels and launchers of an op; with their assertions if `debug`."""
    return Interpreted(interpreted_library(op, debug))


# ---- the host's compiler


SANITIZED = (
    "g++", "-std=c++20", "-O0", "-g", "-fPIC", "-w", "-fsanitize=address,undefined",
    # What is left out makes compiling several times as slow and watches pointers that the address sanitizer
    # watches as well.
    "-fno-sanitize=vptr,null,object-size,pointer-overflow",
    "--param=asan-instrumentation-with-call-threshold=0",
    # Functions that are not inlined compile in two thirds of the time.
    "-ffp-contract=off", "-DNDEBUG", "-DFASTREG_CUDA", "-DFASTREG_CUDAHOST", "-Dalways_inline=unused",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)  # fmt: skip


def hosted_object(op, kind):
    """The CUDA kernels (`kind` is _cuda.cu) or the glue (_op.cpp) of an op, compiled for the CPU."""
    source, header = CSRC / op / f"{op}{kind}", CUDACHECK / "cudahost" / "cudahost.h"
    includes = ["-isystem", TORCH / "include", "-I", header.parent / "shim"]
    return built(
        f"{op}{kind}-torch{torch.__version__}.o",
        [source, header, *sources(op), Path(__file__)],
        lambda path: subprocess.run(
            [*SANITIZED, *includes, "-x", "c++", "-c", source, "-o", path], check=True
        ),
    )


def hosted_library(ops=OPS):
    """The CUDA kernels, launches and glue of `ops`, compiled with sanitizers for the CPU:
    torch.ops.fastreg_cudahost.
    """
    parts = [(op, kind) for op in ops for kind in ("_cuda.cu", "_op.cpp")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(hosted_object, *zip(*parts, strict=True)))
    command = [*SANITIZED, "-shared", *objects, "-L", TORCH / "lib", "-ltorch_cpu"]
    return built("cudahost.so", objects, lambda path: subprocess.run([*command, "-o", path], check=True))


def sanitizers():
    """The environment in which a Python process loads such a library."""
    preload = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1",
    }
