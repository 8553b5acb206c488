"""The CPU's operators under sanitizers, called from Python with the inputs of test_properties.py: the address
and the undefined-behaviour sanitizer, and the thread sanitizer. tests/native has the kernels alone.

The kernels of one instruction set, the glue and the C++ autograd are compiled with a sanitizer into a copy of
the package. Under the thread sanitizer torch's own threads, whose meeting points it does not see, give way to
threads that it does.
"""

import functools
import os
import platform
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest
import torch
from helpers import ROOT, run
from test_native import COMMON, CXX, FLAGS, KERNELS, SANITIZERS, can_run, shipped
from test_new_op import SITE

TORCH = Path(torch.__file__).parent
WIDEST = [isa for isa in FLAGS if can_run(isa)][-1] if shutil.which(CXX) else None
KINDS = {
    "address": [*SANITIZERS, "-fsanitize-address-use-after-scope", "-fno-sanitize=vptr"],
    "thread": ["-fsanitize=thread"],
}
# What splits a loop over threads, in the place of torch's function of that name. With OVERLAP=1 two threads
# do the same work, which is a race.
PARALLEL_FOR = """
#include <cstdint>
#include <thread>
#include <vector>

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                      void (*work)(int64_t, int64_t, void*), void* context) {
  const int64_t count = 3, step = (end - begin + count - 1) / count;
  if (end - begin <= grain) return work(begin, end, context), 0;
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += step) {
    const int64_t last = first + step + OVERLAP;
    threads.emplace_back(work, first, last < end ? last : end, context);
  }
  for (auto& thread : threads) thread.join();
  return 0;
}
"""

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not shutil.which(CXX), reason=f"no compiler {CXX}; install one or set CXX"),
    pytest.mark.skipif(sys.platform != "linux", reason="sanitizers are loaded as on Linux"),
]


def compile_modules(folder, kind):
    """Compile _C and the C++ autograd with a sanitizer into the package in `folder`."""
    made, package = folder / "made", folder / "fastreg"
    made.mkdir()
    (made / "no_cuda.h").write_text('#define FASTREG_NO_CUDA "built for the sanitizers"\n')
    ops = sorted(ROOT.glob("csrc/*/*_op.cpp"))
    headers = sorted(ROOT.glob("csrc/*/*_autograd.h"))
    (made / "autograd_ops.h").write_text("".join(f'#include "{header}"\n' for header in headers))
    version = "_".join(torch.__version__.split(".")[:2])
    about = {
        "FASTREG_VERSION": "0", "FASTREG_BUILT_WITH_TORCH": torch.__version__, "FASTREG_COMPILER": kind,
        "FASTREG_BUILD_TYPE": kind,
    }  # fmt: skip
    about = [f'-D{name}="{value}"' for name, value in about.items()]
    common = [CXX, *COMMON, "-g1", "-fPIC", "-fvisibility=hidden", "-Wno-error", "-w"]
    include = ["-isystem", TORCH / "include", "-isystem", sysconfig.get_path("include"), "-I", made]
    include += ["-isystem", pybind11.get_include()]
    stable = [*include, "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    whole = [*include, "-isystem", TORCH / "include/torch/csrc/api/include"]
    whole.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    whole.append(f"-DFASTREG_AUTOGRAD_MODULE=_autograd_{version}")

    jobs, ready = [], []
    for isa in FLAGS:
        options = [*FLAGS[isa], f"-DFASTREG_ISA={isa}"]
        for kernel in KERNELS:
            if isa == WIDEST:
                jobs.append((kernel, [*options, *KINDS[kind], "-O1"]))
            elif shipped(kernel, isa):
                ready.append(shipped(kernel, isa))
            else:
                jobs.append((kernel, [*options, "-O0"]))
    sanitized = [*KINDS[kind], "-O0"]
    jobs += [(op, [*stable, *sanitized]) for op in ops]
    jobs += [(ROOT / "csrc/common/isa.cpp", sanitized)]
    jobs += [(ROOT / "csrc/module.cpp", [*stable, *about, *sanitized])]
    jobs += [(ROOT / "csrc/autograd.cpp", [*whole, *about, *sanitized])]

    def compiled(number, job):
        source, options = job
        target = made / f"{number}.o"
        run("nice", "-n", "10", *common, *options, "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compiled, range(len(jobs)), jobs))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    link = [CXX, "-shared", *KINDS[kind], "-L", TORCH / "lib", "-ltorch_cpu", "-lc10"]
    run(*link, *objects[:-1], *ready, "-o", package / f"_C{suffix}")
    run(*link, "-ltorch_python", objects[-1], "-o", package / f"_autograd_{version}{suffix}")


@functools.cache
def environment(folder, kind):
    """The variables of a process that uses the copy of the package, which is built."""
    folder.mkdir()
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fastreg", folder / "fastreg", ignore=ignored)
    (folder / "sitecustomize.py").write_text(SITE)
    compile_modules(folder, kind)
    names = ["libasan.so", "libubsan.so"] if kind == "address" else ["libtsan.so"]
    preload = [run(CXX, f"-print-file-name={name}").strip() for name in names]
    if kind == "thread":
        (folder / "parallel.cpp").write_text(PARALLEL_FOR)
        for overlap in (0, 1):
            options = ["-std=c++20", "-shared", "-fPIC", f"-DOVERLAP={overlap}", *KINDS[kind]]
            run(CXX, *options, folder / "parallel.cpp", "-o", folder / f"parallel{overlap}.so")
        preload.append(str(folder / "parallel0.so"))
    return {
        **os.environ,
        "PYTHONPATH": str(folder),
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
        "FASTREG_CPU_CAPABILITY": WIDEST,
        "OMP_NUM_THREADS": "1",
        "FASTREG_NO_SHRINK": "1",
    }


def python(kind, folder, *arguments, **changed):
    """What Python prints with the copy of the package. The thread sanitizer needs addresses that are not
    drawn.
    """
    fixed = ["setarch", platform.machine(), "-R"] if kind == "thread" else []
    variables = {**environment(folder / kind, kind), **changed}
    return run("nice", "-n", "10", *fixed, sys.executable, *arguments, env=variables, cwd=folder / kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sanitizers")


@pytest.mark.parametrize("kind", KINDS)
def test_any_inputs_through_python(kind, folder):
    said = python(kind, folder, "-c", "import fastreg._C as m; print(m.build_info()['compiler'], m.__file__)")
    assert said.split()[0] == kind and str(folder) in said
    options = ["-q", "-p", "no:cacheprovider", "-k", "test_some_inputs"]
    said = python(kind, folder, "-m", "pytest", ROOT / "tests" / "test_properties.py", *options)
    print(said[-300:])
    assert " passed" in said and "skipped" not in said


AT_ONCE = """
import threading, torch, fastreg as fr

def work(i):
    x = torch.randn(20_000, 10, generator=torch.Generator().manual_seed(i)).requires_grad_()
    parameter = torch.nn.Parameter(torch.ones(100_000))
    optimizer = fr.optim.AdamW([parameter], ema=0.9, max_norm=1.0)
    for _ in range(3):
        loss = fr.cross_entropy(fr.dropout(x, 0.5), torch.zeros(20_000, dtype=torch.int64))
        fr.scaled_dot_product_attention(*[x[None, :800]] * 3, dropout_p=0.1).sum().backward()
        loss.backward()
        parameter.grad = parameter.detach() * 2
        optimizer.step()

threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
print("done")
"""


def test_ops_at_once(folder):
    assert "done" in python("thread", folder, "-c", AT_ONCE)


def test_a_race_is_found(folder):
    """What shows that the thread sanitizer looks at the kernels."""
    preload = environment(folder / "thread", "thread")["LD_PRELOAD"].replace("parallel0", "parallel1")
    with pytest.raises(AssertionError, match="data race"):
        python("thread", folder, "-c", AT_ONCE, LD_PRELOAD=preload)
