"""docs/known_faults.md: what fastreg does in places where another library goes wrong, and that every test
and script that the page links to is there.
"""

import re
from functools import partial

import numpy as np
import torch
from helpers import ROOT
from torch.utils.checkpoint import checkpoint

import fastreg as fr

PAGE = ROOT / "docs" / "known_faults.md"


def rows():
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [line for line in lines if not line.startswith("| what happens")]


def test_each_row_names_a_test():
    assert len(rows()) >= 20
    for row in rows():
        assert re.search(r"\[test_\w+\]\(\.\./tests/\w+\.py\)", row), row


def test_each_test_that_a_page_names_is_there():
    for page in ROOT.glob("docs/*.md"):
        for name, path in re.findall(
            r"\[(test_\w+)\]\((\.\./tests/\w+\.py)\)", page.read_text(encoding="utf-8")
        ):
            text = (PAGE.parent / path).read_text(encoding="utf-8")
            assert re.search(rf"^ *def {name}\(", text, flags=re.M), (page.name, name, path)


def test_each_script_is_there():
    scripts = re.findall(r"\[(\w+\.sh)\]\(\.\./findings/(\w+\.sh)\)", PAGE.read_text(encoding="utf-8"))
    assert scripts
    for shown, name in scripts:
        assert shown == name and (ROOT / "findings" / name).is_file(), name


def test_a_checkpoint_compiled_without_autograd():
    def masks_agree(dropout, backend, within):
        torch._dynamo.reset()
        x = torch.ones(512, requires_grad=True)

        def drop(x):
            return dropout(x, 0.5)

        if within:
            run = torch.compile(lambda x: checkpoint(drop, x, use_reentrant=False), backend=backend)
        else:
            run = partial(checkpoint, torch.compile(drop, backend=backend), use_reentrant=False)
        output = run(x)
        output.sum().backward()
        return torch.equal(x.grad != 0, output != 0)

    for dropout in (torch.nn.functional.dropout, fr.dropout):
        assert not masks_agree(dropout, "eager", within=True)
        assert masks_agree(dropout, "eager", within=False)
        assert masks_agree(dropout, "aot_eager", within=True)


def test_an_unsigned_rate_is_the_number_that_it_is():
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = fr.optim.SGD([weight], lr=np.uint8(1))
    for _ in range(2):
        weight.grad = torch.ones(1)
        optimizer.step()
    assert weight.item() == 0.0


def test_groups_for_two_optimisers_do_not_meet():
    model = torch.nn.Linear(3, 3)
    torch.optim.Adam(fr.optim.penalty_groups(model, l2=1e-4), lr=0.001)
    second = fr.optim.SGD(fr.optim.penalty_groups(model, l2=1e-4), lr=0.5)
    assert [group["lr"] for group in second.param_groups] == [0.5] * len(second.param_groups)


def test_a_compiled_step_of_adamw_is_exact():
    def trained(cls, compiled):
        weight = torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
        optimizer = cls([weight], lr=0.1, foreach=False)
        step = torch.compile(lambda: optimizer.step(), backend="eager") if compiled else optimizer.step
        for i in range(3):
            weight.grad = torch.linspace(0.5, 2, 6, dtype=torch.float64).roll(i)
            step()
        return weight.detach()

    ours = trained(fr.optim.AdamW, True)
    assert torch.equal(ours, trained(fr.optim.AdamW, False))
    torch.testing.assert_close(ours, trained(torch.optim.AdamW, False), rtol=1e-14, atol=0)


def test_step_hooks_run_once_whatever_optimisers_were_made_before():
    weight, calls = torch.nn.Parameter(torch.ones(1)), []
    torch.optim.SGD([weight], lr=0.5)  # torch wraps the step of this class now, that of fastreg's base
    optimizer = fr.optim.SGD([weight], lr=0.5)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    weight.grad = torch.ones(1)
    optimizer.step()
    assert calls == ["pre", "post"]
