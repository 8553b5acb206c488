"""Building, installing and loading: one wheel runs on two versions of torch, and what is missing is said in
one sentence.
"""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile

import helpers
import pytest
import torch
from cuda_machine import needs_nvcc
from helpers import ROOT, cmake, tool
from packaging.requirements import Requirement

import fastreg as fr
from fastreg import _distribution

BUILD_TORCH = "2.13.0"
OTHER_TORCH = "2.14.1" if torch.__version__.startswith(BUILD_TORCH) else BUILD_TORCH

# pip compiles every file of torch to bytecode, of which a test reads few, and takes longer over that than
# over unpacking.
NO_BYTECODE = {"PIP_COMPILE": "0"}

# Every op once, forward and backward, against numbers that do not depend on the build.
SMOKE = """
import torch, fastreg as fr
x = torch.randn(3, 1003, requires_grad=True)
y, mask = fr.dropout_with_mask(x, 0.3, seed=7)
kept = fr.unpack_mask(mask, x.shape)
assert torch.equal(y, torch.where(kept, x * (1 / 0.7), 0)) and int(kept.sum()) == 2075, int(kept.sum())
y.sum().backward()
assert torch.equal(x.grad, torch.where(kept, torch.tensor(1 / 0.7), 0))
t = torch.arange(3)
loss, theirs = (f(x, t, label_smoothing=0.1) for f in (fr.cross_entropy, torch.nn.functional.cross_entropy))
torch.testing.assert_close(loss, theirs)
(gradient,) = torch.autograd.grad(loss, x)
torch.testing.assert_close(gradient, torch.autograd.grad(theirs, x)[0])
w = torch.nn.Parameter(torch.tensor([1.0, -1.0, 0.01]))
w.grad = torch.zeros(3)
fr.optim.SGD([w], lr=0.5, momentum=0.9, l1=0.1, l1_mode="proximal").step()
torch.testing.assert_close(w.detach(), torch.tensor([0.95, -0.95, 0.0]))
stepped = fr.fgsm_step(torch.tensor([0.5, 0.99]), torch.tensor([-2.0, 3.0]), 0.1, 0, 1)
torch.testing.assert_close(stepped, torch.tensor([0.4, 1.0]))
compiled = torch.compile(lambda x: fr.dropout(x, 0.5), fullgraph=True, backend="aot_eager")
assert compiled(x).shape == x.shape
print(torch.__version__, fr._C.build_info()["built_with_torch"])
"""


def run(*command, **kwargs):
    """Run a command outside the checkout, where `import fastreg` cannot find the source tree; gives what it
    prints.
    """
    return helpers.run(*command, **{"cwd": "/", "timeout": 1800, **kwargs})


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, built by `python -m build --sdist` from what git knows of the tree."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    if not any(files):
        pytest.skip("no git checkout to build from")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, source)
    return next(folder.glob("torch_fastreg-*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel, built once, from the source distribution, in isolation as pip does unasked. To save time:
    with the smallest torch, which is one without CUDA.
    """
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "constraints.txt").write_text(f"torch=={BUILD_TORCH}\n")
    # Which of the two pip asks for what it builds with depends on its version.
    constrained = dict.fromkeys(("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"), str(folder / "constraints.txt"))
    # The kernels do not see torch. ccache takes them from the checkout's build if paths are relative to the
    # folder in which pip unpacks, and if the flags stand in the order that the same CMake gives them.
    path = f"{pathlib.Path(cmake()).parent}:{os.environ['PATH']}"
    cached = {"CCACHE_BASEDIR": tempfile.gettempdir(), "PATH": path}
    # The largest process of the build is the compiler of the C++ autograd, which ccache never has: it sees a
    # torch in a folder that pip has just made.
    measure = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
    kilobytes = run(
        *(sys.executable, "-c", measure),
        *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, sdist),
        env={**os.environ, **constrained, **cached, **NO_BYTECODE},
    )
    (folder / "kilobytes.txt").write_text(kilobytes)
    return next(folder.glob("torch_fastreg-*.whl"))


def read_toml(path):
    """What a file of TOML says."""
    return pytest.importorskip("tomllib", reason="of Python 3.11").loads(path.read_text())


def fresh_python(folder):
    """The Python of a new environment. It has no pip, whose installation takes as long as all the rest."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    return folder / "bin/python"


def pip(python, *arguments, **kwargs):
    run(sys.executable, "-m", "pip", "--python", python, *arguments, "-q", **kwargs)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """An environment with the other torch."""
    folder = tmp_path_factory.mktemp("other")
    python = fresh_python(folder)
    pip(python, "install", f"torch=={OTHER_TORCH}", "numpy", env={**os.environ, **NO_BYTECODE})
    yield python
    shutil.rmtree(folder)  # several GB


@pytest.mark.slow
def test_sdist_has_all_that_a_build_needs_and_no_more(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    sources = {name for name in listed if name.startswith(("csrc/", "cmake/", "fastreg/"))}
    assert len(sources) > 100 and {"pyproject.toml", "CMakeLists.txt", "README.md", *sources} <= names
    assert {"benchmarks/_timing.py", "benchmarks/bench_dropout.py"} <= names
    assert {"lecture/command.py", "lecture/page.css", "lecture/sections/dropout.py"} <= names
    assert not [
        name
        for name in names
        if name.startswith((".venv", "build/", "bench/", "report")) or name.endswith(".so")
    ]


@pytest.mark.slow
def test_the_example_of_an_op_is_not_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert "fastreg/benchmarks/bench_dropout.py" in names
        assert not [name for name in names if "example" in name]
        (module,) = (name for name in names if name.startswith("fastreg/_C."))
        assert b"fgsm_step" in archive.read(module) and b"example" not in archive.read(module)


@pytest.mark.slow
def test_one_wheel_runs_on_this_torch_and_on_another_and_replaces_neither(wheel, other, tmp_path):
    # This environment's torch, but the wheel's fastreg and not the editable one: a fresh environment that
    # borrows the packages.
    here = tmp_path / "here"
    fresh_python(here)
    site = pathlib.Path(
        run(here / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    (site / "borrowed.pth").write_text(str(pathlib.Path(torch.__file__).parent.parent) + "\n")
    for python, version in ((here / "bin/python", torch.__version__), (other, OTHER_TORCH)):
        pip(python, "install", "--ignore-installed", "--no-deps", wheel)
        pip(python, "install", wheel)  # its dependencies are there
        used, built_with = run(python, "-c", SMOKE).split()
        assert used.startswith(version) and built_with.startswith(BUILD_TORCH)
    run(here / "bin/fastreg", "bench", "--tiny", "--ops", "fgsm", "--no-compile", "--out", tmp_path / "bench")
    assert json.loads((tmp_path / "bench/results.json").read_text())["rows"]
    lecture = (
        "from fastreg.lecture import report, sections; print(len(sections.SECTIONS), len(report.style()))"
    )
    assert all(int(number) > 10 for number in run(here / "bin/python", "-c", lecture).split())
    info = json.loads(run(other, "-m", "fastreg", "doctor", "--json"))
    assert info["torch"].startswith(OTHER_TORCH) and info["build"]["torch"].startswith(BUILD_TORCH)


def test_an_editable_install_adds_no_folder_but_the_checkout():
    """The folder above it would make every folder beside the checkout a module."""
    files = importlib.metadata.distribution("torch-fastreg").files or []
    lines = [line for file in files if file.suffix == ".pth" for line in file.read_text().splitlines()]
    if not lines:
        pytest.skip("fastreg is not installed editable")
    assert {line for line in lines if not line.startswith("import ")} <= {_distribution.origin()[0]}


def test_the_torch_of_a_vendor_is_good_enough():
    """pip would replace it by another: NGC's 2.10, for one, counts as an alpha of it."""
    declared = read_toml(ROOT / "pyproject.toml")
    both = [*declared["project"]["dependencies"], *declared["build-system"]["requires"]]
    torches = [requirement for requirement in map(Requirement, both) if requirement.name == "torch"]
    assert len(torches) == 2
    for requirement in torches:
        accepted = [v for v in ("2.9.1", "2.10.0a0+b4e4ee8.nv25.11", "2.15.0") if v in requirement.specifier]
        assert accepted == ["2.10.0a0+b4e4ee8.nv25.11", "2.15.0"]


@pytest.mark.skipif(not importlib.util.find_spec("cibuildwheel"), reason="no cibuildwheel, of Python 3.11")
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_wheels_are_built_for_the_pythons_that_are_promised(machine):
    """Nothing more: no free-threaded one of these versions (cp314t, cp315t) has been tried."""
    promised = re.findall(r"Python :: 3\.(\d+)", (ROOT / "pyproject.toml").read_text())
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CIBW_")}
    ask = (sys.executable, "-m", "cibuildwheel", "--platform", "linux", "--archs", machine)
    found = run(*ask, "--print-build-identifiers", cwd=ROOT, env=clean).split()
    assert found == [f"cp3{minor}-manylinux_{machine}" for minor in promised] and len(promised) > 5


def configure(tmp_path, *options, source=ROOT, **environment):
    """Configure the project with CMake alone; gives (status, all that was printed)."""
    import pybind11

    command = [
        cmake(),
        "-G",
        "Ninja",
        "-S",
        source,
        "-B",
        tmp_path / "b",
        "-DSKBUILD_PROJECT_VERSION=0",
        "-DSKBUILD_PROJECT_VERSION_FULL=0",
        *options,
    ]
    command += [
        f"-DPython_EXECUTABLE={environment.pop('python', sys.executable)}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PATH": path, **environment}, cwd=tmp_path
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_containers_build_what_make_wheel_builds(monkeypatch, tmp_path):
    """cibuildwheel asks tools/wheel.py which torches have a C++ autograd, and has it look at the wheel."""
    config = read_toml(ROOT / "pyproject.toml")["tool"]["cibuildwheel"]
    wheel = tool("wheel")

    def options_in(command, **places):
        for name, place in places.items():
            command = command.replace(f"{{{name}}}", str(place))
        program, *arguments = command.removeprefix("python ").split()
        assert program == str(tmp_path / "tools/wheel.py")
        return arguments

    def headers(version, folder):
        (tmp_path / "torch" / version / "include/torch").mkdir(parents=True)
        return tmp_path / "torch" / version

    arguments = options_in(config["before-build"][-1], project=tmp_path)
    monkeypatch.setattr(wheel, "headers", headers)
    monkeypatch.setattr(sys, "argv", ["wheel.py", *arguments])
    assert wheel.main() == 0
    settings = config["config-settings"]["cmake.args"].replace("{project}", str(tmp_path))
    status, said = configure(tmp_path, settings)
    assert status == 0, said
    built = set(re.findall(r"build (_\w+)\S*: CXX_MODULE_LIBRARY", (tmp_path / "b/build.ninja").read_text()))
    ours = {torch.__version__.split("+")[0], *wheel.TORCHES}
    assert built == {"_C", *(f"_autograd_{'_'.join(version.split('.')[:2])}" for version in ours)}

    repair = config["linux"]["repair-wheel-command"]
    made = (tmp_path / "a.whl", tmp_path / "out")
    arguments = options_in(repair, project=tmp_path, wheel=made[0], dest_dir=made[1])
    looked_at = []
    monkeypatch.setattr(wheel, "repair", lambda built, folder, arch: looked_at.append(built) or built)
    monkeypatch.setattr(
        wheel, "look_at", lambda repaired, options: looked_at.append(options.cpu_only) or ["x"]
    )
    monkeypatch.setattr(sys, "argv", ["wheel.py", *arguments])
    assert wheel.main() == 1 and looked_at == [made[0], True]


CROSS_CXX = shutil.which("aarch64-linux-gnu-g++")


@pytest.mark.slow
@pytest.mark.skipif(not CROSS_CXX, reason="no aarch64-linux-gnu-g++; apt-get install g++-aarch64-linux-gnu")
@pytest.mark.skipif(platform.machine() == "aarch64", reason="only where aarch64 is another architecture")
def test_the_module_for_another_machine(tmp_path):
    """As `make wheel ARCH=aarch64` builds it, with one op: its architecture, name, and what it needs."""
    wheel = tool("wheel")
    settings = ["FASTREG_OLDER_GLIBC=ON", "FASTREG_OPS=sum_of_squares"]
    settings += wheel.for_another_machine("aarch64", tmp_path)
    status, said = configure(tmp_path, *(f"-D{setting}" for setting in settings))
    assert status == 0, said
    run(cmake(), "--build", tmp_path / "b")
    module = tmp_path / "b" / f"_C{wheel.suffix('aarch64')}"
    said = run("readelf", "-hdV", module)
    assert "AArch64" in said and "[libtorch_cpu.so]" in said and "RUNPATH" not in said
    for library, newest in {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}.items():
        found = re.findall(rf"{library}_([\d.]+)", said)
        assert found and max(tuple(map(int, version.split("."))) for version in found) <= newest, library


@pytest.mark.slow
@pytest.mark.skipif("CXX" in os.environ or not shutil.which("g++"), reason="what is tuned is for gcc")
def test_the_largest_job_of_a_build_takes_less_than_a_gigabyte(wheel):
    """It is the C++ autograd, which includes torch's headers. Login nodes end what takes more."""
    kilobytes = int((wheel.parent / "kilobytes.txt").read_text())
    assert 100_000 < kilobytes < 1_000_000


@pytest.mark.slow
def test_two_checkouts_give_the_same_bytes(tmp_path):
    """Of other depth, with torch in another place, without ccache; one op, which is not optimised, stands for
    all, which have the same flags. With nvcc its CUDA kernel too: nvcc names a temporary file in what is
    stripped later.
    """
    with_nvcc = bool(torch.version.cuda and shutil.which("nvcc"))
    # The CUDA of nvcc, which need not be this torch's.
    cuda = re.search(r"release ([\d.]+)", run("nvcc", "--version"))[1] if with_nvcc else None
    options = ["-DFASTREG_OLDER_GLIBC=ON", "-DFASTREG_OPS=sum_of_squares", "-DFASTREG_CUDA_ARCHS=80-real"]
    options += ["-DFASTREG_AUTOGRAD=OFF", f"-DFASTREG_CUDA={'ON' if with_nvcc else 'OFF'}"]
    options += ["-DCMAKE_BUILD_TYPE=None"]
    kernel = "CMakeFiles/cuda_kernels.dir/csrc/sum_of_squares/sum_of_squares_cuda.cu.o"
    made = ["_C", *([kernel] * with_nvcc)]
    outputs, there = [], pathlib.Path(torch.__file__).parent
    for folder in (tmp_path / "one", tmp_path / "another/and/deeper"):
        for part in ("csrc", "cmake"):
            shutil.copytree(ROOT / part, folder / part)
        shutil.copy(ROOT / "CMakeLists.txt", folder)
        # Copies, since gcc follows links; not in the checkout, whose path is cut off by another option.
        site = folder.with_name(f"{folder.name}-site")
        fake_torch_with_cuda(site, cuda, torch.__version__)
        shutil.rmtree(site / "torch/lib")
        (site / "torch/lib").symlink_to(there / "lib")
        shutil.copytree(there / "include", site / "torch/include")
        environment = {"PYTHONPATH": str(site), "CCACHE_DISABLE": "1"}
        status, said = configure(folder, *options, source=folder, **environment)
        assert status == 0, said
        run(cmake(), "--build", folder / "b", "--target", *made, env={**os.environ, **environment})
        files = [next((folder / "b").glob("_C.*")), *([folder / "b" / kernel] * with_nvcc)]
        for file in files:
            run("strip", file)
        outputs.append([file.read_bytes() for file in files])
        assert str(tmp_path).encode() not in b"".join(outputs[-1])
    assert outputs[0] == outputs[1], [x == y for x, y in zip(*outputs, strict=True)]


def fake_torch(folder, version):
    """A module named torch that has a version and nothing else."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch/__init__.py").write_text(f"__version__ = {version!r}\n")
    return {"PYTHONPATH": str(folder)}


def test_building_without_a_compiler_says_so(tmp_path):
    status, printed = configure(tmp_path, CXX="/nonexistent/g++")
    assert status != 0 and "fastreg needs a C++20 compiler" in printed and "apt-get install g++" in printed


def test_building_without_torch_says_so(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('not here')")
    status, printed = configure(tmp_path, PYTHONPATH=str(tmp_path))
    assert status != 0 and "fastreg needs torch >= 2.10" in printed and "pip install 'torch>=2.10'" in printed


def test_building_with_an_old_torch_says_so(tmp_path):
    status, printed = configure(tmp_path, **fake_torch(tmp_path, "2.9.1"))
    assert status != 0 and "found 2.9.1" in printed and "pip install --upgrade" in printed


def fake_torch_with_cuda(folder, cuda, version="2.14.0"):
    """A module named torch that claims to be built with a version of CUDA, with empty libraries."""
    environment = fake_torch(folder, version)
    (folder / "torch/version.py").write_text(f"cuda = {cuda!r}\n")
    (folder / "torch/__init__.py").write_text(f"__version__ = {version!r}\nfrom . import version\n")
    (folder / "torch/lib").mkdir()
    for name in ("torch_cpu", "torch_cuda"):
        (folder / f"torch/lib/lib{name}.so").touch()
    return environment


def test_a_compiler_of_cuda_that_was_named_and_fails_is_an_error(tmp_path):
    """Even where CUDA was not asked for: whoever sets CUDACXX counts on the kernels."""
    broken = tmp_path / "broken-nvcc"
    broken.write_text("#!/bin/sh\necho one line\necho out of luck >&2\nexit 3\n")
    broken.chmod(0o755)
    environment = fake_torch_with_cuda(tmp_path, "13.0")
    options = ("-DFASTREG_AUTOGRAD=OFF",)
    status, printed = configure(tmp_path, *options, CUDACXX=str(broken), **environment)
    assert status != 0 and f"CUDACXX is set, but {broken} does not compile CUDA (out of luck)" in printed
    assert "unset it" in printed
    status, printed = configure(tmp_path, *options, CUDACXX="/nonexistent/nvcc", **environment)
    assert status != 0 and "/nonexistent/nvcc does not compile CUDA" in printed


@needs_nvcc
def test_a_compiler_of_another_cuda_is_a_warning_or_an_error(tmp_path):
    environment = fake_torch_with_cuda(tmp_path, "9.2")
    options = ("-DFASTREG_AUTOGRAD=OFF", "-DCMAKE_BUILD_TYPE=None")  # not optimised: nothing of it runs
    status, printed = configure(tmp_path, *options, **environment)
    assert status == 0 and "CMake Warning" in printed
    assert re.search(r"no CUDA kernels: torch 2\.14\.0 has CUDA 9\.2 and \S*nvcc is of release", printed)
    # What doctor repeats: the sentence has a semicolon, which CMake takes for the end of a definition.
    module = tmp_path / "b/CMakeFiles/_C.dir/csrc/module.cpp.o"
    run(cmake(), "--build", tmp_path / "b", "--target", module.relative_to(tmp_path / "b"))
    assert b"; set CUDACXX to an nvcc 9.x" in module.read_bytes()
    status, printed = configure(tmp_path, "-DFASTREG_CUDA=ON", **environment)
    assert status != 0 and "FASTREG_CUDA=ON, but torch 2.14.0 has CUDA 9.2" in printed
    assert "set CUDACXX to an nvcc 9.x" in printed


@pytest.mark.skipif(not shutil.which("script"), reason="no script, of util-linux")
def test_a_build_without_the_kernels_that_were_expected_says_so_on_the_terminal(tmp_path):
    """pip shows nothing of a build that does not fail."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho GPU 0\n")
    smi.chmod(0o755)
    environment = fake_torch_with_cuda(tmp_path, "9.2") | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    program = """
import json, pathlib, sys, test_packaging
folder, environment, *options = json.loads(sys.argv[1])
options.append("-DFASTREG_AUTOGRAD=OFF")
status, said = test_packaging.configure(pathlib.Path(folder), *options, **environment)
pathlib.Path(folder, "status").write_text(str(status))
"""

    def on_a_terminal(*options):
        told = json.dumps([str(tmp_path), environment, *options])
        command = shlex.join([sys.executable, "-c", program, told])
        return run(
            "script", "-qec", command, os.devnull, env={**os.environ, "PYTHONPATH": str(ROOT / "tests")}
        )

    expected = "WARNING: fastreg is built without CUDA kernels: "
    said = on_a_terminal("-DSKBUILD=2")
    assert (tmp_path / "status").read_text() == "0" and said.count(expected) == 1, said
    # Who has asked for none, and who calls CMake and sees what it says, is told nothing.
    shutil.rmtree(tmp_path / "b")
    assert expected not in on_a_terminal("-DSKBUILD=2", "-DFASTREG_CUDA=OFF")
    assert expected not in on_a_terminal("-USKBUILD", "-DFASTREG_CUDA=AUTO")


@needs_nvcc
def test_a_toolkit_12_makes_one_module_for_torch_with_cuda_12_and_with_cuda_13(tmp_path):
    """This compiler under the number of an older one: which module is built is decided by that."""
    toolkit = tmp_path / "cuda-12.8/bin"
    toolkit.mkdir(parents=True)
    (toolkit / "nvcc").write_text(
        '#!/bin/sh\n[ "$*" = --version ] && echo Cuda compilation tools, release 12.8, V12.8.93 && exit\n'
        f'exec {shutil.which("nvcc")} "$@"\n'
    )
    (toolkit / "nvcc").chmod(0o755)
    options = ("-DFASTREG_AUTOGRAD=OFF", "-DFASTREG_CUDA=ON")
    environment = fake_torch_with_cuda(tmp_path, "13.0") | {"CUDA12_HOME": str(toolkit.parent)}
    status, printed = configure(tmp_path, *options, **environment)
    assert status == 0, printed
    built = (tmp_path / "b/build.ninja").read_text()
    assert "_C_cuda12." in built and "_C_cuda13" not in built
    assert f"{toolkit / 'nvcc'} " in (tmp_path / "b/CMakeFiles/rules.ninja").read_text()
    (tmp_path / "torch/version.py").write_text("cuda = '11.8'\n")
    status, printed = configure(tmp_path, *options, **environment)
    assert status != 0 and "torch 2.14.0 has CUDA 11.8" in printed and "is of release 12.8" in printed


def architectures(tmp_path, *commands, compiler="false"):
    """(status, what CMake prints) of commands with the functions of cmake/cuda_archs.cmake."""
    script = tmp_path / "script.cmake"
    include = f'include("{ROOT}/cmake/cuda_archs.cmake")\nset(CMAKE_CUDA_COMPILER "{compiler}")\n'
    script.write_text(include + "\n".join(commands) + '\nmessage("got <${got}>")\n')
    done = subprocess.run([cmake(), "-P", script], capture_output=True, text=True)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("8.0;9.0+PTX", "80-real;90"),
        ("8.0 9.0a 12.0f+PTX", "80-real;90a-real;120f"),
        ("Hopper", "90"),
        ("Volta+Tegra Ampere", "72-real;80-real;86"),
        ("Ampere;Hopper+PTX", "80-real;86;90"),
        ("Blackwell+Tegra", "110-real"),
        ("", ""),
    ],
)
def test_architectures_as_torch_lists_them(listed, expected, tmp_path):
    status, printed = architectures(tmp_path, f'cuda_archs_of(got "{listed}")')
    assert status == 0 and printed == f"got <{expected}>"


def test_an_architecture_that_nobody_knows_is_refused(tmp_path):
    status, printed = architectures(tmp_path, 'cuda_archs_of(got "8.0 Fermat")')
    assert status != 0 and "got Fermat" in printed and "TORCH_CUDA_ARCH_LIST" in printed


def test_architectures_that_the_compiler_cannot_build_are_left_out(tmp_path):
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho compute_80\necho compute_100\n")
    compiler.chmod(0o755)
    ask = 'cuda_archs_known(got "70-real;80-real;100a-real;90")'
    status, printed = architectures(tmp_path, ask, compiler=compiler)
    assert status == 0 and printed.endswith("got <80-real;100a-real>")
    assert printed.count("CMake Warning") == 1 and "cannot build for 70-real;90" in printed
    status, printed = architectures(tmp_path, 'cuda_archs_known(got "70-real")', compiler=compiler)
    assert status != 0 and "none of the architectures 70-real" in printed


@needs_nvcc
def test_the_gpus_of_a_machine_without_any_are_no_architectures(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    cuda = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    environment = fake_torch_with_cuda(tmp_path, re.search(r"release ([\d.]+)", cuda)[1])
    options = ("-DFASTREG_AUTOGRAD=OFF", "-DFASTREG_CUDA_ARCHS=native")
    status, printed = configure(tmp_path, *options, **environment)
    assert status != 0 and "native asks for the GPUs of this machine" in printed


def test_doctor_requires(monkeypatch, capsys):
    from fastreg.cli import doctor

    info = doctor.collect()
    info["cuda"]["why_not"] = "there is no GPU"
    info["autograd"].update(in_use="cpp")
    monkeypatch.setattr(doctor, "collect", lambda: info)
    assert doctor.main(["--require", "cpp"]) == 0 and capsys.readouterr() == ("", "")
    assert doctor.main(["--require", "cuda,cpp"]) == 1
    assert capsys.readouterr() == ("", "fastreg doctor: cuda is required: there is no GPU\n")
    info["autograd"].update(in_use="python", why_not="it was not built")
    assert doctor.main(["--require", "cuda,cpp", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == info and len(err.splitlines()) == 2 and "cpp is required: it was" in err
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--require", "gpu"])
    assert "must list cuda, cpp, demo" in capsys.readouterr().err


def import_error(environment, code="import fastreg"):
    """The last line that Python prints when `code` fails."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=120,
    )
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def test_importing_without_torch_says_so(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('not here')")
    assert import_error({"PYTHONPATH": str(tmp_path)}) == (
        "ImportError: fastreg needs torch >= 2.10 and cannot import torch; pip install 'torch>=2.10'"
    )


def test_importing_with_an_old_torch_says_so(tmp_path):
    assert import_error(fake_torch(tmp_path, "2.9.1+cpu")) == (
        "ImportError: fastreg needs torch >= 2.10, got 2.9.1+cpu; pip install --upgrade 'torch>=2.10'"
    )


def test_importing_without_the_compiled_module_says_so():
    hide = "import sys; sys.modules['fastreg._C'] = None; import fastreg"
    line = import_error({}, hide)
    assert (
        "compiled kernels cannot be loaded" in line and "pip install torch-fastreg, or `make build`" in line
    )


def test_an_unknown_cpu_capability_is_refused():
    line = import_error({"FASTREG_CPU_CAPABILITY": "avx9000"})
    assert "FASTREG_CPU_CAPABILITY" in line and "sse2" in line and "avx9000" in line


def runs_on_a_gpu():
    """Whether a kernel of fastreg's does run on a GPU of this machine."""
    if not torch.cuda.is_available():
        return False
    x = torch.ones(2, device="cuda")
    try:
        return fr.fgsm_step(x, x, 0.5).tolist() == [1.5, 1.5]
    except RuntimeError:
        return False


def test_doctor_says_what_is_there():
    printed = run(sys.executable, "-m", "fastreg", "doctor", cwd=ROOT)
    info = json.loads(run(sys.executable, "-m", "fastreg", "doctor", "--json", cwd=ROOT))
    assert torch.__version__ in printed and info["cpu"]["in_use"] in info["cpu"]["instruction_sets"]
    cuda = info["cuda"]
    assert cuda["usable"] is runs_on_a_gpu()
    assert cuda["why_not"] is None if cuda["usable"] else cuda["why_not"] in printed
    forced = info["cpu"]["instruction_sets"][0]
    again = json.loads(
        run(
            sys.executable,
            "-m",
            "fastreg",
            "doctor",
            "--json",
            cwd=ROOT,
            env={**os.environ, "FASTREG_CPU_CAPABILITY": forced},
        )
    )
    assert again["cpu"]["in_use"] == forced == again["cpu"]["forced"]


def test_help_names_the_commands():
    printed = run(sys.executable, "-m", "fastreg", "--help", cwd=ROOT)
    assert "doctor" in printed and "bench" in printed and "demo" in printed


def test_importing_brings_nothing_that_takes_a_second():
    """What torch itself leaves for the first torch.compile, and what only some users have."""
    code = "import sys, torch; before = set(sys.modules); import fastreg; print(*set(sys.modules) - before)"
    brought = set(run(sys.executable, "-c", code).split())
    slow = {
        "torch._dynamo",
        "torch._inductor",
        "sympy",
        "torch.distributed.tensor",
        "transformers",
        "lightning",
    }
    assert not brought & (slow | {"torchvision", "torch.fx.experimental.symbolic_shapes", "PIL"})
    assert "fastreg.optim" in brought
