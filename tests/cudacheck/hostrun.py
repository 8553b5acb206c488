"""A library that nvcc built, with its own launch code, on the interpreter in `ptxrun/`.

`build_library` compiles `.cu` files into a shared library that carries its PTX and calls the CUDA runtime;
`build_shim` makes the stand-in for that runtime, from `cudart_shim.c`; `Runtime` takes the calls of the
stand-in: a library that is loaded registers its PTX here, `<<<grid, block>>>` executes it.
"""

import ctypes as C
import pathlib
import subprocess

import numpy as np

from . import ptxrun
from .ptxrun.memory import BASE, BY_DEVICE, INIT

SHIM = pathlib.Path(__file__).with_name("cudart_shim.c")
SONAME = "libcudacheck_runtime.so"


def build_shim(out):
    """Compile the stand-in for the CUDA runtime into the file `out`.

    torch may have loaded the real runtime, whose functions have the same names. Hence a soname of its own, or
    the loader would take the real one for the same library, and -Bsymbolic, so that calls within the
    stand-in stay within.
    """
    link = f"-Wl,-Bsymbolic,-soname,{SONAME}"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-w", link, str(SHIM), "-o", str(out)],
        check=True,
    )


def build_library(sources, out, shim, flags=(), arch="80"):
    """Compile `.cu` files into the library `out`, linked with the stand-in; PTX is embedded, uncompressed.
    Gives what nvcc prints to stderr.
    """
    done = subprocess.run(
        [
            "nvcc", "-shared", "-Xcompiler", "-fPIC", "-cudart", "none", "--no-compress", "-std=c++17", "-O3",
            "-lineinfo", "-gencode", f"arch=compute_{arch},code=compute_{arch}", "-Xlinker", str(shim),
            *flags, *map(str, sources), "-o", str(out),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"nvcc gives {done.returncode}:\n{done.stderr}")
    return done.stderr


class Runtime:
    """What stands behind the stand-in at `shim`: the modules of the libraries that were loaded, a device, and
    a report of each launch. An error that a launch raised is kept in `error`; the library itself only gets
    a code.
    """

    def __init__(self, shim, **launch_options):
        self.shim = C.CDLL(str(shim), mode=C.RTLD_GLOBAL)
        self.device, self.modules, self.reports, self.options = ptxrun.Device(), [], [], launch_options
        module_hook = C.CFUNCTYPE(None, C.c_void_p, C.c_size_t)
        launch_hook = C.CFUNCTYPE(C.c_int, C.c_char_p, C.POINTER(C.c_uint), C.POINTER(C.c_void_p), C.c_size_t)
        memory_hook = C.CFUNCTYPE(C.c_uint64, C.c_int, C.c_uint64, C.c_uint64, C.c_uint64)
        self.hooks = (module_hook(self._module), launch_hook(self._launch), memory_hook(self._memory))
        self.shim.shim_hooks(*self.hooks)
        self.error = None

    def _module(self, image, size):
        for part in C.string_at(image, size).split(b"\0"):
            begin = part.find(b".version ")
            if begin >= 0:
                self.modules.append(ptxrun.parse(part[begin:].decode(errors="replace")))

    def _launch(self, name, dims, args, shared):
        try:
            name = name.decode()
            module = next(module for module in self.modules if name in module.functions)
            params = module.functions[name].params
            raw = [C.string_at(args[i], param.size) for i, param in enumerate(params)]
            grid, block = tuple(dims[0:3]), tuple(dims[3:6])
            report = self.device.launch(module, name, grid, block, raw, shared=shared, **self.options)
            self.reports.append(report)
            return 0
        except BaseException as error:  # nothing may be raised through the C frames that called this
            self.error = error
            return 999

    def _memory(self, call, a, b, size):
        """The calls are numbered as in cudart_shim.c: malloc, free, copies to, from, within, memset."""
        memory = self.device.mem
        if call == 0:
            return self.device.empty(size, np.uint8).addr
        if call == 3:
            C.memmove(a, memory.data[b - BASE : b - BASE + size].ctypes.data, size)
        if call in (2, 4, 5):
            at = slice(a - BASE, a - BASE + size)
            if call == 2:
                memory.data[at] = np.frombuffer(C.string_at(b, size), np.uint8)
            elif call == 4:
                memory.data[at] = memory.data[b - BASE : b - BASE + size].copy()
            else:
                memory.data[at] = b & 255
            memory.state[at] |= INIT | BY_DEVICE
        return 0
