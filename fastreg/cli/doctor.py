"""`fastreg doctor`: what was built, what is loaded, what this machine can run, and what to do where something
is missing.
"""

import argparse
import importlib.util
import json
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import fastreg

from .. import _distribution

REQUIRABLE = ("cuda", "cpp", "demo")


def _gil() -> str:
    """Whether this Python has a global interpreter lock: "always", or of a free-threaded one "on" or "off".
    A module that does not say that it runs without switches it on.
    """
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "always"
    return "on" if sys._is_gil_enabled() else "off"  # type: ignore[attr-defined]


def collect() -> dict[str, Any]:
    """Everything that the report says, as plain values."""
    build = fastreg._C.build_info()
    optional = {
        name: importlib.util.find_spec(name) is not None for name in ("mlxtend", "matplotlib", "rich", "PIL")
    }
    return {
        "fastreg": build["version"],
        "strangers": _distribution.strangers(),
        "python": platform.python_version(),
        "gil": _gil(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "build": {
            "torch": build["built_with_torch"],
            "stable_abi": build["stable_abi"],
            "compiler": build["compiler"],
            "type": build["build_type"],
        },
        "cpu": {
            "instruction_sets": build["instruction_sets"].split(","),
            "in_use": build["instruction_set"],
            "forced": os.environ.get("FASTREG_CPU_CAPABILITY") or None,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        },
        "autograd": {
            "in_use": "python" if fastreg._registry.fast is None else "cpp",
            "built_with_torch": getattr(fastreg._registry.fast, "torch", None),
            "forced": os.environ.get("FASTREG_AUTOGRAD") or None,
            "why_not": fastreg._registry.why_not_fast,
        },
        "cuda": _cuda(),
        "demo": {
            "ready": all(optional.values()),
            "missing": [name for name, there in optional.items() if not there],
        },
    }


def _cuda() -> dict[str, Any]:
    kernels, reason = fastreg._registry.cuda, fastreg._registry.why_no_cuda
    built = [major for major in (12, 13) if importlib.util.find_spec(f"fastreg._C_cuda{major}")]
    info = kernels.build_info() if kernels else {}
    gpus = []
    if torch.version.cuda and torch.cuda.is_available():
        gpus = [
            f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
            for i in range(torch.cuda.device_count())
        ]
        capabilities = [torch.cuda.get_device_capability(i) for i in range(len(gpus))]
        without = [
            _no_code(name, capability, info["architectures"])
            for name, capability in zip(gpus, capabilities, strict=True)
            if info and not _runs(capability, info["architectures"])
        ]
        reason = reason or next(iter(without), None)
    elif kernels:
        reason = "torch sees no GPU on this machine; look at nvidia-smi"
    return {
        "built": bool(built),
        "loaded": kernels is not None,
        "usable": reason is None,
        "torch_cuda": torch.version.cuda,
        "nvcc": info.get("nvcc"),
        "left_out": fastreg._C.build_info()["no_cuda"] or None,
        "architectures": info.get("architectures", "").split(),
        "gpus": gpus,
        "why_not": reason,
    }


def _no_code(name: str, capability: tuple[int, int], architectures: str) -> str:
    """The sentence that there is no code for a GPU, with the command that builds it."""
    setting = f"export TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]}"
    command = _distribution.rebuild("-Ccmake.define.FASTREG_CUDA=ON")
    return (
        f"{name} cannot run fastreg's kernels, which were built for {architectures}; with an nvcc of CUDA "
        f"{torch.version.cuda} on PATH, rebuild them: {setting}; {command}"
    )


def _runs(capability: tuple[int, int], architectures: str) -> bool:
    """Whether code for these architectures runs on a GPU of this capability.

    Real code runs on its own generation from its own version on, PTX on everything newer.
    """
    for architecture in architectures.split():
        number = int("".join(filter(str.isdigit, architecture)))
        major, minor = divmod(number, 10)
        if architecture.endswith("-real"):
            if capability[0] == major and capability[1] >= minor:
                return True
        elif tuple(capability) >= (major, minor):
            return True
    return False


def _lines(info: dict[str, Any]) -> Iterator[tuple[str, str]]:
    build, cpu, cuda, demo, autograd = (info[name] for name in ("build", "cpu", "cuda", "demo", "autograd"))
    forced = f", forced by FASTREG_CPU_CAPABILITY={cpu['forced']}" if cpu["forced"] else ""
    yes = {True: "yes", False: "no"}
    yield "fastreg", info["fastreg"]
    for stranger in info["strangers"]:
        yield "", stranger
    yield "python", f"{info['python']} on {info['platform']}"
    if info["gil"] != "always":
        yield "", f"free-threaded, its GIL is {info['gil']}"
    yield "torch", f"{info['torch']}, CUDA {cuda['torch_cuda'] or 'none'}"
    yield (
        "built",
        f"{build['type']}, {build['compiler']}, with torch {build['torch']}, for every torch >= "
        f"{build['stable_abi']}",
    )
    yield "cpu", f"{cpu['in_use']} in use{forced}; compiled: {', '.join(cpu['instruction_sets'])}"
    yield "threads", f"{cpu['threads']} of {cpu['cores']} cores (torch.set_num_threads)"
    if autograd["in_use"] == "cpp":
        yield "autograd", f"C++ in use, built with torch {autograd['built_with_torch']}"
    else:
        yield "autograd", "Python in use: same results, slower for small tensors"
        yield "", autograd["why_not"]
    yield "cuda", f"built: {yes[cuda['built']]}, loaded: {yes[cuda['loaded']]}, usable: {yes[cuda['usable']]}"
    if cuda["loaded"]:
        yield "", f"nvcc {cuda['nvcc']}, for {' '.join(cuda['architectures'])}"
    for gpu in cuda["gpus"]:
        yield "", gpu
    if cuda["why_not"]:
        yield "", cuda["why_not"]
    if cuda["left_out"] and not cuda["built"]:
        yield "", f"the build left them out: {cuda['left_out']}"
    yield (
        "demo",
        "ready" if demo["ready"] else f"needs {', '.join(demo['missing'])}; {_distribution.install('demo')}",
    )


def _missing(info: dict[str, Any], part: str) -> str | None:
    """Why a part that is required is not in use, in one sentence; None where it is."""
    if part == "cuda":
        return info["cuda"]["why_not"]
    if part == "cpp":
        return None if info["autograd"]["in_use"] == "cpp" else info["autograd"]["why_not"]
    demo = info["demo"]["missing"]
    return f"{', '.join(demo)} cannot be imported; {_distribution.install('demo')}" if demo else None


def _parts(text: str) -> list[str]:
    """The parts that `--require` lists."""
    parts = text.split(",")
    if unknown := [part for part in parts if part not in REQUIRABLE]:
        raise argparse.ArgumentTypeError(
            f"must list {', '.join(REQUIRABLE)}, separated by commas, got {unknown[0]!r}"
        )
    return parts


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; gives the exit status, 1 where a part that `--require` lists is not in use."""
    parser = argparse.ArgumentParser(prog="fastreg doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument(
        "--require",
        type=_parts,
        metavar="PART,...",
        help="print nothing and exit with 0 if all of these are in use, else one line each and 1: "
        "cuda (kernels and a GPU that runs them), cpp (the C++ autograd), demo (what the demo imports)",
    )
    arguments = parser.parse_args(argv)
    info = collect()
    if arguments.require:
        missing = {part: why for part in arguments.require if (why := _missing(info, part))}
        if arguments.json:
            print(json.dumps(info, indent=2))
        for part, why in missing.items():
            print(f"fastreg doctor: {part} is required: {why}", file=sys.stderr)
        return 1 if missing else 0
    if arguments.json:
        print(json.dumps(info, indent=2))
    else:
        for name, text in _lines(info):
            print(f"{name:<9}{text}")
    return 0
