"""A new op is new files and at most three edited lines. The example is copied under another name, the copy is
built, and all of its tests are run.

The copy lies in a scratch tree with the parts of this one that any op needs, so that little is compiled: the
package, csrc/common, the extension module, and the ops that the module itself includes.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import helpers
import pybind11
import pytest
from cuda_machine import ROOT
from helpers import cmake

NAME = "halve"
CXX = os.environ.get("CXX", "g++")
EXAMPLE = re.compile("example(?!s)")
PARTS = ("CMakeLists.txt", "cmake", "fastreg", "csrc/common", "csrc/module.cpp", "csrc/module_cuda.cpp")
TESTS = ("conftest.py", "helpers.py", "forked.py", "cuda_machine.py", "cuda_hosted.py", "test_cuda_hosted.py")
TESTS += ("cudacheck", "mask_statistics.py", "property_cases.py", "test_properties.py")
NATIVE = ("harness.h", "main.cpp")
# Python finds this file by itself when it starts. An editable install of this tree would be found before the
# copy, wherever the path begins.
SITE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which(CXX), reason=f"no compiler {CXX}; install one or set CXX"),
]


def run(*command, cwd, **environment):
    """What a command prints that finds the modules of `cwd`."""
    environment = {**os.environ, "PYTHONPATH": str(cwd), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return helpers.run(*command, cwd=cwd, env=environment, timeout=900)


def files_of_the_example():
    """What `find . -name '*example*'` shows of the op."""
    folders = (ROOT / part for part in ("csrc", "fastreg", "tests", "benchmarks"))
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(ROOT) for path in files if path.suffix in (".py", ".h", ".cpp", ".cu"))
    return sorted(name for name in names if EXAMPLE.search(str(name)))


def renamed(text):
    return EXAMPLE.sub(NAME, text).replace("Example", NAME.capitalize())


class Tree:
    """The scratch tree, and what had to be edited in it."""

    def __init__(self, root):
        self.root, self.edits = root, []
        module = (ROOT / "csrc" / "module.cpp").read_text()
        ops = {f"csrc/{op}" for op in re.findall(r'#include "(\w+)/', module)} - {"csrc/common"}
        tests = [f"tests/{name}" for name in TESTS] + [f"tests/native/{name}" for name in NATIVE]
        for part in (*PARTS, *ops, *tests):
            (root / part).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / part).is_dir():
                ignored = shutil.ignore_patterns("*.so", "__pycache__")
                shutil.copytree(ROOT / part, root / part, ignore=ignored)
            else:
                shutil.copy(ROOT / part, root / part)
        shutil.copytree(ROOT / "benchmarks", root / "fastreg" / "benchmarks")  # as in an installed package
        for path in files_of_the_example():
            (root / path).unlink(missing_ok=True)
        (root / "sitecustomize.py").write_text(SITE)

    def add(self, name, text):
        path = self.root / (f"fastreg/{name}" if name.startswith("benchmarks") else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def insert(self, name, before, line):
        """Insert a line where an op's author would have to."""
        text = (self.root / name).read_text()
        assert text.count(before) == 1, f"{name} does not say {before!r} once"
        (self.root / name).write_text(text.replace(before, line + before))
        self.edits.append((name, line))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The tree with the new op in it, built."""
    tree = Tree(tmp_path_factory.mktemp("tree"))
    for path in files_of_the_example():
        tree.add(renamed(str(path)), renamed((ROOT / path).read_text()))
    tree.insert("fastreg/__init__.py", "from ._linear_cross_entropy import", "from ._halve import halve\n")
    tree.insert("fastreg/__init__.py", '    "linear_cross_entropy",\n', '    "halve",\n')
    version = ["-DSKBUILD_PROJECT_VERSION=0.0.0", "-DSKBUILD_PROJECT_VERSION_FULL=0.0.0"]
    found = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    parts = ["-DFASTREG_CUDA=OFF", "-DFASTREG_AUTOGRAD=OFF", f"-DCMAKE_INSTALL_PREFIX={tree.root}"]
    # Without a build type nothing but the kernels is optimised: what is built here runs once.
    parts += ["-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_COMPILER={CXX}"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # of this environment's Ninja
    run(cmake(), "-G", "Ninja", "-B", "build", *version, *found, *parts, cwd=tree.root, PATH=path)
    run(cmake(), "--build", "build", "--target", "install", cwd=tree.root, PATH=path)
    return tree


def pytest_in(tree, *arguments):
    done = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, cwd=tree.root)
    assert " passed" in done and "skipped" not in done, done
    return done


def test_an_op_is_some_files_and_three_lines(tree):
    files = {renamed(str(path)) for path in files_of_the_example()}
    kernels = {f"csrc/{NAME}/{NAME}{part}" for part in ("_math.h", "_cpu.cpp", "_cuda.cu", "_op.cpp")}
    tests = {f"tests/test_{NAME}_op.py", f"tests/test_cuda_{NAME}.py", f"tests/native/{NAME}_test.cpp"}
    tests.add(f"tests/property_cases_{NAME}.py")
    assert files >= kernels | tests | {f"fastreg/_{NAME}.py", f"benchmarks/bench_{NAME}.py"}
    assert len(tree.edits) <= 3, tree.edits


def test_its_tests_pass(tree):
    where = "import fastreg; print(fastreg.__file__, fastreg.halve.__name__)"
    assert run(sys.executable, "-c", where, cwd=tree.root).split() == [
        str(tree.root / "fastreg" / "__init__.py"),
        NAME,
    ]
    pytest_in(tree, f"tests/test_{NAME}_op.py")


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH")
def test_its_cuda_kernels_pass(tree):
    pytest_in(tree, f"tests/test_cuda_{NAME}.py")


def test_its_hosted_case_is_found_and_passes(tree):
    pytest_in(tree, "tests/test_cuda_hosted.py", "-k", f"{NAME} and reverse")


def test_its_check_of_any_input_is_found_and_passes(tree):
    pytest_in(tree, "tests/test_properties.py", "-k", f"some_inputs and {NAME}")


def test_its_native_test_is_found_and_passes(tree):
    sources = ["tests/native/main.cpp", f"tests/native/{NAME}_test.cpp", f"csrc/{NAME}/{NAME}_cpu.cpp"]
    flags = ["-std=c++20", "-O1", "-DFASTREG_ISA=baseline", "-Wno-psabi"]
    run(CXX, *flags, *sources, "-o", "native", cwd=tree.root)
    assert f"{NAME}/bfloat16 " in run(tree.root / "native", cwd=tree.root)


def test_its_benchmark_is_found_and_right(tree):
    code = (
        f"from fastreg import benchmarks\nassert '{NAME}' in benchmarks.ops()\n"
        f"for case in benchmarks.load('{NAME}').cases('tiny'): case.build('cpu').check()"
    )
    run(sys.executable, "-c", code, cwd=tree.root)


def test_the_example_itself_is_not_listed():
    import fastreg
    from fastreg import benchmarks

    assert "example" not in benchmarks.ops()
    assert not hasattr(fastreg, "example")


def test_every_file_of_the_example_says_what_belongs_in_it():
    for path in files_of_the_example():
        end = '"""\n' if path.suffix == ".py" else r"\n(?!//)"  # of the docstring, of the comment
        opening = re.split(end, (ROOT / path).read_text())[0]
        assert "belong" in opening, f"{path} does not open with what belongs in it"
