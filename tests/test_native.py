"""The CPU kernels without torch, on every instruction set this machine can run and, by emulation, on aarch64.

tests/native is a program that tests the kernels of one instruction set. Here it is built with the flags that
CMakeLists.txt has for each, so that a new set is tested from the day it is named there. The kernels and their
tests are taken from the tree. All sets must give the same bits."""

import functools
import os
import platform
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import helpers
import pytest

ROOT = Path(__file__).parent.parent
CMAKE = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())
X86 = platform.machine() in ("x86_64", "AMD64")
CXX = os.environ.get("CXX", "g++")
CROSS_CXX = "aarch64-linux-gnu-g++"
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
COARSE = 4099  # the sweep of exp takes every COARSE-th float32; what runs without emulation takes all as well

# The sets that CMakeLists.txt names, with their flags. All but the baseline are x86's.
FLAGS = {}
for name, flags in re.findall(r"set\(flags_(\w+)([^)]*)\)", CMAKE):
    flags = re.sub(r"\$\{flags_(\w+)\}", lambda other: " ".join(FLAGS[other[1]]), flags)
    FLAGS[name] = flags.strip('" ').split()
FLAGS = {name: flags for name, flags in FLAGS.items() if X86 or name == "baseline"}
KERNELS = sorted(ROOT.glob("csrc/*/*_cpu.cpp"))
TESTS = sorted(ROOT.glob("tests/native/*.cpp"))
COMMON = [
    "-std=c++20",
    *(f for f in re.search(r"set\(cxx_flags ([^)]*)\)", CMAKE)[1].split() if "$" not in f),
]
# What fuses multiplication and addition has bits of its own where there is no such instruction, which is in
# x86-64's baseline.
FUSED = ("exp/float32", "cross_entropy", "attention")
# The checks that are left out make compiling ten times as slow, and they watch pointers that the address
# sanitizer watches as well. Its own checks are calls and not inlined for the same reason. The ends of scopes,
# which each intrinsic has, would take a third of the compiler's time; test_sanitizers.py looks at them.
SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-address-use-after-scope",
    "-fno-sanitize=null,object-size,alignment,pointer-overflow",
    "-fno-sanitize-recover=all",
    "--param=asan-instrumentation-with-call-threshold=0",
)

run = functools.partial(helpers.run, timeout=600)

needs_compiler = pytest.mark.skipif(not shutil.which(CXX), reason=f"no compiler {CXX}; apt-get install g++")


@functools.cache
def library_isa(isa=""):
    """The set that the library takes when asked for `isa`, or None where it refuses, and the sets it was
    built with: from the very code that chooses."""
    with tempfile.TemporaryDirectory() as folder:
        main = Path(folder, "main.cpp")
        main.write_text(
            '#include "csrc/common/isa.h"\n#include <cstdio>\n'
            "int main() { puts(fastreg::isa_list()); fflush(stdout); puts(fastreg::isa_name()); }\n"
        )
        run(CXX, *COMMON, f"-I{ROOT}", main, ROOT / "csrc/common/isa.cpp", "-o", Path(folder, "isa"))
        chosen = subprocess.run(
            [Path(folder, "isa")], env={"FASTREG_CPU_CAPABILITY": isa}, capture_output=True, text=True
        )
    assert chosen.returncode == 0 or "that this machine can run" in chosen.stderr, chosen.stderr
    built, *taken = chosen.stdout.split()
    return (taken or [None])[0], built.split(",")


def can_run(isa):
    return library_isa(isa)[0] is not None


def shipped(kernel, isa):
    """The object file that the build of this checkout has made of a kernel; None where there is none, or an
    older one than a file that it is made of.
    """
    made_of = [ROOT / "CMakeLists.txt", kernel, *kernel.parent.glob("*.h"), *ROOT.glob("csrc/common/*.h")]
    newest = max(path.stat().st_mtime for path in made_of)
    found = ROOT.glob(f"build/*/CMakeFiles/kernels_{isa}.dir/{kernel.relative_to(ROOT)}.o")
    return next((path for path in found if path.stat().st_mtime > newest), None)


def program(name, isa, *flags, compiler=CXX, emulator=(), stride=COARSE):
    """Builds the test program of one set, runs it and gives what it prints. Kernels are the very object files
    of this checkout's build, where they are there.
    """
    with tempfile.TemporaryDirectory() as folder:
        # All tests are one translation unit: each alone would compile the standard library's headers again,
        # which takes longer than its own code.
        tests = Path(folder, "tests.cpp")
        tests.write_text("".join(f'#include "{test}"\n' for test in TESTS))
        # Kernels take twice as long to compile with -O1 as with -O0, and run for a second or two. The sweep
        # of exp, which is a test, takes ten times as long to run with -O1 as with -O2.
        levels = {tests: "-O2"} | dict.fromkeys(KERNELS, "-O0")
        # Without what asks for inlining, in files of one set each, -O0 takes a fifth of the time.
        options = [*COMMON, *FLAGS[isa], *flags, f"-DFASTREG_ISA={isa}", "-Dalways_inline=unused"]
        objects = []
        for source, level in levels.items():
            ready = shipped(source, isa) if name == isa and source in KERNELS else None
            objects.append(ready or Path(folder, f"{len(objects)}.o"))
            if not ready:
                run(compiler, level, *options, "-c", source, "-o", objects[-1])
        run(compiler, *flags, *objects, "-o", Path(folder, "kernel_test"))
        output = run(*emulator, Path(folder, "kernel_test"), stride)
    measured = [f"{name}: {line[2:]}" for line in output.splitlines() if line.startswith("#")]
    digests = dict(line.rsplit(" ", 1) for line in output.splitlines() if not line.startswith("#"))
    assert len(digests) > 80, output
    return measured, digests


@pytest.fixture(scope="module")
def programs():
    """{name: future of (measured, digests)}. Each is a chain of compilations, and each processor works on one
    chain at a time.
    """
    with_sets = {isa: can_run(isa) for isa in FLAGS}
    widest = [isa for isa, runs in with_sets.items() if runs][-1]
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    started = {"sanitizers": pool.submit(program, "sanitizers", widest, *SANITIZERS, stride=40 * COARSE + 1)}
    if X86 and EMULATOR and shutil.which(CROSS_CXX):
        emulated = {"compiler": CROSS_CXX, "emulator": [EMULATOR]}
        started["aarch64"] = pool.submit(program, "aarch64", "baseline", "-static", **emulated)
    for isa in filter(with_sets.get, FLAGS):
        started[isa] = pool.submit(program, isa, isa, stride=1)
    yield started
    pool.shutdown(cancel_futures=True)


def result(programs, name):
    measured, digests = programs[name].result()
    print(*measured, sep="\n")
    return digests


def same_bits(programs, name):
    """The program fails nowhere and has the digests of AVX2, the first set with fused arithmetic, or those of
    the only set there is.
    """
    reference = "avx2" if "avx2" in programs else "baseline"
    mine, theirs = result(programs, name), result(programs, reference)
    assert (mine.keys() ^ theirs.keys()) <= {"exp/float32/stride 1"}, "only a full sweep has that digest"
    cases = mine.keys() & theirs.keys()
    if name == "aarch64":  # another C library
        cases = {case for case in cases if not case.startswith("libm")}
    if X86 and name != reference and "baseline" in (name, reference):
        cases = {case for case in cases if not case.removeprefix("libm ").startswith(FUSED)}
    different = sorted(case for case in cases if mine[case] != theirs[case])
    assert cases and not different, f"other bits than on {reference}: {different}"


@needs_compiler
def test_every_instruction_set_and_op_is_found():
    """The sets read from CMakeLists.txt are those that the library can choose from; every op with kernels has
    a native test.
    """
    built = library_isa()[1]  # the first one is the baseline under its own name
    assert list(FLAGS) == ["baseline", *built[1:]]
    assert {kernel.parent.name for kernel in KERNELS} <= {test.stem.removesuffix("_test") for test in TESTS}
    assert {"-Wall", "-Wextra", "-Werror", "-ffp-contract=off"} <= set(COMMON)


@needs_compiler
@pytest.mark.skipif(not X86 or not shutil.which("nm"), reason="only on x86-64, with nm of binutils")
def test_the_processor_is_asked_before_its_answers_are_read(tmp_path):
    """A compiler whose start-up code does not do it would take SSE2 on every machine."""
    run(CXX, *COMMON, "-c", ROOT / "csrc/common/isa.cpp", "-o", tmp_path / "isa.o")
    assert " U __cpu_indicator_init" in run("nm", tmp_path / "isa.o")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("isa", FLAGS)
def test_kernels(isa, programs):
    """The kernels agree with the references, write nothing outside and have the bits of the other sets.

    exp is swept over all float32 where it is not constant.
    """
    if not can_run(isa):
        pytest.skip(f"this machine cannot run {isa}")
    same_bits(programs, isa)


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(not X86, reason="only where aarch64 is another architecture")
@pytest.mark.skipif(
    not shutil.which(CROSS_CXX), reason=f"no {CROSS_CXX}; apt-get install g++-aarch64-linux-gnu"
)
@pytest.mark.skipif(not EMULATOR, reason="no qemu-aarch64; apt-get install qemu-user-static")
def test_kernels_on_aarch64(programs):
    """Compiled for aarch64 and emulated: the references hold and the bits are x86's."""
    same_bits(programs, "aarch64")


@needs_compiler
@pytest.mark.slow
def test_kernels_under_sanitizers(programs):
    """No access outside of a tensor, no undefined arithmetic, on the widest set there is."""
    result(programs, "sanitizers")
