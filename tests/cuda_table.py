"""The table of CUDA kernels in docs/cuda.md: `python tests/cuda_table.py` executes each and writes it anew.

Bytes are counted in sectors of 32 by the interpreter of tests/cuda_machine.py, except for the bias of
dropout_add, which comes from the cache, and the images that are augmented, of which each launch counts every
sector once: the neighbours of a pixel come from the cache; registers are what ptxas says for sm_80, and the
share of the memory's bandwidth is predicted: the time of the floor's bytes over that of the bytes moved or,
if longer, of the instructions, for an H100 (3.35 TB/s; 132 SMs, 128 lanes, 1.76 GHz). The interpreter counts
instructions of PTX, of which about a quarter are moves and conversions that cost nothing in machine code.
"""

import importlib
import re
import sys
from pathlib import Path

import test_cuda_build
import torch
from cuda_machine import traffic

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "cuda.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
BANDWIDTH, LANES, REAL = 3.35e12, 132 * 128 * 1.76e9, 0.75


def measured():
    """(what, dtype, elements, floor in bytes, reports, op) of every kernel that a plain call of its op
    launches, from `for_the_table(dtype)` in tests/test_cuda_<op>.py.
    """
    for path in sorted(Path(__file__).parent.glob("test_cuda_*.py")):
        module = importlib.import_module(path.stem)
        if hasattr(module, "for_the_table"):
            for dtype in getattr(module, "TABLE_DTYPES", (torch.bfloat16, torch.float32)):
                yield from module.for_the_table(dtype)


def row(what, dtype, elements, floor, reports, op):
    """The line of one kernel."""
    used = test_cuda_build.resources(op)
    registers = sorted({used[report.kernel][0] for report in reports})
    shared = max(used[report.kernel][2] for report in reports)
    moved = traffic(reports, without=("bias", "images"))
    instructions = sum(report.instructions for report in reports)
    moved += sum(
        counted["unique"]
        for report in reports
        for (name, _), counted in report.traffic.rows.items()
        if name == "images"
    )
    share = floor / BANDWIDTH / max(moved / BANDWIDTH, REAL * instructions / LANES)
    share = min(share, 1.0)  # part of an image that is shifted is not looked at
    name = str(dtype).removeprefix("torch.")
    return (
        f"| {what} | {name} | {floor / elements:.3g} | {moved / elements:.3g} | "
        f"{', '.join(map(str, registers))} | "
        f"{f'{shared / 1024:.1f} KB' if shared else 'none'} | {share:.0%} |"
    )


def rows():
    yield "| kernel | dtype | floor, B/element | moved | registers | shared memory | bandwidth, predicted |"
    yield "|---|---|---|---|---|---|---|"
    yield from (row(*each) for each in measured())


def main():
    table = "\n".join(rows()) + "\n"
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(re.sub(rf"(?<={BEGIN}).*?(?={END})", lambda _: table, text, flags=re.S))
    sys.stdout.write(table)


if __name__ == "__main__":
    main()
