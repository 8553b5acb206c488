"""What the parts for several ranks cost, against what the others do: `python -m benchmarks.ranks`.

With --draw docs/scale.md it draws what that page says instead, the model and the table, as docs/scale.png.

Ranks are processes of gloo on this machine, one thread each. Where they are more than the cores they wait for
each other, and only ratios of one run mean something.
"""

import argparse
import io
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fastreg as fr

Call = Callable[[], Any]

# name: (what is measured, what it is compared with)
Case = tuple[str, Call, str, Call]


def dropout(mesh: Any) -> Case:
    """Columns and rows of 4096 x 8192, forward and backward."""
    x = torch.randn(4096, 8192)
    parts = [distribute_tensor(x, mesh, [Shard(dim)]).requires_grad_() for dim in (1, 0)]

    def run(part: Tensor) -> None:
        fr.dropout(part, 0.1).backward(part.detach())
        part.grad = None

    return "dropout of columns", lambda: run(parts[0]), "dropout of rows", lambda: run(parts[1])


def penalty(mesh: Any) -> Case:
    """200 tensors of 64 x 64."""
    params = [nn.Parameter(distribute_tensor(torch.randn(64, 64), mesh, [Shard(0)])) for _ in range(200)]
    for p in params:
        p.grad = p.detach().clone()
    return (
        "penalty of 200 tensors", lambda: float(fr.optim.penalty(params, l1=0.1, l2=0.1).detach()),
        "clip_grad_norm_", lambda: float(nn.utils.clip_grad_norm_(params, 1e9).full_tensor()),
    )  # fmt: skip


def loss(mesh: Any) -> Case:
    """2048 rows of 32,000 classes, smoothed, forward and backward."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    held = 32_000 // ranks
    first = rank * held
    logits = torch.randn(2048, held, requires_grad=True)
    target = torch.randint(held * ranks, (2048,), generator=torch.Generator().manual_seed(0))

    def ours() -> Tensor:
        value = fr.distributed.cross_entropy(
            logits, target, first_class=first, num_classes=held * ranks, label_smoothing=0.1
        )
        value.backward()
        logits.grad = None
        return value.detach()

    def by_all_reduces() -> Tensor:
        """Shoeybi et al. 2019, with the sum that smoothing needs: a maximum and three sums."""
        with torch.no_grad():
            top = logits.max(1).values
            dist.all_reduce(top, dist.ReduceOp.MAX)
            x = logits - top.unsqueeze(1)
            column = target - first
            mine = (column >= 0) & (column < held)
            of_target = x.gather(1, column.clamp(0, held - 1).unsqueeze(1)).squeeze(1) * mine
            of_all = x.sum(1)
            p = x.exp_()
            total = p.sum(1)
            for each in (of_target, of_all, total):
                dist.all_reduce(each)
            p.div_(total.unsqueeze(1)).sub_(0.1 / (held * ranks))
            p[mine, column[mine]] -= 0.9
            p.div_(len(p))
            return (total.log() - 0.9 * of_target - 0.1 * of_all / (held * ranks)).mean()

    torch.testing.assert_close(ours(), by_all_reduces())
    return "loss of split classes", ours, "the same by four all-reduces", by_all_reduces


def sweeps(mesh: Any) -> Case:
    """What a rank computes of such a loss, without the message, into a gradient that is there; and what the
    system takes to hand out memory for one.
    """
    held = 32_000 // dist.get_world_size()
    logits, target = torch.randn(2048, held), torch.arange(2048) % held
    gradient, base = torch.empty_like(logits), 0.1 / 32_000

    def ours() -> None:
        sums = torch.ops.fastreg.cross_entropy_sharded_sums(logits, target, None, 0.9, base)
        whole = torch.cat((sums[:2], torch.full((4, 2048), 0.5)))
        torch.ops.fastreg.cross_entropy_sharded_grad_(gradient, logits, target, None, whole, 0.9, base)

    return "its sweeps", ours, "a new tensor like its gradient", lambda: torch.zeros_like(logits)


def stopping(mesh: Any) -> Case:
    """A score that is no better: no snapshot."""
    stopper = fr.EarlyStopping(patience=10**9)
    objects: list[Any] = [None] * dist.get_world_size()
    return (
        "EarlyStopping.step", lambda: stopper.step(1.0),
        "all_gather_object of a score", lambda: dist.all_gather_object(objects, 1.0),
    )  # fmt: skip


CASES = (dropout, penalty, loss, sweeps, stopping)


def seconds(call: Call, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        dist.barrier()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times


def on_rank(rank: int, ranks: int, store: str, repeats: int, only: list[str]) -> None:
    """Measure the cases, each and what it is compared with in turn; the first rank prints."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    for make in (case for case in CASES if case.__name__ in only):
        name, call, other_name, other = make(mesh)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(3):
            for each, measured in zip((call, other), times, strict=True):
                each()
                measured += seconds(each, repeats)
        ours, theirs = (1e3 * statistics.median(measured) for measured in times)
        if rank == 0:
            print(f"| {ranks} | {name} | {ours:.2f} | {other_name} | {theirs:.2f} | {ours / theirs:.2f} |")
    dist.barrier()
    dist.destroy_process_group()


# ---- the picture of docs/scale.md

CORES = 2  # of the machine that the page's table comes from
ROWS, CLASSES, DROPPED = 2048, 32_000, 4096 * 8192
# What a rank of r holds, keeps or gets, in bytes: how docs/scale.md says that it grows.
MODEL: dict[str, Callable[[int], float]] = {
    "logits in bfloat16, and as much for their gradient": lambda r: 2 * ROWS * CLASSES / r,
    "what is gathered of the loss": lambda r: 16 * ROWS * r,
    "the mask of dropout, kept for backward": lambda r: DROPPED / 8 / r,
}
MEASURED = ("dropout of columns", "dropout of rows", "loss of split classes", "its sweeps")


def table_of(page: str) -> dict[str, dict[int, float]]:
    """{what: {ranks: ms}} of the table of measured times in the page."""
    found: dict[str, dict[int, float]] = {}
    for ranks, name, ms, other, other_ms in re.findall(
        r"^\| (\d+) \| ([^|]+) \| ([\d.]+) \| ([^|]+) \| ([\d.]+) \| [\d.]+ \|$", page, flags=re.M
    ):
        found.setdefault(name, {})[int(ranks)] = float(ms)
        found.setdefault(other, {})[int(ranks)] = float(other_ms)
    return found


def drawn(page: str) -> bytes:
    """The picture, as PNG: the model over 64 ranks, and the measured times beside what the model says."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from fastreg.cli.style import LIGHT, PAPER, STYLE

    colours = [LIGHT[name] for name in ("blue", "rust", "teal", "ochre")]
    times = table_of(page)
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        memory, time_axes = figure.subplots(1, 2)
        many = [2**k for k in range(7)]
        for colour, (name, of_ranks) in zip(colours, MODEL.items(), strict=False):
            memory.plot(many, [of_ranks(r) / 2**20 for r in many], color=colour, label=name)
        memory.set(title="On one rank, by the model", xlabel="ranks", ylabel="MiB", yscale="log")
        memory.set_ylim(0.01, 5000)  # room for the names
        for colour, name in zip(colours, MEASURED, strict=True):
            ranks = sorted(times[name])
            time_axes.plot(ranks, [times[name][r] for r in ranks], "o", color=colour, label=name)
            model = [times[name][1] / min(r, CORES) for r in ranks]
            time_axes.plot(ranks, model, ":", color=colour, linewidth=1.2)
        time_axes.set(title=f"Measured on {CORES} cores; dotted: the model", xlabel="ranks", ylabel="ms")
        time_axes.set_ylim(bottom=0)
        for axes, ticks in ((memory, many), (time_axes, (1, 2, 4))):
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, map(str, ticks))
            axes.legend(fontsize=8.5)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110, facecolor=PAPER, metadata={"Software": None})
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="1,2,4", help="numbers of processes (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="of each of three rounds")
    names = [case.__name__ for case in CASES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these cases")
    parser.add_argument("--draw", type=Path, help="measure nothing; draw the picture of this page beside it")
    options = parser.parse_args()
    if options.draw:
        options.draw.with_suffix(".png").write_bytes(drawn(options.draw.read_text(encoding="utf-8")))
        return
    print(f"{os.cpu_count()} cores, torch {torch.__version__}\n")
    print("| ranks | what | ms | against | ms | ratio |\n|---|---|---|---|---|---|", flush=True)
    for ranks in map(int, options.ranks.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(on_rank, (ranks, f"{folder}/store", options.repeats, options.only), nprocs=ranks)


if __name__ == "__main__":
    main()
