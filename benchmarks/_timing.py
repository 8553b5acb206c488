"""How a case is measured. Ratios count, not times: all sides of a case are timed in turn in one run, because
the machine's speed drifts.

A case first shows that fastreg's result is right. Then each round times every side once, in an order that
rotates, and gives one ratio theirs / ours. The table reports the median of these ratios and their quartiles.
`floor` is a plain torch operation that moves the bytes that cannot be avoided: the distance of an op from its
floor is what is left to gain.

Memory is what torch's allocator hands out while one call runs: the most that was held at one time, less what
the call leaves behind (its result, the gradients). Memory that a kernel or a matrix library takes from the
system by itself is not seen. Kept for backward is what autograd saves, without the inputs, which live anyway.
"""

import contextlib
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NoReturn

import torch

DTYPES = (torch.float32, torch.bfloat16)
BLOCK = 2e-3  # seconds: short calls are timed many at a time, so that the clock does not count
COPY = 2**27  # bytes of the copy that measures the bandwidth: larger than caches


class WrongResult(Exception):
    """A case whose op does not compute what it should: there is nothing to time."""


@dataclass(frozen=True)
class Targets:
    """What a case should reach: times as fast as `eager` and `compile`, and as `others`, by name; at most
    that many times the `floor`; extra memory at most the share `peak` of what the case names. None: no
    target."""

    eager: float | None = None
    compile: float | None = None
    floor: float | None = None
    peak: float | None = None
    others: dict[str, float] = field(default_factory=dict)


@dataclass
class Work:
    """A case with its tensors."""

    # "fastreg" and "torch"; where the case has them "compile" (torch's, compiled), "floor" and others.
    sides: dict[str, Callable]
    check: Callable  # raises AssertionError where fastreg's result is wrong
    moved: int | None = None  # bytes that any implementation reads and writes
    # "fastreg" and "torch": the forward pass alone, where there is a backward pass.
    forward: dict[str, Callable] = field(default_factory=dict)
    inputs: tuple = ()  # they live anyway: not counted as kept for backward
    peak_of: tuple[str, int] | None = None  # of what, and how many bytes, the extra memory is a share
    losses: dict[str, list] | None = None  # "fastreg", "torch": the loss of each step that was run
    # The context manager in which a side runs, and which is not timed.
    around: dict[str, Callable] = field(default_factory=dict)
    # Of sides by other libraries: raises where the library does something else, which then is not timed.
    proofs: dict[str, Callable] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One row of the table, described. `build(device)` makes its `Work`, only when its turn has come."""

    op: str
    work: str  # as the table says it: "dropout forward + backward"
    size: str
    elements: int
    dtype: torch.dtype
    build: Callable[[str], Work]
    floor: str = ""  # what the floor is
    targets: Targets = Targets()
    threads: int = 1  # unless the user chose
    rounds: int = 7  # at least
    scales: bool = True  # whether the picture of time against size shows it

    @property
    def name(self) -> str:
        """The row's first cells in one line."""
        return f"{self.work}, {str(self.dtype).removeprefix('torch.')}, {self.size}"


class Clock:
    """Times calls on one device."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def seconds(self, function: Callable, calls: int = 1) -> float:
        """Seconds per call of `calls` calls in a row. On a GPU from event to event, so that what was queued
        before and what the host does after is not counted."""
        if not self.cuda:
            begin = time.perf_counter()
            for _ in range(calls):
                function()
            return (time.perf_counter() - begin) / calls
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    def measure(
        self,
        functions: dict[str, Callable],
        seconds: float,
        rounds: int,
        around: dict[str, Callable] | None = None,
    ) -> dict[str, list[float]]:
        """Seconds per call of each of `functions` (a dict) in every round, for about `seconds` in all and at
        least `rounds`.
        """
        around = dict.fromkeys(functions, contextlib.nullcontext) | (around or {})
        calls = {}
        for name, function in functions.items():
            with around[name]():
                self.seconds(function)  # compiles, allocates, fills caches
                calls[name] = max(1, round(BLOCK / max(min(self.seconds(function) for _ in range(2)), 1e-9)))
        times = {name: [] for name in functions}
        names = list(functions)
        collecting = gc.isenabled()
        gc.disable()  # no side pays for the garbage of another
        try:
            start = time.perf_counter()
            while time.perf_counter() - start < seconds or len(times[names[0]]) < rounds:
                names.append(names.pop(0))  # nobody always runs after the same neighbour's caches
                for name in names:
                    with around[name]():
                        times[name].append(self.seconds(functions[name], calls[name]))
        finally:
            if collecting:
                gc.enable()
        return times

    def copy_bandwidth(self, size: int = COPY) -> float:
        """Bytes per second, read and written, of copying a large tensor on this device."""
        source = torch.ones(size // 4, device="cuda" if self.cuda else "cpu")
        target = torch.zeros_like(source)
        times = self.measure({"copy": lambda: target.copy_(source)}, 0.0, 9)["copy"]
        return 2 * size / statistics.median(times)


def ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of two lists of times, round by round."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    low, median, high = (
        statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    )
    return {"median": median, "low": low, "high": high}


def saved_bytes(function: Callable, inputs: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the memory that autograd keeps for backward when `function` runs, beyond that of `inputs`."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # held: freed memory would be handed out again under the same address
    for tensor in inputs:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(kept.values())


def peak_bytes(function: Callable, device: str) -> int:
    """The most memory that torch's allocator had handed out at one time while `function` ran, less what it
    left behind.
    """
    function()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    with (
        _silent(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profiler,
    ):
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()  # negative when memory is given back
        peak = max(peak, held)
    return peak - held


@contextlib.contextmanager
def _silent():
    """Keep off the terminal what the profiler's C++ writes there: that it finds no GPU, starts and stops."""
    try:
        saved = os.dup(2)
    except OSError:
        yield
        return
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def measure_case(
    case: Case,
    device: str,
    *,
    seconds: float = 3.0,
    threads: int | None = None,
    compiled: bool = True,
    bandwidth: float | None = None,
) -> dict:
    """Check and measure a case; gives its row, a dict of plain values.

    Raises:
        WrongResult: the op does not compute what it should.
    """
    # Is it right at all?
    if case.elements > 2**20:
        gc.collect()  # the tensors of earlier cases may hang in cycles
    torch.manual_seed(0)
    torch.set_num_threads(threads or case.threads)
    work = case.build(device)
    try:
        work.check()
    except AssertionError as error:
        raise WrongResult(
            f"{case.name}: the result is wrong, so it is not timed: {' '.join(str(error).split())}"
        ) from error
    row = {
        "op": case.op,
        "work": case.work,
        "size": case.size,
        "dtype": str(case.dtype).removeprefix("torch."),
        "elements": case.elements,
        "threads": torch.get_num_threads(),
        "scales": case.scales,
        "floor_is": case.floor if "floor" in work.sides else None,
        "notes": [],
    }
    # The sides that this machine can run.
    sides = dict(work.sides)
    if not compiled:
        sides.pop("compile", None)
    if "compile" in sides:
        try:
            sides["compile"]()
        # No compiler on this machine, or an operation that it cannot compile: the rest still counts.
        except Exception as error:
            del sides["compile"]
            row["notes"].append(
                f"torch.compile failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            )
    for side, prove in work.proofs.items():
        try:
            prove()
            sides[side]()
        except AssertionError as error:
            del sides[side]
            row["notes"].append(f"{side} is not timed, its result is another: {error}")
        # A library of another version may lack what the side calls: the rest still counts. What it says may
        # name folders of this machine.
        except Exception as error:
            del sides[side]
            row["notes"].append(f"{side} is not timed: {type(error).__name__}")
    # Times, and what they amount to.
    clock = Clock(device)
    times = clock.measure(sides, seconds, case.rounds, work.around)
    if work.losses is not None:  # before the measuring of memory below runs further steps of one side
        steps = min(len(losses) for losses in work.losses.values())
        row["losses"] = {
            side: [float(loss) for loss in losses[:steps]] for side, losses in work.losses.items()
        }
        if not all(map(math.isfinite, row["losses"]["fastreg"] + row["losses"]["torch"])):
            raise WrongResult(f"{case.name}: the training diverged, its times mean nothing")
    row["rounds"] = len(times["fastreg"])
    row["seconds"] = {side: statistics.median(values) for side, values in times.items()}
    row["against_eager"] = ratio(times["torch"], times["fastreg"])
    row["against_compile"] = ratio(times["compile"], times["fastreg"]) if "compile" in times else None
    row["against_others"] = {
        side: ratio(values, times["fastreg"])
        for side, values in times.items()
        if side not in ("fastreg", "torch", "compile", "floor")
    }
    row["times_floor"] = ratio(times["fastreg"], times["floor"]) if "floor" in times else None
    row["moved_bytes"] = work.moved
    row["share_of_bandwidth"] = (
        work.moved / row["seconds"]["fastreg"] / bandwidth if work.moved and bandwidth else None
    )
    # Memory.
    row["saved_bytes"] = {
        side: saved_bytes(function, work.inputs) for side, function in work.forward.items()
    } or None
    row["peak_bytes"] = {}
    for side in (side for side in sides if side != "floor"):
        with work.around.get(side, contextlib.nullcontext)():
            row["peak_bytes"][side] = peak_bytes(sides[side], device)
    row["peak_of"] = row["peak_share"] = None
    if work.peak_of:
        what, size = work.peak_of
        row["peak_of"] = {"what": what, "bytes": size}
        row["peak_share"] = {side: peak / size for side, peak in row["peak_bytes"].items()}
    # What was to be reached.
    row["targets"] = vars(case.targets)
    row["met"] = verdicts(row)
    if "compile" in sides:
        # The next case's functions are compiled for themselves, not as one more shape of these.
        torch._dynamo.reset()
    return row


def verdicts(row: dict) -> dict[str, bool | None]:
    """Which targets of a row are met: True, False, or None where there is no target or no measurement."""
    reached = {
        "eager": (row["against_eager"], True),
        "compile": (row["against_compile"], True),
        "floor": (row["times_floor"], False),
        "peak": (row["peak_share"] and {"median": row["peak_share"]["fastreg"]}, False),
    }
    reached |= {side: (value, True) for side, value in row["against_others"].items()}
    met = {}
    targets = row["targets"] | row["targets"]["others"]
    for name, (value, at_least) in reached.items():
        target = targets.get(name)
        known = target is not None and value is not None
        met[name] = (value["median"] >= target if at_least else value["median"] <= target) if known else None
    return met


def two_threads() -> int:
    """2, where there are as many cores."""
    return min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def tolerance(dtype: torch.dtype) -> float:
    """rtol of a value that was computed exactly and rounded once or twice."""
    return {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]


def run_alone(op: str) -> NoReturn:
    """End the process with `fastreg bench` of this op alone, which takes the same options."""
    from fastreg.benchmarks import command

    raise SystemExit(command.main(["--ops", op, *sys.argv[1:]]))
