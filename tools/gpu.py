"""`make gpu`: what only a GPU can show, in at most 8 minutes, without network, with the torch of this Python.

It builds fastreg for this machine's GPU alone, runs `pytest -m cuda`, the same short cases under
compute-sanitizer where it is on PATH, and `fastreg bench --device cuda --quick`. A step that fails does not
stop the others. Everything goes into one folder: what each step wrote, summary.json and summary.md.

The exit status is 0 if all went well, 1 if a step failed or ran out of time, and 2 if a step could not be
run, where there is no GPU for example.

What the build and the tests need beside torch may be missing on a machine without network. Where there is
one, `python tools/gpu.py --pack build/gpu-tools` puts it into a folder that is taken along.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 480
TOOLS = ("cmake", "ninja", "pybind11", "pytest", "hypothesis", "matplotlib", "rich")
# Of an editable install, a finder comes before every path, and would find another build than this one.
SITE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
"""


class Step(NamedTuple):
    name: str
    command: list[str]
    limit: float  # seconds
    why_not: str = ""  # why it cannot be run, if it cannot
    needed: bool = True  # whether leaving it out makes the run incomplete
    reserve: float = 0.0  # seconds that it leaves to the steps after it


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.pack:
        return pack(options.pack)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = environment_of(out, options.tools.resolve())
    before, after = steps_of(out, environment, why_no_gpu())
    results = run(before, out, environment, options.seconds, dry=options.dry_run)
    if results[-1]["status"] == "ok":
        install_python(out / "site")
    spent = sum(result["seconds"] for result in results)
    built = {"ok": "", "dry run": ""}.get(results[-1]["status"], "nothing was built")
    after = [step._replace(why_not=step.why_not or built) for step in after]
    results += run(after, out, environment, options.seconds - spent, dry=options.dry_run)
    write_summary(out, results, machine(options.dry_run))
    print((out / "summary.md").read_text())
    return status_of(results)


def steps_of(out: Path, environment: dict[str, str], no_gpu: str) -> tuple[list[Step], list[Step]]:
    """(those that build, those that need what was built)."""
    python, build, tests = sys.executable, str(out / "build"), str(ROOT / "tests" / "test_cuda_device.py")
    path = environment["PATH"]
    missing = [name for name in ("cmake", "ninja") if shutil.which(name, path=path) is None]
    missing += [] if pybind11_folder(environment) else ["pybind11"]
    cannot_build = no_gpu or (f"no {', '.join(missing)}; see --pack" if missing else "")
    configure = [
        "cmake", "-S", str(ROOT), "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={python}",
        f"-Dpybind11_DIR={pybind11_folder(environment)}", f"-DCMAKE_INSTALL_PREFIX={out / 'site'}",
        "-DSKBUILD_PROJECT_VERSION=0.0.0", "-DSKBUILD_PROJECT_VERSION_FULL=0.0.0", "-DFASTREG_CUDA=ON",
    ]  # fmt: skip
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda", tests]
    no_sanitizer = "" if shutil.which("compute-sanitizer") else "no compute-sanitizer on PATH"
    bench = [python, "-m", "fastreg", "bench", "--device", "cuda", "--quick"]
    bench += ["--out", str(out / "bench"), "--contribute"]
    report = f"--junit-xml={out / 'tests.xml'}"
    before = [
        Step("configure", configure, 90, cannot_build),
        Step("build", ["cmake", "--build", build, "--target", "install"], 240, cannot_build),
    ]
    after = [
        Step("doctor", [python, "-m", "fastreg", "doctor", "--require", "cuda"], 30, no_gpu),
        Step("tests", [*pytest, "-k", "not compute_sanitizer", report], 180, no_gpu, reserve=60),
        Step(
            "sanitizer", [*pytest, "-k", "compute_sanitizer"], 180, no_gpu or no_sanitizer, bool(no_gpu), 130
        ),
        Step("bench", bench, 180, no_gpu),
    ]
    return before, after


def run(
    steps: list[Step],
    out: Path,
    environment: dict[str, str],
    seconds: float,
    dry: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> list[dict[str, Any]]:
    """Run the steps one after another in `seconds` altogether; what each prints goes to <name>.txt in `out`.

    Each result has name, status ("ok", "failed", "out of time", "not run", "dry run"), seconds, and the
    command, its exit status or why it was not run.
    """
    results, end, broken = [], clock() + seconds, ""
    for step in steps:
        begin = clock()
        limit = min(step.limit, end - begin - step.reserve)
        result: dict[str, Any] = {"name": step.name, "command": step.command, "needed": step.needed}
        why_not = step.why_not or (broken if step.name == "build" else "")
        if dry:
            result.update(status="dry run", reason=step.why_not)
        elif why_not or limit < 1:
            result.update(status="not run", reason=why_not or "no time left")
        else:
            print(f"{step.name}, at most {limit:.0f} s ...", flush=True)
            result.update(_one(step, out / f"{step.name}.txt", environment, limit))
            if step.name == "configure" and result["status"] != "ok":
                broken = "it was not configured"
        result["seconds"] = round(clock() - begin, 1)
        results.append(result)
    return results


def _one(step: Step, log: Path, environment: dict[str, str], limit: float) -> dict[str, Any]:
    """A step in a process group of its own, which ends with it."""
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                step.command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=environment, cwd=log.parent, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            file.write(str(error).encode())
            return {"status": "failed", "reason": str(error)}
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            _end_group(process)
            return {"status": "out of time", "reason": f"more than {limit:.0f} s"}
    if code == 0:
        return {"status": "ok", "exit": 0}
    return {"status": "failed", "exit": code, "reason": f"exit status {code}"}


def _end_group(process: subprocess.Popen[bytes], seconds: float = 10.0) -> None:
    """Kill what a step started and wait for its death: SIGKILL returns before the GPU has been let go of."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(
        _alive_in(process.pid, stat) for stat in Path("/proc").glob("[0-9]*/stat")
    ):
        time.sleep(0.01)


def _alive_in(group: int, stat: Path) -> bool:
    try:
        state, _, its_group = stat.read_text().rpartition(") ")[2].split()[:3]
    except OSError:  # It has ended meanwhile.
        return False
    return int(its_group) == group and state not in "ZX"


def status_of(results: list[dict[str, Any]]) -> int:
    """The exit status: 1 for a failure, 2 for a step that is missing, else 0."""
    found = {result["status"] for result in results}
    if found & {"failed", "out of time"}:
        return 1
    return 2 if any(r["status"] == "not run" and r["needed"] for r in results) else 0


def environment_of(out: Path, tools: Path) -> dict[str, str]:
    """Variables of every step: the build of this run is imported, and what was packed is found."""
    environment = dict(os.environ, FASTREG_CUDA_ARCHS="native", OMP_NUM_THREADS="1")
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    paths = [str(out / "site")]
    if tools.is_dir():
        paths.append(str(tools))
        # cmake's wheel has its program in data/bin; that in bin starts with the path of another Python.
        folders = sorted({p.parent for name in ("cmake", "ninja") for p in tools.rglob(f"bin/{name}")})
        folders.sort(key=lambda folder: folder.parent.name != "data")
        environment["PATH"] = os.pathsep.join([*map(str, folders), environment["PATH"]])
    before = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *([before] if before else [])])
    return environment


def pybind11_folder(environment: dict[str, str]) -> str:
    """Where pybind11's CMake files are; nothing where it is not installed."""
    found = importlib.util.find_spec("pybind11")
    places = [Path(found.origin).parent] if found and found.origin else []
    places += [Path(path) / "pybind11" for path in environment["PYTHONPATH"].split(os.pathsep)]
    folders = (place / "share" / "cmake" / "pybind11" for place in places)
    return next((str(folder) for folder in folders if folder.is_dir()), "")


def install_python(site: Path) -> None:
    """The Python files beside the modules that were built, as in an installed package."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "benchmarks", "lecture")
    shutil.copytree(ROOT / "fastreg", site / "fastreg", ignore=ignored, dirs_exist_ok=True)
    for name in ("benchmarks", "lecture"):
        shutil.copytree(ROOT / name, site / "fastreg" / name, dirs_exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE)


def why_no_gpu() -> str:
    """Nothing where there is a GPU and a compiler for it."""
    if shutil.which("nvidia-smi") is None or _said("nvidia-smi", "-L").returncode != 0:
        return "no GPU"
    if shutil.which("nvcc") is None and not os.environ.get("CUDACXX"):
        return "no nvcc on PATH and no CUDACXX"
    return ""


def machine(dry: bool = False) -> dict[str, str]:
    """What the results belong to."""
    code = "import torch; print(torch.__version__, torch.version.cuda)"
    query = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    asked = {
        "torch, its CUDA": (sys.executable, "-c", code),
        "GPU, driver": query,
        "nvcc": ("nvcc", "--version"),
        "commit": ("git", "-C", str(ROOT), "rev-parse", "HEAD"),
    }
    said = {}
    for name, command in {} if dry else asked.items():
        found = shutil.which(command[0])
        lines = _said(*command).stdout.strip().splitlines() if found else []
        said[name] = lines[-1] if lines else "none"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"Python": platform.python_version(), "cores": str(cores), **said}


def _said(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def write_summary(out: Path, results: list[dict[str, Any]], machine: dict[str, str]) -> None:
    """summary.json, and summary.md with the ends of what the failed steps printed."""
    whole = {"machine": machine, "status": status_of(results), "steps": results}
    (out / "summary.json").write_text(json.dumps(whole, indent=1) + "\n")
    verdict = ("everything ran", "something failed", "not everything could be run")[status_of(results)]
    lines = [f"# On a GPU: {verdict}", "", *(f"- {name}: {value}" for name, value in machine.items()), ""]
    lines += ["| step | status | seconds | |", "|---|---|---|---|"]
    lines += [f"| {r['name']} | {r['status']} | {r['seconds']} | {r.get('reason', '')} |" for r in results]
    for result in results:
        log = out / f"{result['name']}.txt"
        lines += ["", f"## {result['name']}", "", f"`{' '.join(result['command'])}`"]
        if log.exists() and result["status"] != "dry run":
            count = 3 if result["status"] == "ok" else 40
            lines += ["", "```", *log.read_text(errors="replace").splitlines()[-count:], "```"]
    (out / "summary.md").write_text("\n".join(lines) + "\n")


def pack(folder: Path) -> int:
    """Install what the steps need beside torch and NumPy into a folder; this needs the network."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), *TOOLS]
    code = subprocess.run(command).returncode
    # The machine's own NumPy fits its torch; the rest is large and is not used.
    for pattern in ("numpy*", "mpl_toolkits", "cmake/data/doc", "cmake/data/bin/c[cpt]*", "**/__pycache__"):
        for path in list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/gpu.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all steps (default: %(default)s)")
    parser.add_argument("--tools", type=Path, default=ROOT / "build" / "gpu-tools", help="what --pack made")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="only install the tools into a folder")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
