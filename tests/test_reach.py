"""docs/reach.md says what patch and convert reach, and it is so."""

import pytest
import torch
from helpers import ROOT
from reach_cases import CASES, LIBRARIES, row

PAGE = ROOT / "docs" / "reach.md"


@pytest.mark.parametrize("name", CASES)
def test_the_row_is_current(name):
    if name in LIBRARIES:
        pytest.importorskip(CASES[name].needs, reason="the package is not installed", exc_type=ImportError)
    assert row(name) in PAGE.read_text().splitlines(), "run python tests/reach_table.py"
    torch._dynamo.reset()


def test_no_row_is_of_the_past():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "patch |" not in line]
    optional = (
        "`F.linear_cross_entropy`, which then never holds its logits",
        "`nn.LinearCrossEntropyLoss`",
        "`nn.Dropout` under `torch.jit.script`",
    )  # not in every torch
    assert {line.split(" | ")[0].removeprefix("| ") for line in rows} <= {*CASES, *optional}
