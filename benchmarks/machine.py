"""What the numbers were measured on: processor, torch, how fastreg was built, and what else was running."""

import os
import platform
import re
from pathlib import Path

import torch

import fastreg as fr
from fastreg.cli import doctor

# The processor's flags by which kernels are chosen.
FLAGS = r"(sse4_2|avx\w*|fma|f16c|bmi2|amx\w*|asimd\w*|sve\w*|bf16|i8mm|fphp)$"


def describe(device: str, memory_kept: bool) -> dict:
    """The machine as plain values."""
    cpu = _cpuinfo()
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "flags": [
            flag for flag in (cpu.get("flags") or cpu.get("Features") or "").split() if re.match(FLAGS, flag)
        ],
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_before": load(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "build": fr._C.build_info(),
        "autograd": _autograd(),
        "allocator": _allocator(device, memory_kept),
        "preload": os.environ.get("LD_PRELOAD") or None,
        "gpu": _gpu() if device == "cuda" else None,
        "doctor": doctor.collect(),
    }


def load() -> list[float] | None:
    """Processes that wanted a core in the last 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries in /proc/cpuinfo, where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _autograd() -> dict:
    """Which of the two speeds of autograd is on, by looking at the node that a dropout leaves."""
    node = fr.dropout(torch.ones(8, requires_grad=True), 0.5).grad_fn
    python = isinstance(node, torch.autograd.function.BackwardCFunction)
    return {"path": "Python" if python else "C++", "node": type(node).__name__}


def _allocator(device: str, memory_kept: bool) -> str:
    if device == "cuda":
        return "torch's CUDA allocator, which keeps memory"
    return "memory kept by the process (glibc, MALLOC_* set)" if memory_kept else "the system's, as it is"


def _gpu() -> dict:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }
