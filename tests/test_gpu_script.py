"""`make gpu`: a step that fails or takes too long does not stop the others; summary and exit status say so;
what it would run exists.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from helpers import tool

gpu = tool("gpu")


def python(code):
    return [sys.executable, "-S", "-c", code]


def run(folder, *steps, seconds=60.0):
    results = gpu.run(list(steps), folder, dict(os.environ), seconds)
    return {result["name"]: result for result in results}, gpu.status_of(results)


def test_a_step_that_fails_does_not_stop_the_others(tmp_path):
    results, status = run(
        tmp_path,
        gpu.Step("good", python("print('fine')"), 20),
        gpu.Step("bad", python("print('broken here'); raise SystemExit(3)"), 20),
        gpu.Step("slow", python("import time; time.sleep(60)"), 1.0),
        gpu.Step("no program", ["/nonexistent/program"], 20),
        gpu.Step("last", python("print('fine too')"), 20),
    )
    assert [r["status"] for r in results.values()] == ["ok", "failed", "out of time", "failed", "ok"]
    assert status == 1 and results["bad"]["exit"] == 3 and results["slow"]["seconds"] < 10
    gpu.write_summary(tmp_path, list(results.values()), {"GPU": "none"})
    whole = json.loads((tmp_path / "summary.json").read_text())
    assert whole["status"] == 1 and [step["name"] for step in whole["steps"]] == list(results)
    said = (tmp_path / "summary.md").read_text()
    assert "something failed" in said and "broken here" in said and "| slow | out of time |" in said


def test_what_a_step_started_ends_with_it(tmp_path):
    """A test that hangs may have children, which would go on using the GPU."""
    child = "import time; time.sleep(60)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-S', '-c', {child!r}]); "
    code += "print(p.pid, flush=True); p.wait()"
    run(tmp_path, gpu.Step("parent", python(code), 1.5))
    pid = (tmp_path / "parent.txt").read_text().strip()
    state = Path(f"/proc/{pid}/stat")
    assert pid and (not state.exists() or state.read_text().split(") ")[1][0] == "Z")


@pytest.mark.parametrize(
    "changes, want",
    [(dict(), 0), (dict(why_not="no GPU"), 2), (dict(why_not="not on PATH", needed=False), 0)],
    ids=["all", "no GPU", "no sanitizer"],
)
def test_the_exit_status(tmp_path, changes, want):
    step = gpu.Step("step", python("pass"), 20)._replace(**changes)
    results, status = run(tmp_path, step)
    assert status == want and results["step"].get("reason", "") == changes.get("why_not", "")


def test_no_step_starts_without_time(tmp_path):
    results, status = run(tmp_path, gpu.Step("late", python("pass"), 20, reserve=100.0), seconds=60)
    assert results["late"]["reason"] == "no time left" and status == 2


def test_what_would_be_run_exists(tmp_path, capsys):
    """A rehearsal without a GPU: nothing runs, and the files that the commands name are there."""
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "out"), "--tools", str(tmp_path)]) == 0
    steps = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
    assert [s["name"] for s in steps] == ["configure", "build", "doctor", "tests", "sanitizer", "bench"]
    named = [word for step in steps for word in step["command"] if word.endswith(".py")]
    assert named and all(Path(word).is_file() for word in named)
    assert {step["status"] for step in steps} == {
        "dry run"
    } and "| tests | dry run |" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "why_no_gpu", lambda: "no GPU")
    monkeypatch.setattr(gpu, "machine", lambda dry: {})
    assert gpu.main(["--out", str(tmp_path), "--tools", str(tmp_path)]) == 2
    steps = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert {step["reason"] for step in steps} == {"no GPU"} and not (tmp_path / "site").exists()


def test_the_python_files_lie_beside_what_was_built(tmp_path):
    gpu.install_python(tmp_path)
    for name in ("__init__.py", "cli/doctor.py", "benchmarks/command.py", "lecture/__init__.py"):
        assert (tmp_path / "fastreg" / name).is_file(), name
    assert not list(tmp_path.rglob("*.so"))


def test_packed_tools_are_found(tmp_path):
    for path in ("cmake/data/bin/cmake", "bin/cmake", "bin/ninja", "pybind11/share/cmake/pybind11/x"):
        (tmp_path / "tools" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tools" / path).touch()
    environment = gpu.environment_of(tmp_path, tmp_path / "tools")
    assert environment["PATH"].startswith(str(tmp_path / "tools/cmake/data/bin"))
    assert environment["PYTHONPATH"].split(os.pathsep)[:2] == [
        str(tmp_path / "site"),
        str(tmp_path / "tools"),
    ]
    assert environment["FASTREG_CUDA_ARCHS"] == "native"
    assert gpu.pybind11_folder(environment)
