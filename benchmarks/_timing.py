"""Ratios, not times: ours and theirs are timed in turn in one run, and the medians compared, because the machine's speed drifts.

Each case first shows that both sides compute the same. `floor` is a plain torch operation that moves the bytes that cannot be
avoided: how far from it an op is says how much is left to gain.
"""

import os
import statistics
import sys
import time

# Memory that is freed and fetched again at each call costs more than the work on it: keep it. Read when the process starts.
_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**28),
}
if __name__ != "__main__" and any(os.environ.get(name) != value for name, value in _ALLOCATOR.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_ALLOCATOR})


def measure(functions, seconds=1.0, at_least=5):
    """Median time in seconds of each of `functions` (a dict), called in turn for about `seconds` in all."""
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(next(iter(times.values()))) < at_least:
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def row(work, functions, saved=None, **options):
    """One line of the table: `functions` has "fastreg", "torch", "floor"; `saved`: bytes kept for backward, ours and torch's."""
    t = measure(functions, **options)
    return {
        "work": work,
        "against torch": t["torch"] / t["fastreg"],
        "of the floor": t["fastreg"] / t["floor"],
        "saved for backward": "" if saved is None else f"{saved[0]:,} B against {saved[1]:,} B",
    }


def saved_bytes(function):
    """Bytes of tensors that autograd keeps for backward when `function` runs, inputs that live anyway not counted."""
    import torch

    sizes = {}

    def pack(tensor):
        if not tensor.is_leaf or not tensor.requires_grad:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(sizes.values())


def table(rows):
    """The rows as a Markdown table."""
    lines = ["| work | against torch | times the floor | saved for backward |", "|---|---|---|---|"]
    for r in rows:
        lines.append(f"| {r['work']} | {r['against torch']:.1f}× | {r['of the floor']:.2f} | {r['saved for backward']} |")
    return "\n".join(lines)
