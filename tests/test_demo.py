"""The demo: a small run from end to end, the page in a browser, its claims, and what Ctrl-C leaves behind.
What it reads is tested in test_demo_data.py.
"""

import contextlib
import html
import inspect
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_examples import blobs

for package in ("matplotlib", "PIL", "rich", "sklearn"):
    pytest.importorskip(package, reason='the demo needs pip install "torch-fastreg[demo]"')

import fastreg as fr  # noqa: E402
from fastreg.cli import common  # noqa: E402
from fastreg.lecture import command as demo  # noqa: E402
from fastreg.lecture import data, report, results, sections, train  # noqa: E402
from fastreg.lecture.formula import formula  # noqa: E402
from fastreg.lecture.section import Section  # noqa: E402
from fastreg.lecture.sections import (  # noqa: E402
    SECTIONS,
    augmentation,
    dropout,
    l2,
    lasso,
    multi_task,
    parameter_sharing,
    semi_supervised,
)

KEYS = [section.key for section in SECTIONS]
RECIPES = {recipe.key: recipe for recipe in report.recipes(SECTIONS)}


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
    _shorten(monkeypatch)


def _shorten(monkeypatch):
    monkeypatch.setattr(demo, "QUICK_EPOCHS", 5)
    for section in (augmentation, semi_supervised):
        monkeypatch.setattr(section, "QUICK_STEPS", 20)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The page and the results of one run of all sections with two seeds, and what the terminal showed."""
    folder = tmp_path_factory.mktemp("demo")
    x, y = blobs()
    np.savez(folder / "blobs.npz", X=x, y=y)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        _shorten(patch)
        arguments = [
            "--data",
            str(folder / "blobs.npz"),
            "--out",
            str(folder / "deep" / "report"),
            "--quick",
            "--seeds",
            "2",
        ]
        assert demo.main(arguments) == 0
    return *_read(folder / "deep" / "report"), shown.getvalue(), folder / "deep" / "report"


# Options and output


@pytest.mark.parametrize(
    "arguments", [["--seeds", "0"], ["--threads", "-1"], ["--seeds", "x"], ["--nonsense"]]
)
def test_bad_options(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(arguments)
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_unusable_output_folder_is_refused_before_training(tmp_path, npz, capsys, monkeypatch):
    monkeypatch.setattr(
        train, "train", lambda *args: pytest.fail("trained before looking at the output folder")
    )
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert demo.main(["--data", str(npz), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert "--out" in error and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_missing_package_names_the_remedy(npz, tmp_path):
    """A new process has imported none of them yet; a fork of it for each package finds that one missing."""
    command = """
import os, sys
from fastreg.cli import main
for package in ("rich", "matplotlib", "PIL", "sklearn"):
    child = os.fork()
    if child == 0:
        sys.modules[package] = None
        os._exit(main(["demo", *sys.argv[1:]]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
    arguments = ["--data", str(npz), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True)
    assert done.stdout.split() == ["2"] * 4
    assert done.stderr.splitlines() == [
        f'fastreg demo: {name} is missing; run: pip install "torch-fastreg[demo]"'
        for name in ("rich", "matplotlib", "PIL", "scikit-learn")
    ]


def _read(folder):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    page = (folder / "index.html").read_text(encoding="utf-8")
    return page, json.loads((folder / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)


def _check_page(page, keys=KEYS):
    for section in ("overview", *keys, "method"):
        assert f'<section id="{section}"' in page
    anchors = re.findall(r'<a href="#([^"]*)"', page)
    assert set(anchors) == {"overview", *keys, "method"} and all(
        f'id="{anchor}"' in page for anchor in anchors
    )
    sources = re.findall(r'<img[^>]* src="([^"]*)"', page)
    assert all(re.match(r"data:image/png;base64,[\w+/=]{60,}$", source) for source in sources)
    addresses = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', page)
    assert all(address.startswith(("#", "data:")) for pair in addresses for address in pair if address)
    assert not re.search(r"<script|@import|https?://(?!www\.w3\.org/)", page)
    for tag in ("figure", "section", "table", "svg", "div"):
        assert page.count(f"<{tag}") == page.count(f"</{tag}>")
    assert page.rstrip().endswith("</html>")


def test_whole_run(whole):
    page, measured, shown, folder = whole
    _check_page(page)
    assert page.count("<figure") >= 2 * len(SECTIONS)
    assert sorted(os.listdir(folder)) == ["index.html", "results.json"]  # no temporary file is left
    assert measured["partial"] is False and "Partial report" not in page
    assert measured["steps_finished"] == measured["steps_planned"] > 2 * len(RECIPES)
    assert measured["machine"]["torch"] == torch.__version__
    assert all(claim["holds"] in (True, False) for claim in measured["claims"])
    assert len(measured["claims"]) == 1 + sum(len(section.claims) for section in SECTIONS)
    assert "All together" in shown and str(folder) in shown


def test_every_variant_is_measured_on_every_seed(whole):
    measured = {(r["variant"], r["side"], r["seed"]): r for r in whole[1]["records"]}
    assert len(measured) == len(whole[1]["records"])
    for section in SECTIONS:
        for seed in (0, 1) if section.key != "lasso" else (0,):
            for recipe in section.trained:
                for side in ("torch", "fastreg"):
                    run = measured[recipe.key, side, seed]
                    assert len(run["epochs_ms"]) == len(run["curves"]["train_error"]) <= 5
                    assert 0 <= run["test_error"] <= 100 and 0 <= run["attacked_accuracy"] <= 100
                    assert run["gap_error"] == pytest.approx(run["test_error"] - run["train_error"])
            for variant, _, _ in section.variants:
                record = measured[variant, "fastreg", seed]
                assert any(record.get(column) is not None for column in section.columns)
    assert (
        min(r["train_error"] for r in measured.values() if "curves" in r) < 40
    )  # it learned: the pictures are of something


def test_summary_is_the_mean_and_its_standard_error(whole):
    records = [r["test_error"] for r in whole[1]["records"] if (r["variant"], r["side"]) == ("l1", "fastreg")]
    (row,) = [row for row in whole[1]["summary"] if (row["variant"], row["side"]) == ("l1", "fastreg")]
    assert row["seeds"] == 2 and row["test_error"]["mean"] == pytest.approx(np.mean(records))
    assert row["test_error"]["standard_error"] == pytest.approx(abs(records[0] - records[1]) / 2)


def test_methods_measured_against_each_other(whole):
    """What must hold whatever the data: by construction, not by luck."""
    of = {(r["variant"], r["side"], r["seed"]): r for r in whole[1]["records"]}
    for seed in (0, 1):
        textbook, folded = of["dropout_textbook", "fastreg", seed], of["dropout_folded", "fastreg", seed]
        assert folded["folded_difference"] < 1e-3 and folded["test_error"] == pytest.approx(
            textbook["test_error"]
        )
        own, shared = of["sharing_own", "fastreg", seed], of["sharing_shared", "fastreg", seed]
        assert (
            own["detector_weights"] % shared["detector_weights"] == 0
            and own["detector_weights"] > shared["detector_weights"]
        )
        for side in ("torch", "fastreg"):
            assert (
                of["adversarial", side, seed]["robust_accuracy"]
                <= 100 - of["adversarial", side, seed]["test_error"] + 40
            )
            assert of["early_retrained", side, seed]["best_epoch"] == of["early", side, seed]["best_epoch"]
        for variant, counts in (("few_plain", [3, 18]), ("few", [3, 18]), ("mirrored", [3])):
            record = of[f"augmentation_{variant}", "fastreg", seed]
            assert [count for count, _ in record["test_error_by_images"]] == counts
            assert (
                record["test_error_by_images"][0][1]
                == record["test_error"]
                == record["train_error"] + record["gap_error"]
            )
        assert (
            of["augmentation", "torch", seed]["augment_ms"]
            > 0
            < of["augmentation", "fastreg", seed]["augment_ms"]
        )
        assert (
            of["semi_all", "fastreg", seed]["labels"] == 18
            and of["semi_pseudo", "fastreg", seed]["labels"] == 3
        )


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>onload = () => {
  const page = document.querySelector("iframe").contentDocument, view = page.defaultView
  const seen = element => element.getClientRects().length > 0
  const outside = [...page.body.querySelectorAll("*")].filter(element => seen(element)
    && element.getBoundingClientRect().right > view.innerWidth + 1
    && !element.closest(".wide, nav, pre, svg"))
  const images = [...page.images]
  document.body.textContent = "RESULT" + JSON.stringify({
    width: view.innerWidth, scroll: page.documentElement.scrollWidth, images: images.length,
    missing: images.filter(image => !image.complete || !image.naturalWidth).length,
    outside: outside.map(element => element.outerHTML.slice(0, 200)),
    formulas: [...page.querySelectorAll(".math")].map(svg => svg.getBoundingClientRect().width),
    charts: [...page.querySelectorAll(".chart")].map(svg => svg.getBoundingClientRect().height),
    unresolved: [...page.querySelectorAll("a[href^='#']")]
      .filter(a => !page.querySelector(a.getAttribute("href"))).length,
  }) + "END"
}</script>"""


@pytest.mark.skipif(
    BROWSER is None, reason="no chromium on this machine: the page is not looked at in a browser"
)
@pytest.mark.parametrize("width", [390, 1280])
def test_page_in_a_browser(whole, tmp_path, width):
    """In a frame of a phone's width (a window of chromium has at least 500 px): nothing sticks out, every
    picture is there.
    """
    style, page = f"border: 0; width: {width}px; height: 844px", html.escape(whole[0])
    frame = f'<iframe style="{style}" srcdoc="{page}"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!doctype html><body>{frame}{PROBE}", encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command = [BROWSER, *options, "--window-size=1400,900", "--dump-dom", (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(html.unescape(re.search(r"RESULT(.*)END", done.stdout, re.DOTALL)[1]))
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    assert found["width"] == width and found["scroll"] <= width, found["outside"]
    assert found["outside"] == [] and found["missing"] == found["unresolved"] == 0
    assert found["images"] >= 50 and len(found["formulas"]) == sum(
        len(section.formulas) for section in SECTIONS
    )
    assert len(found["charts"]) >= len(SECTIONS) and min(found["charts"]) > 50 and min(found["formulas"]) > 20


@pytest.mark.parametrize("section", SECTIONS, ids=KEYS)
def test_formulas_are_drawn(section):
    for tex in section.formulas:
        drawn = formula(tex)
        assert (
            re.fullmatch(r'<svg class="math" .*><path d="M[^"]{200,}"/></svg>', drawn, re.DOTALL)
            and "nan" not in drawn
        )
        assert float(re.search(r"width:([\d.]+)em", drawn)[1]) < 21  # fits a phone


def test_sections_are_declared_alike():
    known = results.MEASURES
    assert len(set(KEYS)) == len(KEYS) and all(isinstance(section, Section) for section in SECTIONS)
    assert len({section.order for section in SECTIONS}) == len(SECTIONS)
    for section in SECTIONS:
        assert re.fullmatch(r"[a-z0-9-]+", section.key) and section.claims and len(section.figures) >= 2
        assert all(column in known | section.measures for column in section.columns)
        assert all(hasattr(side, name) for name in section.code for side in (train.Torch, train.Fastreg))


def test_a_new_section_is_found_in_its_place(tmp_path, monkeypatch):
    """A copy of a section under another name, key and order, and nothing else."""
    source = Path(inspect.getsourcefile(l2)).read_text(encoding="utf-8")
    changed = source.replace('key="l2"', 'key="fresh"').replace("order=10", "order=15")
    (tmp_path / "fresh.py").write_text(changed, encoding="utf-8")
    monkeypatch.setattr(sections, "__path__", [*sections.__path__, str(tmp_path)])
    assert [section.key for section in sections.find()] == ["l2", "fresh", *KEYS[1:]]
    del sections.fresh, sys.modules[f"{sections.__name__}.fresh"]


def test_only_some_sections(tmp_path, npz, quick):
    out = tmp_path / "out"
    assert demo.main(["--data", str(npz), "--out", str(out), "--quick", "--only", "lasso, l1"]) == 0
    page, measured = _read(out)
    _check_page(page, ["l1", "lasso"])
    assert 'id="dropout"' not in page and measured["settings"]["sections"] == [
        "l1",
        "lasso",
    ]  # in the lecture's order
    variants = {"none", "l2", "l1", "l1_adamw", "lasso_strong", "lasso_weak"}
    assert {r["variant"] for r in measured["records"]} == variants
    assert demo.main(["--out", str(out), "--quick", "--only", "lasso"]) == 0
    _check_page(_read(out)[0], ["lasso"])


@pytest.mark.parametrize(
    ("only", "message"),
    [("l1,drop", "no section drop;"), ("L1", "no section L1;"), (",", "names no section")],
)
def test_unknown_sections_are_refused_with_a_list(only, message, capsys, tmp_path):
    assert demo.main(["--only", only, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and ", ".join(KEYS) in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# Features that are no square have no picture; images in colour have a third axis.
@pytest.mark.parametrize("shape", [(10,), (8, 8, 3)])
def test_features_and_colour_images_run_too(tmp_path, quick, shape):
    x, y = blobs(shape=shape)
    np.savez(tmp_path / "x.npz", X=x, y=np.array(["<script>", "a&b", "c"])[y])
    only = "l1,augmentation,adversarial,semi-supervised,multi-task,parameter-sharing"
    assert (
        demo.main(
            ["--data", str(tmp_path / "x.npz"), "--out", str(tmp_path / "out"), "--quick", "--only", only]
        )
        == 0
    )
    _check_page(_read(tmp_path / "out")[0], only.split(","))


def test_diverged_training_still_gives_a_report(tmp_path, npz, quick, monkeypatch):
    for module in (train, augmentation, multi_task, parameter_sharing):
        monkeypatch.setattr(module, "LR", 1e30)
    only = [key for key in KEYS if key not in ("lasso", "semi-supervised")]  # these have rates of their own
    assert (
        demo.main(["--data", str(npz), "--out", str(tmp_path / "out"), "--quick", "--only", ",".join(only)])
        == 0
    )
    _check_page(_read(tmp_path / "out")[0], only)


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
    trained = [r for r in measured["records"] if "curves" in r]
    assert len(trained) == 2 * finished and finished <= measured["steps_finished"] < measured["steps_planned"]
    assert any(claim["holds"] is None for claim in measured["claims"]) and "No numbers" in page
    assert "Interrupted" in capsys.readouterr().out


def test_interrupt_between_the_measurements_of_a_section(tmp_path, npz, quick, monkeypatch):
    monkeypatch.setattr(semi_supervised, "evaluate", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    out = tmp_path / "out"
    assert (
        demo.main(["--data", str(npz), "--out", str(out), "--quick", "--only", "l2,semi-supervised"]) == 130
    )
    page, measured = _read(out)
    _check_page(page, ["l2", "semi-supervised"])
    assert measured["partial"] is True
    assert {r["variant"] for r in measured["records"]} == {"none", "l2", "l2_adamw"}


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_control_c(tmp_path):
    """The real signal, in a real process, in the middle of training."""
    x, y = blobs(n=500)
    np.savez(tmp_path / "x.npz", X=x, y=y)
    command = "import sys; from fastreg.lecture.command import main; sys.exit(main(sys.argv[1:]))"
    arguments = [
        "--data",
        str(tmp_path / "x.npz"),
        "--out",
        str(tmp_path / "out"),
        "--only",
        "l2,l1",
        "--seeds",
        "99",
    ]
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a job in the background of a shell ignores it
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
    """Made-up records in which every claim about trainings holds. changes: {recipe: {key: value or value per
    seed}}.
    """
    base = dict(
        test_error=10.0, gap_error=10.0, gap_loss=0.6, zero_weights=0.0, weight_size=0.02, confidence=97.0
    )
    base |= dict(calibration_error=6.0, attacked_accuracy=30.0, robust_accuracy=20.0)
    better = {
        "l1": dict(zero_weights=60.0, weight_size=0.04),
        "l2": dict(gap_loss=0.4, gap_error=9.0),
        "l1_adamw": dict(zero_weights=50.0),
        "l2_adamw": dict(gap_loss=0.4),
        "dropout": dict(gap_loss=0.4, gap_error=8.0),
        "augmentation": dict(test_error=7.0, gap_error=7.0),
        "smoothing": dict(confidence=90.0, calibration_error=2.0),
        "adversarial": dict(attacked_accuracy=70.0, robust_accuracy=60.0),
    }
    return [
        {"variant": recipe, "side": side, "seed": seed, **base, **better.get(recipe, {})}
        | {
            key: value[seed] if isinstance(value, list) else value
            for key, value in changes.get(f"{recipe}_{side}", changes.get(recipe, {})).items()
        }
        for recipe in RECIPES
        for side in ("torch", "fastreg")
        for seed in range(3)
    ]


class _Examples:
    y_test = range(3000)


def _verdicts(records):
    found = results.Results(_Examples, {}, report.titles(SECTIONS), records=records)
    return {v.title: v for judged in report.verdicts(found, SECTIONS).values() for v in judged}


L1, L1_SIZE = (
    "L1 makes more weights exactly zero than L2",
    "The weights that L1 leaves are larger than those of L2",
)
L2_LOSS, L2_ERROR, DROP_LOSS, DROP_ERROR = (
    f"{name} narrows the gap between test and training {what}"
    for name in ("L2", "Dropout")
    for what in ("cross-entropy", "error")
)
AUGMENT_TEST = "Augmentation lowers the test error"
AUGMENT_GAP = "Augmentation narrows the gap between test and training error"
CONFIDENT, CALIBRATED = (
    "Label smoothing makes the network less confident",
    "Label smoothing brings confidence closer to accuracy",
)
FGSM, PGD = (f"Adversarial training raises accuracy under {attack}" for attack in ("FGSM", "PGD"))
EARLY = "Early stopping is no worse on test images than training to the last epoch"
SAME = "fastreg and torch reach the same test error with every method"
JUDGED = {
    L1,
    L1_SIZE,
    L2_LOSS,
    L2_ERROR,
    DROP_LOSS,
    DROP_ERROR,
    AUGMENT_TEST,
    AUGMENT_GAP,
    CONFIDENT,
    CALIBRATED,
    FGSM,
    PGD,
}
ADAMW_ZEROS, ADAMW_LOSS, AVERAGED = (
    "With AdamW, too, L1 makes weights exactly zero",
    "AdamW's decay narrows the gap in cross-entropy",
    "Averaged weights make no more errors than the last ones",
)
JUDGED |= {EARLY, SAME, ADAMW_ZEROS, ADAMW_LOSS, AVERAGED}


def test_all_claims_hold_when_the_numbers_say_so():
    assert {title for title, verdict in _verdicts(_records()).items() if verdict.holds} == JUDGED


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({"l1": {"zero_weights": 0.0}}, {L1}),
        ({"l2": {"zero_weights": 70.0}}, {L1}),
        ({"l2": {"weight_size": 0.05}}, {L1_SIZE}),
        ({"l2": {"gap_loss": 0.7}}, {L2_LOSS}),
        ({"l1_adamw": {"zero_weights": 0.0}}, {ADAMW_ZEROS}),
        ({"l2_adamw": {"gap_loss": 0.7}}, {ADAMW_LOSS}),
        ({"all_averaged": {"test_error": 14.0}}, {AVERAGED}),
        ({"l2": {"gap_error": [9.0, 12.0, 8.9]}}, {L2_ERROR}),  # lower on average, but within the noise
        ({"dropout": {"gap_loss": 0.61}}, {DROP_LOSS}),
        ({"dropout": {"gap_error": 10.0}}, {DROP_ERROR}),
        ({"augmentation": {"test_error": [9.9, 10.2, 9.8]}}, {AUGMENT_TEST}),
        ({"augmentation": {"gap_error": 10.1}}, {AUGMENT_GAP}),
        ({"smoothing": {"confidence": 98.0}}, {CONFIDENT}),
        ({"smoothing": {"calibration_error": 13.0}}, {CALIBRATED}),
        ({"adversarial": {"attacked_accuracy": [31.0, 29.0, 31.0]}}, {FGSM}),
        ({"adversarial": {"robust_accuracy": 20.0}}, {PGD}),
        ({"early": {"test_error": 10.31}}, {EARLY}),
        ({"early": {"test_error": 10.29}}, set()),
        ({"early": {"test_error": 5.0}}, set()),
        ({"l1_torch": {"test_error": 10.31}}, {SAME}),
        ({"l1_torch": {"test_error": 9.69}}, {SAME}),
        ({"l1_torch": {"test_error": [9.0, 10.3, 11.0]}}, set()),
        ({"dropout_textbook_fastreg": {"test_error": float("nan")}}, {SAME}),
    ],
)
def test_claims_that_do_not_hold_are_said_not_to(changes, failing):
    records = _records()
    for changed in _records(**changes):
        original = next(r for r in records if all(r[k] == changed[k] for k in ("variant", "side", "seed")))
        key = f"{changed['variant']}_{changed['side']}"
        original |= {k: changed[k] for k in changes.get(key, changes.get(changed["variant"], {}))}
    verdicts = _verdicts(records)
    assert {title for title in JUDGED if not verdicts[title].holds} == failing


def test_claims_without_numbers_are_not_measured():
    assert {v.holds for v in _verdicts([]).values()} == {None}
    only_torch = [r for r in _records() if r["side"] == "torch"]
    assert {v.holds for v in _verdicts(only_torch).values()} == {None}


def test_one_seed_is_judged_by_its_sign_and_says_so():
    records = [r for r in _records() if r["seed"] == 0]
    verdicts = _verdicts(records)
    assert all(verdicts[title].holds for title in JUDGED)
    assert "one seed" in verdicts[L1].evidence
    # 10 % of 3,000 images: two binomial standard errors of a difference are 1.55 pp, and 0.3 pp are allowed
    # besides.
    for difference, holds in ((1.7, True), (2.0, False)):
        records[-1]["test_error"] = 10 + difference
        assert _verdicts(records)[SAME].holds is holds


def test_evidence_holds_the_numbers():
    verdicts = _verdicts(_records())
    assert "60.0 %" in verdicts[L1].evidence and "+60.0" in verdicts[L1].evidence
    assert f"{len(RECIPES)} of {len(RECIPES)}" in verdicts[SAME].evidence


def test_lasso_path_solves_the_lasso():
    """The conditions of the optimum, without scikit-learn: the gradient is -λ sign(w) where w is not zero,
    within λ elsewhere.
    """
    x, y, names = lasso.diabetes()
    assert x.shape == (442, 10) == (len(y), len(names))
    for strength, w in zip((0.5, 0.1, 0.02), lasso.path(x, y, (0.5, 0.1, 0.02), steps=1500), strict=True):
        gradient = x.T @ (x @ w - y) / len(y)
        kept = w != 0
        torch.testing.assert_close(gradient[kept], -strength * w[kept].sign(), rtol=0, atol=1e-6)
        assert gradient[~kept].abs().max() <= strength + 1e-9
        assert 0 < kept.sum() < 10


def test_average_of_masks_comes_to_the_folded_network():
    x, y = blobs(n=200)
    examples = data.split(x, y, "x")
    torch.manual_seed(0)
    model = dropout.linear(examples)
    folded = fr.nn.fold_dropout(model)
    one, many = dropout.distances(model, folded, examples.x_test, [1, 400])
    assert many == pytest.approx(one / 20, rel=0.5)


# The digits' own size, and small images in colour whose sides are odd and unequal.
@pytest.mark.parametrize("shape", [(2, 1, 28, 28), (3, 3, 9, 14)])
@pytest.mark.parametrize(
    ("turn", "slant", "factor"), [(12, 0, 1.0), (0, -9, 1.0), (0, 0, 1.3), (-20, 7, 0.8)]
)
def test_augmentation_by_hand_is_fastregs(shape, turn, slant, factor):
    """What torch's side writes by hand transforms as fastreg does, once nothing is left to chance."""
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    fixed = {
        "rotate": (turn, turn),
        "shear": (slant, slant),
        "stretch": (factor, factor),
        "translate": (0.0, 0.0),
    }
    theirs, ours = (side.augmentation(**fixed)(images) for side in (train.Torch, train.Fastreg))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert not torch.allclose(ours, images, atol=0.05)


@pytest.mark.parametrize("side", [train.Torch, train.Fastreg])
def test_augmentation_shifts_by_whole_pixels_to_either_side(side):
    """Along a ramp in x and y, far from the border, a shift shows as a constant; both sides reach the same
    ones.
    """
    torch.manual_seed(0)
    across = torch.arange(20.0).expand(20, 20)
    ramp = torch.stack([across, across.mT]).repeat(400, 1, 1, 1)
    still = {"rotate": (0, 0), "shear": (0, 0), "stretch": (1, 1)}
    moved = side.augmentation(**still, translate=(0.1, 0.2))(ramp)[:, :, 10, 10]
    torch.testing.assert_close(moved, moved.round(), rtol=0, atol=1e-4)
    assert moved[:, 0].round().unique().tolist() == [8, 9, 10, 11, 12]
    assert moved[:, 1].round().unique().tolist() == [6, 7, 8, 9, 10, 11, 12, 13, 14]


# Sides are unequal, so that a transposition would show; the last are features that are no image.
@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3), (10,)])
def test_rows_of_pixels_are_augmented_as_images(shape):
    examples = data.split(*blobs(shape=shape), "x")
    x = examples.x_train
    mirrored = train.augmented(x, examples, fr.augment.Augment(hflip=1.0))
    want = x.view(len(x), *shape).flip(2).flatten(1) if len(shape) > 1 else x  # features are left as they are
    torch.testing.assert_close(mirrored, want, rtol=0, atol=1e-6)


def test_training_augments_the_training_images_alone():
    recipe = train.Recipe("augmentation", "Augmentation", augment=True)
    x, y = blobs(n=200)
    before = data.split(x, y, "x")
    plain, other = (_trained(x, y, each, epochs=2)[1] for each in (train.PLAIN, recipe))
    assert not torch.equal(plain.model[2].weight, other.model[2].weight)
    assert torch.equal(other.data.x_train, before.x_train) and torch.equal(other.data.x_test, before.x_test)
    assert train.evaluate(other.model, before, "train")["train_error"] == other.measured["train_error"]


def _trained(x, y, recipe, epochs):
    return list(train.train(data.split(x, y, "x"), recipe, seed=0, epochs=epochs))[-1]


@pytest.mark.parametrize(
    "key",
    [
        *("none", "l2", "l1", "l2_adamw", "l1_adamw", "smoothing", "smoothing_others", "adversarial"),
        *("early", "averaged"),
    ],
)
def test_both_sides_train_the_same_network(key, monkeypatch):
    """From the same weights and batches, methods without randomness must end at the same weights except for
    rounding. The steps are few: the sign of an attack's gradient makes much of the least difference.
    """
    monkeypatch.setattr(train, "FEWEST_STEPS", 3)
    averaged = train.Recipe("averaged", "Averaged", l1=1e-3, ema=0.9, adamw=True, patience=1)
    recipe = averaged if key == "averaged" else RECIPES[key]
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
