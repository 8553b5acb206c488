"""`fastreg bench`: a tiny run from end to end, the checks that keep a wrong op from being timed, and how
ratios are reckoned.
"""

import json
import math
import os
import re
import subprocess
import sys
import time

import pytest
import torch

for package in ("matplotlib", "rich"):
    pytest.importorskip(package, reason='the benchmark needs pip install "torch-fastreg[bench]"')

import fastreg as fr  # noqa: E402
from fastreg import benchmarks  # noqa: E402
from fastreg.benchmarks import _timing, optimizers, table  # noqa: E402
from fastreg.benchmarks import command as bench  # noqa: E402
from fastreg.benchmarks._timing import Case, Targets, Work  # noqa: E402
from fastreg.cli import doctor  # noqa: E402

VISION = {"augment", "augment_recipes"}
# They have no cases where torchvision or transformers is not installed.
OPTIONAL = VISION | {"language_model"}
OPS = set(benchmarks.ops()) - OPTIONAL


@pytest.fixture(autouse=True)
def _process(monkeypatch):
    """The command sets the threads of its process, and would replace the process by one with other settings
    of malloc.
    """
    before = torch.get_num_threads()
    for name, value in bench.ALLOCATOR.items():
        monkeypatch.setenv(name, value)
    yield
    torch.set_num_threads(before)


def main(out, *arguments):
    """The command in this process, tiny."""
    return bench.main(["--tiny", "--no-compile", "--threads", "1", "--out", str(out), *arguments])


def read(out):
    return json.loads((out / "results.json").read_text())


# From end to end


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder that the command leaves, run as users run it."""
    folder = tmp_path_factory.mktemp("bench")
    environment = {name: value for name, value in os.environ.items() if name not in bench.ALLOCATOR}
    command = [
        sys.executable,
        "-m",
        "fastreg",
        "bench",
        "--tiny",
        "--no-compile",
        "--threads",
        "1",
        "--out",
        folder / "out",
    ]
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out", done.stdout


def test_results(ran):
    results = read(ran[0])
    assert results["schema"] == bench.SCHEMA and results["partial"] is False and results["failed"] == []
    assert len(results["rows"]) == results["planned"] > 10
    machine = results["machine"]
    assert machine["allocator"].startswith("memory kept")  # the command has started itself again
    assert machine["build"] == fr._C.build_info() and machine["torch"] == torch.__version__
    assert (
        machine["autograd"]["path"] in ("Python", "C++")
        and machine["cores"] == os.cpu_count()
        and machine["cpu"]
    )
    assert results["copy_bandwidth"] > 0 and results["settings"]["scale"] == "tiny"
    assert {row["op"] for row in results["rows"]} - OPTIONAL == OPS
    for row in results["rows"]:
        assert (
            row["dtype"] in ("float32", "bfloat16", "uint8")
            and row["elements"] > 0
            and row["threads"] == 1
            and row["rounds"] >= 2
        )
        assert set(row["seconds"]) >= {"fastreg", "torch"} and all(
            seconds > 0 for seconds in row["seconds"].values()
        )
        for name in ("against_eager", "times_floor"):
            assert row[name] is None or 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
        assert row["against_compile"] is None
        assert set(row["targets"]) == {"eager", "compile", "floor", "peak", "others"}
        assert set(row["met"]) - set(row["against_others"]) == {"eager", "compile", "floor", "peak"}
        others = {"attention": {"flash"}} | (
            {"linear_cross_entropy": {"chunked"}} if hasattr(torch.nn, "LinearCrossEntropyOptions") else {}
        )
        others = others.get(row["op"], set())
        if row["op"] == "linear_cross_entropy" and "no smoothing" not in row["work"]:
            others = set()
        if row["work"] in ("augmentation, all steps", "augmentation, imagenet()"):
            others = {"loop"}
        assert (
            set(row["against_others"]) - {"kornia", "opencv", "albumentations"} == others
        )  # where they are installed
        assert all(row["seconds"][side] > 0 for side in row["against_others"])
        assert row["peak_bytes"]["fastreg"] >= 0 and (row["times_floor"] is None) == (row["floor_is"] is None)


def test_dropout_keeps_a_bit_per_element(ran):
    for row in read(ran[0])["rows"]:
        if row["op"] in ("dropout", "dropout_add"):
            size = {"float32": 4, "bfloat16": 2}[row["dtype"]]
            assert row["saved_bytes"]["fastreg"] == row["elements"] // 8
            assert row["saved_bytes"]["torch"] == row["elements"] * size
            moved = {"dropout": 4, "dropout_add": 5}[row["op"]]
            assert row["moved_bytes"] == moved * row["elements"] * size + row["elements"] // 4


def test_training_has_the_losses_of_both_sides(ran):
    for row in (row for row in read(ran[0])["rows"] if row["op"] == "training"):
        ours, theirs = row["losses"]["fastreg"], row["losses"]["torch"]
        assert len(ours) == len(theirs) >= row["rounds"] and all(map(math.isfinite, ours + theirs))
        assert ours[0] == pytest.approx(theirs[0], rel=0.1)


def test_pictures(ran):
    assert {path.name for path in ran[0].iterdir()} == {
        "results.json",
        "table.md",
        "ratios.png",
        "times.png",
        "training.png",
    }
    for path in ran[0].glob("*.png"):
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and 10_000 < len(content) < 2_000_000


def test_markdown_has_a_row_per_case_and_is_what_the_command_prints(ran, capsys):
    text = (ran[0] / "table.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(read(ran[0])["rows"]) and {row.count("|") for row in rows} == {7}
    assert bench.main(["--markdown", str(ran[0] / "results.json")]) == 0
    assert capsys.readouterr().out == text


def test_terminal(ran):
    assert "dropout forward + backward" in ran[1] and "results.json" in ran[1] and "targets met" in ran[1]


def test_files_are_found_by_their_name(tmp_path, monkeypatch):
    assert len(OPS) >= 7 and {"dropout", "training"} <= OPS
    (tmp_path / "bench_fresh.py").write_text("def cases(scale):\n    yield from ()\n")
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "fastreg.benchmarks.bench_fresh", raising=False)
    assert "fresh" in benchmarks.ops() and list(benchmarks.load("fresh").cases("full")) == []


@pytest.mark.parametrize("scale", ["full", "quick", "tiny"])
@pytest.mark.parametrize("op", sorted(OPS))
def test_every_scale_has_its_cases(op, scale):
    cases = list(benchmarks.load(op).cases(scale))
    assert cases
    assert len({case.name for case in cases}) == len(cases) and all(case.op == op for case in cases)


def test_resnet50_has_the_parameters_that_torchvision_counts():
    shapes = optimizers.resnet50()
    assert len(shapes) == 161 and sum(math.prod(shape) for shape in shapes) == 25_557_032


# A wrong op is not timed


_REAL_DROPOUT = fr.dropout
_REAL_ATTENTION = torch.nn.functional.scaled_dot_product_attention


def _never_drops(x, p):
    return x / (1 - p)


def _without_scale(x, p):
    return x * (torch.rand_like(x) < 1 - p)


def _wrong_gradient(x, p):
    y = torch.nn.functional.dropout(x, p)
    return y.detach() + (x - x.detach()) * 0.5


@pytest.mark.parametrize(
    ("op", "name", "wrong"),
    [
        ("dropout", "dropout", _never_drops),
        ("dropout", "dropout", _without_scale),
        ("dropout", "dropout", _wrong_gradient),
        ("dropout_add", "dropout_add", lambda x, r, p, bias=0: r + _never_drops(x + bias, p)),
        ("dropout_add", "dropout_add", lambda x, r, p, bias=0: r + _REAL_DROPOUT(x, p) + bias),
        ("dropout_add", "dropout_add", lambda x, r, p, bias=0: r + _wrong_gradient(x + bias, p)),
        (
            "attention",
            "scaled_dot_product_attention",
            lambda *arguments, generator=None: _REAL_ATTENTION(*arguments),  # with a mask of its own
        ),
        ("fgsm", "fgsm_step", lambda x, g, eps, low, high: (x + eps * g).clamp(low, high)),
        ("fgsm", "fgsm_step", lambda x, g, eps, low, high: x + eps * g.sign()),
        (
            "cross_entropy",
            "cross_entropy",
            lambda z, y, label_smoothing: torch.nn.functional.cross_entropy(z, y),
        ),
        ("sgd", "optim.SGD", lambda p, l1=0, **options: _REAL_SGD(p, **options)),
        ("adamw", "optim.AdamW", lambda p, lr, **options: _REAL_ADAMW(p, lr=2 * lr, **options)),
        ("sgd", "optim.SGD", lambda p, **options: _REAL_SGD(p, **{**options, "weight_decay": 0})),
        ("sgd", "optim.SGD", lambda p, **options: _REAL_SGD(p, **{**options, "momentum": 0.8})),
        ("training", "optim.SGD", lambda p, lr, **options: _REAL_SGD(p, lr=2 * lr, **options)),
    ],
)
def test_a_wrong_op_is_refused(tmp_path, monkeypatch, capsys, op, name, wrong):
    monkeypatch.setattr(f"fastreg.{name}", wrong)
    assert main(tmp_path, "--ops", op) == 1
    results = read(tmp_path)
    assert (
        results["rows"] == [] and len(results["failed"]) == results["planned"] and results["partial"] is False
    )
    assert all("the result is wrong" in failure["error"] for failure in results["failed"])
    assert (
        "the result is wrong" in capsys.readouterr().out
        and "the result is wrong" in (tmp_path / "table.md").read_text()
    )


_REAL_SGD, _REAL_ADAMW = fr.optim.SGD, fr.optim.AdamW


@pytest.mark.parametrize("op", sorted(VISION))
@pytest.mark.parametrize("sample", [0, 1])
def test_a_wrong_augmentation_is_refused(tmp_path, monkeypatch, op, sample):
    """Whichever sample of the batch it is wrong for."""
    pytest.importorskip("torchvision", reason="the benchmark of augmentation needs torchvision")
    real = fr.augment.apply

    def wrong(images, params, **targets):
        result = real(images, params, **targets)
        changed = result.boxes if targets else result.clone()  # a derivative of it may be taken
        changed[min(sample, len(images) - 1)] = 0  # one image has one sample
        return result if targets else changed

    monkeypatch.setattr(fr.augment, "apply", wrong)
    assert main(tmp_path, "--ops", op) == 1
    results = read(tmp_path)
    assert len(results["failed"]) == results["planned"] > 0
    assert all("the result is wrong" in failure["error"] for failure in results["failed"])


PEERS = {"kornia": "RandomHorizontalFlip", "albumentations": "GaussianBlur"}  # and a step of theirs


@pytest.mark.parametrize("library", PEERS)
def test_a_library_that_does_something_else_is_not_timed(library, tmp_path, monkeypatch):
    pytest.importorskip("torchvision", reason="needs torchvision", exc_type=ImportError)
    pytest.importorskip(library, reason=f"needs {library}")
    from fastreg.benchmarks import peers

    def sides_and_notes():
        assert main(tmp_path, "--ops", "augment") == 0
        rows = [row for row in read(tmp_path)["rows"] if row["work"] == "augmentation, all steps"]
        rows = [row for row in rows if library == "kornia" or row["dtype"] == "uint8"]
        assert rows
        return [
            (library in row["seconds"], [note for note in row["notes"] if library in note]) for row in rows
        ]

    assert all(timed and not notes for timed, notes in sides_and_notes())
    module = getattr(peers, library)
    nothing = type("Nothing", (getattr(module, PEERS[library]),), {})
    nothing.forward = nothing.apply = lambda self, x, *args, **kwargs: x
    monkeypatch.setattr(module, PEERS[library], nothing)
    for timed, notes in sides_and_notes():
        assert not timed and "its result is another" in notes[0] and "off by" in notes[0]
    monkeypatch.delattr(module, PEERS[library])  # as in another version
    for timed, notes in sides_and_notes():
        assert not timed and notes == [f"{library} is not timed: AttributeError"]


def test_a_wrong_loop_of_opencv_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("torchvision", reason="the benchmark of augmentation needs torchvision")
    pytest.importorskip("cv2", reason="needs opencv-python-headless")
    from fastreg.benchmarks import _opencv

    monkeypatch.setattr(_opencv, "more_contrast", lambda image, factor: image)
    for op, rows in (("augment", 1), ("augment_recipes", 1)):
        assert main(tmp_path, "--ops", op) == 1
        failed = read(tmp_path)["failed"]
        assert len(failed) == rows and "OpenCV" in failed[0]["error"]


def _all_logits(hidden, weight, target, bias=None, *, label_smoothing=0.0):
    return torch.nn.functional.cross_entropy(hidden @ weight.T, target, label_smoothing=label_smoothing)


def test_linear_cross_entropy_is_judged_by_its_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(fr, "linear_cross_entropy", _all_logits, raising=False)
    assert main(tmp_path, "--ops", "linear_cross_entropy") == 0
    for row in read(tmp_path)["rows"]:
        if "no smoothing" in row["work"]:  # which may have another measure
            continue
        assert row["peak_of"]["what"] == "logits" and row["peak_share"]["fastreg"] == pytest.approx(
            row["peak_share"]["torch"]
        )
        assert row["peak_share"]["fastreg"] >= 1
    monkeypatch.setattr(
        fr,
        "linear_cross_entropy",
        lambda hidden, *rest, **options: _all_logits(hidden * 1.1, *rest, **options),
    )
    assert main(tmp_path, "--ops", "linear_cross_entropy") == 1 and read(tmp_path)["rows"] == []


def test_a_training_that_diverges_is_refused():
    losses = {"fastreg": [1.0, math.nan], "torch": [1.0, 2.0]}
    work = Work({"fastreg": lambda: None, "torch": lambda: None}, lambda: None, losses=losses)
    with pytest.raises(_timing.WrongResult, match="diverged"):
        _timing.measure_case(Case("x", "x", "1", 1, torch.float32, lambda device: work), "cpu", seconds=0.01)


def test_a_case_that_fails_costs_the_others_nothing(tmp_path, monkeypatch):
    real = fr.fgsm_step

    def fails_for_bfloat16(x, *rest):
        if x.dtype == torch.bfloat16:
            raise RuntimeError("no such kernel")
        return real(x, *rest)

    monkeypatch.setattr(fr, "fgsm_step", fails_for_bfloat16)
    assert main(tmp_path, "--ops", "fgsm") == 1
    results = read(tmp_path)
    assert {row["dtype"] for row in results["rows"]} == {"float32"} and len(results["failed"]) == 2
    assert "RuntimeError: no such kernel" in results["failed"][0]["error"]


def test_a_compiler_that_fails_costs_its_column_only():
    def broken():
        raise RuntimeError("no C++ compiler\nand much more")

    sides = {"fastreg": lambda: None, "torch": lambda: None, "compile": broken}
    case = Case(
        "x", "x", "1", 1, torch.float32, lambda device: Work(sides, lambda: None), targets=Targets(compile=1)
    )
    row = _timing.measure_case(case, "cpu", seconds=0.01)
    assert row["against_compile"] is None and row["met"]["compile"] is None
    assert row["notes"] == ["torch.compile failed: RuntimeError: no C++ compiler"]


# Reckoning


def test_ratio_is_the_median_of_the_rounds_and_not_the_ratio_of_medians():
    assert _timing.ratio([2, 30, 8], [1, 10, 2]) == {"median": 3, "low": 2.5, "high": 3.5}
    assert _timing.ratio([3.0], [2.0]) == {"median": 1.5, "low": 1.5, "high": 1.5}


def test_rounds_take_every_side_in_turn_and_let_each_be_first():
    calls = []
    sides = {name: lambda name=name: (calls.append(name), time.sleep(3e-3)) for name in "abc"}
    times = _timing.Clock("cpu").measure(sides, 0.0, 6)
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", 6)
    rounds = [calls[i : i + 3] for i in range(len(calls) - 18, len(calls), 3)]
    assert all(sorted(names) == list("abc") for names in rounds) and {names[0] for names in rounds} == set(
        "abc"
    )
    assert all(value >= 3e-3 for values in times.values() for value in values)


def test_short_calls_are_timed_many_at_a_time():
    count = 0

    def short():
        nonlocal count
        count += 1

    (seconds,) = _timing.Clock("cpu").measure({"a": short}, 0.0, 1)["a"]
    assert count > 100 and seconds < 1e-4


def test_what_is_around_a_side_is_open_when_it_runs_and_not_timed():
    import contextlib

    opened = []

    @contextlib.contextmanager
    def slow():
        time.sleep(0.02)
        opened.append(True)
        yield
        opened.pop()

    times = _timing.Clock("cpu").measure({"a": lambda: time.sleep(2e-3 * len(opened))}, 0.0, 3, {"a": slow})[
        "a"
    ]
    assert all(2e-3 <= seconds < 0.02 for seconds in times)


def test_a_gpu_is_timed_from_event_to_event(monkeypatch):
    """The same code as on a GPU, with events of this machine's clock."""
    synchronised = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = time.perf_counter()

        def synchronize(self):
            synchronised.append(self)

        def elapsed_time(self, end):
            assert end in synchronised
            return 1e3 * (end.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    times = _timing.Clock("cuda").measure({"a": lambda: time.sleep(3e-3)}, 0.0, 3)["a"]
    assert all(3e-3 <= seconds < 0.1 for seconds in times)


def test_memory():
    x, y = torch.randn(1000, requires_grad=True), torch.randn(1000)
    assert _timing.saved_bytes(lambda: x * y, (x,)) == 4000
    assert _timing.saved_bytes(lambda: x * y, (x, y)) == 0
    assert _timing.saved_bytes(lambda: x.exp().sin(), (x,)) == 4000  # the same tensor twice
    assert _timing.saved_bytes(lambda: x.exp()[:5].sin(), (x,)) == 4000  # a part of a tensor holds all of it
    out = torch.empty(1000)
    assert _timing.peak_bytes(lambda: torch.add(y, y, out=out), "cpu") == 0
    assert _timing.peak_bytes(lambda: (y + 1) + (y + 2), "cpu") == 12000
    kept = []
    assert (
        _timing.peak_bytes(lambda: kept.append(torch.zeros(1000)), "cpu") == 0
    )  # what a call leaves is its result


@pytest.mark.parametrize(
    ("value", "met"),
    [((3.0, 2.0, 1.0, 0.05), (True, True, True, True)), ((2.9, 1.9, 1.1, 0.2), (False, False, False, False))],
)
def test_targets(value, met):
    eager, compiled, floor, peak = value
    row = {
        "against_eager": {"median": eager},
        "against_compile": {"median": compiled},
        "times_floor": {"median": floor},
        "peak_share": {"fastreg": peak, "torch": 1.0},
        "targets": vars(Targets(3, 2, 1, 0.1, {"loop": 5, "not measured": 5})),
        "against_others": {"loop": {"median": 5.0 * eager / 3}, "no target": {"median": 1.0}},
    }
    met += (met[0], None)
    assert tuple(_timing.verdicts(row).values()) == met
    row |= {"against_compile": None, "times_floor": None, "peak_share": None, "against_others": {}}
    assert list(_timing.verdicts(row).values())[1:] == [None] * 3
    row["targets"] = vars(Targets())
    assert set(_timing.verdicts(row).values()) == {None}


# Text


def test_cells():
    row = {
        "against_eager": {"median": 12.345, "low": 9.87, "high": 123.4},
        "against_compile": None,
        "times_floor": {"median": 1.814},
        "saved_bytes": {"fastreg": 2, "torch": 64},
        "peak_bytes": {"fastreg": 2**17, "torch": 4 * 2**20},
        "peak_share": {"fastreg": 0.031, "torch": 1.0},
        "peak_of": {"what": "logits", "bytes": 4 * 2**20},
        "share_of_bandwidth": 0.876,
        "targets": vars(Targets(12, 5, 1.8, 0.1, {"loop": 100})),
        "met": {"eager": True, "compile": None, "floor": False, "peak": True, "loop": False, "library": None},
    }
    assert table.others(row) == ""
    row["against_others"] = {"loop": {"median": 99.4}, "library": {"median": 5.0}}
    assert table.others(row) == "loop 99.4× ✗ ≥ 100, library 5.00×"
    assert table.times(row, "eager") == "12.3× ✓" and table.times(row, "compile") == "–"
    assert table.floor(row) == "1.81 ✗ ≤ 1.8" and table.quartiles(row) == "9.87–123"
    assert table.saved(row) == "2 B : 64 B" and table.share(row) == "88 %"
    assert table.peak(row) == "128 KiB : 4 MiB (3.1 % of the logits ✓)"
    row["met"]["peak"] = False
    assert table.peak(row) == "128 KiB : 4 MiB (3.1 % of the logits ✗ ≤ 10)"


# Either side of each change of unit, and where the thousands get a comma.
@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1000 * 1024, "1,000 KiB"),
        (2**20, "1 MiB"),
        (131_072_000, "125 MiB"),
    ],
)
def test_sizes(count, text):
    assert table.size(count) == text


# Errors and interruption


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "dropout,foo"], "--ops: expected some of adamw, attention, augment, .* got foo$"),
        (["--ops", ","], "got nothing$"),
        (["--out", "/dev/null/x"], "--out: /dev/null/x is no folder .* --out$"),
        (["--markdown", "/nonexistent.json"], "--markdown: .* cannot be read .* results.json"),
        (["--markdown", os.devnull], "--markdown: .* cannot be read as results"),
    ],
)
def test_unusable_options(capsys, arguments, message):
    assert bench.main(arguments) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("fastreg bench: ") and error.count("\n") == 1 and re.search(message, error.strip())
    ), error


def test_results_of_another_kind_are_not_results(tmp_path, capsys):
    (tmp_path / "x.json").write_text('{"schema": 99}')
    assert bench.main(["--markdown", str(tmp_path / "x.json")]) == 2
    assert "expected results of schema 1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert bench.main(["--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert (
        error
        == f"fastreg bench: --device cuda: {doctor.collect()['cuda']['why_not']}; or run with --device cpu\n"
    )


@pytest.mark.parametrize("threads", ["0", "-1", "two"])
def test_threads(capsys, threads):
    with pytest.raises(SystemExit):
        bench.main(["--threads", threads])
    assert "expected a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["matplotlib", "rich"])
def test_what_is_missing_is_named(monkeypatch, tmp_path, capsys, missing):
    for name in ("figures", "view"):  # the modules that import these packages
        monkeypatch.delitem(sys.modules, f"fastreg.benchmarks.{name}", raising=False)
        monkeypatch.delattr(benchmarks, name, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(tmp_path, "--ops", "fgsm") == 2
    assert (
        capsys.readouterr().err
        == f'fastreg bench: {missing} is missing; run: pip install "torch-fastreg[bench]"\n'
    )


def test_interrupt_leaves_the_rows_that_had_finished(tmp_path, monkeypatch, capsys):
    real, calls = _timing.measure_case, []

    def interrupted(case, *args, **kwargs):
        calls.append(case)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(case, *args, **kwargs)

    monkeypatch.setattr(_timing, "measure_case", interrupted)
    assert main(tmp_path, "--ops", "fgsm") == 130
    results = read(tmp_path)
    assert results["partial"] is True and len(results["rows"]) == 2 and results["planned"] == 4
    assert "Interrupted after 2 of 4 cases" in capsys.readouterr().out
    assert (
        "Interrupted after 2 of 4 cases" in (tmp_path / "table.md").read_text()
        and (tmp_path / "ratios.png").exists()
    )
