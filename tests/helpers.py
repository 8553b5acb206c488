"""What several test files share: the dtypes of the ops, equality of bits, threads, other layouts, other
processes.
"""

import contextlib
import datetime
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import forked
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastreg as fr

ROOT = Path(__file__).resolve().parent.parent
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGER_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def own_flags(source):
    """The flags that a CUDA file names for itself."""
    found = re.search(r"^// nvcc flags: (.*)$", source.read_text(), re.MULTILINE)
    return found[1].split() if found else []


def same_bits(a, b):
    """Whether two tensors have one dtype, one shape and the same bits; which NaN a NaN is does not count."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    integer = INTEGER_OF[a.element_size()]
    equal = a.detach().contiguous().view(integer) == b.detach().contiguous().view(integer)
    return bool((equal | (a.isnan() & b.isnan())).all())


def assert_same_bits(got, want, what=""):
    """Fail unless `same_bits`, and show where."""
    assert got.dtype == want.dtype and got.shape == want.shape, (
        what,
        got.dtype,
        got.shape,
        want.dtype,
        want.shape,
    )
    assert same_bits(got, want), (what, (got != want).nonzero()[:5].tolist(), got, want)


def with_seed(seed, function, *args, **kwargs):
    """The function's result after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    return function(*args, **kwargs)


@contextlib.contextmanager
def threads(count):
    """torch works on `count` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(*command, **options):
    """What a command prints; it failing is an error, whose message has the end of all that it wrote."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    said = done.stdout[-6000:] + done.stderr[-8000:]
    assert done.returncode == 0, f"{' '.join(map(str, command))} gives {done.returncode}:\n{said}"
    return done.stdout


def run_python(code, *arguments, check=False, **environment):
    """The finished process that ran `code`, with variables set or, where None, unset; it failing is an error
    if `check`.
    """
    variables = {
        **os.environ,
        **{name: str(value) for name, value in environment.items() if value is not None},
    }
    for name in [name for name, value in environment.items() if value is None]:
        variables.pop(name, None)
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    assert not check or done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def on_ranks(count, function, *args, timeout=60, killed=None, group=True):
    """Run function(rank, *args) in `count` processes, which are the ranks of a gloo group, or will be where
    the function makes it; fail where one does, except for the one rank that is meant to be killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        address = f"file://{folder}/store" if group else None
        arguments = count, address, timeout, function, args
        forked.context()  # says what the server imports
        options = dict(nprocs=count, join=killed is None, start_method="forkserver")
        started = mp.start_processes(_one_rank, arguments, **options)
        for rank, process in enumerate(started.processes if started else ()):
            process.join(2 * timeout)
            assert (process.exitcode == -signal.SIGKILL) == (rank == killed), (rank, process.exitcode)


def _one_rank(rank, count, address, timeout, function, args):
    torch.set_num_threads(1)
    if address is not None:
        limit = datetime.timedelta(seconds=timeout)  # fail, not hang, where the ranks part
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count, timeout=limit)
    function(rank, *args)
    end_rank()


def end_rank():
    """End a rank in which all is asserted. While the interpreter ends, torch 2.14.1 aborts now and then,
    because of a thread that has not ended: "terminate called without an active exception".
    """
    dist.barrier()  # or torch aborts a rank whose partner is gone
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def tool(name):
    """A program of tools/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cmake():
    """CMake of this environment, or else of the machine."""
    try:
        from cmake import CMAKE_BIN_DIR
    except ImportError:
        return shutil.which("cmake")
    return os.path.join(CMAKE_BIN_DIR, "cmake")


def on_each_instruction_set(code, *arguments):
    """{instruction set: what `code` printed in a process that uses it}, for the sets that this machine can
    run.

    An argument that is a function gets the name of the set.
    """
    built = fr._C.build_info()["instruction_sets"].split(",")
    printed = {}
    for name in built:
        own = [argument(name) if callable(argument) else argument for argument in arguments]
        with tempfile.TemporaryDirectory() as folder:
            process = forked.start(code, *own, folder=folder, FASTREG_CPU_CAPABILITY=name)
            done = forked.finished(process, folder)
        if "that this machine can run" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        printed[name] = done.stdout
    used = fr._C.build_info()["instruction_set"]
    assert set(built[: 1 + built.index(used)]) <= set(printed), (
        f"{used} is in use, but only {list(printed)} ran"
    )
    return printed


def state_of(module):
    """A copy of a module's state dict."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def has_state(module, expected):
    """Whether a module's state dict has the keys and values of one that `state_of` gave."""
    state = module.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)


def same_values(a, b):
    """Whether two tensors have one dtype, one shape and the same values; NaN is NaN, and -0 is 0."""
    if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return False
    return torch.equal(a.nan_to_num(), b.nan_to_num())
