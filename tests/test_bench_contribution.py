"""Results that are shown to others: nothing personal is in them, and the files are whole."""

import copy
import getpass
import json
import socket

import pytest
from helpers import ROOT

from fastreg.benchmarks import contribution

FILES = sorted(ROOT.glob("benchmarks/results/*.json"))


def ran(made):
    """What `fastreg bench` writes of a run, made from what is shown of one, with things that are personal."""
    results = copy.deepcopy(made)
    machine = results["machine"] | {
        "platform": "Linux-6.1.0-of-lovelace-x86_64-with-glibc2.36",
        "autograd": {"path": "C++", "node": "DropoutBackward"},
        "preload": "/home/lovelace/lib.so",
        "doctor": {"python": "3.11", "host": socket.gethostname()},
        "host": socket.gethostname(),
    }
    results["rows"][0]["notes"] = ["torch.compile failed: OSError: /home/lovelace/cache is full"]
    return results | {
        "schema": 1,
        "started": "2026-11-29T08:43:26+01:00",
        "machine": machine,
        "failed": [{"op": "sgd", "case": "SGD", "error": "OSError: /home/lovelace"}],
        "partial": False,
    }


@pytest.fixture
def made():
    return contribution.load(FILES[0])


def test_what_is_shown_holds_all_rows_and_nothing_personal(made):
    shown = contribution.contribution(ran(made))
    assert shown["rows"][0]["notes"] == ["torch.compile failed"]
    assert [row["against_eager"] for row in shown["rows"]] == [row["against_eager"] for row in made["rows"]]
    assert shown["date"] == "2026-11-29" and shown["machine"]["system"] == "Linux x86_64"
    text = json.dumps(shown)
    assert "lovelace" not in text and "/home" not in text and "08:43" not in text
    assert contribution.file_name(shown).endswith("-1-threads-2026-11-29.json")


def test_a_run_that_was_cut_short_is_not_shown(made):
    for cut in ({"partial": True}, {"rows": []}):
        with pytest.raises(contribution.NotAContribution, match="whole run"):
            contribution.contribution(ran(made) | cut)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda made: made.update(host="x"), "host has no place"),
        (lambda made: made["machine"].update(host="x"), "host has no place"),
        (lambda made: made["machine"].pop("cpu"), "cpu is missing"),
        (lambda made: made["machine"].update(cores="two"), "machine.cores: expected integer, got str"),
        (lambda made: made["machine"].update(cores=True), "machine.cores: expected integer, got bool"),
        (
            lambda made: made["rows"][0]["notes"].append("/home"),
            r"rows\[0\].notes\[0\]: expected what matches",
        ),
        (lambda made: made.update(format=2), "format: expected 1, got 2"),
    ],
)
def test_what_does_not_fit_the_schema_is_refused(made, change, complaint):
    change(made)
    with pytest.raises(contribution.NotAContribution, match=complaint):
        contribution.check(made)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_files_fit_the_schema(file):
    made = contribution.load(file)
    assert made["settings"]["scale"] in ("full", "quick") and file.name.startswith(
        contribution.file_name(made).removesuffix(".json")
    )
    assert len({row["op"] for row in made["rows"]}) >= 2
    text = file.read_text()
    assert "/home" not in text and socket.gethostname() not in text
    assert getpass.getuser() == "root" or getpass.getuser() not in text


def test_the_command_writes_it_at_the_end_or_of_an_earlier_run(tmp_path, monkeypatch, capsys):
    for package in ("matplotlib", "rich"):
        pytest.importorskip(package, reason='the benchmark needs pip install "torch-fastreg[bench]"')
    from fastreg.benchmarks import command

    for name, value in command.ALLOCATOR.items():  # or the command would start itself anew with them
        monkeypatch.setenv(name, value)
    arguments = ["--tiny", "--no-compile", "--ops", "fgsm", "--out", str(tmp_path)]
    assert command.main([*arguments, "--contribute"]) == 0
    (written,) = tmp_path.glob("*-threads-*.json")
    first = written.read_bytes()
    assert (
        contribution.load(written)["settings"]["scale"] == "tiny" and written.name in capsys.readouterr().out
    )
    written.unlink()
    assert command.main(["--contribute", str(tmp_path / "results.json")]) == 0
    assert written.read_bytes() == first
    assert command.main(["--contribute", str(written)]) == 2
    assert "fastreg bench: --contribute: " in capsys.readouterr().err
